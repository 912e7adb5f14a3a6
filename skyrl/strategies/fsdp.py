"""FSDP2: weights, gradients and optimizer state in shards; each layer is gathered where it is needed.

What moves, for each micro-batch and each unit (a decoder layer, or the embeddings, head and norm together): before its
forward pass an all-gather of its weights, freed after it (reshard_after_forward); before its backward pass the same
again; after its backward pass a reduce-scatter that leaves every rank the sum of its own shard's gradient. AdamW then
touches local shards only, and nothing more is sent but the norm for clipping. This is what ZeRO calls stage 3. Where
ddp sends each gradient once a step, this sends weights twice and gradients once a micro-batch, and keeps 1/N of it all.

Masters are float32 shards (float64 for a float64 model); a bfloat16 model computes in gathered bfloat16 and reduces
gradients in float32. Gradients are summed over ranks, not averaged. HSDP is the same over a mesh of two dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from skyrl.distributed.init import World
from skyrl.strategies.adam import MOMENTS, all_finite, checked_step, largest, square_sum
from skyrl.strategies.base import Strategy, full_tensor, put_state
from skyrl.strategies.optimizers import make_optimizer, matrix_names
from skyrl.strategies.whole import WholeCopy
from skyrl.tracking.advisories import warn_fallback
from skyrl.types import AdamParams, Metrics, UserError, few


class FSDPStrategy(Strategy):
    """A strategy over `fully_shard`, one unit per decoder layer and one for the rest.

    `build` makes the module, on the meta device, with masters' dtype; `fill(module, device)` puts weights into a module
    whose parameters are whole or sharded. Sampling reads a second, whole module in the compute dtype, made by `build`
    too (whole.py).

    shard_size: ranks that share one copy, 0 = all; it divides the world. offload: shards in CPU memory.
    """

    is_sharded = True

    def __init__(
        self,
        build: Callable[[], Any],
        fill: Callable[[Any, torch.device], None],
        world: World,
        *,
        dtype: torch.dtype,
        shard_size: int = 0,
        offload: bool = False,
        reshard_after_forward: bool = True,
        trainable: bool = True,
        optimizer: str = "adamw",
    ) -> None:
        self.world = world
        self._dtype = dtype
        self._copies = world.dp_size // shard_size if shard_size else 1
        mesh = make_mesh(world, shard_size)
        offload_policy = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if offload else OffloadPolicy()
        master = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        module = build().to(master)
        policy = (
            MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=master) if dtype != master else MixedPrecisionPolicy()
        )
        shard = partial(fully_shard, mesh=mesh, offload_policy=offload_policy)
        rounded, exact = set(module.kept(dtype)), set[str]()
        for path, part in module.named_modules():  # what is float32 as a whole (a router) is a unit of its own
            names = {f"{path}.{name}" for name, _ in part.named_parameters()}
            if names and names <= rounded and not names & exact:
                exact |= names
                shard(part, reshard_after_forward=reshard_after_forward)
        if rounded := rounded - exact:
            warn_fallback(f"fsdp rounds to bfloat16 what ddp has in float32: {few(sorted(rounded))}")
        shard = partial(shard, mp_policy=policy)
        for layer in module.layers():
            shard(layer, reshard_after_forward=reshard_after_forward)
        shard(module)
        self._units = [part for part in module.modules() if isinstance(part, FSDPModule)]
        self._divided = sum_gradients(self._units, world.device, master, world.dp_size, self._copies)
        fill(module, torch.device("cpu") if offload else world.device)
        if offload:
            for part in module.modules():  # registered again, since FSDP keeps them where the shards are
                for name, buffer in part.named_buffers(recurse=False):
                    part._buffers[name] = buffer.to(world.device)
        for p in module.parameters():
            p.requires_grad_(trainable)
        self.module = module
        self._whole = WholeCopy(build, module, dtype, world.device, rounded)
        self._named = list(module.named_parameters())  # shards; while a unit is gathered the module has others
        self._optimizer: torch.optim.Optimizer | None = None
        if trainable:
            matrices = matrix_names(module) if optimizer == "muon" else set()
            rest, whole = ([p for n, p in self._named if (n in matrices) == muon] for muon in (False, True))
            # On a CPU the two kinds differ in the last bit; foreach stays there, so that runs of before go on as they
            # were.
            self._optimizer = make_optimizer(optimizer, rest, whole, world.device, fused=offload)

    def optim_step(self, adam: AdamParams) -> Metrics:
        """One AdamW step on the shards. Returns {"grad_norm:mean"} of the summed gradient before clipping."""
        assert self._optimizer is not None
        self._reshard()
        self._whole.outdate()
        params = [p for _, p in self._named]
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        shards = [p.grad.to_local() for p in params]
        if self._divided != 1:
            torch._foreach_mul_(shards, self._divided)
        states = [self._optimizer.state[p] for p in params]
        local = [
            [p.detach().to_local() for p in params],
            *([s[key].to_local() for s in states if key in s] for key in MOMENTS),
        ]
        # The sum of the squares is above the square of the largest: one collective gives the norm and all bounds.
        totals = torch.stack([torch.stack([square_sum(g) for g in shards]).sum(), *(largest(t) ** 2 for t in local)])
        dist.all_reduce(totals)
        totals[0] /= self._copies  # every copy has added the same squares
        norm, *bounds = totals.sqrt().tolist()
        measures = [norm, float(states[0]["step"]) + 1, *bounds]
        weights, *moments = local
        state = [t for part in moments for t in part]

        def is_finite() -> bool:
            return all_finite([*(t.to(self._dtype) for t in weights), *state], totals.device)

        tensors = [*weights, *state, *(s["step"] for s in states)]
        checked_step(self._optimizer, adam, shards, measures, tensors, is_finite)
        self._optimizer.zero_grad(set_to_none=True)
        return {"grad_norm:mean": norm}

    def clear_gradient(self) -> None:
        """Drops what is pending."""
        for _, p in self._named:
            p.grad = None

    def _reshard(self) -> None:
        """A forward without a backward leaves what is not resharded after it (the root, always) gathered: the next
        forward would take these weights again, also after an optimizer step or a load."""
        for unit in self._units:
            unit.reshard()

    def gathered(self) -> Any:
        """A whole module in the compute dtype with the weights as they are now; one gather after each change."""
        return self._whole.module(self._gather)

    def free_gathered(self) -> None:
        """Gives the memory of `gathered` back."""
        self._whole.free()

    def _gather(self, targets: dict[str, Tensor]) -> None:
        for name, p in self._named:
            # rounded before the gather: half the bytes, and the very values that training computes with; on the device,
            # so that a gather of offloaded weights does not go over the CPU's network
            targets[name].copy_(full_tensor(p.detach().to(targets[name].dtype).to(self.world.device)))

    def state_dict(self, *, optimizer: bool) -> dict[str, Any]:
        """DTensors by parameter name: {"weights", "exp_avg", "exp_avg_sq"} and "step"."""
        out: dict[str, Any] = {"weights": {n: p.detach() for n, p in self._named}}
        if optimizer and self._optimizer is not None:
            for key in ("exp_avg", "exp_avg_sq"):
                state = self._optimizer.state
                out[key] = {n: state[p][key] for n, p in self._named if key in state[p]}
            out["step"] = self._optimizer.state[self._named[0][1]]["step"].to("cpu", copy=True)
        return out

    def load_state_dict(self, state: dict[str, Any], *, optimizer: bool) -> None:
        """Copies a filled `state_dict` back; shards that were filled in place stay as they are."""
        self._reshard()
        self._whole.outdate()
        put_state(self.state_dict(optimizer=optimizer), state)
        if optimizer and self._optimizer is not None:
            for _, p in self._named:
                self._optimizer.state[p]["step"].copy_(state["step"])


def sum_gradients(
    units: Sequence[FSDPModule], device: torch.device, dtype: torch.dtype, ranks: int, copies: int = 1
) -> int:
    """Gradients of the units are summed over all ranks, copies included, and not averaged: the loss carries every
    denominator. `dtype`: in which they are reduced. Returns what a gradient must still be multiplied by: 1 but for
    torch 2.7, whose public factor is NCCL's alone."""
    if hasattr(FSDPModule, "set_gradient_divide_factor"):
        for unit in units:
            unit.set_gradient_divide_factor(1.0)
            if device.type == "cpu":
                unit.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
        return 1
    for unit in units:
        group: Any = unit._get_fsdp_state()._fsdp_param_group
        group.reduce_scatter_reduce_op = dist.ReduceOp.SUM  # what the public factor sets, and gloo has this one
    return copies if dtype in (torch.float32, torch.bfloat16) else ranks  # others it divides besides


def make_mesh(world: World, shard_size: int = 0) -> DeviceMesh:
    """All ranks in one dimension "dp_shard"; with `shard_size`, "dp_replicate" x "dp_shard" of that many neighbours."""
    if not shard_size:
        return init_device_mesh(world.device.type, (world.dp_size,), mesh_dim_names=("dp_shard",))
    if world.device.type == "cpu" and not hasattr(FSDPModule, "set_gradient_divide_factor"):
        # An assertion in torch's own code fails, about an event that only GPUs have.
        what = f"strategy.name=hsdp: torch {torch.__version__} cannot sum over copies on a CPU"
        raise UserError(f"{what}; take fsdp, or a newer torch")
    shape = (world.dp_size // shard_size, shard_size)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))
