"""Real runs of the loop, seen from inside: what the engine was given, and what was logged."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lowercase  # noqa: F401
import numpy as np
from gloo import run_ranks
from small import small_config

from skyrl.config.schema import EnvConfig, RunConfig
from skyrl.engine import Engine
from skyrl.run_dir import read_metrics
from skyrl.types import Datum, LossSpec, Metrics

LOOP = [
    "batch.num_steps=2",
    "batch.prompts_per_step=4",
    "batch.samples_per_prompt=4",
    "sampler.max_new_tokens=8",
    "optim.lr=3e-3",
    "warmup.num_steps=0",
    "eval.every_steps=0",
    "eval.num_prompts=4",
    "checkpoint.every_steps=0",
    "checkpoint.export=false",
    "checkpoint.async_save=false",
    "tracking.console=off",
    "tracking.rollouts_every=1",
]


@dataclass
class Call:
    """One engine.forward_backward of one rank."""

    model: str
    spec: LossSpec
    rows: list[Datum]
    metrics: Metrics


@dataclass
class Seen:
    """One run: records of metrics.jsonl, and each rank's calls in order."""

    folder: Path
    records: list[dict[str, Any]]
    ranks: list[list[Call]] = field(default_factory=list)

    @property
    def rl(self) -> list[dict[str, Any]]:
        """Records of RL steps."""
        return [record for record in self.records if record["phase"] == "rl" and record["step"] > 0]

    def updates(self, model: str = "policy") -> list[dict[str, Datum]]:
        """The rows of each update, of all ranks together, by name."""
        out: dict[int, dict[str, Datum]] = defaultdict(dict)
        for calls in self.ranks:
            for number, call in enumerate(c for c in calls if c.model == model):
                for row in call.rows:
                    assert row.name not in out[number], "a row was trained twice in one update"
                    out[number][row.name] = row
        return [out[number] for number in sorted(out)]


def loop_config(folder: Path, *overrides: str, env: dict[str, Any] | None = None, turns: int = 1) -> RunConfig:
    """LOOP and `overrides` on the environment "lowercase" with the options `env`."""
    cfg = small_config(*LOOP, f"run.dir={folder}", *overrides)
    options = dict(env or {}, turns=turns)
    on_error = cfg.env.on_error
    return dataclasses.replace(cfg, env=EnvConfig("lowercase", options, max_turns=turns, on_error=on_error))


def train_here(cfg: RunConfig, mode: str = "train") -> list[Call]:
    """The whole run on this rank; returns its calls of forward_backward."""
    from skyrl.trainers import run_trainer

    calls: list[Call] = []
    real = Engine.forward_backward

    def spy(self: Engine, rows: list[Datum], loss: LossSpec, *, model: str = "policy") -> Any:
        kept = [dataclasses.replace(row, weights=np.array(row.weights)) for row in rows]
        out = real(self, rows, loss, model=model)
        calls.append(Call(model, loss, kept, out.metrics))
        return out

    Engine.forward_backward = spy
    try:
        run_trainer(mode, cfg)
    finally:
        Engine.forward_backward = real
    return calls


def run_loop(
    folder: Path, *overrides: str, size: int = 1, env: dict[str, Any] | None = None, turns: int = 1, mode: str = "train"
) -> Seen:
    """A run on `size` ranks; on one rank in this process."""
    cfg = loop_config(folder, *overrides, env=env, turns=turns)
    ranks = [train_here(cfg, mode)] if size == 1 else run_ranks(size, train_here, cfg, mode)
    return Seen(Path(folder), read_metrics(Path(folder) / "metrics.jsonl"), ranks)
