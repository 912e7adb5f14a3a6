"""Which tokens of a batch are treated otherwise, by numbers of the whole batch: numpy, before the update.

A loss sees one micro-batch; what compares all tokens of an optimizer step is decided here. `gather` joins small arrays
of all ranks, in the order of ranks; every rank calls it equally often. What comes out does not depend on who has which
row: thresholds are taken from sorted values, sums are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from skyrl.types import Floats

Gather = Callable[[np.ndarray], np.ndarray]


def _flat(arrays: list[Floats], masks: list[np.ndarray]) -> np.ndarray:
    parts = [np.asarray(array, np.float64)[mask] for array, mask in zip(arrays, masks, strict=True)]
    return np.concatenate(parts) if parts else np.zeros(0)


def top_entropy(entropies: list[Floats], masks: list[np.ndarray], gather: Gather, fraction: float) -> list[np.ndarray]:
    """[L] bool per row: the trained tokens whose entropy is among the largest `fraction` of the batch (ties are in).

    The threshold is the (1 - fraction) quantile, interpolated. Source: Wang et al. 2025 (Beyond the 80/20 Rule), arXiv
    2506.01939, equation 6. Differs: over the whole optimizer step; the policy's entropies before the update.
    """
    everyone = gather(_flat(entropies, masks))
    threshold = float(np.quantile(everyone, 1.0 - fraction)) if len(everyone) else 0.0
    return [mask & (np.asarray(h, np.float64) >= threshold) for h, mask in zip(entropies, masks, strict=True)]


def covariances(
    logprobs: list[Floats], advantages: list[Floats], masks: list[np.ndarray], gather: Gather
) -> list[Floats]:
    """(log pi - mean) (A - mean) of each trained token, means over those of the batch; -inf elsewhere, [L] float64.

    Source: Cui et al. 2025 (The Entropy Mechanism of RL), arXiv 2505.22617, its token-wise covariance.
    """
    means = []
    for arrays in (logprobs, advantages):
        everyone = gather(_flat(arrays, masks))
        means.append(math.fsum(everyone.tolist()) / max(1, len(everyone)))
    return [
        np.where(mask, (np.where(mask, lp, 0.0) - means[0]) * (np.where(mask, a, 0.0) - means[1]), -np.inf)
        for lp, a, mask in zip(logprobs, advantages, masks, strict=True)
    ]


def clip_cov_tokens(
    covariance: list[Floats], draws: list[Floats], gather: Gather, params: Mapping[str, float]
) -> list[np.ndarray]:
    """[L] bool per row: of the tokens with cov_low < covariance < cov_high those of the smallest draws, as many as
    `fraction` of all trained tokens (at least one). `draws` [L] are uniform numbers that name a token, not a rank.

    Source: Cui et al. 2025, arXiv 2505.22617, Clip-Cov.
    """
    inside = [(c > params["cov_low"]) & (c < params["cov_high"]) for c in covariance]
    trained = gather(np.array([sum(int(np.isfinite(c).sum()) for c in covariance)], np.float64))
    wanted = max(1, int(params["fraction"] * trained.sum()))
    everyone = np.sort(gather(_flat(draws, inside)))
    last = everyone[min(wanted, len(everyone)) - 1] if len(everyone) else -1.0
    return [mask & (draw <= last) for mask, draw in zip(inside, draws, strict=True)]


def kl_cov_tokens(
    covariance: list[Floats], draws: list[Floats], gather: Gather, params: Mapping[str, float]
) -> list[np.ndarray]:
    """[L] bool per row: the trained tokens of the largest covariances, `fraction` of them (at least one; ties are in).

    Source: Cui et al. 2025, arXiv 2505.22617, KL-Cov.
    """
    everyone = np.sort(gather(_flat(covariance, [np.isfinite(c) for c in covariance])))[::-1]
    count = min(max(1, int(params["fraction"] * len(everyone))), len(everyone))
    last = everyone[count - 1] if count else np.inf
    return [np.isfinite(c) & (c >= last) for c in covariance]


SELECTIONS = {"clip_cov": clip_cov_tokens, "kl_cov": kl_cov_tokens}
"""Loss that reads `selected` -> how its tokens are selected."""
