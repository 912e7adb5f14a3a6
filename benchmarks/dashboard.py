"""How long the dashboard takes over 100 runs of 100,000 steps: read for the first time, opened again, and each page.

python benchmarks/dashboard.py [--write] [--runs 100] [--steps 100000]

The runs are hard links to one file with the metrics of a real run's steps, so the disk holds it once. The first one
is read for the first time; the cache of the others is copied (blocks by hard links) from it, as all are alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, write
from starlette.testclient import TestClient

sys.path.insert(0, str(ROOT / "tests" / "dashboard"))
from viewing import OpenDoor  # noqa: E402

from skyrl.config.schema import DashboardConfig  # noqa: E402
from skyrl.dashboard.app import create_app  # noqa: E402
from skyrl.dashboard.command import DEMO  # noqa: E402
from skyrl.dashboard.index import RunIndex  # noqa: E402
from skyrl.run_dir import RunReader  # noqa: E402

REPEATS = 5
COLD = 1


def make_run(folder: Path, number: int, steps: int) -> None:
    """A run; the first one's values walk around those of the demo's last step, the others are links to it."""
    demo, first = RunReader(DEMO / "objectives-seed1"), folder / "run-000"
    run = folder / f"run-{number:03d}"
    run.mkdir(parents=True)
    text = (demo.path / "config.yaml").read_text().replace("seed: 1\n", f"seed: {number}\n", 1)
    (run / "config.yaml").write_text(text)
    if number:
        os.link(first / "metrics.jsonl", run / "metrics.jsonl")
        return
    last = demo.metrics()[0][-1]
    keys = [key for key, value in last.items() if isinstance(value, float)]
    steps_of = np.random.default_rng(0).normal(0, 0.01, (steps, len(keys)))
    walks = np.cumsum(steps_of, axis=0) + np.array([last[key] for key in keys])
    with open(run / "metrics.jsonl", "w") as stream:
        for step, values in enumerate(walks.tolist(), start=1):
            stream.write(json.dumps({"step": step, "phase": "rl", **dict(zip(keys, values, strict=True))}) + "\n")


def copy_cache(folder: Path, cache: Path, runs: int, steps: int) -> None:
    """Adds runs and, to the cache, what reading them would have made."""
    (index,) = cache.glob("*/index.json")
    told = json.loads(index.read_text())
    for number in range(COLD, runs):
        make_run(folder, number, steps)
        name, kept = f"run-{number:03d}", json.loads(json.dumps(told["runs"]["run-000"]))
        generation = kept["metrics"]["generation"]
        kept["metrics"]["generation"] = f"{number:08x}"
        os.link(index.with_name(f"{generation}.f8"), index.with_name(f"{number:08x}.f8"))
        kept["stamp"], kept["about"]["seed"] = RunReader(folder / name).stamp(), number
        told["runs"][name] = kept
    index.write_text(json.dumps(told))


def open_index(runs: Path, cache: Path) -> tuple[RunIndex, TestClient]:
    """What a fresh process has when it answers its first request."""
    index = RunIndex(runs, cache)
    app, _ = create_app(DashboardConfig(), OpenDoor(), index)
    index.start()
    return index, TestClient(app, headers={"accept": "text/html,*/*"})


def timed(client: TestClient, address: str) -> dict[str, Any]:
    """Milliseconds of the first request, of all, and of this process's CPU; and the bytes of the answer."""
    taken, cpu = [], time.process_time()
    for _ in range(REPEATS):
        began = time.perf_counter()
        answer = client.get(address)
        taken.append((time.perf_counter() - began) * 1e3)
        assert answer.status_code == 200, answer.text
    return {
        "first_ms": round(taken[0], 1),
        "median_ms": round(statistics.median(taken), 1),
        "cpu_ms": round((time.process_time() - cpu) * 1e3 / REPEATS, 1),
        "bytes": len(answer.content),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--write", action="store_true")
    p.add_argument("--runs", type=int, default=100)
    p.add_argument("--steps", type=int, default=100_000)
    given = p.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, cache = Path(place) / "runs", Path(place) / "cache"
        for number in range(COLD):
            make_run(folder, number, given.steps)
        size = (folder / "run-000" / "metrics.jsonl").stat().st_size
        began, cpu = time.perf_counter(), time.process_time()
        index, _ = open_index(folder, cache)
        while not all(entry.stamp for entry in index.entries()):
            time.sleep(0.2)
        cold, cpu = time.perf_counter() - began, time.process_time() - cpu
        index.close()
        stored = sum(path.stat().st_size for path in cache.rglob("*.f8"))
        copy_cache(folder, cache, given.runs, given.steps)
        began = time.perf_counter()
        index, client = open_index(folder, cache)
        assert client.get("/").text.count('name="run"') == min(100, given.runs)
        opened = time.perf_counter() - began
        charts = "&".join(f"key={key}" for key in ("reward:mean", "loss:sum", "entropy:mean", "length:mean"))
        figures: dict[str, Any] = {
            "runs": given.runs,
            "steps": given.steps,
            "metrics_mib_each": round(size / 2**20, 1),
            "first_reading_seconds_each": round(cold / COLD, 2),
            "first_reading_cpu_seconds_each": round(cpu / COLD, 2),
            "cache_mib_each": round(stored / 2**20 / COLD, 1),
            "opened_again_seconds": round(opened, 3),
            "pages": {
                "table of runs": timed(client, "/"),
                "one run": timed(client, "/runs/run-007"),
                "four charts of one run": timed(client, f"/runs/run-007/series?{charts}"),
                "comparison": timed(client, "/compare?metric=reward:mean"),
                "one metric of all runs, mean over seeds": timed(client, "/compare/series?metric=reward:mean"),
                "one metric of all runs, each": timed(client, "/compare/series?metric=entropy:mean&by=runs"),
            },
        }
        index.close()
    print(json.dumps(figures, indent=1))
    if given.write:
        write("dashboard", figures)


if __name__ == "__main__":
    main()
