"""Steps of the environments under the policy as it is, and what they come to: values, log-probabilities, advantages."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skyrl.algorithms.advantages import RewardRows
from skyrl.algorithms.declare import ADVANTAGES
from skyrl.distributed.phases import heartbeat
from skyrl.rollout import draw_seed
from skyrl.run import Step
from skyrl.trainers.control.distributions import draws_of, to_env
from skyrl.trainers.control.engine import ControlEngine
from skyrl.trainers.control.environments import check_numbers, ended_episodes, last_observations
from skyrl.trainers.control.normalize import CLIP, discounted_sums, is_due

ROWS = 4096  # of one forward pass without a gradient


@dataclass
class ControlBatch:
    """T steps of this rank's N environments. Tensors [T, N, ...]; `hidden` [N, S]: a recurrent policy's state before
    the first step. `last` [T, N] is the critic's value of what comes after a step where an episode was cut or the batch
    ends, else 0; `done` where an episode has ended, `starts` where one begins. The last three are [T * N]."""

    observations: Tensor
    actions: Tensor
    hidden: Tensor | None
    starts: Tensor
    rewards: np.ndarray
    done: np.ndarray
    last: np.ndarray
    logprobs: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None


def uniform_draws(engine: ControlEngine, index: int) -> Tensor:
    """Uniform numbers [T, N, K] for the actions of step `index`, keyed by the run's seed and an environment's place."""
    shape = (engine.cfg.control.n_steps, draws_of(engine.action_space))
    keys = [np.uint64(draw_seed(engine.cfg.seed, "actions", index, place)) for place in engine.places]
    # raw words: numpy may change the streams of its generators between versions
    words = [np.random.Philox(key=key).random_raw(shape[0] * shape[1]).reshape(shape) for key in keys]
    return torch.from_numpy(((np.stack(words, 1) >> np.uint64(11)) + 0.5) * 2.0**-53).to(engine.world.device)


def collect(engine: ControlEngine, step: Step) -> ControlBatch:
    """Plays control.n_steps steps in every environment and adds what has ended to the step's metrics. With
    normalisation it is collective at steps that all ranks reach."""
    control, module, moments = engine.cfg.control, engine.module, engine.observation_moments
    T, N, first = control.n_steps, len(engine.places), step.index * control.n_steps
    draws, begun = uniform_draws(engine, step.index), engine.hidden
    rewards, last, done, starts = np.zeros((T, N)), np.zeros((T, N)), np.zeros((T, N), bool), np.zeros((T, N), bool)
    seen: list[Tensor] = []
    taken: list[Tensor] = []
    unseen: list[np.ndarray] = []  # observations that the statistics have not taken up
    for t in range(T):
        heartbeat()
        starts[t] = engine.starts
        if control.normalize_observations:
            unseen.append(engine.observations)
            if is_due(first + t + 1):
                moments.update(np.concatenate(unseen), engine.all_sum)
                unseen = []
        if engine.hidden is not None:
            reset = torch.from_numpy(engine.starts).to(engine.hidden.device)[:, None]
            fresh_N: Any = module.initial_state(N)
            engine.hidden = torch.where(reset, fresh_N, engine.hidden)
        with torch.no_grad():
            seen.append(engine.tensor(engine.observations))
            parameters, engine.hidden = module.act(seen[t], engine.hidden)
            taken.append(module.distribution(parameters).sample(draws[t]))
        acted = to_env(engine.action_space, taken[t], control.squash)
        observations, rewards[t], ended, cut, infos = engine.envs.step(acted)
        done[t] = ended | cut
        after = last_observations(observations, done[t], infos)
        check_numbers("an observation", after, engine.places, control.env_id)
        if t == T - 1 or cut.any():
            with torch.no_grad():
                values = module(engine.tensor(after), engine.hidden)[1].double().cpu().numpy()
            last[t] = np.where(~ended & (cut | (t == T - 1)), values, 0.0)
        for total, length in ended_episodes(infos):
            step.sums.add("reward:mean", total)
            step.sums.add("length:mean", length)
            step.sums.add("episodes:sum", 1.0)
        engine.observations, engine.starts = observations, done[t]
    if control.normalize_observations and not is_due(first + T):
        moments.update(np.concatenate(unseen), engine.all_sum)
    check_numbers("a reward", rewards.T, engine.places, control.env_id)
    tensors = (torch.stack(seen), torch.stack(taken), begun, torch.from_numpy(starts).to(engine.world.device))
    return ControlBatch(*tensors, rewards, done, last)


def evaluate_actions(engine: ControlEngine, batch: ControlBatch, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities, entropies, values), each [R], of the steps `rows` [R], indices t * N + n; of a recurrent
    policy these are whole environments, and the order is [T, environments] flattened."""
    module = engine.module
    T, N = batch.starts.shape
    if batch.hidden is None:
        parameters, values = module(batch.observations.flatten(0, 1)[rows])
    else:
        from skyrl.trainers.control.recurrent import replay

        n = rows.view(T, -1)[0] % N
        parts = replay(module.policy, batch.observations[:, n], batch.hidden[n], batch.starts[:, n])
        parameters, values = parts[0].flatten(0, 1), parts[1].flatten()
    found = module.distribution(parameters)
    return found.log_prob(batch.actions.flatten(0, 1)[rows]), found.entropy(), values


def score(engine: ControlEngine, batch: ControlBatch) -> None:
    """Fills in the policy's log-probabilities and the critic's values as they are before the update."""
    T, N = batch.starts.shape
    rows = torch.arange(T * N, device=engine.world.device)
    with torch.no_grad():
        size = ROWS if batch.hidden is None else len(rows)
        parts = [evaluate_actions(engine, batch, part) for part in rows.split(size)]
    batch.logprobs = torch.cat([part[0] for part in parts])
    batch.values = torch.cat([part[2] for part in parts])


def advantages_of(engine: ControlEngine, batch: ControlBatch) -> np.ndarray:
    """The advantages of the whole run's environments [T, n_envs], float64; fills in the batch's returns.

    The rewards are divided by the running spread of returns where the run does that. Each environment's steps are cut
    into the parts between ends of episodes, which the run's Advantage takes as episodes: it bootstraps where one was
    cut, by a limit or by the end of the batch. Collective.
    """
    cfg, (T, N) = engine.cfg, batch.rewards.shape
    declared, params = ADVANTAGES.get(cfg.algorithm.advantage.name), cfg.algorithm.advantage.params
    rewards = batch.rewards
    if cfg.control.normalize_rewards:
        sums = discounted_sums(rewards, batch.done, engine.discounted, params.get("gamma", 1.0))
        engine.discounted = np.where(batch.done[-1], 0.0, sums[-1])
        engine.return_moments.update(sums.reshape(-1, 1), engine.all_sum)
        rewards = np.clip(rewards / engine.return_moments.std, -CLIP, CLIP)
    assert batch.values is not None
    values = batch.values.view(T, N).double().cpu().numpy()
    borders = [np.unique([0, *(np.flatnonzero(batch.done[:, n]) + 1), T]).tolist() for n in range(N)]
    spans = [(n, a, b) for n in range(N) for a, b in itertools.pairwise(borders[n])]
    rows = RewardRows(
        group_D=np.array([engine.places[n] for n, _, _ in spans]),
        episode_D=np.arange(len(spans)),
        rewards=[rewards[a:b, n] for n, a, b in spans],
        masks=[np.ones(b - a, bool) for _, a, b in spans],
        valid_D=np.ones(len(spans), bool),
        values=[values[a:b, n] for n, a, b in spans],
        bootstrap_D=np.array([batch.last[b - 1, n] for n, _, b in spans]),
        log_ratios=[np.zeros(b - a) for _, a, b in spans],  # it is the policy that has played
    )
    found = declared.compute(rows, engine.all_sum, params=params)
    assert found.returns is not None
    advantages, returns = np.zeros((T, cfg.control.n_envs)), np.zeros((T, N))
    for (n, a, b), advantage, target in zip(spans, found.advantages, found.returns, strict=True):
        advantages[a:b, engine.places[n]], returns[a:b, n] = advantage, target
    batch.returns = torch.from_numpy(returns).flatten().to(batch.values)
    return engine.all_sum(advantages)
