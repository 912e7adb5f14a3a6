"""torch.profiler over a few steps of one rank of a live run, when somebody asks for it: `skyrl-tx profile`.

A file in the run folder asks; every rank looks for it between two steps, and the one that it names takes it away.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from skyrl.args import Parser, path_arg
from skyrl.files import explain_write, write_atomic
from skyrl.run_dir import PROFILE_REQUEST, find_run
from skyrl.types import UserError

LOOK_SECONDS = 1.0  # between two looks for a request
MOST_STEPS = 100  # a trace of every operator grows by megabytes a second


class StepProfiler:
    """Profiles this rank's steps when it is asked to. What fails is told, and the run goes on."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.request, self.folder, self.rank = Path(folder) / PROFILE_REQUEST, Path(folder) / "profiles", rank
        self._looked = -LOOK_SECONDS
        self._running: Any = None
        self._first = self._last = 0

    def begin(self, step: int) -> None:
        """Before a step: begins to profile when a request is there."""
        now = time.monotonic()
        if self._running is not None or now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        try:
            asked = json.loads(self.request.read_text(encoding="utf-8"))
            rank, count = int(asked["rank"]), int(asked["steps"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError):
            rank, count = 0, 0
        if rank != self.rank:
            return
        self.request.unlink(missing_ok=True)
        if not 1 <= count <= MOST_STEPS:
            print(f"skyrl: {self.request}: no request for a profile; use skyrl-tx profile", flush=True)
            return
        from torch.profiler import profile

        self._first, self._last, self._running = step, step + count - 1, profile()
        try:
            self._running.start()
        except RuntimeError as error:
            self._running = None
            print(f"skyrl: rank {self.rank}: no profile: {error}", flush=True)

    def end(self, step: int) -> None:
        """After a step: writes what was asked for once the last step is done."""
        if self._running is None or step < self._last:
            return
        running, self._running = self._running, None
        path = self.folder / f"steps-{self._first:06d}-{step:06d}-rank-{self.rank}.json"
        part = path.with_name(f".{path.name}")
        try:
            running.stop()
            self.folder.mkdir(exist_ok=True)
            running.export_chrome_trace(str(part))
            os.replace(part, path)
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            print(f"skyrl: rank {self.rank}: no profile: {error}", flush=True)
        else:
            print(f"skyrl: rank {self.rank}: profile in {path}", flush=True)


def profile_command(args: list[str]) -> None:
    """The command line of skyrl-tx profile. Raises UserError."""
    p = Parser(prog="skyrl-tx profile", description="Asks a live run to profile the next steps of one rank.")
    p.add_argument("run", type=path_arg, help="a run folder, or the name of one in runs")
    p.add_argument("--steps", type=int, default=1, help=f"how many, 1 to {MOST_STEPS} (1)")
    p.add_argument("--rank", type=int, default=0, help="of which rank (0)")
    given = p.parse_args(args)
    run = find_run(given.run, "profile")
    ranks, request = run.system_ranks() or [given.rank], run.path / PROFILE_REQUEST
    if not 1 <= given.steps <= MOST_STEPS:
        raise UserError(f"profile --steps {given.steps}: give 1 to {MOST_STEPS}")
    if given.rank not in ranks or given.rank < 0:
        known = f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]} alone"
        raise UserError(f"profile --rank {given.rank}: {run.name} has {known}")
    if run.state() != "running":
        raise UserError(f"profile: {run.name} is not running (as far as this machine sees): {run.state()}")
    if request.exists():
        raise UserError(f"profile: {request} asks for one already; wait for it, or remove that file")
    with explain_write(request, "only who may write into the run's folder can ask", "profile"):
        write_atomic(request, json.dumps({"rank": given.rank, "steps": given.steps}))
    print(f"asked rank {given.rank} for {given.steps} step(s); then see {run.path / 'profiles'}")
