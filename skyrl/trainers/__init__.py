"""The loops: each a function of an open run, around which `skyrl.loop.run_loop` puts everything else."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from skyrl.planner.control import import_gymnasium

if TYPE_CHECKING:
    from skyrl.config.schema import RunConfig


@contextlib.contextmanager
def importing_libraries() -> Iterator[None]:
    """Around the first import of torch and transformers, which makes some 600,000 objects that stay: nothing looks for
    garbage among them then, a seventh of the start, nor later (gc.freeze). Nothing where torch is there already."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # the end of Python takes down what is in cycles, a user's module among it


def run_trainer(mode: str, cfg: RunConfig, hooks: Sequence[Any] = ()) -> dict[str, Any]:
    """Runs the loop that cfg.trainer names, or the one of another `mode` than "train" (`python -m skyrl.sft`,
    `.evaluate`); returns what `run_loop` does. Imports torch only here: a login node has none."""
    trainer = mode if mode != "train" else "live" if cfg.feedback.enabled else cfg.trainer
    if trainer == "control":  # whose modules need it
        import_gymnasium()
    with importing_libraries():
        module = importlib.import_module(f"skyrl.trainers.{trainer}")
    result: dict[str, Any]
    if trainer in ("dpo", "reward_model", "distill"):  # functions of an open run, and no more
        from skyrl.loop import run_loop

        result = run_loop(cfg, getattr(module, f"train_{trainer}"), hooks=hooks)
    else:
        result = getattr(module, {"rl": "train", "live": "train_live"}.get(trainer, trainer))(cfg, hooks)
    return result
