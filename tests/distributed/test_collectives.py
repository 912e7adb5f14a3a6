"""Small agreements on 3 ranks and on one: order, errors on every rank, exact sums."""

import socket
import time

import numpy as np
import pytest
from gloo import run_ranks
from small import small_config

from skyrl.distributed import peers
from skyrl.distributed.collectives import (
    MetricSums,
    agree,
    all_reduce_sum,
    broadcast_object,
    exchange,
    gather_objects,
    gather_to_leader,
    on_leader,
    scatter_objects,
)
from skyrl.distributed.init import init_distributed
from skyrl.types import UserError


def text_of(call):
    try:
        return call()
    except UserError as error:
        return f"refused: {error}"


def fail(text):
    raise UserError(text)


def body():
    world = init_distributed(small_config())
    rank, size = world.rank, world.size
    out = {
        "sum": all_reduce_sum(world, np.array([rank + 1, 0.1])).tolist(),
        "gather": gather_objects(world, {"rank": rank}),
        "broadcast": broadcast_object(world, f"from {rank}"),
        "leader": on_leader(world, lambda: f"made by {rank}"),
        "leader fails": text_of(lambda: on_leader(world, lambda: fail(f"no disk on {rank}"))),
        "agree": text_of(lambda: agree(world, lambda: rank * 10)),
        "one fails": text_of(lambda: agree(world, lambda: fail("rank 1 says no") if rank == 1 else rank)),
        "two fail": text_of(lambda: agree(world, lambda: fail(f"rank {rank} says no") if rank else rank)),
        "exchange": exchange(world, [[f"{rank} to {to}"] * (rank + to) for to in range(size)]),
        "arrays": exchange(world, [[np.full(200_000 * rank + to, rank)] for to in range(size)]),
        "order": [gather_objects(world, i)[-1] for i in range(3)],  # nobody is out of step after the failures
    }
    tally = MetricSums()
    tally.add("a:sum", 0.1 * (rank + 1))
    tally.add("b:max", float(-rank))
    tally.add("b:min", float(-rank))
    if rank:
        tally.add("c:mean", 5.0 * rank, 2.0)
    tally.add("d:mean", 0.0, 0.0)
    out["tally"] = tally.result(world)
    return out


@pytest.mark.ranks
def test_three_ranks_agree():
    results = run_ranks(3, body)
    for rank, out in enumerate(results):
        assert out["sum"] == pytest.approx([6.0, 0.3], rel=1e-15)
        assert out["sum"] == results[0]["sum"]
        assert out["gather"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert out["broadcast"] == "from 0" and out["leader"] == "made by 0"
        assert out["leader fails"] == "refused: no disk on 0"
        assert out["agree"] == rank * 10
        assert out["one fails"] == out["two fail"] == f"refused: rank 1 on {socket.gethostname()}: rank 1 says no"
        assert out["exchange"] == [[f"{source} to {rank}"] * (source + rank) for source in range(3)]
        for source, (array,) in enumerate(out["arrays"]):
            assert array.shape == (200_000 * source + rank,) and (array == source).all()
        assert out["order"] == [0, 1, 2]
        assert out["tally"] == {
            "a:sum": pytest.approx(0.6), "b:max": 0.0, "b:min": -2.0, "c:mean": 15.0 / 4.0,
        }  # fmt: skip
        assert out["tally"] == results[0]["tally"]


def test_one_rank_needs_no_process_group():
    out = body()
    assert out["gather"] == [{"rank": 0}] and out["leader fails"] == "refused: no disk on 0"
    assert out["exchange"] == [[]] and out["agree"] == 0
    assert out["tally"] == {"a:sum": 0.1, "b:max": 0.0, "b:min": 0.0}


def test_a_metric_without_a_reduction_is_our_bug():
    with pytest.raises(AssertionError, match="'loss' does not end in"):
        MetricSums().add("loss", 1.0)


def _quiet_leader():
    world = init_distributed(small_config())
    peers.current.set_limits(0.0, 2.0)
    for _ in range(10):
        if world.is_leader:
            time.sleep(0.5)
        scatter_objects(world, ["nothing", "nothing"] if world.is_leader else None)
        gather_to_leader(world, world.rank)
    return world.rank


@pytest.mark.ranks
def test_who_waits_for_one_quiet_word_after_another_does_not_hang():
    """A rank of an idle server: it stands at the same line for hours, and hears from rank 0 in time each time."""
    assert run_ranks(2, _quiet_leader) == [0, 1]
