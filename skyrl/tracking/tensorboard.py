"""TensorBoard event files. Imported only when it is switched on."""

from __future__ import annotations

from pathlib import Path

from skyrl.registry import import_extra
from skyrl.tracking.base import HistorySink, Record
from skyrl.tracking.wandb import run_id


class TensorBoardSink(HistorySink):
    """Writes each record's numbers under "<phase>/<key>" at its step. A resumed run adds an event file, which takes the
    steps back that are computed again: `sync` has handed over all before them."""

    def __init__(self, folder: Path, last_step: int) -> None:
        """last_step: the last one that stays; -1 for a new run. Raises: UserError when tensorboard is not installed."""
        import_extra("tensorboard", "tracking.tensorboard=true", "tensorboard", "give tracking.tensorboard=false")
        from torch.utils.tensorboard import SummaryWriter

        self.last_step = last_step if any(folder.glob("events.*")) else -1
        # Its readers take a first start of a session for the beginning, and a second one for a restart from its step.
        self._writer = SummaryWriter(str(folder), purge_step=self.last_step + 1)
        if self.last_step < 0:
            self._writer.add_text("run_id", run_id(folder.parent))

    def log(self, record: Record) -> None:
        for key, value in record.items():
            if key not in ("step", "phase"):
                self._writer.add_scalar(f"{record['phase']}/{key.replace(':', '.')}", value, record["step"])

    def sync(self) -> None:
        """Hands everything to the system."""
        self._writer.flush()

    def close(self) -> None:
        """Ends the event file."""
        self._writer.close()
