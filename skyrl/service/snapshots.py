"""Weights to sample from: published by a tenant, or read from a checkpoint; never changed after.

Every name has one home that outlives the device: a checkpoint on disk, or (ephemeral snapshots) host memory, from
which the oldest move to files when there are many. The ranks hold only those that are in use.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from dataclasses import dataclass

from skyrl.service.archive_content import Content
from skyrl.service.checkpoints import CheckpointService, adapter_weights, num_bytes, to_state
from skyrl.service.commands import BASE, Leader
from skyrl.service.messages import RequestFailed
from skyrl.service.models import OpenModels, TrainableModel

log = logging.getLogger("skyrl.service")

HOST_BYTES = 4 << 30  # ephemeral snapshots in host memory; older ones move to files
RESIDENT = 64  # adapters on the ranks that nothing is drawn from


@dataclass(eq=False)
class _Resident:
    uses: int = 0
    used: int = 0


class Snapshots:
    """Published weights by name: a sampling session id (ephemeral), or a tinker:// path with its version after "#"."""

    def __init__(self, leader: Leader, checkpoints: CheckpointService, models: OpenModels) -> None:
        self.leader, self.checkpoints, self.models = leader, checkpoints, models
        self._resident: dict[str, _Resident] = {}
        self._host: OrderedDict[str, Content] = OrderedDict()
        self._spilled: set[str] = set()
        self._filled = ""  # whose whole weights the ranks sample from, where all parameters are trained
        self._original: Content | None = None
        self._clock = itertools.count(1)

    def publish(self, name: str, model: TrainableModel) -> None:
        """Makes the tenant's weights as they are now sampleable under an ephemeral name; no disk is touched."""
        if model.lora is None:
            self._keep(name, self.models.content(model, optimizer=False))
            return
        self.leader.call("freeze_adapter", name, model.model_id)
        self._resident[name] = _Resident(used=next(self._clock))
        self._keep(name, self.models.content(model, optimizer=False))
        self._make_room()

    def _keep(self, name: str, content: Content) -> None:
        self._host[name] = content
        while sum(map(num_bytes, self._host.values())) > HOST_BYTES and len(self._host) > 1:
            old, weights = self._host.popitem(last=False)
            try:
                self.checkpoints.spill(old, weights)
            except OSError as error:
                # Nobody can be told until they ask for it; the oldest is the one least likely to be asked for.
                log.warning("the snapshot %s is lost: host memory is full and the disk refuses it: %s", old, error)
            else:
                self._spilled.add(old)

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
            self.checkpoints.drop_spilled(name)
        self._evict(name)

    def crowded(self, name: str) -> bool:
        """Whether so many others are being drawn from that `name`, which the ranks do not hold, has to wait."""
        return name not in self._resident and sum(one.uses > 0 for one in self._resident.values()) >= RESIDENT

    def acquire(self, name: str) -> None:
        """Makes sure that the ranks hold `name`, and that they keep it until `release`. Raises RequestFailed,
        UserError."""
        if name not in self._resident:
            content = self._find(name)
            lora = content.facts.lora
            if lora is None:
                raise RequestFailed(
                    f"{name} holds all parameters of a model; start the server with service.full_parameters=true"
                )
            self.leader.call("load_adapter", name, lora, BASE, adapter_weights(content))
            self._resident[name] = _Resident()
        entry = self._resident[name]
        entry.uses, entry.used = entry.uses + 1, next(self._clock)
        self._make_room()

    def _find(self, name: str) -> Content:
        if name in self._host:
            return self._host[name]
        if name in self._spilled:
            return self.checkpoints.read_spilled(name)
        if name.startswith("tinker://"):
            path, _, version = name.rpartition("#")
            return self.checkpoints.read_version(path, version)
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
            self._original = self.models.base_content()
        content = self._find(name) if name else self._original
        if content.facts.lora is not None:
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
