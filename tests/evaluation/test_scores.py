"""The numbers of an evaluation against slow ones from their definitions."""

import itertools
import math

import numpy as np
import pytest

from skyrl.evaluation.scores import (
    bootstrap_intervals,
    estimates,
    exact_interval,
    majority,
    pass_at_k,
    results_table,
    score_prompt,
    summary,
)
from skyrl.types import Episode, Prompt, Sample, Turn


def episode(text, correct, index=0, *, invalid="", **extra):
    turn = Turn(np.zeros(1, np.int64), Sample("", np.zeros(1, np.int64), np.zeros(1), "stop", 0), text=text)
    prompt = Prompt("p/0", "p", [{"role": "user", "content": "?"}], {"answer": "5", **extra})
    return Episode(prompt, index, [turn], float(correct), "stop", {"correct:mean": float(correct)}, invalid)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n, c in itertools.product(range(1, 8), range(8)):
        for k in range(1, n + 1) if c <= n else ():
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(one) for one in subsets]), abs=1e-12)


@pytest.mark.parametrize(
    ("answers", "correct", "value"),
    [
        (["5", "5.0", "7"], [1, 1, 0], 1.0),  # equal answers in two forms
        (["5", "7"], [1, 0], 0.5),  # a tie is drawn
        (["7", "7", "5"], [0, 0, 1], 0.0),
        (["", "", "5"], [0, 0, 1], 1.0),  # no answer is no vote
        (["", ""], [0, 0], 0.0),
        (["Paris", "paris", "Rome"], [1, 0, 0], 0.5),  # the environment has told them apart
    ],
)
def test_majority(answers, correct, value):
    assert majority(answers, correct) == value


@pytest.mark.parametrize("n", [1, 2, 7, 60])
def test_exact_interval_ends_where_the_tails_have_a_fortieth(n):
    for x in range(n + 1):
        low, high = exact_interval(x, n)
        at_least = sum(math.comb(n, i) * low**i * (1 - low) ** (n - i) for i in range(x, n + 1))
        at_most = sum(math.comb(n, i) * high**i * (1 - high) ** (n - i) for i in range(x + 1))
        assert low == 0.0 if x == 0 else at_least == pytest.approx(0.025, rel=1e-6)
        assert high == 1.0 if x == n else at_most == pytest.approx(0.025, rel=1e-6)
        assert low <= x / n <= high
    # Table of C. Clopper and E. Pearson's method in any textbook: 0 of 10, and 5 of 10.
    assert exact_interval(0, 10)[1] == pytest.approx(0.3085, abs=1e-4)
    assert exact_interval(5, 10) == pytest.approx((0.1871, 0.8129), abs=1e-4)


def test_bootstrap_has_the_spread_of_a_mean_and_the_same_draws_again():
    table = np.random.default_rng(0).normal(2.0, 3.0, (400, 2))
    table[:200, 1] = math.nan  # the second column has half the prompts
    low, high = bootstrap_intervals(table, 7)
    widths = 2 * 1.96 * np.nanstd(table, axis=0) / np.sqrt([400, 200])
    assert high - low == pytest.approx(widths, rel=0.1)
    np.testing.assert_array_equal(bootstrap_intervals(table, 7), np.array([low, high]))
    assert (bootstrap_intervals(table, 8) != np.array([low, high])).all()


def test_a_prompt_is_scored_by_its_valid_samples():
    texts = ["#### 5", "it is 6", "so 5", "5.0"]
    group = [episode(text, text != "it is 6", i, source="x/test.jsonl:17", level=3) for i, text in enumerate(texts)]
    place, fields, values = score_prompt(9, group, [2, 4], ["source", "level", "none"])
    assert (place, fields) == (9, {"source": "x/test.jsonl", "level": "3"})
    assert values == {
        "reward": 0.75,
        "avg@4": 0.75,
        "pass@2": 1.0,
        "pass@4": 1.0,
        "majority@2": 0.5,
        "majority@4": 1.0,
    }
    group[3].invalid = "its verifier broke"
    values = score_prompt(9, group, [2, 4], [])[2]
    assert values["avg@4"] == pytest.approx(2 / 3) and "pass@4" not in values and "majority@4" not in values
    assert score_prompt(0, [episode("x", 0, invalid="broken")], [2], []) == (0, {}, {})


def test_summary_by_field_and_in_any_order():
    rows = [(i, {"level": str(i % 3), "id": str(i)}, {"avg@2": (i % 5) / 4, "pass@2": float(i % 2)}) for i in range(30)]
    found = summary(rows, 1)
    assert found == summary(rows[::-1], 1)
    assert found["metrics"]["avg@2"]["interval"] == "bootstrap" and found["metrics"]["pass@2"]["interval"] == "exact"
    assert list(found["by"]) == ["level"] and found["many_values"] == ["id"]
    assert found["by"]["level"]["1"]["avg@2"]["value"] == np.mean([(i % 5) / 4 for i in range(30) if i % 3 == 1])
    assert [one["prompts"] for one in found["by"]["level"]["2"].values()] == [10, 10]
    table = results_table({"sums": found})
    assert "  level=1" in table and table.splitlines()[1].split()[:3] == ["sums", "avg@2", "0.5000"]
    assert estimates([], 1) == {}
