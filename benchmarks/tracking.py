"""What tracking costs: the CPU time of its own calls within the steps of a real run, all sinks on, against the steps.

The default recipe on one rank (--prompts 16: a quarter of its prompts, so that steps are shorter): metrics.jsonl,
console lines, system metrics, advisories, wandb (offline), TensorBoard, Trackio and Prometheus (fetched once a second)
together, and each part by itself. What the loop calls is timed by its thread's own CPU clock. Threads of the sinks are
what the process has used beside the loop's thread, less the same in a second run in which all is off but metrics.jsonl.
They go by the clock (Prometheus once a second, Trackio's sender), so they are set against the time of a step on the
wall, which on a busy machine is many times its CPU time. wandb's own process (wandb-core) is not counted.

    python benchmarks/tracking.py --write
"""

from __future__ import annotations

import argparse
import atexit
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, write

PORT = 9461
ALL = ("wandb=offline", "tensorboard=true", "trackio=true", f"prometheus_port={PORT}", "console=lines")
OFF = ("console=off", "system=false")
FETCH = f"""
import time, urllib.request
while True:
    time.sleep(1.0)
    try:
        urllib.request.urlopen("http://127.0.0.1:{PORT}/metrics", timeout=5).read()
    except OSError:
        pass
"""


def measured(args: argparse.Namespace) -> None:
    """The process that is measured: a real run; prints one line of JSON."""
    from skyrl.config.load import load_config
    from skyrl.run import Run
    from skyrl.tracking.advisories import Advisories, History
    from skyrl.tracking.base import Tracker
    from skyrl.tracking.jsonl import JsonlSink
    from skyrl.tracking.profiler import StepProfiler
    from skyrl.tracking.system import SystemRecorder
    from skyrl.trainers import run_trainer

    spent: dict[str, list[float]] = {}
    depth = [0]

    def timed(cls: type, name: str, part: str) -> None:
        real = getattr(cls, name)

        @functools.wraps(real)
        def call(*given: Any, **more: Any) -> Any:
            if depth[0] and part == "all":
                return real(*given, **more)
            depth[0] += part == "all"
            start = time.thread_time()
            try:
                return real(*given, **more)
            finally:
                spent.setdefault(part, [0.0])[-1] += time.thread_time() - start
                depth[0] -= part == "all"

        setattr(cls, name, call)

    for name in ("add", "say", "progress"):
        timed(Tracker, name, "all")
    timed(Run, "finish_step", "all")  # sinks, recorder, history and advisories
    timed(StepProfiler, "begin", "all")
    timed(SystemRecorder, "finish_step", "system")
    timed(JsonlSink, "write", "jsonl")
    timed(History, "add", "advisories")
    timed(Advisories, "look_back", "advisories")
    if args.options[0] != OFF[0]:
        from skyrl.tracking.console import ConsoleSink
        from skyrl.tracking.tensorboard import TensorBoardSink
        from skyrl.tracking.wandb import TrackioSink, WandbSink

        for cls, part in ((ConsoleSink, "console"), (TensorBoardSink, "tensorboard")):
            timed(cls, "write", part)
        timed(WandbSink, "write", "wandb")
        timed(TrackioSink, "write", "trackio")
        fetching = subprocess.Popen([sys.executable, "-c", FETCH])
        atexit.register(fetching.kill)
    each: list[dict[str, float]] = []
    finish = Run.finish_step

    def end(run: Run, step: int, phase: str) -> Any:
        out = finish(run, step, phase)
        cpu = time.process_time()
        now = {"wall": time.perf_counter(), "cpu": cpu, "threads": cpu - time.thread_time()}
        each.append(now | {part: values[-1] for part, values in spent.items()} | {"rl": float(phase == "rl")})
        return out

    Run.finish_step = end  # type: ignore[assignment,method-assign]
    folder = tempfile.mkdtemp()
    options = [f"tracking.{one}" for one in args.options]
    run = [f"run.dir={folder}", "run.threads=1", f"batch.num_steps={args.steps}", "warmup.num_steps=4"]
    quiet = [
        *([f"batch.prompts_per_step={args.prompts}"] if args.prompts else []),
        "eval.every_steps=0",
        "eval.num_prompts=1",
        "checkpoint.every_steps=0",
        "checkpoint.export=false",
    ]
    run_trainer("train", load_config([*run, *quiet, "tracking.rollouts_every=0", *options]))
    rl = [one for one in each if one["rl"]][args.warmup :]
    steps = [{key: b.get(key, 0.0) - a.get(key, 0.0) for key in b} for a, b in zip(rl, rl[1:], strict=False)]
    medians = {key: statistics.median(one[key] for one in steps) for key in steps[0] if key != "rl"}
    print("RESULT", json.dumps({key: round(1000 * value, 4) for key, value in medians.items()}), flush=True)


def main() -> None:
    """Runs both processes in turn and prints what share of a step tracking takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--prompts", type=int, help="a step; those of the recipe where it is not given")
    parser.add_argument("--warmup", type=int, default=5, help="first steps that are not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--options", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.options is not None:
        measured(args)
        return
    runs: dict[str, list[dict[str, float]]] = {"all": [], "off": []}
    for _ in range(args.rounds):
        for name, options in (("all", ALL), ("off", OFF)):
            command = [sys.executable, __file__, "--steps", str(args.steps), "--warmup", str(args.warmup)]
            command += [*(["--prompts", str(args.prompts)] if args.prompts else []), "--options"]
            env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
            with tempfile.TemporaryDirectory() as home:
                env |= {"TRACKIO_DIR": str(Path(home) / "trackio")}
                done = subprocess.run([*command, *options], env=env, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
            runs[name].append(json.loads(line.removeprefix("RESULT ")))
            print(name, runs[name][-1], flush=True)
    keys = [key for key in runs["all"][0]]
    best = {key: statistics.median(run[key] for run in runs["all"]) for key in keys}
    off = {key: statistics.median(run[key] for run in runs["off"]) for key in runs["off"][0]}
    threads = max(0.0, best["threads"] - off["threads"])
    share = best["all"] / best["cpu"] + threads / best["wall"]
    results = {
        "milliseconds_a_step_all_on": best,
        "milliseconds_a_step_all_off": off,
        "milliseconds_of_threads": round(threads, 4),
        "share_of_the_loops_cpu_time": round(best["all"] / best["cpu"], 5),
        "threads_share_of_a_core": round(threads / best["wall"], 5),
        "share": round(share, 5),
        "rounds": runs,
    }
    print(
        f"tracking: {best['all']:.2f} ms in the loop, {threads:.2f} in threads, of {best['cpu']:.0f} ms ({share:.2%})"
    )
    if args.write:
        write("tracking", results)


if __name__ == "__main__":
    main()
