"""Training of a reward model on pairs of answers: a value head over the policy's weights, read at a conversation's last
token, whose difference says how much likelier the chosen answer is preferred (Bradley-Terry).

What is written is a classifier of transformers with one label; `env.options.reward=[{name: reward_model, model: ...}]`
and AutoModelForSequenceClassification load it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from skyrl.algorithms.preferences import reward_losses
from skyrl.distributed.collectives import MetricSums
from skyrl.pretrained.export import classifier_class
from skyrl.run import Run
from skyrl.text.rows import answers_of, reward_row
from skyrl.trainers.sft import update
from skyrl.types import Datum, LossSpec, Metrics, Prompt

# Of the loss through which the engine is given the derivatives.
ENGINE_METRICS = ("loss:sum", "value_error:mean", "value_clipped:mean", "value:mean", "return:mean")


def train_reward_model(run: Run) -> None:
    """Steps of batch.prompts_per_step pairs. Raises UserError for a model of which transformers has no classifier."""
    if run.cfg.checkpoint.export:
        classifier_class(run.engine.models["policy"].strategy.module.net)
    run.measure = lambda run: measure(run, run.held_out, prefix="eval/")[1]
    total, every = run.plan.num_steps, run.cfg.eval.every_steps
    for step in run.steps("reward_model", total, evaluate_every=every, evaluate_first=True):
        with step.phase("training", "train"):
            rows, metrics = measure(run, run.next_prompts())
            step.log(metrics)
            step.check_stop()
            spec, adam = LossSpec("value", {"clip": 0.0}), run.plan.adam_at(step.index)
            update(run, step, rows, spec, adam, drop=ENGINE_METRICS)


def measure(run: Run, prompts: Sequence[Prompt], prefix: str = "") -> tuple[list[Datum], Metrics]:
    """This rank's rows of these pairs, which all ranks have, with the gradient of the mean loss; and metrics of all of
    them, named as TRL's with `prefix` before. Collective."""
    mine, rows, sums = run.world.deal(list(prompts)), [], MetricSums()
    for prompt in mine:
        for text, _ in answers_of(prompt, pairs=True):
            ids = reward_row(run.engine.chat, prompt, text)
            last = (np.arange(len(ids)) == len(ids) - 1).astype(float)
            rows.append(Datum(tokens=ids, targets=np.zeros_like(ids), weights=last, name=prompt.uid))
    values = run.engine.score(rows, 1.0).values or []
    rewards = np.array([value[-1] for value in values], np.float64).reshape(-1, 2)
    margin = np.array([float(prompt.extra.get("margin", 0.0)) for prompt in mine])
    losses, slopes = reward_losses(rewards, margin=margin, center_coef=run.cfg.reward_model.center_coef)
    for row, value, slope in zip(rows, values, slopes.reshape(-1), strict=True):
        # The gradient of (v - R)^2 / 2 at R = v - 1 is that of v itself: so the weight is the derivative by v.
        row.weights = row.weights * (slope / len(prompts))
        row.values, row.returns = np.asarray(value, np.float64), np.asarray(value, np.float64) - 1.0
    gap = rewards[:, 0] - rewards[:, 1]
    for key, found in {"loss": losses, "accuracy": gap > 0, "margin": gap, "reward": rewards.reshape(-1)}.items():
        sums.add(f"{prefix}{key}:mean", float(found.sum()), float(len(found)))
    if len(rewards):
        sums.add(f"{prefix}min_reward:min", float(rewards.min()))
        sums.add(f"{prefix}max_reward:max", float(rewards.max()))
    return rows, sums.result(run.world)
