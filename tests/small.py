"""Small configs, engines and rows for the tests of the engine, the strategies and the loop."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skyrl.config.load import load_config
from skyrl.config.schema import RunConfig
from skyrl.distributed.init import init_distributed
from skyrl.engine import Engine, ModelSpec
from skyrl.types import AdamParams, Datum, LossSpec

SMALL = [
    "model.tiny.hidden_size=32",
    "model.tiny.num_layers=2",
    "model.tiny.num_heads=2",
    "model.tiny.num_kv_heads=1",
    "model.tiny.ffn_size=48",
    "run.threads=1",
]
SPEC = LossSpec("ppo", {"clip_low": 0.2, "clip_high": 0.2}, temperature=0.9, kl_coef=0.1, entropy_coef=0.01)
ADAM = AdamParams(lr=1e-3, weight_decay=0.1, grad_clip_norm=0.1)


@functools.cache  # a config never changes, and composing one takes longer than making its engine
def small_config(*overrides: str) -> RunConfig:
    """The default recipe over a model of some 19,000 parameters."""
    return load_config([*SMALL, *overrides])


def make_engine(strategy: str = "auto", dtype: str = "float32", *overrides: str, row_tokens: int = 64) -> Engine:
    """An engine with a policy, in the world that the environment says."""
    cfg = small_config(f"strategy.name={strategy}", f"model.dtype={dtype}", *overrides)
    world = init_distributed(cfg)
    if strategy == "auto":
        strategy = "single" if world.size == 1 else "ddp"
    engine = Engine(cfg, world, dtype=dtype, strategy=strategy, max_row_tokens=row_tokens)
    engine.create("policy", ModelSpec())
    return engine


def make_rows(seed: int = 0, count: int = 10, longest: int = 40) -> list[Datum]:
    """Rows as the trainer makes them: a prompt that is not trained, all fields, weights that sum to 1."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        length = int(rng.integers(4, longest))
        mask = np.arange(length) >= rng.integers(1, length)
        rows.append(
            Datum(
                tokens=rng.integers(4, 90, length),
                targets=rng.integers(4, 90, length),
                weights=mask.astype(np.float64),
                sampling_logprobs=np.log(1 / 100) + 0.2 * rng.normal(size=length) * mask,
                advantages=rng.normal() * mask,
                reference=np.log(1 / 100) + 0.2 * rng.normal(size=length) * mask,
                name=f"row{i}",
            )
        )
    total = sum(row.weights.sum() for row in rows)
    for row in rows:
        row.weights = row.weights / total
    return rows


def service_options(folder: Path, *overrides: str, **more: Any) -> dict[str, Any]:
    """A service of the small model; several micro-batches for most calls."""
    small = [one for one in SMALL if one.startswith("model.")]
    pairs = dict(
        one.split("=", 1) for one in [*small, "run.threads=1", "batch.max_tokens_per_microbatch=128", *overrides]
    )
    return {**pairs, "service.folder": str(folder), **more}


def supervised(seed: int, count: int = 9, longest: int = 40) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """(tokens, targets, weights) of rows for cross_entropy: ragged, some positions without weight."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        tokens = rng.integers(4, 90, int(rng.integers(3, longest)))
        weights = (rng.random(len(tokens)) < 0.7) * rng.uniform(0.2, 1.0, len(tokens))
        yield tokens.tolist(), rng.integers(4, 90, len(tokens)), weights.astype(np.float32)


def dealt(rows: list[Datum], engine: Engine) -> list[Datum]:
    """This rank's share, dealt one by one."""
    return rows[engine.world.rank :: engine.world.size]


def weights_of(engine: Engine, model: str = "policy") -> dict[str, torch.Tensor]:
    """Whole weights on rank 0, as copies; {} elsewhere."""
    engine_dtype = torch.float64 if engine.dtype == torch.float64 else torch.float32
    return engine.models[model].strategy.full_state_dict(engine_dtype)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """l2 norm of the difference over the l2 norm of b, over all tensors together."""
    assert a.keys() == b.keys()
    difference = sum(float((a[k].double() - b[k].double()).square().sum()) for k in a)
    return (difference / sum(float(b[k].double().square().sum()) for k in b)) ** 0.5
