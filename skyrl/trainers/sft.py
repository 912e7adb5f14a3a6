"""Supervised training: cross-entropy on the environment's own solutions, alone or as the warm-up before RL.

L = - sum over the step's solution tokens of log p(token) / number of these tokens, over all ranks
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from skyrl.config.schema import RunConfig
from skyrl.distributed.balance import rebalance
from skyrl.distributed.collectives import all_reduce_sum
from skyrl.loop import run_loop
from skyrl.run import Run, Step
from skyrl.types import Datum, LossSpec, UserError


def sft(cfg: RunConfig, hooks: Sequence[Any] = ()) -> dict[str, Any]:
    """Supervised training alone: `warmup.num_steps` steps, evaluation, export. Raises as `run_loop` does."""
    if cfg.warmup.num_steps == 0:
        raise UserError("warmup.num_steps=0: supervised training needs at least 1 step")
    return run_loop(
        cfg, partial(sft_warmup, called="sft", evaluate_every=cfg.eval.every_steps), supervised=True, hooks=hooks
    )


def sft_warmup(run: Run, called: str = "", evaluate_every: int = 0) -> None:
    """All supervised steps that are still to be done; RL begins, in the same run, where they end. Records call the
    phase "warmup", or what it is `called`. Evaluates every so many steps (0: after the last alone)."""
    steps = run.steps("warmup", run.cfg.warmup.num_steps, then="rl", called=called, evaluate_every=evaluate_every)
    for step in steps:
        with step.phase("training" if called else "warm-up", "train"):
            sft_step(run, step)


def sft_step(run: Run, step: Step) -> None:
    """One optimizer step on the next rows of the stream of training prompts."""
    first, count = run.state.warmup_position, run.cfg.warmup.rows_per_step
    rows = [sft_row(run, position) for position in step.deal(range(first, first + count))]
    # The mean over tokens is made here, as weights: the engine only sums, so that no split into micro-batches or ranks
    # changes what is computed. (A mean of the ranks' means would favour tokens that lie on a rank with few.)
    total = float(all_reduce_sum(run.world, np.array([sum(row.weights.sum() for row in rows)]))[0])
    if total == 0:  # solutions without a token
        step.skip_updates(1)
        step.commit()
    else:
        for row in rows:
            row.weights = row.weights / total
        step.log(run.engine.forward_backward(rebalance(run.world, rows), LossSpec("cross_entropy")).metrics)
        step.commit()
        step.log(run.engine.optim_step("policy", run.plan.warmup_adam_at(step.index)))
    run.state.warmup_position += count


def sft_row(run: Run, position: int) -> Datum:
    """The training prompt at `position` with its solution as a row whose weight is 1 on the solution's tokens: the
    prompt is read and not learned.

    Raises UserError for a prompt without a solution and for one that is too long.
    """
    prompt = run.stream.at(position)
    chat = run.engine.chat
    text = prompt.extra.get("solution")
    if text is None:
        raise UserError(
            f"warmup.num_steps={run.cfg.warmup.num_steps}: {prompt.place} of env.name={run.cfg.env.name} has no "
            "solution to learn from; set warmup.num_steps=0"
        )
    opening, answer = chat.prompt(prompt.messages), chat.answer(prompt.messages, text)
    ids = np.concatenate([opening, answer])
    if len(ids) > run.engine.max_row_tokens:
        raise UserError(
            f"{prompt.place} with its solution has {len(ids)} tokens, rows end at {run.engine.max_row_tokens}; "
            "raise batch.max_row_tokens or leave it out of the data"
        )
    weights = np.zeros(len(ids) - 1)
    weights[len(opening) - 1 :] = 1.0  # the target of the opening's last token is the answer's first
    return Datum(tokens=ids[:-1], targets=ids[1:], weights=weights, name=prompt.uid)
