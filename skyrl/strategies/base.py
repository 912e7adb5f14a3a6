"""What the engine asks of a layout of weights over ranks. One instance holds one model and its optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from skyrl.distributed.init import World
from skyrl.types import AdamParams, Metrics


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself; of a sharded one all of it (collective)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself; of a sharded one this rank's part, which may be written to."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Strategy(ABC):
    """Sums gradients over micro-batches, calls and ranks; never averages. Every method is collective.

    Why sums: a mean needs a denominator, and with rows of unequal length every way of cutting the batch into ranks and
    micro-batches would give another one. Here the denominators are in the rows' weights, computed once for the whole
    batch, so any way of adding the parts up gives the same gradient.

    `module` is what forward passes call. Gradients add up from one `backward` to the next until `optim_step`.
    `is_sharded`: forward or backward passes are collectives, so all ranks have to make equally many of them, through
    the same layers. Where it is False a rank may compute as much as it likes on its own.
    """

    world: World
    module: Any  # a CausalLM, or what DeepSpeed makes of one
    is_sharded: bool

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` (this rank's sum) to what is pending."""
        loss.backward()

    @abstractmethod
    def optim_step(self, adam: AdamParams) -> Metrics:
        """Sums the pending gradient over ranks, clips it, makes one AdamW step and clears it.

        Returns {"grad_norm:mean"} of the summed gradient before clipping. A gradient that is not finite raises
        RunError on every rank before any weight changes. With nothing pending the gradient counts as zero.
        """

    @abstractmethod
    def clear_gradient(self) -> None:
        """Drops what is pending, also what is not finite; weights and moments stay as they are, bit for bit."""

    @abstractmethod
    def gathered(self) -> Any:
        """A module with whole weights as they are now on every rank, which may be called without collectives until the
        weights change: the model itself, or a copy that every later call fills in place where they have changed."""

    def free_gathered(self) -> None:
        """Gives the memory of such a copy back; the next `gathered` makes another."""
        return None

    def offload(self) -> None:
        """Moves an idle model to host memory where the layout can do that (else nothing); only `onload` may be called
        then."""
        return None

    def onload(self) -> None:
        """Takes `offload` back, bit for bit."""
        return None

    @abstractmethod
    def state_dict(self, *, optimizer: bool) -> dict[str, Any]:
        """Tensors and DTensors by name, ready for torch.distributed.checkpoint; full precision (masters)."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any], *, optimizer: bool) -> None:
        """Takes back what `state_dict` gave, after it was filled."""

    def full_state_dict(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Whole weights on the CPU of rank 0 ({} elsewhere), named as in the module, gathered one by one; those that a
        model in `dtype` has in float32 in that."""
        out, kept = {}, self.module.kept(dtype) if hasattr(self.module, "kept") else ()
        for name, tensor in self._weights():
            if self.world.is_leader:
                out[name] = tensor.to("cpu", torch.float32 if name in kept else dtype, copy=True)
        return out

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.state_dict(optimizer=False)["weights"].items():
            yield name, full_tensor(tensor)


def put_state(own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Copies the tensors of a filled `state_dict`, the number of steps aside, where they belong; those that were filled
    in place are there."""

    for key in own.keys() - {"step"}:
        for name, tensor in own[key].items():
            if local_tensor(tensor).data_ptr() != local_tensor(state[key][name]).data_ptr():
                tensor.copy_(state[key][name])
