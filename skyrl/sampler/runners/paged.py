"""The paged KV cache, attention over it, and the runner that uses the model's own forward.

Works for every layer that hands queries, keys and values to skyrl.models.attention: any head counts, sliding windows,
soft caps. Written in plain torch operations; fused.py and cuda.py replace parts of it where that is faster.

Legend: n sequences of a group, L query tokens of each, W blocks of each, S keys = W * block_tokens; B sequences of a
decode step; T tokens of a step; H heads, K key/value heads, C channels.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from skyrl.kernels import exact_ops
from skyrl.models.attention import Attention, AttentionOptions
from skyrl.models.experts import recording
from skyrl.models.latent import Latent
from skyrl.models.linear_attention import DeltaRule
from skyrl.models.lora import Segment, routed
from skyrl.models.packed import MAX_SCORES, move_all, softmax_with_sinks, to_device
from skyrl.sampler.runners.base import (
    DecodeInputs,
    KVCache,
    PrefillChunk,
    Runner,
    chunk_segments,
    last_rows,
    prefill_arrays,
)

if TYPE_CHECKING:
    from skyrl.models.forward import CausalLM


@dataclass
class Group:
    """Sequences that attend together: L query rows each (padded with row 0), keys gathered from W blocks each."""

    rows_nL: Tensor  # index into T
    positions_nL: Tensor
    table_nW: Tensor
    state_n: Tensor  # which states of linear attention are theirs
    valid: Tensor | None  # index of the real ones among the n * L rows; None = all
    masks: dict[tuple[int | None, int | None], Tensor] = field(default_factory=dict)
    gathers: dict[int, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, chunk: int | None, num_keys: int, dtype: torch.dtype) -> Tensor:
        """0 where a key is seen and -inf elsewhere, [n, 1, L, S]."""
        if (window, chunk) not in self.masks:
            key_S = torch.arange(num_keys, device=self.rows_nL.device)
            position_nL1 = self.positions_nL.unsqueeze(-1)
            seen = key_S <= position_nL1
            if window is not None:
                seen &= key_S > position_nL1 - window
            if chunk is not None:
                seen &= key_S // chunk == position_nL1 // chunk
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
            self.masks[window, chunk] = mask.unsqueeze(1)
        return self.masks[window, chunk]

    def real(self) -> Tensor | None:
        """[n, L], which rows are real ones; None = all."""
        if self.valid is None:
            return None
        real = torch.zeros_like(self.rows_nL, dtype=torch.bool).flatten().index_fill_(0, self.valid, True)
        return real.view_as(self.rows_nL)

    def put(self, whole: Tensor, out: Tensor) -> None:
        """Copies what was computed for this group's rows, [n * L, ...], to their places in the step's tokens."""
        rows = self.rows_nL.flatten()
        if self.valid is not None:
            out, rows = out.index_select(0, self.valid), rows.index_select(0, self.valid)
        whole.index_copy_(0, rows, out)

    def gather(self, cache_NKSC: Tensor) -> Tensor:
        """This group's part of one cache tensor, [n, K, S, C]."""
        blocks, heads, size, channels = cache_NKSC.shape
        if heads not in self.gathers:
            head_K1 = torch.arange(heads, device=cache_NKSC.device).unsqueeze(1)
            self.gathers[heads] = (self.table_nW.unsqueeze(1) * heads + head_K1).flatten()
        picked = cache_NKSC.view(blocks * heads, size * channels).index_select(0, self.gathers[heads])
        return picked.view(len(self.table_nW), heads, -1, channels)


class PagedAttention:
    """Attention of one step: stores the new keys and values, then attends over the blocks of each sequence."""

    def __init__(self, cache: KVCache, slots_T: Tensor, groups: list[Group]) -> None:
        self.cache, self.slots_T, self.groups = cache, slots_T, groups
        self._writes: dict[int, Tensor] = {}

    def attend(
        self, layer: int, query_HTC: Tensor, key_KTC: Tensor, value_KTC: Tensor, options: AttentionOptions
    ) -> Tensor:
        self.write(layer, key_KTC.transpose(0, 1), value_KTC.transpose(0, 1))
        return self._over_groups(query_HTC, self.cache.keys[layer], self.cache.values[layer], options)

    def attend_latent(self, layer: int, query_HTC: Tensor, latent: Latent, *, scale: float) -> Tensor:
        """See skyrl.models.attention.LatentAttention: queries of all heads over one kept vector a token."""
        self.write(layer, latent.kept_TC.unsqueeze(1), None)
        kept, options = self.cache.keys[layer], AttentionOptions(scale)
        return latent.values(self._over_groups(latent.queries(query_HTC), kept, None, options, latent.rank))

    def _over_groups(
        self, query_HTC: Tensor, keys: Tensor, values: Tensor | None, options: AttentionOptions, size: int = 0
    ) -> Tensor:
        """[T, H, C]; without `values` these are the first `size` channels of the keys, of which there is one head."""
        heads, tokens, _ = query_HTC.shape
        out_THC = query_HTC.new_empty(tokens, heads, size if values is None else values.shape[-1])
        for group in self.groups:
            (count, length), rows = group.rows_nL.shape, group.rows_nL.flatten()
            q_nHLC = query_HTC.index_select(1, rows).view(heads, count, length, -1).transpose(0, 1)
            k_nKSC = group.gather(keys)
            if values is None and length > 1:
                k_nKSC = k_nKSC.expand(-1, heads, -1, -1)  # a view: attention() would copy it for every head
            v_nKSC = k_nKSC[..., :size] if values is None else group.gather(values)
            mask = group.mask(options.window, options.chunk, k_nKSC.shape[2], query_HTC.dtype)
            out = attention(q_nHLC, k_nKSC, v_nKSC, mask, options).transpose(1, 2).flatten(0, 1)
            group.put(out_THC, out)
        return out_THC

    def recur(self, layer: int, rule: DeltaRule, mixed_TC: Tensor, decay_TH: Tensor, beta_TH: Tensor) -> Tensor:
        """Goes on from the states of each sequence, from none at its first token, and stores those after the step."""
        states = self.cache.states[layer]
        assert states is not None
        out_THV = mixed_TC.new_empty(len(mixed_TC), rule.shape.num_heads, rule.shape.value_size, dtype=states[1].dtype)
        for group in self.groups:
            rows, known = group.rows_nL.flatten(), group.positions_nL[:, 0] > 0
            mixed, decay, beta = (
                x.index_select(0, rows).unflatten(0, group.rows_nL.shape) for x in (mixed_TC, decay_TH, beta_TH)
            )
            inputs, matrices = (x.index_select(0, group.state_n) for x in states)
            # not by a product: what was left there may not be finite
            before = inputs.where(known[:, None, None], 0), matrices.where(known[:, None, None, None], 0)
            out, after = rule.run(mixed, decay, beta, before, group.real())
            for whole, new in zip(states, after, strict=True):
                whole.index_copy_(0, group.state_n, new)
            group.put(out_THV, out.flatten(0, 1))
        return out_THV

    def write(self, layer: int, key_TKC: Tensor, value_TKC: Tensor | None) -> None:
        """Stores the step's keys and values in their slots."""
        heads, size = key_TKC.shape[1], self.cache.block_tokens
        if heads not in self._writes:
            head_K = torch.arange(heads, device=self.slots_T.device)
            block_T1, offset_T1 = (self.slots_T // size).unsqueeze(1), (self.slots_T % size).unsqueeze(1)
            self._writes[heads] = ((block_T1 * heads + head_K) * size + offset_T1).flatten()
        for cache, new in ((self.cache.keys[layer], key_TKC), (self.cache.values[layer], value_TKC)):
            if new is None:
                continue
            channels = new.shape[-1]
            cache.view(-1, channels).index_copy_(0, self._writes[heads], new.reshape(-1, channels))


def attention(q_nHLC: Tensor, k_nKSC: Tensor, v_nKSC: Tensor, mask_n1LS: Tensor, options: AttentionOptions) -> Tensor:
    """softmax(scale * q k + mask) v, [n, H, L, C]; the queries that share a key/value head are grouped, not copied."""
    count, heads, length, channels = q_nHLC.shape
    kv_heads = k_nKSC.shape[1]
    group = heads // kv_heads
    if length == 1:  # the queries of one key/value head take the place of L
        q_nHLC = q_nHLC.reshape(count, kv_heads, group, channels)
    elif group > 1:
        k_nKSC, v_nKSC = (x.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (k_nKSC, v_nKSC))
    scale, sinks = options.scale, options.sinks_H
    if options.is_plain and q_nHLC.shape[:3].numel() * k_nKSC.shape[2] <= MAX_SCORES and exact_ops.uses_onednn(q_nHLC):
        # as training attends in float32 on a CPU without kernels (exact_ops.attend)
        keys, values, mask = k_nKSC.double(), v_nKSC.double(), mask_n1LS.double()
        weights = (q_nHLC.double() @ keys.transpose(2, 3)).mul_(scale).add_(mask).softmax(-1)
        out = (weights @ values).to(q_nHLC.dtype)
    elif options.is_plain:
        out = F.scaled_dot_product_attention(q_nHLC, k_nKSC, v_nKSC, attn_mask=mask_n1LS, scale=scale)
    else:  # blocks of sequences and of queries, so that no more than MAX_SCORES exist at once
        queries = max(1, MAX_SCORES // (heads * k_nKSC.shape[2]))
        step = max(1, queries // count) if length > 1 else group
        sinks = None if sinks is None else sinks.view(q_nHLC.shape[1], -1, 1)  # [K, G, 1] or [H, 1, 1]
        several = zip(*(x.split(queries) for x in (q_nHLC, k_nKSC, v_nKSC, mask_n1LS)), strict=True)
        out = torch.cat([_by_products(q, k, v, mask, step, options, sinks) for q, k, v, mask in several])
    return out.reshape(count, heads, length, -1)


def _by_products(
    q_nHLC: Tensor,
    k_nHSC: Tensor,
    v_nHSC: Tensor,
    mask_n1LS: Tensor,
    step: int,
    options: AttentionOptions,
    sinks: Tensor | None,
) -> Tensor:
    outs, softcap = [], options.softcap
    for q, mask in zip(q_nHLC.split(step, 2), mask_n1LS.split(step, 2), strict=True):
        scores = torch.matmul(q * options.scale, k_nHSC.transpose(2, 3))
        scores = (torch.tanh(scores / softcap) * softcap if softcap else scores) + mask
        wide = torch.promote_types(scores.dtype, torch.float32)
        outs.append(torch.matmul(softmax_with_sinks(scores, sinks, wide).to(v_nHSC.dtype), v_nHSC))
    return torch.cat(outs, 2)


def prefill_attention(cache: KVCache, chunks: list[PrefillChunk]) -> tuple[Tensor, Tensor, PagedAttention]:
    """tokens_T, positions_T and the attention of a prefill step."""
    tokens, positions, slots, table_BW = prefill_arrays(chunks, cache.block_tokens)
    starts, ends = (np.array([getattr(p, side) for p in chunks]) for side in ("start", "end"))
    lengths = ends - starts
    firsts = np.cumsum([0, *lengths])[:-1]
    groups = []
    for members in _alike(lengths.tolist()):
        column = np.arange(lengths[members[0]])  # the longest is first
        valid = column < lengths[members, None]
        rows, where = (np.where(valid, first[members, None] + column, 0) for first in (firsts, starts))
        table = table_BW[members, : -(-ends[members].max() // cache.block_tokens)].astype(np.int64)
        state = np.array([chunks[member].sequence.state for member in members])
        real = None if valid.all() else to_device(np.flatnonzero(valid), cache.device)
        rows_nL, where_nL, table_nW, state_n = move_all(cache.device, rows, where, table, state)
        groups.append(Group(rows_nL, where_nL, table_nW, state_n, real))
    tokens_T, positions_T, slots_T = move_all(cache.device, tokens, positions, slots)
    return tokens_T, positions_T, PagedAttention(cache, slots_T, groups)


def _alike(lengths: list[int]) -> list[list[int]]:
    """Indices in groups whose padding to the longest costs at most a third more rows."""
    groups: list[list[int]] = []
    total = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and 3 * lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= 4 * (total + lengths[i]):
            groups[-1].append(i)
            total += lengths[i]
        else:
            groups.append([i])
            total = lengths[i]
    return groups


def decode_attention(cache: KVCache, batch: DecodeInputs) -> tuple[Tensor, Tensor, PagedAttention]:
    """tokens_B, positions_B and the attention of a decode step."""
    width = int(batch.positions_B.max()) // cache.block_tokens + 1
    arrays = batch.tokens_B.copy(), batch.positions_B.copy(), batch.slots(cache.block_tokens)
    state_B = np.zeros_like(arrays[0]) if batch.state_B is None else batch.state_B
    table_BW = batch.table_BW[:, :width].astype(np.int64)
    tokens, positions, slots_B, table, state = move_all(cache.device, *arrays, table_BW, state_B)
    rows = torch.arange(len(tokens), device=cache.device).unsqueeze(1)
    return tokens, positions, PagedAttention(cache, slots_B, [Group(rows, positions.unsqueeze(1), table, state, None)])


class PagedRunner(Runner):
    """Prefill and decode over the cache in torch operations; what computes hidden states and logits is the subclass's.

    A step has the tokens of all its sequences along one dimension. Only attention knows which sequence a token is of:
    it stores the step's keys and values in their blocks, then reads each sequence's blocks through its table.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache

    def prefill(self, chunks: list[PrefillChunk]) -> Tensor | None:
        """Fills the cache; logits [complete chunks, V] float32 of the last token of each complete chunk, if any."""
        return self.prefill_with(chunks, *prefill_attention(self._cache, chunks))

    def prefill_with(
        self, chunks: list[PrefillChunk], tokens_T: Tensor, positions_T: Tensor, attention: Attention
    ) -> Tensor | None:
        """The same by the given attention."""
        segments, segments_of_logits = chunk_segments(chunks)
        hidden_TC = self.hidden(tokens_T, positions_T, attention, segments)
        if not any(chunk.complete for chunk in chunks):
            return None
        return self.logits(last_rows(hidden_TC, chunks), segments_of_logits)

    def decode(self, batch: DecodeInputs) -> Tensor:
        """Logits [B, V] float32 of the newest token of each sequence; adds it to the cache."""
        tokens_B, positions_B, attend = decode_attention(self._cache, batch)
        hidden_BC = self.hidden(tokens_B, positions_B, self._decoding(attend), batch.segments)
        return self.logits(hidden_BC, batch.segments)

    def _decoding(self, attention: PagedAttention) -> Attention:
        """The attention of a decode step; a subclass may have a faster one."""
        return attention

    def hidden(
        self, tokens_T: Tensor, positions_T: Tensor, attention: Attention, segments: list[Segment] | None = None
    ) -> Tensor:
        """Final, normed hidden states [T, channels of the model]."""
        raise NotImplementedError

    def logits(self, hidden_TC: Tensor, segments: list[Segment] | None = None) -> Tensor:
        """Logits [T, V] float32."""
        raise NotImplementedError


class ModuleRunner(PagedRunner):
    """Runs the model's own forward over the cache: the reference, and the path of every architecture."""

    name = "module"

    def __init__(self, model: CausalLM, cache: KVCache) -> None:
        super().__init__(cache)
        self._model = model

    def hidden(
        self, tokens_T: Tensor, positions_T: Tensor, attention: Attention, segments: list[Segment] | None = None
    ) -> Tensor:
        """Final, normed hidden states [T, channels of the model]."""
        step: Any = attention  # PagedAttention or cuda.VarlenAttention: both know where the step's tokens lie
        with nullcontext() if segments is None else routed(self._model, segments):
            if self._cache.experts is None:
                return self._model.hidden(tokens_T, positions_T, attention)
            with recording(self._model) as chosen:
                hidden_TC = self._model.hidden(tokens_T, positions_T, attention)
            self._cache.put_experts(step.slots_T, chosen)
            return hidden_TC

    def logits(self, hidden_TC: Tensor, segments: list[Segment] | None = None) -> Tensor:
        """Logits [T, V] float32."""
        return self._model.logits(hidden_TC, segments)
