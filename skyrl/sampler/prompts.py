"""Questions about tokens that are there already: log-probabilities, likeliest tokens, other draws. On one rank, without
a collective; the logits of a few positions exist at a time.

Legend: L tokens of a query, N positions that are looked at together, V vocabulary, K targets of a position.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from skyrl.distributed.balance import pack
from skyrl.models.lora import Adapter, routed, segments_of
from skyrl.models.packed import PackedAttention, move_all, to_device
from skyrl.sampler.runners import sampling
from skyrl.types import Floats, Ints

if TYPE_CHECKING:
    from skyrl.models.forward import CausalLM

EMPTY = -99999.0  # log-probability of a cell without a token; its token is 0
LOGITS_BYTES = 32 << 20  # of float32 logits at a time; sums in float64 take twice that


@dataclass(frozen=True)
class PromptLogprobsRequest:
    """What to say about `tokens` [L] under the adapter `model` ("" = none).

    Positions from max(start, 1) on are looked at: `logprobs` of their tokens and the `topk` likeliest tokens, both at
    `temperature`, and `alternatives` independent draws at temperature 1. `targets` int64 [L - 1, K] names tokens whose
    log-probability at temperature 1 is wanted, cell [i, j] at position i + 1, -1 = none, wherever `start` is.
    `tail`: the tables of likeliest tokens begin at `start`.
    """

    uid: str
    tokens: Ints
    model: str = ""
    start: int = 0
    logprobs: bool = False
    topk: int = 0
    temperature: float = 1.0
    targets: np.ndarray | None = None
    alternatives: int = 0
    seed: int = 0
    tail: bool = False


@dataclass
class PromptLogprobsResult:
    """The answer to one query; what was not asked for is None. Log-probabilities in nats, float32.

    logprobs [L], NaN where not looked at. topk_ids int32 and topk_logprobs [L, topk], likeliest first, equals by
    token. targets as in the query, 0.0 where -1 was. alt_tokens int64 and alt_logprobs [L - 1, alternatives], row i of
    position i + 1. Cells without a token hold token 0 and EMPTY.
    """

    uid: str
    logprobs: Floats | None = None
    topk_ids: np.ndarray | None = None
    topk_logprobs: np.ndarray | None = None
    targets: np.ndarray | None = None
    alt_tokens: np.ndarray | None = None
    alt_logprobs: np.ndarray | None = None

    @staticmethod
    def empty(query: PromptLogprobsRequest) -> PromptLogprobsResult:
        length, stats = len(query.tokens), PromptLogprobsResult(query.uid)
        if query.logprobs:
            stats.logprobs = np.full(length, np.nan, np.float32)
        if query.topk:
            stats.topk_ids = np.zeros((length, query.topk), np.int32)
            stats.topk_logprobs = np.full((length, query.topk), EMPTY, np.float32)
        if query.targets is not None:
            stats.targets = np.zeros(query.targets.shape, np.float32)
        if query.alternatives:
            stats.alt_tokens = np.zeros((length - 1, query.alternatives), np.int64)
            stats.alt_logprobs = np.full((length - 1, query.alternatives), EMPTY, np.float32)
        return stats


@torch.no_grad()
def score_prompts(
    model: CausalLM, queries: list[PromptLogprobsRequest], adapters: Mapping[str, Adapter], *, max_tokens: int
) -> list[PromptLogprobsResult]:
    """The answers in the order of the queries, computed in packs of up to `max_tokens` tokens (or one longer query).

    Draw j of a position depends on (seed, position, j) and the distribution there alone. What a pack holds changes
    values by rounding only; with max_tokens=1, a forward for each query, by no bit (at 16 tokens a query a third of the
    speed, from 256 on the same). A model that is not finite gives values that are not.
    """
    for query in queries:
        _check(query, model, adapters)
    stats = [PromptLogprobsResult.empty(query) for query in queries]
    places = [_places(query) for query in queries]
    wanted = [index for index, some in enumerate(places) if len(some)]
    names = sorted({queries[index].model for index in wanted})
    for one in pack([len(queries[index].tokens) for index in wanted], max_tokens):
        members = sorted((wanted[i] for i in one), key=lambda index: (names.index(queries[index].model), index))
        _score_pack(model, [(queries[i], places[i], stats[i]) for i in members], adapters)
    for query, answer in zip(queries, stats, strict=True):
        if query.tail and answer.topk_ids is not None and answer.topk_logprobs is not None:
            # Copies, since views would keep the whole tables in memory for as long as the answer is kept.
            answer.topk_ids = answer.topk_ids[query.start :].copy()
            answer.topk_logprobs = answer.topk_logprobs[query.start :].copy()
    return stats


def _check(query: PromptLogprobsRequest, model: CausalLM, adapters: Mapping[str, Adapter]) -> None:
    """Holds a query to what score_prompts takes. Whoever asks has checked what a person gave."""
    tokens, targets, length = np.asarray(query.tokens), query.targets, len(query.tokens)
    assert not query.model or query.model in adapters, f"model={query.model!r} is not known"
    assert 0 < length <= model.max_positions, f"{length} tokens, and {model.max_positions} positions"
    assert 0 <= tokens.min() and tokens.max() < model.vocab_size, "tokens beyond the vocabulary"
    assert 0 < query.temperature < float("inf") and min(query.start, query.topk, query.alternatives) >= 0, query
    if targets is not None:
        assert targets.ndim == 2 and len(targets) == length - 1, f"targets have shape {list(targets.shape)}"
        assert not targets.size or (-1 <= targets.min() and targets.max() < model.vocab_size), "targets out of range"


def _places(query: PromptLogprobsRequest) -> np.ndarray:
    """The positions that have to be looked at, rising."""
    length = len(query.tokens)
    seen = np.zeros(length, dtype=bool)
    if query.logprobs or query.topk or query.alternatives:
        seen[max(query.start, 1) :] = True
    if query.targets is not None:
        seen[1:] |= (query.targets >= 0).any(1)
    return np.flatnonzero(seen)


# a query, its positions, and where its answer goes
Member = tuple[PromptLogprobsRequest, np.ndarray, PromptLogprobsResult]


def _score_pack(model: CausalLM, members: list[Member], adapters: Mapping[str, Adapter]) -> None:
    device, lengths = next(model.parameters()).device, [len(query.tokens) for query, _, _ in members]
    starts = np.cumsum([0, *lengths])
    tokens = np.concatenate([np.asarray(query.tokens, dtype=np.int64) for query, _, _ in members])
    positions = np.concatenate([np.arange(length) for length in lengths])
    starts_S1, tokens_T, positions_T = move_all(device, starts.astype(np.int32), tokens, positions)
    attention = PackedAttention(starts_S1, lengths)
    used = [adapters[query.model] if query.model else None for query, _, _ in members]
    segments = segments_of(used, lengths)
    with nullcontext() if segments is None else routed(model, segments):
        hidden_TC = model.hidden(tokens_T, positions_T, attention)
    rows = np.concatenate([start + places - 1 for start, (_, places, _) in zip(starts, members, strict=False)])
    owners = np.repeat(np.arange(len(members)), [len(places) for _, places, _ in members])
    step = max(1, LOGITS_BYTES // (4 * model.vocab_size))
    for at in range(0, len(rows), step):
        chunk = slice(at, at + step)
        hidden_NC = hidden_TC.index_select(0, to_device(rows[chunk], device))
        parts = segments_of([used[owner] for owner in owners[chunk]])
        _answer(model.logits(hidden_NC, parts), owners[chunk], rows[chunk] + 1 - starts[owners[chunk]], members)


def _answer(logits_NV: Tensor, owners: np.ndarray, places: np.ndarray, members: list[Member]) -> None:
    """Writes what the logits say about positions `places` of the members `owners` (both [N], the rows of a member side
    by side) into their answers."""
    borders = np.flatnonzero(np.diff(owners, prepend=-1, append=-1))
    for first, last in pairwise(borders.tolist()):
        query, _, answer = members[owners[first]]
        z_NV, at = logits_NV[first:last], places[first:last]
        inside = at >= query.start  # others are here for their targets
        if query.logprobs or query.topk:
            _ranked(query, answer, z_NV if query.temperature == 1 else z_NV / query.temperature, at, inside)
        if answer.targets is not None and query.targets is not None and query.targets.shape[1]:
            named_NK = np.asarray(query.targets, dtype=np.int64)[at - 1]
            ids_NK = to_device(named_NK.clip(0), z_NV.device)
            logprob_NK = (z_NV.gather(1, ids_NK) - z_NV.logsumexp(1, keepdim=True)).float().cpu().numpy()
            answer.targets[at - 1] = np.where(named_NK >= 0, logprob_NK, np.float32(0))
        if query.alternatives and inside.any():
            _drawn(query, answer, z_NV[to_device(np.flatnonzero(inside), z_NV.device)], at[inside])


def _ranked(
    query: PromptLogprobsRequest, answer: PromptLogprobsResult, z_NV: Tensor, at: np.ndarray, inside: np.ndarray
) -> None:
    """Log-probabilities of the tokens, and the likeliest ones."""
    norm_N1 = z_NV.logsumexp(1, keepdim=True)
    if answer.logprobs is not None:
        token_N1 = to_device(np.asarray(query.tokens)[at], z_NV.device, np.int64).unsqueeze(1)
        answer.logprobs[at[inside]] = (z_NV.gather(1, token_N1) - norm_N1).squeeze(1).float().cpu().numpy()[inside]
    if answer.topk_ids is not None and answer.topk_logprobs is not None:
        count = min(query.topk, z_NV.shape[1])
        ids = z_NV.topk(count, 1).indices.sort(1).values
        values, order = (z_NV.gather(1, ids) - norm_N1).sort(dim=1, descending=True, stable=True)
        answer.topk_ids[at[inside], :count] = ids.gather(1, order).cpu().numpy()[inside]
        answer.topk_logprobs[at[inside], :count] = values.float().cpu().numpy()[inside]


def _drawn(query: PromptLogprobsRequest, answer: PromptLogprobsResult, z_NV: Tensor, at: np.ndarray) -> None:
    """Draws by inverting the cumulative distribution, as sampling.sample does."""
    assert answer.alt_tokens is not None and answer.alt_logprobs is not None
    state = int(sampling.stream([query.seed])[0])  # draw number `position` of stream j of the seed
    streams = sampling.stream([state + j for j in range(query.alternatives)])
    points = to_device(sampling.uniforms(streams[None, :], at[:, None]), z_NV.device)  # float64 [N, alternatives]
    shifted_NV = z_NV - z_NV.amax(1, keepdim=True)
    sums_NV = shifted_NV.exp().cumsum(1, dtype=torch.float64)
    total_N1 = sums_NV[:, -1:]
    points = torch.minimum(points * total_N1, torch.nextafter(total_N1, torch.zeros_like(total_N1)))
    tokens_NK = torch.searchsorted(sums_NV, points, right=True).clamp_(max=z_NV.shape[1] - 1)
    answer.alt_tokens[at - 1] = tokens_NK.cpu().numpy()
    answer.alt_logprobs[at - 1] = (shifted_NV.gather(1, tokens_NK) - total_N1.log()).float().cpu().numpy()
