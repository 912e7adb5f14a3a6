"""Random traffic through the scheduler alone: every invariant after every step, nothing left behind."""

import numpy as np
import pytest

from skyrl.sampler.blocks import BlockPool
from skyrl.sampler.scheduler import Scheduler, Sequence
from skyrl.types import SamplingParams


def make(order, context, limit):
    tokens = np.zeros(limit, dtype=np.int64)
    tokens[: len(context)] = context
    room = np.zeros(limit - len(context), dtype=np.float32)
    return Sequence(order, str(order), SamplingParams(1), tokens, len(context), len(context), room)


def check(scheduler, chunk):
    pool = scheduler.pool
    pool.check()
    live = [*scheduler.running, *scheduler._prefilling]
    assert [s.order for s in scheduler.running] == sorted(s.order for s in scheduler.running)
    twins = [t for some in scheduler._twins.values() for t in some]
    assert len(live) + len(twins) <= scheduler.max_running
    holders = np.zeros(pool.num_blocks + 1, dtype=int)
    for sequence in live + twins:
        assert len(set(sequence.blocks)) == len(sequence.blocks)
        for block in sequence.blocks:
            holders[block] += 1
    assert holders.tolist() == pool._holders
    # a block that several hold is never written: it is a whole block of tokens already computed
    for sequence in scheduler.running:
        written = (sequence.length - 1) // pool.block_tokens
        assert written >= len(sequence.blocks) or holders[sequence.blocks[written]] == 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [True, False])
def test_random_traffic(seed, share):
    rng = np.random.default_rng(seed)
    size, chunk = int(rng.integers(1, 6)), int(rng.integers(3, 30))
    scheduler = Scheduler(
        BlockPool(int(rng.integers(-(-40 // size), 3 * -(-40 // size))), size),
        max_running=int(rng.integers(1, 9)), max_prefill_tokens=chunk, share=share,
    )  # fmt: skip
    contexts = [rng.integers(0, 2, rng.integers(1, 20)) for _ in range(6)]
    waiting = [make(i, contexts[rng.integers(6)], 40) for i in range(60)]
    goals = {s.order: int(rng.integers(s.length + 1, 41)) for s in waiting}
    added = finished = idle = 0
    while finished < 60:
        for _ in range(int(rng.integers(0, 4))):
            if added < 60:
                scheduler.add(waiting[added])
                added += 1
        assert scheduler.unfinished() == added - finished
        pieces = scheduler.prefill()
        drew = []
        if pieces:
            assert sum(p.end - p.start for p in pieces) <= chunk and all(p.end > p.start for p in pieces)
            for piece in pieces:  # everything before the piece is in its blocks, and its own tokens have room
                assert piece.start == piece.sequence.computed and len(piece.sequence.blocks) * size >= piece.end
            drew = [fork.sequence for group in scheduler.prefilled(pieces) for fork in group]
        elif scheduler.running:
            preempted = scheduler.grow()
            assert all(s.waiting and not s.blocks for s in preempted)
            assert all(len(s.blocks) * size >= s.length for s in scheduler.running)
            drew = list(scheduler.running)
        for sequence in drew:
            sequence.tokens[sequence.length] = rng.integers(0, 2)
            sequence.length += 1
            if sequence.length == goals[sequence.order]:
                scheduler.finish(sequence)
                finished += 1
        check(scheduler, chunk)
        idle = 0 if drew or pieces or added == finished else idle + 1
        assert idle < 5, "nothing moves"
    assert scheduler.pool.held() == 0 and scheduler.unfinished() == 0
    if not share:
        assert scheduler.counts.reused_tokens == 0 and not scheduler.pool._content


def test_the_youngest_is_preempted_and_comes_back_first():
    scheduler = Scheduler(BlockPool(4, 2), max_running=4, max_prefill_tokens=100, share=True)
    for order in range(3):
        scheduler.add(make(order, [order, 9], 8))
    drawn = [f.sequence for group in scheduler.prefilled(scheduler.prefill()) for f in group]
    assert [s.order for s in drawn] == [0, 1]  # the third would leave no spare block
    for sequence in drawn:
        sequence.length += 1
    assert scheduler.grow() == []
    for _ in range(2):
        for sequence in drawn:
            sequence.length += 1
    assert [s.order for s in scheduler.grow()] == [1]
    assert [s.order for s in scheduler.running] == [0] and scheduler.counts.preemptions == 1
    scheduler.finish(scheduler.running[0])
    assert [p.sequence.order for p in scheduler.prefill()][0] == 1


def test_a_common_beginning_is_shared_within_one_step():
    scheduler = Scheduler(BlockPool(20, 4), max_running=4, max_prefill_tokens=100, share=True)
    scheduler.add(make(0, [*range(8), 1], 12))
    scheduler.add(make(1, [*range(8), 2, 3], 12))
    one, two = scheduler.prefill()
    assert (one.start, two.start) == (0, 8) and one.sequence.blocks[:2] == two.sequence.blocks[:2]
