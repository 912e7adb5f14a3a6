"""What the environment says of this process: its rank, and its place in a Slurm step. Imports without torch.

In a Slurm step the variables that torchrun would set are set from Slurm's, so `srun python -m skyrl.train` is enough.

Signals of Slurm then reach the ranks, and their exit code (75: queue me again) reaches the batch script.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, MutableMapping
from types import FrameType
from typing import Any

import psutil

from skyrl.types import UserError

REQUEUE_FILE = "requeue"  # in the run folder: the same command should be started again
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun gives each rank one of its own
LAUNCHED = "SKYRL_LEFT"  # set by skyrl-tx launch: a file that says that ranks left before they had anything to save
SCONTROL_SECONDS = 20
# Set by distributed.init and distributed.watchdog, which import torch; read by main.py, which must not.
in_group = False  # this process is one of a group of ranks
watchdog: Any = None  # the Watchdog that listens, while a run or a server lives
planned_memory = ""  # of one rank, in words, once there is a plan
# Below the ports that the kernel hands to outgoing connections (32768 and up), above those of services.
FIRST, COUNT = 20000, 10000
STRIDE = 7  # no divisor of COUNT: jobs that follow each other start apart, and 10000 of them differ


def job_port(job: int, step: int = 0) -> int:
    """Where the search for a job's port begins: the same on all its nodes, another for each of 10000 jobs."""
    return FIRST + (STRIDE * (job + 31 * step)) % COUNT


def is_free(port: int, host: str = "") -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError:
            return False
    return True


def free_port(job: int, tries: int = 64) -> int:
    """The first free port from job_port(job) on. Raises UserError when none of `tries` is."""
    first = job_port(job)
    for step in range(tries):
        port = FIRST + (first - FIRST + step) % COUNT
        if is_free(port):
            return port
    raise UserError(f"ports {first} to {first + tries - 1} are all taken on this node; give one with --port")


def rank() -> int:
    """This process's rank under torchrun or srun, 0 without."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes of this job, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def report_to_launcher(text: str) -> None:
    """Leaves the text where torchrun looks for it, so that its own report ends with it."""
    path = os.environ.get(ERROR_FILE)
    if path:
        with contextlib.suppress(OSError), open(path, "w") as file:
            extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
            json.dump({"message": {"message": text, "extraInfo": extra}}, file)


def end_launcher() -> None:
    """Kills the torchrun that has started this process, which would print a traceback about the signal that it got,
    whatever becomes of its ranks. Nothing where that is not our parent: a script that only handed its variables on has
    the same error file as we. Nothing below skyrl-tx launch either: there torchrun gets no signal."""
    mine = os.environ.get(ERROR_FILE)
    if mine is None or LAUNCHED in os.environ:
        return
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(os.getppid())
        if parent.environ().get(ERROR_FILE) != mine:
            parent.kill()


def leave_at_signals() -> None:
    """Until a server listens itself, SIGTERM and SIGINT end its ranks below torchrun at once, and that with them."""
    if ERROR_FILE not in os.environ or LAUNCHED in os.environ:
        return

    def leave(number: int, frame: FrameType | None) -> None:
        if os.environ.get("LOCAL_RANK") == "0":
            end_launcher()
        os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)


def in_step(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether srun has started this process as a task. The batch script has SLURM_PROCID and SLURM_NTASKS too, but no
    step."""
    return "SLURM_STEP_ID" in environment and "SLURM_STEP_NUM_TASKS" in environment


def in_allocation(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is a shell or batch script of a Slurm job, outside any step of it."""
    return "SLURM_JOB_ID" in environment and not in_step(environment)


def from_slurm(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task of several; says
    whether it did.

    Does nothing below torchrun (RANK is set), outside a step, and for a step of one task. MASTER_ADDR and MASTER_PORT
    stay as they are where the batch script has set them. A task that sees one GPU of its own (--gpus-per-task) has
    LOCAL_RANK 0. Raises UserError for a step whose first node has no address.
    """
    if "RANK" in environment or not in_step(environment) or environment["SLURM_STEP_NUM_TASKS"] == "1":
        return False
    node = int(environment.get("SLURM_NODEID", "0"))
    per_node = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", environment["SLURM_STEP_NUM_TASKS"]))
    local = environment.get("SLURM_LOCALID", "0")
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    alone = bool(visible) and "," not in visible and per_node[node] > 1
    if not environment.get("MASTER_ADDR"):
        environment["MASTER_ADDR"] = _first_address(environment)
    if not environment.get("MASTER_PORT"):
        step = environment["SLURM_STEP_ID"]
        port = job_port(int(environment["SLURM_JOB_ID"]), int(step) if step.isdecimal() else 0)
        environment["MASTER_PORT"] = str(port)
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=environment["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK="0" if alone else local,
        LOCAL_WORLD_SIZE=str(per_node[node]),
        GROUP_RANK=str(node),
    )
    return True


def tasks_per_node(text: str) -> list[int]:
    """Slurm's "2(x3),1" as [2, 2, 2, 1]."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={text}: not as Slurm writes it; start the ranks with srun")
        found += [int(match[1])] * int(match[2] or 1)
    return found


def first_host(nodes: str) -> str:
    """The first name of Slurm's "node[03-5,7],other"."""
    match = re.match(r"([^\[,]*)(?:\[([^\]]*)\])?([^,\[]*)", nodes)
    assert match is not None  # matches anything
    prefix, numbers, suffix = match.groups()
    return prefix + (re.split(r"[-,]", numbers)[0] if numbers else "") + suffix


def _first_address(environment: Mapping[str, str]) -> str:
    """The first node's name, or the address that Slurm itself uses where that name means nothing to the resolver."""
    name = first_host(environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "")))
    try:
        socket.getaddrinfo(name, None)
        return name
    except OSError:
        pass
    try:
        command = ["scontrol", "show", "node", name, "--oneliner"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SCONTROL_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    found = re.search(r"\bNodeAddr=(\S+)", done.stdout if done else "")
    if found is None:
        raise UserError(f"MASTER_ADDR: the name of this step's first node, {name!r}, has no address; set MASTER_ADDR")
    return found[1]


if __name__ == "__main__":  # for another host: a free port of that node for a job
    print(free_port(int(sys.argv[1])))
