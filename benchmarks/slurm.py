"""Preemptions on a real Slurm: seconds from signal to exit, steps lost, seconds to the first step after, and whether
the result is bit for bit that of an uninterrupted run.

    tests/slurm/cluster.sh run python benchmarks/slurm.py --preemptions 20 --write

Jobs of two nodes with a rank each (a tiny model: what is measured is the machinery, not the size of a save). Each job
is signalled a few times, at moments drawn at random from all of a run: warm-up, generation, update, evaluation, save.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import common

sys.path += [str(common.ROOT), str(common.ROOT / "tests" / "slurm")]
import jobs  # noqa: E402

STEPS = 16  # of RL, after 4 of warm-up
OPTIONS = [*jobs.RUN, f"batch.num_steps={STEPS}", "run.dir=run"]
jobs.LAST = f"{4 + STEPS:06d}"


def reference(place: Path) -> tuple[Any, float]:
    """The numbers of an uninterrupted run, and the seconds of its job."""
    begun = time.monotonic()
    job = jobs.Job.submit(place, "train.sbatch", *OPTIONS, flags=("--nodes=2",))
    if job.end(600) != "COMPLETED":
        sys.exit(f"the uninterrupted run failed:\n{job.text()}")
    return jobs.numbers(place / "run"), time.monotonic() - begun


def preempt(job: jobs.Job, draw: random.Random) -> dict[str, Any] | None:
    """One signal at a random moment, and what came of it; None when the run ended before it."""
    run, before = job.place / "run", int(job.fact("Restarts"))
    start = jobs.steps(run)
    jobs.until(lambda: jobs.steps(run) > start or ended(job), 300, job)
    time.sleep(draw.uniform(0.0, 2.0))
    if ended(job):
        return None
    known = len(jobs.stops(run))
    sent = time.monotonic()
    job.signal()
    jobs.until(lambda: int(job.fact("Restarts") or before) > before or ended(job), 120, job, every=0.05)
    if len(jobs.stops(run)) == known:
        return None  # the run was over before the signal came
    queued = time.monotonic()
    stop, recorded = jobs.stops(run)[-1], jobs.steps(run)
    jobs.until(lambda: job.state() == "RUNNING" or ended(job), 120, job, every=0.1)
    running = time.monotonic()
    jobs.until(lambda: jobs.steps(run) > recorded or ended(job), 300, job, every=0.1)
    return {
        "phase": stop["phase"],
        "signal_to_saved_seconds": stop["seconds"],
        "signal_to_queued_seconds": round(queued - sent, 2),
        "steps_lost": max(0, recorded - stop["done"]),
        "queued_to_running_seconds": round(running - queued, 2),
        "running_to_step_seconds": round(time.monotonic() - running, 2),
    }


def ended(job: jobs.Job) -> bool:
    """Whether Slurm is done with it."""
    return job.state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def summary(values: list[float]) -> dict[str, float]:
    """Median and largest."""
    return {"median": round(statistics.median(values), 2), "max": round(max(values), 2)}


def main() -> None:
    """Runs jobs until enough preemptions are seen; prints and, with --write, keeps the table."""
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--preemptions", type=int, default=20)
    p.add_argument("--per-job", type=int, default=4)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--write", action="store_true", help="keeps the figures in benchmarks/baselines")
    flags = p.parse_args()
    if "SLURM_CONF" not in os.environ:
        print("slurm.py: needs a Slurm: tests/slurm/cluster.sh run python benchmarks/slurm.py")
        return
    draw, equal, counted = random.Random(flags.seed), 0, 0
    seen: list[Any] = []
    with tempfile.TemporaryDirectory(prefix="skyrl-slurm-") as folder:
        (Path(folder) / "whole").mkdir()
        wanted, seconds = reference(Path(folder) / "whole")
        while counted < flags.preemptions:
            place = Path(folder) / f"job-{len(seen)}"
            place.mkdir()
            job = jobs.Job.submit(place, "train.sbatch", *OPTIONS, "env.options.sleep=0.02", flags=("--nodes=2",))
            mine = [found for _ in range(flags.per_job) if (found := preempt(job, draw)) is not None]
            state = job.end(600)
            same = state == "COMPLETED" and jobs.numbers(place / "run") == wanted
            seen += mine
            counted += len(mine)
            equal += len(mine) if same else 0
            print(f"job {job.id}: {len(mine)} preemptions, {state}, bit-equal: {same}", flush=True)
            if not same:
                print(job.text())
    table = {
        "preemptions": counted,
        "resumed_bit_equal": equal,
        "steps_lost": sum(found["steps_lost"] for found in seen),
        "phases": dict(Counter(found["phase"] for found in seen)),
        **{name: summary([found[name] for found in seen]) for name in seen[0] if name.endswith("_seconds")},
        "uninterrupted_job_seconds": round(seconds, 1),
    }
    for name, value in table.items():
        print(f"{name:<28}{value}")
    if flags.write:
        note = "queued_to_running is Slurm's own wait: twice the life of a credential, 5 s in the test cluster"
        print(common.write("slurm_preemption", {**table, "note": note, "each": seen}))


if __name__ == "__main__":
    main()
