"""Several ranks in one process: threads that meet at a barrier in every all_reduce_sum, as a collective would."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

Work = Callable[[int, Callable[[np.ndarray], np.ndarray]], object]


def _over_ranks(num_ranks: int, work: Work) -> tuple[list, list[int]]:
    """Results, number of all_reduce_sum calls per rank. A rank that calls less often breaks the barrier: an error."""
    barrier = threading.Barrier(num_ranks, timeout=10)
    shared: list = [None] * num_ranks
    results: list = [None] * num_ranks
    calls = [0] * num_ranks
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        def all_reduce_sum(vector: np.ndarray) -> np.ndarray:
            assert vector.dtype == np.float64
            calls[rank] += 1
            shared[rank] = vector
            barrier.wait()
            total = np.sum(shared, axis=0)
            barrier.wait()
            return total

        try:
            results[rank] = work(rank, all_reduce_sum)
        except BaseException as error:  # noqa: B036 - handed to the test below
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results, calls


@pytest.fixture
def over_ranks() -> Callable[[int, Work], tuple[list, list[int]]]:
    return _over_ranks
