"""The whole copy of sharded weights that sampling reads: built once, filled in place when the shards have changed.

A module of its own, without hooks and collectives, so that ranks may sample at their own pace. It stays where it is,
since samplers and their CUDA graphs hold its addresses; a frozen model is gathered once.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import torch
from torch import Tensor, nn


class WholeCopy:
    """Every weight of `source` on every rank, in `dtype` on `device`; those too (`rounded`) that what `build` makes, on
    meta, would have in float32, and training rounds."""

    def __init__(
        self, build: Callable[[], Any], source: nn.Module, dtype: torch.dtype, device: torch.device, rounded: Set[str]
    ) -> None:
        self._build, self._source, self._dtype, self._device, self._rounded = build, source, dtype, device, rounded
        self._module: Any = None  # a CausalLM
        self._current = False

    @torch.no_grad()
    def module(self, gather: Callable[[dict[str, Tensor]], None]) -> Any:
        """The copy with the weights as they are now. Unless nothing has changed since the last call, `gather` fills its
        parameters, given by name; collective then."""
        if self._module is None:
            module = self._build().to(self._dtype)
            for p in map(module.get_parameter, self._rounded):
                p.data = p.data.to(self._dtype)
            module.to_empty(device=self._device)
            self._module = module.eval().requires_grad_(False)
        if not self._current:
            put_buffers(self._module, dict(self._source.named_buffers()))
            gather(dict(self._module.named_parameters()))
            self._current = True
        return self._module

    def outdate(self) -> None:
        """The shards change: the next `module` gathers again. To be called by whatever changes them."""
        self._current = False

    def free(self) -> None:
        """Gives the memory back, once nobody else holds the module; the next `module` builds and gathers again."""
        self._module, self._current = None, False


def put_buffers(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Copies buffers (rotary frequencies) as they are, never cast; in place where the shape is the same."""
    for name, own in list(module.named_buffers()):
        value = values[name]
        if own.shape == value.shape and own.dtype == value.dtype:
            own.copy_(value)
            continue
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        persistent = leaf not in owner._non_persistent_buffers_set
        owner.register_buffer(leaf, value.to(own.device, copy=True), persistent=persistent)
