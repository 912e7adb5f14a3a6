"""The dashboard beside a run or a server: a process of its own, which takes no interpreter and no memory from it, has
only what the machine has to spare, and whose end is not noticed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from skyrl.config.load import as_overrides
from skyrl.config.schema import DashboardConfig

BESIDE = "--beside"  # ends when its standard input does, as it does however the process that began it ends


@contextlib.contextmanager
def dashboard_beside(dashboard: DashboardConfig, runs: Path) -> Iterator[None]:
    """Serves the runs of a folder (dashboard.runs, else `runs`) while the block is at work, with dashboard.enabled; the
    address, or why it cannot be had, is printed by that process."""
    if not dashboard.enabled:
        yield
        return
    options = replace(dashboard, runs=str(Path(dashboard.runs or runs).absolute()))
    given = list(as_overrides(asdict(options), "dashboard."))
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC_", "SLURM_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(launcher)}
    command = [sys.executable, "-m", "skyrl", "dashboard", options.runs, BESIDE, *given]
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
    except OSError as error:  # no memory or no processes left: the run goes on
        print(f"warning: no dashboard: {error.strerror}", flush=True)
        yield
        return
    try:
        yield
    finally:
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
