"""Real batch jobs on the Slurm of cluster.sh: submitted, watched, signalled, and their runs compared bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from skyrl.run_dir import read_metrics
from skyrl.tracking.base import without_wall_clock

ROOT = Path(__file__).resolve().parents[2]
BATCH = ROOT / "launch" / "slurm"
# A run of some seconds whose rewards vary (tests/system/plugins/letters.py). Slurm's limit is far away unless a test
# says otherwise, and every checkpoint stays.
RUN = (
    "~experiment model.tiny.hidden_size=32 model.tiny.num_heads=2 model.tiny.num_kv_heads=1 model.tiny.num_layers=1 "
    "model.tiny.ffn_size=64 batch.num_steps=6 batch.prompts_per_step=4 batch.samples_per_prompt=4 "
    "batch.max_tokens_per_microbatch=64 warmup.num_steps=4 warmup.rows_per_step=8 warmup.lr=1e-2 optim.lr=1e-2 "
    "eval.num_prompts=8 eval.every_steps=2 checkpoint.every_steps=2 checkpoint.export=false tracking.rollouts_every=1 "
    "sampler.max_new_tokens=4 run.collective_timeout_seconds=60 env.name=letters plugins=[letters] "
    "debug.deterministic=true checkpoint.keep_last=0"
).split()
LAST = "000010"  # its last checkpoint: 4 steps of warm-up, 6 of RL


def environment(**more: str) -> dict[str, str]:
    """For commands and, through sbatch, for jobs: the repository and the tests' plugins on the path, no job around."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SKYRL_"))}
    clean["SLURM_CONF"] = os.environ["SLURM_CONF"]
    clean["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), clean["PATH"], "/usr/sbin", "/sbin"])
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "system" / "plugins")])
    return {**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "SKYRL_PYTHON": sys.executable, **more}


def command(*args: str, cwd: Path, timeout: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
    """A command to its end."""
    return subprocess.run(args, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=timeout)


@dataclass
class Job:
    """A batch job and the folder it was submitted from."""

    id: str
    place: Path
    log: Path

    @staticmethod
    def submit(place: Path, script: str, *args: str, flags: tuple[str, ...] = (), **env: str) -> Job:
        """`sbatch <flags> launch/slurm/<script> <args>`."""
        time_limit = () if any(flag.startswith("--time") for flag in flags) else ("--time=30",)
        done = command("sbatch", "--parsable", *time_limit, *flags, str(BATCH / script), *args, cwd=place, **env)
        assert done.returncode == 0, done.stderr
        number = done.stdout.strip()
        name = "skyrl-serve" if script == "serve.sbatch" else "skyrl"
        return Job(number, place, place / f"{name}-{number}.out")

    def fact(self, name: str) -> str:
        """A field of `scontrol show job`."""
        told = command("scontrol", "show", "job", self.id, "--oneliner", cwd=self.place).stdout
        found = re.search(rf"\b{name}=(\S*)", told)
        return found[1] if found else ""

    def state(self) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.fact("JobState")

    def text(self) -> str:
        """All that it has printed, over its starts."""
        return self.log.read_text() if self.log.exists() else ""

    def signal(self, name: str = "USR1") -> None:
        """Slurm's signal to the ranks."""
        done = command("scancel", f"--signal={name}", self.id, cwd=self.place)
        assert done.returncode == 0, done.stderr

    def end(self, seconds: float = 240) -> str:
        """Waits until it is over; its last state. A job at its limit has a final state for a moment before its own
        requeue, and a busy controller gives none: what counts is a state that is still there a second later."""
        going = ("", "PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING")
        last = ""

        def over() -> bool:
            nonlocal last
            before, last = last, self.state()
            return last not in going and last == before

        until(over, seconds, self, every=1.0)
        return last


def queued(place: Path) -> list[str]:
    """Jobs that were started in this folder."""
    told = command("squeue", "-h", "-o", "%i %Z", cwd=place).stdout
    return [number for number, folder in (line.split(" ", 1) for line in told.splitlines()) if folder == str(place)]


def address(node: str) -> str:
    """Where a node of the cluster is reached; its name does not resolve."""
    found = re.search(rf"NodeName={node} .*?NodeAddr=(\S+)", Path(os.environ["SLURM_CONF"]).read_text())
    assert found is not None
    return found[1]


def until(condition: Callable[[], bool], seconds: float, job: Job | None = None, every: float = 0.2) -> None:
    """Waits for a condition; fails with the job's output after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s\n{job.text() if job else ''}"
        time.sleep(every)


def steps(run: Path) -> int:
    """Steps that a run has recorded."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def numbers(run: Path) -> tuple[list[dict], dict[str, str]]:
    """What a run has computed: its records without what depends on time, and hashes of its last checkpoint's parts."""
    records = [without_wall_clock(record) for record in read_metrics(run / "metrics.jsonl")]
    parts = sorted((run / "checkpoints" / LAST).glob("*.distcp"))
    assert parts, f"{run} has no checkpoint {LAST}"
    return records, {part.name: hashlib.sha256(part.read_bytes()).hexdigest() for part in parts}


def stops(run: Path) -> list[dict]:
    """How a run was stopped, each time."""
    path = run / "stops.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
