"""Which launcher started this process, and its place among the processes that belong to it. Imports without torch.

torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, ...) are what everything else reads. Under srun or mpirun alone they
are set here from the launcher's own, so `srun python -m skyrl.train` is enough. A world that contradicts the launcher's
is refused: ranks that do not know of each other would each train alone, and fight for the run folder.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from skyrl.distributed.network import job_port
from skyrl.types import UserError

SCONTROL_SECONDS = 20
# Slurm numbers the steps of batch scripts and of interactive shells (salloc) from here on; those of srun are below.
SPECIAL_STEPS = 0xFFFF_FFF0
TORCHRUN, STEP_TASKS = "TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"
# Launcher; its variables for rank, number of ranks, and the same two for this machine.
MPI = (
    *((name, *(f"{start}_{part}" for part in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))) for name, start in (
        ("Open MPI", "OMPI_COMM_WORLD"), ("MVAPICH", "MV2_COMM_WORLD"), ("jsrun", "JSM_NAMESPACE"), ("PALS", "PMI"))),
    ("MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("Flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", "FLUX_TASK_LOCAL_SIZE"),
)  # fmt: skip
LONE_RANKS = ("PMIX_RANK", "PALS_RANKID", "ALPS_APP_PE")  # of launchers that may say no number of ranks (prterun)
MPI_JOB = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "FLUX_JOB_ID")  # the same text on all ranks of one start


@dataclass(frozen=True)
class Place:
    """What a launcher's own variables say: rank and number of ranks, here and in all. `local_rank` and `local_size`
    are -1 where they do not say it."""

    launcher: str
    rank: int
    size: int
    local_rank: int = -1
    local_size: int = -1

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size} of {self.launcher}"


def in_step(environment: Mapping[str, str] = os.environ, *, terminal: bool | None = None) -> bool:
    """Whether srun has started this process as a task. A batch script and the shell of an interactive allocation have
    SLURM_PROCID and SLURM_NTASKS too, and the latter a step; a shell that `srun --pty` opened is a task, but what is
    typed there is not. `terminal`: whether there is a terminal to type at (None: look)."""
    step = environment.get("SLURM_STEP_ID", "")
    if not step.isdecimal() or int(step) >= SPECIAL_STEPS or STEP_TASKS not in environment:
        return False
    typed = "SLURM_PTY_PORT" in environment and environment.get("SLURM_TASK_PID") != str(os.getpid())
    return not (typed and (_has_terminal() if terminal is None else terminal))


def in_allocation(environment: Mapping[str, str] = os.environ, *, terminal: bool | None = None) -> bool:
    """Whether this is a shell or batch script of a Slurm job, outside any step that starts ranks."""
    return "SLURM_JOB_ID" in environment and not in_step(environment, terminal=terminal)


def _has_terminal() -> bool:
    """srun starts each task in a session of its own, which has a terminal only with --pty."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def launcher_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place that srun or mpirun has given this process, None without one of them or alone in it.

    mpirun comes first: in a Slurm job its daemons are tasks of a step, whose variables its ranks inherit."""
    found = None
    for launcher, *names in MPI:
        rank, size, local, per_node = (number(name, -1, environment) for name in names)
        if rank >= size > 1:
            raise UserError(
                f"{names[0]}={rank} with {names[1]}={size}: no rank of that many; start with {launcher} anew"
            )
        if rank >= 0 and size > 1 and (found is None or found.local_size < 0):
            found = Place(launcher, rank, size, local, per_node)
    if not in_step(environment):
        return found
    size, rank = number(STEP_TASKS, 1, environment), number("SLURM_PROCID", 0, environment)
    if size == 1 or (found is not None and (found.rank, found.size) != (rank, size)):
        return found
    alone = number("SLURM_STEP_NUM_NODES", 1, environment) == 1
    tasks = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE") or (str(size) if alone else "0"))
    node = number("SLURM_NODEID", 0, environment)
    here = tasks[node] if node < len(tasks) and tasks[node] else -1
    return Place("srun", rank, size, number("SLURM_LOCALID", 0, environment), here)


def take_place(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a process that srun or
    mpirun has started without them; says whether it did.

    Does nothing below torchrun; a process alone loses a LOCAL_RANK that another shell has left. What is empty counts as
    unset, and what a script has set itself (RANK and WORLD_SIZE alone, say) stays and is completed. A task that sees
    one GPU of its own (--gpus-per-task) has LOCAL_RANK 0.
    Raises UserError when RANK and WORLD_SIZE contradict each other or the launcher, and when nothing says where the
    ranks meet.
    """
    if _below_torchrun(environment):
        return False
    place = launcher_place(environment)
    if environment.get("RANK") or environment.get("WORLD_SIZE"):
        _check_world(environment, place)
        if place is None or place.local_size < 0 or environment.get("LOCAL_RANK") or own_place(environment) is None:
            return False
    elif place is None:
        _check_alone(environment)
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            environment.pop(name, None)
        return False
    if place.local_size < 0:
        raise UserError(
            f"this process is {place}, which does not say its place on this machine; set RANK, WORLD_SIZE, LOCAL_RANK, "
            "LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each, or start with torchrun"
        )
    _set_meeting_place(environment, place)
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    alone = bool(visible) and "," not in visible and place.local_size > 1
    environment.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.size),
        LOCAL_RANK="0" if alone else str(place.local_rank),
        LOCAL_WORLD_SIZE=str(place.local_size),
        GROUP_RANK=environment.get("SLURM_NODEID", "0") if place.launcher == "srun" else "0",
    )
    return True


def _below_torchrun(environment: Mapping[str, str]) -> bool:
    """Its variable alone may be left from another shell: torchrun gives each rank a place as well."""
    return TORCHRUN in environment and bool(environment.get("RANK")) and bool(environment.get("WORLD_SIZE"))


def own_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The launcher's place where RANK is that very one; None below torchrun, whose ranks share the place of their task.
    Its `local_rank` counts also ranks that see one GPU of their own, which all have LOCAL_RANK 0."""
    place = None if _below_torchrun(environment) else launcher_place(environment)
    mine = (environment.get("RANK"), environment.get("WORLD_SIZE"))
    return place if place is not None and mine == (str(place.rank), str(place.size)) else None


def _check_world(environment: Mapping[str, str], place: Place | None) -> None:
    """Raises UserError unless RANK and WORLD_SIZE are a place in one world, and that of the launcher."""
    given = " ".join(f"{name}={environment[name]}" for name in ("RANK", "WORLD_SIZE") if environment.get(name))
    rank, size = number("RANK", -1, environment), number("WORLD_SIZE", -1, environment)
    local, here = number("LOCAL_RANK", 0, environment), number("LOCAL_WORLD_SIZE", 0, environment)
    left = "they are left from another shell or launcher"
    if here and not local < here <= abs(size):
        raise UserError(
            f"{given} LOCAL_RANK={local} LOCAL_WORLD_SIZE={here}: no place of a rank on its machine; set all four, or "
            f"unset LOCAL_RANK and LOCAL_WORLD_SIZE ({left})"
        )
    if place is None and ((rank < 0 and size == 1) or (rank == 0 and size < 0)):
        return _check_alone(environment)
    if rank < 0 or size < 1 or rank >= size:
        raise UserError(
            f"{given}: not the place of a rank, RANK from 0 to WORLD_SIZE - 1; set both, or unset both ({left})"
        )
    if place is None or (rank, size) == (place.rank, place.size) or size > place.size:
        return
    apart = f"{place.size} ranks would not know of each other" if size < place.size else "ranks would be there twice"
    raise UserError(f"{given}: this process is {place}, so {apart}; unset RANK and WORLD_SIZE ({left})")


def _check_alone(environment: Mapping[str, str]) -> None:
    """Raises UserError where a launcher says only one of which rank this is and of how many: each would train alone."""
    sizes = {name: environment[name] for name in (*(names[2] for names in MPI), STEP_TASKS) if name in environment}
    ranks = [name for name in (*(names[1] for names in MPI), *LONE_RANKS) if name in environment]
    several = [name for name in sizes if name != STEP_TASKS and number(name, 1, environment) > 1]
    found, missing = (
        ([], "") if ranks and sizes else (ranks, "how many there are") if ranks else (several, "which it is")
    )
    if found:
        raise UserError(
            f"{found[0]}={environment[found[0]]}: a launcher has started this process, and does not say {missing}, or "
            "the variable is left from another shell: unset it; start with mpirun, "
            "srun or torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT for each"
        )


def _set_meeting_place(environment: MutableMapping[str, str], place: Place) -> None:
    """MASTER_ADDR and MASTER_PORT where they are not set: the first node, and a port that follows from the job."""
    srun, set_both = place.launcher == "srun", environment.get("MASTER_ADDR") and environment.get("MASTER_PORT")
    if not srun and place.local_size < place.size and not set_both:
        raise UserError(
            f"this process is {place}, on several machines, and nothing says where they meet; set MASTER_ADDR (the "
            "machine of rank 0) and MASTER_PORT for all, with mpirun -x or -genv"
        )
    if not environment.get("MASTER_ADDR"):
        nodes = environment.get("SLURM_STEP_NODELIST", "")
        environment["MASTER_ADDR"] = node_address(first_host(nodes)) if srun else "127.0.0.1"
    if not environment.get("MASTER_PORT"):
        same = next((environment[name] for name in MPI_JOB if environment.get(name)), str(os.getsid(0)))
        job = (number("SLURM_JOB_ID", 0, environment), number("SLURM_STEP_ID", 0, environment))
        environment["MASTER_PORT"] = str(job_port(*job) if srun else job_port(zlib.crc32(same.encode())))


def origin(environment: Mapping[str, str] = os.environ) -> str:
    """Where MASTER_ADDR and MASTER_PORT come from, for a person."""
    if _below_torchrun(environment):
        return "set by torchrun"
    job = "the number of this Slurm job, unless they were set before" if in_step(environment) else "the environment"
    return f"MASTER_ADDR and MASTER_PORT, from {job}"


def number(name: str, default: int, environment: Mapping[str, str] = os.environ) -> int:
    """A launcher's variable that counts something. Raises UserError when it is no number."""
    text = environment.get(name, "")
    if text and not text.isdecimal():
        raise UserError(f"environment variable {name}={text!r} is not a number; start with torchrun, srun or mpirun")
    return int(text) if text else default


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
    match = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)
    assert match is not None  # matches anything
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0])


def node_address(name: str) -> str:
    """A node's name, or the address that Slurm itself uses where that name means nothing to the resolver, or only
    loopback. Raises UserError when there is neither."""
    try:
        addresses = [str(info[4][0]) for info in socket.getaddrinfo(name, None)]
        if name == "localhost" or not all(one.startswith("127.") or one == "::1" for one in addresses):
            return name
    except (OSError, UnicodeError):
        addresses = []
    try:
        command = ["scontrol", "show", "node", name, "--oneliner"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SCONTROL_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    if found := re.search(r"\bNodeAddr=(\S+)", done.stdout if done else ""):
        return found[1]
    if addresses:
        return name
    raise UserError(f"MASTER_ADDR: the name of this step's first node, {name!r}, has no address; set MASTER_ADDR")
