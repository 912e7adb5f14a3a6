"""Ranks on several hosts without Slurm: on each a `skyrl-tx launch` of its own, reached by ssh or what replaces it.

Each of them finds its own GPUs and cores. It listens on its standard input: names of signals are passed to its ranks,
and when the connection ends, so do they, after a save.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from skyrl.args import is_secret
from skyrl.distributed.network import COUNT, FIRST, is_free, job_port
from skyrl.distributed.stop import INTERRUPTED, TEMPORARY
from skyrl.launch import processes
from skyrl.types import UserError

RSH = "ssh -o BatchMode=yes -o ConnectTimeout=20 {host}"
JOIN_SECONDS = 300
PORT_SECONDS = 60
# After a host has failed: the others find out by themselves within a minute and say what happened.
AFTER_FAILURE_SECONDS = 75.0
KILL_SECONDS = 60.0
FORWARDED = tuple("SKYRL_ HF_ NCCL_ GLOO_ TORCH_ TRANSFORMERS_ WANDB_ OMP_ PYTHONPATH XDG_CACHE_HOME".split())
ANSWER = "skyrl-port="  # before the port in what `python -m skyrl.launch.hosts` prints on another host


@dataclass(frozen=True)
class Host:
    """A host as given: the name to connect to, the address for the other hosts, ranks (0: as many as it finds)."""

    name: str
    ranks: int

    @property
    def address(self) -> str:
        """The name without a user."""
        return self.name.rpartition("@")[2]


def read_hosts(text: str, nproc: int) -> list[Host]:
    """--hosts=a,b:4 as hosts. Raises UserError."""
    found = []
    for part in text.split(","):
        name, colon, ranks = part.strip().partition(":")
        if not name or (colon and (not ranks.isdecimal() or ranks == "0")):
            raise UserError(f"launch: --hosts={text}: {part!r} is neither a name nor name:ranks; write a,b:4")
        found.append(Host(name, int(ranks or nproc)))
    if len({host.name for host in found}) < len(found):
        raise UserError(f"launch: --hosts={text}: a host is there twice; write name:ranks for more ranks on it")
    return found


def launch(flags: argparse.Namespace, mode: str, args: Sequence[str]) -> int:
    """Starts the hosts' launchers and waits for them; the exit code. Raises UserError."""
    hosts = read_hosts(flags.hosts, flags.nproc)
    port = flags.port or (job_port(os.getpid()) if flags.dry_run else _ask_port(flags.rsh, hosts[0]))
    commands = [_command(flags, hosts, place, port, mode, args) for place in range(len(hosts))]
    for command in commands:
        print(f"launch: {shlex.join(command)}", file=sys.stderr, flush=True)
    return 0 if flags.dry_run else _Hosts(hosts, commands).wait()


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that other hosts get too; nothing that looks like a secret, for it would stand in process lists."""
    return {
        name: value for name, value in sorted(environment.items()) if name.startswith(FORWARDED) and not is_secret(name)
    }


def _reach(rsh: str, host: Host, line: str) -> list[str]:
    """The command that runs a line of shell on a host; the line comes last, or where --rsh has {line}."""
    words = shlex.split(rsh)
    if "{host}" not in rsh and "{line}" not in rsh:
        words.append(host.name)
    words = [word.replace("{host}", host.name) for word in words]
    return [line if word == "{line}" else word for word in words] if "{line}" in words else [*words, line]


def _line(command: Sequence[str]) -> str:
    """A line of shell for another host: this folder, our settings, the command."""
    settings = [f"{name}={value}" for name, value in forwarded(os.environ).items()]
    return f"cd {shlex.quote(os.getcwd())} && exec env {shlex.join([*settings, *command])}"


def _command(
    flags: argparse.Namespace, hosts: list[Host], place: int, port: int, mode: str, args: Sequence[str]
) -> list[str]:
    host = hosts[place]
    own = [sys.executable, "-m", "skyrl.cli", "launch", "--remote-commands", f"--nproc={host.ranks or 'auto'}"]
    own += [f"--nnodes={len(hosts)}", f"--node-rank={place}"]
    own += [f"--rendezvous={hosts[0].address}:{port}", f"--address={host.address}"]
    own += [f"--max-restarts={flags.max_restarts}"] + ["--no-bind"] * flags.no_bind
    line = _line([*own, "--", mode, *args])
    return _reach(flags.rsh, host, line)


def _ask_port(rsh: str, host: Host) -> int:
    """A port that is free on the host where the ranks meet. Raises UserError when it cannot be reached."""
    line = _line([sys.executable, "-m", "skyrl.launch.hosts", str(os.getpid())])
    command = _reach(rsh, host, line)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PORT_SECONDS, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise UserError(f"launch: --rsh={rsh}: {error.strerror}: {error.filename}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"launch: {host.name}: no answer within {PORT_SECONDS} s; try {shlex.join(command)}") from None
    port = read_port(done.stdout)
    if done.returncode or port is None:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(
            f"launch: {host.name}: {words[-1] if words else f'ended with {done.returncode}'}; it must be reachable "
            f"without a password and see this folder and this Python; try {shlex.join(command)}"
        )
    return port


def free_port(job: int, tries: int = 64) -> int:
    """The first free port from job_port(job) on. Raises UserError when none of `tries` is."""
    first = job_port(job)
    for step in range(tries):
        port = FIRST + (first - FIRST + step) % COUNT
        if is_free(port):
            return port
    raise UserError(f"ports {first} to {first + tries - 1} are all taken on this node; give one with --port")


def read_port(text: str) -> int | None:
    """The port that another host has answered; None without one. Its shell's start files may print around it."""
    found = re.findall(rf"{ANSWER}(\d+)", text)
    return int(found[-1]) if found else None


class _Hosts:
    """The launchers of all hosts."""

    def __init__(self, hosts: list[Host], commands: list[list[str]]) -> None:
        self.hosts = hosts
        self.heard: list[int] = []
        self.children = [
            subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True) for command in commands
        ]

    def send(self, number: int) -> None:
        """A signal for the ranks of all hosts."""
        self.heard.append(number)
        for child in self.children:
            assert child.stdin is not None
            with contextlib.suppress(OSError, ValueError):  # this one has ended
                child.stdin.write(f"{signal.Signals(number).name}\n")
                child.stdin.flush()

    def wait(self) -> int:
        """The exit code: that of the first host that failed, 75 when all that did not end well ask to go on."""
        first: tuple[str, int] | None = None
        failed_at = 0.0
        with processes.passing(self.send):
            while any(child.poll() is None for child in self.children):
                for host, child in zip(self.hosts, self.children, strict=True):
                    if first is None and child.poll() not in (None, 0, TEMPORARY):
                        first, failed_at = (host.name, child.returncode), time.monotonic()
                if first is not None:
                    self._end_others(time.monotonic() - failed_at)
                time.sleep(0.2)
        codes = [child.returncode for child in self.children]
        for child in self.children:
            assert child.stdin is not None
            child.stdin.close()
        if signal.SIGINT in self.heard:
            return INTERRUPTED
        if first is None and not any(codes):
            return 0
        if all(code in (0, TEMPORARY) for code in codes):
            return TEMPORARY
        name, code = first or next(
            (host.name, code) for host, code in zip(self.hosts, codes, strict=True) if code not in (0, TEMPORARY)
        )
        print(f"launch: {name} ended first, with code {code}", file=sys.stderr, flush=True)
        return code if code > 0 else 128 - code

    def _end_others(self, seconds: float) -> None:
        if seconds > AFTER_FAILURE_SECONDS and signal.SIGTERM not in self.heard:
            self.send(signal.SIGTERM)
        if seconds > AFTER_FAILURE_SECONDS + KILL_SECONDS:
            for child in self.children:
                child.kill()


if __name__ == "__main__":  # for another host: a free port of that node for a job
    print(f"\n{ANSWER}{free_port(int(sys.argv[1]))}")
