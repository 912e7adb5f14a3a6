"""Starts and ends the process group, and says who we are: rank, size, device, and the CPU groups beside it.

The same program runs under torchrun, under srun, and alone: without RANK and WORLD_SIZE in the environment there is
one rank and, unless a sharded strategy needs it, no process group at all.
"""

from __future__ import annotations

import atexit
import os
import random
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist

import skyrl
from skyrl.config.schema import RunConfig
from skyrl.distributed import env, failure, peers
from skyrl.distributed.agreement import agree_on_start, group_start, is_allowed, options_of_all
from skyrl.distributed.meet import meet
from skyrl.distributed.network import use_interface
from skyrl.distributed.peers import Peers
from skyrl.distributed.place import number
from skyrl.planner.device import DeviceChoice, DeviceFacts, choose, first_line, look
from skyrl.types import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all of them. `control` (gloo, CPU) carries small agreements, `saving` (gloo, CPU) belongs to
    checkpoints alone, since their collectives run beside those of training. Both are None on one rank. `choice` says
    what the device is, which dtype model.dtype means on it, and what a person should know about that."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: Any = None
    saving: Any = None
    choice: DeviceChoice = DeviceChoice("cpu", "float32")

    @property
    def is_leader(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    # Who deals out data asks here: ranks that share a model will have one data-parallel place between them.
    @property
    def dp_rank(self) -> int:
        """This process's place among those that hold different data."""
        return self.rank

    @property
    def dp_size(self) -> int:
        """How many parts data is dealt into."""
        return self.size

    def deal(self, items: Sequence[T]) -> list[T]:
        """This process's part of a sequence that every rank has: every dp_size-th item, as cards are dealt.

        Dealt and not cut into blocks, so that neighbours, which are often alike in length, go to different ranks."""
        return [items[i] for i in range(self.dp_rank, len(items), self.dp_size)]


# The libraries' own deadlines go on while this process is stopped, and cannot be moved: those of `peers` count.
FOREVER = timedelta(days=365)
_world: World | None = None
_store: Any = None  # where the ranks met


def set_threads(threads: int) -> None:
    """CPU threads of this rank: the given number, else the cores this process may use shared by the node's ranks."""
    if threads == 0:
        if "OMP_NUM_THREADS" in os.environ and number("LOCAL_WORLD_SIZE", 1) == 1:
            return
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        threads = max(1, cores // number("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(threads)


def set_determinism(seed: int, deterministic: bool) -> None:
    """Seeds what libraries draw from on their own (ours is keyed by data) and picks deterministic kernels."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def init_distributed(cfg: RunConfig) -> World:
    """The world of this process; makes the process group on first use and keeps it for later runs of a sweep.

    Raises UserError for a launcher environment that does not fit, RunError when ranks cannot meet in time.
    """
    global _world, _store
    set_threads(cfg.run.threads)
    set_determinism(cfg.seed, cfg.debug.deterministic)
    rank, size, local_rank = env.rank(), env.world_size(), number("LOCAL_RANK", 0)
    if _world is not None:
        choice, device = _choose(cfg, local_rank)
        if _world.device != device:
            raise UserError("strategy.device cannot change between the runs of one sweep; start them separately")
        if peers.current is not None:
            peers.current.set_limits(cfg.run.hang_seconds, cfg.run.collective_timeout_seconds)
        return replace(_world, choice=choice)
    if size > 1:
        failure.end_with_launcher()
        _store, address = meet(rank, size, cfg.run.join_seconds)
        choice, device = _choose_together(cfg, _store, address, local_rank)
    else:
        choice, device = _choose(cfg, local_rank)
        if cfg.strategy.name in ("auto", "single", "ddp"):
            return World(rank=0, size=1, local_rank=local_rank, device=device, choice=choice)
        _store = dist.HashStore()
    limits = {"hang_seconds": cfg.run.hang_seconds, "collective_seconds": cfg.run.collective_timeout_seconds}
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    kwargs: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
    with group_start(_store, rank, size, cfg.run.join_seconds):
        if size > 1:
            Peers.meet(_store, rank, size, address, **limits)
        dist.init_process_group(backend, timeout=FOREVER, store=_store, rank=rank, world_size=size, **kwargs)
        control = dist.new_group(backend="gloo", timeout=FOREVER)
        saving = dist.new_group(backend="gloo", timeout=FOREVER)
    failure.remember_ranks(control, local_rank)
    _world = World(rank, size, local_rank, device, control, saving, choice)
    env.in_group = size > 1
    atexit.register(shutdown)
    return _world


def _choose(cfg: RunConfig, local_rank: int) -> tuple[DeviceChoice, torch.device]:
    choice = choose(cfg.strategy.device, cfg.model.dtype, look(cfg.strategy.device, local_rank))
    return choice, torch.device("cpu") if choice.kind == "cpu" else torch.device("cuda", local_rank)


def _choose_together(cfg: RunConfig, store: Any, address: str, local_rank: int) -> tuple[DeviceChoice, torch.device]:
    """This rank's device, once all ranks have one and agree; gloo and NCCL use the interface of `address` from here on.
    Raises UserError or RunError, the same on every rank."""
    facts, choice, error = DeviceFacts(torch.__version__), DeviceChoice("", ""), ""
    try:
        facts = look(cfg.strategy.device, local_rank)
        choice = choose(cfg.strategy.device, cfg.model.dtype, facts)
        use_interface(address)
    except UserError as problem:
        error = str(problem)
    except Exception as problem:  # the others are told at once, instead of waiting for this rank's facts
        traceback.print_exc()
        error = f"{type(problem).__name__}: {first_line(problem)}"
    allowed = cfg.run.allow_different
    versions = {
        "skyrl": skyrl.__version__,
        "python": ".".join(map(str, sys.version_info[:2])),
        "torch": torch.__version__.partition("+")[0],
        "transformers": version("transformers"),
    }
    same = {
        "device": choice.kind,
        "dtype": choice.dtype,
        **{name: known for name, known in versions.items() if not is_allowed(f"versions.{name}", allowed)},
        **({"CUDA": facts.cuda or facts.hip, "NCCL": facts.nccl} if choice.kind == "cuda" else {}),
    }
    told = {"host": socket.gethostname(), "error": error, "device": facts.name, "uuid": facts.uuid, "same": same}
    agree_on_start(store, env.rank(), env.world_size(), {**told, "options": options_of_all(cfg)}, cfg.run.join_seconds)
    return choice, torch.device("cpu") if choice.kind == "cpu" else torch.device("cuda", local_rank)


def store_of_machines(name: str) -> Any:
    """`own_store` where the ranks are on several machines, else None."""
    size = env.world_size()
    return own_store(name) if number("LOCAL_WORLD_SIZE", size) < size else None


def own_store(name: str) -> Any:
    """A connection of its own to the store where the ranks met, for a thread of its own; None on one rank. Keys are
    below `name`."""
    if _store is None or _world is None or _world.size == 1:
        return None
    return dist.PrefixStore(name, _store.clone())


def shutdown(*, failed: bool = False) -> None:
    """Ends the process group. After a failure nobody is waited for: the launcher ends the other ranks."""
    global _world, _store
    if _world is None:
        return
    ended = dist.is_initialized() and not failed
    if ended:
        try:
            dist.barrier(group=_world.control)
        except RuntimeError as error:
            _lost_at_the_end(error)
    _world, _store, env.in_group = None, None, False
    if ended:
        if peers.current is not None:
            peers.current.close()
        failure.forget_ranks()
        dist.destroy_process_group()


def _lost_at_the_end(error: RuntimeError) -> NoReturn:
    """This rank is done, another fails in its last steps: that is its error to tell. Python would print a traceback."""
    if not failure.is_lost_peer(error):
        raise error
    message = failure.about_lost_peer(error)
    if message is not None and failure.claim_error_report():
        print(f"skyrl: error: {message}", file=sys.stderr, flush=True)
    os._exit(1)
