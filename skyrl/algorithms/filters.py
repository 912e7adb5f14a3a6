"""Which groups and episodes are not learned from: pure functions on host data, and the counts for the metrics.

Dropping is the trainer's act; these functions only say what. Order: drop groups, compute advantages over everything
that is left, then mask over-long episodes, so that they stay in their group's baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from skyrl.algorithms.groups import turn_tokens
from skyrl.algorithms.variance import is_rounding
from skyrl.registry import Registry
from skyrl.types import Episode, Floats, Metrics, StopReason, UserError

GroupFilter = Callable[[Sequence[Episode]], bool]
FILTERS: Registry[GroupFilter] = Registry("filter")


def zero_variance_groups(rewards_PG: Sequence[Sequence[float]], scale_P: Sequence[float] | None = None) -> np.ndarray:
    """Keep mask [P] bool: True for groups whose largest and smallest score differ by more than rounding (variance.py).

    `rewards_PG[p]` holds the scores of the *valid* episodes of prompt p (groups may differ in size), `scale_P[p]` the
    largest of their scales, by default their largest magnitude. Fewer than two scores have no variance: such a group is
    dropped, since its centred advantage is 0. Raises RuntimeError for a score that is not finite.
    Source: Yu et al. 2025 (DAPO), arXiv 2503.14476, section 3.2 (dynamic sampling).
    Differs: compares scores, not accuracy, so groups of partial credit stay.
    """
    keep_P = np.zeros(len(rewards_PG), dtype=bool)
    for p, scores in enumerate(rewards_PG):
        score_G = np.asarray(scores, dtype=np.float64)
        if not np.isfinite(score_G).all():
            raise RuntimeError(f"zero_variance_groups: group {p} has a score that is not finite")
        if len(score_G):
            scale = np.abs(score_G).max() if scale_P is None else scale_P[p]
            keep_P[p] = not is_rounding(np.ptp(score_G), scale)
    return keep_P


def register_filter(name: str) -> Callable[[GroupFilter], GroupFilter]:
    """Decorator: makes `fn(episodes) -> bool` known to algorithm.filters.names: whether a group is learned from.

    `episodes` are the samples of one prompt that have a score, with `reward`, `objectives`, `turns` and `prompt`. The
    answer must follow from them alone: then it does not depend on the number of ranks. Raises UserError when the name
    is taken."""
    return FILTERS.register(name)


def dropped_by(names: Sequence[str], episodes: Sequence[Episode]) -> str:
    """The first of the filters `names` that does not keep this group, or "". Raises UserError for one that raises, or
    says neither True nor False."""
    for name in names:
        where = f"algorithm.filters.names: filter {name}, {episodes[0].prompt.place}"
        try:
            keep = FILTERS.get(name, "algorithm.filters.names")(episodes)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{where}: raised {type(error).__name__}: {error}") from error
        if not isinstance(keep, (bool, np.bool_)):
            raise UserError(f"{where}: returned {keep!r}, wanted True (keep the group) or False")
        if not keep:
            return name
    return ""


def overlong_rows(stop_D: Sequence[StopReason]) -> np.ndarray:
    """[D] bool: True for rows of episodes that a length limit cut. `stop_D` is the *episode's* stop reason per row."""
    return np.array([stop == "length" for stop in stop_D], dtype=bool)


def overlong_penalty(rewards: list[Floats], masks: list[np.ndarray], limit: int, buffer: float) -> list[Floats]:
    """Rewards, float64 [L] per row, less what each turn's length costs, on its last token: nothing up to (1 - buffer) *
    limit tokens, from there linearly up to 1 at the limit of a turn.

    Source: Yu et al. 2025 (DAPO), arXiv 2503.14476, equation 13 (soft overlong punishment). Differs: per turn.
    """
    free, out = limit * (1.0 - buffer), []
    for reward, mask in zip(rewards, masks, strict=True):
        row = np.array(reward, dtype=np.float64)
        for tokens in turn_tokens(mask):
            row[tokens[-1]] -= min(1.0, max(0.0, (len(tokens) - free) / (limit - free)))
        out.append(row)
    return out


def trained_masks(
    masks: list[np.ndarray], stop_D: Sequence[StopReason], valid_D: np.ndarray, overlong: str
) -> list[np.ndarray]:
    """The masks that reductions and weights are made from: all False for rows that are not learned from.

    Those are the rows of episodes without a score and, with overlong="mask", of episodes cut by a length limit.
    Source: DAPO, arXiv 2503.14476, section 3.4 (overlong filtering).
    """
    drop_D = ~np.asarray(valid_D, dtype=bool)
    if overlong == "mask":
        drop_D = drop_D | overlong_rows(stop_D)
    return [np.zeros_like(mask) if drop else mask for mask, drop in zip(masks, drop_D, strict=True)]


def filter_metrics(keep_P: np.ndarray, stop_E: Sequence[StopReason], valid_E: np.ndarray) -> Metrics:
    """This rank's counts for the metrics: groups seen and dropped; episodes seen, over-long and without a score.

    `keep_P` is zero_variance_groups' answer (count it even when nothing is dropped); `*_E` have one entry per episode.
    """
    return {
        "filters/groups:sum": float(len(keep_P)),
        "filters/zero_variance_groups:sum": float((~np.asarray(keep_P, dtype=bool)).sum()),
        "filters/episodes:sum": float(len(stop_E)),
        "filters/overlong_episodes:sum": float(overlong_rows(stop_E).sum()),
        "filters/invalid_episodes:sum": float((~np.asarray(valid_E, dtype=bool)).sum()),
    }
