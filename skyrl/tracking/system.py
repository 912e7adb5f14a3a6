"""What a rank, its machine and its GPU do while it trains: <run>/system/rank-<n>.jsonl, one line for each step.

A line holds where the step's time went (spans in Unix seconds) and what psutil and NVML say. Amounts of bytes are those
of the step, everything else is the state at its end. `run_dir.RunReader.system` reads the lines.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from skyrl.files import disk_reason
from skyrl.run_dir import SYSTEM_NAME, keep_steps, system_path
from skyrl.tracking.advisories import warn_fallback

GIB = 2**30
SAMPLE_SECONDS = 0.5  # a step that ends sooner after a sample repeats it, and counts its bytes with the next one
FLUSH_SECONDS = 1.0  # lines wait in memory for so long; a kill loses them
Span = tuple[str, float, float]  # name, begin and end by time.perf_counter


class SystemRecorder:
    """Writes one rank's lines.

    Times are of the monotonic clock, tied to the wall clock once, at the start: a clock that is set while the run goes
    on moves nothing. What cannot be written ends the recording, which is said, and not the run.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        *,
        last_step: int = -1,
        world_size: int = 1,
        gpu: str = "",
        collectives: Callable[[], tuple[int, Sequence[Span]]] = lambda: (0, ()),
    ) -> None:
        """last_step: lines of later steps, left by an earlier start, are dropped; rank 0 does it for ranks that are no
        more, too. gpu: the UUID of this rank's device. collectives: the bytes that this rank has given to collectives
        since the last call, and when it waited in them."""
        self.folder, self.path = Path(folder), system_path(folder, rank)
        self.last: dict[str, Any] = {}  # the newest line
        self._collectives = collectives
        self._wall = time.time() - time.perf_counter()
        self._spans: list[Span] = []
        self._lines: list[str] = []
        self._flushed = self._sampled = -1e9
        self._gpu = _open_gpu(gpu) if gpu else None
        self._file = -1
        try:
            self._process = psutil.Process()  # there is none where /proc is not mounted
            self._process.cpu_percent()  # the first call has nothing to compare with
            self._before = self._counters()
            self.path.parent.mkdir(exist_ok=True)
            for path in self.path.parent.glob("*.jsonl"):
                name = SYSTEM_NAME.fullmatch(path.name)
                if name is not None and (int(name[1]) == rank or (rank == 0 and int(name[1]) >= world_size)):
                    keep_steps(path, last_step)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except (OSError, psutil.Error) as problem:
            self._end(problem)

    def span(self, name: str, start: float, end: float) -> None:
        """Adds a part of the step under way, timed by time.perf_counter."""
        self._spans.append((name, start, end))

    def finish_step(self, step: int, phase: str) -> None:
        """Ends a step, at this moment."""
        now = time.perf_counter()
        moved, waits = self._collectives()
        sample: dict[str, Any] = {key: 0 if key.endswith("_bytes") else value for key, value in self.last.items()}
        sample |= {"interfaces": {}} if sample else {}
        if now - self._sampled >= SAMPLE_SECONDS and self._file >= 0:
            try:
                self._sampled, sample = now, self._sample()
            except (OSError, psutil.Error) as problem:
                self._end(problem)
        spans = [[name, round(a + self._wall, 6), round(b + self._wall, 6)] for name, a, b in [*self._spans, *waits]]
        head = {"step": step, "phase": phase, "time": round(now + self._wall, 6), "spans": spans}
        self.last = {**sample, **head, "collective_bytes": moved}
        self._spans = []
        if self._file >= 0:
            self._lines.append(json.dumps(head | self.last))
            if now - self._flushed >= FLUSH_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Hands all lines to the system."""
        data, self._lines, self._flushed = "".join(f"{line}\n" for line in self._lines), [], time.perf_counter()
        left = data.encode() if self._file >= 0 else b""
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as problem:
            self._end(problem)

    def close(self) -> None:
        """Writes what waits, and ends."""
        self.flush()
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _end(self, problem: Exception) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1
        reason = disk_reason(problem, self.path) if isinstance(problem, OSError) else problem
        warn_fallback(f"{self.path}: not written any more ({reason})", every_rank=True)

    def _counters(self) -> tuple[dict[str, tuple[int, int]], int]:
        """What only grows: bytes that each interface of the host has sent and received, and that we have written."""
        try:
            written = self._process.io_counters().write_bytes
        except (psutil.Error, AttributeError):  # not on every system, and not for every user
            written = 0
        net = psutil.net_io_counters(pernic=True)
        return {name: (one.bytes_sent, one.bytes_recv) for name, one in net.items() if name != "lo"}, written

    def _sample(self) -> dict[str, Any]:
        (net, written), (net_before, written_before) = self._counters(), self._before
        self._before = (net, written)
        zero = (0, 0)
        interfaces = {
            name: [max(0, now - before) for now, before in zip(pair, net_before.get(name, zero), strict=True)]
            for name, pair in net.items()
        }
        interfaces = {name: pair for name, pair in interfaces.items() if name in net_before and any(pair)}
        sample = {
            "cpu": self._process.cpu_percent(),
            "memory_gib": round(self._process.memory_info().rss / GIB, 4),
            "host_memory_gib": round(psutil.virtual_memory().used / GIB, 3),
            "net_sent_bytes": sum(sent for sent, _ in interfaces.values()),
            "net_recv_bytes": sum(received for _, received in interfaces.values()),
            "interfaces": interfaces,
            "disk_free_gib": round(psutil.disk_usage(str(self.folder)).free / GIB, 3),
            "disk_written_bytes": max(0, written - written_before),
        }
        return sample | ({"gpus": [self._gpu()]} if self._gpu is not None else {})


def _open_gpu(uuid: str) -> Callable[[], dict[str, float]] | None:
    """What reads the state of one GPU; None, and a line why, where NVML cannot."""
    unread = "the GPU's utilisation, power and temperature are not recorded"
    try:
        import pynvml
    except ImportError:
        warn_fallback(f'{unread}: pip install "skyrl-spmd[nvml]", or give tracking.system=false')
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
    except pynvml.NVMLError as error:
        warn_fallback(f"{unread}: NVML says {error}", every_rank=True)
        return None
    ask: dict[str, Callable[[], float]] = {
        "util": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "memory_gib": lambda: round(pynvml.nvmlDeviceGetMemoryInfo(handle).used / GIB, 3),
        "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "temperature_c": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
    }

    def read() -> dict[str, float]:
        found = {}
        for key, value in list(ask.items()):
            try:
                found[key] = value()
            except pynvml.NVMLError:
                del ask[key]  # this device does not tell it
        return found

    return read
