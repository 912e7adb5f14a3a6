"""`python -m skyrl.launch.rank train|sft|evaluate|serve [option=value ...]`: what a launcher starts on each device.

Finds its place (torchrun's or Slurm's variables), stays on its own cores, keeps kernels' caches on this node, and does
what `python -m skyrl.<mode>` does. Exit codes are those of run_entry.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from types import FrameType

from skyrl.distributed.env import LAUNCHED
from skyrl.distributed.place import own_place
from skyrl.distributed.stop import TEMPORARY, heard_signals
from skyrl.launch import machine
from skyrl.main import run_entry
from skyrl.types import UserError

MODES = ("train", "sft", "control", "evaluate", "serve")
BIND, CACHE, WARM = "SKYRL_BIND", "SKYRL_LOCAL_CACHE", "SKYRL_WARM_CACHE"
# Variables of libraries that say where they keep compiled kernels, and our names of these folders. On a shared file
# system they slow down or break the ranks of other nodes.
CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "CUDA_CACHE_PATH": "cuda",
}


def main() -> None:
    mode, *args = sys.argv[1:] or [""]

    def prepare() -> list[str]:
        if mode not in MODES:
            raise UserError(f"python -m skyrl.launch.rank {mode}: choose one of: {', '.join(MODES)}")
        local_caches()
        return bind_cpus(args)

    sys.argv = [f"skyrl.{mode}", *args]
    asked = _listen(mode)
    run_entry(mode, prepare)
    if asked:
        sys.exit(TEMPORARY)


def bind_cpus(args: Sequence[str], environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Binds this process to its share of the node's cores; returns the option for the number of threads.

    Nobody is bound with SKYRL_BIND=none or where Slurm has bound the tasks. The option is left out where the user
    gives it. Only several ranks on a node share it: a single one keeps what it finds.
    """
    ranks, local = int(environment.get("LOCAL_WORLD_SIZE", "1")), int(environment.get("LOCAL_RANK", "0"))
    option = "run.threads"
    given = any(arg.partition("=")[0] == option for arg in args)
    if ranks == 1 or given:
        return []
    place = own_place(environment)
    if place is not None and place.local_rank >= 0:
        local = place.local_rank
        bound = place.launcher == "srun" and environment.get("SLURM_CPU_BIND_TYPE", "none") not in ("none", "")
        if bound and hasattr(os, "sched_getaffinity"):
            return [f"{option}={len(machine.look().cores)}"]  # these cores are this task's alone
    share = machine.shares(machine.look(), ranks, bind=environment.get(BIND, "auto") != "none")[local]
    if share.cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, share.cpus)
    return [f"{option}={share.threads}"]


def local_caches(environment: MutableMapping[str, str] = os.environ) -> Path | None:
    """Points the caches of compiled kernels to SKYRL_LOCAL_CACHE, in a Slurm job to a folder of the node's own, which
    SKYRL_WARM_CACHE fills; variables that are set stay. Returns the folder, None where nothing was to do."""
    place = environment.get(CACHE, "")
    if not place and "SLURM_JOB_ID" in environment:
        root = environment.get("SLURM_TMPDIR") or tempfile.gettempdir()
        place = str(Path(root) / f"skyrl-{os.getuid()}-{environment['SLURM_JOB_ID']}")
    if not place:
        return None
    for variable, name in CACHES.items():
        environment.setdefault(variable, str(Path(place) / name))
    if environment.get(WARM):
        warm_up(Path(environment[WARM]), Path(place))
    return Path(place)


def cache_folders(environment: Mapping[str, str] = os.environ) -> dict[str, Path]:
    """Where this process keeps compiled kernels: a variable of CACHES -> folder (which may not be there)."""
    home, temporary = Path(os.path.expanduser("~")), Path(tempfile.gettempdir())  # also for a user without a home
    usual = {
        "TRITON_CACHE_DIR": home / ".triton" / "cache",
        "TORCHINDUCTOR_CACHE_DIR": temporary / f"torchinductor_{environment.get('USER', '')}",
        "TORCH_EXTENSIONS_DIR": home / ".cache" / "torch_extensions",
        "CUDA_CACHE_PATH": home / ".nv" / "ComputeCache",
    }
    return {variable: Path(environment.get(variable) or usual[variable]) for variable in CACHES}


def warm_up(source: Path, place: Path) -> None:
    """Fills a node's fresh cache folder from a staged one, once: the first of the node's ranks to finish a copy wins.

    Raises UserError when the staged folder is not there.
    """
    if place.exists():
        return
    if not source.is_dir():
        raise UserError(f"{WARM}={source}: no such folder; skyrl-tx stage makes one, or unset {WARM}")
    place.parent.mkdir(parents=True, exist_ok=True)
    copy = Path(tempfile.mkdtemp(prefix=place.name, dir=place.parent))
    shutil.copytree(source, copy, dirs_exist_ok=True)
    try:
        copy.rename(place)
    except OSError:  # another rank was first; a rename never replaces a folder that has something in it
        shutil.rmtree(copy)


def _listen(mode: str) -> list[int]:
    """Until the run itself listens there is nothing to save: a signal ends this process with 75. A server ends well at
    SIGTERM, so others become that, and what was heard is kept in the list that is returned: it may be started again."""
    asked: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        if os.environ.get(LAUNCHED):  # torchrun would hide the code
            os.close(os.open(os.environ[LAUNCHED], os.O_CREAT | os.O_WRONLY))
        os._exit(TEMPORARY)

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        signal.raise_signal(signal.SIGTERM)

    for number in heard_signals():
        if number != signal.SIGINT:
            signal.signal(number, pass_on if mode == "serve" and number != signal.SIGTERM else leave)
    return asked


if __name__ == "__main__":
    main()
