"""One attention function, registered with transformers as "skyrl": the caller says how to attend, not the model.

Every decoder layer of a transformers model calls the registered function with its queries, keys and values. We hand
them to the object in `skyrl_attention`, which comes in as a keyword argument of the model's forward: packed rows in
training, a paged cache in sampling. The model's own code is never changed.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

NAME = "skyrl"


class Attention(Protocol):
    """One way to attend. The batch dimension is 1: all tokens of all sequences lie along T."""

    def attend(
        self,
        layer: int,
        query_HTC: Tensor,
        key_KTC: Tensor,
        value_KTC: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Attention of layer number `layer`, causal within each sequence; returns [T, H, C].

        `window`: a token sees itself and the window - 1 tokens before it. `softcap`: scores become
        softcap * tanh(score / softcap).
        """


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, C], key and value [1, K, T, C] -> [1, T, H, C], None."""
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention sinks are not supported")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = skyrl_attention.attend(
        module.layer_idx, query[0], key[0], value[0], scale=scale, window=sliding_window, softcap=softcap
    )
    return out.unsqueeze(0), None


def register() -> None:
    """Makes attn_implementation="skyrl" known to transformers. Safe to call again.

    No mask function is registered: for a name without one transformers builds no mask, while with one it first looks
    for packed rows in the positions, which waits for the device once per mask in every forward pass.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, forward)
