"""One attention function, registered with transformers as "skyrl": the caller says how to attend, not the model.

Every decoder layer of a transformers model calls it with its queries, keys and values. We hand them to the object in
`skyrl_attention`, which comes in as a keyword argument of the model's forward: packed rows in training, a paged cache
in sampling; `skyrl_positions_T` are the tokens' places in their rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from skyrl.models.latent import Latent, taken
from skyrl.models.linear_attention import DeltaRule

NAME = "skyrl"


@dataclass(frozen=True)
class AttentionOptions:
    """What a layer asks of attention besides its tensors.

    `window`: a token sees itself and the window - 1 tokens before it. `softcap`: scores become
    softcap * tanh(score / softcap). `chunk`: a row is cut into pieces of that many tokens, and a token sees none of
    another piece. `sinks_H`: a score of each head that takes part in the softmax and has no value.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    chunk: int | None = None
    sinks_H: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether scores are products alone, which fused kernels take."""
        return not self.softcap and self.sinks_H is None


class Attention(Protocol):
    """One way to attend. The batch dimension is 1: all tokens of all sequences lie along T. An attention that is used
    for models without linear attention only inherits from this and has no `recur`."""

    def attend(
        self, layer: int, query_HTC: Tensor, key_KTC: Tensor, value_KTC: Tensor, options: AttentionOptions
    ) -> Tensor:
        """Attention of layer number `layer`, causal within each sequence; returns [T, H, C]."""

    def recur(self, layer: int, rule: DeltaRule, mixed_TC: Tensor, decay_TH: Tensor, beta_TH: Tensor) -> Tensor:
        """Linear attention of layer number `layer`: `rule.run` over each sequence, [T, H, V] in its wide dtype."""
        raise RuntimeError(f"{type(self).__name__} keeps no states")


@runtime_checkable
class LatentAttention(Protocol):
    """An Attention that takes multi-head latent attention in its compressed form; others get keys and values."""

    def attend_latent(self, layer: int, query_HTC: Tensor, latent: Latent, *, scale: float) -> Tensor:
        """As Attention.attend, over what was kept of each token."""


def forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    skyrl_attention: Attention,
    skyrl_positions_T: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, C], key and value [1, K, T, C] -> [1, T, H, C], None."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if getattr(module, "attn_temperature_tuning", False) and not module.use_rope and skyrl_positions_T is not None:
        query = _tuned(module, query, skyrl_positions_T)
    latent = taken(module, key[0], value[0])
    if latent is not None and isinstance(skyrl_attention, LatentAttention):
        return skyrl_attention.attend_latent(module.layer_idx, query[0], latent, scale=scale).unsqueeze(0), None
    options = AttentionOptions(scale, sliding_window, softcap, _chunk(module), kwargs.get("s_aux"))
    return skyrl_attention.attend(module.layer_idx, query[0], key[0], value[0], options).unsqueeze(0), None


def _chunk(module: Any) -> int | None:
    """The piece of a row that a layer of Llama 4 sees; its module leaves that to the mask, so the config says it."""
    kinds = getattr(module.config, "layer_types", None)
    chunked = kinds is not None and kinds[module.layer_idx] == "chunked_attention"
    return module.config.attention_chunk_size if chunked else None


def _tuned(module: Any, query: Tensor, positions_T: Tensor) -> Tensor:
    """Queries of Llama 4's layers without rotation, whose size grows with the position: the module took the place among
    all tokens that it was given for it, and not that in the row."""

    def size(position_T: Tensor) -> Tensor:
        return torch.log1p(torch.floor((position_T.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0

    place = torch.arange(query.shape[2], device=query.device)
    return (query * (size(positions_T) / size(place))[:, None]).to(query.dtype)


def register() -> None:
    """Makes attn_implementation="skyrl" known to transformers; safe to call again. Without a mask function, with which
    transformers would look for packed rows in the positions and wait for the device, once per mask and forward pass."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, forward)
