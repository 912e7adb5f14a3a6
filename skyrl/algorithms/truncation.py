"""Top-k, top-p and min-p: which tokens a cut leaves, and training on the softmax over these alone.

A policy that is sampled with cuts is another distribution than its full softmax, so a gradient of the full
log-probability would be that of a policy that nobody sampled. What each draw could have been is therefore recorded
(`types.TokenSupport`), and log-probabilities, ratios, entropy and the KL to a reference are all over it. Later updates
of a batch hold it fixed: a ratio of two policies needs one support. torch is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from skyrl.types import Datum, TokenSupport

if TYPE_CHECKING:
    from torch import Tensor

CUT = -1e20  # a logit with no weight beside any other; finite, so that nothing becomes NaN where all of a block are cut


def kept(weights_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor) -> Tensor:
    """1 where a token may be drawn, 0 where a cut removes it, in the dtype of weights_BV (unnormalised, largest 1)."""
    import torch

    sorted_BV, order_BV = torch.sort(weights_BV, dim=1, descending=True, stable=True)
    rank_V = torch.arange(weights_BV.shape[1], device=weights_BV.device)
    keep_BV = rank_V < top_k_B.unsqueeze(1)
    left_BV = (sorted_BV * keep_BV).cumsum(1, dtype=torch.float64)
    before_BV = torch.cat([torch.zeros_like(left_BV[:, :1]), left_BV[:, :-1]], 1)
    keep_BV &= (before_BV < top_p_B.unsqueeze(1) * left_BV[:, -1:]) | (top_p_B.unsqueeze(1) >= 1)
    keep_BV[:, 0] = True
    keep_BV &= sorted_BV >= min_p_B.unsqueeze(1) * sorted_BV[:, :1]
    return torch.zeros_like(weights_BV).scatter_(1, order_BV, keep_BV.to(weights_BV.dtype))


def support_of(kept_BV: Tensor, recorded_B: Tensor) -> list[np.ndarray]:
    """The ids [n] int32, rising, that `kept` leaves of each row; none of rows that are not recorded."""
    row, ids = (kept_BV * recorded_B.unsqueeze(1)).nonzero().cpu().numpy().T
    return np.split(ids.astype(np.int32), np.searchsorted(row, np.arange(1, len(kept_BV))))


def join_support(length: int, parts: Sequence[tuple[int, Sequence[np.ndarray]]]) -> TokenSupport:
    """The support of `length` positions: each part is where it begins and the ids of each position from there on."""
    counts = np.zeros(length, np.int32)
    found: list[np.ndarray] = []
    for start, ids in parts:
        ids = ids[: length - start]
        counts[start : start + len(ids)] = [len(one) for one in ids]
        found += ids
    return TokenSupport(counts, np.concatenate([np.zeros(0, np.int32), *found]))


def split_support(support: TokenSupport) -> list[np.ndarray]:
    """The ids of each position."""
    return np.split(support.ids, np.cumsum(support.counts)[:-1])


def packed_support(rows: Sequence[Datum]) -> dict[str, np.ndarray]:
    """`support_2N` of rows packed end to end: positions, and below them ids. Nothing where no row has a support."""
    if all(row.support is None for row in rows):
        return {}
    counts = [np.zeros(len(row.tokens), np.int32) if row.support is None else row.support.counts for row in rows]
    count_T = np.concatenate(counts)
    ids = np.concatenate([row.support.ids for row in rows if row.support is not None])
    return {"support_2N": np.stack([np.repeat(np.arange(len(count_T)), count_T), ids]).astype(np.int64)}


def support_within(support_2N: Tensor, start: int, stop: int) -> Tensor:
    """The support of the tokens start .. stop, which are then the first ones."""
    part_2N = support_2N[:, (support_2N[0] >= start) & (support_2N[0] < stop)]
    part_2N[0] -= start
    return part_2N


def cut_logits(logits_TV: Tensor, first_token: int, first_entry: int, support_2N: Tensor) -> None:
    """Takes what is outside of a token's support out of its softmax, in place. The logits are those of tokens and
    entries of the vocabulary from these first ones on; tokens without a support stay as they are."""
    import torch

    (count, width), (row_N, entry_N) = logits_TV.shape, (support_2N[0] - first_token, support_2N[1] - first_entry)
    here_N = (row_N >= 0) & (row_N < count)
    inside_N = here_N & (entry_N >= 0) & (entry_N < width)
    # the last one of each takes what belongs to no cell, so that nothing waits for a number of the device
    keep = torch.zeros(count * width + 1, dtype=torch.bool, device=logits_TV.device)
    cut = torch.zeros(count + 1, dtype=torch.bool, device=logits_TV.device)
    keep[torch.where(inside_N, row_N * width + entry_N, count * width)] = True
    cut[torch.where(here_N, row_N, count)] = True
    logits_TV.masked_fill_(cut[:count, None] & ~keep[:-1].view(count, width), CUT)
