"""A check that the sampler draws from the trained weights: made at a hand-over, on an interval, loud when it fails.

Two parts, since each sees what the other cannot. Checksums compare every tensor that is handed over with the
optimizer's own weights, bit for bit, and over ranks: they see old or torn copies. A probe compares log-probabilities
of drawn tokens with those of a training forward pass: it sees what the sampler makes of the tensors it was handed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from skyrl.distributed.collectives import gather_objects
from skyrl.engine import Engine
from skyrl.rollout import check_drawn, draw_seed
from skyrl.sampler.sampler import Sampler
from skyrl.strategies.base import full_tensor
from skyrl.types import Datum, RunError, Sample, SampleRequest, SamplingParams

PROBES, PROMPT_TOKENS, DRAWN_TOKENS = 4, 8, 8
# Mean distance of log-probabilities over the probe's tokens. Rounding stays ten times below it on models we know.
LIMITS = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1}
_PART = 1 << 24  # elements whose checksum is made at once


@dataclass(frozen=True)
class Probe:
    """What was drawn for the check: prompts of fixed random tokens, and their continuations."""

    prompts: list[np.ndarray]
    samples: list[Sample]


def sample_probe(engine: Engine, sampler: Sampler, step: int) -> Probe:
    """Draws the probe of a step: the same prompts on every rank. For an idle sampler; leaves none of its counts."""
    seed, vocabulary = engine.cfg.seed, engine.models["policy"].whole.strategy.module.vocab_size
    rng = np.random.default_rng(draw_seed(seed, "proof", step))
    room = max(2, min(PROMPT_TOKENS + DRAWN_TOKENS, engine.max_row_tokens or PROMPT_TOKENS + DRAWN_TOKENS))
    given = min(PROMPT_TOKENS, room - 1)
    prompts = [rng.integers(0, vocabulary, given) for _ in range(PROBES)]
    for number, prompt in enumerate(prompts):
        params = SamplingParams(
            max_tokens=room - given,
            temperature=engine.cfg.sampler.temperature,
            seed=draw_seed(seed, "proof", step, number),
        )
        sampler.add(SampleRequest(uid=f"proof/{number}", tokens=prompt, params=params))
    found = {}
    while sampler.unfinished():
        found.update({sample.uid: sample for sample in sampler.step()})
    sampler.metrics()
    for sample in found.values():
        check_drawn(sample)
    return Probe(prompts, [found[f"proof/{number}"] for number in range(PROBES)])


def check_probe(engine: Engine, probe: Probe) -> float:
    """The mean distance between the sampler's log-probabilities and the trainer's, the largest of any rank.

    Collective, outside of sampling. Raises RunError on every rank, with rank, sequence and token, above the limit."""
    rows = []
    for number, (prompt, sample) in enumerate(zip(probe.prompts, probe.samples, strict=True)):
        ids = np.concatenate([prompt, sample.tokens])
        rows.append(Datum(ids[:-1], ids[1:], np.zeros(len(ids) - 1), name=f"proof/{number}", experts=sample.experts))
    scored = engine.score(rows, engine.cfg.sampler.temperature).logprobs
    gaps = [
        np.abs(np.asarray(own, np.float64)[len(prompt) - 1 :] - sample.logprobs)
        for own, prompt, sample in zip(scored, probe.prompts, probe.samples, strict=True)
    ]
    worst = max(range(len(gaps)), key=lambda i: np.nan_to_num(gaps[i], nan=np.inf).max())
    at = int(np.nan_to_num(gaps[worst], nan=np.inf).argmax())
    mean = float(np.concatenate(gaps).mean())
    told = f"sequence {worst}, token {at}: {probe.samples[worst].logprobs[at]:.6g} drawn, {gaps[worst][at]:.3g} apart"
    everyone = gather_objects(engine.world, (mean, told))
    limit = LIMITS[engine.dtype]
    for rank, (gap, text) in enumerate(everyone):
        if not gap <= limit:
            raise RunError(
                f"the sampler does not draw from the trained weights: on rank {rank} its log-probabilities are "
                f"{gap:.3g} from the trainer's in the mean, at most {limit:g} is rounding (worst: {text}); an error of "
                "hardware or of skyrl: go on from a checkpoint before, with sampler.backend=module if it comes again"
            )
    return max(gap for gap, _ in everyone)


def check_copies(engine: Engine) -> None:
    """Compares the whole weights, as a sampler gets them, with the optimizer's, rounded, and with the other ranks'.

    Of an adapter and of its base alike. Collective. Raises RunError on every rank, naming rank and tensor."""
    base = engine.models["policy"].spec.base
    for model in ("policy", base) if base else ("policy",):
        _check_copy(engine, model)


def _check_copy(engine: Engine, model: str) -> None:
    strategy = engine.models[model].strategy
    own = strategy.state_dict(optimizer=False)["weights"]
    differs, sums = "", []
    with torch.no_grad():
        handed = dict(strategy.gathered().named_parameters())
        for name in sorted(own):
            tensor = own[name]
            whole = full_tensor(tensor)
            if not differs and not torch.equal(whole.to(handed[name].device, handed[name].dtype), handed[name]):
                differs = name
            sums.append(_checksum(handed[name]))
    everyone = gather_objects(engine.world, (differs, sums))
    for rank, (name, other) in enumerate(everyone):
        what = "the optimizer's"
        if not name and other != everyone[0][1]:
            name, what = (
                next(n for n, a, b in zip(sorted(own), everyone[0][1], other, strict=True) if a != b),
                "rank 0's",
            )
        if name:
            raise RunError(
                f"rank {rank} would draw from other weights than {what}, first in {name}; an error of hardware or of "
                "skyrl: go on from a checkpoint before"
            )


def fingerprint(engine: Engine, model: str) -> str:
    """16 hex digits of a model's whole weights, rounded to bfloat16: equal under every layout and dtype. Collective."""
    digest = hashlib.sha256()
    with torch.no_grad():
        weights = dict(engine.models[model].strategy.gathered().named_parameters())
        for name, tensor in sorted(weights.items()):
            digest.update(f"{name} {list(tensor.shape)} {_checksum(tensor.to(torch.bfloat16))}\n".encode())
    return digest.hexdigest()[:16]


def _checksum(tensor: Tensor) -> int:
    """Of the bits, each weighed by its place."""
    bits = tensor.detach().contiguous().reshape(-1)
    bits = bits.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    total = 0
    for start in range(0, len(bits), _PART):
        part = bits[start : start + _PART].to(torch.int64)
        places = torch.arange(1, len(part) + 1, device=part.device) % 8191 + 1
        total = (total * 31 + int((part * places).sum())) % (1 << 63)
    return total
