"""Points of a sweep: skipped if they are done, their results kept, queued again by themselves; and their table.

A point's folder is named by its options (config.load.default_name), so the same sweep finds its points again, whoever
started them: points that are done answer at once, those that were stopped go on. `skyrl-tx sweep-table` shows the final
numbers of the runs in a folder, one line a point, mean and spread over its seeds. Two runs are the same point when
their options differ in the seed alone (and in where and how they ran).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from skyrl.args import Parser, path_arg
from skyrl.config.load import config_digest, flat
from skyrl.config.schema import RunConfig
from skyrl.config.validation import ignored_on_resume
from skyrl.distributed.place import take_place
from skyrl.files import write_atomic
from skyrl.run_dir import OBJECTIVE, RESULT, final_values, read_metrics, read_result, run_state
from skyrl.trainers import run_trainer
from skyrl.types import RunError, StopRun, UserError

SWEEPS = "runs/.sweeps"  # what sweepers and submitit keep, when points run elsewhere
BEST = "optimization_results.yaml"
MAX_REQUEUES = "SKYRL_MAX_REQUEUES"
SCONTROL_SECONDS = 30
DEFAULT_METRICS = (OBJECTIVE, "reward:mean")
UNCOUNTED = ("seed", "batch.num_steps")  # a point's length is one of its options, whatever a resume may change


def play(cfg: RunConfig, mode: str, *, sweep: bool, hooks: Sequence[Any] = ()) -> float | None:
    """Runs a trainer; the final held-out accuracy, None for a run without evaluation.

    A point of a `sweep` whose folder has a result of the same options is not run again. Raises what the run raises.
    """
    take_place()  # a task that submitit started comes here without the command line's start
    folder, leader = Path(cfg.run.dir), os.environ.get("RANK", "0") == "0"
    done = read_result(folder) or {}
    if sweep and "accuracy" in done and done.get("digest") == point_digest(cfg):
        if leader:
            print(f"{folder}: done already, accuracy {_show(done['accuracy'])}", flush=True)
        return done["accuracy"]
    start = time.time()
    told = run_trainer(mode, cfg, hooks)
    last = final_values(folder / "metrics.jsonl")
    accuracy = last.get(OBJECTIVE, last.get(cfg.checkpoint.best_metric))
    if leader and folder.is_dir():
        result = {
            "name": cfg.run.name,
            "state": "finished",
            "seed": cfg.seed,
            **summary(folder / "metrics.jsonl"),
            **told,
            "digest": point_digest(cfg),
            "finished": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "seconds_of_last_start": round(time.time() - start, 1),
        }
        write_atomic(folder / RESULT, json.dumps(result, indent=1) + "\n")
    return accuracy


def point_digest(cfg: RunConfig) -> str:
    """Equal for two configs that end in the same numbers: what config_digest holds, and how far the run goes."""
    return f"{config_digest(cfg)}-{cfg.warmup.num_steps}-{cfg.batch.num_steps}"


def summary(metrics: Path) -> dict[str, Any]:
    """What a metrics.jsonl says in a few numbers: held-out accuracy at the end and before the policy learned by RL (of
    supervised training alone: when it was first measured), the last reward, steps, tokens drawn and forwarded in
    training, seconds of all steps."""
    records = read_metrics(metrics) if metrics.exists() else []
    measured = [record for record in records if record.get(OBJECTIVE) is not None]
    last = final_values(metrics)
    return {
        "accuracy": last.get(OBJECTIVE),
        "accuracy_before": measured[0][OBJECTIVE] if measured else None,
        "reward": last.get("reward:mean"),
        "steps": int(last.get("step", 0)),
        "sampled_tokens": int(sum(record.get("sampled_tokens:sum", 0) for record in records)),
        "trained_tokens": int(sum(record.get("tokens:sum", 0) for record in records)),
        "seconds": round(sum(record.get("time/step_seconds:sum", 0.0) for record in records), 1),
    }


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


# ---- the table


@dataclass
class Point:
    """One combination of options: `options` are those that differ within the table, `runs` maps a seed to the final
    values of its run, `unfinished` are seeds without a result, `folders` those of all its runs with the state of
    each; of further runs of a seed (`again`) only the folder is kept."""

    options: dict[str, Any]
    runs: dict[int, dict[str, float]] = field(default_factory=dict)
    unfinished: list[int] = field(default_factory=list)
    folders: dict[str, str] = field(default_factory=dict)
    again: list[str] = field(default_factory=list)

    def spread(self, metric: str) -> dict[str, Any] | None:
        """Mean, standard deviation (of a sample; None for one run), least and greatest of a metric over finished runs;
        None when none has it."""
        values = {seed: run[metric] for seed, run in sorted(self.runs.items()) if metric in run}
        if not values:
            return None
        return {
            "mean": statistics.fmean(values.values()),
            "std": statistics.stdev(values.values()) if len(values) > 1 else None,
            "min": min(values.values()),
            "max": max(values.values()),
            "values": values,
        }


def read_points(folder: Path) -> list[Point]:
    """All points in `folder`, in the order of their options. Raises UserError for a folder without runs."""
    found: dict[str, tuple[dict[str, Any], Point]] = {}
    for path in sorted(folder.glob("*/config.yaml")):
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
            options = flat(config)
            seed = int(options.pop("seed"))
        except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"{path}: not the config of a run; move that folder away") from None
        schedule = str(options.get("optim.schedule"))
        kept = {k: v for k, v in options.items() if k in UNCOUNTED or not ignored_on_resume(k, schedule)}
        _, point = found.setdefault(json.dumps(kept, sort_keys=True, default=str), (kept, Point({})))
        point.folders[path.parent.name] = state = run_state(path.parent)
        if state == "finished":
            if seed in point.runs:
                point.again.append(path.parent.name)
            point.runs.setdefault(seed, final_values(path.parent / "metrics.jsonl"))
        else:
            point.unfinished.append(seed)
    if not found:
        raise UserError(f"sweep-table: no runs in {folder}; give the folder that holds them")
    everything = [kept for kept, _ in found.values()]
    differ = [
        k for k in sorted({k for kept in everything for k in kept}) if len({_text(kept, k) for kept in everything}) > 1
    ]
    for kept, point in found.values():
        point.options = {key: kept.get(key) for key in differ}
    return sorted((point for _, point in found.values()), key=lambda point: [_order(v) for v in point.options.values()])


def table(points: Sequence[Point], metrics: Sequence[str]) -> str:
    """The points as text: options that differ, seeds, and mean +- standard deviation of each metric."""
    options = list(points[0].options)
    rows = [[*options, "seeds", *metrics, "unfinished", "state", "folders"]]
    for point in points:
        cells = [f"{value:g}" if isinstance(value, float) else str(value) for value in point.options.values()]
        cells.append(",".join(map(str, sorted(point.runs))) or "-")
        for metric in metrics:
            spread = point.spread(metric)
            if spread is None:
                cells.append("-")
            else:
                cells.append(f"{spread['mean']:.4f}" + ("" if spread["std"] is None else f" +- {spread['std']:.4f}"))
        where = next(iter(point.folders)) + (f" and {len(point.folders) - 1} more" if len(point.folders) > 1 else "")
        where += f" (again: {', '.join(point.again)})" if point.again else ""
        states = Counter(point.folders.values())
        state = ", ".join(f"{count} {name}" if len(point.folders) > 1 else name for name, count in states.items())
        rows.append([*cells, ",".join(map(str, sorted(point.unfinished))), state, where])
    if not any(row[-3] for row in rows[1:]):
        rows = [[*row[:-3], *row[-2:]] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def sweep_table(args: Sequence[str]) -> None:
    """Runs the command line. Raises UserError."""
    p = Parser(prog="skyrl-tx sweep-table", description="Final numbers of a folder's runs, mean and spread over seeds.")
    p.add_argument("folder", nargs="?", default="runs", type=path_arg, help="folder of run folders (runs)")
    p.add_argument("--metric", action="append", default=[], help=f"repeat for more ({', '.join(DEFAULT_METRICS)})")
    p.add_argument("--json", action="store_true", help="every value, for programs")
    flags = p.parse_args(list(args))
    if not flags.folder.is_dir():
        raise UserError(f"sweep-table: no folder {flags.folder} here; give the folder that holds the runs")
    points = read_points(flags.folder)
    known = sorted({name for point in points for run in point.runs.values() for name in run})
    for metric in flags.metric:
        if known and metric not in known:
            raise UserError(f"sweep-table: --metric={metric}: no run has it; there are {', '.join(known)}")
    metrics = flags.metric or list(DEFAULT_METRICS)
    if not flags.json:
        print(table(points, metrics))
        return
    rows = [
        {
            "options": point.options,
            "seeds": sorted(point.runs),
            "unfinished": sorted(point.unfinished),
            "folders": list(point.folders),
            "states": point.folders,
            "again": point.again,
            "metrics": {metric: point.spread(metric) for metric in metrics},
        }
        for point in points
    ]
    print(json.dumps({"folder": str(flags.folder), "points": rows}, indent=1))


def _text(values: dict[str, Any], key: str) -> str:
    return json.dumps(values.get(key), sort_keys=True, default=str)


def _order(value: Any) -> tuple[int, float, str]:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (0, float(value), "") if number else (1, 0.0, str(value))
