"""The loops: supervised warm-up, then RL. Read from top to bottom; everything else hangs below run.py and engine.py.

prompts -> episodes -> advantages -> rows -> engine. Every rank runs this text. What ranks must agree on (how many
groups were kept, denominators, metrics) goes through sums over ranks, so a branch before a collective depends on
global numbers only.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from skyrl.algorithms.advantages import ADVANTAGES, RewardRows, kl_rewards
from skyrl.algorithms.filters import filter_metrics, trained_masks, zero_variance_groups
from skyrl.algorithms.reductions import REDUCTIONS
from skyrl.config.schema import RunConfig
from skyrl.distributed.balance import rebalance
from skyrl.distributed.collectives import MetricSums, all_reduce_sum, gather_objects
from skyrl.distributed.phases import FINISHING, inside
from skyrl.evaluate import episode_metrics
from skyrl.finish import finish
from skyrl.planner.plan import make_spec, make_value_spec
from skyrl.rollout import Row, collect, to_rows
from skyrl.run import Run, open_run
from skyrl.tracking.base import memory_metrics
from skyrl.tracking.flops import ModelShape, causal_attended, forward_flops, sample_attended, train_flops
from skyrl.types import Datum, Episode, LossSpec, StopRun, UserError
from skyrl.weight_check import Probe, check_copies, check_probe, draw_probe

Group = tuple[int, list[Episode]]  # (place in the step's batch, its episodes)


def train(cfg: RunConfig) -> None:
    """The whole run: warm-up if there is one, RL, final evaluation, export. Resumes where its folder says.

    Raises StopRun, when all is saved, after a signal or at a deadline.
    """
    run = open_run(cfg)
    if run is None:
        return
    with run:
        if run.state.phase == "rl" and run.state.step >= run.plan.num_steps and not run.state.half:
            run.say(
                f"finished already: step {run.state.step} of {run.plan.num_steps}; give more batch.num_steps to go on, "
                "or another run.name to start anew"
            )
        try:
            warm_up(run)
            run.start_rl()
            reinforce(run)
        except StopRun:
            raise run.leave() from None
        with inside(FINISHING, run.state.step):
            finish(run)


def sft(cfg: RunConfig) -> None:
    """Supervised training alone: `warmup.num_steps` steps on the environment's solutions, evaluation, export.

    Raises StopRun as `train` does.
    """
    if cfg.warmup.num_steps == 0:
        raise UserError("warmup.num_steps=0: supervised training needs at least 1 step")
    run = open_run(cfg)
    if run is None:
        return
    with run:
        try:
            warm_up(run)
        except StopRun:
            raise run.leave() from None
        with inside(FINISHING, run.state.step):
            finish(run)


# ---- supervised ----------------------------------------------------------------------------------------------------


def warm_up(run: Run) -> None:
    """Cross-entropy on solutions, token mean over each step's rows; ends with an evaluation and a checkpoint."""
    cfg, state = run.cfg, run.state
    while state.phase == "warmup":
        if not state.half:
            with run.undone_by_stop():
                warm_up_step(run)
        last = state.step == cfg.warmup.num_steps
        if last:
            run.evaluate()
        run.tracker.finish_step(state.step, "warmup")
        state.half = False
        for line in run.checkpointer.poll():
            run.say(line)
        if last:
            state.phase, state.step = "rl", 0
        if last or (cfg.checkpoint.every_steps and state.step % cfg.checkpoint.every_steps == 0):
            run.save()


def warm_up_step(run: Run) -> None:
    """One optimizer step; `state.half` says afterwards that it is learned."""
    cfg, state, engine = run.cfg, run.state, run.engine
    run.stop_point()
    with run.doing("warm-up", "train", state.step + 1):
        first = state.warmup_position
        rows = [solution_row(run, first + i) for i in range(run.world.rank, cfg.warmup.rows_per_step, run.world.size)]
        total = float(all_reduce_sum(run.world, np.array([sum(row.weights.sum() for row in rows)]))[0])
        for row in rows:
            row.weights = row.weights / total
        run.tracker.add(engine.forward_backward(rebalance(run.world, rows), LossSpec("cross_entropy")).metrics)
        run.commit_point()
        run.tracker.add(engine.optim_step("policy", run.plan.warmup_adam_at(state.step)))
    state.warmup_position += cfg.warmup.rows_per_step
    state.step += 1
    state.done += 1
    state.half = True


def solution_row(run: Run, position: int) -> Datum:
    """The training prompt at `position` with its solution as a row whose weight is 1 on the solution's tokens.

    Raises UserError for a prompt without a solution.
    """
    prompt = run.stream.at(position)
    text = prompt.extra.get("solution")
    if text is None:
        raise UserError(
            f"warmup.num_steps={run.cfg.warmup.num_steps}: prompt {prompt.uid} of env.name={run.cfg.env.name} has no "
            "solution to learn from; set warmup.num_steps=0"
        )
    opening, answer = run.renderer.start(prompt.messages), run.renderer.answer(text)
    ids = np.concatenate([opening, answer])
    if len(ids) > run.engine.max_row_tokens:
        raise UserError(
            f"prompt {prompt.uid} with its solution has {len(ids)} tokens, rows end at {run.engine.max_row_tokens}; "
            "raise batch.max_row_tokens or leave it out of the data"
        )
    weights = np.zeros(len(ids) - 1)
    weights[len(opening) - 1 :] = 1.0
    return Datum(tokens=ids[:-1], targets=ids[1:], weights=weights, name=prompt.uid)


# ---- RL ------------------------------------------------------------------------------------------------------------


def reinforce(run: Run) -> None:
    """RL until batch.num_steps: collect, score, update, and what is due besides."""
    state, plan, tracker = run.state, run.plan, run.tracker
    if state.step == 0 and state.done == 0:
        run.evaluate()  # without a warm-up nothing has been evaluated yet
        tracker.finish_step(0, "rl")
    while state.step < plan.num_steps or state.half:
        if not state.half:
            with run.undone_by_stop():
                reinforce_step(run)
        if plan.due("eval", state.step):
            run.evaluate()
        tracker.finish_step(state.step, "rl")
        state.half = False
        for line in run.checkpointer.poll():
            run.say(line)
        if plan.due("save", state.step):
            run.save()


def reinforce_step(run: Run) -> None:
    """Plays a batch and learns from it; `state.half` says afterwards that it is learned."""
    state, tracker = run.state, run.tracker
    tally = MetricSums()
    run.stop_point()
    with run.doing("generation", "collect", state.step + 1):
        groups, total, played = collect_groups(run, tally)
    state.step += 1
    state.done += 1
    run.dump(played, "train")
    with run.doing("training", "train", state.step):
        learn(run, groups, total, tally)
    tracker.add(tally.result(run.world))
    tracker.add(memory_metrics())
    if run.plan.due("replicas", state.step):
        run.engine.check_replicas()
    state.half = True


def collect_groups(run: Run, tally: MetricSums) -> tuple[list[Group], int, list[list[Episode]]]:
    """This rank's groups of one batch, each with its place in the batch; how many groups all ranks have together; and
    all groups that this rank played, also those that were dropped.

    Prompt i of the stream is played on rank i % world size. With filters.refill, further prompts are played until
    prompts_per_step groups with variance are there; what is over is dropped, by place in the stream, so that the batch
    does not depend on the number of ranks.
    """
    cfg, state, world = run.cfg, run.state, run.world
    filters, wanted = cfg.algorithm.filters, cfg.batch.prompts_per_step
    kept: list[Group] = []
    played: list[list[Episode]] = []
    probe: Probe | None = None
    with run.engine.sampling("policy") as sampler:
        if run.proof_due():
            probe = draw_probe(run.engine, sampler, state.step)
        for _ in range(filters.max_refill_rounds if filters.refill else 1):
            positions = [i for i in range(state.position, state.position + wanted) if i % world.size == world.rank]
            prompts = [(i, run.stream.at(i)) for i in positions]
            groups = collect(sampler, prompts, run.play("train"), run.renderer)
            run.stop_point()
            state.position += wanted
            played += groups
            episode_metrics(tally, groups, prefix="")
            keep_P = zero_variance_groups([[e.reward for e in group if not e.invalid] for group in groups])
            episodes = [e for group in groups for e in group]
            valid_E = np.array([not e.invalid for e in episodes])
            for key, value in filter_metrics(keep_P, [e.stop for e in episodes], valid_E).items():
                tally.add(key, value)
            kept += [
                (i, group)
                for i, group, keep in zip(positions, groups, keep_P, strict=True)
                if keep or not filters.zero_variance
            ]
            if all_reduce_sum(world, np.array([len(kept)]))[0] >= wanted:
                break
        for key, value in sampler.metrics().items():
            tally.add(key, value)
    if probe is not None:
        check_copies(run.engine)
        check_probe(run.engine, probe)
    turns = [turn for group in played for e in group for turn in e.turns]
    tokens = sum(len(turn.sample.tokens) for turn in turns)
    tally.add("sampled_tokens:sum", float(tokens))
    attended = sum(sample_attended(len(turn.context), len(turn.sample.tokens)) for turn in turns)
    tally.add("flops/sample:sum", forward_flops(model_shape(run), tokens, attended))
    everyone = sorted(i for part in gather_objects(world, [i for i, _ in kept]) for i in part)[:wanted]
    place = {position: number for number, position in enumerate(everyone)}
    return [(place[i], group) for i, group in kept if i in place], len(everyone), played


def learn(run: Run, groups: list[Group], total: int, tally: MetricSums) -> None:
    """Advantages, then one optimizer step per part of the batch and pass over it. `total` groups over all ranks."""
    cfg, engine, plan = run.cfg, run.engine, run.plan
    if total == 0:  # on all ranks
        run.say(
            f"step {run.state.step}: in every group all rewards were equal, nothing to learn from "
            "(see filters/* and the rollouts)"
        )
        run.commit_point()
        return
    step = run.state.step - 1
    rows = to_rows([group for _, group in groups])
    for row in rows:
        row.group = groups[row.group][0]
    kl = add_reference(run, rows)
    run.stop_point()
    returns = add_advantages(run, rows)
    if cfg.algorithm.loss.recompute_old_logprobs:
        scored = engine.score([row.datum for row in rows], cfg.sampler.temperature)
        for row, logprobs in zip(rows, scored.logprobs, strict=True):
            row.datum.old_logprobs = logprobs
    run.stop_point()
    spec = make_spec(cfg.algorithm, cfg.sampler.temperature)
    if run.kl is not None and spec.kl_coef:
        spec = dataclasses.replace(spec, kl_coef=run.kl.coef)
    parts = cfg.batch.optim_steps_per_batch
    for number in range(plan.updates_per_step):
        part = [row for row in rows if row.group * parts // total == number % parts]
        data = rebalance(run.world, weigh(run, part))
        if plan.policy_learns(step):
            metrics = engine.forward_backward(data, spec).metrics
            if number > 0:  # later updates see a policy that has moved: only the first is the sampler/trainer gap
                metrics = {k: v for k, v in metrics.items() if not k.startswith("logprob_gap")}
            run.tracker.add(metrics)
            if number == 0:  # the last place where the step can be taken back
                run.commit_point()
            run.tracker.add(engine.optim_step("policy", plan.adam_at(step)))
        if returns:
            critic = engine.forward_backward(data, make_value_spec(cfg.algorithm.critic), model="critic").metrics
            run.tracker.add({f"critic/{key}": value for key, value in critic.items()})
            if number == 0 and not plan.policy_learns(step):
                run.commit_point()
            critic_step = engine.optim_step("critic", plan.critic_adam_at(step))
            run.tracker.add({f"critic/{key}": value for key, value in critic_step.items()})
    lengths = [len(row.datum.tokens) for row in rows]
    flops = train_flops(model_shape(run), sum(lengths), causal_attended(lengths), frozen=cfg.model.lora.rank > 0)
    tally.add("flops/train:sum", flops * cfg.batch.epochs_per_batch)
    if run.kl is not None:  # last: the whole step used the coefficient that was logged
        run.kl.update(kl, cfg.batch.prompts_per_step * cfg.batch.samples_per_prompt)


def model_shape(run: Run) -> ModelShape:
    """What the FLOP formula needs of the policy; with model.lora of its base."""
    facts = run.plan.facts
    return ModelShape(facts.matmul_parameters, facts.num_layers, facts.num_heads * facts.head_size)


def add_reference(run: Run, rows: list[Row]) -> float:
    """Log-probabilities under the frozen reference on every row; returns the mean KL per sampled token (k1), 0 without
    a reference."""
    if not run.plan.needs_reference:
        return 0.0
    cfg = run.cfg
    scored = run.engine.score([row.datum for row in rows], cfg.sampler.temperature, model=run.plan.reference)
    sums = np.zeros(2)
    for row, logprobs in zip(rows, scored.logprobs, strict=True):
        row.datum.reference = logprobs
        sums += [float((row.datum.sampling_logprobs - logprobs)[row.mask].sum(dtype=np.float64)), row.mask.sum()]
    sums = all_reduce_sum(run.world, sums)
    kl = float(sums[0] / max(1.0, sums[1]))
    run.tracker.add({"kl/behaviour_reference:mean": kl, "kl/coef:mean": run.kl_coef()})
    return kl


def add_advantages(run: Run, rows: list[Row]) -> bool:
    """Advantages on every row, and with a critic its values and returns. True when there are returns."""
    algorithm = run.cfg.algorithm
    masks = [row.mask for row in rows]
    rewards = [row.rewards for row in rows]
    if run.plan.needs_reference and algorithm.kl.placement == "reward":
        logprobs = [row.datum.sampling_logprobs for row in rows]
        rewards = kl_rewards(rewards, masks, logprobs, [row.datum.reference for row in rows], run.kl_coef())
    values = None
    if run.plan.needs_critic:
        values = run.engine.score([row.datum for row in rows], 1.0, model="critic").values
        for row, value in zip(rows, values, strict=True):
            row.datum.values = value
    reward_rows = RewardRows(
        group_D=np.array([row.group for row in rows], np.int64),
        episode_D=np.array([row.episode for row in rows], np.int64),
        rewards=rewards,
        masks=masks,
        valid_D=np.array([row.valid for row in rows], bool),
        values=values,
    )
    estimate = ADVANTAGES.get(algorithm.advantage.name, "algorithm.advantage.name")
    params = algorithm.advantage.params
    result = estimate.compute(reward_rows, lambda x: all_reduce_sum(run.world, x), params=params)
    for i, row in enumerate(rows):
        row.datum.advantages = result.advantages[i]
        if result.returns is not None:
            row.datum.returns = result.returns[i]
    learned = trained_masks(masks, [row.stop for row in rows], reward_rows.valid_D, algorithm.filters.overlong)
    for row, mask in zip(rows, learned, strict=True):
        row.mask = mask
    return result.returns is not None


def weigh(run: Run, rows: list[Row]) -> list[Datum]:
    """The rows of one optimizer step with their weights: mask and reduction in one, denominators over all ranks."""
    loss = run.cfg.algorithm.loss
    weights = REDUCTIONS.get(loss.reduction, "algorithm.loss.reduction")(
        [row.mask for row in rows],
        np.array([row.group for row in rows], np.int64),
        np.array([row.episode for row in rows], np.int64),
        lambda x: all_reduce_sum(run.world, x),
        constant=float(run.cfg.sampler.max_new_tokens),
    )
    for row, weight in zip(rows, weights, strict=True):
        row.datum.weights = weight
    return [row.datum for row in rows]
