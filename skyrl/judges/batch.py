"""Rewards of a whole batch: what a model scores at once, on each rank, after the episodes were played."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skyrl.types import Episode, Floats, Message

Score = float | Mapping[str, float] | Exception
DIGITS = 5  # after the point, of scores that models compute: what a batch is padded with changes float32's last ones


@dataclass(frozen=True)
class RankTools:
    """What a rank has beside the episodes. The functions are collective: every rank calls them equally often, also
    with nothing.

    reference_logprobs: of each episode the log-probabilities of its sampled tokens under the frozen reference, at
    temperature 1. generate: what the policy as it is now answers to each conversation, greedily, in at most so many
    tokens; None where a conversation is too long.
    """

    device: Any
    reference_logprobs: Callable[[Sequence[Episode]], list[Floats]]
    generate: Callable[[Sequence[list[Message]], int], list[str | None]]


class BatchReward:
    """Scores all episodes of a rank at once. Registered as a class, `@register_reward(name, batch=True)`; one is made
    for each run and rank, its keyword arguments are the reward's parameters."""

    needs_reference = False  # whether score asks for reference_logprobs

    def score(self, episodes: Sequence[Episode], tools: RankTools) -> list[Score]:
        """A number or named objectives for each episode, in order; an exception for one that could not be scored: it is
        masked and counted, never 0. Called on every rank, after each round of sampling, also without episodes."""
        raise NotImplementedError(f"{type(self).__name__} has no score()")


def conversation(episode: Episode) -> list[Message]:
    """What was said in an episode, with the model's turns."""
    messages: list[Message] = []
    for turn in episode.turns:
        messages += [*turn.observed, {"role": "assistant", "content": turn.text}]
    return messages
