"""TensorBoard event files. Imported only when it is switched on."""

from __future__ import annotations

from pathlib import Path

from skyrl.registry import import_extra
from skyrl.tracking.base import Record, Sink
from skyrl.tracking.wandb import run_id


class TensorBoardSink(Sink):
    """Writes each record's numbers under "<phase>/<key>" at its step.

    A resumed run adds an event file; where steps were written twice, TensorBoard shows both points.
    """

    def __init__(self, folder: Path) -> None:
        """Raises: UserError when tensorboard is not installed."""
        import_extra("tensorboard", "tracking.tensorboard=true", "tensorboard", "give tracking.tensorboard=false")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))
        self._writer.add_text("run_id", run_id(folder.parent))

    def write(self, record: Record) -> None:
        for key, value in record.items():
            if key not in ("step", "phase"):
                self._writer.add_scalar(f"{record['phase']}/{key.replace(':', '.')}", value, record["step"])

    def sync(self) -> None:
        """Hands everything to the system."""
        self._writer.flush()

    def close(self) -> None:
        """Ends the event file."""
        self._writer.close()
