"""Loss reduction as per-token weights: a plain sum of weights * loss over all ranks is the mean that was asked for.

Numpy only. Every function calls `all_reduce_sum` exactly once, also without rows, so ranks may hold different row
counts. Weights are positive at trained tokens and exactly 0 elsewhere; with no trained token anywhere they are all 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from skyrl.algorithms.advantages import AllSum
from skyrl.registry import Registry
from skyrl.types import Floats, Ints, UserError

ReductionFn = Callable[..., list[Floats]]
REDUCTIONS: Registry[ReductionFn] = Registry("reduction")


def _fill(masks: list[np.ndarray], weight_D: list[float]) -> list[Floats]:
    return [np.where(mask, weight, 0.0) for mask, weight in zip(masks, weight_D, strict=True)]


def _tokens_by_key(masks: list[np.ndarray], keys: list) -> dict:
    counts: dict = {}
    for mask, key in zip(masks, keys, strict=True):
        counts[key] = counts.get(key, 0) + int(mask.sum())
    return counts


def _mean_over(masks: list[np.ndarray], keys: list, all_reduce_sum: AllSum) -> list[Floats]:
    """Mean over the keys that have a trained token of the mean over their tokens."""
    tokens = _tokens_by_key(masks, keys)
    (count,) = all_reduce_sum(np.array([sum(n > 0 for n in tokens.values())], dtype=np.float64))
    return _fill(masks, [1.0 / (count * tokens[key]) if tokens[key] else 0.0 for key in keys])


def _episode_keys(group_D: Ints, episode_D: Ints) -> list[tuple[int, int]]:
    return list(zip(np.asarray(group_D).tolist(), np.asarray(episode_D).tolist(), strict=True))


@REDUCTIONS.register("token_mean")
def token_mean(
    masks: list[np.ndarray], group_D: Ints, episode_D: Ints, all_reduce_sum: AllSum, *, constant: float = 0.0
) -> list[Floats]:
    """1 / (trained tokens of all ranks) at every trained token, float64 [L] per row: all tokens count alike.

    Source: Yu et al. 2025 (DAPO), arXiv 2503.14476, section 3.3. Differs: the count is of the whole optimizer step.
    """
    (total,) = all_reduce_sum(np.array([sum(int(mask.sum()) for mask in masks)], dtype=np.float64))
    return _fill(masks, [1.0 / total if total else 0.0] * len(masks))


@REDUCTIONS.register("sequence_mean")
def sequence_mean(
    masks: list[np.ndarray], group_D: Ints, episode_D: Ints, all_reduce_sum: AllSum, *, constant: float = 0.0
) -> list[Floats]:
    """Mean over episodes of the mean over the episode's trained tokens, as float64 weights [L] per row.

    An episode of several rows counts once; episodes without a trained token do not count.
    Source: Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300, equation 3 (1/G sum_i 1/|o_i| sum_t).
    """
    return _mean_over(masks, _episode_keys(group_D, episode_D), all_reduce_sum)


@REDUCTIONS.register("sequence_sum")
def sequence_sum(
    masks: list[np.ndarray], group_D: Ints, episode_D: Ints, all_reduce_sum: AllSum, *, constant: float = 0.0
) -> list[Floats]:
    """Mean over episodes of the sum over the episode's trained tokens, as float64 weights [L] per row.

    The policy gradient of whole answers, without division by a length; episodes without a trained token do not count.
    Source: Williams 1992, Simple statistical gradient-following algorithms; verl's seq-mean-token-sum.
    """
    tokens = _tokens_by_key(masks, _episode_keys(group_D, episode_D))
    (count,) = all_reduce_sum(np.array([sum(n > 0 for n in tokens.values())], dtype=np.float64))
    return _fill(masks, [1.0 / count if count else 0.0] * len(masks))


@REDUCTIONS.register("prompt_sequence_mean")
def prompt_sequence_mean(
    masks: list[np.ndarray], group_D: Ints, episode_D: Ints, all_reduce_sum: AllSum, *, constant: float = 0.0
) -> list[Floats]:
    """Mean over prompts of the mean over their episodes of the mean over trained tokens, float64 weights [L] per row.

    Unlike sequence_mean a prompt counts once, however many of its episodes learn; what has no trained token does not
    count. Source: Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300, equation 3, its expectation over prompts taken
    literally where groups differ in size.
    """
    keys = _episode_keys(group_D, episode_D)
    tokens = _tokens_by_key(masks, keys)
    episodes: dict = {}
    for (group, _), n in tokens.items():
        episodes[group] = episodes.get(group, 0) + (n > 0)
    (prompts,) = all_reduce_sum(np.array([sum(n > 0 for n in episodes.values())], dtype=np.float64))
    return _fill(masks, [1.0 / (prompts * episodes[k[0]] * tokens[k]) if tokens[k] else 0.0 for k in keys])


@REDUCTIONS.register("prompt_mean")
def prompt_mean(
    masks: list[np.ndarray], group_D: Ints, episode_D: Ints, all_reduce_sum: AllSum, *, constant: float = 0.0
) -> list[Floats]:
    """Mean over prompts of the mean over all trained tokens of the prompt's group, as float64 weights [L] per row.

    Prompts without a trained token do not count. Source: DAPO's objective (arXiv 2503.14476, equation 8) read
    literally: its token mean stands inside the expectation over prompts.
    """
    return _mean_over(masks, np.asarray(group_D).tolist(), all_reduce_sum)


@REDUCTIONS.register("constant")
def per_episode_constant(
    masks: list[np.ndarray], group_D: Ints, episode_D: Ints, all_reduce_sum: AllSum, *, constant: float
) -> list[Floats]:
    """1 / (episodes of all ranks * constant) at every trained token, float64 [L] per row.

    Episodes without a trained token count too: the divisor must not depend on how long answers are.
    `constant` is in tokens (the trainer passes the longest answer) and above 0, else UserError.
    Source: Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783, section 3 and its code's MAX_TOKENS.
    """
    if not constant > 0:
        raise UserError(f"algorithm.loss.reduction: constant needs a divisor above 0 tokens, got {constant}")
    (episodes,) = all_reduce_sum(np.array([len(set(_episode_keys(group_D, episode_D)))], dtype=np.float64))
    return _fill(masks, [1.0 / (episodes * constant) if episodes else 0.0] * len(masks))
