"""Weights to sample from, by name: kept in host memory or on the disk, lent to the ranks while they are in use."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from skyrl.service.commands import BASE, Leader
from skyrl.service.messages import RequestFailed
from skyrl.service.storage.checkpoints import CheckpointService
from skyrl.service.storage.content import Content, to_state
from skyrl.service.storage.records import CheckpointPath, StorageError

SPILL = "snapshots"  # their folder, in that of the service
HOST_BYTES = 4 << 30  # ephemeral snapshots in host memory; older ones move to files
RESIDENT = 64  # adapters on the ranks that nothing is drawn from


@dataclass(eq=False)
class _Resident:
    uses: int = 0
    used: int = 0


class Snapshots:
    """Weights to sample from, by name: a sampling session id (ephemeral), or a tinker:// path with its version after
    "#". They never change.

    Every name has one home that outlives the device: a checkpoint on disk, or (ephemeral snapshots) host memory, from
    which the oldest move to files when there are many. The ranks hold only those that are in use. Only the worker's
    thread calls it.
    """

    def __init__(self, leader: Leader, checkpoints: CheckpointService, base_content: Callable[[], Content]) -> None:
        """base_content: the weights of the base model, for servers that train all parameters."""
        self.leader, self.checkpoints, self._base_content = leader, checkpoints, base_content
        self._resident: dict[str, _Resident] = {}
        self._host: OrderedDict[str, Content] = OrderedDict()
        self._spilled: set[str] = set()
        self._folder = checkpoints.folder / SPILL
        shutil.rmtree(self._folder, ignore_errors=True)  # ephemeral snapshots end with their server
        self._filled = ""  # whose whole weights the ranks sample from, where all parameters are trained
        self._original: Content | None = None
        self._clock = itertools.count(1)

    def publish(self, name: str, content: Content, model_id: str) -> None:
        """Makes a model's weights as they are now sampleable under an ephemeral name. Raises: StorageError when host
        memory is full and the disk takes none of the older ones."""
        self._keep(name, content)
        if content.info.is_lora:
            self.leader.call("freeze_adapter", name, model_id)
            self._resident[name] = _Resident(used=next(self._clock))
        self._make_room()

    def _keep(self, name: str, content: Content) -> None:
        self._host[name] = content
        while len(self._host) > 1 and HOST_BYTES < sum(
            tensor.nbytes for held in self._host.values() for tensor in held.weights.values()
        ):
            old, weights = next(iter(self._host.items()))
            try:
                self._folder.mkdir(exist_ok=True)
                torch.save(weights, self._file(old))
            except (OSError, RuntimeError) as error:  # torch has no error of its own for a full disk
                del self._host[name]  # who asks for one more is told; those that were promised stay
                with suppress(OSError):
                    self._file(old).unlink(missing_ok=True)
                raise StorageError(
                    f"no room for one more snapshot: host memory has its {HOST_BYTES >> 30} GiB, and the disk refuses "
                    f"({' '.join(str(error).split())[:200]}); free space at {self._folder.parent}, or end sessions"
                ) from error
            del self._host[old]
            self._spilled.add(old)

    def _file(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.pt"

    def sessions(self) -> set[str]:
        """Sessions that ephemeral snapshots belong to."""
        return {name.partition(":")[0] for name in (*self._host, *self._spilled)}

    def forget_session(self, session: str) -> None:
        """Frees the ephemeral snapshots of a session that has ended, except those that are being drawn from."""
        for name in [*self._host, *self._spilled]:
            busy = name in self._resident and self._resident[name].uses
            if name.partition(":")[0] == session and not busy:
                self._forget(name)

    def _forget(self, name: str) -> None:
        self._host.pop(name, None)
        if name in self._spilled:
            self._spilled.discard(name)
            self._file(name).unlink(missing_ok=True)
        self._evict(name)

    def crowded(self, name: str) -> bool:
        """Whether so many others are being drawn from that `name`, which the ranks do not hold, has to wait."""
        return name not in self._resident and sum(one.uses > 0 for one in self._resident.values()) >= RESIDENT

    def acquire(self, name: str) -> None:
        """Makes sure that the ranks hold `name`, and that they keep it until `release`. Raises RequestFailed,
        UserError."""
        if name not in self._resident:
            content = self._find(name)
            lora = content.info.lora
            if lora is None:
                raise RequestFailed(
                    f"{name} holds all parameters of a model; start the server with service.full_parameters=true"
                )
            self.leader.call("load_adapter", name, lora, BASE, content.weights)
            self._resident[name] = _Resident()
        entry = self._resident[name]
        entry.uses, entry.used = entry.uses + 1, next(self._clock)
        self._make_room()

    def _find(self, name: str) -> Content:
        if name in self._host:
            return self._host[name]
        if name in self._spilled:
            try:
                return torch.load(self._file(name), weights_only=False)  # this server wrote it
            except Exception as error:  # pickle, zip and the system each have their own
                raise StorageError(f"{name}: its file is damaged ({error}); make another snapshot") from error
        if name.startswith("tinker://"):
            path, _, version = name.rpartition("#")
            # for whoever was allowed to when it was opened
            return self.checkpoints.archive.read(CheckpointPath.parse(path), version, optimizer=False)
        raise RequestFailed(
            f"{name}: this snapshot was lost when the server restarted, or had no room; save weights under a name to "
            "keep them",
            "server",
        )

    def fill_base(self, name: str) -> None:
        """Puts whole weights where the ranks sample from: those of `name`, "" for the base as it was loaded. Nothing
        may be under way. Raises RequestFailed, UserError."""
        if name == self._filled:
            return
        if self._original is None:
            self._original = self._base_content()
        content = self._find(name) if name else self._original
        if content.info.lora is not None:
            raise RequestFailed(f"{name} is an adapter; this server trains and samples all parameters")
        self.leader.call("replace_base", BASE, to_state(content)["weights"])
        self._filled = name

    def release(self, name: str) -> None:
        """One request of `name` has ended."""
        self._resident[name].uses -= 1

    def _make_room(self) -> None:
        idle = sorted((one.used, name) for name, one in self._resident.items() if one.uses == 0)
        for _, name in idle[: max(0, len(idle) - RESIDENT)]:
            self._evict(name)

    def _evict(self, name: str) -> None:
        entry = self._resident.get(name)
        if entry is not None and entry.uses == 0:
            del self._resident[name]
            self.leader.call("delete_adapter", name)
