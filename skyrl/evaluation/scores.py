"""What an evaluation says: pass@k, avg@k and majority@k with 95 % intervals, for all prompts and by fields of theirs.

Everything comes from one row of numbers per prompt, in the order of the prompts, whichever rank played what.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from skyrl.answers.equal import answers_equal, parse_number
from skyrl.envs.rewards.math import extract_answer, last_number
from skyrl.types import Episode, Metrics

OUTSIDE = 0.025  # on either side of an interval
RESAMPLES = 2000
MOST_VALUES = 20  # of a field, by which results are shown
PromptScore = tuple[int, dict[str, str], Metrics]  # place in the set, fields, a value for each metric that has one
Estimate = dict[str, Any]  # of a metric's mean over prompts: value, low, high, interval (exact or bootstrap), prompts


def score_prompt(place: int, group: Sequence[Episode], ks: Sequence[int], by: Sequence[str]) -> PromptScore:
    """The row of one prompt from its episodes, in order. Those without a score (`invalid`) are left out, and a metric
    that needs more samples than are left. majority@k is of the first k, where the prompt has a field "answer"."""
    extra, valid = group[0].prompt.extra, [one for one in group if not one.invalid]
    correct = [one.metrics.get("correct:mean", float(one.reward > 0)) for one in valid]
    n, c, values = len(valid), sum(one >= 1.0 for one in correct), Metrics()
    if n:
        values = {"reward": math.fsum(one.reward for one in valid) / n, f"avg@{len(group)}": math.fsum(correct) / n}
    values |= {f"pass@{k}": pass_at_k(n, c, k) for k in ks if k <= n}
    if isinstance(wanted := extra.get("answer"), (str, int, float)):
        answers = [answer_of(one, str(wanted)) for one in valid]
        values |= {f"majority@{k}": majority(answers[:k], correct[:k]) for k in ks if 1 < k <= n}
    fields = {name: str(extra[name]) for name in by if isinstance(extra.get(name), (str, int, float))}
    if "source" in fields:  # a file and its line
        fields["source"] = re.sub(r":\d+$", "", fields["source"])
    return place, fields, values


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k of the n samples drawn without replacement is right, when c of them are: the unbiased
    estimator of M. Chen et al. 2021, arXiv 2107.03374, section 2.1. Needs k <= n."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(answers: Sequence[str], correct: Sequence[float]) -> float:
    """How right the answer is that most samples give; of several that are equally frequent the mean, as if one were
    drawn. Answers are the same when skyrl.answers says so. An empty one is no vote; 0 without any."""
    classes: dict[str, list[float]] = {}
    for answer, right in zip(answers, correct, strict=True):
        if answer:
            first = next((one for one in classes if one == answer or answers_equal(answer, one)), answer)
            classes.setdefault(first, []).append(right)
    most = max(map(len, classes.values()), default=0)
    best = [math.fsum(votes) / most for votes in classes.values() if len(votes) == most]
    return math.fsum(best) / len(best) if best else 0.0


def answer_of(episode: Episode, wanted: str) -> str:
    """The final answer of an episode: what its last turn marks ("#### x", \\boxed{x}), or, where a number is wanted,
    the last one in it, or else all of that text."""
    text = episode.turns[-1].text if episode.turns else ""
    number = last_number(text) if parse_number(wanted) is not None else None
    return extract_answer(text) or number or text.strip()


def exact_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95 % interval of C. Clopper and E. Pearson (Biometrika 26, 1934) for a share of n: whatever the true share
    is, it lies outside in at most 5 of 100 cases."""
    counts = np.arange(n + 1)
    logs = np.cumsum(np.log(np.maximum(counts, 1)))
    ways = logs[n] - logs - logs[::-1]

    def bound(some: slice, rises: bool) -> float:
        """The share at which `some` numbers of successes have the chance OUTSIDE, which `rises` with it or falls."""
        low, high = 0.0, 1.0
        for _ in range(50):
            p = (low + high) / 2
            chance = np.exp(ways[some] + counts[some] * math.log(p) + (n - counts[some]) * math.log1p(-p)).sum()
            low, high = (low, p) if (chance > OUTSIDE) == rises else (p, high)
        return low

    low = bound(slice(successes, None), True) if successes else 0.0
    return low, bound(slice(0, successes + 1), False) if successes < n else 1.0


def bootstrap_intervals(table: np.ndarray, seed: int) -> np.ndarray:
    """[2, M]: the middle 95 % of the means of the columns of `table` [P, M] over prompts that are drawn again, P of
    them with replacement, 2,000 times. NaN is no value. The draws follow from `seed` and P alone (raw Philox words)."""
    draws = np.random.Philox(key=np.array([seed % 2**64, len(table)], dtype=np.uint64))
    present, filled, means = ~np.isnan(table), np.nan_to_num(table), []
    for _ in range(RESAMPLES):
        picked = (draws.random_raw(len(table)) % len(table)).astype(np.int64)
        means.append(filled[picked].sum(0) / np.maximum(present[picked].sum(0), 1))
    return np.quantile(np.array(means), [OUTSIDE, 1 - OUTSIDE], axis=0)


def estimates(rows: Sequence[Metrics], seed: int) -> dict[str, Estimate]:
    """Each metric's mean over prompts: exact where every prompt is wholly right or wrong, else by the bootstrap."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = np.array([[row.get(name, math.nan) for name in names] for row in rows])
    found: dict[str, Estimate] = {}
    drawn: np.ndarray | None = None
    for i, name in enumerate(names):
        there = table[~np.isnan(table[:, i]), i]
        if exact := name != "reward" and bool(np.isin(there, (0.0, 1.0)).all()):
            low, high = exact_interval(int(there.sum()), len(there))
        else:
            drawn = bootstrap_intervals(table, seed) if drawn is None else drawn
            low, high = map(float, drawn[:, i])
        found[name] = {"value": math.fsum(there) / len(there), "low": low, "high": high}
        found[name] |= {"interval": "exact" if exact else "bootstrap", "prompts": len(there)}
    return found


def summary(scores: Sequence[PromptScore], seed: int) -> dict[str, Any]:
    """{"metrics": {name: estimate}, "by": {field: {value: {name: estimate}}}} of a set's prompts. A field is left out
    where all prompts agree in it, and where it has more than 20 values: "many_values" names it."""
    scores = sorted(scores, key=lambda one: one[0])
    found: dict[str, Any] = {"metrics": estimates([row for _, _, row in scores], seed), "by": {}, "many_values": []}
    for field in dict.fromkeys(name for _, fields, _ in scores for name in fields):
        parts: dict[str, list[Metrics]] = {}
        for _, fields, row in scores:
            parts.setdefault(fields.get(field, "-"), []).append(row)
        if len(parts) > MOST_VALUES:
            found["many_values"].append(field)
        elif len(parts) > 1:
            order = sorted(parts, key=lambda value: (parse_number(value) is None, parse_number(value) or 0, value))
            found["by"][field] = {value: estimates(parts[value], seed) for value in order}
    return found


def as_metrics(prefix: str, found: Mapping[str, Estimate]) -> Metrics:
    """Estimates as a run logs them: "<prefix>pass@4:mean", with the ends of its interval as "/low" and "/high"."""
    ends = {"": "value", "/low": "low", "/high": "high"}
    return {f"{prefix}{name}{end}:mean": one[key] for name, one in found.items() for end, key in ends.items()}


def results_table(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """The results of all sets for a person, a line for each metric, those by field below."""
    rows = [("set", "metric", "value", "95 % interval", "prompts")]
    for name, one in sets.items():
        parts = [(name, one["metrics"])]
        parts += [(f"  {field}={value}", of) for field, values in one["by"].items() for value, of in values.items()]
        for label, found in parts:
            for number, (metric, e) in enumerate(found.items()):
                interval = f"{e['low']:.3f} to {e['high']:.3f}{' *' * (e['interval'] == 'bootstrap')}"
                rows.append(("" if number else label, metric, f"{e['value']:.4f}", interval, str(e["prompts"])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "* by bootstrap over prompts; the others are exact (Clopper-Pearson)"])
