"""Starts command lines of skyrl as `python -m` does, in processes forked from one that has imported torch.

Importing torch and transformers takes several seconds, a golden run two. The process that forks imports nothing of
skyrl, so
each command line imports it anew, and knows modules by the names that users type.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

# What skyrl imports of others, or imports late: whatever is not installed is left out.
PRELOADED = (
    "numpy torch torch._dynamo torch.distributed.tensor torch.distributed.checkpoint torch.distributed.fsdp "
    "transformers transformers.models.qwen3.modeling_qwen3 transformers.generation safetensors.torch accelerate hydra "
    "yaml matplotlib.figure matplotlib.backends.backend_agg starlette.applications uvicorn google.protobuf.message "
    "zstandard"
).split()
CODE = os.environ.get("SKYRL_GOLDEN_CODE") or str(Path(__file__).resolve().parents[2])


class Starter:
    """The process that forks. `start` returns a handle, `wait` the exit code of a handle's first failing rank."""

    def __init__(self) -> None:
        launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        clean = {key: value for key, value in os.environ.items() if key not in launcher}
        # The first is what `python -m skyrl.train` sets itself, before torch is imported.
        fixed = {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**clean, **fixed, "PYTHONPATH": CODE},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def start(self, module: str, *options: str, folder: Path, ranks: int = 1) -> int:
        """`python -m <module> <options>` in `folder`, where .stdout and .stderr take what it writes; with several ranks
        the environment is torchrun's. Returns the number by which `poll` and `stop` know it."""
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        return self._ask(start=module, options=options, folder=str(folder), ranks=ranks, port=port)

    def poll(self, number: int) -> int | None:
        """The exit code, of the first rank that failed if one did; None while a rank lives."""
        return self._ask(poll=number)

    def stop(self, number: int) -> None:
        """SIGTERM to all ranks."""
        self._ask(stop=number)

    def run(self, module: str, *options: str, folder: Path, ranks: int = 1, timeout: float = 120) -> None:
        """A command line from start to end. Raises AssertionError with what it wrote unless it succeeds."""
        number = self.start(module, *options, folder=folder, ranks=ranks)
        self.wait(number, folder, timeout=timeout)

    def wait(self, number: int, folder: Path, *, timeout: float = 120) -> None:
        """Until a command line has ended. Raises AssertionError with what it wrote unless it succeeded."""
        end = time.monotonic() + timeout
        while (code := self.poll(number)) is None:
            if time.monotonic() > end:
                self.stop(number)
                break
            time.sleep(0.02)
        assert code == 0, f"exit code {code}\n{(folder / '.stdout').read_text()}\n{(folder / '.stderr').read_text()}"

    def close(self) -> None:
        """Ends it with everything that it started and that still lives."""
        self._process.stdin.close()
        self._process.wait(30)

    def _ask(self, **order) -> int | None:
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


# ---- inside the process that forks


def _serve() -> None:
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            __import__(name)
    answers = os.fdopen(os.dup(1), "w")
    living: list[set[int]] = []
    codes: list[int] = []
    for line in sys.stdin:
        order = json.loads(line)
        answer: int | None = None
        if "start" in order:
            answer = len(living)
            living.append({_fork(order, rank) for rank in range(order["ranks"])})
            codes.append(0)
        elif "stop" in order:
            _signal(living[order["stop"]], signal.SIGTERM)
        else:
            number = order["poll"]
            for pid in list(living[number]):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    living[number].remove(pid)
                    codes[number] = codes[number] or os.waitstatus_to_exitcode(status)
                    if codes[number]:  # as torchrun does
                        _signal(living[number], signal.SIGTERM)
            answer = None if living[number] else codes[number]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for pids in living:
        _signal(pids, signal.SIGKILL)


def _signal(pids: set[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)


def _fork(order: dict, rank: int) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.chdir(order["folder"])
        for number, name in ((1, ".stdout"), (2, ".stderr")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if rank == 0 else 0)
            os.dup2(os.open(name, flags, 0o644), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if order["ranks"] > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(order["ranks"]),
                LOCAL_WORLD_SIZE=str(order["ranks"]),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(order["port"]),
            )
        sys.path[0] = order["folder"]
        sys.argv = [order["start"], *order["options"]]
        code = 0
        try:
            runpy.run_module(order["start"], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        import atexit

        atexit._run_exitfuncs()
    except BaseException:
        import traceback

        traceback.print_exc()
        code = code or 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
