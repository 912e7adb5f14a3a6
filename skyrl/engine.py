"""The engine: the only owner of weights. The training loop and the Tinker server both drive it.

Every public method is collective: all ranks call it, in the same order, each with its own rows. Rows come back local,
metrics come back global. The engine only sums:

    L = sum over rows d and tokens t of weights[d, t] * loss[d, t]

over micro-batches, calls and ranks, until `optim_step` of that model. Means, denominators and masks are all in the
weights, so micro-batches, packing, world size and strategy change nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skyrl.algorithms.prefixes import families
from skyrl.config.schema import RunConfig
from skyrl.distributed.balance import pack_by_model
from skyrl.distributed.collectives import agree, gather_objects
from skyrl.distributed.init import World, init_distributed
from skyrl.model import Model, ModelSpec, OpenSampler
from skyrl.models.experts import recording
from skyrl.models.lora import Adapter, install
from skyrl.models.results import RowResults
from skyrl.planner.memory import MemoryEstimate, ModelSizes, model_sizes
from skyrl.pretrained.load import check_against_transformers
from skyrl.registry.plugins import import_plugins
from skyrl.sampler.make import make_sampler
from skyrl.sampler.sampler import Sampler
from skyrl.strategies.make import make_strategy
from skyrl.strategies.replicated import ReplicatedStrategy
from skyrl.text.chat import Chat, chat_of
from skyrl.types import AdamParams, Datum, LoraSpec, LossSpec, Metrics, RunError, TrainOutput, UserError

__all__ = ["Engine", "ModelSpec", "meet"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass
class _Call:
    """What one call of `_run` computes: with which adapter each row, and which rows together. All ranks do `most`
    micro-batches where a forward pass is a collective (`count` is `most` there), and pause as often anywhere."""

    model: Model | None  # whose module computes; None: no rank has a row
    adapters: list[Adapter | None]
    microbatches: list[list[int]]
    count: int
    most: int  # of any rank


class Engine:
    """Owner of all weights. Rows come back local, metrics come back global.

    A plan gives dtype, strategy, row limit, and `memory`, by which the sampler's cache is sized. `chat` turns text into
    tokens and back, for whoever needs it. Raises UserError for a model that cannot be loaded or is not supported.
    """

    def __init__(
        self,
        cfg: RunConfig,
        world: World,
        *,
        dtype: str,
        strategy: str,
        max_row_tokens: int,
        memory: MemoryEstimate | None = None,
        chat: Chat | None = None,
    ) -> None:
        self.cfg = cfg
        self.world = world
        self.dtype = DTYPES[dtype]
        self.strategy_name = strategy
        self.max_row_tokens = max_row_tokens
        # The same on every rank: under sharding each gather is a collective.
        self.keeps_sampling = cfg.sampler.keep_memory != "never" if memory is None else memory.keeps_sampling
        # Called between the micro-batches of a call, equally often on every rank: it may sample from frozen models.
        self.pause: Callable[[], None] | None = None
        self.chat = chat or chat_of(cfg)
        self.tokenizer = self.chat.tokenizer
        self._make_sampler = partial(
            make_sampler,
            cfg=cfg.sampler,
            decode=self.chat.decode,
            max_length=max_row_tokens,
            memory=memory,
            record_experts=cfg.algorithm.router.replay,
        )
        self.models: dict[str, Model] = {}
        self.adapters: dict[str, Adapter] = {}  # frozen, by name: to sample from and to score with
        self._bases: dict[str, str] = {}  # of frozen adapters

    # ---- models ----------------------------------------------------------------------------------------------------

    def create(self, model: str, spec: ModelSpec) -> None:
        """Makes a model called `model`. Raises UserError when the name is taken or the weights cannot be had."""
        self._check_free(model)
        if spec.lora is not None:
            self.models[model] = self._create_adapter(model, spec, spec.lora)
            return
        # Files of weights are read by each rank for its own shards, so what is wrong there one rank may see alone.
        cfg = self.cfg if spec.source is None else replace(self.cfg, model=spec.source)
        make = partial(make_strategy, self.strategy_name, cfg, self.world, self.tokenizer, dtype=self.dtype)
        strategy = agree(
            self.world, lambda: make(head=spec.head, trainable=spec.trainable, masters=spec.trainable or spec.averaged)
        )
        created = Model(model, spec, strategy, self.world)
        if spec.source is None:
            self.chat.vocab_size = created.strategy.module.vocab_size
        if spec.copy_of:
            created.copy_weights(self._loaded(spec.copy_of))
        self.models[model] = created
        if model in ("policy", "base"):
            whole, router = created.strategy.gathered(), self.cfg.algorithm.router
            with recording(whole) if router.replay or router.aux_coef else nullcontext():  # refused now, if at all
                check_against_transformers(whole)
            if not self.keeps_sampling:
                created.free_sampling()  # supervised training may come first, and samples nothing

    def _create_adapter(self, model: str, spec: ModelSpec, lora: LoraSpec) -> Model:
        if spec.head != "logits" or not spec.trainable or spec.copy_of:
            raise UserError(f"model {model!r}: a LoRA adapter is trainable, has head logits and copies no other model")
        base = self._base(spec.base)
        adapter = Adapter(base.strategy.module, lora, name=model, dtype=self.dtype, device=self.world.device)
        # Whole on every rank, whatever lays the base out: it is small, and its hooks then need no collective.
        return Model(model, spec, ReplicatedStrategy(adapter, self.world), self.world, base)

    def sync(self, model: str, source: str, ema: float) -> None:
        """Moves a frozen model to ema * itself + (1 - ema) * `source`, a model of the same shape as it is now."""
        self._loaded(model).copy_weights(self._loaded(source), ema)

    def delete(self, model: str) -> None:
        """Forgets a model and frees its memory. Raises UserError while others need it or it is open for sampling."""
        gone = self._get(model)
        users = [name for name, entry in self.models.items() if entry.base is gone]
        users += [name for name, base in self._bases.items() if base == model]
        if users:
            raise UserError(f"model {model!r} is the base of {', '.join(users[:5])}; delete these first")
        if gone.open is not None:
            raise UserError(f"model {model!r} is open for sampling until the end of the run")
        del self.models[model]

    def _base(self, name: str) -> Model:
        """A model that adapters may be put on, with the hooks for them."""
        model = self._get(name)
        if model.spec.trainable or model.spec.head != "logits":
            raise UserError(f"model {name!r} cannot be a base: create it with trainable=False and head logits")
        install(model.strategy.module)
        return model

    def _get(self, name: str) -> Model:
        if name not in self.models:
            there = ", ".join(sorted([*self.models, *self.adapters]))
            raise UserError(f"no model called {name!r}; there are: {there}")
        return self.models[name]

    def _loaded(self, name: str) -> Model:
        """As _get; a model in host memory is brought back."""
        model = self._get(name)
        model.strategy.onload()
        return model

    def _check_free(self, name: str) -> None:
        if name in self.models or name in self.adapters:
            raise UserError(f"a model called {name!r} exists already")

    # ---- training --------------------------------------------------------------------------------------------------

    def forward(
        self, rows: list[Datum], loss: LossSpec, *, model: str | None = "policy", mix: bool = False, strict: bool = True
    ) -> TrainOutput:
        """Log-probabilities (and values) of the rows and the loss as metrics; no gradient.

        As forward_backward; `model` may be frozen or a published adapter too.
        """
        with torch.no_grad():
            return self._run(rows, loss, model, backward=False, mix=mix, strict=strict)

    def score(
        self,
        rows: list[Datum],
        temperature: float,
        *,
        model: str | None = "policy",
        top_k: int = 0,
        entropy: bool = False,
    ) -> TrainOutput:
        """Log-probabilities (and values) of every position of the rows, without a loss and without a gradient. With
        `top_k` `logprobs` are [L, 2 * top_k]: those of the likeliest next tokens, then the ids of these tokens; with
        `entropy` they are the entropies of the policy there, in nats."""
        with torch.no_grad():
            spec = LossSpec("", temperature=temperature)
            return self._run(rows, spec, model, backward=False, top_k=top_k, entropy=entropy)

    def forward_backward(
        self, rows: list[Datum], loss: LossSpec, *, model: str | None = "policy", mix: bool = False, strict: bool = True
    ) -> TrainOutput:
        """Adds the gradient of the weighted sum of losses to what is pending for `model`.

        model None: each row's own `row.model`, all of them adapters of one base. A micro-batch then holds rows of one
        model, so that nothing of a model depends on who else is in the call, bit for bit; with `mix` models share
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
        top_k: int = 0,
        entropy: bool = False,
    ) -> TrainOutput:
        if backward and not self.keeps_sampling:
            for entry in self.models.values():  # also what a check has gathered since
                entry.free_sampling()
        call = self._plan_call(rows, model, backward=backward, mix=mix)
        results = RowResults(rows, columns=2 * top_k)
        for number in range(call.most):
            if self.pause is not None and number:
                self.pause()
            if number >= call.count:
                continue
            picked = call.microbatches[number] if number < len(call.microbatches) else []
            assert call.model is not None
            given: Any = {"backward": backward, "layout": self.cfg.batch, "top_k": top_k, "entropy": entropy}
            call.model.run_microbatch(results, picked, call.adapters, loss, **given)
        if strict:
            self._check_finite(results)
        sums = results.metrics()
        sums.add("tokens:sum", float(sum(len(row.tokens) for row in rows)))
        sums.add("microbatches:max", float(len(call.microbatches)))
        is_critic = call.model is not None and call.model.spec.head != "logits"
        return TrainOutput(
            logprobs=[] if is_critic else results.outputs(),
            values=results.outputs() if is_critic else None,
            metrics=sums.result(self.world),
            losses=results.losses(),
        )

    def _plan_call(self, rows: list[Datum], model: str | None, *, backward: bool, mix: bool) -> _Call:
        """Which rows go together. Agrees on it over the ranks: an error of one is raised on all of them."""
        names = [row.model if model is None else model for row in rows]
        uses: dict[str, tuple[str, Adapter | None]] = {}
        microbatches: list[list[int]] = []
        error = ""
        try:
            for name in sorted(set(names) if model is None else {model}):
                uses[name] = self._use(name, backward=backward)
            for row, name in zip(rows, names, strict=True):
                if len(row.tokens) > self.max_row_tokens:
                    raise UserError(
                        f"row {row.name or '?'} has {len(row.tokens)} tokens; at most {self.max_row_tokens} fit"
                    )
                check_ids(row, self._get(uses[name][0]).strategy.module.vocab_size)
            microbatches = self._microbatches(rows, names, mix=mix)
        except UserError as failure:
            error = str(failure)
        everyone = gather_objects(self.world, (error, sorted({base for base, _ in uses.values()}), len(microbatches)))
        if errors := [text for text, _, _ in everyone if text]:
            raise UserError(errors[0])
        bases = sorted({base for _, part, _ in everyone for base in part})
        if len(bases) > 1:
            raise UserError(f"one call holds rows of several base models ({', '.join(bases)}); make a call for each")
        if not bases:
            return _Call(None, [], [], 0, 0)
        base, most = self._get(bases[0]), max(number for _, _, number in everyone)
        count = most if base.strategy.is_sharded else len(microbatches)
        return _Call(base, [uses[name][1] for name in names], microbatches, count, most)

    def _microbatches(self, rows: list[Datum], names: list[str], *, mix: bool) -> list[list[int]]:
        batch, budget = self.cfg.batch, self.cfg.batch.max_tokens_per_microbatch
        units = families(rows, names, budget) if batch.share_prefixes else [[i] for i in range(len(rows))]
        lengths = [sum(len(rows[i].tokens) for i in unit) for unit in units]
        packed = pack_by_model(lengths, [names[unit[0]] for unit in units], budget, mix=mix)
        return [[i for number in one for i in units[number]] for one in packed]

    def _use(self, name: str, *, backward: bool) -> tuple[str, Adapter | None]:
        """The model whose module computes, and the adapter (None: none), that a name stands for."""
        if name in self.adapters:
            if backward:
                raise UserError(f"model {name!r} is frozen: it was published to sample from and to score with")
            return self._bases[name], self.adapters[name]
        model = self._loaded(name)
        if backward:
            model.check_trainable()
        return (name, None) if model.base is None else (model.base.name, model.strategy.module)

    def _check_finite(self, results: RowResults) -> None:
        found = [name for part in gather_objects(self.world, results.not_finite()[:5]) for name in part]
        if found:
            raise RunError(
                f"the loss is not finite in the micro-batch of rows {', '.join(found[:5])}; nothing was learned from "
                "it; lower the learning rate, or look at these rows, and go on from a checkpoint before"
            )

    def clear_gradient(self, model: str) -> None:
        """Drops what is pending for `model`."""
        self._loaded(model).strategy.clear_gradient()

    def optim_step(self, model: str, adam: AdamParams) -> Metrics:
        """One AdamW step of `model` from everything pending; returns {"grad_norm:mean", "lr:mean"}."""
        return self._loaded(model).optim_step(adam)

    # ---- sampling --------------------------------------------------------------------------------------------------

    def version(self, model: str) -> int:
        """The version of the weights as they are now: optimizer steps. Fully trained models keep no other version; of
        an adapter `freeze_adapter` does."""
        return self._get(model).version

    def freeze_adapter(self, name: str, model: str) -> None:
        """Makes a read-only copy of the adapter `model` as it is now, called `name`, to sample from and score with.
        Raises UserError when the name is taken or `model` is no adapter."""
        self._check_free(name)
        self._check_adapter(model)
        trained = self._loaded(model)
        self.adapters[name] = trained.strategy.module.frozen_copy(name)
        self._bases[name] = trained.spec.base

    def load_adapter(self, name: str, spec: LoraSpec, base: str, weights: Mapping[str, Any]) -> None:
        """Makes the adapter `name` from saved weights, the same on every rank: by parameter name, as model_state's
        "weights", or (A, B) by path. Raises UserError for a name that is taken and weights that do not fit."""
        self._check_free(name)
        flat: dict[str, Tensor] = {}
        for key, value in weights.items():
            flat.update({key: value} if isinstance(value, Tensor) else {f"{key}.A": value[0], f"{key}.B": value[1]})
        module = self._base(base).strategy.module
        adapter = Adapter(module, spec, name=name, dtype=self.dtype, device=self.world.device, weights=flat)
        self.adapters[name] = adapter.requires_grad_(False)
        self._bases[name] = base

    def delete_adapter(self, name: str) -> None:
        """Forgets a published adapter; nothing may be sampling from it. Raises UserError when there is none."""
        if name not in self.adapters:
            raise UserError(f"no published adapter called {name!r}; there are: {', '.join(sorted(self.adapters))}")
        if (opened := self._get(self._bases[name]).open) is not None:
            opened.sampler.forget_adapter(name)
        del self.adapters[name], self._bases[name]

    def _check_adapter(self, model: str) -> None:
        if self._get(model).spec.lora is None:
            raise UserError(f"model {model!r} is no LoRA adapter: its only version is the weights as they are now")

    @contextmanager
    def sampling(self, model: str = "policy") -> Iterator[Sampler]:
        """A sampler over the trained weights themselves, an adapter's base with the adapter as it is now. Entering and
        leaving are collective; inside, ranks are on their own. No training call until it is left. Requests name the
        model ("policy" by default)."""
        with self._loaded(model).sampling(self._make_sampler, keep=self.keeps_sampling) as sampler:
            yield sampler

    def open_sampler(self, base: str) -> OpenSampler:
        """A frozen model open for sampling, from now on: training calls may come between its steps, since they change
        neither it nor the frozen adapters. The first call is collective (a sharded base is gathered and stays so),
        later ones are local. Raises UserError for a model that is trained."""
        return self._loaded(base).open_sampler(self._make_sampler, self.adapters)

    def replace_base(self, base: str, weights: Mapping[str, Tensor]) -> None:
        """Other whole weights for a frozen model, the same on every rank, by parameter name: what is sampled from then
        on is drawn from them. Raises UserError for weights that do not fit, RuntimeError while samples are under way.
        """
        self._loaded(base).replace_weights(weights)

    # ---- state -----------------------------------------------------------------------------------------------------

    def state(self, *, optimizer: bool = True) -> dict[str, Any]:
        """Tensors and versions by model and name, for a checkpoint; without the bases of adapters and frozen models
        with a source of their own, which never change. Views: copy before the next step."""
        return {name: model.state(optimizer=optimizer) for name, model in self._changing().items()}

    def _changing(self) -> dict[str, Model]:
        kept = {id(model.base) for model in self.models.values()}
        kept |= {
            id(model) for model in self.models.values() if model.spec.source is not None and not model.spec.trainable
        }
        return {name: self._loaded(name) for name, model in self.models.items() if id(model) not in kept}

    def load_state(self, state: dict[str, Any], *, optimizer: bool = True) -> None:
        """Takes back what `state` gave, after a checkpoint filled it."""
        for name, model in self._changing().items():
            model.load_state(state[name], optimizer=optimizer)

    def model_state(self, model: str, *, optimizer: bool = True) -> dict[str, Any]:
        """Whole tensors of one model, as copies on the CPU of every rank, in full precision: "weights" and, with
        `optimizer`, "exp_avg" and "exp_avg_sq" by parameter name, and "step". A pending gradient is not part of it."""
        return self._loaded(model).whole_state(optimizer=optimizer)

    def load_model_state(self, model: str, state: Mapping[str, Any], *, optimizer: bool = True) -> None:
        """Takes what `model_state` gave, the same on every rank; drops the pending gradient. Without `optimizer` the
        moments start at 0 again: they belong to other weights. Raises UserError for tensors that do not fit."""
        self._loaded(model).load_whole_state(state, optimizer=optimizer)

    def offload(self, model: str) -> None:
        """Moves an idle adapter's weights, masters, moments and pending gradient to host memory; any use brings it
        back bit for bit. Raises UserError for what is no adapter."""
        self._check_adapter(model)
        self._get(model).strategy.offload()

    def export(self, model: str, folder: Path, about: str = "") -> None:
        """Writes `model` as a Hugging Face folder, with the files beside the weights as in `model.path`, by rank 0;
        collective. An adapter is merged into its base, and stands besides in <folder>/adapter as the peft package
        loads it. `about`: how it was trained, for the card, README.md.

        Raises UserError, on every rank, when it cannot be written."""
        dtype = torch.float32 if self.dtype == torch.float64 else self.dtype
        self._loaded(model).export(folder, self.tokenizer, dtype, source=self.cfg.model, about=about)

    def check_replicas(self, model: str = "policy") -> None:
        """Raises RunError unless all ranks hold the same weights (replicated strategies). Collective."""
        self._loaded(model).check_replicas()


def check_ids(row: Datum, vocab_size: int) -> None:
    """Raises UserError for an id that has no row in the embedding: on a GPU such a lookup ends the process, if it is
    noticed at all."""
    for what, ids in (("token", row.tokens), ("target", row.targets)):
        wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if len(wrong):
            at = int(wrong[0]) if ids.ndim == 1 else int(np.argwhere((ids < 0) | (ids >= vocab_size))[0, 0])
            raise UserError(
                f"row {row.name or '?'}: {what} {int(ids.flat[at])} at position {at} is outside of the vocabulary of "
                f"{vocab_size}; it was made by another tokenizer than this model's"
            )


def meet(cfg: RunConfig) -> tuple[World, ModelSizes]:
    """The world, with the plugins imported and the model looked at. What this node lacks for that is told when all
    ranks are there, so that they end with its line instead of waiting for it. Raises UserError, on every rank."""
    problem, sizes = None, None
    try:
        import_plugins(cfg.plugins)
        sizes = model_sizes(cfg)
    except UserError as error:
        problem = error
    try:
        world = init_distributed(cfg)
    except RunError as error:
        raise problem or error from None

    def found() -> ModelSizes:
        if problem is not None:
            raise problem
        assert sizes is not None
        return sizes

    return world, agree(world, found)
