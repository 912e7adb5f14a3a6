"""Supervised training: cross-entropy on the environment's own solutions, alone or as the warm-up before RL.

L = - sum over the step's solution tokens of log p(token) / number of these tokens, over all ranks
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from skyrl.config.schema import RunConfig
from skyrl.distributed.balance import rebalance
from skyrl.distributed.collectives import all_reduce_sum, gather_objects
from skyrl.loop import run_loop
from skyrl.run import Run, Step
from skyrl.text.rows import answer_datum
from skyrl.types import AdamParams, Datum, LossSpec, Metrics, Prompt, UserError


def sft(cfg: RunConfig, hooks: Sequence[Any] = ()) -> dict[str, Any]:
    """Supervised training alone: `warmup.num_steps` steps, or data.epochs, evaluation, export. Raises as `run_loop`
    does."""
    return run_loop(cfg, _train, supervised=True, hooks=hooks)


def _train(run: Run) -> None:
    if run.cfg.env.name == "chat":  # its rows are not scored when they are played
        run.measure = measure_solutions
    sft_warmup(run, called="sft", evaluate_every=run.cfg.eval.every_steps)


def sft_warmup(run: Run, called: str = "", evaluate_every: int = 0) -> None:
    """All supervised steps that are still to be done; what follows begins, in the same run, where they end. Records
    call the phase "warmup", or what it is `called`. Evaluates every so many steps (0: after the last alone)."""
    total, then = run.cfg.warmup.num_steps, run.plan.phase
    for step in run.steps("warmup", total, then=then, called=called, evaluate_every=evaluate_every):
        with step.phase("training" if called else "warm-up", "train"):
            first, count = run.state.warmup_position, run.cfg.warmup.rows_per_step
            rows = [solution_row(run, run.stream.at(position)) for position in step.deal(range(first, first + count))]
            # The mean over tokens is made here, as weights: the engine only sums, so that no split into micro-batches
            # or ranks changes what is computed. (A mean of the ranks' means would favour tokens on a rank with few.)
            weight = float(all_reduce_sum(run.world, np.array([sum(row.weights.sum() for row in rows)]))[0])
            for row in rows:
                row.weights = row.weights / (weight or 1.0)
            update(run, step, rows, LossSpec("cross_entropy"), run.plan.warmup_adam_at(step.index))
            run.state.warmup_position += count


def update(
    run: Run, step: Step, rows: list[Datum], spec: LossSpec, adam: AdamParams, *, drop: Collection[str] = ()
) -> None:
    """One optimizer step on the ranks' rows, whose weights hold mask and mean already; commits the step. Where no rank
    has a token to learn from it is skipped: AdamW would move the weights by its momentum alone. `drop`: metrics of the
    engine that mean nothing to this trainer. Collective."""
    if not any(gather_objects(run.world, any(row.weights.any() for row in rows))):
        step.skip_updates(1)
        step.commit()
        return
    metrics = run.engine.forward_backward(rebalance(run.world, rows), spec).metrics
    step.log({key: value for key, value in metrics.items() if key not in drop})
    step.commit()
    step.log(run.engine.optim_step("policy", adam))


def measure_solutions(run: Run) -> Metrics:
    """The mean negative log-probability of held-out solutions' tokens, "eval/nll:mean", in nats. Collective."""
    rows = [solution_row(run, prompt) for prompt in run.world.deal(list(run.held_out))]
    return {"eval/nll:mean": run.engine.forward(rows, LossSpec("cross_entropy")).metrics.get("nll:mean", 0.0)}


def solution_row(run: Run, prompt: Prompt) -> Datum:
    """A prompt with its solution as a row whose weight is 1 on the solution's tokens: the prompt is read, not learned.

    Raises UserError for a prompt without a solution and for one that is too long.
    """
    text = prompt.extra.get("solution")
    if text is None:
        raise UserError(
            f"warmup.num_steps={run.cfg.warmup.num_steps}: {prompt.place} of env.name={run.cfg.env.name} has no "
            "solution to learn from; set warmup.num_steps=0"
        )
    row = answer_datum(run.engine.chat, prompt, text)
    if len(row.tokens) >= run.engine.max_row_tokens:
        raise UserError(
            f"{prompt.place} with its solution has {len(row.tokens) + 1} tokens, rows end at "
            f"{run.engine.max_row_tokens}; raise batch.max_row_tokens or leave it out of the data"
        )
    return row
