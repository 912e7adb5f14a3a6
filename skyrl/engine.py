"""The engine: the only owner of weights. The training loop and the Tinker server both drive it.

Every public method is collective: all ranks call it, in the same order, each with its own rows. Rows come back local,
metrics come back global. The engine only sums:

    L = sum over rows d and tokens t of weights[d, t] * loss[d, t]

over micro-batches, calls and ranks, until `optim_step` of that model. Means, denominators and masks are all in the
weights, so micro-batches, packing, world size and strategy change nothing but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from skyrl.algorithms.losses import compute_loss
from skyrl.config.schema import RunConfig
from skyrl.distributed.balance import pack
from skyrl.distributed.collectives import Tally, gather_objects, on_leader
from skyrl.distributed.init import World
from skyrl.models.export import export_model
from skyrl.models.forward import CausalLM
from skyrl.models.load import load_tokenizer, probe
from skyrl.models.packed import collate, loss_dtype
from skyrl.sampler.base import Sampler
from skyrl.sampler.local import make_sampler
from skyrl.strategies.base import Strategy
from skyrl.strategies.make import make_strategy
from skyrl.types import AdamParams, Datum, LossSpec, Metrics, RunError, TrainOutput, UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class ModelSpec:
    """What to create. `head`: logits (a policy) or value (a critic). A frozen model has no gradient and no optimizer.
    `copy_of` starts from another model of this engine, as it is now, instead of from `model.path`."""

    head: Literal["logits", "value"] = "logits"
    trainable: bool = True
    copy_of: str = ""


@dataclass
class _Model:
    spec: ModelSpec
    strategy: Strategy
    version: int = 0
    sampler: Sampler | None = None


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

    # ---- models ----------------------------------------------------------------------------------------------------

    def create(self, model: str, spec: ModelSpec) -> None:
        """Makes a model called `model`. Raises UserError when the name is taken or the weights cannot be had."""
        if model in self.models:
            raise UserError(f"a model called {model!r} exists already")
        strategy = self._strategy(spec)
        if spec.copy_of:
            source = self._model(spec.copy_of).strategy.state_dict(optimizer=False)["weights"]
            own = strategy.state_dict(optimizer=False)["weights"]
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(source[name])
            strategy.load_state_dict({"weights": own}, optimizer=False)
        self.models[model] = _Model(spec, strategy)
        if model == "policy":
            with strategy.gathered() as module:
                probe(module)

    def delete(self, model: str) -> None:
        """Forgets a model and frees its memory."""
        self._model(model)
        del self.models[model]

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

    def _model(self, name: str) -> _Model:
        if name not in self.models:
            raise UserError(f"no model called {name!r}; there are: {', '.join(sorted(self.models))}")
        return self.models[name]

    # ---- training --------------------------------------------------------------------------------------------------

    def forward(self, rows: list[Datum], loss: LossSpec, *, model: str = "policy") -> TrainOutput:
        """Log-probabilities (and values) of the rows and the loss as metrics; no gradient."""
        with torch.no_grad():
            return self._run(rows, loss, model, backward=False)

    def score(self, rows: list[Datum], temperature: float, *, model: str = "policy") -> TrainOutput:
        """Log-probabilities (and values) of every position of the rows, without a loss and without a gradient."""
        with torch.no_grad():
            return self._run(rows, LossSpec("", temperature=temperature), model, backward=False)

    def forward_backward(self, rows: list[Datum], loss: LossSpec, *, model: str = "policy") -> TrainOutput:
        """Adds the gradient of the weighted sum of losses to what is pending for `model`.

        Metrics: "loss:sum", those of the loss (over trained tokens), "tokens:sum" (all), "trained_tokens:sum" and
        "microbatches:max" (of any rank). Raises RunError on every rank, naming rows,
        when a loss is not finite; nothing has reached the optimizer then.
        """
        return self._run(rows, loss, model, backward=True)

    def _run(self, rows: list[Datum], loss: LossSpec, model: str, *, backward: bool) -> TrainOutput:
        entry = self._model(model)
        if backward and not entry.spec.trainable:
            raise UserError(f"model {model!r} is frozen")
        for row in rows:
            if len(row.tokens) > self.max_row_tokens:
                raise UserError(
                    f"row {row.name or '?'} has {len(row.tokens)} tokens; at most {self.max_row_tokens} fit"
                )
        strategy = entry.strategy
        microbatches = pack([len(row.tokens) for row in rows], self.cfg.batch.max_tokens_per_microbatch)
        # A sharded forward is a collective: every rank runs the same number of them, on a row of weight 0 at the end.
        count = max(gather_objects(self.world, len(microbatches)))
        order = [index for one in microbatches for index in one]
        stats = _Stats(self.world.device)
        logprobs: list[Tensor] = []
        values: list[Tensor] = []
        for number in range(count):
            picked = [rows[i] for i in microbatches[number]] if number < len(microbatches) else [_PADDING_ROW]
            batch = collate(picked, dtype=loss_dtype(self.dtype), device=self.world.device)
            out = strategy.module(
                batch,
                temperature=loss.temperature,
                entropy=bool(loss.name) and entry.spec.head == "logits",
                packing=self.cfg.batch.packing,
            )
            if loss.name:
                loss_T, metrics = compute_loss(out, batch, loss)
                total = (loss_T * batch.weights_T).sum()
                if backward:
                    strategy.backward(total)
                if number < len(microbatches):
                    stats.add(total.detach(), metrics, batch.weights_T)
            if number < len(microbatches):
                result = out.values_T if entry.spec.head == "value" else out.logprobs_T
                (values if entry.spec.head == "value" else logprobs).append(result.detach())
        self._check_finite(rows, microbatches, stats)
        tally = stats.tally()
        tally.add("tokens:sum", float(sum(len(row.tokens) for row in rows)))
        tally.add("microbatches:max", float(count))
        return TrainOutput(
            logprobs=_unpack(logprobs, order, rows),
            values=_unpack(values, order, rows) if entry.spec.head == "value" else None,
            metrics=tally.result(self.world),
        )

    def _check_finite(self, rows: list[Datum], microbatches: list[list[int]], stats: _Stats) -> None:
        bad = [
            rows[i].name or "?"
            for one, finite in zip(microbatches, stats.finite(), strict=False)
            if not finite
            for i in one
        ]
        found = [name for part in gather_objects(self.world, bad[:5]) for name in part]
        if found:
            raise RunError(
                f"the loss is not finite in the micro-batch of rows {', '.join(found[:5])}; nothing was learned from "
                "it; lower the learning rate, or look at these rows, and go on from a checkpoint before"
            )

    def optim_step(self, model: str, adam: AdamParams) -> Metrics:
        """One AdamW step of `model` from everything pending; returns {"grad_norm:mean", "lr:mean"}."""
        entry = self._model(model)
        if not entry.spec.trainable:
            raise UserError(f"model {model!r} is frozen")
        metrics = entry.strategy.optim_step(adam)
        entry.version += 1
        return {**metrics, "lr:mean": adam.lr}

    # ---- sampling --------------------------------------------------------------------------------------------------

    def snapshot(self, model: str) -> int:
        """The version of the weights as they are now. Fully trained models keep no other version."""
        return self._model(model).version

    @contextmanager
    def sampling(self, model: str = "policy") -> Iterator[Sampler]:
        """A sampler over the trained weights themselves. Entering and leaving are collective; inside, ranks are on
        their own. No training call until it is left."""
        entry = self._model(model)
        with torch.no_grad(), entry.strategy.gathered() as module:
            module.eval()
            own = module is entry.strategy.module
            if entry.sampler is None or not own:
                entry.sampler = self._make_sampler(module, entry.version)
            else:
                entry.sampler.refresh(entry.version)
                entry.sampler.metrics()  # dropped: an evaluation's counts are not the next step's
            yield entry.sampler
            if not own:
                entry.sampler = None

    def _make_sampler(self, module: CausalLM, version: int) -> Sampler:
        return make_sampler(
            module,
            self.cfg.sampler,
            decode=lambda tokens: self.tokenizer.decode(tokens, skip_special_tokens=False),
            max_length=self.max_row_tokens,
            version=version,
        )

    # ---- state -----------------------------------------------------------------------------------------------------

    def state(self, *, optimizer: bool = True) -> dict[str, Any]:
        """All models' tensors and versions, by model and name, for a checkpoint. Views: copy before the next step."""
        return {
            name: {**m.strategy.state_dict(optimizer=optimizer and m.spec.trainable), "version": m.version}
            for name, m in self.models.items()
        }

    def load_state(self, state: dict[str, Any], *, optimizer: bool = True) -> None:
        """Takes back what `state` gave, after a checkpoint filled it."""
        for name, entry in self.models.items():
            parts = dict(state[name])
            entry.version = int(parts.pop("version"))
            entry.strategy.load_state_dict(parts, optimizer=optimizer and entry.spec.trainable)
            entry.sampler = None  # what it cached belongs to other weights, whatever their version

    def export(self, model: str, folder: Path) -> None:
        """Writes `model` as a Hugging Face folder (safetensors, config, tokenizer), by rank 0; collective.

        Raises UserError, on every rank, when it cannot be written."""
        dtype = torch.float32 if self.dtype == torch.float64 else self.dtype
        entry = self._model(model)
        state = entry.strategy.full_state_dict(dtype)
        config = entry.strategy.module.net.config
        on_leader(self.world, lambda: export_model(state, config, self.tokenizer, folder, dtype))

    def check_replicas(self, model: str = "policy") -> None:
        """Raises RunError unless all ranks hold the same weights (replicated strategies). Collective."""
        if self.strategy_name == "fsdp":
            return
        weights = self._model(model).strategy.state_dict(optimizer=False)["weights"]
        digest = [float(t.double().sum()) for t in weights.values()]
        everyone = gather_objects(self.world, digest)
        for rank, other in enumerate(everyone):
            if other != everyone[0]:
                name = next(n for n, a, b in zip(weights, everyone[0], other, strict=True) if a != b)
                raise RunError(f"rank {rank} holds other weights than rank 0, first in {name}")


_PADDING_ROW = Datum(
    tokens=np.zeros(1, np.int64), targets=np.zeros(1, np.int64), weights=np.zeros(1, np.float32), name="padding"
)


def _unpack(parts: list[Tensor], order: list[int], rows: list[Datum]) -> list[np.ndarray]:
    if not parts:
        return []
    flat = torch.cat(parts).cpu().numpy()
    out: list[np.ndarray] = [np.empty(0)] * len(rows)
    start = 0
    for index in order:
        out[index] = flat[start : start + len(rows[index].tokens)]
        start += len(rows[index].tokens)
    return out


class _Stats:
    """Sums of one call's metrics, kept on the device: one transfer at the end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._losses: list[Tensor] = []
        self._sums: dict[str, list[Tensor]] = {}
        self._trained: list[Tensor] = []

    def add(self, total: Tensor, metrics: dict[str, Tensor], weights_T: Tensor) -> None:
        trained_T = weights_T != 0
        self._losses.append(total)
        self._trained.append(trained_T.sum())
        for key, value_T in metrics.items():
            value_T = value_T.detach()
            if key.endswith(":max"):
                value = torch.where(trained_T, value_T, -math.inf).max()
            elif key.endswith(":min"):
                value = torch.where(trained_T, value_T, math.inf).min()
            else:
                value = torch.where(trained_T, value_T, 0.0).sum()
            self._sums.setdefault(key, []).append(value)

    def finite(self) -> list[bool]:
        return [math.isfinite(x) for x in torch.stack(self._losses).tolist()] if self._losses else []

    def tally(self) -> Tally:
        out = Tally()
        if not self._losses:
            return out
        trained = float(torch.stack(self._trained).sum())
        out.add("loss:sum", float(torch.stack(self._losses).double().sum()))
        out.add("trained_tokens:sum", trained)
        if trained == 0:
            return out
        for key, parts in self._sums.items():
            stacked = torch.stack(parts).double()
            if key.endswith(":max"):
                out.add(key, float(stacked.max()))
            elif key.endswith(":min"):
                out.add(key, float(stacked.min()))
            elif key.endswith(":mean"):
                out.add(key, float(stacked.sum()), trained)
            else:
                out.add(key, float(stacked.sum()))
        return out
