"""Whatever lays the model out, it learns the same, draws the same, and goes on from any other's checkpoint."""

import pytest
from gloo import run_ranks
from kinds import KINDS, equal_body, link_body, needs_deepspeed
from small import distance, make_engine, weights_of

pytestmark = pytest.mark.ranks
LIMIT = 1e-5  # float32, five steps; most are below 1e-7
STEPS = 5


@pytest.fixture(scope="module")
def alone():
    """What one process learns and draws."""
    return equal_body(["single"], STEPS)["single"]


def hold_equal(found, alone):
    weights, norms, tokens = alone
    for ranks in found:
        for kind, (others, other_norms, drawn) in ranks.items():
            assert other_norms == pytest.approx(norms, rel=1e-5), kind
            assert drawn == tokens, kind
            if others:
                assert distance(others, weights) < LIMIT, kind


def test_the_run_is_one_that_could_tell(alone):
    start = weights_of(make_engine())
    weights, norms, tokens = alone
    assert distance(weights, start) > 1e-3 and len(set(norms)) == STEPS and min(norms) > 0.1  # each is clipped
    assert len({tuple(t) for t in tokens}) == len(tokens)


def test_four_ranks_of_fsdp_learn_what_one_does(alone):
    hold_equal(run_ranks(4, equal_body, [kind for kind in ("hsdp/2", "fsdp+all") if kind in KINDS], STEPS), alone)


@needs_deepspeed
def test_two_ranks_of_deepspeed_learn_what_one_does(alone):
    hold_equal(run_ranks(2, equal_body, ["zero2+optimizer", "zero3+all"], STEPS), alone)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_strategy_learns_what_one_process_does(alone, size):
    kinds = [kind for kind in KINDS if size % 2 == 0 or "hsdp" not in kind]
    hold_equal(run_ranks(size, equal_body, kinds, STEPS, timeout=280), alone)


def hold_chain(chain, folder):
    """Each link resumes from the one before it, on its own number of ranks, and makes one step."""
    weights, norms, _ = equal_body(["single"], len(chain))["single"]
    seen = []
    for number, (size, kind) in enumerate(chain):
        found, step_norms = run_ranks(size, link_body, kind, str(folder), number)[0]
        seen += step_norms
    assert seen == pytest.approx(norms, rel=1e-5)
    assert distance(found, weights) < LIMIT


@pytest.mark.slow  # make test has the same in whole runs: tests/system/test_strategies.py
def test_a_checkpoint_goes_from_ddp_to_hsdp_to_fsdp(tmp_path):
    hold_chain([(2, "ddp"), (4, "hsdp/2"), (2, "fsdp+all")], tmp_path)


@needs_deepspeed
def test_a_checkpoint_goes_through_zero3_and_back(tmp_path):
    hold_chain([(2, "fsdp"), (3, "zero3"), (1, "single")], tmp_path)


@needs_deepspeed
@pytest.mark.slow
def test_a_checkpoint_goes_through_every_strategy(tmp_path):
    sizes = [2, 4, 1, 2, 4, 2, 3, 2, 4, 1, 2, 4, 1]
    chain = list(zip(sizes, [kind for kind in KINDS if "hsdp" not in kind] + ["ddp", "hsdp/2", "single"], strict=True))
    hold_chain(chain, tmp_path)
