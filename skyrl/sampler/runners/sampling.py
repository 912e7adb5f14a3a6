"""Draws one token from each row of logits, and says its log-probability.

Every draw inverts the cumulative distribution at a number that depends on (seed, position) only, so a sequence does
not depend on what runs beside it. That number comes from SplitMix64 (G. Steele, D. Lea, C. Flood, "Fast splittable
pseudorandom number generators", 2014): draw j of a seed is output j of the stream whose state begins at mix(seed); we
mix the seed first so that neighbouring seeds have unrelated streams.

Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from skyrl.algorithms.truncation import kept, support_of
from skyrl.kernels import exact_ops
from skyrl.models.packed import to_device
from skyrl.types import SamplingParams, UserError

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_CHUNK_BYTES = 1 << 26  # of one float32 temporary; bounds memory when V is large


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def stream(seeds: Sequence[int]) -> np.ndarray:
    """First state of each seed's stream, uint64 [B]. Seeds are taken modulo 2**64."""
    return _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64) + _GAMMA)


def uniforms(streams_B: np.ndarray, draws_B: np.ndarray) -> np.ndarray:
    """Draw number draws_B (from 0) of each stream: float64 [B] in [0, 1), multiples of 2**-53."""
    counter = (draws_B.astype(np.uint64) + np.uint64(1)) * _GAMMA
    return (_mix(streams_B + counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def check(params: SamplingParams, where: str) -> None:
    """Raises UserError for a parameter outside its range."""
    rules = [
        ("max_tokens", params.max_tokens, params.max_tokens >= 1, "at least 1"),
        ("temperature", params.temperature, 0 <= params.temperature < float("inf"), "0 (greedy) or above"),
        ("top_k", params.top_k, params.top_k >= 0, "0 (off) or above"),
        ("top_p", params.top_p, 0 < params.top_p <= 1, "above 0, at most 1 (off)"),
        ("min_p", params.min_p, 0 <= params.min_p <= 1, "0 (off) to 1"),
        ("stop", params.stop, all(params.stop), "no empty string"),
    ]
    for name, value, good, allowed in rules:
        if not good:
            raise UserError(f"{where}: {name}={value!r}; allowed: {allowed}")


@dataclass
class BatchSamplingParams:
    """How the rows of one batch are drawn; built once per batch, not per step. float32 [B] unless said otherwise."""

    temperature_B1: Tensor | None  # [B, 1]; None = all 1; 1 where greedy
    greedy_B: Tensor | None  # bool; None = none is
    top_k_B: Tensor  # int64, V = off
    top_p_B: Tensor
    min_p_B: Tensor
    cut: bool  # some row has a cut
    temperatures: np.ndarray  # float32, 0 = greedy
    processed_B: Tensor | None = None  # bool: of what is left by the cuts; None = none is

    @staticmethod
    def of(params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> BatchSamplingParams:
        """The params of these sequences, in this order."""
        greedy = [p.temperature == 0 for p in params]
        heat = [p.temperature or 1.0 for p in params]
        # a cut has no effect on a greedy row: the likeliest token survives every cut
        cut, processed = any(p.cuts for p in params), [p.cuts and p.processed_logprobs for p in params]
        return BatchSamplingParams(
            temperature_B1=None if all(t == 1 for t in heat) else to_device(heat, device, np.float32).unsqueeze(1),
            greedy_B=to_device(greedy, device) if any(greedy) else None,
            top_k_B=to_device([min(p.top_k or vocab_size, vocab_size) for p in params], device),
            top_p_B=to_device([p.top_p for p in params], device, np.float64),
            min_p_B=to_device([p.min_p for p in params], device, np.float32),
            cut=cut,
            temperatures=np.array([p.temperature for p in params], dtype=np.float32),
            processed_B=to_device(processed, device) if any(processed) else None,
        )

    def rows(self, index: slice) -> BatchSamplingParams:
        """The same for some rows."""
        some = (self.temperature_B1, self.greedy_B, self.processed_B)
        heat, greedy, processed = (None if x is None else x[index] for x in some)
        top_k, top_p, min_p = (x[index] for x in (self.top_k_B, self.top_p_B, self.min_p_B))
        return BatchSamplingParams(heat, greedy, top_k, top_p, min_p, self.cut, self.temperatures[index], processed)


def sample(logits_BV: Tensor, params: BatchSamplingParams, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B] int64 and log-probabilities [B] float32 of softmax(logits / temperature) over all of V, of processed
    rows over what their cuts leave.

    logits_BV is float32 (or wider) and is overwritten. Sums run in float64, and the drawn point is kept below the
    total, so a token of probability 0 is never drawn and the last one is not favoured. Greedy rows take the lowest
    index among equals and report the log-probability at temperature 1. Cuts work on the distribution at the row's
    temperature, in the order top-k (equals: lowest index first), top-p of what is left, min-p. Rows that are not finite
    give a log-probability that is not finite.
    """
    tokens_B, logprobs_B, _ = sample_with_support(logits_BV, params, uniforms_B)
    return tokens_B, logprobs_B


def sample_with_support(
    logits_BV: Tensor, params: BatchSamplingParams, uniforms_B: Tensor
) -> tuple[Tensor, Tensor, list[np.ndarray]]:
    """As `sample`, with the ids [n] int32 that each processed row could have drawn; none of other rows."""
    rows = max(1, _CHUNK_BYTES // (4 * logits_BV.shape[1]))
    parts = [slice(at, at + rows) for at in range(0, max(1, len(logits_BV)), rows)]
    drawn = [_sample(logits_BV[part], params.rows(part), uniforms_B[part]) for part in parts]
    tokens, logprobs, supports = zip(*drawn, strict=True)
    return torch.cat(tokens), torch.cat(logprobs), [ids for part in supports for ids in part]


def _sample(
    logits_BV: Tensor, params: BatchSamplingParams, uniforms_B: Tensor
) -> tuple[Tensor, Tensor, list[np.ndarray]]:
    if params.temperature_B1 is not None:
        logits_BV = logits_BV.div_(params.temperature_B1)
    top_B1, best_B1 = logits_BV.max(1, keepdim=True)
    shifted_BV = logits_BV.sub_(top_B1)
    # as in training's log-probabilities (exact_ops.log_softmax_at)
    weights_BV = exact_ops.exp(shifted_BV) if exact_ops.uses_onednn(logits_BV) else shifted_BV.exp()
    kept_BV = kept(weights_BV, params.top_k_B, params.top_p_B, params.min_p_B) if params.cut else None
    drawn_BV = weights_BV if kept_BV is None else weights_BV * kept_BV
    sums_BV = drawn_BV.cumsum(1, dtype=torch.float64)
    total_B1 = sums_BV[:, -1:]
    point_B1 = torch.minimum(uniforms_B.unsqueeze(1) * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    # the clamp matters only for rows that are not finite: their log-probability then says so, and the caller stops
    token_B1 = torch.searchsorted(sums_BV, point_B1, right=True).clamp_(max=logits_BV.shape[1] - 1)
    if params.greedy_B is not None:
        token_B1 = torch.where(params.greedy_B.unsqueeze(1), best_B1, token_B1)
    mass_B1 = weights_BV.sum(1, keepdim=True, dtype=torch.float64) if params.cut else total_B1
    supports: list[np.ndarray] = []
    if params.processed_B is not None and kept_BV is not None:
        mass_B1 = torch.where(params.processed_B.unsqueeze(1), total_B1, mass_B1)
        supports = support_of(kept_BV, params.processed_B)
    logprob_B1 = shifted_BV.gather(1, token_B1) - mass_B1.log()
    return token_B1.squeeze(1), logprob_B1.squeeze(1).float(), supports
