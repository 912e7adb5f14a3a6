"""The loops: each a function of an open run, around which `skyrl.loop.run_loop` puts everything else."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skyrl.config.schema import RunConfig


def run_trainer(mode: str, cfg: RunConfig, hooks: Sequence[Any] = ()) -> dict[str, Any]:
<<<<<<< HEAD
    """Runs the loop that cfg.trainer names, or the one of another `mode` than "train" (`python -m skyrl.sft`,
    `.evaluate`); returns what `run_loop` does. Imports torch only here: a login node has none."""
    trainer = mode if mode != "train" else "live" if cfg.feedback.enabled else cfg.trainer
    names = {"rl": "train", "live": "train_live"}
    loop = getattr(importlib.import_module(f"skyrl.trainers.{trainer}"), names.get(trainer, trainer))
    result: dict[str, Any] = loop(cfg, hooks)
=======
    """Runs the loop that cfg.trainer names, or with `mode` "sft" (`python -m skyrl.sft`) that one; returns what
    `run_loop` does. Imports torch only here: a login node has none."""
    trainer = "sft" if mode == "sft" else "live" if cfg.feedback.enabled else cfg.trainer
    module = importlib.import_module(f"skyrl.trainers.{trainer}")
    if trainer in ("dpo", "reward_model", "distill"):  # functions of an open run, and no more
        return importlib.import_module("skyrl.loop").run_loop(cfg, getattr(module, f"train_{trainer}"), hooks=hooks)  # type: ignore[no-any-return]
    result: dict[str, Any] = getattr(module, {"rl": "train", "live": "train_live"}.get(trainer, trainer))(cfg, hooks)
>>>>>>> 724e53e (Fewer lines for the trainers; a benchmark whose preference holds for other things)
    return result
