"""From sampled rows to training data: reference, values, advantages, old log-probabilities, weights.

Each stage takes rows and returns rows with one more field. Data are made last (`apply_reduction`), since a Datum's
weights need denominators over the very rows that learn together.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch

from skyrl.algorithms.advantages import ADVANTAGES, RewardRows, decoupled, kl_rewards
from skyrl.algorithms.corrections import CORRECTIONS, MASKS
from skyrl.algorithms.filters import overlong_penalty, trained_masks
from skyrl.algorithms.losses import LOSSES
from skyrl.algorithms.reductions import REDUCTIONS
from skyrl.algorithms.selection import SELECTIONS, covariances, top_entropy
from skyrl.config.schema import ModelConfig
from skyrl.distributed.collectives import agree, all_reduce_sum, gather_objects
from skyrl.distributed.phases import LOADING, inside
from skyrl.engine import ModelSpec
from skyrl.models.packed import collate
from skyrl.rollout import Row, draw_seed
from skyrl.run import Run, Step
from skyrl.text.tokenizer import load_tokenizer
from skyrl.tracking.flops import ModelShape, causal_attended, train_flops
from skyrl.types import Datum, Floats, UserError


def frozen_source(run: Run, path: str, option: str) -> ModelConfig:
    """The weights at `path`, for a frozen model beside the policy. Raises UserError, on all ranks, that begins with
    `option`, unless its tokens are the policy's, id by id. Collective."""
    source = replace(run.cfg.model, path=path, revision="", tokenizer="", chat_template="")

    def check() -> None:
        try:
            own, other = run.engine.tokenizer.get_vocab(), load_tokenizer(source).get_vocab()
        except UserError as error:
            raise type(error)(f"{option}: {path}: {error}") from error
        if own != other:
            odd = min(own.keys() ^ other.keys() or (t for t in own if own[t] != other[t]))
            raise UserError(
                f"{option}: {path} has another tokenizer than the policy ({len(other)} tokens and {len(own)}; {odd!r} "
                f"is {other.get(odd, 'none')} there and {own.get(odd, 'none')} here), so its probabilities are of "
                "other tokens; give a model of the same family"
            )

    agree(run.world, check)
    return source


def create_references(run: Run) -> None:
    """Loads the further references of algorithm.reference.models. Raises UserError, on all ranks, for one that cannot
    be loaded or has another tokenizer. They never change, so no checkpoint has them. Collective."""
    for path in run.cfg.algorithm.reference.models:
        source = frozen_source(run, path, "algorithm.reference.models")
        try:
            with inside(LOADING, run.state.global_step):
                run.engine.create(f"reference {path}", ModelSpec(trainable=False, source=source))
        except UserError as error:
            raise type(error)(f"algorithm.reference.models: {path}: {error}") from error


def _references(run: Run) -> dict[str, float]:
    """The engine's names of all references that count, and their weights, which sum to 1."""
    others = run.cfg.algorithm.reference.models
    own = 1.0 - sum(others.values())
    named = {f"reference {path}": weight for path, weight in others.items()}
    return named if own < 1e-9 else {run.plan.reference: own, **named}


def add_reference(run: Run, step: Step, rows: list[Row]) -> tuple[list[Row], float]:
    """Rows with log-probabilities under the reference, and the mean KL per sampled token (the k1 estimate,
    log pi - log ref over the policy's own samples). As they are, and 0, without a KL term.

    Of several references it is the weighted mean of their log-probabilities: log pi minus that is the weighted sum of
    the k1 estimates, and the gradient of its square that of the weighted sum of the k2."""
    if not run.cfg.algorithm.kl.coef:
        return rows, 0.0
    weights, data = _references(run), [replace(one, experts=None) for one in _to_score(rows)]  # routers of its own
    scored = [run.engine.score(data, run.cfg.sampler.temperature, model=model).logprobs for model in weights]
    means = scored[0]
    if len(weights) > 1:
        means = [sum(w * one for w, one in zip(weights.values(), of, strict=True)) for of in zip(*scored, strict=True)]
    rows = [replace(row, reference=logprobs) for row, logprobs in zip(rows, means, strict=True)]
    sums = np.zeros(2)
    for row, logprobs in zip(rows, means, strict=True):
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
    if algorithm.filters.overlong_buffer:
        rewards = overlong_penalty(rewards, masks, run.cfg.sampler.max_new_tokens, algorithm.filters.overlong_buffer)
    estimate = ADVANTAGES.get(algorithm.advantage.name, "algorithm.advantage.name")
    params, reduce = algorithm.advantage.params, partial(all_reduce_sum, run.world)
    values = bootstrap_D = None
    if run.plan.needs_critic:
        values, bootstrap_D = _values(run, rows, bootstrap=bool(params.get("bootstrap")))
    names = run.objectives.names
    baselines = [row.baseline for row in rows if row.baseline is not None]
    reward_rows = RewardRows(
        group_D=np.array([row.group for row in rows], np.int64),
        episode_D=np.array([row.episode for row in rows], np.int64),
        rewards=rewards,
        masks=masks,
        valid_D=np.array([row.valid for row in rows], bool),
        values=values,
        baseline_D=np.array(baselines) if len(baselines) == len(rows) else None,
        scales=[row.scales for row in rows] if names else None,  # type: ignore[misc]
        objectives={k: [row.objectives.get(k, np.zeros(len(row.rewards))) for row in rows] for k in names},
        bootstrap_D=bootstrap_D,
        log_ratios=[_base(row) - row.sampling_logprobs for row in rows] if estimate.off_policy else None,
    )
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


def _base(row: Row) -> Floats:
    return row.sampling_logprobs if row.old_logprobs is None else row.old_logprobs


def _values(run: Run, rows: list[Row], *, bootstrap: bool) -> tuple[list[Floats], Floats]:
    """The critic's values [L] of each row, and with `bootstrap` its value after the last token of rows that a length
    limit cut (else 0): such a row is scored with that token as well."""
    data, cut = _to_score(rows), [bootstrap and row.stop == "length" for row in rows]
    if bootstrap:
        longer = [
            np.append(row.tokens, row.targets[-1:]) if c else row.tokens for row, c in zip(rows, cut, strict=True)
        ]
        data = [Datum(x, x, np.ones(len(x), np.float32), name=r.name) for x, r in zip(longer, rows, strict=True)]
    values = run.engine.score(data, 1.0, model="critic").values
    assert values is not None
    last_D = np.array([v[-1] if c else 0.0 for v, c in zip(values, cut, strict=True)], np.float32)
    return [v[: len(row.tokens)] for v, row in zip(values, rows, strict=True)], last_D


def note_advantages(step: Step, rows: list[Row]) -> None:
    """Adds the advantages of the tokens that are trained to the step's metrics."""
    parts = [row.advantages[row.trained] for row in rows if row.advantages is not None and row.trained is not None]
    found = np.concatenate([np.zeros(0), *parts])
    if len(found):
        step.sums.add("advantage:mean", float(found.sum()), len(found))
        step.sums.add("advantage_abs:mean", float(np.abs(found).sum()), len(found))
        step.sums.add("advantage:max", float(found.max()))
        step.sums.add("advantage:min", float(found.min()))


def add_old_logprobs(run: Run, rows: list[Row]) -> list[Row]:
    """Rows with the policy's log-probabilities before the first update of the batch, from a training forward pass.

    Only with algorithm.loss.recompute_old_logprobs: otherwise the losses take the sampler's own, which are equal up to
    rounding, since the sampler reads the trained weights themselves."""
    if not run.cfg.algorithm.loss.recompute_old_logprobs:
        return rows
    scored = run.engine.score(_to_score(rows), run.cfg.sampler.temperature)
    return [replace(row, old_logprobs=logprobs) for row, logprobs in zip(rows, scored.logprobs, strict=True)]


def select_tokens(run: Run, step: Step, rows: list[Row], number: int) -> list[Row]:
    """The rows of the step's optimizer step `number` with what depends on all its tokens: those of low entropy have no
    advantage, or with loss.rejected=dropped they and those that a correction's mask rejects are not `trained`; and
    `selected` is set for a loss that reads it. Collective where an option asks for it."""
    loss = run.cfg.algorithm.loss
    drop = loss.rejected == "dropped"

    def gather(mine: np.ndarray) -> np.ndarray:
        return np.concatenate(gather_objects(run.world, mine))

    def trained() -> list[np.ndarray]:
        return [row.mask if row.trained is None else row.trained for row in rows]

    if loss.top_entropy < 1:
        scored = run.engine.score(_to_score(rows), run.cfg.sampler.temperature, entropy=True).logprobs
        kept = top_entropy(scored, trained(), gather, loss.top_entropy)
        for i, (row, keep) in enumerate(zip(rows, kept, strict=True)):
            assert row.advantages is not None
            rows[i] = (
                replace(row, trained=keep) if drop else replace(row, advantages=np.where(keep, row.advantages, 0.0))
            )
    if drop and loss.correction in MASKS:
        data = [row.datum(mask.astype(np.float64)) for row, mask in zip(rows, trained(), strict=True)]
        rejected = [weight == 0 for weight in _corrections(run, data)]
        rows = [replace(row, trained=m & ~r) for row, m, r in zip(rows, trained(), rejected, strict=True)]
    if "selected" in LOSSES.get(loss.name, "algorithm.loss.name").needs:
        advantages = [row.advantages for row in rows if row.advantages is not None]
        covariance = covariances([_base(row) for row in rows], advantages, trained(), gather)
        keys = [("selection", run.cfg.seed, step.number, number, row.group, row.name) for row in rows]
        draws = [
            np.random.default_rng(draw_seed(*key)).random(len(r.tokens)) for key, r in zip(keys, rows, strict=True)
        ]
        chosen = SELECTIONS[loss.name](covariance, draws, gather, loss.params)
        rows = [replace(row, selected=one.astype(np.float32)) for row, one in zip(rows, chosen, strict=True)]
    return rows


def _corrections(run: Run, data: list[Datum]) -> list[Floats]:
    """The correction's weight of each token of data that have old log-probabilities; 0 where nothing is trained."""
    if not data:
        return []
    loss, mb = run.cfg.algorithm.loss, collate(data, torch.float64, "cpu")
    assert mb.old_logprobs_T is not None and mb.sampling_logprobs_T is not None
    trained_T = mb.weights_T != 0
    log_ratio_T = (mb.old_logprobs_T - mb.sampling_logprobs_T).where(trained_T, 0.0)
    weight_T = CORRECTIONS.get(loss.correction)(log_ratio_T, mb, loss.correction_cap, loss.correction_low)
    return np.split(weight_T.where(trained_T, 0.0).numpy(), np.cumsum(mb.lengths)[:-1])


def correction_scale(run: Run, data: list[Datum]) -> float:
    """What the correction's weights of an optimizer step are multiplied by: with loss.correction_normalise 1 over their
    mean, taken with the weights of the reduction; else 1. Collective then."""
    if not run.cfg.algorithm.loss.correction_normalise:
        return 1.0
    mine = [(d.weights.sum(), (d.weights * w).sum()) for d, w in zip(data, _corrections(run, data), strict=True)]
    whole, weighted = all_reduce_sum(run.world, np.array(mine, np.float64).reshape(-1, 2).sum(axis=0))
    return float(whole / weighted) if weighted > 0 else 1.0


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
