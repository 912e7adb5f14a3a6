"""What runs in the processes of a WorkerPool: the template that they are forked from, and the worker itself.

The template is a clean interpreter, started by exec, so that nothing of the rank (CUDA contexts, threads, locks, open
collectives) is in it. It imports what the environment needs once; a worker is a fork of it and starts in milliseconds.
Requests come pickled from the rank, whose word counts; what goes back is JSON, so that nothing a worker was brought to
write is code for the rank.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import functools
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from skyrl.config.schema import EnvConfig
from skyrl.envs import guard
from skyrl.envs.base import ENVIRONMENTS
from skyrl.envs.guard import Outcome, describe_error
from skyrl.envs.rewards import REWARDS
from skyrl.envs.wrappers import WRAPPERS, is_async
from skyrl.registry.plugins import import_plugins
from skyrl.types import UserError
from skyrl.workers.calls import Call, Player, digest, encode

HEADER = struct.Struct("<I")
FORK, REAP = b"f", b"r"  # what the rank asks a template for: a worker, the exit status of one
SHOW_STACK = signal.SIGUSR2
PR_SET_PDEATHSIG = 1
BEAT_BYTES = 8  # of the file that a worker shares with the rank: since when it does what it does; then stacks
BEAT_SECONDS = 0.25  # between two beats of an event loop
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class WorkerSetup:
    """What a template begins with. things: (registry, name, cloudpickled class or function) that plugins do not bring,
    as they were defined in the user's script."""

    env: EnvConfig
    plugins: tuple[str, ...]
    things: tuple[tuple[str, str, bytes], ...]


def frame(payload: bytes) -> bytes:
    """A message as it is written."""
    return HEADER.pack(len(payload)) + payload


def read_frame(sock: socket.socket) -> bytes:
    """The next message; b"" when the other end is gone."""
    size = _read(sock, HEADER.size)
    return _read(sock, *HEADER.unpack(size)) if size else b""


def _read(sock: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        part = sock.recv(size - len(found))
        if not part:
            return b""
        found += part
    return bytes(found)


def memory_bytes() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm", "rb") as stream:
        return int(stream.read().split()[1]) * PAGE


def main(control_fd: int, preload: bool) -> None:
    """The template: prepares, says how that went ("" or one line; "threads" when plugins have started some, which a
    fork would lack), and forks workers until the rank is gone."""
    for number in (signal.SIGTERM, signal.SIGINT):  # jobs that are ended tell all their processes; the rank decides
        signal.signal(number, lambda *_: None)
    control = socket.socket(fileno=control_fd)
    setup: WorkerSetup = pickle.loads(read_frame(control))
    began = time.monotonic()
    problem = _prepare(setup) if preload else ""
    if not problem and threading.active_count() > 1:
        problem = "threads"
    said = {
        "problem": problem,
        "memory": memory_bytes(),
        "seconds": time.monotonic() - began,
        "torch": "torch" in sys.modules,
    }
    control.sendall(frame(json.dumps(said).encode()))
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 16, 2)
        if message[:1] == FORK and len(descriptors) == 2:
            pid = os.fork()
            if pid == 0:
                control.close()
                _work(setup, socket.socket(fileno=descriptors[0]), descriptors[1], preload)
            for descriptor in descriptors:
                os.close(descriptor)
            control.sendall(struct.pack("<q", pid))
        elif message[:1] == REAP:
            control.sendall(struct.pack("<q", _status_of(int(message[1:]))))
        else:
            os._exit(0)


def _status_of(pid: int) -> int:
    """What waitpid says of a child that ends now; as of one that was killed, where it does not (a disk that hangs)."""
    with contextlib.suppress(ChildProcessError):  # a worker of another template
        for _ in range(100):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                return status
            time.sleep(0.01)
    return signal.SIGKILL


def _prepare(setup: WorkerSetup) -> str:
    """Imports and registers what the environment needs; "" or why it cannot."""
    try:
        import_plugins(setup.plugins)
        for kind, name, pickled in setup.things:
            thing = pickle.loads(pickled)
            registry: Any = {"environment": ENVIRONMENTS, "wrapper": WRAPPERS, "reward": REWARDS}[kind]
            if name not in registry:
                registry.register(name)(thing)
    except UserError as error:
        return str(error)
    except (Exception, SystemExit) as error:
        return f"environment {setup.env.name}: a worker process cannot import it: {describe_error(error)}"
    return ""


def _work(setup: WorkerSetup, sock: socket.socket, crash_fd: int, prepared: bool) -> None:
    """Becomes a worker; does not return."""
    status = 1
    try:
        _settle(setup.env, crash_fd)
        problem = "" if prepared else _prepare(setup)
        player = Player(setup.env, beat=lambda: os.pwrite(crash_fd, struct.pack("<d", time.monotonic()), 0))
        if not problem and is_async(setup.env):
            asyncio.run(_serve_async(sock, player))
        else:
            _serve(sock, player, problem)
        status = 0
    except (ConnectionError, EOFError):  # the rank is gone, or has had enough of this worker
        status = 0
    except BaseException as error:  # our own fault, or a signal's
        os.write(2, f"skyrl: error: a worker of environment {setup.env.name}: {describe_error(error)}\n".encode())
    finally:
        os._exit(status)


def _settle(env: EnvConfig, crash_fd: int) -> None:
    os.setsid()  # children of user code are ended with this process
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # end with the template, which ends with the rank
    for number in (signal.SIGTERM, signal.SIGINT):  # processes that user code forks end by these as usual
        os.register_at_fork(after_in_child=functools.partial(signal.signal, number, signal.SIG_DFL))
    os.pwrite(crash_fd, bytes(BEAT_BYTES), 0)
    os.lseek(crash_fd, BEAT_BYTES, os.SEEK_SET)
    faulthandler.enable(file=crash_fd, all_threads=False)
    faulthandler.register(SHOW_STACK, file=crash_fd, all_threads=False)
    guard.GRACE_SECONDS = 1e9  # the rank watches, and ends this process
    if env.worker_memory_gib:
        limit = int(env.worker_memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _serve(sock: socket.socket, player: Player, problem: str) -> None:
    while payload := read_frame(sock):
        call: Call = pickle.loads(payload)
        outcome = Outcome(None, problem, "error") if problem else player.make(call)
        sock.sendall(_reply(call, outcome, player))


async def _serve_async(sock: socket.socket, player: Player) -> None:
    reader, writer = await asyncio.open_connection(sock=sock)
    tasks = set()

    def beat() -> None:
        player.beat()
        asyncio.get_running_loop().call_later(BEAT_SECONDS, beat)

    async def make(call: Call) -> None:
        writer.write(_reply(call, await player.make_async(call), player))

    beat()
    while True:
        (size,) = HEADER.unpack(await reader.readexactly(HEADER.size))
        task = asyncio.create_task(make(pickle.loads(await reader.readexactly(size))))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def _reply(call: Call, outcome: Outcome, player: Player) -> bytes:
    value = print_ = ""
    if not outcome.invalid:
        try:
            value, print_ = encode(outcome.value).decode(), digest(outcome.value)
        except (TypeError, ValueError) as error:
            outcome = player.refused(call, f"what JSON cannot hold ({error}); texts, numbers, lists and dicts it can")
    fields = {"key": call.key, "value": value, "digest": print_, "invalid": outcome.invalid, "kind": outcome.kind}
    return frame(json.dumps({**fields, "open": player.holds(call.key), "memory": memory_bytes()}).encode())
