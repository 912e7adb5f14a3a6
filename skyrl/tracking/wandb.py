"""Weights & Biases, offline or online. Imported only when it is switched on."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from skyrl.config.load import to_dict
from skyrl.config.schema import RunConfig
from skyrl.files import write_atomic
from skyrl.tracking.base import Record, Sink
from skyrl.types import UserError


class WandbSink(Sink):
    """Logs each record under "<phase>/<key>" against "<phase>/step", into <run folder>/wandb.

    The run's id is kept in <run folder>/wandb_id, so that a resumed run goes on in the same one. Steps that a
    killed run had logged after its last checkpoint are there twice: wandb keeps history,
    metrics.jsonl is the exact record.
    """

    def __init__(self, cfg: RunConfig, folder: Path) -> None:
        """Raises: UserError when wandb is not installed or does not start."""
        mode: Any = cfg.tracking.wandb  # one of the texts that wandb.init takes: checked with the config
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else it reports its own crashes over the network
        try:
            import wandb
        except ImportError:
            raise UserError(
                f'tracking.wandb={mode}: the package wandb is not installed; pip install "wandb>=0.20" or give '
                "tracking.wandb=off"
            ) from None
        try:
            self._run = wandb.init(
                project=cfg.tracking.wandb_project,
                name=cfg.run.name or Path(folder).name,
                id=run_id(Path(folder)),
                tags=list(cfg.tracking.tags),
                dir=str(folder),
                mode=mode,
                resume="allow",
                config=to_dict(cfg),
                settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
            )
        except (wandb.errors.Error, OSError) as problem:
            text = " ".join(str(problem).split())
            raise UserError(
                f"tracking.wandb={mode}: wandb did not start ({text}); run `wandb login` or give tracking.wandb=offline"
            ) from None
        self._phases: set[str] = set()

    def write(self, record: Record) -> None:
        phase = record["phase"]
        if phase not in self._phases:
            self._phases.add(phase)
            self._run.define_metric(f"{phase}/step", hidden=True)
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        self._run.log({f"{phase}/{key.replace(':', '.')}": value for key, value in record.items() if key != "phase"})

    def close(self) -> None:
        """Ends the run there."""
        self._run.finish()


def run_id(folder: Path) -> str:
    """The id kept in the run folder, made at the first call."""
    path = folder / "wandb_id"
    if not path.exists():
        write_atomic(path, secrets.token_hex(5))
    return path.read_text().strip()
