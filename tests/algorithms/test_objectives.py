"""Named objectives to one reward: weights, each objective by itself, bounds; and that they move the optimum."""

import math
from dataclasses import replace

import numpy as np
import pytest

from skyrl.algorithms.advantages import ADVANTAGES, RewardRows, decoupled
from skyrl.algorithms.objectives import Objectives
from skyrl.types import UserError


def group_rows(scores: dict[str, list[list[float]]], combine) -> RewardRows:
    """One token for each episode; scores[name][group][sample]."""
    sizes = [len(group) for group in next(iter(scores.values()))]
    flat = {name: [np.array([x]) for group in groups for x in group] for name, groups in scores.items()}
    each = [combine({name: float(parts[d][0]) for name, parts in flat.items()}) for d in range(sum(sizes))]
    return RewardRows(
        group_D=np.repeat(np.arange(len(sizes)), sizes),
        episode_D=np.arange(sum(sizes)),
        rewards=[np.array([reward]) for reward, _ in each],
        masks=[np.ones(1, bool)] * sum(sizes),
        valid_D=np.ones(sum(sizes), bool),
        scales=[np.array([scale]) for _, scale in each],
        objectives=flat,
    )


def values(advantages) -> list[float]:
    return np.concatenate(advantages.advantages).tolist()


def test_weights_are_1_and_0_for_what_has_a_bound_unless_they_are_given():
    objectives = Objectives({"b": 0.5, "d": 2.0}, {"c": {"min": 1.0, "start": 0.25}, "d": {"max": 1.0, "start": 3.0}})
    assert [objectives.weight(name) for name in "abcd"] == [1.0, 0.5, 0.25, -1.0]
    assert [objectives.weight(name, constrained=False) for name in "abcd"] == [1.0, 0.5, 0.0, 2.0]
    assert objectives.combine({"a": 1.0, "b": 2.0, "d": 3.0}) == (-1.0, 5.0)
    assert objectives.combine({}) == (0.0, 0.0)


@pytest.mark.parametrize(
    "weights, constraints, line",
    [
        ({"acuracy": 2.0}, {}, "algorithm.objectives.weights.acuracy: env.name=x has no such objective; its"),
        (
            {},
            {"safety": {"min": 1.0}},
            "algorithm.objectives.constraints.safety: .*its objectives are: accuracy, length",
        ),
    ],
)
def test_a_name_that_is_no_objective_is_refused(weights, constraints, line):
    with pytest.raises(UserError, match=line):
        Objectives(weights, constraints).check(["length", "accuracy"], "env.name=x")
    with pytest.raises(UserError, match="its rewards are plain numbers"):
        Objectives(weights, constraints).check([], "env.name=x")


def test_multipliers_rise_beyond_a_bound_fall_to_0_and_do_not_depend_on_the_order():
    scores = np.random.default_rng(0).normal(size=1001).tolist()
    told = []
    for order in (scores, scores[::-1], sorted(scores)):
        objectives = Objectives({}, {"a": {"min": 0.5, "step": 0.1}, "b": {"max": -1.0, "step": 1.0}, "c": {"min": 0}})
        for _ in range(3):
            objectives.measured = {"a": order, "b": order}
            objectives.update()
        told.append(objectives.state_dict())
    mean = math.fsum(scores) / len(scores)
    assert told[0] == told[1] == told[2] and told[0]["c"] == [0.0, 0.0]
    assert told[0]["a"] == pytest.approx([0.8 * (0.5 - mean), 0.3 * (0.5 - mean)])
    assert told[0]["b"] == pytest.approx([8 * (mean + 1.0), 3 * (mean + 1.0)])
    objectives.measured = {"a": [9.0]}
    objectives.update()
    assert objectives.state_dict()["a"] == [0.0, 0.0]
    fresh = Objectives({}, {"a": {"min": 0.5}})
    fresh.load_state_dict(told[0])
    assert fresh.state_dict() == {"a": told[0]["a"]}


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce++"])
def test_objectives_that_cancel_but_for_rounding_are_no_signal(name):
    """10.1 + 0.2 and 10.3 are equal; less 10.3 each is left of them that only rounding tells apart."""
    objectives = Objectives({"b": -1.0})
    rows = group_rows({"a": [[10.1 + 0.2, 10.3]], "b": [[10.3, 10.3]]}, objectives.combine)
    assert rows.rewards[0] != rows.rewards[1]
    declared = ADVANTAGES.get(name)
    assert values(declared.compute(rows, lambda x: x, params={})) == [0.0, 0.0]
    assert values(decoupled(declared, {}, {"a": 1.0, "b": -1.0}, rows, lambda x: x)) == [0.0, 0.0]


def test_each_objective_by_itself_is_gdpo():
    """Against a slow loop: normalised in its group, weighted, summed, whitened over the episodes of the batch."""
    rng = np.random.default_rng(1)
    scores = {"a": rng.normal(size=(5, 4)), "b": 1000 * rng.normal(size=(5, 4)), "c": np.ones((5, 4))}
    weights = {"a": 1.0, "b": 0.5, "c": 7.0}
    wanted = np.zeros((5, 4))
    for name in ("a", "b"):
        for g in range(5):
            x = scores[name][g]
            wanted[g] += weights[name] * (x - x.mean()) / (x.std(ddof=1) + 1e-6)
    wanted = (wanted - wanted.mean()) / (wanted.std() + 1e-6)
    rows = group_rows({name: part.tolist() for name, part in scores.items()}, Objectives(weights).combine)
    halves = []
    for parts in (range(0, 12), range(12, 20)):  # on two ranks, with three groups and two
        pick = list(parts)
        halves.append(
            replace(
                rows,
                group_D=rows.group_D[pick],
                episode_D=rows.episode_D[pick],
                valid_D=rows.valid_D[pick],
                rewards=[rows.rewards[d] for d in pick],
                masks=[rows.masks[d] for d in pick],
                scales=None,
                objectives={name: [part[d] for d in pick] for name, part in rows.objectives.items()},
            )
        )
    found = values(decoupled(ADVANTAGES.get("grpo"), {}, weights, rows, lambda x: x))
    np.testing.assert_allclose(found, wanted.ravel(), rtol=1e-12, atol=1e-12)
    sums: list[list[np.ndarray]] = [[], []]
    for half, told in zip(halves, sums, strict=True):  # what each rank would say, then what all would hear
        decoupled(ADVANTAGES.get("grpo"), {}, weights, half, lambda x, told=told: told.append(x) or x)
    first = sums[0][0] + sums[1][0]
    assert first[0] == 20 and [len(told) for told in sums] == [2, 2]


def test_gdpo_tells_mixtures_apart_that_a_sum_does_not():
    """The paper's figure 2: of two binary objectives, (0, 1) against (0, 2) against (1, 2) right of two samples."""
    grpo, objectives = ADVANTAGES.get("grpo"), Objectives()
    rows = group_rows({"a": [[0, 0], [0, 1]], "b": [[0, 1], [0, 1]]}, objectives.combine)
    summed = values(grpo.compute(rows, lambda x: x, params={}))
    apart = values(decoupled(grpo, {}, {"a": 1.0, "b": 1.0}, rows, lambda x: x))
    assert summed[1] == pytest.approx(summed[3]) and apart[3] == pytest.approx(2 * apart[1])


def learn(objectives: Objectives, normalise: bool = False, steps: int = 60, rate: float = 8.0) -> tuple[float, dict]:
    """What `steps` of the exact policy gradient make of a softmax policy over two answers: the probability of B, and
    the multipliers, in the mean of the last half. A is worth accuracy 1, B brevity 0.6.

    Exact: the mean over all groups of two samples, by their probability."""
    worth = {"accuracy": (1.0, 0.0), "brevity": (0.0, 0.6)}
    declared = ADVANTAGES.get("grpo" if normalise else "dr_grpo")
    groups = [(0, 0), (0, 1), (1, 0), (1, 1)]
    logit, late = 0.0, []
    for _ in range(steps):
        share = 1.0 / (1.0 + math.exp(-logit))
        rows = group_rows({k: [[w[x] for x in g] for g in groups] for k, w in worth.items()}, objectives.combine)
        if normalise:
            weights = {name: objectives.weight(name) for name in worth}
            advantages = values(decoupled(declared, {}, weights, rows, lambda x: x))
        else:
            advantages = values(declared.compute(rows, lambda x: x, params={}))
        for number, group in enumerate(groups):
            chance = math.prod(share if x else 1.0 - share for x in group)
            told = advantages[2 * number : 2 * number + 2]
            logit += rate * chance * sum(a * (x - share) for x, a in zip(group, told, strict=True)) / 2
        objectives.measured = {name: [(1.0 - share) * a + share * b] for name, (a, b) in worth.items()}
        objectives.update()
        late.append((share, dict(objectives.multipliers)))
    late = late[steps // 2 :]
    return np.mean([share for share, _ in late]), {k: np.mean([m[k] for _, m in late]) for k in late[0][1]}


@pytest.mark.parametrize(
    "normalise, weight, better",
    [
        (False, 1.5, "A"),  # 1 against 0.9
        (False, 1.9, "B"),  # 1 against 1.14
        (True, 0.9, "A"),  # the range of an objective does not count: 1 against 0.9
        (True, 1.1, "B"),
    ],
)
def test_weights_move_the_optimum(normalise, weight, better):
    share, _ = learn(Objectives({"brevity": weight}), normalise)
    assert share < 0.25 if better == "A" else share > 0.75


@pytest.mark.parametrize("bound, share", [(0.15, 0.25), (0.3, 0.5), (0.45, 0.75)])
def test_a_bound_is_kept_at_the_least_cost(bound, share):
    """Brevity of `bound` in the mean needs B with probability bound / 0.6; more of B would cost accuracy. The
    multiplier becomes what brevity costs then: 1 / 0.6 of accuracy."""
    objectives = Objectives({}, {"brevity": {"min": bound, "step": 0.5}})
    found, multipliers = learn(objectives, steps=120)
    assert found == pytest.approx(share, abs=0.02) and multipliers["brevity"] == pytest.approx(1 / 0.6, abs=0.06)
