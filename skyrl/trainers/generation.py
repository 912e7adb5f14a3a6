"""One batch of episodes, over all ranks: who samples what, which groups are kept, and what is sampled again."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from skyrl.algorithms.declare import ADVANTAGES
from skyrl.algorithms.filters import dropped_by, filter_metrics, zero_variance_groups
from skyrl.distributed.collectives import all_reduce_sum, gather_objects
from skyrl.evaluation.weight_check import Probe, check_copies, check_probe, sample_probe
from skyrl.rollout import Group, episode_metrics, rollout
from skyrl.run import Run, Step
from skyrl.sampler.sampler import Sampler
from skyrl.tracking.flops import forward_flops, sample_attended
from skyrl.trainers.experience import model_shape
from skyrl.types import Episode

FIRST_ROLLOUTS = 3  # steps of RL whose rollouts are kept whatever tracking.rollouts_every says: people look at these


def generate_groups(run: Run, step: Step) -> tuple[list[Group], int]:
    """This rank's groups of one batch, each with its place in the batch, and how many all ranks have together.

    A group is one prompt sampled several times; its rewards are compared with each other, so it stays on one rank. The
    prompts of the stream are dealt to the ranks. With filters.refill, further prompts are sampled until
    prompts_per_step groups with variance are there (DAPO, arXiv 2503.14476, section 3.2); what is over is dropped, by
    place in the stream, so that the batch does not depend on the number of ranks.
    """
    cfg, state, world = run.cfg, run.state, run.world
    filters, wanted = cfg.algorithm.filters, cfg.batch.prompts_per_step
    asks_greedy = ADVANTAGES.get(cfg.algorithm.advantage.name).greedy_baseline
    kept: list[Group] = []
    sampled: list[list[Episode]] = []
    probe: Probe | None = None
    run.objectives.names = []
    with contextlib.ExitStack() as opened:
        sampler: Any = opened.enter_context(sampling(run, step))
        if (every := cfg.debug.check_weights_every) and state.step % every == 0:  # the first step too
            probe = sample_probe(run.engine, sampler, step.index)
            check_copies(run.engine)  # here, where the very copy is there that is sampled from
        for number in range(filters.max_refill_rounds if filters.refill else 1):
            if number and run.has_judges():
                sampler = opened.enter_context(sampling(run, step))
            positions = step.deal(range(state.position, state.position + wanted))
            prompts, config = [(i, run.stream.at(i)) for i in positions], run.rollout_config("train")
            params = replace(config.params, temperature=0.0)
            greedy_config = replace(config, params=params, group_size=1, key=(cfg.seed, "greedy"))
            with step.part("rollout"):
                groups = rollout(sampler, prompts, config, run.engine.chat)
            greedy = rollout(sampler, prompts, greedy_config, run.engine.chat) if asks_greedy else []
            step.check_stop()
            if run.has_judges():  # which may need the memory
                sampler = None
                opened.close()
                run.score_batch(groups, config)
                run.score_batch(greedy, greedy_config)
            _add_baselines(step, groups, greedy)
            _count_sampled(run, step, greedy)
            state.position += wanted
            sampled += groups
            note_objectives(run, groups)
            keep_P = note_groups(run, step, groups)
            run.invalid = run.invalid or next((e.invalid for group in groups for e in group if e.invalid), "")
            kept += [(i, group) for i, group, keep in zip(positions, groups, keep_P, strict=True) if keep]
            if all_reduce_sum(world, np.array([len(kept)]))[0] >= wanted:
                break
    sampler = None  # what is freed between rollouts must not live on by this name
    if probe is not None:
        check_probe(run.engine, probe)
    record_episodes(run, step, sampled)
    return first_groups(run, kept)


def first_groups(run: Run, kept: list[Group]) -> tuple[list[Group], int]:
    """Of groups by their place in the stream those of the batch, by their place in it, and how many all ranks have.
    Collective."""
    every = gather_objects(run.world, [i for i, _ in kept])
    everyone = sorted(i for part in every for i in part)[: run.cfg.batch.prompts_per_step]
    place = {position: number for number, position in enumerate(everyone)}
    return [(place[i], group) for i, group in kept if i in place], len(everyone)


@contextlib.contextmanager
def sampling(run: Run, step: Step) -> Iterator[Sampler]:
    """A sampler over the policy; what it counts is added to the step's metrics."""
    with run.engine.sampling("policy") as sampler:
        run.note_sampler(sampler)
        yield sampler
        for key, value in sampler.metrics().items():
            step.sums.add(key, value)


def record_episodes(run: Run, step: Step, groups: list[list[Episode]]) -> None:
    """Counts this rank's episodes, hands them to the hooks, and writes them down when that is due. Collective."""
    _count_sampled(run, step, groups)
    _measure(run, step, groups)
    run.tell_hooks("on_rollouts", step.number, groups)
    if is_dumped(run, step):
        run.write_rollouts(groups, f"{step.number:06d}")


def is_dumped(run: Run, step: Step) -> bool:
    """Whether the episodes of a step are written down."""
    every = run.cfg.tracking.rollouts_every
    return run.plan.due("rollouts", step.number) or every > 0 and step.index < FIRST_ROLLOUTS


def note_objectives(run: Run, groups: list[list[Episode]]) -> None:
    """Keeps the names of the objectives that all ranks' episodes have. Raises UserError for options that speak of
    others. Collective."""
    mine = {name for group in groups for e in group if not e.invalid for name in e.objectives}
    scored = any(e.turns and not e.invalid for group in groups for e in group)
    every = gather_objects(run.world, (scored, mine))
    run.objectives.names = sorted(set(run.objectives.names).union(*(names for _, names in every)))
    if any(scored for scored, _ in every):
        run.objectives.check(run.objectives.names, f"env.name={run.cfg.env.name}")


def _measure(run: Run, step: Step, groups: list[list[Episode]]) -> None:
    """Logs the multipliers in force, and keeps what moves them when this step counts. Collective."""
    bounded = list(run.objectives.constraints)
    if bounded:
        mine = {k: [e.objectives.get(k, 0.0) for group in groups for e in group if not e.invalid] for k in bounded}
        every = gather_objects(run.world, mine)
        run.objectives.measured = {k: [score for part in every for score in part[k]] for k in bounded}
        step.log({f"multiplier/{k}:mean": value for k, value in run.objectives.multipliers.items()})


def _add_baselines(step: Step, groups: list[list[Episode]], greedy: list[list[Episode]]) -> None:
    """Gives the episodes of each group the reward of its greedy answer (ReMax, Li et al. 2024, arXiv 2310.10505), where
    there are such answers."""
    for group, (answer,) in zip(groups, greedy, strict=bool(greedy)):
        known = bool(answer.turns) and not answer.invalid
        for one in group:
            one.baseline = answer.reward if known else math.nan
        if known:
            step.sums.add("greedy_reward:mean", answer.reward)


def note_groups(run: Run, step: Step, groups: list[list[Episode]]) -> list[bool]:
    """Adds what the groups say of themselves to the step's metrics; returns which of them the filters keep."""
    episode_metrics(step.sums, groups, prefix="")
    valid = [[e for e in group if not e.invalid] for group in groups]
    for group in valid:
        if group:
            step.sums.add("reward_std:mean", float(np.std([e.reward for e in group])))
    scales = [[[max(abs(turn.reward), turn.scale) for turn in e.turns] for e in group] for group in valid]
    keep_P = zero_variance_groups(
        [[e.reward for e in group] for group in valid],
        [max((math.fsum(scale) for scale in group), default=0.0) for group in scales],
    )
    if run.cfg.algorithm.objectives.normalise:  # each objective by itself
        for name in filter(run.objectives.weight, run.objectives.names):
            keep_P |= zero_variance_groups([[e.objectives.get(name, 0.0) for e in group] for group in valid])
    episodes = [e for group in groups for e in group]
    valid_E = np.array([not e.invalid for e in episodes])
    for key, value in filter_metrics(keep_P, [e.stop for e in episodes], valid_E).items():
        step.sums.add(key, value)
    filters = run.cfg.algorithm.filters
    dropped = [dropped_by(filters.names, group) if group else "" for group in valid]
    for name in filters.names:
        step.sums.add(f"filters/{name}:sum", float(dropped.count(name)))
    return [not name and bool(keep or not filters.zero_variance) for name, keep in zip(dropped, keep_P, strict=True)]


def _count_sampled(run: Run, step: Step, groups: list[list[Episode]]) -> None:
    turns = [turn for group in groups for episode in group for turn in episode.turns]
    tokens = sum(len(turn.sample.tokens) for turn in turns)
    step.sums.add("sampled_tokens:sum", float(tokens))
    counts = [turn.sample.support.counts for turn in turns if turn.sample.support is not None]
    for ids in counts:
        step.sums.add("support:mean", float(ids.sum()), len(ids))
        step.sums.add("support:max", float(ids.max()))
    attended = sum(sample_attended(len(turn.context), len(turn.sample.tokens)) for turn in turns)
    step.sums.add("flops/sample:sum", forward_flops(model_shape(run), tokens, attended))
