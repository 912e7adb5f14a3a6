"""A real server on a free port: torchrun, the ranks, HTTP on loopback; nothing is imitated."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher import environment, free_port

# Twelve releases make some 150 models, and the older ones go without a word; gaps are given up on sooner.
PATIENCE = ("service.max_models=512", "service.model_idle_seconds=60", "service.gap_seconds=5")


@dataclass
class Server:
    """A running server; `log` is what its ranks print."""

    url: str
    process: subprocess.Popen
    log: Path

    def alive(self) -> bool:
        """Whether it still answers."""
        return self.process.poll() is None and _healthy(self.url)

    def kill(self) -> None:
        """kill -9 of torchrun and all ranks: they are one process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@contextlib.contextmanager
def serve(
    folder: Path,
    model: Path,
    *options: str,
    ranks: int = 2,
    aliases: tuple[str, ...] = (),
    tokenizer_id: str = "",
    wait_seconds: float = 240,
    port: int | None = None,
    **env: str,
) -> Iterator[Server]:
    """A server of `model` that keeps its state in `folder`; stopped at exit.

    aliases: names that clients ask for. Raises RuntimeError with the log's end when it does not answer in time.
    """
    port = port or free_port()
    folder.mkdir(parents=True, exist_ok=True)
    names = ", ".join(f'{name}: ""' for name in aliases)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*(launcher if ranks > 1 else [sys.executable]), "-m", "skyrl.serve", f"model.path={model}"]
    command += [f"service.port={port}", f"service.folder={folder / 'state'}", "run.threads=1", *PATIENCE]
    command += [f"service.aliases={{{names}}}"] if names else []
    command += [f"service.tokenizer_id={tokenizer_id}"] if tokenizer_id else []
    log = folder / "server.log"
    with open(log, "ab") as out:
        process = subprocess.Popen(
            [*command, *options],
            cwd=folder,
            env=environment(**env),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        deadline = time.monotonic() + wait_seconds
        while not _healthy(server.url):
            if process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
                raise RuntimeError(f"the server did not answer (exit code {process.poll()}):\n{tail}")
            time.sleep(0.2)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            pass  # killed below
        server.kill()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/api/v1/healthz", timeout=2) as reply:
            return reply.status == 200
    except OSError:
        return False
