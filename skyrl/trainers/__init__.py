"""The loops: each a function of an open run, around which `skyrl.loop.run_loop` puts everything else."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skyrl.config.schema import RunConfig


def run_trainer(mode: str, cfg: RunConfig, hooks: Sequence[Any] = ()) -> dict[str, Any]:
    """Runs the loop that cfg.trainer names, or the one of another `mode` than "train" (`python -m skyrl.sft`,
    `.evaluate`); returns what `run_loop` does. Imports torch only here: a login node has none."""
    trainer = mode if mode != "train" else "live" if cfg.feedback.enabled else cfg.trainer
    names = {"rl": "train", "live": "train_live"}
    loop = getattr(importlib.import_module(f"skyrl.trainers.{trainer}"), names.get(trainer, trainer))
    result: dict[str, Any] = loop(cfg, hooks)
    return result
