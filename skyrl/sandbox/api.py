"""Sandboxes for callers: limits, results, levels, and the three ways to use one. Any number of threads may call."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import socket
import subprocess
import sys
import sysconfig
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from skyrl.sandbox.plain import to_text
from skyrl.sandbox.program import NAME as MAIN
from skyrl.sandbox.spawner import receive, send
from skyrl.types import UserError

Level = Literal["strict", "landlock", "rlimits"]
LEVELS: tuple[Level, ...] = ("strict", "landlock", "rlimits")
Status = Literal["ok", "error", "timeout", "memory", "output", "processes", "disk", "killed"]
START_SECONDS = 60.0
# A plain interpreter has no path to this package and must not run skyrl/__init__.py, which imports numpy.
_BOOT = """
import sys, types
sys.path[:] = {path!r}
for name, folder in (("skyrl", {root!r}), ("skyrl.sandbox", {root!r} + "/sandbox")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from skyrl.sandbox.spawner import main
main({handle}, {setup!r})
"""


class SandboxError(RuntimeError):
    """The sandbox itself failed, for want of memory or processes of the machine: nothing is known of the program."""


@dataclass(frozen=True)
class Limits:
    """What a program and all that it starts may use together.

    cpu_seconds, wall_seconds: then it is ended ("timeout"). memory_mb: memory of all processes, files in /tmp not
    counted; one process gets a MemoryError first. processes: processes and threads (only strict lets processes be
    started). disk_mb, files: what /tmp holds. output_bytes: of stdout, of stderr and of results, each.
    """

    cpu_seconds: float = 5.0
    wall_seconds: float = 10.0
    memory_mb: int = 512
    processes: int = 16
    disk_mb: int = 16
    files: int = 256
    output_bytes: int = 1 << 16

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            whole = isinstance(one.default, int)
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise UserError(f"limits.{one.name}={value!r}: wanted a {'whole ' if whole else ''}number above 0")
            if not (0 < value <= 1e12 and math.isfinite(value)):
                raise UserError(f"limits.{one.name}={value!r}: wanted a finite number above 0")


@dataclass(frozen=True)
class SandboxResult:
    """How a program ended, and what it wrote.

    status: "ok" (exit code 0), "error" (another one), "killed" (by a signal: exit_code is its negative number), or the
    limit that ended it: "timeout", "memory", "output", "processes", "disk" (exit_code is None then). stdout, stderr:
    up to limits.output_bytes each, undecodable bytes replaced. events: what calls have told, never to be trusted.
    """

    status: Status
    exit_code: int | None
    stdout: str
    stderr: str
    cpu_seconds: float
    wall_seconds: float
    peak_memory: int  # bytes, as seen every 10 ms
    level: Level
    events: list[list[str]] = field(default_factory=list)


class Sandbox:
    """Runs programs at a level of protection. `level`: None = the best that this machine allows, never "rlimits".
    `python`: the interpreter of the programs, 3.10 or newer.

    It is a small process that is started at the first use and forks for each run, so one is shared by all threads of a
    process (`default_sandbox`). `close` ends it; so does the end of this process. Raises UserError where the machine
    does not allow the level, with the reason.
    """

    def __init__(self, level: Level | None = None, *, python: str = sys.executable) -> None:
        if level is not None and level not in LEVELS:
            raise UserError(f"level={level!r}: choose one of: {', '.join(LEVELS)}")
        if sys.platform != "linux":
            raise UserError(f"skyrl.sandbox needs Linux, this is {sys.platform}; run it in a container or on a node")
        self._wanted, self._python = level, python
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._level: Level | None = None

    @property
    def level(self) -> Level:
        """The level that runs; finds out which, by trying them, at the first call."""
        self._spawner()
        assert self._level is not None
        return self._level

    def close(self) -> None:
        """Ends the process behind; what runs is ended too once its caller is gone."""
        with self._lock:
            if self._socket is not None and self._process is not None:
                self._socket.close()
                self._process.wait()
            self._process = self._socket = None

    def run(
        self,
        source: str,
        *,
        stdin: str | bytes | int = b"",
        files: Mapping[str, str | bytes] | None = None,
        arguments: Sequence[str] = (),
        limits: Limits | None = None,
    ) -> SandboxResult:
        """Runs a program to its end, in /tmp, where `files` (relative path -> content) are. stdin: what it reads, or a
        pipe's descriptor that it reads from. Raises SandboxError."""
        request = {"kind": "program", "arguments": list(arguments), **_program(source, files or {}, limits)}
        if isinstance(stdin, int):
            return self._finish(self._start(request, (stdin,)))
        return self._finish(self._start({**request, "stdin": _latin(stdin)}))

    def call(
        self,
        source: str,
        entry_point: str,
        calls: Sequence[tuple[Sequence[Any], Mapping[str, Any]]],
        *,
        limits: Limits | None = None,
    ) -> tuple[SandboxResult, list[str | None]]:
        """Calls a function that `source` defines with each of (positional, named) arguments, plain data.

        Returns how the program ended, with events ["parses"], ["defines"] as far as it came, and for each call the
        text of its result (plain.to_text; compare with the text of what is expected), None where there is none: the
        call raised, returned what is no plain data, or was never answered. Raises SandboxError.
        """
        lines = "".join(to_text([list(positional), dict(named)], True) + "\n" for positional, named in calls)
        request = {
            "kind": "calls",
            "entry_point": entry_point,
            "lines": lines,
            "keep_order": False,
            **_program(source, {}, limits),
        }
        result = self._finish(self._start(request))
        replies = [event for event in result.events if event and event[0] in ("returned", "raised")][: len(calls)]
        texts = [reply[1] if reply[0] == "returned" and len(reply) == 2 else None for reply in replies]
        return result, [*texts, *[None] * (len(calls) - len(texts))]

    def test(
        self, source: str, entry_point: str, tests: str, *, context: str = "", limits: Limits | None = None
    ) -> tuple[SandboxResult, SandboxResult]:
        """Runs trusted tests against a function of an untrusted program: asserts on `entry_point`, or a function
        check(candidate) that holds them. Each is in a sandbox of its own; arguments and results pass as plain data.

        `context` is run before the tests, for what they use. == and != in the tests also compare types of numbers.
        Returns how the program and how the tests ended; they have passed if the latter's status is "ok" and its events
        hold ["passed"]. Raises SandboxError.
        """
        to_program, to_tests = os.pipe(), os.pipe()
        request = {"kind": "calls", "entry_point": entry_point, "keep_order": True, **_program(source, {}, limits)}
        judge = {"kind": "tests", "entry_point": entry_point, "context": context, **_program(tests, {}, limits)}
        try:
            program = self._start(request, (to_program[0], to_tests[1]))
            judging = self._start(judge, (to_tests[0], to_program[1]))
        finally:
            for handle in (*to_program, *to_tests):
                os.close(handle)
        judged = self._finish(judging)
        return self._finish(program), judged

    def _start(self, request: dict[str, Any], lines: tuple[int, ...] = ()) -> socket.socket:
        here, there = socket.socketpair()
        with there:
            for attempt in (1, 2):  # a spawner that was killed is started again
                try:
                    socket.send_fds(self._spawner(), [b"r"], [there.fileno(), *lines])
                    break
                except OSError as error:
                    if attempt == 2:
                        raise SandboxError(f"the sandbox cannot be reached: {error}") from error
        with contextlib.suppress(OSError):  # told by _finish
            send(
                here,
                json.dumps({"stdin": "", "arguments": [], "lines": "", **request}).encode(),
            )
        return here

    def _finish(self, connection: socket.socket) -> SandboxResult:
        with connection:
            try:
                message = receive(connection)
            except OSError:
                message = b""
        if not message:
            raise SandboxError("the process that watched the sandbox ended: is the machine out of memory or processes?")
        answer = json.loads(message)
        if answer["failure"]:
            raise SandboxError(f"the sandbox could not be set up: {answer['failure']}")
        stdout, stderr, results = (answer[name].encode("latin-1") for name in ("stdout", "stderr", "results"))
        reason, code = answer["reason"], answer["code"]
        if code is None and not reason:
            raise SandboxError("the first process of the sandbox was killed: is the machine out of memory?")
        out_of_memory = stderr.rstrip().rpartition(b"\n")[2].startswith(b"MemoryError")
        status: Status = reason or (
            "ok" if code == 0 else "killed" if code < 0 else "memory" if out_of_memory else "error"
        )
        code = None if reason else code
        return SandboxResult(
            status, code, stdout.decode(errors="replace"), stderr.decode(errors="replace"), answer["cpu_seconds"],
            answer["wall_seconds"], answer["peak_memory"], self.level, _events(results),
        )  # fmt: skip

    def _spawner(self) -> socket.socket:
        with self._lock:
            if self._socket is None or self._process is None or self._process.poll() is not None:
                reasons = []
                for level in [self._wanted] if self._wanted else LEVELS[:2]:
                    reason = self._try(level)
                    if not reason:
                        break
                    reasons.append(f"{level}: {reason}")
                else:
                    raise UserError(
                        f"this machine allows no sandbox ({'; '.join(reasons)}); level 'rlimits' runs code without any "
                        "protection of files, if you trust it so far"
                    )
            assert self._socket is not None
            return self._socket

    def _try(self, level: Level) -> str:
        """Starts a spawner of a level, and an empty program in it. Returns "", or why the level does not work here."""
        if level == "rlimits":
            warnings.warn(
                "skyrl.sandbox: level 'rlimits' does NOT protect your files: the code can read and change whatever you "
                "can; only time, memory, processes and system calls have limits",
                stacklevel=2,
            )
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        folders, library, path = _layout(self._python)
        setup = {"level": level, "folders": folders, "path": path}
        root = str(Path(__file__).resolve().parents[1])
        boot = _BOOT.format(path=library, root=root, handle=there.fileno(), setup=setup)
        with there:
            # No environment of ours but what a Python of a cluster's modules needs to start, which programs do not get.
            # A fixed hash seed: the order of a set must not decide about a reward.
            kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
            command = [self._python, "-S", "-s", "-B", "-X", "utf8", "-c", boot]
            self._process = subprocess.Popen(
                command, env={"PYTHONHASHSEED": "0", **kept}, cwd="/",
                pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        here.settimeout(START_SECONDS)
        reason = here.recv(1000).decode() or "its process ended at once"
        here.settimeout(None)
        self._socket, self._level = here, level
        if reason == "ready":
            try:
                self.run("")
                return ""
            except SandboxError as error:
                reason = str(error)
        self.close()
        return reason


@functools.cache
def default_sandbox(level: Level | None = None) -> Sandbox:
    """The one sandbox of a level that all callers in this process share."""
    return Sandbox(level)


def run_code(
    source: str,
    *,
    stdin: str | bytes | int = b"",
    files: Mapping[str, str | bytes] | None = None,
    arguments: Sequence[str] = (),
    limits: Limits | None = None,
    level: Level | None = None,
) -> SandboxResult:
    """Runs a Python program in the shared sandbox of a level: see Sandbox and Sandbox.run."""
    return default_sandbox(level).run(source, stdin=stdin, files=files, arguments=arguments, limits=limits)


def _program(source: str, files: Mapping[str, str | bytes], limits: Limits | None) -> dict[str, Any]:
    for name in files:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\0" in name:
            raise UserError(f"files: {name!r}: wanted a relative path below the program's folder")
    text = source.encode("utf-8", "surrogatepass").decode("latin-1")
    inputs = {MAIN: text, **{name: _latin(content) for name, content in files.items()}}
    limits = limits or Limits()
    if (size := sum(map(len, inputs.values()))) > limits.disk_mb << 20 or len(inputs) > limits.files:
        raise UserError(
            f"files: {len(inputs)} with {size} bytes, the program's own included, are more than limits.files="
            f"{limits.files} and limits.disk_mb={limits.disk_mb} allow; raise these"
        )
    return {"source": source, "inputs": inputs, "limits": asdict(limits)}


def _latin(content: str | bytes) -> str:
    return (content.encode() if isinstance(content, str) else bytes(content)).decode("latin-1")


def _events(results: bytes) -> list[list[str]]:
    """Lines that are JSON lists of strings. All else is left out: the program may have written it."""
    events = []
    for line in results.decode(errors="replace").splitlines():
        try:
            words = json.loads(line, parse_int=str)  # Python 3.10 takes quadratic time for long numbers
        except (ValueError, RecursionError):
            continue
        if type(words) is list and words and all(type(word) is str for word in words):
            events.append(words)
    return events


def _layout(python: str) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """Of an interpreter: its folders outside of /usr, as (what it is, its name); where its standard library is; where
    programs import from, which is that and what is installed for it. Raises UserError."""
    asked = "sys.prefix, sys.base_prefix, s.get_path('stdlib'), sys.path"
    facts: list[Any] = [sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), sys.path]
    if python != sys.executable:
        code = f"import json, sys, sysconfig as s; print(json.dumps([{asked}]))"
        try:
            facts = json.loads(subprocess.run([python, "-I", "-c", code], capture_output=True, check=True).stdout)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            raise UserError(f"python={python!r}: is no Python that runs ({error})") from error
    *prefixes, stdlib, path = facts
    named = sorted({f"{prefix}/{name}" for prefix in prefixes for name in ("bin", "lib", "lib64")})
    folders = [(os.path.realpath(name), name) for name in named if os.path.isdir(name)]
    folders = [pair for pair in folders if not f"{pair[0]}/".startswith("/usr/")]
    visible = ("/usr/", *(f"{name}/" for _, name in folders))
    library = [stdlib, f"{stdlib}/lib-dynload"]
    return folders, library, [*library, *(one for one in path if one.endswith("-packages") and one.startswith(visible))]
