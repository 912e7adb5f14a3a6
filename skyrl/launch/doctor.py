"""`skyrl-tx doctor`: what is wrong with this machine, in under a minute, before a job waits in a queue for it.

Each check is a function that gives findings: ok, warn or fail, what was seen, what to do. Nothing is changed, and the
only files written are below the folder that is looked at, and removed again.
"""

from __future__ import annotations

import argparse
import json
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from skyrl.types import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"doctor: {message}; skyrl-tx doctor --help lists the flags")


@dataclass(frozen=True)
class Finding:
    """One line: `status` is ok, warn (works, slower or riskier) or fail (a run would not work)."""

    check: str
    status: str
    seen: str
    todo: str = ""


def ok(check: str, seen: str) -> Finding:
    """A finding that needs nothing."""
    return Finding(check, "ok", seen)


def warn(check: str, seen: str, todo: str) -> Finding:
    """A finding with which runs work, slower or at a risk."""
    return Finding(check, "warn", seen, todo)


def fail(check: str, seen: str, todo: str) -> Finding:
    """A finding with which a run would not work."""
    return Finding(check, "fail", seen, todo)


def doctor(args: Sequence[str]) -> int:
    """Runs the command line; 0, or 1 when a check failed."""
    from skyrl.launch import doctor_cluster, doctor_local

    p = _Parser(prog="skyrl-tx doctor", allow_abbrev=False, description="Checks this machine; 1 when a check fails.")
    p.add_argument("folder", nargs="?", default="runs", type=Path, help="folder for runs, to see how fast it is (runs)")
    p.add_argument("--json", action="store_true", help="for programs")
    flags = p.parse_args(list(args))
    begun = time.monotonic()
    checks: list[Callable[[], list[Finding]]] = [
        doctor_local.versions,
        doctor_local.gpus,
        doctor_local.cpus,
        doctor_local.memory,
        doctor_local.limits,
        lambda: doctor_local.disk(flags.folder),
        doctor_local.caches,
        doctor_cluster.network,
        doctor_cluster.collective,
        doctor_cluster.slurm,
        lambda: doctor_cluster.clocks(flags.folder),
    ]
    with ThreadPoolExecutor(4) as pool:
        findings = [finding for found in pool.map(lambda check: check(), checks) for finding in found]
    seconds = time.monotonic() - begun
    failed = sum(finding.status == "fail" for finding in findings)
    if flags.json:
        report = {"host": socket.gethostname(), "ok": not failed, "seconds": round(seconds, 2)}
        print(json.dumps({**report, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        print(text(findings))
        warned = sum(finding.status == "warn" for finding in findings)
        print(f"{len(findings)} findings, {warned} warnings, {failed} failures, {seconds:.1f} s")
    return 1 if failed else 0


def text(findings: Sequence[Finding]) -> str:
    """The findings for a person, what to do below what was seen."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<4}  {finding.check:<{width}}  {finding.seen}")
        if finding.todo:
            lines.append(f"{'':<{width + 6}}  -> {finding.todo}")
    return "\n".join(lines)
