"""From the episodes of all ranks to the numbers of a set, and whether training shall end by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from skyrl.config.eval_sets import RELATIONS, read_condition
from skyrl.config.schema import RunConfig
from skyrl.distributed.collectives import MetricSums, gather_objects
from skyrl.distributed.init import World
from skyrl.evaluation.scores import as_metrics, score_prompt, summary
from skyrl.evaluation.sets import EvalSet
from skyrl.rollout import episode_metrics, rollout
from skyrl.types import Episode, Metrics, Prompt, UserError


def play_set(run: Any, one: EvalSet, mine: Sequence[tuple[int, Prompt]], **more: Any) -> list[list[Episode]]:
    """This rank's episodes of the (place, prompt) pairs `mine` of a set, with all their rewards. `run`: a Run; `more`:
    see RolloutConfig. Collective; raises StopRun as check_stop does."""
    config = replace(run.rollout_config("eval", one.config), **more)
    with run.engine.sampling("policy") as sampler:
        run.note_sampler(sampler)
        groups = rollout(sampler, mine, config, run.engine.chat)
    run.check_stop()
    run.score_batch(groups, config)
    return groups


def play_and_measure(run: Any, one: EvalSet) -> tuple[list[list[Episode]], Metrics]:
    """This rank's groups of a set, written down where rollouts are, and all ranks' metrics. Collective."""
    mine = run.world.deal(list(enumerate(one.prompts)))
    groups, places = play_set(run, one, mine), [place for place, _ in mine]
    if run.cfg.tracking.rollouts_every:
        run.write_rollouts(groups, f"{one.config.dump}-{run.state.global_step:06d}")
    return groups, set_metrics(run.cfg, run.world, one, places, groups, plain=not one.config.name)[0]


def set_metrics(
    cfg: RunConfig, world: World, one: EvalSet, places: Sequence[int], groups: list[list[Episode]], *, plain: bool
) -> tuple[Metrics, dict[str, Any]]:
    """Metrics of a set, the same on every rank, from this rank's groups and their places in it, and its summary (see
    scores.py); with `plain` without what the samples of a prompt tell, and no summary. Collective."""
    sums, most = MetricSums(), one.config.samples_per_prompt
    episode_metrics(sums, groups, prefix=one.config.prefix)
    metrics = sums.result(world)
    if plain:
        return metrics, {}
    ks = cfg.eval.k or sorted({2**i for i in range(1, most.bit_length())} | {most} - {1})  # pass@1 is the mean
    rows = [score_prompt(place, group, ks, cfg.eval.group_by) for place, group in zip(places, groups, strict=True)]
    found = summary([row for part in gather_objects(world, rows) for row in part], cfg.seed)
    return as_metrics(one.config.prefix, found["metrics"]) | metrics, found


def look_whether_to_end(cfg: RunConfig, state: Any, metrics: Metrics) -> str:
    """Why training ends at this evaluation by eval.stop_when or eval.patience, "" where it goes on; the same on every
    rank. Keeps it, and the best score, in `state`, a RunState. Raises UserError for a metric that evaluations lack."""
    best, reason = cfg.checkpoint, ""
    if (rule := read_condition(cfg.eval.stop_when)) is not None:
        name, relation, bound = rule
        if name not in metrics:
            raise UserError(f"eval.stop_when: the evaluation has no {name}; it has: {', '.join(sorted(metrics))}")
        if RELATIONS[relation](metrics[name], bound):
            reason = f"{name} is {metrics[name]:.4g} (eval.stop_when={cfg.eval.stop_when})"
    if state.score is not None:
        sign = 1.0 if best.best_mode == "max" else -1.0
        better = state.best is None or sign * state.score > sign * state.best
        state.best, state.waited = (state.score, 0) if better else (state.best, state.waited + 1)
        if 0 < cfg.eval.patience <= state.waited:
            reason = f"{state.waited} evaluations without a better {best.best_metric} than {state.best:.4g}"
    if reason:
        state.stopped_by = [cfg.eval.stop_when, cfg.eval.patience]
    return reason
