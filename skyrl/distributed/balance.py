"""Who computes which rows: equal work per rank, and micro-batches within a token budget, equally many per rank.

All decisions are made from global numbers by the same rule on every rank. They change speed, never results: the
engine only sums.
"""

from __future__ import annotations

import heapq
import math

from skyrl.distributed.collectives import exchange, gather_objects
from skyrl.distributed.init import World
from skyrl.envs import clock
from skyrl.types import Datum

SLOWDOWN = 1.5  # of a step of all that several clients draw, against one of a few sequences
AGAIN_SECONDS = 20.0  # after which a number of sequences whose step was too slow is tried again
RUNNING_PER_RANK = 512  # sequences handed to one rank's sampler; the rest waits, where turns are fair


def pack(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of rows per micro-batch: longest first, each into the fullest one it fits in (best fit decreasing).

    A row longer than the budget gets a micro-batch of its own. Inside a micro-batch indices rise.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if fits := [b for b, left in enumerate(room) if left >= lengths[index]]:
            best = min(fits, key=lambda b: (room[b], b))
            bins[best].append(index)
            room[best] -= lengths[index]
        else:
            bins.append([index])
            room.append(max(0, budget - lengths[index]))
    return [sorted(one) for one in bins]


def pack_by_model(lengths: list[int], models: list[str], budget: int, *, mix: bool) -> list[list[int]]:
    """Indices of rows per micro-batch. Without `mix` each model's rows are packed as if they were alone; with it a
    model's rows lie side by side in a micro-batch."""
    if mix:
        return [sorted(one, key=lambda i: (models[i], i)) for one in pack(lengths, budget)]
    owned = [[i for i, model in enumerate(models) if model == name] for name in sorted(set(models))]
    return [[own[i] for i in one] for own in owned for one in pack([lengths[i] for i in own], budget)]


def spread(lengths: list[list[int]]) -> list[list[tuple[int, int]]]:
    """For each rank the (source rank, index) of the rows it should compute, given every rank's row lengths.

    Longest row to the least loaded rank. Each rank's list is sorted by source.
    """
    rows = sorted(
        ((n, r, i) for r, part in enumerate(lengths) for i, n in enumerate(part)), key=lambda x: (-x[0], x[1:])
    )
    heap = [(0, rank) for rank in range(len(lengths))]
    out: list[list[tuple[int, int]]] = [[] for _ in lengths]
    for n, source, index in rows:
        load, rank = heapq.heappop(heap)
        out[rank].append((source, index))
        heapq.heappush(heap, (load + n, rank))
    return [sorted(part) for part in out]


def deal_by_length(world: World, lengths: list[int]) -> list[list[int]]:
    """For each rank the indices, rising, of the rows it should compute, when one rank has them all."""
    return [[index for _, index in part] for part in spread([lengths] + [[]] * (world.dp_size - 1))]


def rebalance(world: World, rows: list[Datum], slack: float = 1.1) -> list[Datum]:
    """The rows this rank should compute. Collective. Rows move only when the busiest rank has more than `slack` times
    the mean number of tokens; the set of rows over all ranks stays the same."""
    if world.size == 1:
        return rows
    lengths = gather_objects(world, [len(row.tokens) for row in rows])
    loads = [sum(part) for part in lengths]
    if max(loads) <= slack * sum(loads) / world.size:
        return rows
    outgoing = [[rows[index] for source, index in wanted if source == world.rank] for wanted in spread(lengths)]
    return [row for part in exchange(world, outgoing) for row in part]


class Pace:
    """How many sequences a rank may draw at once while several clients share it.

    On a GPU a step of hundreds takes about as long as one of a few; where it does not, as on a CPU, a client with many
    requests would make each token of all others that much slower. So the time of a step is measured, by load."""

    def __init__(self) -> None:
        # (seconds of a step, when last noted) of 2 ** (key - 1) to 2 ** key - 1 sequences; those below 4 are a few
        self._noted: dict[int, tuple[float, float]] = {}

    def note(self, load: int, seconds: float) -> None:
        """A step of so many sequences took so long."""
        key, now = max(load.bit_length(), 2), clock.now()
        before, at = self._noted.get(key, (seconds, -math.inf))
        weight = 1.0 if now - at >= AGAIN_SECONDS else 0.2 if seconds < before else 0.05  # one stall says little
        self._noted[key] = (before + weight * (seconds - before), now)

    def room(self) -> int:
        """The largest number whose step is not much slower than that of a few; twice the largest known one at most.
        What was too slow is not run any more, so it would be so for ever, had it been a stall: it is tried again."""
        least, now, size = min((seconds for seconds, _ in self._noted.values()), default=0.0), clock.now(), 2
        limit = SLOWDOWN * least
        known = {key: one for key, (one, at) in self._noted.items() if one <= limit or now - at < AGAIN_SECONDS}
        while 1 << size < RUNNING_PER_RANK and known.get(size + 1, 0.0) <= limit:
            size += 1
            if size not in known:
                break
        return (1 << size) - 1
