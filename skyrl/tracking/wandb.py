"""Weights & Biases, offline or online, and Trackio, which has its interface. Imported only when one is switched on."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Any

from skyrl.config.load import to_dict
from skyrl.config.schema import RunConfig
from skyrl.files import write_atomic
from skyrl.registry import import_extra
from skyrl.tracking.base import HistorySink, Record
from skyrl.types import UserError

BLOCK, WHOLE, FIRST, LAST = 1 << 15, 1, 2, 4  # of wandb's offline files


class WandbSink(HistorySink):
    """Logs each record under "<phase>/<key>" against "<phase>/step", into <run folder>/wandb.

    The run's id is kept in <run folder>/wandb_id, so that a resumed run goes on in the same one. Offline each start
    has a file of its own, and `wandb sync` sends those of a run one after the other. wandb takes nothing back, so a
    step that is computed again stays as it was sent first.
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
            quiet = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False)
            about: Any = {"project": cfg.tracking.wandb_project, "config": to_dict(cfg), "tags": cfg.tracking.tags}
            about |= {"name": cfg.run.name or folder.name, "id": run_id(folder), "dir": str(folder)}
            self._run = wandb.init(**about, mode=mode, resume="allow", settings=quiet)
        except (wandb.errors.Error, OSError) as problem:
            text = " ".join(str(problem).split())
            raise UserError(
                f"tracking.wandb={mode}: wandb did not start ({text}); run `wandb login` or give tracking.wandb=offline"
            ) from None
        self._phases: set[str] = set()
        names = {f"{phase}/step" for phase in ("warmup", "rl", "sft", "evaluate", cfg.trainer)}
        known = dict(self._run.summary)  # online, what the server has
        self.last_step = max(_last_step(folder / "wandb", names), *(int(known.get(name, -1)) for name in names))

    def log(self, record: Record) -> None:
        phase = record["phase"]
        if phase not in self._phases:
            self._phases.add(phase)
            self._run.define_metric(f"{phase}/step", hidden=True)
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        self._run.log({f"{phase}/{key.replace(':', '.')}": value for key, value in record.items() if key != "phase"})

    def close(self) -> None:
        """Ends the run there."""
        self._run.finish()


class TrackioSink(HistorySink):
    """Logs each record under "<phase>/<key>" into Trackio's own folder (TRACKIO_DIR), which `trackio show` reads; to a
    network only where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL asks for it. The run is called by its name and id; a step
    that is computed again after a kill stays as it was sent first."""

    def __init__(self, cfg: RunConfig, folder: Path) -> None:
        """Raises: UserError when trackio is not installed or does not start."""
        trackio = import_extra("trackio", "tracking.trackio=true", "trackio", "give tracking.trackio=false")
        self._finish = trackio.finish  # of the run that is open in this process
        name = f"{cfg.run.name or folder.name}-{run_id(folder)}"
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it advertises itself
                about: Any = {"project": cfg.tracking.wandb_project, "name": name, "config": to_dict(cfg)}
                self._run = trackio.init(**about, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False)
        except (OSError, ValueError, RuntimeError) as problem:
            raise UserError(f"tracking.trackio=true: trackio did not start ({problem})") from None
        self.last_step = self._run._next_step - 1  # there is no public name for it

    def log(self, record: Record) -> None:
        phase, step = record["phase"], int(record["step"])
        values = {f"{phase}/{key.replace(':', '.')}": v for key, v in record.items() if key not in ("phase", "step")}
        self._run.log(values, step=step)

    def close(self) -> None:
        """Waits until all is written."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._finish()


def _last_step(folder: Path, names: Collection[str]) -> int:
    """The last step, by metrics of these names, that a run's earlier starts have written into its offline files; -1
    without any.

    wandb has no reader for Python. A file has a header of 7 bytes and then blocks of 32 KiB, as a log of LevelDB does:
    pieces of records, each behind its checksum, length and kind (whole, first, middle, last). A record that a kill has
    left incomplete does not count.
    """
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")  # protobuf has made it: without types
    found = -1
    for path in folder.glob("offline-run-*/*.wandb"):
        data, at, record = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if BLOCK - at % BLOCK < 7:  # no piece begins there
                at += BLOCK - at % BLOCK
                continue
            end, kind = at + 7 + int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            record = (b"" if kind in (WHOLE, FIRST) else record) + data[at + 7 : end]
            at = end
            if kind in (WHOLE, LAST) and end <= len(data) and b"/step" in record:
                items = messages.Record.FromString(record).history.item  # none in what is no history
                steps = [item.value_json for item in items if (item.key or "".join(item.nested_key)) in names]
                found = max([found, *map(int, steps)])
    return found


def run_id(folder: Path) -> str:
    """The run's id in wandb, Trackio and TensorBoard: kept in the run folder, made at the first call."""
    path = folder / "wandb_id"
    if not path.exists():
        write_atomic(path, secrets.token_hex(5))
    return path.read_text().strip()
