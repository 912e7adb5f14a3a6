"""Rows that share beginnings give the values and gradients that they give apart."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small import SPEC, make_engine

from skyrl.algorithms.prefixes import families, shared_prefixes
from skyrl.engine import ModelSpec
from skyrl.models.packed import spread
from skyrl.planner.plan import make_value_spec
from skyrl.types import Datum, LoraSpec

APART = "batch.share_prefixes=false"


def make_groups(groups=2, size=4, prompt=9, seed=0):
    """Samples of prompts as the trainer makes them, of lengths of their own; one row is another's beginning."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(groups):
        start = rng.integers(4, 90, prompt)
        for number in range(size):
            ids = np.concatenate([start, rng.integers(4, 90, 2 + number)])
            ids = ids if number != 2 else rows[-1].tokens  # what an earlier sample says already, cut short
            length = len(ids) - 1
            mask = np.arange(length) >= prompt - 1
            rows.append(
                Datum(
                    tokens=ids[:-1],
                    targets=ids[1:],
                    weights=mask * rng.random(length),
                    sampling_logprobs=-4.0 - rng.random(length),
                    advantages=rng.normal(size=length),
                    values=rng.normal(size=length),
                    returns=rng.normal(size=length),
                    reference=-4.0 - rng.random(length),
                )
            )
    return rows


def outcome(rows, spec, *options):
    """Outputs of the rows, metrics, and the gradient, of an engine in float64 with these options."""
    engine = make_engine("auto", "float64", *options)
    if spec.base:
        engine.create("base", ModelSpec(trainable=False))
    engine.create("other", spec)
    if spec.base:  # B starts at 0, and A then has no gradient
        engine.models["other"].strategy.flat.normal_(std=0.02, generator=torch.Generator().manual_seed(3))
    loss = make_value_spec(engine.cfg.algorithm.critic) if spec.head == "value" else SPEC
    out = engine.forward_backward(rows, loss, model="other")
    return np.concatenate(out.values or out.logprobs), out.metrics, engine.models["other"].strategy._grad.clone()


SPECS = {
    "policy": ModelSpec(),
    "critic": ModelSpec(head="value"),
    "adapter": ModelSpec(lora=LoraSpec(rank=2, seed=1, unembed=True), base="base"),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("budget", [8192, 60])
def test_values_and_gradients_are_those_of_rows_apart(spec, budget):
    rows = make_groups()
    size = f"batch.max_tokens_per_microbatch={budget}"
    apart, shared = outcome(rows, spec, size, APART), outcome(rows, spec, size)
    np.testing.assert_allclose(shared[0], apart[0], rtol=0, atol=1e-12)
    assert torch.linalg.norm(shared[2] - apart[2]) <= 1e-12 * torch.linalg.norm(apart[2])
    assert torch.linalg.norm(apart[2]) > 0
    for key in apart[1].keys() - {"microbatches:max"}:
        assert shared[1][key] == pytest.approx(apart[1][key], rel=1e-9, abs=1e-12), key


def test_a_row_is_computed_once_as_far_as_the_one_before_goes():
    rows = [
        Datum(np.array(ids[:-1]), np.array(ids[1:]), np.ones(len(ids) - 1))
        for ids in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7], [1, 2, 9])
    ]
    found = shared_prefixes(rows)
    assert found["place_T"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1]
    assert found["distinct_U"].tolist() == [0, 1, 2, 3, 8]
    assert found["pair_T"].tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 5, 0, 6]  # the same beginning, another target
    assert found["scored_P"].tolist() == [0, 1, 2, 3, 7, 8, 10]
    assert shared_prefixes(rows[:1]) == {} == shared_prefixes([rows[0], replace(rows[2], tokens=rows[2].tokens + 1)])


def test_samples_of_a_prompt_share_a_micro_batch():
    rows = make_groups(groups=3, size=2, prompt=20)
    assert families(rows, ["policy"] * 6, 100) == [[0, 1], [2, 3], [4, 5]]
    assert families(rows, ["a", "b", *["a"] * 4], 100) == [[0], [1], [2, 3], [4, 5]]
    assert families(rows, ["policy"] * 6, 30) == [[0], [1], [2], [3], [4], [5]]  # no more than the budget
    mixed = [one for pair in zip(rows, rows, strict=True) for one in pair]  # a model's rows among another's
    assert families(mixed, ["a", "b"] * 6, 100) == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_gradient_of_what_is_taken_many_times_is_the_sum(dtype):
    torch.manual_seed(0)
    index = torch.tensor([0, 1, 2, 3, 0, 1, 4, 0, 1, 2, 5, 1])
    x = torch.randn(6, 2, 3, dtype=dtype, requires_grad=True)
    given = torch.randn(len(index), 2, 3, dtype=dtype)
    out = spread(x, index)
    assert torch.equal(out, x[index])
    out.backward(given)
    want = torch.zeros(6, 2, 3, dtype=torch.float64).index_add_(0, index, given.double())
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, want.to(dtype), rtol=1e-14 if dtype == torch.float64 else 0, atol=0)


def test_fewer_tokens_go_through_the_layers():
    engine = make_engine("auto", "float32")
    seen = []
    layer = engine.models["policy"].strategy.module.layers()[0]
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    rows = make_groups(groups=2, size=4, prompt=20)
    engine.score(rows, 1.0)
    distinct = {tuple(row.tokens[: n + 1]) for row in rows for n in range(len(row.tokens))}
    assert seen == [len(distinct)] and len(distinct) < sum(len(row.tokens) for row in rows) / 2
