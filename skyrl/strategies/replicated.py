"""Whole weights on every rank: `single` on one process, `ddp` on several.

All parameters live in one flat buffer, and so do the gradients' sums, the masters and Adam's moments: each parameter
of the module is a view. Why one buffer: an all-reduce or an AdamW kernel costs about the same for ten numbers as for a
million, and a model has hundreds of tensors. Whoever reads the module's parameters (the sampler) sees the trained
weights themselves, without a copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from skyrl.distributed import phases
from skyrl.distributed.init import World
from skyrl.strategies.adam import MOMENTS, all_finite, checked_step, largest, square_sum
from skyrl.strategies.base import Strategy, put_state
from skyrl.strategies.optimizers import BOUNDS, QUANTISED, make_optimizer, matrix_names
from skyrl.types import AdamParams, Metrics

_BLOCK = 1 << 16  # elements that are cast at a time
_ALIGN = 64  # elements: each view starts on a cache line and on a boundary that vector kernels like


class ReplicatedStrategy(Strategy):
    """A strategy over flat buffers. With bfloat16 parameters, gradients are added into a float32 buffer after every
    backward, and AdamW works on float32 masters that are rounded into the parameters after each step; parameters that
    are float32 beside them are a part of the masters. With float32 or float64 the parameters are the masters. Ranks
    only sum, once, in `optim_step`. A frozen model has `masters` only where they are asked for.
    """

    is_sharded = False

    def __init__(
        self, module: nn.Module, world: World, *, trainable: bool = True, masters: bool = True, optimizer: str = "adamw"
    ) -> None:
        self.module = module
        self.world = world
        self.trainable = trainable
        self._home: torch.device | None = None  # while parked: where the tensors belong
        matrices = matrix_names(module) if trainable and optimizer == "muon" else set()
        # tied weights appear once; Muon's matrices lie at the end, so that all else is one buffer still
        self._named = sorted(module.named_parameters(), key=lambda one: one[0] in matrices)
        dtype = self._named[0][1].dtype
        low = dtype in (torch.bfloat16, torch.float16)
        self._kept = {name for name, p in self._named if p.dtype != dtype}  # in float32, beside `flat`
        assert low or not self._kept, "parameters of mixed dtypes"
        self._spans: dict[str, tuple[int, int]] = {}
        size = 0
        for name, p in self._named:
            self._spans[name] = (size, p.numel())
            size += -(-p.numel() // _ALIGN) * _ALIGN
        self.flat = torch.zeros(size, dtype=dtype, device=self._named[0][1].device)
        for name, p in self._named:
            self._view(self.flat, name, p).copy_(p.detach())
            p.requires_grad_(trainable)
        self._master = nn.Parameter(self.flat.float() if low and masters else self.flat, requires_grad=trainable)
        for name, p in self._named:
            if name not in self._kept:
                p.data = self._view(self.flat, name, p)
            elif not self._shared:  # a part of the masters itself; without them it stays where it is
                p.data = self._view(self._master.detach(), name, p).copy_(p.detach())
        self._optimizer: torch.optim.Optimizer | None = None
        if trainable:
            self._prepare_training(low, optimizer, matrices)

    def _view(self, flat: Tensor, name: str, like: Tensor) -> Tensor:
        start, count = self._spans[name]
        return flat[start : start + count].view(like.shape)

    @property
    def _shared(self) -> bool:
        return self._master.data_ptr() == self.flat.data_ptr()

    def _prepare_training(self, low: bool, optimizer: str, matrices: set[str]) -> None:
        self._grad = torch.zeros_like(self._master)
        self._master.grad = self._grad
        self._stepped, end = self._master, min((self._spans[name][0] for name in matrices), default=0)
        if matrices:
            self._stepped = self._part(self._master.detach()[:end], self._grad[:end])
        self._matrices = {
            n: self._part(self._view(self._master.detach(), n, p), self._view(self._grad, n, p))
            for n, p in self._named
            if n in matrices
        }
        self._optimizer = make_optimizer(
            optimizer, [self._stepped], list(self._matrices.values()), self.flat.device, fused=True
        )
        for name, p in self._named:
            if low and name not in self._kept:
                p.register_post_accumulate_grad_hook(_adds_into(weakref.ref(self), name))
            else:
                p.grad = self._view(self._grad, name, p)  # autograd then accumulates in place

    @staticmethod
    def _part(master: Tensor, grad: Tensor) -> nn.Parameter:
        part = nn.Parameter(master)
        part.grad = grad
        return part

    def _moments(self, key: str) -> dict[str, Tensor]:
        """Views of the first or second moment by parameter name; Muon's matrices have no second one."""
        assert self._optimizer is not None
        state = self._optimizer.state
        found = {n: state[part][key] for n, part in self._matrices.items() if key in state[part]}
        rest = [(n, p) for n, p in self._named if n not in self._matrices and key in state[self._stepped]]
        return {**{n: self._view(state[self._stepped][key], n, p) for n, p in rest}, **found}

    def optim_step(self, adam: AdamParams) -> Metrics:
        """One step of the optimizer from the sum over ranks. Returns {"grad_norm:mean"} before clipping."""
        assert self._optimizer is not None
        if self.world.dp_size > 1:
            phases.status.collective_bytes += self._grad.nbytes
            dist.all_reduce(self._grad)
        states = self._optimizer.state.values()
        pairs = zip(MOMENTS, BOUNDS, strict=True)
        bounds = [[state[key] for key in keys for state in states if key in state] for keys in pairs]
        sizes = [largest(part) for part in ([self._master.detach()], *bounds)]
        number = self._optimizer.state[self._stepped]["step"].double() + 1
        measures = torch.stack([square_sum(self._grad).sqrt(), number, *sizes]).tolist()
        tensors = [self._master.data, *(t for state in states for t in state.values())]
        checked_step(self._optimizer, adam, [self._grad], measures, tensors, self._is_finite)
        self._grad.zero_()
        if not self._shared:
            self.flat.copy_(self._master.detach())
        return {"grad_norm:mean": measures[0]}

    def _is_finite(self) -> bool:
        """Whether the weights, also when rounded, and the moments are finite; 0 is put between the views, where eps=0
        makes NaN of nothing."""
        assert self._optimizer is not None
        weights = self._master.detach().to(self.flat.dtype)
        bounds = [t for key, t in self._optimizer.state[self._stepped].items() if key in BOUNDS]
        moments = [t for key in MOMENTS for t in self._moments(key).values()]
        fine = all_finite([*(self._view(weights, n, p) for n, p in self._named), *moments, *bounds])
        if fine:
            self._master.data.nan_to_num_(nan=0.0)
        return fine

    def clear_gradient(self) -> None:
        """Drops what is pending."""
        if self.trainable:
            self._grad.zero_()

    # ---- idle models: everything in host memory -----------------------------------------------------------------

    @property
    def offloaded(self) -> bool:
        """Whether weights and optimizer lie in host memory; no other method may be called then but `onload`."""
        return self._home is not None

    def offload(self) -> None:
        """Moves weights, masters, moments and the pending gradient to host memory, pinned where there is a GPU."""
        if self.offloaded:
            return
        home = self.flat.device

        def away(t: Tensor) -> Tensor:
            return torch.empty(t.shape, dtype=t.dtype, pin_memory=home.type == "cuda").copy_(t)

        self._move(away)
        self._home = home

    def onload(self) -> None:
        """Moves everything back to where it was, bit for bit."""
        if self._home is not None:
            home, self._home = self._home, None
            self._move(lambda t: t.to(home, copy=True))

    def _move(self, move: Callable[[Tensor], Tensor]) -> None:
        """Puts every flat buffer through `move` and makes the parameters views of the new ones."""
        shared = self._shared
        self.flat = move(self.flat)
        for name, p in self._named:
            p.grad = None  # a gradient must lie where its parameter lies, also for a moment
            p.data = self._view(self.flat, name, p)
        self._master.grad = None
        self._master.data = self.flat if shared else move(self._master.data)
        if not self.trainable:
            return
        assert self._optimizer is not None
        self._grad = move(self._grad)
        self._master.grad = self._grad
        state = self._optimizer.state[self._stepped]  # all there is: an adapter is stepped by AdamW
        state.update({key: move(tensor) for key, tensor in state.items()})
        if shared:
            for name, p in self._named:
                p.grad = self._view(self._grad, name, p)

    def gathered(self) -> Any:
        """The module itself: every rank has whole weights."""
        return self.module

    def state_dict(self, *, optimizer: bool) -> dict[str, Any]:
        """Views by parameter name: {"weights", "exp_avg", "exp_avg_sq"} and "step"; masters where there are any.
        Moments in 8 bits as they lie in the buffer, {"quantised"}."""
        whole = self._master.detach()
        weights = {n: p.detach() if n in self._kept else self._view(whole, n, p) for n, p in self._named}
        out: dict[str, Any] = {"weights": weights}
        if optimizer and self._optimizer is not None:
            state = self._optimizer.state[self._stepped]
            parts = {key: self._moments(key) for key in MOMENTS}
            parts["quantised"] = {key: state[key] for key in QUANTISED if key in state}
            out |= {key: part for key, part in parts.items() if part}
            out["step"] = state["step"].cpu()
        return out

    def load_state_dict(self, state: dict[str, Any], *, optimizer: bool) -> None:
        """Copies a filled `state_dict` back (views that were filled in place copy onto themselves)."""
        put_state(self.state_dict(optimizer=optimizer), state)
        if optimizer and self._optimizer is not None:
            for part in self._optimizer.state.values():
                part["step"].copy_(state["step"])
        if not self._shared:
            self.flat.copy_(self._master.detach())


def _adds_into(owner: weakref.ref[ReplicatedStrategy], name: str) -> Any:
    """Weak, so that a model that is dropped frees its memory at once."""

    def hook(p: Tensor) -> None:
        strategy = owner()
        assert strategy is not None and p.grad is not None
        block = p.numel() if p.is_cuda else _BLOCK  # on a CPU a cast in the cache is twice as fast as a mixed sum
        total = strategy._view(strategy._grad, name, p).view(-1)
        for part, grad in zip(total.split(block), p.grad.reshape(-1).split(block), strict=True):
            part.add_(grad if p.is_cuda else grad.float())
        p.grad = None

    return hook
