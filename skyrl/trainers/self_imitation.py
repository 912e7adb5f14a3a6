"""Supervised learning on the policy's own successes, beside its policy gradient.

Of each prompt the best answer that was a success is kept, of algorithm.self_imitation.size prompts at most. Every
update adds coef times the mean negative log-probability of the tokens of some of them:

    L += - coef * sum over the tokens of the answers drawn of log p(token) / number of these tokens

Source: Oh et al. 2018 (Self-Imitation Learning), arXiv 1806.05464, whose loss weighs each action by how far its return
is above a critic's value. Differs: there is no critic here; an answer counts fully or not at all, and answers are
drawn uniformly and not by that weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from skyrl.distributed.balance import rebalance
from skyrl.distributed.collectives import gather_objects
from skyrl.rollout import Group, draw_seed, to_rows
from skyrl.run import Run, Step
from skyrl.types import Datum, LossSpec


def remember(run: Run, groups: Sequence[Group]) -> None:
    """Keeps the successes of a step, the same on every rank. To be called when the step counts. Collective.

    The best answer of a group is a candidate, the first of equals; it takes the place of an older one of the same
    prompt unless that was better. Groups that a filter dropped are not looked at.
    """
    given = run.cfg.algorithm.self_imitation
    if given.coef == 0:
        return
    mine = []
    for place, group in groups:
        scored = [one for one in group if one.turns and not one.invalid and one.reward > given.min_reward]
        if scored:
            best = max(scored, key=lambda one: (one.reward, -one.index))
            rows = [(row.tokens.tolist(), row.targets.tolist(), row.mask.tolist()) for row in to_rows([(0, [best])])]
            mine.append((place, best.prompt.uid, best.reward, rows))
    kept = {entry["uid"]: entry for entry in run.successes}
    found = (one for part in gather_objects(run.world, mine) for one in part)
    for _, uid, reward, rows in sorted(found, key=lambda one: one[0]):
        if rows and (uid not in kept or reward >= kept[uid]["reward"]):
            kept.pop(uid, None)
            kept[uid] = {"uid": uid, "reward": reward, "rows": rows}
    run.successes = list(kept.values())[-given.size :]


def imitate(run: Run, step: Step, number: int) -> None:
    """Adds the gradient of update `number` of a step on answers that are kept; nothing before the first. Collective."""
    settings = run.cfg.algorithm.self_imitation
    if settings.coef == 0 or not run.successes:
        return
    rng = np.random.default_rng(draw_seed(run.cfg.seed, "self_imitation", step.index, number))
    drawn = rng.choice(len(run.successes), min(settings.rows_per_step, len(run.successes)), replace=False)
    entries = [run.successes[i] for i in sorted(drawn.tolist())]
    total = sum(sum(mask) for entry in entries for _, _, mask in entry["rows"])
    data = [_datum(entry, row, settings.coef / total) for entry in step.deal(entries) for row in entry["rows"]]
    spec = LossSpec("cross_entropy", temperature=run.cfg.sampler.temperature)
    metrics = run.engine.forward_backward(rebalance(run.world, data), spec).metrics
    step.log({f"self_imitation/{key}": metrics[key] for key in ("loss:sum", "nll:mean", "trained_tokens:sum")})
    step.log({"self_imitation/kept:max": float(len(run.successes))})


def _datum(entry: dict[str, Any], row: Sequence[list[Any]], weight: float) -> Datum:
    tokens, targets, mask = row
    return Datum(
        np.array(tokens), np.array(targets), weight * np.array(mask, np.float64), name=f"success/{entry['uid']}"
    )
