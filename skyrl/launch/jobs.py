"""What a pipeline or a scheduler does with a run that somebody else started: `skyrl-tx wait`, `stop` and `gate`.

All three know the run by its folder alone, so they work from any machine that sees it, a login node without torch too.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
import time
from pathlib import Path

from skyrl.args import Parser, path_arg
from skyrl.config.eval_sets import RELATIONS, read_condition
from skyrl.distributed.stop import STOP_FILE, STOP_FOR_GOOD, TEMPORARY
from skyrl.files import explain_write, write_atomic
from skyrl.run_dir import RunReader, find_run, is_run
from skyrl.tracking.jsonl import plain
from skyrl.types import UserError

HOLDS, FAILS, LATE = 0, 1, 124  # of `wait`; 124 is what timeout(1) ends with
POLL_SECONDS = 1.0
LOST_SECONDS = 30.0  # a run without a lock and without a result may be between two starts
ENDED = ("finished", "evaluated")


def wait(args: list[str]) -> int:
    """Waits until a run has ended. Returns 0 when it has finished, 130 when a person has stopped it, 1 when it ended
    otherwise, 75 when it has saved and asks to be started again (with --stopped; else that is waited for too), 124
    after --timeout."""
    p = Parser(prog="skyrl-tx wait", description="Waits until a run has ended; the exit code says how.")
    p.add_argument(
        "run", type=path_arg, help="a run folder, also one that is still to come, or the name of one in runs"
    )
    p.add_argument("--timeout", type=seconds, default=math.inf, help="seconds, after which the exit code is 124 (none)")
    p.add_argument("--stopped", action="store_true", help="a run that was stopped and saved has ended (exit code 75)")
    given = p.parse_args(args)
    path = given.run if given.run.is_dir() or given.run.parent != Path(".") else Path("runs") / given.run
    end, lost, told = time.monotonic() + given.timeout, None, ""
    while True:
        run = RunReader(path)
        state = run.state() if is_run(path) else "not started"
        if state != told:
            print(f"{path}: {state}{_progress(run)}", flush=True)
            told = state
        lost = (lost or time.monotonic()) if state == "unfinished" else None
        if state in ENDED:
            return HOLDS
        if state == "stopped" and (result := run.result()):  # by a person or an advisory: nobody starts it again
            return code if isinstance(code := result.get("exit_code"), int) else FAILS
        if state == "stopped" and given.stopped:
            return TEMPORARY
        if lost is not None and time.monotonic() - lost > LOST_SECONDS:
            print(f"wait: {path} has ended without a result; its log and crash-* say why", file=sys.stderr, flush=True)
            return FAILS
        if (left := end - time.monotonic()) <= 0:
            print(f"wait: {path} is {state} after {given.timeout:g} s (--timeout)", file=sys.stderr, flush=True)
            return LATE
        time.sleep(min(POLL_SECONDS, left))


def stop(args: list[str]) -> int:
    """Asks a live run to save and leave; with --wait until it has. Returns 0, or 124 after --timeout."""
    p = Parser(prog="skyrl-tx stop", description="Asks a run to save and to leave; the same command goes on later.")
    p.add_argument("run", type=path_arg, help="a run folder, or the name of one in runs")
    p.add_argument("--requeue", action="store_true", help="with exit code 75: a Slurm job queues itself again")
    p.add_argument("--wait", action="store_true", help="until it has left")
    p.add_argument("--timeout", type=seconds, default=600.0, help="seconds that --wait waits (600)")
    given = p.parse_args(args)
    run = find_run(given.run, "stop")
    if run.state() != "running":
        raise UserError(f"stop: {run.path} is {run.state()}: no process that can be seen from here holds it")
    with explain_write(run.path / STOP_FILE, "only who may write into the run's folder can ask", "stop"):
        write_atomic(run.path / STOP_FILE, "" if given.requeue else STOP_FOR_GOOD)
    print(f"{run.path}: asked to save and leave", flush=True)
    end = time.monotonic() + given.timeout
    while given.wait and run.state() == "running":
        if time.monotonic() > end:
            print(f"stop: {run.path} still runs after {given.timeout:g} s (--timeout)", file=sys.stderr, flush=True)
            return LATE
        time.sleep(POLL_SECONDS / 2)
    if given.wait:
        print(f"{run.path}: {run.state()}{_progress(run)}", flush=True)
    return 0


def gate(args: list[str]) -> int:
    """Whether a finished run's last numbers meet all conditions: 0 or 1. Raises UserError (2) for a condition that
    cannot be judged."""
    p = Parser(prog="skyrl-tx gate", description="Exit code 0 when a finished run meets all conditions, 1 when not.")
    p.add_argument("run", type=path_arg, help="a run folder, or the name of one in runs")
    p.add_argument("condition", nargs="+", help='such as "eval/accuracy>=0.9"; <, <=, >, >=')
    p.add_argument("--unfinished", action="store_true", help="judge a run that has not finished by its last numbers")
    p.add_argument("--json", action="store_true", help="for programs")
    given = p.parse_args(args)
    run = find_run(given.run, "gate")
    state = run.state()
    if state not in ENDED and not given.unfinished:
        raise UserError(f"gate: {run.path} is {state}; skyrl-tx wait waits for it, --unfinished judges it as it is")
    values: dict[str, float] = {}
    for record in run.metrics()[0]:
        values |= {key: value for key, value in record.items() if isinstance(value, int | float)}
    judged = []
    for text in given.condition:
        key, relation, bound = _condition(text, values, run.path)
        holds = RELATIONS[relation](values[key], bound)  # of NaN nothing holds
        judged.append({"metric": key, "value": values[key], "condition": f"{relation}{bound:g}", "holds": holds})
    passed = all(one["holds"] for one in judged)
    if given.json:
        told = {"run": str(run.path), "state": state, "passed": passed, "conditions": judged}
        print(json.dumps(plain(told), indent=1, allow_nan=False))
        return HOLDS if passed else FAILS
    for one in judged:
        print(f"{'holds' if one['holds'] else 'FAILS'}  {one['metric']} = {one['value']:g}, wanted {one['condition']}")
    return HOLDS if passed else FAILS


def seconds(text: str) -> float:
    """The type of a flag that is a time; of argparse, whose words it raises otherwise."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"give seconds above 0, not {text!r}")
    return float(text)


def _condition(text: str, values: dict[str, float], where: Path) -> tuple[str, str, float]:
    """(metric, relation, bound) of a condition; a metric may be named without its reduction. Raises UserError."""
    if (parts := read_condition(text)) is None:
        raise UserError(f'gate: {text!r}: give a metric, <, <=, > or >=, and a number: "eval/accuracy>=0.9"')
    name, relation, bound = parts
    found = [name] if name in values else [key for key in values if key.rpartition(":")[0] == name]
    if len(found) == 1:
        return found[0], relation, bound
    if found:
        raise UserError(f"gate: {name}: {where} has several; choose one of: {', '.join(sorted(found))}")
    close = difflib.get_close_matches(name, values, 3, 0.5)
    hint = (
        f"did you mean {' or '.join(close)}?" if close else f"it has {len(values)} metrics; docs/metrics.md lists them"
    )
    raise UserError(f"gate: {name}: {where} has never logged it; {hint}")


def _progress(run: RunReader) -> str:
    """Behind a state: ", step 12" of a run that has done one."""
    records = run.metrics()[0]
    return f", step {records[-1]['step']}" if records else ""
