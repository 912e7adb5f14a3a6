"""RL with verifiable rewards: sample a batch, turn rewards into advantages, take optimizer steps, repeat.

Every rank runs this text, each on its own prompts. What the ranks must agree on (how many groups were kept,
denominators, metrics) goes through sums over ranks, so a branch before a collective depends on global numbers only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

from skyrl.config.schema import RunConfig
from skyrl.distributed.balance import rebalance
from skyrl.loop import run_loop
from skyrl.planner.plan import make_spec, make_value_spec
from skyrl.rollout import Group, Row, to_rows
from skyrl.run import Run, Step
from skyrl.tracking.rollouts import write_trained
from skyrl.trainers.experience import (
    add_advantages,
    add_old_logprobs,
    add_reference,
    apply_reduction,
    correction_scale,
    count_flops,
    create_references,
    note_advantages,
    select_tokens,
    trained_tokens,
)
from skyrl.trainers.generation import generate_groups, is_dumped
from skyrl.trainers.self_imitation import imitate, remember
from skyrl.trainers.sft import sft_warmup
from skyrl.types import Datum, Floats


def train(cfg: RunConfig, hooks: Sequence[Any] = ()) -> dict[str, Any]:
    """The whole run: warm-up if there is one, RL, final evaluation, export. Resumes where its folder says.

    Raises StopRun, when all is saved, after a signal or at a deadline.
    """
    return run_loop(cfg, train_rl, hooks=hooks)


def train_rl(run: Run, collect: Callable[[Run, Step], tuple[list[Group], int]] = generate_groups) -> None:
    """Warm-up, then RL until batch.num_steps. `collect`: where this rank's groups of a step come from, each with its
    place among the groups of all ranks, and how many these are."""
    total, state = run.plan.num_steps, run.state
    if state.phase == "rl" and state.step >= total and not state.unrecorded:
        run.say(
            f"finished already: step {run.total_of('rl')} of {run.total_of('rl')}; give more batch.num_steps to go on, "
            "or another run.name to start anew"
        )
    create_references(run)  # before any work, since they may not be there
    sft_warmup(run)
    run.create_models()  # the frozen reference is the policy as it is now
    for step in run.steps("rl", total, evaluate_every=run.cfg.eval.every_steps, evaluate_first=True):
        with step.phase("generation", "collect"):
            groups, num_groups = collect(run, step)
        with step.phase("training", "train"):
            train_step(run, step, groups, num_groups)


def train_step(run: Run, step: Step, groups: list[Group], num_groups: int) -> None:
    """All that is learned of a batch: `groups` are this rank's, `num_groups` those of all ranks. Collective."""
    if num_groups == 0:  # on all ranks
        run.say(
            f"step {step.number}: in every group all rewards were equal, nothing to learn from "
            "(see filters/* and the rollouts)"
        )
        step.skip_updates(run.plan.updates_per_step)
        step.commit()
        run.objectives.update()
        sync_reference(run, step)
        return
    with step.part("experience"):
        rows, kl = add_reference(run, step, to_rows(groups))
        step.check_stop()
        rows = add_advantages(run, add_old_logprobs(run, rows))
        note_advantages(step, rows)
        step.check_stop()
    update(run, step, rows, num_groups)
    remember(run, groups)
    count_flops(run, step, rows)
    run.objectives.update()  # last, as below: the whole step used the multipliers that were logged
    if run.kl is not None:
        run.kl.update(kl, run.cfg.batch.prompts_per_step * run.cfg.batch.samples_per_prompt)
    sync_reference(run, step)


def sync_reference(run: Run, step: Step) -> None:
    """Moves the reference to the policy as it is after this step, or a part of the way, if that is due. After the
    commit: a step that is taken back has moved nothing. The reference is in every checkpoint.

    Source: Gorbatovski et al. 2024 (Learn Your Reference Model), arXiv 2404.09656: a copy every so many steps is its
    hard update, algorithm.reference.ema (there 1 - alpha) its soft one.
    """
    given = run.cfg.algorithm.reference
    if given.sync_every and (step.index + 1) % given.sync_every == 0:
        run.engine.sync("reference", "policy", given.ema)
        step.log({"kl/reference_synced:sum": 1.0})


def update(run: Run, step: Step, rows: list[Row], num_groups: int) -> None:
    """One optimizer step for each part of the batch and pass over it: PPO's mini-batches and epochs.

    A group is never split. Parts are cut by the groups' places in the whole batch, `num_groups` over all ranks, so
    that which rows learn together does not depend on the number of ranks. A part without a token to learn from, on any
    rank, is no optimizer step: AdamW would move the weights by its momentum and decay alone.
    """
    cfg, engine, plan = run.cfg, run.engine, run.plan
    spec = make_spec(cfg.algorithm, cfg.sampler.temperature)
    if run.kl is not None and spec.kl_coef:
        spec = dataclasses.replace(spec, kl_coef=run.kl.coef)
    parts, moved, trained = cfg.batch.optim_steps_per_batch, False, list[tuple[Datum, Floats | None]]()
    for number in range(plan.updates_per_step):
        part = [row for row in rows if row.group * parts // num_groups == number % parts]
        part = select_tokens(run, step, part, number)
        if trained_tokens(run, part) == 0:
            step.skip_updates(1)
            continue
        data = apply_reduction(run, part)
        spec = dataclasses.replace(spec, correction_scale=correction_scale(run, data))
        data, logprobs = rebalance(run.world, data), []
        if plan.policy_learns(step.index):
            with step.part("forward_backward"):
                out = engine.forward_backward(data, spec)
            metrics, logprobs = out.metrics, out.logprobs
            if moved:  # later updates see a policy that has moved: only the first is the sampler/trainer gap
                metrics = {k: v for k, v in metrics.items() if not k.startswith("logprob_gap")}
            step.log(metrics)
            imitate(run, step, number)
            if not moved:  # the last place where the step can be taken back
                step.commit()
            with step.part("optim_step"):
                step.log(engine.optim_step("policy", plan.adam_at(step.index)))
        if plan.needs_critic:
            critic = engine.forward_backward(data, make_value_spec(cfg.algorithm.critic), model="critic").metrics
            if not moved and not plan.policy_learns(step.index):
                step.commit()
            critic |= engine.optim_step("critic", plan.critic_adam_at(step.index))
            step.log({f"critic/{key}": value for key, value in critic.items()})
        if number < parts:  # later passes see the same rows
            trained += zip_longest(data, () if moved else logprobs)
        moved = True
    if is_dumped(run, step):
        write_trained(run.folder.rollouts, step.number, trained, rank=run.world.rank)
    if not moved:
        step.commit()
