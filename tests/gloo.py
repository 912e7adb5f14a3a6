"""Several ranks over gloo inside a test. One server process imports everything once; ranks are forked from it."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_SERVER = multiprocessing.get_context("forkserver")
# DeepSpeed's start brings torch's compiler along; beside a GPU it would look at that before the fork.
_DEEPSPEED = [] if torch.cuda.is_available() else ["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"]
_SERVER.set_forkserver_preload(
    ["torch.distributed.fsdp", "skyrl.trainers.rl", "skyrl.sampler.runners.cpu_kernels", "tests.forked", *_DEEPSPEED]
)


def run_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = 180.0) -> list[Any]:
    """function(*args) on `size` ranks in fresh processes, with torchrun's variables set; what each returned, in order.

    `function` lives at the top of a module. Raises AssertionError with the traceback of the first rank that failed;
    the others are killed then, as torchrun does, and when the time is over; that error shows where each rank stood.
    """
    with socket.socket() as held, tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        # Kept while the ranks run, so that no other test's socket gets this port; rank 0 may listen there all the same.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        ranks = [
            _SERVER.Process(target=_rank, args=(rank, size, port, folder, function, args), daemon=True)
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, Path(folder), timeout)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(size)]


def _wait(ranks: list[Any], folder: Path, timeout: float) -> None:
    end = time.monotonic() + timeout
    while any(process.is_alive() for process in ranks):
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
        if failed:
            break
        assert time.monotonic() < end, f"ranks still running after {timeout} s:\n{_stacks(ranks, folder)}"
        time.sleep(0.02)
    for rank, process in enumerate(ranks):
        if process.exitcode not in (None, 0):
            text = folder / f"{rank}.error"
            raise AssertionError(f"rank {rank}: {text.read_text() if text.exists() else f'exit {process.exitcode}'}")


def _stacks(ranks: list[Any], folder: Path) -> str:
    """The Python stacks of the ranks that are still there."""
    there = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for rank in there:
        if (folder / f"{rank}.stacks").exists():  # else the signal would end a rank that has not come as far as _rank
            os.kill(ranks[rank].pid, signal.SIGUSR1)
    time.sleep(1.0)
    files = {rank: folder / f"{rank}.stacks" for rank in there}
    return "\n".join(
        f"rank {rank}: {path.read_text() if path.exists() else 'not begun'}" for rank, path in files.items()
    )


def _rank(rank: int, size: int, port: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    stacks = (Path(folder) / f"{rank}.stacks").open("w")
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    torch.set_num_threads(1)
    try:
        result = function(*args)
        from skyrl.distributed.init import shutdown

        shutdown()
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)
    (Path(folder) / f"{rank}.result").write_bytes(pickle.dumps(result))
