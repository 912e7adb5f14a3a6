"""Rewards that the engine computes: likelihood under the frozen reference."""

from __future__ import annotations

from collections.abc import Sequence

from skyrl.envs.rewards.base import register_reward
from skyrl.judges.batch import DIGITS, BatchReward, RankTools, Score
from skyrl.types import Episode


@register_reward("likelihood", batch=True, objectives=["likelihood"])
class Likelihood(BatchReward):
    """Log-probability of what the model wrote under the frozen reference model: near 0 for what the reference would say
    itself, far below it for what is no language. The mean of its tokens, or with mean=false the sum."""

    needs_reference = True

    def __init__(self, *, mean: bool = True) -> None:
        self.mean = mean

    def score(self, episodes: Sequence[Episode], tools: RankTools) -> list[Score]:
        found = tools.reference_logprobs(episodes)
        return [
            round(float(one.mean(dtype=float) if self.mean else one.sum(dtype=float)), DIGITS)
            if len(one)
            else ValueError("no token was sampled")
            for one in found
        ]
