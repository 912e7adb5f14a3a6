"""Metrics of episodes that a run has dumped, computed anew: a check of the logged ones (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skyrl.types import Metrics


def recompute_metrics(episodes: Sequence[dict[str, Any]]) -> Metrics:
    """Metrics of dumped episodes from nothing but their tokens and rewards, to hold against the logged ones.

    Keys as logged: reward:mean and accuracy:mean (invalid episodes left out; accuracy is correct:mean of the
    environment, else reward above 0), episodes:sum, invalid:sum, length:mean, length:max (tokens drawn in an episode),
    cut_by_length:mean, sampled_tokens:sum, turns:mean. Means over no episodes are left out.
    """
    scored = [episode for episode in episodes if not episode["invalid"]]
    lengths = [sum(len(turn["tokens"]) for turn in episode["turns"]) for episode in episodes]
    metrics: Metrics = {
        "episodes:sum": float(len(episodes)),
        "invalid:sum": float(len(episodes) - len(scored)),
        "sampled_tokens:sum": float(sum(lengths)),
    }
    if episodes:
        metrics["length:mean"] = sum(lengths) / len(episodes)
        metrics["length:max"] = float(max(lengths))
        metrics["cut_by_length:mean"] = sum(e["stop"] == "length" for e in episodes) / len(episodes)
        metrics["turns:mean"] = sum(len(episode["turns"]) for episode in episodes) / len(episodes)
    if scored:
        metrics["reward:mean"] = sum(sum(turn["reward"] for turn in e["turns"]) for e in scored) / len(scored)
        correct = [e["metrics"].get("correct:mean", float(e["reward"] > 0)) for e in scored]
        metrics["accuracy:mean"] = sum(correct) / len(scored)
    return metrics
