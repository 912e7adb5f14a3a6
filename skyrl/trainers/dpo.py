"""Learning from preferences: DPO, IPO, SimPO, ORPO on pairs of answers, KTO on answers that were liked or not.

A step scores its answers under the policy and the frozen reference, takes the derivative of its loss by each answer's
log-probability (algorithms.preferences), and learns with these as the weights of the answers' tokens. Pairs are dealt
to the ranks; once the weights are known, rows may lie anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from skyrl.algorithms.preferences import Pairs, kto_losses, pair_losses
from skyrl.distributed.collectives import MetricSums, all_reduce_sum
from skyrl.run import Run
from skyrl.text.rows import answer_datum, answers_of
from skyrl.trainers.sft import sft_warmup, update
from skyrl.types import Datum, Floats, LossSpec, Metrics, Prompt

ENGINE_METRICS = ("loss:sum", "nll:mean")  # of the engine's cross-entropy, whose weights are derivatives here


def train_dpo(run: Run) -> None:
    """Warm-up, then batch.num_steps steps of batch.prompts_per_step prompts. The reference is the policy as the warm-up
    leaves it."""
    run.measure = lambda run: measure(run, run.held_out, prefix="eval/")[1]
    sft_warmup(run)
    run.create_models()
    total, every = run.plan.num_steps, run.cfg.eval.every_steps
    for step in run.steps("dpo", total, evaluate_every=every, evaluate_first=True):
        with step.phase("training", "train"):
            rows, metrics = measure(run, run.next_prompts())
            step.log(metrics)
            step.check_stop()
            update(run, step, rows, LossSpec("cross_entropy"), run.plan.adam_at(step.index), drop=ENGINE_METRICS)


def measure(run: Run, prompts: Sequence[Prompt], prefix: str = "") -> tuple[list[Datum], Metrics]:
    """This rank's rows of these prompts, which all ranks have, with weights that have the gradient of the mean loss of
    a pair (kto: of an answer); and metrics of all of them, named as TRL's with `prefix` before. Collective."""
    cfg, sums = run.cfg.preference, MetricSums()
    rows, liked = answer_rows(run, prompts, pairs=cfg.loss != "kto")
    lengths = np.array([row.weights.sum() for row in rows], np.float64)
    policy, reference = sequence_logprobs(run, rows)
    if cfg.loss == "kto":
        kl, ratios = mismatched_kl(run, prompts), policy - reference
        weights = cfg.desirable_weight, cfg.undesirable_weight
        losses, slopes = kto_losses(ratios, liked, kl, beta=cfg.beta, weights=weights)
        rewards, right = cfg.beta * ratios, (ratios > kl) == liked
        sums.add(f"{prefix}kl:mean", kl)
    else:
        pairs = Pairs(*(x[side::2] for x in (policy, reference, lengths) for side in (0, 1)))
        losses, by_pair, of_pair = pair_losses(
            cfg.loss, pairs, beta=cfg.beta, label_smoothing=cfg.label_smoothing, gamma=cfg.gamma
        )
        slopes, rewards, right = by_pair.reshape(-1), of_pair.reshape(-1), of_pair[:, 0] > of_pair[:, 1]
    count = float(all_reduce_sum(run.world, np.array([len(losses)]))[0])
    for row, slope in zip(rows, slopes, strict=True):  # cross-entropy is -log p
        row.weights = row.weights * (-slope / count)
    found = {"loss": losses, "rewards/accuracies": right, "rewards/chosen": rewards[liked]}
    found |= {"rewards/rejected": rewards[~liked], "logps/chosen": policy[liked], "logps/rejected": policy[~liked]}
    if cfg.loss != "kto":  # whether the policy itself finds the better answer likelier
        found["logps/accuracies"] = policy[liked] > policy[~liked]
    for key, values in found.items():
        sums.add(f"{prefix}{key}:mean", float(np.sum(values)), float(len(values)))
    metrics = sums.result(run.world)
    if {f"{prefix}rewards/{name}:mean" for name in ("chosen", "rejected")} <= metrics.keys():
        gap = metrics[f"{prefix}rewards/chosen:mean"] - metrics[f"{prefix}rewards/rejected:mean"]
        metrics[f"{prefix}rewards/margins:mean"] = gap
    if prefix:
        metrics[f"{prefix}accuracy:mean"] = metrics.get(f"{prefix}rewards/accuracies:mean", 0.0)
    return rows, metrics


def answer_rows(run: Run, prompts: Sequence[Prompt], *, pairs: bool) -> tuple[list[Datum], np.ndarray]:
    """This rank's share of the prompts' answers as rows, chosen before rejected, and whether each was liked."""
    found = [(prompt, *one) for prompt in run.world.deal(list(prompts)) for one in answers_of(prompt, pairs=pairs)]
    rows = [answer_datum(run.engine.chat, prompt, text) for prompt, text, _ in found]
    return rows, np.array([liked for *_, liked in found], bool)


def sequence_logprobs(run: Run, rows: list[Datum]) -> tuple[Floats, Floats]:
    """Sums of the log-probabilities of the rows' learned tokens, [rows] each, under the policy and under the reference:
    the policy itself while there is none yet, zeros for a loss without one. Collective."""
    reference = run.plan.reference if run.plan.reference in run.engine.models else "policy"
    sums = []
    for name in ("policy", reference) if run.plan.needs_reference else ("policy",):
        scored = zip(run.engine.score(rows, 1.0, model=name).logprobs, rows, strict=True)
        sums.append(np.array([np.sum(x, where=row.weights != 0, dtype=np.float64) for x, row in scored], np.float64))
    return sums[0], sums[1] if len(sums) > 1 else np.zeros(len(rows))


def mismatched_kl(run: Run, prompts: Sequence[Prompt]) -> float:
    """KTO's estimate of KL(policy || reference), at least 0: the mean log-ratio of answers to the prompt before theirs,
    over the prompts of a step. Rows that are too long are left out. Collective."""
    others = [answers_of(prompt, pairs=False)[0][0] for prompt in (*prompts[1:], *prompts[:1])]
    mine = run.world.deal(list(zip(prompts, others, strict=True)))
    rows = [answer_datum(run.engine.chat, prompt, text) for prompt, text in mine]
    policy, reference = sequence_logprobs(run, [row for row in rows if len(row.tokens) < run.engine.max_row_tokens])
    total = all_reduce_sum(run.world, np.array([(policy - reference).sum(), float(len(policy))]))
    return max(0.0, float(total[0] / max(1.0, total[1])))
