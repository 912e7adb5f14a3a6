"""Weights & Biases, offline or online, and Trackio, which has its interface. Imported only when one is switched on."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
from pathlib import Path
from typing import Any

from skyrl.config.load import to_dict
from skyrl.config.schema import RunConfig
from skyrl.files import write_atomic
from skyrl.registry import import_extra
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
                project=cfg.tracking.wandb_project, name=cfg.run.name or Path(folder).name, id=run_id(Path(folder)),
                tags=list(cfg.tracking.tags), dir=str(folder), mode=mode, resume="allow", config=to_dict(cfg),
                settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
            )  # fmt: skip
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


class TrackioSink(Sink):
    """Logs each record under "<phase>/<key>" into Trackio's own folder (TRACKIO_DIR), which `trackio show` reads; to a
    network only where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL asks for it. The run is called by its name and id."""

    def __init__(self, cfg: RunConfig, folder: Path) -> None:
        """Raises: UserError when trackio is not installed or does not start."""
        trackio = import_extra("trackio", "tracking.trackio=true", "trackio", "give tracking.trackio=false")
        self._finish = trackio.finish  # of the run that is open in this process
        name = f"{cfg.run.name or folder.name}-{run_id(folder)}"
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it advertises itself
                self._run = trackio.init(
                    project=cfg.tracking.wandb_project, name=name, config=to_dict(cfg), resume="allow", embed=False,
                    auto_log_gpu=False, auto_log_cpu=False,
                )  # fmt: skip
        except (OSError, ValueError, RuntimeError) as problem:
            raise UserError(f"tracking.trackio=true: trackio did not start ({problem})") from None

    def write(self, record: Record) -> None:
        phase, step = record["phase"], int(record["step"])
        values = {f"{phase}/{key.replace(':', '.')}": v for key, v in record.items() if key not in ("phase", "step")}
        self._run.log(values, step=step)

    def close(self) -> None:
        """Waits until all is written."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._finish()


def run_id(folder: Path) -> str:
    """The run's id in wandb, Trackio and TensorBoard: kept in the run folder, made at the first call."""
    path = folder / "wandb_id"
    if not path.exists():
        write_atomic(path, secrets.token_hex(5))
    return path.read_text().strip()
