"""PPO and A2C on Gymnasium environments, in the frame of every other loop.

A step of the loop plays control.n_steps steps in each environment and learns from them, control.epochs times in
minibatches that are chosen over all ranks. Advantages, losses, optimizer and checkpoints are those of language models.
Source: Schulman et al. 2017, arXiv 1707.06347; A2C is Mnih et al. 2016, arXiv 1602.01783, without its asynchrony.
Differs: A2C here has AdamW as everything else, not RMSprop; advantages are normalised with the population's deviation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skyrl.algorithms.advantages import EPS, whiten
from skyrl.algorithms.losses import compute_loss
from skyrl.config.schema import RunConfig
from skyrl.distributed.collectives import MetricSums, agree
from skyrl.distributed.phases import heartbeat
from skyrl.loop import run_loop
from skyrl.rollout import draw_seed
from skyrl.run import Run, Step
from skyrl.run_dir import RECORDINGS
from skyrl.trainers.control.engine import ControlEngine
from skyrl.trainers.control.environments import ended_episodes, make_env, make_envs
from skyrl.trainers.control.rollout import ControlBatch, advantages_of, collect, evaluate_actions, score
from skyrl.types import ForwardOutput, Metrics, Microbatch, UserError

ENDLESS = 100_000  # steps of an episode that is evaluated; a game of Atari has at most 27,000


def control(cfg: RunConfig, hooks: Sequence[Any] = ()) -> dict[str, Any]:
    """The whole run: environments, learning, evaluations, export. Resumes where its folder says. Raises as run_loop."""
    return run_loop(cfg, train_control, hooks=hooks, make=ControlEngine)


def train_control(run: Run) -> None:
    """Steps of the loop until control.total_steps steps of environments."""
    engine: Any = run.engine
    run.measure = measure
    if run.cfg.control.record_every:
        agree(run.world, lambda: record(run))
    for step in run.steps("control", run.plan.num_steps, evaluate_every=run.cfg.eval.every_steps, evaluate_first=True):
        begun = time.perf_counter()
        with step.phase("generation", "collect"):
            batch = collect(engine, step)
            step.check_stop()
        with step.phase("training", "train"):
            update(run, step, engine, batch)
        steps = float(run.cfg.control.n_envs * run.cfg.control.n_steps)
        speed = steps / (time.perf_counter() - begun)
        step.log({"env_steps:sum": steps, "speed/env_steps_per_second:mean": speed})
    if run.cfg.control.record_every and run.world.is_leader:  # of the policy that the run ends with, whenever that is
        record(run, engine.player())


def minibatches(seed: int, index: int, epoch: int, total: int, size: int, unit: int = 1) -> list[np.ndarray]:
    """The minibatches of an epoch: disjoint parts of `size` numbers below `total`, in an order keyed by seed, step and
    epoch. Numbers that are equal modulo total / unit stay together (whole environments, for a recurrent policy)."""
    key = np.uint64(draw_seed(seed, "minibatches", index, epoch))
    groups = total // unit
    order = np.argsort(np.random.Philox(key=key).random_raw(groups), kind="stable")
    whole = np.arange(unit)[:, None] * groups
    return [(whole + part[None, :]).reshape(-1) for part in np.split(order, total // size)]


def update(run: Run, step: Step, engine: ControlEngine, batch: ControlBatch) -> None:
    """Commits the step; all optimizer steps on its batch. Collective."""
    cfg, world, control = run.cfg, run.world, run.cfg.control
    score(engine, batch)
    advantages = advantages_of(engine, batch)
    T, N = batch.rewards.shape
    total, everyone = T * control.n_envs, advantages.reshape(-1)
    strategy, adam = engine.models["policy"].strategy, run.plan.adam_at(step.index)
    columns = np.full(control.n_envs, -1)  # where this rank has an environment; -1: another rank has it
    columns[engine.places] = np.arange(N)
    stopped = False
    step.commit()
    engine.keep()
    for epoch in range(control.epochs):
        unit = T if batch.hidden is not None else 1
        for picked in minibatches(cfg.seed, step.index, epoch, total, control.minibatch_size, unit):
            own = everyone[picked]
            own = whiten([own], [float(np.abs(own).max())], EPS.default, lambda x: x)[0]
            column = columns[picked % control.n_envs]
            mine = column >= 0
            rows = torch.from_numpy((picked // control.n_envs * N + column)[mine]).to(world.device)
            kl = learn(engine, step, batch, rows, own[mine]) if len(rows) else 0.0
            if control.target_kl and engine.all_sum(np.array([kl]))[0] > 1.5 * control.target_kl * len(picked):
                strategy.clear_gradient()
                stopped = True
                break
            step.log(engine.models["policy"].optim_step(adam))
        if stopped:
            break
    step.log({"epochs:mean": float(epoch + (not stopped))})


def learn(engine: ControlEngine, step: Step, batch: ControlBatch, rows: Tensor, advantages: np.ndarray) -> float:
    """Adds the gradient of policy, value and entropy terms of this rank's part of a minibatch, and its metrics; returns
    the sum of the steps' approximate KL."""
    assert batch.logprobs is not None and batch.values is not None and batch.returns is not None
    control = engine.cfg.control
    logprobs, entropy, values = evaluate_actions(engine, batch, rows)
    count, one = len(rows), torch.ones_like(logprobs)
    index = torch.arange(count + 1, device=rows.device)
    data = Microbatch(
        *(index[:-1], index[:-1], index[:-1], index[:-1], index.int(), (1,) * count, one),  # each step is a row
        sampling_logprobs_T=batch.logprobs[rows],
        advantages_T=torch.from_numpy(advantages).to(logprobs),
        values_T=batch.values[rows],
        returns_T=batch.returns[rows],
    )
    policy_T, metrics = compute_loss(ForwardOutput(logprobs, entropy), data, engine.specs[0])
    value_T, of_values = compute_loss(ForwardOutput(logprobs, None, values), data, engine.specs[1])
    loss = (policy_T + control.value_coef * value_T).sum() / control.minibatch_size
    engine.models["policy"].strategy.backward(loss)
    metrics = {**metrics, **{f"critic/{key}": value for key, value in of_values.items()}}
    names = [name for name in metrics if not name.startswith("logprob_gap")]
    stacked = torch.stack([metrics[name].to(loss.dtype) for name in names])
    sums, largest = stacked.sum(1).tolist(), stacked.amax(1).tolist()
    for name, total, most in zip(names, sums, largest, strict=True):
        step.sums.add(name, *((most,) if name.endswith(":max") else (total, float(count))))
    return dict(zip(names, sums, strict=True)).get("approx_kl:mean", 0.0)


def measure(run: Run) -> Metrics:
    """Return and length of control.eval_episodes episodes with the likeliest actions, the same episodes each time.
    Dealt to the ranks. Collective."""
    engine: Any = run.engine
    control, sums, places = run.cfg.control, MetricSums(), run.world.deal(range(run.cfg.control.eval_episodes))
    if places:
        envs = make_envs(run.cfg, places, "eval")
        observations, _ = envs.reset()
        state, left, steps = engine.module.initial_state(len(places)), np.ones(len(places), bool), 0
        while left.any():
            if (steps := steps + 1) > ENDLESS:
                raise UserError(
                    f"control.env_id={control.env_id}: an episode of the evaluation has not ended after {ENDLESS:,} "
                    "steps; set control.max_episode_steps"
                )
            heartbeat()
            actions, state = engine.act(observations, state)
            observations, _, ended, cut, infos = envs.step(actions)
            done = ended | cut
            for i, (total, length) in zip(np.flatnonzero(done), ended_episodes(infos), strict=True):
                if left[i]:
                    for name in ("reward:mean", "reward:min", "reward:max"):
                        sums.add(f"eval/{name}", total)
                    sums.add("eval/length:mean", length)
            left &= ~done
        envs.close()
    every = control.record_every * max(1, run.cfg.eval.every_steps)
    if every and run.state.global_step % every == 0 and run.world.is_leader:
        record(run, engine.player())
    return sums.result(run.world)


def record(run: Run, play: Callable[[Any], Any] | None = None) -> None:
    """Writes the first episode of an evaluation, as `play` acts, under the number of this step; without `play` looks
    whether that can be done, and raises UserError where it cannot."""
    from skyrl.trainers.control.record import record_episode, render_problem

    cfg, path = run.cfg, run.folder.path / RECORDINGS / f"{run.state.global_step:06d}.gif"
    env = make_env(cfg, 0, "eval", render_mode="rgb_array")
    problem = render_problem(env) if play is None else ""
    if play is not None and not path.exists():
        record_episode(env, play, path)
    env.close()
    if problem:
        where = f"control.record_every={cfg.control.record_every}: {cfg.control.env_id}"
        raise UserError(f"{where} cannot be recorded: {problem}; leave it at 0")
