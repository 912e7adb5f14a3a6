"""DeepSpeed ZeRO 1, 2 and 3, set up through accelerate's plugin.

zero1 shards the optimizer: gradients are summed once a step, each rank steps its part, and weights are all-gathered
after the step. zero2 shards gradients too: each is reduced, during the backward pass, to the one rank that steps it.
zero3 shards weights too: they are gathered for each forward and backward pass of a layer, as FSDP2 does.

DeepSpeed owns flat buffers, hooks and collectives; its configuration holds it to the engine's meaning (what is asked of
it and why: docs/strategies.md). Clipping is ours, in a hook of AdamW: DeepSpeed's own adds
1e-6 to the norm. It copies masters into working weights nowhere but in `step`; after a load a step of size zero does
that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from skyrl.distributed.init import World
from skyrl.models.packed import PADDING_ROW, collate, loss_dtype
from skyrl.strategies.adam import (
    MOMENTS,
    all_finite,
    check_factors,
    largest,
    set_options,
    surely_finite,
    update_not_finite,
)
from skyrl.strategies.base import Strategy, full_tensor
from skyrl.strategies.fsdp import make_mesh
from skyrl.strategies.whole import WholeCopy
from skyrl.types import AdamParams, ForwardOutput, Metrics, Microbatch, RunError, UserError

_GATHER_ELEMENTS = 1 << 26  # zero3: weights gathered at a time for a whole copy
_BUCKET_ELEMENTS = 50_000_000  # reduced or gathered at a time: 200 MB in float32


class ZeroStrategy(Strategy):
    """A strategy over a DeepSpeed engine; trainable models only (a frozen one has nothing for ZeRO to shard).

    `model` holds whole weights, on the CPU for stage 3 and on the device otherwise; zero3 takes it apart and moves this
    rank's part to the device. `build` makes another module on the meta device, for the whole copy that zero3 samples
    from. offload: "optimizer" keeps masters, moments and the step in CPU memory, "all" zero3's weights too.

    Checkpoints have the names, shapes and kinds of FSDP2's: each tensor is gathered and cut into this rank's rows.
    """

    is_sharded = True

    def __init__(
        self,
        stage: int,
        model: Any,
        build: Callable[[], nn.Module],
        world: World,
        *,
        dtype: torch.dtype,
        offload: str = "none",
    ) -> None:
        self.world = world
        self._stage, self._dtype, self._model = stage, dtype, model
        self._whole = WholeCopy(build, model, dtype, world.device, model.kept(dtype))
        self._mesh = make_mesh(world)
        self._pending = 0
        self._given = AdamParams(lr=0.0)  # of the step under way
        self._sizes: list[float] = []
        self._kept: tuple[dict[Any, Tensor], dict[Any, dict[str, Tensor]]] | None = None
        self._engine, self._adam = _prepare(stage, model, world, dtype=dtype, offload=offload)
        self._named = [(name, p) for name, p in model.named_parameters()]
        self._adam.register_step_pre_hook(self._before_adam)
        self.module = _Front(self._engine, model)
        # The zero-sized step makes moments, so that a checkpoint always has the same tensors; it counts as none.
        self._step_of_size_zero()
        self._set_step_count(torch.zeros(()))

    # ---- training --------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` to what is pending. zero2 and zero3 reduce here, zero1 in `optim_step`."""
        self._engine.backward(loss * self.world.dp_size if self._stage == 3 else loss)
        self._pending += 1

    def optim_step(self, adam: AdamParams) -> Metrics:
        """One AdamW step on the shards. Returns {"grad_norm:mean"} of the summed gradient before clipping."""
        if self._pending == 0:
            self._backward_of_zero()
        check_factors(adam, self._number())
        set_options(self._adam, adam)
        self._given, self._kept = adam, None
        self._sizes = self._bounds()
        self._pending = 0
        self._whole.outdate()
        self._engine.step()
        if not self._engine.was_step_applied():
            raise RunError(
                "the gradient is not finite; no weight was changed; lower the learning rate, or go on from a "
                "checkpoint before"
            )
        states = self._adam.state.items()
        weights_and_moments = (
            t for p, state in states for t in (p.to(self._dtype), state[MOMENTS[0]], state[MOMENTS[1]])
        )
        if self._kept is not None and not all_finite(weights_and_moments, self.world.device):
            self._undo(*self._kept)
            raise update_not_finite(adam)
        return {"grad_norm:mean": self._norm()}

    def _number(self) -> float:
        """Of the step that comes next: 1, 2, ..."""
        return 1.0 + max((float(state["step"]) for state in self._adam.state.values()), default=0.0)

    def _bounds(self) -> list[float]:
        """Bounds on the absolute values of masters and moments, over all ranks."""
        states = self._adam.state.values()
        parts = [[p.detach() for p in self._adam.state], *([state[key] for state in states] for key in MOMENTS)]
        if not self._adam.state:  # before the first step there are no moments
            return [float("inf")] * 3
        sizes = torch.stack([largest(part) for part in parts]).to(self.world.device)
        dist.all_reduce(sizes, op=dist.ReduceOp.MAX)
        return sizes.tolist()

    def _undo(self, masters: dict[Any, Tensor], moments: dict[Any, dict[str, Tensor]]) -> None:
        """Takes a step back: masters, then, by a step of size zero, the weights that are made of them, then moments.
        That step needs a backward pass, so what is not finite goes out of the weights first."""
        with torch.no_grad():
            weight: Any
            for _, weight in self._named:
                weight.data.zero_()
                if self._stage == 3:  # where only this rank's part is kept, or that beside the whole
                    weight.ds_tensor.zero_()
            for p, kept in masters.items():
                p.copy_(kept)
            self._put_back(moments)
            self._step_of_size_zero()
            self._put_back(moments)

    def clear_gradient(self) -> None:
        """Drops what is pending, by a step of size zero whose moments are taken back; collective."""
        if self._pending == 0:
            return
        kept = self._moments()
        for group in self._adam.param_groups:
            group.update(lr=0.0)
        self._pending = 0
        self._engine.step()  # one that is not finite is dropped as well
        self._put_back(kept)

    def _moments(self) -> dict[Any, dict[str, Tensor]]:
        return {p: {key: t.clone() for key, t in state.items()} for p, state in self._adam.state.items()}

    def _put_back(self, kept: dict[Any, dict[str, Tensor]]) -> None:
        for p, state in kept.items():
            for key, tensor in state.items():
                self._adam.state[p][key].copy_(tensor)

    def _norm(self) -> float:
        # set by `step` before AdamW runs; the engine's own accessor has it only afterwards
        return float(self._engine.optimizer._global_grad_norm)

    def _before_adam(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Clips, and keeps masters and moments when the step may have to be taken back. zero3 comes here once for each
        of its groups of parameters; nothing has changed when it comes for the first."""
        norm, limit = self._norm(), self._given.grad_clip_norm
        if (
            self._kept is None
            and self._adam.state
            and not surely_finite(self._given, norm, self._number(), self._sizes)
        ):
            self._kept = {p: p.detach().clone() for p in self._adam.state}, self._moments()
        if limit > 0 and norm > limit:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(limit / norm)

    def _backward_of_zero(self) -> None:
        """A gradient of zero by DeepSpeed's own way of making one: it has no way to step without a backward."""
        batch = collate([PADDING_ROW], dtype=loss_dtype(self._dtype), device=self.world.device)
        with torch.enable_grad():
            out = self.module(batch)
            value_T = out.logprobs_T if out.values_T is None else out.values_T
            self.backward((value_T * torch.zeros_like(value_T)).sum())

    def _step_of_size_zero(self) -> None:
        self._backward_of_zero()
        self.optim_step(AdamParams(lr=0.0))

    def _set_step_count(self, step: Tensor) -> None:
        for state in self._adam.state.values():
            state["step"].copy_(step)

    # ---- weights and state -----------------------------------------------------------------------------------------

    def gathered(self) -> Any:
        """zero1, zero2: the model itself. zero3: a whole module in the compute dtype, gathered after each change."""
        return self._model if self._stage < 3 else self._whole.module(self._gather)

    def free_gathered(self) -> None:
        """zero3: gives the memory of `gathered` back."""
        self._whole.free()

    def _gather(self, targets: dict[str, Tensor]) -> None:
        import deepspeed

        self._engine.optimizer.empty_partition_cache()  # a forward without a backward may leave weights gathered
        for portion in self._portions():
            with deepspeed.zero.GatheredParameters([p for _, p in portion]):
                for name, p in portion:
                    targets[name].copy_(p.detach())

    def _portions(self) -> Iterator[list[tuple[str, Any]]]:
        portion: list[tuple[str, Any]] = []  # DeepSpeed adds attributes to the parameters
        size = 0
        p: Any
        for name, p in self._named:
            if portion and size + p.ds_numel > _GATHER_ELEMENTS:
                yield portion
                portion, size = [], 0
            portion.append((name, p))
            size += p.ds_numel
        yield portion

    def state_dict(self, *, optimizer: bool) -> dict[str, Any]:
        """DTensors by parameter name, copies: {"weights", "exp_avg", "exp_avg_sq"} and "step"; float32 masters."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        out: dict[str, Any] = {"weights": {n: self._rows(safe_get_full_fp32_param(p)) for n, p in self._named}}
        if optimizer:
            for key in MOMENTS:
                out[key] = {n: self._rows(safe_get_full_optimizer_state(p, key)) for n, p in self._named}
            out["step"] = next(iter(self._adam.state.values()))["step"].detach().cpu().clone()
        return out

    def _rows(self, whole: Tensor) -> DTensor:
        count = -(-whole.shape[0] // self.world.dp_size)  # as Shard(0) deals rows
        own = whole[self.world.dp_rank * count : (self.world.dp_rank + 1) * count].to(self._device, copy=True)
        return DTensor.from_local(
            own, self._mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )

    @property
    def _device(self) -> torch.device:
        return next(iter(self._adam.state.values()))["exp_avg"].device  # where there is room: with the masters

    def load_state_dict(self, state: dict[str, Any], *, optimizer: bool) -> None:
        """Takes a filled `state_dict`, one whole tensor at a time; drops what is pending."""
        self.clear_gradient()
        kept = self._moments()
        with torch.no_grad():
            for name, p in self._named:
                self._set(p, full_tensor(state["weights"][name]))
            self._step_of_size_zero()
            self._put_back(kept)
            if optimizer:
                for key in MOMENTS:
                    for name, p in self._named:
                        self._set(p, full_tensor(state[key][name]), key)
                self._set_step_count(state["step"])

    def _set(self, p: Any, whole: Tensor, *key: str) -> None:
        """This rank's part of a master, or with `key` of a moment, from the whole tensor."""
        from deepspeed import utils

        if self._stage < 3:
            (utils.safe_set_full_optimizer_state if key else utils.safe_set_full_fp32_param)(p, whole, *key)
            return
        # DeepSpeed's own function for whole tensors reads past the end where the ranks do not divide one
        count = p.ds_tensor.numel()
        own = whole.new_zeros(count)
        part = whole.flatten()[self.world.dp_rank * count : (self.world.dp_rank + 1) * count]
        own[: len(part)] = part
        (utils.safe_set_local_optimizer_state if key else utils.safe_set_local_fp32_param)(p, own, *key)

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, p in self._named:
            yield name, safe_get_full_fp32_param(p)


class _Bridge(nn.Module):
    """What DeepSpeed wraps: its hooks see tensors in dicts and tuples, not in our dataclasses."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, fields: dict[str, Any], options: dict[str, Any]) -> dict[str, Tensor]:
        # Not by calling the model: the output embedding, which it uses outside of its module, then belongs to this
        # module, whose outputs have the hook that gathers it again for the backward pass.
        out = self.model.forward(Microbatch(**fields), **options)
        return {key: value for key, value in vars(out).items() if value is not None}


class _Front(nn.Module):
    """The model's own call over DeepSpeed's engine; everything else about it is the model's."""

    def __init__(self, engine: Any, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["_behind"] = (engine, model)  # no submodules, and there before any other name is looked up
        self._modules.update(model.named_children())  # the names of parameters stay

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_behind"][1], name)

    def __setattr__(self, name: str, value: Any) -> None:  # what one of them notes (a mixture's routing) both have
        setattr(self.__dict__["_behind"][1], name, value)

    def forward(self, batch: Microbatch, **options: Any) -> ForwardOutput:
        return ForwardOutput(**self._behind[0](dict(vars(batch)), options))


def _prepare(
    stage: int, model: nn.Module, world: World, *, dtype: torch.dtype, offload: str
) -> tuple[Any, torch.optim.AdamW]:
    """DeepSpeed's engine around `model`, and the AdamW that it steps. Raises UserError for a DeepSpeed too old."""
    os.environ["DS_ACCELERATOR"] = world.device.type  # before the import, which would take any GPU it finds
    import deepspeed
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin
    from transformers.integrations import unset_hf_deepspeed_config

    if not hasattr(deepspeed.DeepSpeedEngine, "managed_gradient_accumulation"):
        raise UserError(
            f"strategy.name=zero{stage}: DeepSpeed {deepspeed.__version__} averages over a set number of micro-batches "
            "and cannot be told not to; install deepspeed>=0.19.8, or use strategy.name=fsdp"
        )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Its own all-reduce between CPU processes of a node is compiled at the first start, which needs a compiler and
    # leaves a lock when it is killed; without it torch's gloo does the same sums.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = _config(stage, model, world, dtype, offload)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    # DeepSpeed prints banners and build messages to stdout, which belongs to our own lines.
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), _accelerate_environment(world):
        AcceleratorState._reset_state(reset_partial_state=True)  # it is of the whole process; each model has a plugin
        plugin = DeepSpeedPlugin(hf_ds_config=config)
        accelerator = Accelerator(
            deepspeed_plugin=plugin,
            mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
            kwargs_handlers=[InitProcessGroupKwargs(backend=backend)],
        )
        if stage == 3:
            deepspeed.zero.Init(
                module=model,
                config_dict_or_path=plugin.deepspeed_config,
                mem_efficient_linear=False,  # it would replace torch's linear for the whole process
                remote_device="cpu" if offload == "all" else None,
                pin_memory=offload == "all" and world.device.type == "cuda",
            )
        adam = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        engine, _ = accelerator.prepare(_Bridge(model), adam)
    unset_hf_deepspeed_config()  # set by the plugin: transformers would take apart every model that is made from now on
    return engine, adam


@contextmanager
def _accelerate_environment(world: World) -> Iterator[None]:
    """Hides what `accelerate launch` said about plugins and devices: the run's options decide. With its own flag for
    CPUs set accelerate would wrap the model in DDP and never ask DeepSpeed; the device is named instead. DeepSpeed
    reads its place from a launcher's variable, which a single process may lack."""
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    kept = {key: value for key, value in os.environ.items() if key.startswith(("ACCELERATE_", "FSDP_"))}
    for key in kept:
        del os.environ[key]
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(world.device)
    try:
        yield
    finally:
        for key in [key for key in os.environ if key.startswith(("ACCELERATE_", "FSDP_"))]:
            del os.environ[key]
        os.environ.update(kept)


def _config(stage: int, model: nn.Module, world: World, dtype: torch.dtype, offload: str) -> dict[str, Any]:
    """DeepSpeed's configuration: `step` alone ends an update, gradients are summed (zero3 averages, see `backward`) in
    float32, and a step whose gradient is not finite is not made."""
    gpu = world.device.type == "cuda"
    # Buffers are taken whole at every step, whatever the size of the model.
    size = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    bucket = min(_BUCKET_ELEMENTS, size + size % 2)  # DeepSpeed wants an even number
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": gpu and stage >= 2,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if stage == 3:
        # Norms and biases stay whole on every rank: a gather of their own would cost more than it saves.
        zero["stage3_param_persistence_threshold"] = max(
            (p.numel() for p in model.parameters() if p.ndim < 2), default=0
        )
        zero["stage3_prefetch_bucket_size"] = bucket
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": gpu}
    if offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": gpu}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # unused, but asked for
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 1 << 40,
    }
    if stage < 3:
        config["gradient_allreduce_op"] = "sum"
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return config
