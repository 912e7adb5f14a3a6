"""Random traffic through the scheduler alone: every invariant after every step, nothing left behind."""

import numpy as np
import pytest

from skyrl.sampler.blocks import BlockPool
from skyrl.sampler.runners.base import Sequence
from skyrl.sampler.scheduler import Scheduler
from skyrl.types import SamplingParams
from tests.sampler.tools import check_pool


def make(order, context, limit, cache_key=0):
    tokens = np.zeros(limit, dtype=np.int64)
    tokens[: len(context)] = context
    room = np.zeros(limit - len(context), dtype=np.float32)
    return Sequence(order, str(order), SamplingParams(1), tokens, len(context), len(context), room, cache_key=cache_key)


def check(scheduler, chunk):
    pool = scheduler.pool
    check_pool(pool)
    live = [*scheduler.running, *scheduler._prefilling]
    assert [s.order for s in scheduler.running] == sorted(s.order for s in scheduler.running)
    siblings = [t for some in scheduler._siblings.values() for t in some]
    assert len(live) + len(siblings) <= scheduler.max_running
    holders = np.zeros(pool.num_blocks + 1, dtype=int)
    for sequence in live + siblings:
        assert len(set(sequence.blocks)) == len(sequence.blocks)
        for block in sequence.blocks:
            holders[block] += 1
    assert holders.tolist() == pool._holders
    states = sorted([*(s.state for s in live + siblings), *scheduler._free_states])
    assert states == list(range(1, scheduler.max_running + 1))
    # a block that several hold is never written: it is a whole block of tokens already computed
    for sequence in scheduler.running:
        written = (sequence.length - 1) // pool.block_tokens
        assert written >= len(sequence.blocks) or holders[sequence.blocks[written]] == 1


class Written:
    recurrent = False
    """What a cache would hold: (cache_key, token, position) per place of each block."""

    def __init__(self, size):
        self._size, self._cells, self._states = size, {}, {}

    def places(self, sequence, start, end):
        return [(sequence.blocks[i // self._size], i % self._size) for i in range(start, end)]

    def write(self, sequence, start, end):
        for i, place in zip(range(start, end), self.places(sequence, start, end), strict=True):
            self._cells[place] = (sequence.cache_key, *map(int, sequence.tokens[: i + 1]))
        if self.recurrent:  # a state goes on from the tokens before, and is of these alone
            before = (sequence.cache_key, *map(int, sequence.tokens[:start]))
            assert start == 0 or self._states[sequence.state] == before
            self._states[sequence.state] = (sequence.cache_key, *map(int, sequence.tokens[:end]))

    def check(self, sequence, end):
        """Everything that a sequence attends to was computed for its very tokens and adapter."""
        for i, place in enumerate(self.places(sequence, 0, end)):
            assert self._cells.get(place) == (sequence.cache_key, *map(int, sequence.tokens[: i + 1]))

    def copy(self, fork):
        for at in range(self._size if fork.copy else 0):
            source, target = ((block, at) for block in fork.copy)
            self._cells[target] = self._cells.get(source)
        if fork.states:
            self._states[fork.states[1]] = self._states.get(fork.states[0])


def play(scheduler, written):
    """One step, as the sampler does it: the sequences that draw a token."""
    chunks = scheduler.prefill()
    if not chunks:
        preempted = scheduler.allocate_slots(lambda sequence: None) if scheduler.running else []
        assert all(s.waiting and not s.blocks for s in preempted)
        assert all(len(s.blocks) * scheduler.pool.block_tokens >= s.length for s in scheduler.running)
        for sequence in scheduler.running:
            written.write(sequence, sequence.length - 1, sequence.length)
            written.check(sequence, sequence.length)
        return list(scheduler.running), bool(scheduler.running)
    assert sum(p.end - p.start for p in chunks) <= scheduler.max_prefill_tokens and all(p.end > p.start for p in chunks)
    for chunk in chunks:  # everything before the chunk is in its blocks, and its own tokens have room
        assert chunk.start == chunk.sequence.computed
        written.write(chunk.sequence, chunk.start, chunk.end)
    for chunk in chunks:
        written.check(chunk.sequence, chunk.end)
    forks = [fork for group in scheduler.prefill_done(chunks) for fork in group]
    for fork in forks:
        written.copy(fork)
        written.check(fork.sequence, fork.sequence.length)
    return [fork.sequence for fork in forks], True


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "share, cancels, recurrent",
    [(True, 0.0, False), (False, 0.0, False), (True, 0.3, False), (False, 0.3, False), (True, 0.3, True)],
)
def test_random_traffic(seed, share, cancels, recurrent):
    """Arrivals of several adapters, endings, cancelled requests in every state; what a sequence attends to was always
    computed for its tokens and its adapter."""
    rng = np.random.default_rng(seed)
    size, chunk = int(rng.integers(1, 6)), int(rng.integers(3, 30))
    scheduler = Scheduler(
        BlockPool(int(rng.integers(-(-40 // size), 3 * -(-40 // size))), size),
        max_running=int(rng.integers(1, 9)), max_prefill_tokens=chunk, share=share, recurrent=recurrent,
    )  # fmt: skip
    roots = [0, scheduler.pool.new_cache_key(), scheduler.pool.new_cache_key()][: 1 + seed % 3]
    contexts = [rng.integers(0, 2, rng.integers(1, 20)) for _ in range(3)]
    contexts += [np.concatenate([context, [1, 0, 1]]) for context in contexts]  # beginnings of others
    waiting = [make(i, contexts[rng.integers(6)], 40, roots[rng.integers(len(roots))]) for i in range(60)]
    goals = {s.order: int(rng.integers(s.length + 1, 41)) for s in waiting}
    written, live = Written(size), {}
    written.recurrent = recurrent
    added = idle = cancelled = 0
    while added < 60 or live:
        for _ in range(int(rng.integers(0, 4))):
            if added < 60:
                scheduler.add(waiting[added])
                live[added] = waiting[added]
                added += 1
        assert scheduler.unfinished() == len(live)
        if live and rng.random() < cancels:
            scheduler.cancel(live.pop(rng.choice(list(live))))
            cancelled += 1
            check(scheduler, chunk)
        drew, moved = play(scheduler, written)
        for sequence in drew:
            sequence.tokens[sequence.length] = rng.integers(0, 2)
            sequence.length += 1
            if sequence.length == goals[sequence.order]:
                scheduler.finish(sequence)
                del live[sequence.order]
        check(scheduler, chunk)
        idle = 0 if moved or not live else idle + 1
        assert idle < 5, "nothing moves"
    assert scheduler.pool.held() == 0 and scheduler.unfinished() == 0 and (cancelled > 5) == (cancels > 0)
    if not share:
        assert scheduler.counts.reused_tokens == 0 and not scheduler.pool._content


def started(*contexts, chunk=4):
    """A scheduler of blocks of 2 tokens with these sequences queued and one step of prefill done."""
    scheduler, written = Scheduler(BlockPool(40, 2), max_running=9, max_prefill_tokens=chunk, share=True), Written(2)
    sequences = [make(order, context, 20) for order, context in enumerate(contexts)]
    for sequence in sequences:
        scheduler.add(sequence)
    play(scheduler, written)
    return scheduler, written, sequences


def test_a_cancelled_leader_hands_its_prefill_to_its_twin():
    scheduler, written, (leader, sibling, other) = started([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7], [9])
    blocks = list(leader.blocks)
    scheduler.cancel(leader)
    assert sibling.blocks == blocks and sibling.computed == 4 and not leader.blocks
    drew, _ = play(scheduler, written)
    assert drew == [sibling, other] and scheduler.counts.prefill_tokens == 8


def test_what_a_cancelled_leader_has_not_computed_is_computed_by_others():
    scheduler, written, (leader, short, long) = started([*range(10)], [0, 1, 2, 3, 4, 5, 0], [*range(8), 0], chunk=4)
    scheduler.max_prefill_tokens = 30
    scheduler.prefill()  # admits the others: both count on blocks that the leader has announced
    assert (leader.computed, short.computed, long.computed) == (4, 6, 8)
    scheduler.cancel(leader)
    assert (short.computed, long.computed) == (4, 6)  # 4 and 5 once, for both
    check(scheduler, 30)
    drew, _ = play(scheduler, written)
    assert drew == [short, long] and scheduler.counts.prefill_tokens == 4 + 3 + 3
    assert len(scheduler.pool.longest_cached_prefix(np.arange(10))) == 4


def test_what_a_cancelled_leader_has_not_computed_is_not_found():
    scheduler, written, (leader,) = started([*range(10)], chunk=5)
    scheduler.cancel(leader)
    assert scheduler.pool.longest_cached_prefix(np.arange(10)) == [1, 2] and scheduler.pool.held() == 0
    check_pool(scheduler.pool)


def test_cancel_when_queued_and_when_running():
    scheduler, written, (one, two) = started([1, 2, 3], [4, 5, 6, 7], chunk=3)
    scheduler.max_running = 1
    assert scheduler.running == [one]
    one.length += 1
    scheduler.cancel(two)
    scheduler.cancel(one)
    assert scheduler.unfinished() == 0 and scheduler.pool.held() == 0 and play(scheduler, written) == ([], False)
    assert len(scheduler.pool.longest_cached_prefix(np.array([1, 2, 3, 0]))) == 1  # what was computed stays findable


def test_the_youngest_is_preempted_and_comes_back_first():
    scheduler = Scheduler(BlockPool(4, 2), max_running=4, max_prefill_tokens=100, share=True)
    for order in range(3):
        scheduler.add(make(order, [order, 9], 8))
    drawn = [f.sequence for group in scheduler.prefill_done(scheduler.prefill()) for f in group]
    assert [s.order for s in drawn] == [0, 1]  # the third would leave no spare block
    for sequence in drawn:
        sequence.length += 1
    assert scheduler.allocate_slots(lambda sequence: None) == []
    for _ in range(2):
        for sequence in drawn:
            sequence.length += 1
    assert [s.order for s in scheduler.allocate_slots(lambda sequence: None)] == [1]
    assert [s.order for s in scheduler.running] == [0] and scheduler.counts.preemptions == 1
    scheduler.finish(scheduler.running[0])
    assert [p.sequence.order for p in scheduler.prefill()][0] == 1


def test_a_common_beginning_is_shared_within_one_step():
    scheduler = Scheduler(BlockPool(20, 4), max_running=4, max_prefill_tokens=100, share=True)
    scheduler.add(make(0, [*range(8), 1], 12))
    scheduler.add(make(1, [*range(8), 2, 3], 12))
    one, two = scheduler.prefill()
    assert (one.start, two.start) == (0, 8) and one.sequence.blocks[:2] == two.sequence.blocks[:2]
