"""From the command to the first optimizer step of the default run, in parts; what --help and a dry run take; and how
long a server (`python -m skyrl.serve`) needs until its port answers, and from SIGTERM to its end.

The command is `python -m skyrl.train`, one process (`--ranks 2`: under torchrun, rank 0), all defaults but a run folder
of its own. The parts are marks on the way, each with seconds of the wall and of the processor: the command line is
imported; options are composed and checked; the loops (with torch and transformers) are imported; the run is open (plan,
prompts, folder, model, tracking); its first optimizer step, which is one of the supervised warm-up, is done. A recipe
without a warm-up evaluates first, which is work and not start; the default does so after its warm-up. File caches are
warm from a first round that is not counted, and compiled kernels are in their cache.

    python benchmarks/start.py --write
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent

RANKS = 1
COMMANDS = {"help": ["--help"], "dry_run": ["dry_run=true"]}


def child(options: list[str]) -> None:
    """The measured process: the real command line, with marks; it ends after the first optimizer step."""
    begun = float(os.environ["START_BEGUN"])
    marks: list[tuple[str, float, float]] = []

    def mark(name: str) -> None:
        marks.append((name, time.time() - begun, time.process_time()))

    mark("interpreter")
    from skyrl import main, sweep

    mark("command line imported")
    play = sweep.play

    def playing(*args: Any, **kwargs: Any) -> Any:
        mark("options composed and checked")
        import skyrl.loop as loop
        import skyrl.trainers.rl  # noqa: F401
        from skyrl.model import Model

        mark("loops imported")
        opened, stepped = loop.open_run, Model.optim_step

        def opening(*args: Any, **kwargs: Any) -> Any:
            run = opened(*args, **kwargs)
            mark("run open")
            return run

        def first(*args: Any, **kwargs: Any) -> Any:
            stepped(*args, **kwargs)
            mark("first optimizer step")
            if os.environ.get("RANK", "0") == "0":
                print("MARKS", json.dumps(marks), flush=True)
            os._exit(0)

        loop.open_run = opening
        Model.optim_step = first  # type: ignore[method-assign]
        return play(*args, **kwargs)

    sweep.play = playing
    sys.argv[1:] = options
    main.run_entry("train")


def measure(options: list[str], folder: str) -> dict[str, list[float]]:
    """{part: [seconds of the wall, of the processor]} of one start."""
    command = [sys.executable, *launcher(), __file__, "--child", *options, f"run.dir={folder}/run"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "START_BEGUN": str(time.time())}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder)
    lines = [line for line in done.stdout.splitlines() if line.startswith("MARKS ")]
    if not lines:
        raise SystemExit(f"the run ended before its first step:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    marks = json.loads(lines[0].removeprefix("MARKS "))
    before, parts = (0.0, 0.0), {}
    for name, wall, cpu in marks:
        parts[name], before = [wall - before[0], cpu - before[1]], (wall, cpu)
    return {**parts, "all": list(before)}


def launcher() -> list[str]:
    """What stands before the program for RANKS ranks."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"] if RANKS > 1 else []


def server_seconds(folder: str) -> dict[str, list[float]]:
    """[wall, processor] seconds of a server of RANKS ranks until its port answers, and of SIGTERM to its launcher until
    that has ended; the processor's are those of all its processes, and 0 for the end."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    options = [f"service.port={port}", f"service.folder={folder}/service"]
    command = [sys.executable, *launcher(), "-m", "skyrl.serve", *options]
    begun = time.time()
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL) as server:
        while server.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.02)
        found = {"server answers": [time.time() - begun, 0.0]}
        parent = psutil.Process(server.pid)
        for process in (parent, *parent.children(recursive=True)):
            used = process.cpu_times()
            found["server answers"][1] += used.user + used.system
        time.sleep(1.0)  # what begins beside it has begun
        begun = time.time()
        server.send_signal(signal.SIGTERM)
        server.wait()
        return {**found, "server ends": [time.time() - begun, 0.0]}


def command_seconds(options: list[str]) -> list[float]:
    """[wall, processor] seconds of `python -m skyrl.train` with these."""
    begun, used = time.time(), os.times()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "skyrl.train", *options], env=env, check=True, capture_output=True)
    now = os.times()
    spent = now.children_user + now.children_system - used.children_user - used.children_system
    return [time.time() - begun, spent]


def main() -> None:
    """Measures, prints medians, and writes them with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=1, help="2: under torchrun, as `make train` is")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    args, more = parser.parse_known_args()
    if args.child is not None:
        child([*args.child, *more])
        return
    global RANKS
    RANKS = args.ranks
    found: dict[str, list[list[float]]] = {}
    for number in range(args.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            parts = measure(more, folder) | server_seconds(folder)
        parts |= {name: command_seconds(options) for name, options in COMMANDS.items()}
        if number:
            for name, pair in parts.items():
                found.setdefault(name, []).append(pair)
    middle = {
        name: [round(statistics.median(one), 3) for one in zip(*pairs, strict=True)] for name, pairs in found.items()
    }
    for name, (wall, cpu) in middle.items():
        print(f"{name:<30} {wall:7.2f} s, processor {cpu:7.2f} s")
    if args.write:
        from common import write  # it imports torch, which would be counted

        name = "start" if RANKS == 1 else f"start_{RANKS}_ranks"
        print(write(name, {"seconds_wall_and_processor": middle, "rounds": found}))


if __name__ == "__main__":
    main()
