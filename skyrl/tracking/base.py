"""Numbers of a step: gathered under their reductions, timed, and handed to every sink as one record.

Records of equal runs are equal, except for keys under the prefixes of WALL_CLOCK: nothing else may depend on the clock
or the machine's load.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from skyrl.config.schema import RunConfig
from skyrl.run_dir import read_metrics
from skyrl.tracking.prometheus import PrometheusExporter
from skyrl.tracking.system import SystemRecorder
from skyrl.types import Metrics

WALL_CLOCK = ("time/", "speed/", "memory/")
_REDUCTIONS: dict[str, Callable[[list[float]], float]] = {
    "sum": sum,
    "mean": lambda values: sum(values) / len(values),
    "max": max,
    "min": min,
}
Record = dict[str, Any]  # {"step": 3, "phase": "rl", "reward:mean": 0.5, ...}, in the order it is written


class Sink:
    """Where records go. Called on rank 0 only. A new kind of sink overrides `write` and what else it needs."""

    def write(self, record: Record) -> None:
        """Takes one finished step. Raises UserError for what a person can fix (a full disk)."""
        raise NotImplementedError

    def begin(self, name: str) -> None:
        """A span of the step, for example "collect", begins; for live displays."""

    def progress(self, name: str, done: int, total: int) -> None:
        """How far the span under way is; called often."""

    def say(self, text: str) -> None:
        """A line for a person."""

    def sync(self) -> None:
        """Makes what was written safe from a kill; called before a checkpoint."""

    def close(self) -> None:
        """Called once, at the end of the run, however it ends."""


class HistorySink(Sink):
    """A tracker with a history of its own, in which each step is to be once, in order, however its run was killed and
    resumed. A subclass writes `log`, and sets `last_step` to the last one that an earlier start has handed over: these
    are left out, since a resumed run computes equal numbers again. make_tracker gives it all records that
    metrics.jsonl has, so what a kill has kept from arriving is made up for."""

    last_step = -1

    def log(self, record: Record) -> None:
        """Takes a record whose step is not there yet."""
        raise NotImplementedError

    def write(self, record: Record) -> None:
        if record["step"] > self.last_step:
            self.log(record)


class Tracker:
    """Collects one step's metrics and times; writes them to all sinks. A Tracker without sinks ignores everything.

    Values of one key are merged by its end: sums add, max and min compare, means are averaged plainly (a step with
    several optimizer calls logs the average of their means, each call counting the same). Metrics given must be global
    already (the engine's are): only rank 0 has sinks. `peak_flops` is the peak of all devices together in FLOP/s, for
    MFU; None leaves MFU out. `recorder` writes this rank's system/rank-<n>.jsonl.
    """

    def __init__(
        self,
        sinks: list[Sink],
        *,
        metrics_path: Path | None = None,
        peak_flops: float | None = None,
        recorder: SystemRecorder | None = None,
    ) -> None:
        self.sinks, self.metrics_path, self.peak_flops, self.recorder = sinks, metrics_path, peak_flops, recorder
        self.exporter: PrometheusExporter | None = None
        self._last: Record = {}
        self._values: dict[str, list[float]] = {}
        self._start = time.perf_counter()

    def add(self, metrics: Metrics) -> None:
        """Adds metrics to the step that is under way. Raises ValueError for a key without a reduction."""
        for key, value in metrics.items() if self.sinks else ():
            name, _, reduction = key.rpartition(":")
            if not name or reduction not in _REDUCTIONS:
                raise ValueError(f"metric {key!r}: the key must end in one of :{', :'.join(_REDUCTIONS)}")
            self._values.setdefault(key, []).append(float(value))

    @contextmanager
    def span(self, name: str, phase: str = "") -> Iterator[None]:
        """Times what happens inside as "time/<name>_seconds:sum". Spans of one name add up; nested ones overlap. In the
        timeline it is called `phase`, where that is given."""
        for sink in self.sinks:
            sink.begin(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self.add({f"time/{name}_seconds:sum": end - start})
            if self.recorder is not None:
                self.recorder.span(phase or name, start, end)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of a span, which the timeline alone shows."""
        start = time.perf_counter()
        yield
        if self.recorder is not None:
            self.recorder.span(name, start, time.perf_counter())

    def finish_step(self, step: int, phase: str) -> Metrics:
        """Ends the step: adds its duration and speeds, writes it to every sink, returns its metrics.

        Ranks but 0 get {}. The duration runs from the last finish_step (or `restart_clock`) to now.
        """
        if self.recorder is not None:
            self.recorder.finish_step(step, phase)
        if not self.sinks:
            return {}
        now = time.perf_counter()
        self.add({"time/step_seconds:sum": now - self._start})
        self._start = now
        metrics = {key: _REDUCTIONS[key.rpartition(":")[2]](self._values[key]) for key in sorted(self._values)}
        metrics |= speeds(metrics, self.peak_flops)
        self._values = {}
        record = {"step": step, "phase": phase, **dict(sorted(metrics.items()))}
        for sink in self.sinks:
            sink.write(record)
        self._last = record
        return metrics

    def values(self) -> dict[str, float]:
        """The newest record of rank 0, and what this rank's recorder has seen under "system/", for exporters."""
        seen = self.recorder.last if self.recorder is not None else {}
        gpus = {f"gpu/{key}": value for gpu in seen.get("gpus", ()) for key, value in gpu.items()}
        found = self._last | {f"system/{key}": value for key, value in {**seen, **gpus}.items()}
        return {key: value for key, value in found.items() if isinstance(value, (int, float))}

    def pending(self) -> dict[str, list[float]]:
        """What was added to the step under way, to be taken up by `restore` after a restart; {} on ranks but 0."""
        return {key: list(values) for key, values in self._values.items()}

    def restore(self, pending: dict[str, list[float]]) -> None:
        """Takes up a step that was under way when `pending` was made. Ignored without sinks."""
        if self.sinks:
            self._values = {key: list(values) for key, values in pending.items()}

    def restart_clock(self) -> None:
        """Begins the step's duration now: set-up before the first step is not part of it."""
        self._start = time.perf_counter()

    def progress(self, name: str, done: int, total: int) -> None:
        """Shows a person how far `name` is; cheap enough for every episode."""
        for sink in self.sinks:
            sink.progress(name, done, total)

    def say(self, text: str) -> None:
        """Shows a line to a person, above a live display."""
        for sink in self.sinks:
            sink.say(text)

    def offset(self) -> int:
        """Makes all records safe from a kill; returns the length of metrics.jsonl in bytes (0 on ranks but 0).

        A checkpoint keeps that number: a resumed run cuts the file back to it.
        """
        if self.recorder is not None:
            self.recorder.flush()
        for sink in self.sinks:
            sink.sync()
        return self.metrics_path.stat().st_size if self.metrics_path is not None and self.metrics_path.exists() else 0

    def close(self) -> None:
        """Ends every sink. Adding afterwards is ignored."""
        for one in (self.recorder, self.exporter):
            if one is not None:
                one.close()
        sinks, self.sinks = self.sinks, []
        for sink in sinks:
            sink.close()


def speeds(metrics: Metrics, peak_flops: float | None = None) -> Metrics:
    """Rates from a step's counts and times; each only when its parts are there and its time is above 0.

    speed/tokens_per_second: tokens drawn (in a step without sampling: tokens trained) over the whole step;
    speed/sampled_tokens_per_second: tokens drawn over the collect span; speed/trained_tokens_per_second: all tokens
    forwarded over the train span; speed/mfu: FLOPs of training and sampling over what all devices
    could do in the whole step.
    """
    flops = [metrics[key] for key in ("flops/train:sum", "flops/sample:sum") if key in metrics]
    made = metrics.get("sampled_tokens:sum", metrics.get("trained_tokens:sum"))
    parts = {
        "speed/tokens_per_second:mean": (made, "time/step_seconds:sum", 1.0),
        "speed/sampled_tokens_per_second:mean": (metrics.get("sampled_tokens:sum"), "time/collect_seconds:sum", 1.0),
        "speed/trained_tokens_per_second:mean": (metrics.get("tokens:sum"), "time/train_seconds:sum", 1.0),
        "speed/mfu:mean": (sum(flops) if flops and peak_flops else None, "time/step_seconds:sum", peak_flops or 1.0),
    }
    return {
        key: count / metrics[clock] / scale
        for key, (count, clock, scale) in parts.items()
        if count is not None and metrics.get(clock, 0.0) > 0
    }


def without_wall_clock(record: Record) -> Record:
    """The part of a record that two equal deterministic runs must agree on, bit for bit."""
    return {key: value for key, value in record.items() if not key.startswith(WALL_CLOCK)}


def memory_metrics() -> Metrics:
    """This process's peak memory in GiB: of the GPU since the start where there is one, and of the process itself."""
    import resource

    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    metrics = {"memory/peak_process_gib:max": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if torch.cuda.is_available():
        metrics["memory/peak_gpu_gib:max"] = torch.cuda.max_memory_allocated() / 2**30
    return metrics


def make_tracker(
    cfg: RunConfig,
    folder: Path,
    rank: int,
    *,
    resume_from: int | None = None,
    world_size: int = 1,
    gpu_name: str = "",
    totals: dict[str, int] | None = None,
    recorder: SystemRecorder | None = None,
) -> Tracker:
    """The Tracker that cfg.tracking asks for, writing to the run folder; without sinks on ranks but 0.

    resume_from: the length of metrics.jsonl that the checkpoint kept, to which it is cut back (0 = begin it again: an
    earlier start was killed before its first checkpoint); None = a new run, which refuses a file that has lines.
    gpu_name: torch's name of the device, for MFU. totals: the last step of each phase, where the options do not say it.
    Raises: UserError for a package that is missing, a file that cannot be written, or metrics of another run.
    """
    if rank != 0:
        return Tracker([], recorder=recorder)
    from skyrl.tracking.console import ConsoleSink
    from skyrl.tracking.flops import peak_flops
    from skyrl.tracking.jsonl import JsonlSink

    options, folder = cfg.tracking, Path(folder)
    lines = JsonlSink(folder / "metrics.jsonl", resume_from=resume_from)
    others: list[Sink] = []
    if options.wandb != "off":
        from skyrl.tracking.wandb import WandbSink

        others.append(WandbSink(cfg, folder))
    if options.trackio:
        from skyrl.tracking.wandb import TrackioSink

        others.append(TrackioSink(cfg, folder))
    kept = read_metrics(lines.path) if others or options.tensorboard else []
    if options.tensorboard:
        from skyrl.tracking.tensorboard import TensorBoardSink

        others.append(TensorBoardSink(folder / "tensorboard", kept[-1]["step"] if kept else -1))
    for record in kept:
        for sink in others:
            sink.write(record)
    sinks: list[Sink] = [lines, *others]
    if options.console != "off":
        if totals is None:
            totals = {"warmup": cfg.warmup.num_steps, "rl": cfg.warmup.num_steps + cfg.batch.num_steps}
        live = options.console == "auto" and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        sinks.append(ConsoleSink(totals, stream=sys.stdout, live=live))
    peak = options.peak_tflops * 1e12 if options.peak_tflops > 0 else peak_flops(gpu_name)
    flops = peak * world_size if peak else None
    tracker = Tracker(sinks, metrics_path=lines.path, peak_flops=flops, recorder=recorder)
    for note in lines.notes:
        tracker.say(note)
    return tracker
