"""The folder of one run: who may write to it, what made it, and its metrics cut back to a checkpoint.

One live run per folder, held by a lock that ends with the process. Everything here runs on rank 0; it raises there, and
the caller tells the other ranks.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

import skyrl
from skyrl.args import hide_in_command
from skyrl.files import disk_reason, open_plain, write_atomic
from skyrl.types import PassingError, UserError

# "000010-r0.jsonl", "eval-000010-r1.jsonl", "eval-gsm8k-000010-r1.jsonl" of a set: what was played, step, rank; and
# beside it, as "000010-r0.jsonl.trained", advantages and the trainer's log-probs
ROLLOUT_NAME = re.compile(
    r"(?:(?P<kind>[a-z]+(?:-[A-Za-z][\w.]*)?)-)?(?P<step>\d+)-r(?P<rank>\d+)\.jsonl(?:\.trained)?"
)
RESULT = "result.json"
REQUEUE_FILE = "requeue"  # the same command should be started again
ADVISORIES = "advisories.jsonl"
SYSTEM_NAME = re.compile(r"rank-(\d+)\.jsonl")  # in the folder "system"
STOPS = "stops.jsonl"
RECORDINGS = "episodes"  # <step with six digits>.gif: episodes as they looked
PROFILE_REQUEST = "profile"  # asks a rank of the live run to profile some steps (tracking/profiler.py)
FINGERPRINT = "fingerprint.json"  # name -> digest of all that the last start read and computed with
INTERRUPTED = 130  # what a run ends with that a person has stopped, as the shell does after Ctrl-C
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class RunFolder:
    """Paths of a run and, on rank 0, its lock. On other ranks `open` and `close` do nothing.

    Files: config.yaml, versions.json, metrics.jsonl, lock; folders: checkpoints, rollouts, export, wandb, tensorboard.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self.rank = Path(path), rank
        self.checkpoints = self.path / "checkpoints"
        self.rollouts = self.path / "rollouts"
        self.export = self.path / "export"
        self.metrics = self.path / "metrics.jsonl"
        self._lock: int | None = None
        if rank == 0:
            # A forked child that outlives this process would go on holding the lock.
            os.register_at_fork(after_in_child=self.close)

    def open(
        self,
        config: dict[str, Any],
        *,
        command: list[str] | None = None,
        hosts: dict[str, dict[str, Any]] | None = None,
        check: Callable[[], list[str]] = list,
    ) -> list[str]:
        """Creates the folder, takes its lock, writes config.yaml and versions.json; returns lines worth showing.

        `check` is called with the lock and before anything is written, so that a start which it refuses leaves no
        trace; its lines are among those returned.
        A config.yaml of an earlier start that differs is kept as config.<n>.yaml, and every value that changed is among
        the lines. Values must be plain YAML. `command`: what to note as the start, by default this process's own.
        `hosts`: the versions of each host of the job.
        Raises: UserError when another live run holds the folder or it cannot be written.
        """
        if self.rank != 0:
            return []
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lines = [*self._take_lock(), *check()]
            lines += self._keep_config(config)
            self._keep_versions(command if command is not None else sys.argv, hosts)
        except OSError as problem:
            self.close()
            raise UserError(
                f"run.dir={self.path}: cannot be used ({disk_reason(problem, self.path)}); make it writable, "
                "free some space, or give another run.dir"
            ) from None
        except UserError:
            self.close()
            raise
        return lines

    def close(self) -> None:
        """Gives the lock back. The end of the process does it too."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> list[str]:
        path = self.path / "lock"
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            holder = _holder(path)
            os.close(handle)
            if problem.errno in _UNSUPPORTED:
                return [f"run.dir={self.path}: this file system has no locks; start no second run on this folder"]
            if problem.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise PassingError(
                f"run.dir={self.path}: in use by another run ({holder}); wait for it, end it, or give another run.dir "
                "or run.name"
            ) from None
        self._lock = handle
        text = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(text).encode(), 0)
        return []

    def _keep_config(self, config: dict[str, Any]) -> list[str]:
        path = self.path / "config.yaml"
        lines: list[str] = []
        if path.exists():
            try:
                before = yaml.safe_load(path.read_text())
            except yaml.YAMLError:
                before = None
            changes = ["the config.yaml there cannot be read"]
            if isinstance(before, dict):
                changes = config_changes(before, config)
            if not changes:
                return []
            number = 1
            while (kept := self.path / f"config.{number}.yaml").exists():
                number += 1
            path.rename(kept)
            lines = [f"options differ from the last start in {self.path} (kept in {kept.name}): {'; '.join(changes)}"]
        write_atomic(path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120))
        return lines

    def _keep_versions(self, command: list[str], hosts: dict[str, dict[str, Any]] | None) -> None:
        starts = read_json(self.path, "versions.json") or []  # a record for people; the run does not depend on it
        start = {**collect_versions(), "command": hide_in_command(command), **({"hosts": hosts} if hosts else {})}
        write_atomic(self.path / "versions.json", json.dumps([*starts, start], indent=1) + "\n")


def is_locked(folder: Path) -> bool:
    """Whether a live run holds the folder's lock, as far as this machine can tell."""
    try:
        with open_plain(folder / "lock", folder) as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back with the file
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def config_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One "path: old -> new" for each value that differs, in the order of `now`."""
    from skyrl.config.load import flat  # it imports Hydra, which no reader of runs waits for

    old, new = flat(before), flat(now)
    pairs = [(key, old.get(key, "(absent)"), new.get(key, "(absent)")) for key in dict.fromkeys([*new, *old])]
    return [f"{key}: {was} -> {value}" for key, was, value in pairs if was != value]


def changed_facts(folder: Path, facts: dict[str, str]) -> tuple[list[str], list[str]]:
    """What a run's folder remembers otherwise than `facts` says: names of what the user gave (code, data, model, files
    of the environment), and of what computes (versions, skyrl itself). Modules that one start alone had loaded count as
    equal: they are loaded when they are first needed. Nothing for a folder without a fingerprint."""
    if not isinstance(before := read_json(folder, FINGERPRINT), dict):
        return [], []
    found = [
        name
        for name in sorted(before.keys() | facts.keys())
        if before.get(name) != facts.get(name) and (name in before and name in facts or not name.startswith("code."))
    ]
    ours = [name for name in found if name.startswith(("versions.", "code.skyrl/"))]
    return [name for name in found if name not in ours], ours


def read_result(folder: Path) -> dict[str, Any] | None:
    """What a run has left in its result.json; None without, or for a file that cannot be read."""
    told = read_json(folder, RESULT)
    return told if isinstance(told, dict) else None


def read_json(folder: Path, file: str) -> Any:
    """What a JSON file of a run holds; None without it, or for one that cannot be read."""
    try:
        with open_plain(folder / file, folder) as stream:
            return json.load(stream)
    except (OSError, ValueError, RecursionError):
        return None


def keep_fingerprint(folder: Path, facts: dict[str, str]) -> None:
    """Writes what `changed_facts` reads. Raises OSError."""
    write_atomic(folder / FINGERPRINT, json.dumps(facts, indent=1) + "\n")


def collect_versions() -> dict[str, Any]:
    """Versions of what computes, the machine, and the commit when skyrl runs from a git checkout."""
    found: dict[str, Any] = {"started": time.strftime("%Y-%m-%d %H:%M:%S %z"), "skyrl": skyrl.__version__}
    for name in ("torch", "transformers", "numpy", "accelerate", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found |= {"python": platform.python_version(), "platform": platform.platform(), "host": socket.gethostname()}
    root = Path(skyrl.__file__).resolve().parent.parent
    if (root / ".git").exists():
        found["commit"] = _git(root, "rev-parse", "HEAD")
        found["uncommitted_changes"] = bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    return found


def cut_metrics(path: Path, num_bytes: int) -> list[str]:
    """Cuts metrics.jsonl back to its first `num_bytes`, the length a checkpoint recorded; returns lines worth showing.

    What lies behind was written after that checkpoint and is computed again. The file is replaced as a whole, so a
    kill leaves the old or the new one. A file shorter than that has lost lines elsewhere: it stays, and a line says so.
    """
    there = path.stat().st_size if path.exists() else 0
    if there < num_bytes:
        return [f"{path}: {there} bytes, the checkpoint knew {num_bytes}; some earlier steps are missing in it"]
    if there == num_bytes:
        return []
    kept = path.read_bytes()[:num_bytes]
    if kept and not kept.endswith(b"\n"):
        raise UserError(
            f"{path}: byte {num_bytes}, where the checkpoint ends, is not the end of a line: the file was changed; "
            "move it away and start again"
        )
    write_atomic(path, kept)
    return []


def mark_stop(folder: Path, reason: str, exit_code: int) -> None:
    """Leaves in the run folder how a stopped run has ended. After a person's stop (130): result.json, by which viewers
    and `skyrl-tx wait` know that nobody starts it again. After any other: the file `requeue`, since this command should
    be started again; it says by whom the run was started, so that a restart by the same torchrun does not go on."""
    if exit_code == INTERRUPTED:
        told = {"state": "stopped", "stopped_by": reason, "exit_code": exit_code}
        write_atomic(folder / RESULT, json.dumps(told, indent=1) + "\n")
        return
    text = {"host": socket.gethostname(), "launcher": os.getppid(), "at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    (folder / REQUEUE_FILE).write_text(json.dumps(text) + "\n")


def system_path(folder: Path, rank: int) -> Path:
    """Where tracking/system.py keeps what it has seen of a rank."""
    return Path(folder) / "system" / f"rank-{rank}.jsonl"


def keep_steps(path: Path, last_step: int) -> None:
    """Drops the lines of steps after `last_step` from a file of JSON lines with a "step" each, and what is no such
    line. Nothing for an absent file. Raises OSError."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= last_step]
    if len(kept) < len(lines):
        write_atomic(path, b"".join(kept))


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def drop_rollouts(folder: Path, step: int) -> None:
    """Deletes dumped episodes of steps after `step`: after a change of world size, old parts would stay among new."""
    for path in Path(folder).glob("*.jsonl*"):
        if (name := ROLLOUT_NAME.fullmatch(path.name)) and int(name["step"]) > step:
            path.unlink()


def _holder(path: Path) -> str:
    try:
        text = json.loads(path.read_text())
        return f"process {text['pid']} on {text['host']}, since {text['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has not written its name yet"


def _git(root: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
