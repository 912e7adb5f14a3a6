"""A process of its own, without torch or secrets, that starts sandboxes by forking. One request is one connection.

    client --connection--> spawner --fork--> monitor --fork--> first process --fork--> program
                           (inside of the   (watches, kills,  (mounts, limits,        (program.py)
                            empty root)      reads output)     drops privileges)

The spawner never reads a request, so a program, which is a fork of a fork, finds nobody else's there. It left the
machine's files at its start, and has loaded what programs import most. Started by api.py, from a plain interpreter.
"""

from __future__ import annotations

import array
import contextlib
import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import tempfile
import time
from typing import Any, NoReturn

from skyrl.sandbox import kernel, program, seccomp

TICK_SECONDS = 0.01
PRELOADED = (
    "abc ast bisect collections copy dataclasses datetime decimal enum fractions functools heapq inspect "
    "itertools json math operator queue random re statistics string textwrap threading traceback typing"
).split()
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def main(requests: int, setup: dict[str, Any]) -> None:
    """Serves connections that arrive as descriptors over the socket `requests`, until nobody has its other end.

    setup: {"level", "folders": read-only ones beside /usr, "path": where programs import from}.
    It says "ready", or the reason why the level does not work. A message is one byte with one to three descriptors:
    the connection; lines that come in (of a program its input); lines that go out.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name in PRELOADED:
        __import__(name)
    gc.disable()
    gc.freeze()  # what is loaded is never looked at again, so forks share its memory
    inbox = socket.socket(fileno=requests)
    try:
        if setup["level"] == "strict":
            kernel.enter_own_root(setup["folders"])
            open(f"/proc/self/task/{os.getpid()}/children").close()  # how the tree is found
        inbox.send(b"ready")
    except OSError as error:
        inbox.send(str(error).encode()[:500])
        return
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # monitors are nobody's to wait for
    while True:
        data, control, *_ = inbox.recvmsg(1, socket.CMSG_SPACE(12))
        if not data:
            return
        handles = array.array("i")
        for *_, content in control:
            handles.frombytes(content)
        if os.fork() == 0:
            inbox.close()
            _monitor(socket.socket(fileno=handles[0]), list(handles[1:]), setup)
            os._exit(0)
        for handle in handles:
            os.close(handle)


def receive(connection: socket.socket) -> bytes:
    """One message: eight bytes of length, and so many more. b"" when the other end is gone."""
    with connection.makefile("rb") as stream:
        head = stream.read(8)
        return stream.read(struct.unpack("Q", head)[0]) if len(head) == 8 else b""


def send(connection: socket.socket, message: bytes) -> None:
    connection.sendall(struct.pack("Q", len(message)) + message)


def _monitor(connection: socket.socket, lines: list[int], setup: dict[str, Any]) -> None:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request = json.loads(receive(connection) or "null")
    if request is None:
        return
    strict = setup["level"] == "strict"
    scratch = "/tmp" if strict else tempfile.mkdtemp(prefix="skyrl-sandbox-")
    uid = kernel.FIRST_UID + os.getpid() % (1 << 24)
    if not strict and os.geteuid() == 0:
        os.chown(scratch, uid, uid)
    pipes = {name: os.pipe() for name in ("stdout", "stderr", "results", "status")}
    if strict:
        kernel.new_process_ids()
    began = time.monotonic()
    first = os.fork()
    if first == 0:
        connection.close()
        _first_process(request, {name: ends[1] for name, ends in pipes.items()}, lines, setup, scratch, uid)
    for handle in [ends[1] for ends in pipes.values()] + lines:
        os.close(handle)
    watch = _Watch(request["limits"], first, began, None if strict else scratch)
    output = _read_all({ends[0]: name for name, ends in pipes.items()}, connection, watch, request["limits"])
    watch.kill()
    usage = os.wait4(first, 0)[2]
    if not strict:
        _remove(scratch)
    told, _, failure = output.pop("status").partition(b"!")
    answer = {
        "reason": watch.reason, "code": int(told) if told else None, "failure": failure.decode(errors="replace"),
        "cpu_seconds": max(usage.ru_utime + usage.ru_stime, watch.cpu_seconds),
        "wall_seconds": time.monotonic() - began, "peak_memory": watch.peak,
    }  # fmt: skip
    for name, data in output.items():
        answer[name] = data.decode("latin-1")
    with contextlib.suppress(OSError):  # the client may be gone
        send(connection, json.dumps(answer).encode())


def _read_all(
    names: dict[int, str], connection: socket.socket, watch: _Watch, limits: dict[str, Any]
) -> dict[str, bytearray]:
    """What comes out of each pipe, up to the limit, until the first process has said how it ended and all is read."""
    found = {name: bytearray() for name in names.values()}
    poll = select.poll()
    for handle in (*names, connection.fileno()):
        poll.register(handle, select.POLLIN)
    open_ones = dict(names)
    while open_ones:
        for handle, _ in poll.poll(TICK_SECONDS * 1000):
            if handle not in open_ones:
                watch.end("gone")  # the client does not wait any longer
                poll.unregister(handle)
                continue
            name = open_ones[handle]
            data = os.read(handle, 1 << 16)
            if not data:
                poll.unregister(handle)
                del open_ones[handle]
                if name == "status":
                    watch.kill()  # what the program left running
            room = limits["output_bytes"] - len(found[name])
            found[name] += data[: max(room, 0)]
            if len(data) > room:
                watch.end("output")
        watch.look()
    return found


class _Watch:
    """Limits over all processes of one sandbox together. `reason` is the limit that was reached first, or ""."""

    def __init__(self, limits: dict[str, Any], first: int, began: float, scratch: str | None) -> None:
        self.limits, self.first, self.began, self.scratch = limits, first, began, scratch
        self.reason, self.peak, self.cpu_seconds, self.killed, self.next = "", 0, 0.0, False, 0.0

    def look(self) -> None:
        """Ends the sandbox when a limit is reached. Looks once in TICK_SECONDS."""
        now = time.monotonic()
        if self.killed or now < self.next:
            return
        self.next = now + TICK_SECONDS
        if now - self.began > self.limits["wall_seconds"]:
            self.end("timeout")
        memory, tasks, cpu = self._measure()
        self.peak, self.cpu_seconds = max(self.peak, memory), max(self.cpu_seconds, cpu)
        if memory > self.limits["memory_mb"] << 20:
            self.end("memory")
        if cpu > self.limits["cpu_seconds"]:
            self.end("timeout")
        if tasks > self.limits["processes"]:
            self.end("processes")
        if self.scratch and _uses_more(self.scratch, self.limits["disk_mb"] << 20, self.limits["files"]):
            self.end("disk")

    def end(self, reason: str) -> None:
        """Kills all processes for a reason; the first one is kept."""
        self.reason = self.reason or reason
        self.kill()

    def kill(self) -> None:
        """All processes end, with the first one of a pid namespace; elsewhere there is one program beside it."""
        if not self.killed:
            for pid in _descendants(self.first) if self.scratch else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os.kill(self.first, signal.SIGKILL)  # not waited for yet, so the number is still its own
        self.killed = True

    def _measure(self) -> tuple[int, int, float]:
        """Bytes of memory that are nobody else's, tasks, and CPU seconds, of all descendants of the first process."""
        memory, tasks, ticks = 0, 0, 0
        for pid in _descendants(self.first):
            with contextlib.suppress(OSError, IndexError, ValueError):
                for line in _text(f"/proc/{pid}/status").splitlines():
                    if line.startswith(("RssAnon", "RssShmem", "VmSwap", "VmPTE")):
                        memory += int(line.split()[1]) << 10
                    elif line.startswith("Threads"):
                        tasks += int(line.split()[1])
                ticks += sum(map(int, _text(f"/proc/{pid}/stat").rpartition(")")[2].split()[11:15]))
        with contextlib.suppress(OSError, IndexError, ValueError):  # of those that ended as orphans
            ticks += sum(map(int, _text(f"/proc/{self.first}/stat").rpartition(")")[2].split()[13:15]))
        return memory, tasks, ticks / _CLOCK_TICKS


def _text(path: str) -> str:
    with open(path, errors="replace") as stream:
        return stream.read()


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        with contextlib.suppress(OSError):  # it ended meanwhile
            for task in os.listdir(f"/proc/{one}/task"):
                children = [int(word) for word in _text(f"/proc/{one}/task/{task}/children").split()]
                found += children
                waiting += children
    return found


def _uses_more(folder: str, most_bytes: int, most_files: int) -> bool:
    waiting, size, count = [folder], 0, 0
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                count += 1
                size += entry.stat(follow_symlinks=False).st_blocks * 512
                if size > most_bytes or count > most_files:
                    return True
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
    return False


def _remove(scratch: str) -> None:
    """By the tools, which follow folders of any depth; modes may have been chosen to hinder that."""
    for command in (["chmod", "-R", "u+rwX", scratch], ["rm", "-rf", scratch]):
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={"PATH": "/usr/bin:/bin"})


def _first_process(
    request: dict[str, Any], ends: dict[str, int], lines: list[int], setup: dict[str, Any], scratch: str, uid: int
) -> NoReturn:
    """Sets the sandbox up, starts the program, collects whatever ends, and tells the program's status at last."""
    status = ends["status"]
    try:
        limits, strict = request["limits"], setup["level"] == "strict"
        proc = os.open("/proc/self", os.O_PATH | os.O_CLOEXEC)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as stream:
            stream.write("1000")  # where memory ends, a sandbox goes before the run
        given = lines[0] if lines and request["kind"] == "program" else _handed_in(request["stdin"])
        calls = lines[0] if lines else _handed_in(request["lines"])
        if strict:
            kernel.begin_run(limits["disk_mb"] << 20, limits["files"])
        os.umask(0o022)
        os.chdir(scratch)
        kernel.become_nobody(uid)
        for name, content in request["inputs"].items():
            os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
            with open(name, "wb") as file:
                file.write(content.encode("latin-1"))
        if strict:
            kernel.own_user_namespace(proc)
        kernel.drop_privileges()
        kernel.die_with_parent()
        alone = resource.RLIM_INFINITY if not strict and os.geteuid() < kernel.FIRST_UID else limits["processes"] + 1
        kernel.set_limits(limits["memory_mb"] << 20, limits["disk_mb"] << 20, limits["cpu_seconds"], alone)
        if setup["level"] == "landlock":
            kernel.landlock(
                [
                    *(f"/{name}" for name in kernel.BASE_FOLDERS),
                    *(name for _, name in setup["folders"]),
                    "/dev/urandom",
                ],
                scratch,
            )
        if strict:
            seccomp.install(single=False)
        kernel.prctl(4, 0)  # not dumpable: its program cannot look into it
        pid = os.fork()
        if pid == 0:
            _become_program(request, [given, ends["stdout"], ends["stderr"], ends["results"], calls], lines, setup)
    except Exception as error:
        os.write(status, b"!" + str(error).encode())
        os._exit(1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError):
            signal.signal(number, signal.SIG_IGN if number == signal.SIGPIPE else signal.SIG_DFL)
    os.closerange(0, status)
    os.closerange(status + 1, 256)
    while True:
        ended, code = os.wait()
        if ended == pid:
            os.write(status, str(os.waitstatus_to_exitcode(code)).encode())
            os._exit(0)


def _handed_in(text: str) -> int:
    """A descriptor from which a text is read, which nothing can write to."""
    handle = os.memfd_create("")
    os.write(handle, text.encode("latin-1"))
    return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY)


def _become_program(request: dict[str, Any], handles: list[int], lines: list[int], setup: dict[str, Any]) -> NoReturn:
    handles = [*handles, lines[1] if len(lines) > 1 else handles[3]]
    os.setsid()
    kernel.prctl(4, 1)
    high = [os.dup2(handle, 48 + number) for number, handle in enumerate(handles)]
    for number, handle in enumerate(high):
        os.dup2(handle, number)
    os.closerange(len(high) if request["kind"] != "program" else 3, 256)
    if setup["level"] != "strict":
        seccomp.install(single=True)
    program.start(request, setup["path"])
