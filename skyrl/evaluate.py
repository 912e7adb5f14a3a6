"""Plays held-out prompts without learning and sums the results over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from skyrl.distributed.collectives import MetricSums
from skyrl.engine import Engine
from skyrl.rollout import RolloutConfig, rollout
from skyrl.types import Episode, Metrics, Prompt


def evaluate(
    engine: Engine,
    prompts: Sequence[Prompt],
    config: RolloutConfig,
    check_stop: Callable[[], None] = lambda: None,
) -> tuple[Metrics, list[list[Episode]]]:
    """Global metrics ("eval/accuracy:mean" is the mean of the environment's "correct:mean", else of the reward above
    0; "eval/reward:mean", "eval/length:mean") and this rank's episodes. Collective.

    Prompts are dealt to the ranks; which rank plays one changes nothing. `check_stop` is called, on every
    rank, when this one has played: where ranks that were asked to stop may leave.
    """
    mine = engine.world.deal(list(enumerate(prompts)))
    with engine.sampling("policy") as sampler:
        groups = rollout(sampler, mine, config, engine.chat)
    check_stop()
    sums = MetricSums()
    episode_metrics(sums, groups, prefix="eval/")
    return sums.result(engine.world), groups


def episode_metrics(sums: MetricSums, groups: list[list[Episode]], prefix: str) -> None:
    """Adds what episodes say of themselves: reward, accuracy, length, stop reasons, the environment's own metrics.

    Episodes whose verifier failed are counted as "<prefix>invalid:sum" and left out of reward and accuracy.
    """
    for group in groups:
        for episode in group:
            sums.add(f"{prefix}episodes:sum", 1.0)
            sums.add(f"{prefix}invalid:sum", float(bool(episode.invalid)))
            length = sum(len(turn.sample.tokens) for turn in episode.turns)
            sums.add(f"{prefix}length:mean", float(length))
            sums.add(f"{prefix}length:max", float(length))
            sums.add(f"{prefix}cut_by_length:mean", float(episode.stop == "length"))
            sums.add(f"{prefix}turns:mean", float(len(episode.turns)))
            if episode.invalid:
                continue
            sums.add(f"{prefix}reward:mean", episode.reward)
            correct = episode.metrics.get("correct:mean", float(episode.reward > 0))
            sums.add(f"{prefix}accuracy:mean", correct)
            for key, value in episode.metrics.items():
                if key not in ("correct:mean", "turns:mean"):
                    sums.add(f"{prefix}{key}", value)
