"""torchrun without its forty lines about a rank that has told why it ends, and with the exit code of the run.

`skyrl-tx launch` starts it as a module. A plain `torchrun -m skyrl.train` comes here by the entry point below
(`torchrun.handlers` in pyproject.toml), which torch loads in every torchrun of an environment that skyrl is installed
in; in those that start something else nothing is changed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from skyrl.distributed.env import EXIT_FILE, PID_FILE

ENTRIES = ("skyrl", "skyrl.train", "skyrl.sft", "skyrl.serve")
LOGGERS = ("multiprocessing.api", "agent.server.api", "multiprocessing.errors.error_handler")


def main() -> None:
    """Runs torchrun's command line; its exit code is that of the rank that failed first."""
    from torch.distributed.run import main as run

    keep_quiet()
    run()


def entry_point() -> Any:
    """What torch calls when torchrun starts, to ask for a way of rendezvous; this one has none to offer."""
    if starts_skyrl(sys.argv):
        keep_quiet()
    return _no_rendezvous


def _no_rendezvous(params: Any) -> Any:
    raise ValueError("skyrl has no rendezvous back end of its own; choose c10d")


def starts_skyrl(command: Sequence[str]) -> bool:
    """Whether this is torchrun's command line for one of our modules, or for a script that imports skyrl."""
    if Path(command[0]).name != "torchrun" and Path(command[0]).parts[-3:] != ("torch", "distributed", "run.py"):
        return False
    if any(arg in ENTRIES or Path(arg).name == "skyrl-tx" for arg in command[1:]):
        return True
    with contextlib.suppress(OSError, StopIteration):
        script = Path(next(arg for arg in command[1:] if arg.endswith(".py"))).read_text(errors="replace")
        return re.search(r"^\s*(import|from) skyrl\b", script, re.MULTILINE) is not None
    return False


def keep_quiet() -> None:
    """This torchrun leaves the word to its ranks, and ends with their exit code."""
    for name in LOGGERS:
        logging.getLogger(f"torch.distributed.elastic.{name}").disabled = True  # their level is set again
    folder = tempfile.TemporaryDirectory(prefix="skyrl-torchrun-")
    os.environ[EXIT_FILE] = f"{folder.name}/code"
    with contextlib.suppress(OSError):  # a full disk
        Path(folder.name, PID_FILE).write_text(str(os.getpid()))

    def at_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        with folder:
            told = Path(os.environ[EXIT_FILE]).read_text() if Path(os.environ[EXIT_FILE]).exists() else ""
        if (code := exit_code(error, told)) is None:
            sys.__excepthook__(kind, error, trace)
        else:
            os._exit(code)  # taking the interpreter down with torch in it takes half a second, for nothing

    sys.excepthook = at_error


def exit_code(error: BaseException, told: str) -> int | None:
    """The code for what torchrun ends by, and a line where no rank could tell anything; None for an error of its own.
    `told`: what the local rank 0 has left as its code, which counts after a signal."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    if isinstance(error, SignalException):
        return int(told or 128 + error.sigval)
    if isinstance(error, RendezvousError) or type(error).__name__ in ("DistStoreError", "DistNetworkError"):
        what = " ".join((str(error) or type(error).__name__).split("\n")[0].split())
        line = (
            f"the nodes of this job did not meet ({what[:160]}); torchrun must run on as many nodes as --nnodes says, "
            "and all must reach the one that --master-addr names"
        )
        if "EADDRINUSE" in what:
            line = (
                "another launcher or program has this machine's port for the rendezvous (29500, if --master-port does "
                "not say another); give another port, or --standalone where this machine is the only one"
            )
        print(f"skyrl: error: {line}", file=sys.stderr, flush=True)
        return 1
    if not isinstance(error, ChildFailedError):
        return None
    rank, failure = error.get_first_failure()
    if all(one.error_file == "<N/A>" for one in error.failures.values()):  # no rank had a word to say
        what = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        print(f"skyrl: error: rank {rank} (process {failure.pid}) ended by {what}", file=sys.stderr, flush=True)
    return max(failure.exitcode, 1)


if __name__ == "__main__":
    main()
