"""`skyrl-tx show`, `runs` and `rollouts`: what a run is and how far it has come, what it wrote, and which there are."""

from __future__ import annotations

import itertools
import json
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skyrl.args import Parser, path_arg
from skyrl.report.charts import curves_of, printable, sparkline
from skyrl.run_dir.reader import OBJECTIVE, RunReader, final_values, find_run, find_runs, total_steps
from skyrl.sweep import summary
from skyrl.tracking.console import duration
from skyrl.tracking.rollouts import show_rollouts
from skyrl.types import UserError, few

RECENT = 20  # steps over which speed is told


def show(args: Sequence[str]) -> None:
    """Runs the command line. Raises UserError."""
    p = Parser(prog="skyrl-tx show", description="What a run is, how far it has come, and what to do next.")
    p.add_argument("run", type=path_arg, help="a run folder, or the name of one in runs")
    p.add_argument("--json", action="store_true", help="for programs")
    given = p.parse_args(list(args))
    reader = find_run(given.run, "show")
    found = facts(reader)
    if given.json:
        print(json.dumps(found, indent=1, default=str))
        return
    rows = rows_of(found)
    for title, points in curves_of(reader.metrics()[0]):
        rows.append((title, f"{sparkline(points)}  {points[0][1]:.4g} -> {points[-1][1]:.4g}"))
    for name, text in [*rows, ("next", found["next"])]:
        print(f"{name[:24]:<25}{printable(text)}")


def facts(reader: RunReader) -> dict[str, Any]:
    """What is known of a run, as `skyrl-tx show --json` prints it; None for what is not known. Raises UserError for
    metrics that are damaged."""
    records, _ = reader.metrics()
    config, starts, state = reader.config(), reader.starts(), reader.state()
    last, newest = (records[-1] if records else {}), (starts[-1] if starts else {})
    phase, step = str(last.get("phase", "")), int(last.get("step", 0))
    total = total_steps(config, phase)
    seconds = step_seconds(records)
    names = ("tokens_per_second", "mfu")
    speed = {name: last[f"speed/{name}:mean"] for name in names if f"speed/{name}:mean" in last}
    export, checkpoints = reader.path / "export", [path.name for path in reader.checkpoints()]
    crashes, command = [str(path) for path in reader.crashes()], command_of(reader, phase)
    parts = [(config.get("algorithm") or {}).get(part) or {} for part in ("advantage", "loss")]
    trainer = "" if phase == "evaluate" else config.get("trainer", "rl")
    algorithm = trainer if trainer != "rl" else ", ".join(str(part["name"]) for part in parts if "name" in part)
    left = seconds * (total - step) if seconds and total and state == "running" else None
    out: dict[str, Any] = {"run": str(reader.path), "name": reader.name, "state": state, "phase": phase}
    out |= {"step": step, "total": total, "seconds_left": left, "experiment": config.get("experiment")}
    out |= {"model": (config.get("model") or {}).get("path"), "env": (config.get("env") or {}).get("name")}
    out |= {"algorithm": algorithm or None, "command": command, "starts": len(starts)}
    out |= {name: newest.get(name) for name in ("started", "host")}
    out["versions"] = {name: newest.get(name) for name in ("skyrl", "commit", "torch", "transformers", "python")}
    out |= {"results": summary(reader.path / "metrics.jsonl"), "speed": {**speed, "step_seconds": seconds}}
    out |= {"checkpoints": checkpoints, "rollouts": reader.dumps(), "crashes": crashes}
    out |= {"export": str(export) if (export / "config.json").is_file() else None, "advisories": reader.advisories()}
    return out | {"next": _next(reader, state, command, checkpoints, crashes)}


def step_seconds(records: Sequence[dict[str, Any]]) -> float | None:
    """Mean seconds of the last steps of the phase under way; None before the first."""
    last = [r for r in records[-RECENT:] if r["step"] > 0 and r["phase"] == records[-1]["phase"]]
    found = [float(r["time/step_seconds:sum"]) for r in last if "time/step_seconds:sum" in r]
    return statistics.fmean(found) if found else None


def command_of(reader: RunReader, phase: str = "") -> str:
    """The command of the last start, as a person would type it; "" where it is not known."""
    words = (reader.starts() or [{}])[-1].get("command") or []
    mode = phase if phase in ("sft", "evaluate") else "sft" if words and Path(str(words[0])).stem == "sft" else "train"
    typed = [str(word) for word in words[1:] if "=" in str(word) and str(word)[0] not in "-h"]
    return shlex.join(["skyrl-tx", mode, *typed]) if words else ""


def _next(reader: RunReader, state: str, command: str, checkpoints: list[str], crashes: list[str]) -> str:
    if state in ("running", "finished", "evaluated"):
        return f"skyrl-tx {'top' if state == 'running' else 'report'} {shlex.quote(str(reader.path))}"
    goes_on = f"goes on from checkpoint {checkpoints[-1]}" if checkpoints else "begins anew, no checkpoint was kept"
    look = f"; first see {crashes[-1]}/report.txt" if crashes else ""
    return f"{command or 'the same command'}   ({goes_on}{look})"


def rows_of(found: dict[str, Any]) -> list[tuple[str, str]]:
    """`facts` for a person: a name and a text for each thing that is known."""
    results, speed = found["results"], found["speed"]
    of = f" of {found['total']}" if found["total"] else ""
    left = f", {duration(found['seconds_left'])} left" if found["seconds_left"] else ""
    measured = {"held-out accuracy": "accuracy", "before": "accuracy_before", "reward": "reward"}
    scores = [f"{name} {results[key]:.4g}" for name, key in measured.items() if results[key] is not None]
    rates = [f"{speed['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in speed else []
    rates += [f"{speed['step_seconds']:.3g} s a step"] if speed["step_seconds"] else []
    rates += [f"MFU {speed['mfu']:.1%}"] if "mfu" in speed else []
    rates += [f"{results['sampled_tokens']:,} tokens sampled", f"{duration(results['seconds'])} of steps"]
    what = {name: found[name] for name in ("experiment", "model", "env", "algorithm")}
    rows = [
        ("run", found["run"]),
        ("state", f"{found['state']}, {found['phase'] or 'no'} step {found['step']}{of}{left}"),
        ("what", ", ".join(f"{name} {value}" for name, value in what.items() if value)),
        ("command", found["command"]),
        ("started", f"{found['started']} on {found['host']}, start {found['starts']}" if found["starts"] else ""),
        ("versions", ", ".join(f"{name} {value}" for name, value in found["versions"].items() if value)),
        ("results", ", ".join(scores)),
        ("speed", ", ".join(rates) if results["steps"] else ""),
        ("checkpoints", few(found["checkpoints"], 6)),
        ("rollouts", few(found["rollouts"][::-1], 6)),
        ("export", found["export"] or ""),
        ("crashes", few(found["crashes"])),
    ]
    rows += [("advisory", f"{one['name']}: {one['text']}; {one['remedy']}") for one in found["advisories"]]
    return [row for row in rows if row[1]]


def runs(args: Sequence[str]) -> None:
    """Runs the command line of `skyrl-tx runs`. Raises UserError."""
    p = Parser(prog="skyrl-tx runs", description="A table of the runs in a folder.")
    p.add_argument("folder", nargs="?", type=path_arg, default="runs", help="folder of run folders (runs)")
    p.add_argument("--json", action="store_true", help="for programs")
    given = p.parse_args(list(args))
    if not Path(given.folder).is_dir():
        raise UserError(f"runs: no folder {given.folder} here; give one, or start a run first")
    found = [_row(reader) for reader in find_runs(Path(given.folder))] if given.json else []
    print(json.dumps(found, indent=1) if given.json else printable(runs_table(Path(given.folder))))


def _row(reader: RunReader) -> dict[str, Any]:
    """What the table says of a run; "problem" for one whose metrics are damaged."""
    try:
        values, problem = final_values(reader.path / "metrics.jsonl"), ""
    except UserError as error:
        values, problem = {}, str(error)
    options = [f"{name}={value}" for name, value in reader.typed().items()]
    step = int(values["step"]) if "step" in values else None
    out: dict[str, Any] = {"name": reader.name, "step": step, "state": reader.state()}
    out |= {"accuracy": values.get(OBJECTIVE), "reward": values.get("reward:mean"), "options": options}
    return out | {"export": (reader.path / "export" / "config.json").is_file(), "problem": problem}


def runs_table(folder: Path) -> str:
    """Folder, state, last step, held-out accuracy, whether the final model is there, and the options that were typed;
    one run a line, newest last."""
    found = [_row(reader) for reader in find_runs(folder)]
    if not found:
        return f"no runs in {folder}"
    width = max(len("run"), *(len(run["name"]) for run in found))
    lines = [f"{'run':<{width}}  {'step':>6}  {'accuracy':>8}  export  {'state':<10}  options"]
    for run in found:
        step = "-" if run["step"] is None else run["step"]
        accuracy = "-" if run["accuracy"] is None else f"{run['accuracy']:.3f}"
        export = "yes" if run["export"] else "-"
        row = f"{run['name']:<{width}}  {step:>6}  {accuracy:>8}  {export:<6}  {run['state']:<10}"
        lines.append(f"{row}  {run['problem'] or ' '.join(run['options'])}".rstrip())
    return "\n".join(lines)


def rollouts(args: Sequence[str]) -> None:
    """Runs the command line. Raises UserError."""
    p = Parser(prog="skyrl-tx rollouts", description="Episodes of a run: prompt, what was drawn, what was expected.")
    p.add_argument("run", type=path_arg, help="a run folder, or the name of one in runs")
    p.add_argument("--step", type=int, help="step, as the console counts (default: the newest that was dumped)")
    p.add_argument("--eval", action="store_true", help="of the evaluation on held-out prompts")
    p.add_argument("-n", "--count", type=int, default=4, help="episodes to show (4)")
    p.add_argument("--list", action="store_true", help="only the names of what was dumped")
    p.add_argument("--json", action="store_true", help="the episodes, or the names, for programs")
    given = p.parse_args(list(args))
    if given.count < 1:
        raise UserError(f"rollouts: --count={given.count}: give 1 or more")
    reader = find_run(given.run, "rollouts")
    there = reader.dumps()
    kind = [name for name in there if name.startswith("eval-") == given.eval]
    wanted = f"{'eval-' if given.eval else ''}{given.step:06d}" if given.step is not None else (kind or [""])[-1]
    if not given.list and wanted not in there:
        names = ", ".join(there) or "none; tracking.rollouts_every says how often they are kept"
        raise UserError(f"rollouts: {reader.path} has no {wanted or 'rollouts of that kind'}; there are: {names}")
    if given.list:
        print(json.dumps(there) if given.json else "\n".join(there))
    elif given.json:
        print(json.dumps(list(itertools.islice(reader.rollouts(wanted), given.count)), indent=1))
    else:
        folder = reader.path / "rollouts"
        print(printable(f"{folder}: {wanted}\n{show_rollouts(folder, wanted, given.count)}"))
