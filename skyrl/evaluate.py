"""Plays held-out prompts without learning and sums the results over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from skyrl.distributed.collectives import MetricSums
from skyrl.engine import Engine
from skyrl.rollout import Play, Renderer, collect
from skyrl.types import Episode, Metrics, Prompt


def evaluate(
    engine: Engine,
    prompts: Sequence[Prompt],
    play: Play,
    renderer: Renderer,
    stop_point: Callable[[], None] = lambda: None,
) -> tuple[Metrics, list[list[Episode]]]:
    """Global metrics ("eval/accuracy:mean" is the mean of the environment's "correct:mean", else of the reward above
    0; "eval/reward:mean", "eval/length:mean") and this rank's episodes. Collective.

    Prompt i is played on rank i % world size; which rank plays it changes nothing. `stop_point` is called, on every
    rank, when this one has played: where ranks that were asked to stop may leave.
    """
    world = engine.world
    mine = [(i, prompts[i]) for i in range(world.rank, len(prompts), world.size)]
    with engine.sampling("policy") as sampler:
        groups = collect(sampler, mine, play, renderer)
    stop_point()
    tally = MetricSums()
    episode_metrics(tally, groups, prefix="eval/")
    return tally.result(world), groups


def episode_metrics(tally: MetricSums, groups: list[list[Episode]], prefix: str) -> None:
    """Adds what episodes say of themselves: reward, accuracy, length, stop reasons, the environment's own metrics.

    Episodes whose verifier failed are counted as "<prefix>invalid:sum" and left out of reward and accuracy.
    """
    for group in groups:
        for episode in group:
            tally.add(f"{prefix}episodes:sum", 1.0)
            tally.add(f"{prefix}invalid:sum", float(bool(episode.invalid)))
            length = sum(len(turn.sample.tokens) for turn in episode.turns)
            tally.add(f"{prefix}length:mean", float(length))
            tally.add(f"{prefix}length:max", float(length))
            tally.add(f"{prefix}cut_by_length:mean", float(episode.stop == "length"))
            tally.add(f"{prefix}turns:mean", float(len(episode.turns)))
            if episode.invalid:
                continue
            tally.add(f"{prefix}reward:mean", episode.reward)
            correct = episode.metrics.get("correct:mean", float(episode.reward > 0))
            tally.add(f"{prefix}accuracy:mean", correct)
            for key, value in episode.metrics.items():
                if key not in ("correct:mean", "turns:mean"):
                    tally.add(f"{prefix}{key}", value)
