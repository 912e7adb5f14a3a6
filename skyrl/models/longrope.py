"""Rotary embeddings of type longrope: short or long factors for each row, never by what else is in the batch.

Each row is rotated as if alone; where rows grow, the longest that can be (`limit`) decides for all (docs/models.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skyrl.kernels import exact_ops


class LongRope:
    """Which rows of a forward pass take the long factors. `limit`: the longest row there can be, 0 = unknown."""

    def __init__(self, switch: int) -> None:
        self.switch = switch  # tokens; longer rows take the long factors
        self.limit = 0
        self.long: Tensor | bool | None = None  # [T], or one for all; None = as transformers, by the longest position

    def choose(self, lengths_T: Tensor | None) -> None:
        """For the forward pass that follows: the length of the row of each token, where it is known."""
        if self.limit:
            self.long = self.limit > self.switch
        else:
            self.long = None if lengths_T is None else lengths_T > self.switch


def install(net: nn.Module) -> LongRope | None:
    """The choice for a model whose rotary embeddings are of type longrope, which go by it from now on; else None."""
    found = [module for module in net.modules() if getattr(module, "rope_type", None) == "longrope"]
    if not found:
        return None
    rope = LongRope(int(found[0].config.rope_parameters["original_max_position_embeddings"]))  # type: ignore[union-attr, index, arg-type]
    for module in found:
        if not hasattr(module, "skyrl_rope"):  # a copy of a model that has been here
            exact_ops.replace_forward(module, _rotations)
        module.skyrl_rope = rope  # type: ignore[assignment]
    return rope


def _rotations(module: Any, plain: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
    """cos and sin [1, T, C]; `plain` chooses by the largest position that it is given."""
    switch, long = module.skyrl_rope.switch, module.skyrl_rope.long
    if long is None:
        return plain(x, position_ids)
    if long is not True:
        short = plain(x, position_ids.clamp(max=switch - 1))
    if long is not False:
        beyond = position_ids.new_full((len(position_ids), 1), switch)
        extended = tuple(part[:, :-1] for part in plain(x, torch.cat([position_ids, beyond], 1)))
    if isinstance(long, bool):
        return extended if long else short
    return tuple(torch.where(long[None, :, None], a, b) for a, b in zip(extended, short, strict=True))
