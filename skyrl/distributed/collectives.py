"""Small agreements between ranks over the CPU group. Everything sums or gathers; nothing averages.

Each function is collective: all ranks call it, in the same order, whatever they hold. On one rank they cost nothing.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from skyrl.distributed.init import World
from skyrl.distributed.phases import waiting
from skyrl.types import Metrics, UserError

T = TypeVar("T")


def all_reduce_sum(world: World, values: np.ndarray) -> np.ndarray:
    """The elementwise sum over ranks, float64, equal on every rank."""
    values = np.asarray(values, dtype=np.float64)
    if world.size == 1:
        return values
    tensor = torch.from_numpy(values.copy())
    with waiting("all_reduce_sum", values.nbytes):
        dist.all_reduce(tensor, group=world.control)
    return tensor.numpy()


def gather_objects(world: World, thing: T) -> list[T]:
    """What every rank gave, in rank order, on every rank."""
    if world.size == 1:
        return [thing]
    out: list[Any] = [None] * world.size
    with waiting("gather_objects"):
        dist.all_gather_object(out, thing, group=world.control)
    return out


def broadcast_object(world: World, thing: T) -> T:
    """Rank 0's thing, on every rank."""
    if world.size == 1:
        return thing
    box = [thing]
    with waiting("broadcast_object"):
        dist.broadcast_object_list(box, src=0, group=world.control)
    return box[0]


def scatter_objects(world: World, parts: list[T] | None) -> T:
    """This rank's part of what rank 0 gives, one part per rank in rank order; the others pass None."""
    if world.size == 1:
        assert parts is not None
        return parts[0]
    box: list[Any] = [None]
    with waiting("scatter_objects"):
        dist.scatter_object_list(box, parts, src=0, group=world.control)
    return box[0]


def gather_to_leader(world: World, thing: T) -> list[T]:
    """What every rank gave, in rank order, on rank 0; nothing on the others."""
    if world.size == 1:
        return [thing]
    out: list[Any] | None = [None] * world.size if world.is_leader else None
    with waiting("gather_to_leader"):
        dist.gather_object(thing, out, dst=0, group=world.control)
    return out or []


def on_leader(world: World, action: Callable[[], T]) -> T:
    """Runs `action` on rank 0 and gives its result to all. A UserError there is raised on every rank, so that no rank
    waits for one that has left."""
    result, error = None, None
    if world.is_leader:
        try:
            result = action()
        except UserError as failure:
            error = failure
    result, error = broadcast_object(world, (result, error))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def agree(world: World, action: Callable[[], T]) -> T:
    """Runs `action` on every rank; a UserError on any rank becomes a UserError on all of them (the lowest rank's). It
    says where, unless all ranks have it."""
    result, error = None, None
    try:
        result = action()
    except UserError as failure:
        error = (world.rank, socket.gethostname(), failure)
    if errors := [one for one in gather_objects(world, error) if one is not None]:
        rank, host, first = errors[0]
        raise first if len(errors) == world.size else type(first)(f"rank {rank} on {host}: {first}")
    return result  # type: ignore[return-value]


def exchange(world: World, outgoing: list[list[Any]]) -> list[list[Any]]:
    """outgoing[r] goes to rank r; returns what each rank sent here, in rank order. Any picklable things."""
    if world.size == 1:
        return outgoing
    payloads = [pickle.dumps(part, protocol=pickle.HIGHEST_PROTOCOL) for part in outgoing]
    sizes = gather_objects(world, [len(payload) for payload in payloads])
    incoming = [sizes[peer][world.rank] for peer in range(world.size)]
    received = torch.empty(sum(incoming), dtype=torch.uint8)
    sent = torch.frombuffer(bytearray(b"".join(payloads)), dtype=torch.uint8)
    with waiting("exchange", sent.nbytes):
        dist.all_to_all_single(received, sent, incoming, sizes[world.rank], group=world.control)
    return [pickle.loads(part.numpy().tobytes()) for part in received.split(incoming)]


class MetricSums:
    """Metrics of this rank in a form that can be summed: means as (sum, count).

    Keys end in their reduction. `result` merges all ranks' tallies in rank order, so that it is the same everywhere.
    """

    def __init__(self) -> None:
        self.values: dict[str, tuple[float, float]] = {}

    def add(self, key: str, value: float, count: float = 1.0) -> None:
        """Adds one observation; for ":mean" keys `value` is a sum over `count` things."""
        kind = key.rsplit(":", 1)[-1]
        old = self.values.get(key)
        if kind not in ("sum", "mean", "max", "min"):
            raise AssertionError(f"metric {key!r} does not end in :sum, :mean, :max or :min")
        if old is None:
            self.values[key] = (value, count)
        elif kind in ("sum", "mean"):
            self.values[key] = (old[0] + value, old[1] + count)
        else:
            self.values[key] = ((max if kind == "max" else min)(old[0], value), 1.0)

    def merge(self, other: dict[str, tuple[float, float]]) -> None:
        """Adds another tally's values."""
        for key, (value, count) in other.items():
            self.add(key, value, count)

    def merged(self) -> Metrics:
        """The metrics of what was added here. A mean over nothing is left out."""
        means = {key for key in self.values if key.endswith(":mean")}
        return {
            key: value / count if key in means else value
            for key, (value, count) in self.values.items()
            if key not in means or count > 0
        }

    def result(self, world: World) -> Metrics:
        """The global metrics, equal on every rank. Collective."""
        total = MetricSums()
        for part in gather_objects(world, self.values):
            total.merge(part)
        return total.merged()
