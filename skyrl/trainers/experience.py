"""From sampled rows to training data: reference, values, advantages, old log-probabilities, weights.

Each stage takes rows and returns rows with one more field. Data are made last (`apply_reduction`), since a Datum's
weights need denominators over the very rows that learn together.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from skyrl.algorithms.advantages import ADVANTAGES, RewardRows, decoupled, kl_rewards
from skyrl.algorithms.filters import trained_masks
from skyrl.algorithms.reductions import REDUCTIONS
from skyrl.distributed.collectives import all_reduce_sum
from skyrl.rollout import Row
from skyrl.run import Run, Step
from skyrl.tracking.flops import ModelShape, causal_attended, train_flops
from skyrl.types import Datum


def add_reference(run: Run, step: Step, rows: list[Row]) -> tuple[list[Row], float]:
    """Rows with log-probabilities under the frozen reference, and the mean KL per sampled token (the k1 estimate,
    log pi - log ref over the policy's own samples). As they are, and 0, without a KL term."""
    if not run.cfg.algorithm.kl.coef:
        return rows, 0.0
    scored = run.engine.score(_to_score(rows), run.cfg.sampler.temperature, model=run.plan.reference)
    rows = [replace(row, reference=logprobs) for row, logprobs in zip(rows, scored.logprobs, strict=True)]
    sums = np.zeros(2)
    for row, logprobs in zip(rows, scored.logprobs, strict=True):
        gap = (row.sampling_logprobs - logprobs)[row.mask].sum(dtype=np.float64)
        sums += [float(gap), row.mask.sum()]
    sums = all_reduce_sum(run.world, sums)
    kl = float(sums[0] / max(1.0, sums[1]))
    step.log({"kl/behaviour_reference:mean": kl, "kl/coef:mean": run.kl_coef()})
    return rows, kl


def add_advantages(run: Run, rows: list[Row]) -> list[Row]:
    """Rows with advantages, and with which tokens are trained; with a critic also with its values and returns."""
    algorithm = run.cfg.algorithm
    masks = [row.mask for row in rows]
    rewards = [row.rewards for row in rows]
    if algorithm.kl.coef and algorithm.kl.placement == "reward":
        logprobs = [row.sampling_logprobs for row in rows]
        references = [row.reference for row in rows if row.reference is not None]
        rewards = kl_rewards(rewards, masks, logprobs, references, run.kl_coef())
    values = None
    if run.plan.needs_critic:
        values = run.engine.score(_to_score(rows), 1.0, model="critic").values
    names = run.objectives.names
    reward_rows = RewardRows(
        group_D=np.array([row.group for row in rows], np.int64),
        episode_D=np.array([row.episode for row in rows], np.int64),
        rewards=rewards,
        masks=masks,
        valid_D=np.array([row.valid for row in rows], bool),
        values=values,
        scales=[row.scales for row in rows] if names else None,  # type: ignore[misc]
        objectives={k: [row.objectives.get(k, np.zeros(len(row.rewards))) for row in rows] for k in names},
    )
    estimate = ADVANTAGES.get(algorithm.advantage.name, "algorithm.advantage.name")
    params, reduce = algorithm.advantage.params, partial(all_reduce_sum, run.world)
    if algorithm.objectives.normalise and names:
        result = decoupled(estimate, params, {k: run.objectives.weight(k) for k in names}, reward_rows, reduce)
    else:
        result = estimate.compute(reward_rows, reduce, params=params)
    trained = trained_masks(masks, [row.stop for row in rows], reward_rows.valid_D, algorithm.filters.overlong)
    return [
        replace(
            row,
            values=None if values is None else values[i],
            advantages=result.advantages[i],
            returns=None if result.returns is None else result.returns[i],
            trained=trained[i],
        )
        for i, row in enumerate(rows)
    ]


def add_old_logprobs(run: Run, rows: list[Row]) -> list[Row]:
    """Rows with the policy's log-probabilities before the first update of the batch, from a training forward pass.

    Only with algorithm.loss.recompute_old_logprobs: otherwise the losses take the sampler's own, which are equal up to
    rounding, since the sampler reads the trained weights themselves."""
    if not run.cfg.algorithm.loss.recompute_old_logprobs:
        return rows
    scored = run.engine.score(_to_score(rows), run.cfg.sampler.temperature)
    return [replace(row, old_logprobs=logprobs) for row, logprobs in zip(rows, scored.logprobs, strict=True)]


def trained_tokens(run: Run, rows: list[Row]) -> int:
    """How many tokens of these rows are learned from, over all ranks. Collective."""
    mine = sum(int(row.trained.sum()) for row in rows if row.trained is not None)
    return int(all_reduce_sum(run.world, np.array([mine]))[0])


def apply_reduction(run: Run, rows: list[Row]) -> list[Datum]:
    """The rows of one optimizer step as data: mask and mean in one weight per token, denominators over all ranks."""
    loss = run.cfg.algorithm.loss
    weights = REDUCTIONS.get(loss.reduction, "algorithm.loss.reduction")(
        [row.trained for row in rows if row.trained is not None],
        np.array([row.group for row in rows], np.int64),
        np.array([row.episode for row in rows], np.int64),
        lambda x: all_reduce_sum(run.world, x),
        constant=float(run.cfg.sampler.max_new_tokens),
    )
    return [row.datum(weight) for row, weight in zip(rows, weights, strict=True)]


def count_flops(run: Run, step: Step, rows: list[Row]) -> None:
    """Adds the FLOPs of training on these rows to the step's metrics, for MFU."""
    lengths = [len(row.tokens) for row in rows]
    frozen = run.cfg.model.lora.rank > 0
    flops = train_flops(model_shape(run), sum(lengths), causal_attended(lengths), frozen=frozen)
    step.sums.add("flops/train:sum", flops * run.cfg.batch.epochs_per_batch)


def model_shape(run: Run) -> ModelShape:
    """What the FLOP formula needs of the policy; with model.lora of its base."""
    sizes = run.plan.sizes
    assert sizes is not None  # a run that is open has been planned with its model
    return ModelShape(sizes.matmul_parameters, sizes.num_layers, sizes.num_heads * sizes.head_size)


def _to_score(rows: list[Row]) -> list[Datum]:
    """For a forward pass without a loss: weights only mark what was sampled."""
    return [row.datum(row.mask.astype(np.float32)) for row in rows]
