"""Block accounting: nothing lost, nothing shared by mistake, the right thing thrown away."""

import numpy as np
import pytest

from skyrl.sampler.blocks import BlockPool
from tests.sampler.tools import check_pool


def tokens(*values):
    return np.array(values, dtype=np.int64)


def test_allocates_until_empty_and_never_block_0():
    pool = BlockPool(5, 4)
    blocks = pool.allocate(5)
    assert sorted(blocks) == [1, 2, 3, 4, 5] and pool.available() == 0 and pool.held() == 5
    with pytest.raises(AssertionError, match="1 blocks asked for, 0 available"):
        pool.allocate(1)
    pool.release(blocks)
    assert pool.available() == 5 and pool.peak == 5
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(blocks[:1])


def test_shared_blocks_live_until_the_last_holder():
    pool = BlockPool(3, 4)
    blocks = pool.allocate(2)
    again = pool.share(blocks)
    pool.release(blocks)
    assert pool.held() == 2
    pool.release(again)
    assert pool.held() == 0


def test_lookup_finds_the_longest_beginning_in_whole_blocks():
    pool = BlockPool(8, 2)
    blocks = pool.allocate(3)
    pool.cache_full_blocks(tokens(1, 2, 3, 4, 5), blocks)
    assert pool.longest_cached_prefix(tokens(1, 2, 3, 4, 5, 6)) == blocks[:2]  # the third block is not whole
    assert pool.longest_cached_prefix(tokens(1, 2, 9, 4)) == blocks[:1]
    assert pool.longest_cached_prefix(tokens(3, 4)) == []  # the same tokens at another place are another content
    assert pool.longest_cached_prefix(tokens(1)) == []


def test_content_survives_release_and_goes_with_forget():
    pool = BlockPool(4, 2)
    blocks = pool.allocate(2)
    pool.cache_full_blocks(tokens(1, 2, 3, 4), blocks)
    pool.release(blocks)
    assert pool.available() == 4 and pool.longest_cached_prefix(tokens(1, 2, 3, 4)) == blocks
    held = pool.share(pool.longest_cached_prefix(tokens(1, 2, 3, 4)))
    assert pool.available() == 2
    pool.release(held)
    pool.reset_prefix_cache()
    assert pool.longest_cached_prefix(tokens(1, 2, 3, 4)) == [] and pool.available() == 4
    check_pool(pool)


def test_the_least_recently_used_goes_first_and_ends_before_beginnings():
    pool = BlockPool(4, 1)
    first, second = pool.allocate(2), pool.allocate(2)
    pool.cache_full_blocks(tokens(1, 2), first)
    pool.cache_full_blocks(tokens(3, 4), second)
    pool.release(first)
    pool.release(second)
    pool.allocate(1)
    assert pool.longest_cached_prefix(tokens(1, 2)) == first[:1] and pool.longest_cached_prefix(tokens(3, 4)) == second
    pool.allocate(2)
    assert pool.longest_cached_prefix(tokens(1, 2)) == [] and pool.longest_cached_prefix(tokens(3, 4)) == second[:1]


def test_content_published_again_after_its_beginning_was_evicted():
    pool = BlockPool(5, 1)
    ours = pool.allocate(1)
    pool.cache_full_blocks(tokens(1), ours)
    pool.release(ours)
    copy = pool.allocate(2)  # holds the same tokens and one more; block of the beginning is its own
    pool.cache_full_blocks(tokens(1, 2), copy)
    others = pool.allocate(pool.available())  # evicts the first one
    assert pool.longest_cached_prefix(tokens(1, 2)) == []
    pool.cache_full_blocks(tokens(1, 2), copy)
    assert pool.longest_cached_prefix(tokens(1, 2)) == copy
    pool.release(copy)
    pool.release(others)
    check_pool(pool)


def test_roots_are_apart_and_forgotten_alone():
    pool = BlockPool(6, 1)
    roots = [0, pool.new_cache_key(), pool.new_cache_key()]
    for root in roots:
        blocks = pool.allocate(2)
        pool.cache_full_blocks(tokens(1, 2), blocks, root)
        pool.release(blocks)
    assert len({tuple(pool.longest_cached_prefix(tokens(1, 2), root)) for root in roots}) == 3
    held = pool.share(pool.longest_cached_prefix(tokens(1), roots[1]))
    pool.reset_prefix_cache(roots[1])
    check_pool(pool)
    assert [len(pool.longest_cached_prefix(tokens(1, 2), root)) for root in roots] == [2, 0, 2]
    pool.release(held)
    check_pool(pool)
    assert len(pool._free) == 2 and pool.available() == 6


def test_withdrawn_blocks_are_not_found():
    pool = BlockPool(4, 2)
    blocks = pool.allocate(2)
    pool.cache_full_blocks(tokens(1, 2, 3, 4), blocks)
    pool.uncache(blocks[1:])
    assert pool.longest_cached_prefix(tokens(1, 2, 3, 4)) == blocks[:1]
    pool.release(blocks)
    check_pool(pool)


def test_random_use_keeps_the_books():
    rng = np.random.default_rng(0)
    pool = BlockPool(40, 2)
    held: list[tuple[np.ndarray, list[int]]] = []
    for _ in range(3000):
        if rng.random() < 0.55:
            wanted = rng.integers(0, 3, rng.integers(1, 14))
            known = pool.share(pool.longest_cached_prefix(wanted))
            for at, block in enumerate(known):  # what is found really was written for these tokens
                assert contents[block] == tuple(wanted[: 2 * at + 2])
            need = pool.blocks_for(len(wanted)) - len(known)
            if need > pool.available():
                pool.release(known)
                continue
            blocks = known + pool.allocate(need)
            for at in range(len(known), len(blocks)):
                contents[blocks[at]] = tuple(wanted[: 2 * at + 2])
            pool.cache_full_blocks(wanted, blocks)
            held.append((wanted, blocks))
        elif held:
            pool.release(held.pop(rng.integers(len(held)))[1])
        if rng.random() < 0.01:
            pool.reset_prefix_cache()
        check_pool(pool)
    for _, blocks in held:
        pool.release(blocks)
    assert pool.held() == 0


contents: dict[int, tuple] = {}
