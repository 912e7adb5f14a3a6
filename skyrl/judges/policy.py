"""Rewards that the engine computes: likelihood under the frozen reference, and grades by the policy itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from skyrl.envs.rewards.base import register_reward
from skyrl.judges.batch import DIGITS, BatchReward, RankTools, Score, conversation
from skyrl.judges.rubric import RUBRIC, criteria_of, grading_messages, parse_grades
from skyrl.types import Episode, UserError


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


@register_reward("self_rubric", batch=True)
class SelfRubric(BatchReward):
    """The grade that the policy gives itself, as it is now and drawing greedily, 0 to 1; see the reward `rubric`. What
    it writes and cannot be read masks the episode."""

    def __init__(self, *, rubric: str | dict[str, str] = RUBRIC, max_tokens: int = 256) -> None:
        criteria_of(rubric)  # says what is wrong with it
        if max_tokens < 1:
            raise UserError(f"reward self_rubric: max_tokens={max_tokens}: wanted 1 or more, enough for the grades")
        self.rubric, self.max_tokens = rubric, max_tokens

    def score(self, episodes: Sequence[Episode], tools: RankTools) -> list[Score]:
        asked = []
        for episode in episodes:
            *before, last = conversation(episode)
            told = grading_messages(last["content"], replace(episode.prompt, messages=before), self.rubric)
            # In one message: not every template has a place for the system's.
            asked.append([{"role": "user", "content": "\n\n".join(message["content"] for message in told)}])
        return [self._grade(said) for said in tools.generate(asked, self.max_tokens)]

    def _grade(self, said: str | None) -> Score:
        if said is None:
            return ValueError("its conversation with the rubric is longer than a row (batch.max_row_tokens)")
        try:
            return parse_grades(said, self.rubric)
        except ValueError as error:
            return ValueError(f"the policy wrote no grades: {error}")
