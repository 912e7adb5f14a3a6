"""The engine: the only owner of weights. The training loop and the Tinker server both drive it.

Every public method is collective: all ranks call it, in the same order, each with its own rows. Rows come back local,
metrics come back global. The engine only sums:

    L = sum over rows d and tokens t of weights[d, t] * loss[d, t]

over micro-batches, calls and ranks, until `optim_step` of that model. Means, denominators and masks are all in the
weights, so micro-batches, packing, world size and strategy change nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from skyrl.algorithms.losses import LOSSES, compute_loss
from skyrl.config.schema import RunConfig
from skyrl.distributed.balance import pack
from skyrl.distributed.collectives import gather_objects, on_leader
from skyrl.distributed.init import World
from skyrl.models.export import export_model
from skyrl.models.forward import CausalLM
from skyrl.models.load import check_against_transformers, load_tokenizer
from skyrl.models.lora import Adapter, Segment, install, routed
from skyrl.models.packed import collate, loss_dtype
from skyrl.models.peft import merge_adapter, write_adapter
from skyrl.models.results import RowResults
from skyrl.models.weights import put
from skyrl.sampler.sampler import Sampler, make_sampler
from skyrl.strategies.base import Strategy
from skyrl.strategies.make import make_strategy
from skyrl.strategies.replicated import ReplicatedStrategy
from skyrl.types import AdamParams, Datum, LoraSpec, LossSpec, Metrics, RunError, TrainOutput, UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class ModelSpec:
    """What to create. `head`: logits (a policy) or value (a critic). A frozen model has no gradient and no optimizer.
    `copy_of` starts from another model of this engine, as it is now, instead of from `model.path`.
    `lora` makes a tenant: adapters over the frozen model `base`, whole on every rank however the base is laid out."""

    head: Literal["logits", "value"] = "logits"
    trainable: bool = True
    copy_of: str = ""
    lora: LoraSpec | None = None
    base: str = ""


@dataclass
class _Model:
    spec: ModelSpec
    strategy: Strategy
    version: int = 0
    sampler: Sampler | None = None


@dataclass
class _Call:
    """What one call of `_run` computes: with which adapter each row, and which rows together. All ranks do `count`
    micro-batches, where a forward pass is a collective."""

    base: str
    adapters: list[Adapter | None]
    microbatches: list[list[int]]
    count: int


@dataclass(frozen=True)
class OpenSampler:
    """A frozen base as it is sampled: whole weights, and a sampler that stays open, over all published adapters."""

    module: CausalLM
    sampler: Sampler


class Engine:
    """Owner of all weights. Rows come back local, metrics come back global.

    `plan` gives the resolved dtype, strategy and row limit. Raises UserError for a model that cannot be loaded or is
    not supported.
    """

    def __init__(self, cfg: RunConfig, world: World, *, dtype: str, strategy: str, max_row_tokens: int) -> None:
        self.cfg = cfg
        self.world = world
        self.dtype = DTYPES[dtype]
        self.strategy_name = strategy
        self.max_row_tokens = max_row_tokens
        self.tokenizer = load_tokenizer(cfg.model)
        self.models: dict[str, _Model] = {}
        self.adapters: dict[str, Adapter] = {}  # published, read-only, by name
        self._bases: dict[str, str] = {}  # of published adapters
        self._open_samplers: dict[str, OpenSampler] = {}
        self._held: dict[str, ExitStack] = {}

    # ---- models ----------------------------------------------------------------------------------------------------

    def create(self, model: str, spec: ModelSpec) -> None:
        """Makes a model called `model`. Raises UserError when the name is taken or the weights cannot be had."""
        self._check_free(model)
        if spec.lora is not None:
            self.models[model] = _Model(spec, self._tenant(model, spec, spec.lora))
            return
        strategy = self._strategy(spec)
        if spec.copy_of:
            source = self._model(spec.copy_of).strategy.state_dict(optimizer=False)["weights"]
            own = strategy.state_dict(optimizer=False)["weights"]
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(source[name])
            strategy.load_state_dict({"weights": own}, optimizer=False)
        self.models[model] = _Model(spec, strategy)
        if model in ("policy", "base"):
            with strategy.gathered() as module:
                check_against_transformers(module)

    def delete(self, model: str) -> None:
        """Forgets a model and frees its memory. Raises UserError while others need it or it is open for sampling."""
        self._entry(model)
        users = [name for name, entry in self.models.items() if entry.spec.base == model]
        users += [name for name, base in self._bases.items() if base == model]
        if users:
            raise UserError(f"model {model!r} is the base of {', '.join(users[:5])}; delete these first")
        if model in self._open_samplers:
            raise UserError(f"model {model!r} is open for sampling until the end of the run")
        del self.models[model]

    def _tenant(self, model: str, spec: ModelSpec, lora: LoraSpec) -> Strategy:
        if spec.head != "logits" or not spec.trainable or spec.copy_of:
            raise UserError(f"model {model!r}: a LoRA tenant is trainable, has head logits and copies no other model")
        adapter = Adapter(self._base(spec.base), lora, name=model, dtype=self.dtype, device=self.world.device)
        return ReplicatedStrategy(adapter, self.world)

    def _base(self, name: str) -> CausalLM:
        """The module of a model that adapters may be put on, with its hooks."""
        entry = self._entry(name)
        if entry.spec.trainable or entry.spec.head != "logits":
            raise UserError(f"model {name!r} cannot be a base: create it with trainable=False and head logits")
        install(entry.strategy.module)
        return entry.strategy.module

    def _strategy(self, spec: ModelSpec) -> Strategy:
        """A module with the weights of `model.path`, laid out over the ranks."""
        return make_strategy(
            self.strategy_name,
            self.cfg,
            self.world,
            self.tokenizer,
            dtype=self.dtype,
            head=spec.head,
            trainable=spec.trainable,
        )

    def _entry(self, name: str) -> _Model:
        if name not in self.models:
            there = ", ".join(sorted([*self.models, *self.adapters]))
            raise UserError(f"no model called {name!r}; there are: {there}")
        return self.models[name]

    def _model(self, name: str) -> _Model:
        """As _entry; a parked model is brought back."""
        entry = self._entry(name)
        if isinstance(entry.strategy, ReplicatedStrategy):
            entry.strategy.onload()
        return entry

    def module_of(self, model: str = "policy") -> CausalLM:
        """The module that computes `model`: its own, or of a tenant its base's."""
        return self._entry(self._entry(model).spec.base or model).strategy.module

    def _check_free(self, name: str) -> None:
        if name in self.models or name in self.adapters:
            raise UserError(f"a model called {name!r} exists already")

    # ---- training --------------------------------------------------------------------------------------------------

    def forward(
        self,
        rows: list[Datum],
        loss: LossSpec,
        *,
        model: str | None = "policy",
        mix: bool = False,
        strict: bool = True,
    ) -> TrainOutput:
        """Log-probabilities (and values) of the rows and the loss as metrics; no gradient.

        As forward_backward; `model` may be frozen or a published adapter too.
        """
        with torch.no_grad():
            return self._run(rows, loss, model, backward=False, mix=mix, strict=strict)

    def score(self, rows: list[Datum], temperature: float, *, model: str | None = "policy") -> TrainOutput:
        """Log-probabilities (and values) of every position of the rows, without a loss and without a gradient."""
        with torch.no_grad():
            return self._run(rows, LossSpec("", temperature=temperature), model, backward=False)

    def forward_backward(
        self,
        rows: list[Datum],
        loss: LossSpec,
        *,
        model: str | None = "policy",
        mix: bool = False,
        strict: bool = True,
    ) -> TrainOutput:
        """Adds the gradient of the weighted sum of losses to what is pending for `model`.

        model None: each row's own `row.model`, all of them tenants of one base. A micro-batch then holds rows of one
        tenant, so that nothing of a tenant depends on who else is in the call, bit for bit; with `mix` tenants share
        micro-batches. `losses` are each row's weighted sum.
        Metrics: "loss:sum", those of the loss (over trained tokens), "tokens:sum" (all), "trained_tokens:sum" and
        "microbatches:max" (of any rank). Raises RunError on every rank, naming rows, when a loss is not finite;
        nothing has reached the optimizer then. Not so with strict=False: then look at `losses`, and clear_gradient of
        the models whose losses are not finite, which leaves the others' gradients as they should be.
        Raises UserError on every rank for rows that are too long and for models that cannot be had or trained.
        """
        return self._run(rows, loss, model, backward=True, mix=mix, strict=strict)

    def _run(
        self,
        rows: list[Datum],
        loss: LossSpec,
        model: str | None,
        *,
        backward: bool,
        mix: bool = False,
        strict: bool = True,
    ) -> TrainOutput:
        call = self._plan_call(rows, model, backward=backward, mix=mix)
        results = RowResults(rows)
        head = self._entry(call.base).spec.head if call.base else "logits"
        for number in range(call.count):
            picked = call.microbatches[number] if number < len(call.microbatches) else []
            batch = collate(
                [rows[i] for i in picked] or [_PADDING_ROW],
                dtype=loss_dtype(self.dtype),
                device=self.world.device,
                fill={**LOSSES.get(loss.name).params, **loss.params} if loss.name else {},
            )
            strategy = self._entry(call.base).strategy
            with self._routing(rows, picked, call, backward=backward):
                out = strategy.module(
                    batch,
                    temperature=loss.temperature,
                    entropy=bool(loss.name) and head == "logits",
                    packing=self.cfg.batch.packing,
                )
                if picked:
                    results.add_output(picked, out.values_T if head == "value" else out.logprobs_T)
                if loss.name:
                    loss_T, metrics = compute_loss(out, batch, loss)
                    total = (loss_T * batch.weights_T).sum()
                    if backward:
                        strategy.backward(total)
                    if picked:
                        results.add_loss(total, loss_T, metrics, batch)
        if strict:
            self._check_finite(results)
        tally = results.tally()
        tally.add("tokens:sum", float(sum(len(row.tokens) for row in rows)))
        tally.add("microbatches:max", float(len(call.microbatches)))
        return TrainOutput(
            logprobs=[] if head == "value" else results.outputs(),
            values=results.outputs() if head == "value" else None,
            metrics=tally.result(self.world),
            losses=results.losses(),
        )

    def _plan_call(self, rows: list[Datum], model: str | None, *, backward: bool, mix: bool) -> _Call:
        """Which rows go together. Agrees on it over the ranks: an error of one is raised on all of them."""
        names = [row.model if model is None else model for row in rows]
        uses: dict[str, tuple[str, Adapter | None]] = {}
        microbatches: list[list[int]] = []
        error = ""
        try:
            for row in rows:
                if len(row.tokens) > self.max_row_tokens:
                    raise UserError(
                        f"row {row.name or '?'} has {len(row.tokens)} tokens; at most {self.max_row_tokens} fit"
                    )
            for name in sorted(set(names) if model is None else {model}):
                uses[name] = self._use(name, backward=backward)
            microbatches = _plan(rows, names, self.cfg.batch.max_tokens_per_microbatch, mix=mix)
        except UserError as failure:
            error = str(failure)
        everyone = gather_objects(self.world, (error, sorted({base for base, _ in uses.values()}), len(microbatches)))
        if errors := [text for text, _, _ in everyone if text]:
            raise UserError(errors[0])
        bases = sorted({base for _, part, _ in everyone for base in part})
        if len(bases) > 1:
            raise UserError(f"one call holds rows of several base models ({', '.join(bases)}); make a call for each")
        if not bases:
            return _Call("", [], [], 0)  # no rank has a row
        collective = not isinstance(self._entry(bases[0]).strategy, ReplicatedStrategy)
        count = max(number for _, _, number in everyone) if collective else len(microbatches)
        return _Call(bases[0], [uses[name][1] for name in names], microbatches, count)

    def _use(self, name: str, *, backward: bool) -> tuple[str, Adapter | None]:
        """The base model and the adapter (None: the base itself) that a name stands for."""
        if name in self.adapters:
            if backward:
                raise UserError(f"model {name!r} is frozen: it was published to sample from and to score with")
            return self._bases[name], self.adapters[name]
        entry = self._model(name)
        if backward and not entry.spec.trainable:
            raise UserError(f"model {name!r} is frozen")
        return (entry.spec.base, entry.strategy.module) if entry.spec.lora is not None else (name, None)

    def _routing(
        self, rows: list[Datum], picked: list[int], call: _Call, *, backward: bool
    ) -> AbstractContextManager[None]:
        """Tokens to adapters, for one micro-batch; a padding row goes through none."""
        strategy = self._entry(call.base).strategy
        if getattr(strategy.module, "router", None) is None:
            return nullcontext()
        segments: list[Segment] = []
        start = 0
        for index in picked:
            stop = start + len(rows[index].tokens)
            segments.append((start, stop, call.adapters[index]))
            start = stop
        # ranks may train adapters of other kinds at the same time, or none: their backward collectives must agree
        sharded = not isinstance(strategy, ReplicatedStrategy)
        return routed(strategy.module, segments, connect=backward and sharded)

    def _check_finite(self, results: RowResults) -> None:
        found = [name for part in gather_objects(self.world, results.not_finite()[:5]) for name in part]
        if found:
            raise RunError(
                f"the loss is not finite in the micro-batch of rows {', '.join(found[:5])}; nothing was learned from "
                "it; lower the learning rate, or look at these rows, and go on from a checkpoint before"
            )

    def clear_gradient(self, model: str) -> None:
        """Drops what is pending for `model`."""
        self._model(model).strategy.clear_gradient()

    def optim_step(self, model: str, adam: AdamParams) -> Metrics:
        """One AdamW step of `model` from everything pending; returns {"grad_norm:mean", "lr:mean"}."""
        entry = self._model(model)
        if not entry.spec.trainable:
            raise UserError(f"model {model!r} is frozen")
        metrics = entry.strategy.optim_step(adam)
        entry.version += 1
        return {**metrics, "lr:mean": adam.lr}

    # ---- sampling --------------------------------------------------------------------------------------------------

    def version(self, model: str) -> int:
        """The version of the weights as they are now. Fully trained models keep no other version; of a tenant
        `freeze_adapter` does."""
        return self._entry(model).version

    def freeze_adapter(self, name: str, model: str) -> None:
        """Makes a read-only copy of the tenant `model` as it is now: the adapter `name`, to sample from and score
        with. Raises UserError when the name is taken or `model` is no tenant."""
        self._check_free(name)
        entry = self._lora(model)
        self._model(model)
        self.adapters[name] = entry.strategy.module.frozen_copy(name)
        self._bases[name] = entry.spec.base

    def load_adapter(self, name: str, spec: LoraSpec, base: str, weights: Mapping[str, Any]) -> None:
        """Makes the adapter `name` from saved weights, the same on every rank: by parameter name, as model_state's
        "weights", or (A, B) by path. Raises UserError for a name that is taken and weights that do not fit."""
        self._check_free(name)
        flat: dict[str, Tensor] = {}
        for key, value in weights.items():
            flat.update({key: value} if isinstance(value, Tensor) else {f"{key}.A": value[0], f"{key}.B": value[1]})
        adapter = Adapter(self._base(base), spec, name=name, dtype=self.dtype, device=self.world.device, weights=flat)
        self.adapters[name] = adapter.requires_grad_(False)
        self._bases[name] = base

    def delete_adapter(self, name: str) -> None:
        """Forgets a published adapter; nothing may be sampling from it. Raises UserError when there is none."""
        if name not in self.adapters:
            raise UserError(f"no published adapter called {name!r}; there are: {', '.join(sorted(self.adapters))}")
        if self._bases[name] in self._open_samplers:
            self._open_samplers[self._bases[name]].sampler.forget_adapter(name)
        del self.adapters[name], self._bases[name]

    def _lora(self, model: str) -> _Model:
        """A tenant, which may be parked."""
        entry = self._entry(model)
        if entry.spec.lora is None:
            raise UserError(f"model {model!r} is no LoRA tenant: its only version is the weights as they are now")
        return entry

    @contextmanager
    def sampling(self, model: str = "policy") -> Iterator[Sampler]:
        """A sampler over the trained weights themselves, a tenant's base with the adapter as it is now. Entering and
        leaving are collective; inside, ranks are on their own. No training call until it is left. Requests name the
        model ("policy" by default)."""
        entry = self._model(model)
        adapters = None if entry.spec.lora is None else {model: entry.strategy.module}
        whole = entry if adapters is None else self._entry(entry.spec.base)
        with torch.no_grad(), whole.strategy.gathered() as module:
            module.eval()
            own = module is whole.strategy.module
            if adapters is not None:
                install(module)
            if entry.sampler is None or not own:
                entry.sampler = self._make_sampler(module, entry.version, adapters, entry.spec.base or "policy")
            else:
                if adapters is not None:
                    entry.sampler.forget_adapter(model)  # it has changed in place
                entry.sampler.refresh(entry.version)
                entry.sampler.metrics()  # dropped: an evaluation's counts are not the next step's
            yield entry.sampler
            if not own:
                entry.sampler = None

    def open_sampler(self, base: str) -> OpenSampler:
        """A frozen model open for sampling, from now on: training calls may come between its steps, since they change
        neither it nor what was published. The first call is collective (a sharded base is gathered and stays so),
        later ones are local. Raises UserError for a model that is trained."""
        if base not in self._open_samplers:
            entry = self._model(base)
            if entry.spec.trainable:
                raise UserError(f"model {base!r} is trained itself; only a frozen base can stay open for sampling")
            self._held[base] = ExitStack()
            module = self._held[base].enter_context(entry.strategy.gathered()).eval()
            if module is not entry.strategy.module:
                install(module)
            self._open_samplers[base] = OpenSampler(module, self._make_sampler(module, 0, self.adapters, base))
        return self._open_samplers[base]

    def replace_base(self, base: str, weights: Mapping[str, Tensor]) -> None:
        """Other whole weights for a frozen model, the same on every rank, by parameter name: what is sampled from then
        on is drawn from them. Raises UserError for weights that do not fit, RuntimeError while samples are under way.
        """
        open_ = self._open_samplers.get(base)
        if open_ is not None and open_.sampler.unfinished():
            raise RuntimeError(f"model {base!r} cannot be replaced: samples are under way")
        self.load_model_state(base, {"weights": weights}, optimizer=False)
        if open_ is None:
            return
        if open_.module is self._entry(base).strategy.module:
            open_.sampler.refresh(open_.sampler.version + 1)
        else:  # a gathered copy, which holds the old weights
            self._held.pop(base).close()
            del self._open_samplers[base]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def _make_sampler(
        self, module: CausalLM, version: int, adapters: Mapping[str, Adapter] | None, base: str
    ) -> Sampler:
        return make_sampler(
            module,
            self.cfg.sampler,
            decode=self._decode,
            max_length=self.max_row_tokens,
            version=version,
            adapters=adapters,
            base_name=base,
        )

    # ---- state -----------------------------------------------------------------------------------------------------

    def state(self, *, optimizer: bool = True) -> dict[str, Any]:
        """Tensors and versions by model and name, for a checkpoint; without the bases of tenants, which never change.
        Views: copy before the next step."""
        return {
            name: {**m.strategy.state_dict(optimizer=optimizer and m.spec.trainable), "version": m.version}
            for name, m in self._changing().items()
        }

    def _changing(self) -> dict[str, _Model]:
        bases = {entry.spec.base for entry in self.models.values()}
        return {name: self._model(name) for name in self.models if name not in bases}

    def load_state(self, state: dict[str, Any], *, optimizer: bool = True) -> None:
        """Takes back what `state` gave, after a checkpoint filled it."""
        for name, entry in self._changing().items():
            parts = dict(state[name])
            entry.version = int(parts.pop("version"))
            entry.strategy.load_state_dict(parts, optimizer=optimizer and entry.spec.trainable)
            entry.sampler = None  # what it cached belongs to other weights, whatever their version

    def model_state(self, model: str, *, optimizer: bool = True) -> dict[str, Any]:
        """Whole tensors of one model, as copies on the CPU of every rank, in full precision: "weights" and, with
        `optimizer`, "exp_avg" and "exp_avg_sq" by parameter name, and "step". A pending gradient is not part of it."""
        parts = self._model(model).strategy.state_dict(optimizer=optimizer)
        step = {"step": parts.pop("step").detach().clone().cpu()} if "step" in parts else {}
        return {key: {name: _whole(t) for name, t in part.items()} for key, part in parts.items()} | step

    def load_model_state(self, model: str, state: Mapping[str, Any], *, optimizer: bool = True) -> None:
        """Takes what `model_state` gave, the same on every rank; drops the pending gradient. Without `optimizer` the
        moments start at 0 again: they belong to other weights. Raises UserError for tensors that do not fit."""
        entry = self._model(model)
        own = entry.strategy.state_dict(optimizer=entry.spec.trainable)
        step = own.pop("step", None)
        given = {key: state.get(key) if optimizer or key == "weights" else None for key in own}
        for key, part in own.items():
            if optimizer or key == "weights":
                _check_fits(model, key, part, given[key])
        if entry.spec.trainable:
            self.clear_gradient(model)
        for key, part in own.items():
            for name, tensor in part.items():
                put(tensor, torch.zeros(tensor.shape) if given[key] is None else given[key][name])
        if step is not None:
            own["step"] = torch.as_tensor(float(state["step"]) if optimizer else 0.0, dtype=step.dtype)
        entry.strategy.load_state_dict(own, optimizer=entry.spec.trainable)
        entry.sampler = None

    def offload(self, model: str) -> None:
        """Moves an idle tenant's weights, masters, moments and pending gradient to host memory; any use brings it
        back bit for bit. Raises UserError for what is no tenant."""
        strategy = self._lora(model).strategy
        assert isinstance(strategy, ReplicatedStrategy)
        strategy.offload()

    def export(self, model: str, folder: Path) -> None:
        """Writes `model` as a Hugging Face folder (safetensors, config, tokenizer), by rank 0; collective. A tenant is
        merged into its base, and stands besides in <folder>/adapter as the peft package loads it.

        Raises UserError, on every rank, when it cannot be written."""
        dtype = torch.float32 if self.dtype == torch.float64 else self.dtype
        entry, lora, net = self._model(model), self._entry(model).spec.lora, self.module_of(model)
        state = self._entry(entry.spec.base or model).strategy.full_state_dict(dtype)
        weights = entry.strategy.full_state_dict(torch.float32) if lora is not None else {}

        def write() -> None:
            if lora is None:
                export_model(state, net.config, self.tokenizer, folder, dtype)
                return
            config, base = merge_adapter(state, weights, lora, net), self.cfg.model.path
            more = partial(write_adapter, weights=weights, spec=lora, base=base)
            export_model(state, config, self.tokenizer, folder, dtype, more=lambda part: more(part / "adapter"))

        on_leader(self.world, write)

    def check_replicas(self, model: str = "policy") -> None:
        """Raises RunError unless all ranks hold the same weights (replicated strategies). Collective."""
        strategy = self._model(model).strategy
        if not isinstance(strategy, ReplicatedStrategy):
            return
        weights = strategy.state_dict(optimizer=False)["weights"]
        digest = [float(t.double().sum()) for t in weights.values()]
        everyone = gather_objects(self.world, digest)
        for rank, other in enumerate(everyone):
            if other != everyone[0]:
                name = next(n for n, a, b in zip(weights, everyone[0], other, strict=True) if a != b)
                raise RunError(f"rank {rank} holds other weights than rank 0, first in {name}")


_PADDING_ROW = Datum(
    tokens=np.zeros(1, np.int64), targets=np.zeros(1, np.int64), weights=np.zeros(1, np.float32), name="padding"
)


def _plan(rows: list[Datum], models: list[str], budget: int, *, mix: bool) -> list[list[int]]:
    """Indices of rows per micro-batch. Without `mix` each model's rows are packed as if they were alone; with it a
    model's rows lie side by side in a micro-batch."""
    if mix:
        packed = pack([len(row.tokens) for row in rows], budget)
        return [sorted(one, key=lambda i: (models[i], i)) for one in packed]
    out = []
    for name in sorted(set(models)):
        own = [i for i, model in enumerate(models) if model == name]
        out += [[own[i] for i in one] for one in pack([len(rows[i].tokens) for i in own], budget)]
    return out


def _whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU; of a sharded tensor the whole (collective)."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().to("cpu", copy=True)


def _check_fits(model: str, key: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor] | None) -> None:
    if given is None:
        raise UserError(f"model {model!r}: the saved state has no {key}; load it without the optimizer")
    for name in sorted(own.keys() | given.keys()):
        shapes = [list(part[name].shape) if name in part else "nothing" for part in (own, given)]
        if shapes[0] != shapes[1]:
            raise UserError(f"model {model!r}: {key} {name} is {shapes[0]} here and {shapes[1]} in the saved state")
