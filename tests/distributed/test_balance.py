"""Packing and spreading: nothing lost, budgets kept, loads even; and rows that move between real ranks."""

import numpy as np
import pytest
from gloo import run_ranks
from small import make_rows, small_config

from skyrl.distributed.balance import pack, rebalance, spread
from skyrl.distributed.init import init_distributed


def draw(seed):
    rng = np.random.default_rng(seed)
    return rng.integers(1, 100, rng.integers(0, 80)).tolist(), int(rng.integers(50, 400))


@pytest.mark.parametrize("seed", range(20))
def test_pack_keeps_every_row_once_and_the_budget(seed):
    lengths, budget = draw(seed)
    bins = pack(lengths, budget)
    assert sorted(i for one in bins for i in one) == list(range(len(lengths)))
    for one in bins:
        assert one == sorted(one)
        assert sum(lengths[i] for i in one) <= budget or len(one) == 1
    if bins:  # best fit decreasing: no two bins could have been one
        loads = sorted(sum(lengths[i] for i in one) for one in bins)
        assert len(loads) < 2 or loads[0] + loads[1] > budget
        assert len(bins) <= 1 + 11 / 9 * -(-sum(lengths) // budget) + sum(n > budget for n in lengths)


def test_pack_by_hand():
    assert pack([], 10) == []
    assert pack([30], 10) == [[0]]
    assert pack([3, 9, 7, 1], 10) == [[1, 3], [0, 2]]


@pytest.mark.parametrize("seed", range(20))
def test_spread_loses_nothing_and_evens_out(seed):
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(1, 100, rng.integers(0, 30)).tolist() for _ in range(int(rng.integers(1, 9)))]
    parts = spread(lengths)
    everything = [(r, i) for r, part in enumerate(lengths) for i in range(len(part))]
    assert sorted(x for part in parts for x in part) == everything
    loads = [sum(lengths[r][i] for r, i in part) for part in parts]
    longest = max((n for part in lengths for n in part), default=0)
    assert max(loads) - min(loads) <= longest  # greedy, longest first
    assert all(part == sorted(part) for part in parts)
    assert parts == spread(lengths)


def rebalance_body(counts):
    world = init_distributed(small_config())
    rows = make_rows(world.rank, counts[world.rank])
    for i, row in enumerate(rows):
        row.name = f"{world.rank}/{i}"
    names = [row.name for row in rows]
    moved = rebalance(world, rows)
    by_hand = {f"{r}/{i}": row for r in range(world.size) for i, row in enumerate(make_rows(r, counts[r]))}
    for row in moved:  # every field arrives as it was sent
        for field in ("tokens", "targets", "weights", "sampling_logprobs", "advantages", "reference"):
            np.testing.assert_array_equal(getattr(row, field), getattr(by_hand[row.name], field))
        assert row.old_logprobs is None and row.values is None
    return names, [row.name for row in moved], sum(len(row.tokens) for row in moved)


@pytest.mark.ranks
@pytest.mark.parametrize("counts", [(9, 1, 2), (0, 12, 0), (0, 0, 0)])
def test_rebalance_moves_rows_and_loses_none(counts):
    before, after, loads = zip(*run_ranks(3, rebalance_body, counts), strict=True)
    assert sorted(x for part in after for x in part) == sorted(x for part in before for x in part)
    if sum(counts):
        assert max(loads) - min(loads) <= 40
        assert after != before


def even_body():
    world = init_distributed(small_config())
    rows = make_rows(0, 6)
    return all(a is b for a, b in zip(rebalance(world, rows), rows, strict=True))


@pytest.mark.ranks
def test_rows_stay_where_loads_are_even():
    assert run_ranks(2, even_body) == [True, True]
