"""Multi-head latent attention over a compressed cache, which keeps what the keys and values of a token are made from:
a small vector and a rotated part of the key that all heads share. Attention is over these, with one key head: kv_b_proj
is applied to queries and results (docs/models.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

KEPT = "skyrl_latent"


@dataclass
class Latent:
    """What a layer makes of the step's tokens, and how keys and values come from it. Letters: H heads, R rank."""

    kept_TC: Tensor  # the small vector [T, R] and the rotated part of the key beside it
    rank: int
    value_size: int
    _module: Any

    def queries(self, query_HTC: Tensor) -> Tensor:
        """Queries for the kept vectors, [H, T, C of these]."""
        size = self._module.qk_nope_head_dim
        parts = [
            torch.bmm(query_HTC[:, start:stop, :size], weight_HXR[:, :size])
            for start, stop, weight_HXR in self._weights()
        ]
        return torch.cat([torch.cat(parts, 1), query_HTC[..., size:]], -1)

    def values(self, out_THR: Tensor) -> Tensor:
        """Weighted sums of the small vectors to those of values, [T, H, value_size]."""
        parts = [
            torch.bmm(out_THR[start:stop].transpose(0, 1), weight_HXR[:, -self.value_size :].transpose(1, 2))
            for start, stop, weight_HXR in self._weights()
        ]
        return torch.cat(parts, 1).transpose(0, 1)

    def _weights(self) -> list[tuple[int, int, Tensor]]:
        """kv_b_proj by heads for stretches of tokens that have one adapter."""
        linear, out = self._module.kv_b_proj, []
        router, path = getattr(linear, "skyrl_adapters", (None, ""))
        places = router.places if router is not None and router.places else [(0, len(self.kept_TC), None)]
        for start, stop, adapter in places:
            weight, pair = linear.weight, None if adapter is None else adapter.pairs.get(path)
            if adapter is not None and pair is not None:
                weight = weight + adapter.scale * (pair[1] @ pair[0])
            out.append((start, stop, weight.view(-1, self._module.qk_nope_head_dim + self.value_size, self.rank)))
        return out


def install(net: nn.Module) -> None:
    """Has the layers that can be sampled from a compressed cache note what they make keys and values from."""
    for module in net.modules():
        linear = getattr(module, "kv_b_proj", None)
        if hasattr(module, "expand_kv") and type(linear) is nn.Linear and linear.bias is None:
            linear.register_forward_pre_hook(_note)


def _note(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
    if not torch.is_grad_enabled():
        linear.__dict__[KEPT] = args[0]


def taken(module: Any, key_HTC: Tensor, value_HTC: Tensor) -> Latent | None:
    """What the layer has noted of the step, once; None for layers of other kinds and in training."""
    linear = getattr(module, "kv_b_proj", None)
    vectors = None if linear is None else linear.__dict__.pop(KEPT, None)
    if vectors is None:
        return None
    vectors_TR = vectors.reshape(-1, vectors.shape[-1])
    kept_TC = torch.cat([vectors_TR, key_HTC[0, :, module.qk_nope_head_dim :]], -1)
    return Latent(kept_TC, vectors_TR.shape[-1], value_HTC.shape[-1], module)
