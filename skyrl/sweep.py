"""One run of a command line, or one point of a sweep: skipped if it is done, its result kept, queued again by itself.

A point's folder is named by its options (config.load.default_name), so the same sweep finds its points again, whoever
started them: points that are done answer at once, those that were stopped go on.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from skyrl.config.load import config_digest
from skyrl.config.schema import RunConfig
from skyrl.distributed import env as slurm_env
from skyrl.files import write_atomic
from skyrl.tracking.jsonl import read_metrics
from skyrl.types import RunError, StopRun

RESULT = "result.json"
OBJECTIVE = "eval/accuracy:mean"
SWEEPS = "runs/.sweeps"  # what sweepers and submitit keep, when points run elsewhere
BEST = "optimization_results.yaml"
MAX_REQUEUES = "SKYRL_MAX_REQUEUES"
SCONTROL_SECONDS = 30


def play(cfg: RunConfig, mode: str, *, sweep: bool) -> float | None:
    """Runs skyrl.trainers.rl.<mode>(cfg); the final held-out accuracy, None for a run without evaluation.

    A point of a `sweep` whose folder has a result of the same options is not run again. Raises what the run raises.
    """
    slurm_env.from_slurm()  # a task that submitit started comes here without the command line's start
    folder, leader = Path(cfg.run.dir), os.environ.get("RANK", "0") == "0"
    done = read_result(folder)
    if sweep and done is not None and done["digest"] == point_digest(cfg):
        if leader:
            print(f"{folder}: done already, accuracy {_show(done['accuracy'])}", flush=True)
        return done["accuracy"]
    start = time.time()
    from skyrl.trainers import rl  # it imports torch

    getattr(rl, mode)(cfg)
    if cfg.dry_run:
        return None
    accuracy = final_values(folder / "metrics.jsonl").get(OBJECTIVE)
    if leader and folder.is_dir():
        result = {
            "name": cfg.run.name,
            "seed": cfg.seed,
            "accuracy": accuracy,
            "digest": point_digest(cfg),
            "finished": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "seconds_of_last_start": round(time.time() - start, 1),
        }
        write_atomic(folder / RESULT, json.dumps(result, indent=1) + "\n")
    return accuracy


def point_digest(cfg: RunConfig) -> str:
    """Equal for two configs that end in the same numbers: what config_digest holds, and how far the run goes."""
    return f"{config_digest(cfg)}-{cfg.warmup.num_steps}-{cfg.batch.num_steps}"


def read_result(folder: Path) -> dict[str, Any] | None:
    """What a finished run has left; None without, or for a file that cannot be read."""
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and {"digest", "accuracy"} <= result.keys() else None


def final_values(metrics: Path) -> dict[str, float]:
    """The last value of every metric in a metrics.jsonl; {} without the file."""
    values: dict[str, float] = {}
    for record in read_metrics(metrics) if metrics.exists() else ():
        values.update({key: value for key, value in record.items() if key != "phase" and value is not None})
    return values


def sweep_folder(overrides: list[str]) -> str | None:
    """Where Hydra's sweeper and launcher keep their files: on the disk that all nodes see when a launcher or an own
    sweeper is chosen; None: nowhere worth keeping."""
    return SWEEPS if any(o.startswith(("hydra/launcher=", "hydra/sweeper=")) for o in overrides) else None


def best_of(folder: str) -> str:
    """One line about the best point that Optuna's sweeper has found; "" for another sweeper."""
    path = Path(folder) / BEST
    if not path.exists():
        return ""
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.unlink()  # so that a later sweep by another sweeper does not tell it again
    options = " ".join(f"{key}={value}" for key, value in found.get("best_params", {}).items())
    return f"best point: {options} (accuracy {_show(found.get('best_value'))})"


def in_submitit(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process runs one point for a sweep of another process."""
    return bool(environment.get("SUBMITIT_EXECUTOR"))


def leave(error: Exception, code: int) -> NoReturn:
    """How a point that submitit has started ends after `error`, which was told: stopped points queue their job again,
    failures travel to the process of the sweep as a RunError.

    A point of several ranks ends its process instead: the other ranks may wait in a collective.
    """
    if isinstance(error, StopRun) and error.exit_code != 130:
        leader = int(os.environ.get("RANK", "0")) == 0
        refused = requeue(int(os.environ.get(MAX_REQUEUES, "50"))) if leader else ""
        if not refused:
            os._exit(code)
        print(f"skyrl: not queued again: {refused}", flush=True)
        raise RunError(f"{error}; not queued again: {refused}; the same sweep goes on")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    raise RunError(f"a point of the sweep failed: {' '.join(str(error).split())[:300]}")


def requeue(
    most: int,
    environment: Mapping[str, str] = os.environ,
    ask: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run,
) -> str:
    """Puts this process's Slurm job back into the queue; "" or why not."""
    job = environment.get("SLURM_JOB_ID", "")
    if not job:
        return "this is no Slurm job"
    if environment.get("SLURM_ARRAY_TASK_ID"):  # one task of an array has the number of the array: that means all tasks
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    if int(environment.get("SLURM_RESTART_COUNT", "0")) >= most:
        return f"it was {most} times already ({MAX_REQUEUES})"
    command = ["scontrol", "show", "job", job, "--oneliner"]
    try:
        told = ask(command, capture_output=True, text=True, timeout=SCONTROL_SECONDS).stdout
        if "JobState=RUNNING " not in told and "JobState=PREEMPTED " not in told and "Reason=TimeLimit " not in told:
            return f"job {job} was cancelled"  # a requeue would bring it back to life
        done = ask(["scontrol", "requeue", job], capture_output=True, text=True, timeout=SCONTROL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"scontrol: {error}"
    return "" if done.returncode == 0 else " ".join(done.stderr.split())


def _show(accuracy: float | None) -> str:
    return "not measured" if accuracy is None else f"{accuracy:.4f}"
