"""Distillation: the policy learns the next-token distributions of a frozen teacher that reads the same tokens.

On policy the student answers prompts itself and learns from the teacher at every token that it drew; off policy it
does so along given solutions. The teacher's likeliest tokens are looked up, the student is scored at these, and the
derivative of the divergence by each log-probability (algorithms.preferences) is the weight with which it is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from skyrl.algorithms.preferences import divergence
from skyrl.config.trainers import NO_REWARD
from skyrl.distributed.collectives import MetricSums, all_reduce_sum, gather_objects
from skyrl.distributed.phases import LOADING, inside
from skyrl.engine import ModelSpec
from skyrl.evaluation.measure import play_and_measure
from skyrl.rollout import Group, draw_seed, to_rows
from skyrl.run import Run, Step
from skyrl.trainers.experience import frozen_source
from skyrl.trainers.generation import generate_groups
from skyrl.trainers.sft import sft_warmup, solution_row
from skyrl.types import Datum, LossSpec, Metrics

CELLS = 1 << 24  # log-probabilities of teacher and student that a rank holds at a time


def train_distill(run: Run) -> None:
    """Warm-up, then batch.num_steps steps, each on the student's own answers or on solutions, by distill.on_policy.
    Raises UserError for a teacher with another tokenizer."""
    teacher = frozen_source(run, run.cfg.distill.teacher, "distill.teacher")
    sft_warmup(run)
    with inside(LOADING, run.state.global_step):
        run.engine.create("teacher", ModelSpec(trainable=False, source=teacher))
        # rows of an embedding that only fill it up are told apart by neither of them
        module = run.engine.models["teacher"].strategy.module
        module.top_tokens = run.engine.models["policy"].whole.strategy.module.vocab_size
    run.measure = measure
    total, every = run.plan.num_steps, run.cfg.eval.every_steps
    for step in run.steps("distill", total, evaluate_every=every, evaluate_first=True):
        rows = collect(run, step)
        with step.phase("training", "train"):
            count = float(all_reduce_sum(run.world, np.array([sum(np.count_nonzero(r.weights) for r in rows)]))[0])
            sums = MetricSums()
            tokens = learn(run, rows, max(1.0, count), sums)
            step.log({"tokens:sum": tokens, **sums.result(run.world)})
            step.commit()
            if count:
                step.log(run.engine.optim_step("policy", run.plan.adam_at(step.index)))
            else:
                step.skip_updates(1)


def collect(run: Run, step: Step) -> list[Datum]:
    """This rank's rows of a step, with weight 1 on the tokens to learn at: drawn by the student, or solutions. Which of
    them it is depends on the seed and the step alone. Collective."""
    if draw_seed(run.cfg.seed, "distill", step.index) < run.cfg.distill.on_policy * 2**63:
        with step.phase("generation", "collect"):
            return drawn_rows(generate_groups(run, step)[0])
    return [solution_row(run, prompt) for prompt in step.deal(run.next_prompts())]


def drawn_rows(groups: Sequence[Group]) -> list[Datum]:
    """The rows of episodes, with weight 1 on what was drawn."""
    rows = [row for row in to_rows(groups) if row.valid]
    return [Datum(row.tokens, row.targets, row.mask.astype(float), name=row.name) for row in rows]


def learn(run: Run, rows: list[Datum], count: float, sums: MetricSums, *, backward: bool = True) -> float:
    """Adds the gradient of the mean divergence over `count` tokens of all ranks, and to `sums` the divergence of each
    of this rank's tokens; returns the tokens that were forwarded with a gradient. A part of the rows at a time, since
    each token has a number for every token of the vocabulary that is told apart. Collective."""
    cfg, engine, temperature = run.cfg.distill, run.engine, run.cfg.sampler.temperature
    assert run.plan.sizes is not None
    vocabulary = min(run.plan.sizes.vocab_size, engine.models["teacher"].strategy.module.vocab_size)
    top_k = min(cfg.teacher_top_k or vocabulary, vocabulary)
    spec = LossSpec("cross_entropy", temperature=temperature)
    parts: list[list[Datum]] = [[]]
    for row in rows:
        if parts[-1] and (sum(len(r.tokens) for r in parts[-1]) + len(row.tokens)) * top_k > CELLS:
            parts.append([])
        parts[-1].append(row)
    most = max(gather_objects(run.world, len(parts)))
    tokens = 0.0
    for part in [*parts, *[[]] * (most - len(parts))]:
        found = engine.score(part, temperature, model="teacher", top_k=top_k).logprobs
        asked = [
            replace(row, targets=x[:, top_k:].astype(np.int64), weights=np.ones((len(x), top_k)))
            for row, x in zip(part, found, strict=True)
        ]
        student = engine.score(asked, temperature).logprobs
        for row, wide, own, teacher in zip(part, asked, student, found, strict=True):
            value, weights = divergence(own, teacher[:, :top_k], cfg.beta, whole=top_k == run.plan.sizes.vocab_size)
            learned = row.weights != 0
            sums.add("distill/divergence:mean", float(value[learned].sum()), float(learned.sum()))
            wide.weights = -weights * (learned / count)[:, None]  # cross-entropy is -log p
        if backward:
            tokens += engine.forward_backward(asked, spec).metrics["tokens:sum"]
    return tokens


def measure(run: Run) -> Metrics:
    """Held-out prompts as any evaluation plays them, and the divergence from the teacher along these answers,
    "eval/divergence:mean" in nats a token; no accuracy where the environment scores nothing. Collective."""
    (groups, metrics), sums = play_and_measure(run, run.sets[0]), MetricSums()
    learn(run, drawn_rows(list(enumerate(groups))), 1.0, sums, backward=False)
    if run.cfg.env.name in NO_REWARD:
        metrics = {key: value for key, value in metrics.items() if key != "eval/accuracy:mean"}
    return {**metrics, "eval/divergence:mean": sums.result(run.world).get("distill/divergence:mean", 0.0)}
