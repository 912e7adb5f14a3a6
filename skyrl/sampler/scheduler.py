"""Who runs next: admission, prefill in chunks, growth and preemption. Decides with numbers only; computes nothing.

Order is that of arrival everywhere. Sequences with equal tokens are prefilled once: the first leads, the others (its
siblings) wait beside it and are forked from it when it is done. When blocks run out, the youngest running sequence
gives its blocks back and later starts again from its tokens, the drawn ones included. Keys and values depend on the
adapter, so only sequences of one adapter share anything.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from skyrl.sampler.blocks import BlockPool
from skyrl.sampler.runners.base import PrefillChunk, Sequence


@dataclass
class Fork:
    """A sibling that takes over a prefilled context. copy: (from, to) block of the unfinished last block, or None;
    states: the leader's and its own."""

    sequence: Sequence
    copy: tuple[int, int] | None
    states: tuple[int, int] | None


@dataclass
class Counts:
    """What happened since the numbers were last taken."""

    prefill_tokens: int = 0
    reused_tokens: int = 0
    preemptions: int = 0


class Scheduler:
    """Queue and running set of one sampler.

    `max_prefill_tokens` bounds one prefill step; `share` False switches off every reuse (siblings included).
    `recurrent`: layers keep states, and without the state of where they end, cached blocks are of no use: siblings are
    forked, and nothing else is reused.
    """

    def __init__(
        self, pool: BlockPool, *, max_running: int, max_prefill_tokens: int, share: bool, recurrent: bool = False
    ) -> None:
        self.pool, self.max_running, self.max_prefill_tokens, self.share = pool, max_running, max_prefill_tokens, share
        self._find = share and not recurrent  # whether blocks are found again by their content
        self._free_states = list(range(max_running, 0, -1))
        self.running: list[Sequence] = []  # by order
        self.counts = Counts()
        self._heap: list[Sequence] = []  # waiting; may hold stale entries of sequences that were taken as siblings
        self._waiting_by_content: dict[tuple[int, bytes], list[Sequence]] = {}  # waiting sequences by content
        self._num_waiting = 0
        self._prefilling: list[Sequence] = []
        self._siblings: dict[int, list[Sequence]] = {}  # order of the leader -> its siblings

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence, new or preempted."""
        sequence.waiting, sequence.computed, sequence.blocks = True, 0, []
        heapq.heappush(self._heap, sequence)
        self._waiting_by_content.setdefault(self._content(sequence), []).append(sequence)
        self._num_waiting += 1

    def unfinished(self) -> int:
        """Sequences waiting, prefilling or running."""
        siblings = sum(len(siblings) for siblings in self._siblings.values())
        return self._num_waiting + len(self._prefilling) + siblings + len(self.running)

    def prefill(self) -> list[PrefillChunk]:
        """Admits what fits and returns the chunks of the next prefill step; [] when there is nothing to prefill."""
        room = self.max_prefill_tokens - sum(s.length - s.computed for s in self._prefilling)
        while room > 0:
            sequence = self._admit()
            if sequence is None:
                break
            room -= sequence.length - sequence.computed
        chunks, left = [], self.max_prefill_tokens
        for sequence in self._prefilling:
            if left == 0:
                break
            end = min(sequence.length, sequence.computed + left)
            chunks.append(PrefillChunk(sequence, sequence.computed, end))
            left -= end - sequence.computed
        return chunks

    def prefill_done(self, chunks: list[PrefillChunk]) -> list[list[Fork]]:
        """Notes a prefill step as done. For each complete chunk: the sequences that draw from its logits."""
        forks = []
        for chunk in chunks:
            leader = chunk.sequence
            self.counts.prefill_tokens += chunk.end - leader.computed
            leader.computed = chunk.end
            if not chunk.complete:
                continue
            self._prefilling.remove(leader)
            forks.append(
                [Fork(leader, None, None)]
                + [self._fork(leader, sibling) for sibling in self._siblings.pop(leader.order)]
            )
            self.running += [fork.sequence for fork in forks[-1]]
        self.running.sort()
        return forks

    def allocate_slots(self, keep: Callable[[Sequence], None]) -> list[Sequence]:
        """Gives every running sequence the block its newest token needs; returns the ones preempted for it, each of
        which `keep` was told of while it had its blocks."""
        size, preempted = self.pool.block_tokens, []
        for sequence in list(self.running):
            if sequence.length <= len(sequence.blocks) * size or sequence.waiting:
                continue
            while self.pool.available() == 0 and not sequence.waiting:
                youngest = self.running.pop()
                keep(youngest)
                self._release(youngest)
                self.add(youngest)
                self.counts.preemptions += 1
                preempted.append(youngest)
            if not sequence.waiting:
                sequence.blocks += self.pool.allocate(1)
        return preempted

    def finish(self, sequence: Sequence) -> None:
        """Takes a running sequence out; its blocks stay findable until they are needed."""
        self.running.remove(sequence)
        self._release(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Takes an unfinished sequence out, wherever it is. A running one must hold all that was drawn."""
        leader = next((s for s in self._prefilling if sequence in self._siblings[s.order]), None)
        if sequence.waiting:
            self._unqueue(sequence)
        elif leader is not None:
            self._siblings[leader.order].remove(sequence)
            self._give_back(sequence)
        elif sequence in self._prefilling:
            self._cancel_leader(sequence)
        else:
            self.finish(sequence)

    def _cancel_leader(self, leader: Sequence) -> None:
        """Hands a started prefill to the first sibling; without one, to whoever shares blocks of it."""
        place, siblings = self._prefilling.index(leader), self._siblings.pop(leader.order)
        if siblings:
            heir = siblings.pop(0)
            heir.blocks, leader.blocks = leader.blocks, heir.blocks
            heir.state, leader.state = leader.state, heir.state
            heir.computed = leader.computed
            self._prefilling[place], self._siblings[heir.order] = heir, siblings
        else:
            self._leave_unfinished(leader, self._prefilling[place + 1 :])
            self._prefilling.remove(leader)
        self._give_back(leader)

    def _leave_unfinished(self, leader: Sequence, others: list[Sequence]) -> None:
        """The blocks that `leader` has announced and not computed: the first of the others that counts on one computes
        it, what nobody counts on is withdrawn."""
        size = self.pool.block_tokens
        missing = set(leader.blocks[leader.computed // size :])
        for other in others:
            first = next((i for i, block in enumerate(other.blocks) if block in missing), None)
            if first is not None and first * size < other.computed:
                self.counts.reused_tokens -= other.computed - first * size
                other.computed = first * size
                missing.difference_update(other.blocks)
        self.pool.uncache(sorted(missing))

    def _unqueue(self, sequence: Sequence) -> None:
        """Out of the waiting ones; the heap drops its entry later."""
        content = self._content(sequence)
        self._waiting_by_content[content].remove(sequence)
        if not self._waiting_by_content[content]:
            del self._waiting_by_content[content]
        sequence.waiting, self._num_waiting = False, self._num_waiting - 1

    def _content(self, sequence: Sequence) -> tuple[int, bytes]:
        return sequence.cache_key, sequence.tokens[: sequence.length].tobytes()

    def _release(self, sequence: Sequence) -> None:
        if self._find:  # the newest token was drawn but never computed
            self.pool.cache_full_blocks(sequence.tokens[: sequence.length - 1], sequence.blocks, sequence.cache_key)
        self._give_back(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        self._free_states.append(sequence.state)
        sequence.blocks, sequence.state = [], 0

    def _free_places(self) -> int:
        siblings = sum(len(siblings) for siblings in self._siblings.values())
        return self.max_running - len(self.running) - len(self._prefilling) - siblings

    def _admit(self) -> Sequence | None:
        """The next waiting sequence with blocks for its tokens, made a leader; None when none fits or none waits."""
        while self._heap and not self._heap[0].waiting:
            heapq.heappop(self._heap)
        if not self._heap or self._free_places() < 1:
            return None
        leader, size = self._heap[0], self.pool.block_tokens
        tokens = leader.tokens[: leader.length]
        known = (
            self.pool.longest_cached_prefix(tokens[:-1], leader.cache_key) if self._find else []
        )  # the last token is computed for its logits
        held = self.pool.share(known)
        need = self.pool.blocks_for(leader.length) - len(known)
        # one spare block per running sequence, or admission and preemption would take turns
        spare = len(self.running) + len(self._prefilling)
        if self.pool.available() < need + (spare if spare else 0):
            self.pool.release(held)
            return None
        heapq.heappop(self._heap)
        leader.state = self._free_states.pop()
        leader.blocks, leader.computed = held + self.pool.allocate(need), len(known) * size
        self.counts.reused_tokens += leader.computed
        siblings = self._take(leader)
        if self._find:
            self.pool.cache_full_blocks(tokens, leader.blocks, leader.cache_key)
        self._prefilling.append(leader)
        self._siblings[leader.order] = siblings
        return leader

    def _take(self, leader: Sequence) -> list[Sequence]:
        """Takes the leader, and the siblings that there is room for, out of the queue."""
        content = self._content(leader)
        alike = self._waiting_by_content[content]
        alike.remove(leader)
        leader.waiting, self._num_waiting = False, self._num_waiting - 1
        tail = 1 if leader.length % self.pool.block_tokens else 0
        siblings: list[Sequence] = []
        places = self._free_places() - 1
        for sibling in sorted(alike) if self.share else []:
            spare = len(self.running) + len(self._prefilling) + len(siblings) + 1
            if len(siblings) >= places or self.pool.available() < tail + spare:
                break
            sibling.waiting, self._num_waiting = False, self._num_waiting - 1
            sibling.blocks, sibling.state = self.pool.allocate(tail), self._free_states.pop()
            alike.remove(sibling)
            siblings.append(sibling)
        if not alike:
            del self._waiting_by_content[content]
        return siblings

    def _fork(self, leader: Sequence, sibling: Sequence) -> Fork:
        whole = leader.length // self.pool.block_tokens
        copy = (leader.blocks[whole], sibling.blocks[0]) if sibling.blocks else None
        sibling.blocks = self.pool.share(leader.blocks[:whole]) + sibling.blocks
        self.counts.reused_tokens += sibling.length
        return Fork(sibling, copy, (leader.state, sibling.state))
