"""The loops: each a function of an open run, around which `skyrl.loop.run_loop` puts everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skyrl.config.schema import RunConfig


def run_trainer(mode: str, cfg: RunConfig, hooks: Sequence[Any] = ()) -> dict[str, Any]:
    """Runs the loop of `python -m skyrl.<mode>`: "train" or "sft"; returns what `run_loop` does. Imports torch only
    here: a login node has none."""
    if mode == "sft":
        from skyrl.trainers.sft import sft

        return sft(cfg, hooks)
    assert mode == "train", mode
    if cfg.feedback.enabled:
        from skyrl.trainers.live import train_live

        return train_live(cfg, hooks)
    from skyrl.trainers.rl import train

    return train(cfg, hooks)
