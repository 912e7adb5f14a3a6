"""Paged attention by torch.nn.attention.varlen on CUDA, and decode steps replayed as CUDA graphs.

Used where the installed torch has the paged form (argument `block_table`) and its kernel takes the model's layers;
elsewhere CUDA runs the gathered attention of paged.py, with a warning that says why. A decode step is padded to one of
a few batch sizes; padding rows write to block 0, see one key and are cut off.

A step whose sequences all have one adapter is replayed as well, from a copy of the adapter at fixed addresses; steps
over several run call by call (docs/sampler.md).

Legend: T tokens of a step, B sequences, W blocks of a sequence, H heads, K key/value heads, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from skyrl.models.attention import Attention, AttentionOptions
from skyrl.models.packed import banned, move_all, to_device, varlen
from skyrl.planner.device import VARLEN_RELEASE, first_line, torch_release
from skyrl.sampler.runners.base import DecodeInputs, KVCache, PrefillChunk, Runner, prefill_arrays
from skyrl.sampler.runners.paged import PagedRunner, attention
from skyrl.tracking.advisories import warn_fallback

if TYPE_CHECKING:
    from skyrl.models.attention_calls import LayerCall
    from skyrl.models.lora import Adapter, Segment
    from skyrl.types import LoraSpec

FLASH_PAGE = 256  # tokens; Flash Attention 2 takes pages of a multiple of this, version 3 any
MAX_COPIES = 4  # shapes of adapters that graphs are kept for; tenants of a server may choose any number of them
PROBE_WINDOW = 3  # tokens; a window that is wrong by one token changes a third of what is seen


@dataclass(frozen=True)
class PagedKernel:
    """The form in which torch's paged attention works here: tokens of a page, and whether `cu_seq_k` is given beside
    the block table. Flash Attention 2 refuses to go without (and ignores the values), version 3 refuses to have it."""

    page: int
    key_borders: bool


def paged_kernel(wanted: int, calls: list[LayerCall], dtype: torch.dtype, device: torch.device) -> PagedKernel | str:
    """The form of paged attention that works for all layers on this device, with pages of `wanted` tokens if it can be;
    or why there is none."""
    if device.type != "cuda":
        return f"it is for CUDA, not for {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if torch_release() < VARLEN_RELEASE or "block_table" not in varlen()[1]:
        return f"varlen_attn of torch {torch.__version__} takes no block table (that of 2.13 does)"
    if any(call.state is not None for call in calls):
        return "some of the model's layers keep states (linear attention)"
    if any(call.softcap is not None for call in calls):
        return "the model caps its attention scores"
    if any(call.sinks or call.chunk is not None for call in calls):
        return "the model has attention sinks or attends in chunks"
    if any(call.shape.key_size != call.shape.value_size for call in calls):
        return "keys and values have different sizes"
    return working_form(wanted, calls, dtype, device)


def working_form(wanted: int, calls: list[LayerCall], dtype: torch.dtype, device: torch.device) -> PagedKernel | str:
    """The first form that gives what plain attention gives for each kind of layer, or what is wrong with each."""
    layers = {(c.num_heads, c.shape.num_heads, c.shape.key_size, c.window is not None) for c in calls}
    reasons = []
    for page in dict.fromkeys((wanted, FLASH_PAGE)):
        for key_borders in (True, False):
            kernel = PagedKernel(page, key_borders)
            refusals = (kernel_refusal(kernel, layer, dtype, device) for layer in sorted(layers))
            reason = next(filter(None, refusals), "")
            if not reason:
                return kernel
            reasons.append(f"pages of {page} tokens {'with' if key_borders else 'without'} cu_seq_k: {reason}")
    return "; ".join(reasons)


@lru_cache(maxsize=64)
def kernel_refusal(
    kernel: PagedKernel, layer: tuple[int, int, int, bool], dtype: torch.dtype, device: torch.device
) -> str:
    """Why paged attention in this form does not do for a layer (heads, key/value heads, channels, whether it has a
    window); "" when it gives what plain attention gives.

    Three sequences over shuffled pages, with several queries each and with one each, with a window if the layer has
    one. What is allowed are the roundings of `dtype`: of the weights that the kernel multiplies, and of the result.
    """
    (heads, kv_heads, channels, windowed), generator = layer, torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    size, scale, allowed = kernel.page, 0.8 * channels**-0.5, 4 * torch.finfo(dtype).eps
    keys, values, lengths = *(noise(6, size, kv_heads, channels) for _ in "kv"), [size + 1, 5, 2 * size - 1]
    table = torch.tensor([[4, 2], [5, 0], [1, 3]], dtype=torch.int32, device=device)
    for counts in ([7, 5, 2], [1, 1, 1]):
        query, firsts = noise(sum(counts), heads, channels), np.cumsum([0, *counts])
        given = to_device(firsts, device, np.int32), to_device(lengths, device, np.int32), max(counts), 2 * size
        step = VarlenAttention(kernel, None, table[:0], *given, table)
        for window in (None, PROBE_WINDOW) if windowed else (None,):
            try:
                out = step.over(query, keys, values, scale, window)
            except torch.OutOfMemoryError:
                raise  # which passes, and says nothing of the kernel
            except (RuntimeError, ValueError) as error:
                return first_line(error)
            for pages, first, count, length in zip(table, firsts, counts, lengths, strict=False):
                unseen = banned(length, window, device)[None, None, -count:]
                mask = torch.zeros_like(unseen, dtype=torch.float32).masked_fill_(unseen, float("-inf"))
                q, k, v = (
                    x.float().transpose(0, 1)[None]
                    for x in (query[first : first + count], *(x[pages].flatten(0, 1)[:length] for x in (keys, values)))
                )
                want = attention(q, k, v, mask, AttentionOptions(scale))[0]
                gap = (out[first : first + count].float().transpose(0, 1) - want).abs()
                if not (gap <= allowed * (1 + want.abs())).all():
                    return f"with {count} queries and window {window} its result is off by {gap.max().item():.2g}"
    return ""


@dataclass
class VarlenAttention(Attention):
    """Attention of one step over a cache of layout [blocks, block_tokens, K, C]. `borders` [B + 1] of the queries and
    `lengths` [B], how many keys each sequence has, are int32."""

    kernel: PagedKernel
    cache: KVCache | None
    slots_T: Tensor
    borders: Tensor
    lengths: Tensor
    max_query: int
    max_keys: int
    table_BW: Tensor

    def attend(
        self, layer: int, query_HTC: Tensor, key_KTC: Tensor, value_KTC: Tensor, options: AttentionOptions
    ) -> Tensor:
        """See skyrl.models.attention.Attention; without soft cap, chunks and sinks."""
        assert self.cache is not None
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        for cache, new in ((keys, key_KTC), (values, value_KTC)):
            cache.flatten(0, 1).index_copy_(0, self.slots_T, new.transpose(0, 1))
        return self.over(query_HTC.transpose(0, 1).contiguous(), keys, values, options.scale, options.window)

    def over(self, query_THC: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
        """Attention of queries over pages, aligned at the end: the last query of a sequence sees all its keys."""
        # one query sees all keys with or without "none to the right", and without it grouped heads are packed together
        right = -1 if window is None and self.max_query == 1 else 0
        return varlen()[0](
            query_THC,
            keys,
            values,
            self.borders,
            self.borders if self.kernel.key_borders else None,  # int32 [B + 1]; block table and lengths count
            self.max_query,
            self.max_keys,
            scale=scale,
            window_size=(-1 if window is None else window - 1, right),
            enable_gqa=query_THC.shape[1] != keys.shape[2],
            seqused_k=self.lengths,
            block_table=self.table_BW,
        )


class _Buffers:
    """Inputs of a decode step of a fixed batch size, at fixed addresses."""

    def __init__(self, kernel: PagedKernel, cache: KVCache, size: int, width: int) -> None:
        device = cache.device
        self.tokens, self.positions, self.slots = (
            torch.zeros(size, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.lengths = torch.ones(size, dtype=torch.int32, device=device)
        self.table = torch.zeros(size, width, dtype=torch.int32, device=device)
        firsts = torch.arange(size + 1, dtype=torch.int32, device=device)
        keys = width * cache.block_tokens
        self.attention = VarlenAttention(kernel, cache, self.slots, firsts, self.lengths, 1, keys, self.table)

    def fill(self, batch: DecodeInputs, block_tokens: int) -> None:
        """Takes over a batch; rows beyond it become padding."""
        count, size = len(batch.tokens_B), len(self.tokens)
        packed = np.zeros((3, size), dtype=np.int64)
        packed[:, :count] = batch.tokens_B, batch.positions_B, batch.slots(block_tokens)
        width = min(batch.table_BW.shape[1], self.table.shape[1])
        table = np.zeros((size, self.table.shape[1]), dtype=np.int32)
        table[:count, :width] = batch.table_BW[:, :width]
        moved, moved_table = move_all(self.tokens.device, packed, table)
        for buffer, row in zip((self.tokens, self.positions, self.slots), moved, strict=True):
            buffer.copy_(row)
        self.lengths.copy_(moved[1] + 1)
        self.table.copy_(moved_table)


@dataclass
class _AdapterCopy:
    """What graphs read in place of the adapter `source`, whose weights it holds; None = to be filled again."""

    adapter: Adapter
    source: Adapter | None


class CudaRunner(Runner):
    """Runs the module or the fused plan with paged attention; decode steps as graphs if asked.

    All graphs write their logits to one buffer, [largest batch, V] float32.
    """

    def __init__(
        self,
        inner: PagedRunner,
        kernel: PagedKernel,
        cache: KVCache,
        *,
        max_length: int,
        max_running: int,
        graphs: bool,
    ) -> None:
        self.name = inner.name
        self._inner, self._kernel, self._cache, self._use_graphs = inner, kernel, cache, graphs
        self._width = -(-max_length // cache.block_tokens)
        self._sizes = sorted({1, 2, 4, *range(8, max_running, 8), max_running})
        self._buffers: dict[int, _Buffers] = {}
        self._copies: dict[tuple[LoraSpec, torch.dtype], _AdapterCopy] = {}  # by shape, least recently used first
        self._graphs: dict[tuple[int, int], Any] = {}  # by batch size and id of the copy (0: none); None = refused
        self._logits_BV: Tensor | None = None
        self._pool: Any = None

    def prefill(self, chunks: list[PrefillChunk]) -> Tensor | None:
        """Fills the cache; logits [complete chunks, V] float32 of the last token of each complete chunk, if any."""
        lengths, ends = [p.end - p.start for p in chunks], [p.end for p in chunks]
        arrays, firsts = prefill_arrays(chunks, self._cache.block_tokens), np.cumsum([0, *lengths])
        moved = move_all(self._cache.device, *arrays, firsts.astype(np.int32), np.array(ends, np.int32))
        tokens_T, positions_T, slots_T, table, borders, keys = moved
        given = slots_T, borders, keys, max(lengths), max(ends), table
        attention = VarlenAttention(self._kernel, self._cache, *given)
        return self._inner.prefill_with(chunks, tokens_T, positions_T, attention)

    def decode(self, batch: DecodeInputs) -> Tensor:
        """Logits [B, V] float32 of the newest token of each sequence, until the next call; adds it to the cache."""
        count, segments = len(batch.tokens_B), batch.segments
        size = next(size for size in self._sizes if size >= count)
        if size not in self._buffers:
            self._buffers[size] = _Buffers(self._kernel, self._cache, size, self._width)
        buffers = self._buffers[size]
        buffers.fill(batch, self._cache.block_tokens)
        if self._use_graphs and (segments is None or len(segments) == 1):
            copy = None if segments is None or segments[0][2] is None else self._copy(segments[0][2])
            fixed: list[Segment] | None = None if copy is None else [(0, size, copy)]  # the padding's is cut off
            key = (size, 0 if copy is None else id(copy))
            if key not in self._graphs:
                self._graphs[key] = self._captured(size, lambda: self._compute(buffers, fixed))
            if (graph := self._graphs[key]) is not None:
                graph.replay()
                assert self._logits_BV is not None
                return self._logits_BV[:count]
        elif self._use_graphs:
            warn_fallback("decoding without CUDA graphs: several adapters, or some with and some without, together")
        if segments is not None and count < size:
            segments = [*segments, (count, size, None)]
        return self._compute(buffers, segments)[:count]

    def refresh(self) -> None:
        """The parameters changed in place; graphs read them where they are."""
        self._inner.refresh()

    def forget(self, adapter: Adapter) -> None:
        """Drops what is kept of an adapter, or was filled from it; the graphs stay."""
        self._inner.forget(adapter)
        for copy in self._copies.values():
            if copy.source is adapter:
                copy.source = None

    def _compute(self, buffers: _Buffers, segments: list[Segment] | None = None) -> Tensor:
        hidden = self._inner.hidden(buffers.tokens, buffers.positions, buffers.attention, segments)
        return self._inner.logits(hidden, segments)

    def _copy(self, adapter: Adapter) -> Adapter:
        """The adapter's weights where the graphs for its shape read them."""
        shape = (replace(adapter.spec, seed=0), next(adapter.parameters()).dtype)
        copy = self._copies.pop(shape, None)
        if copy is None:
            if len(self._copies) == MAX_COPIES:
                warn_fallback(f"CUDA graphs are kept for {MAX_COPIES} shapes of adapters; others are recorded again")
                gone = self._copies.pop(next(iter(self._copies))).adapter
                self._graphs = {key: graph for key, graph in self._graphs.items() if key[1] != id(gone)}
                self._inner.forget(gone)
                if not any(graph.pool() == self._pool for graph in self._graphs.values() if graph is not None):
                    self._pool = None  # torch takes no graph into a pool whose graphs are all gone
            copy = _AdapterCopy(adapter.frozen_copy("of CUDA graphs"), adapter)
        self._copies[shape] = copy  # the most recently used is the last
        if copy.source is not adapter:
            copy.adapter.load_state_dict(adapter.state_dict())
            self._inner.adapter_changed(copy.adapter)
            copy.source = adapter
        return copy.adapter

    def _captured(self, size: int, compute: Callable[[], Tensor]) -> Any:
        """The graph of one step; None, said once, where this step cannot be recorded.

        What it computes while warming up is what the replay computes again: same slots, same values."""
        try:
            warm_BV = on_side_stream(compute)
            if self._logits_BV is None:
                self._logits_BV = warm_BV.new_empty(self._sizes[-1], warm_BV.shape[1])
            target_BV = self._logits_BV[:size]
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            return capture(lambda: target_BV.copy_(compute()), self._pool)
        except RuntimeError as error:
            warn_fallback(f"decoding without a CUDA graph for batches of {size}: {first_line(error)}")
            self._pool = None  # what a broken recording left there is not shared with the next
            return None


def on_side_stream(compute: Callable[[], Tensor]) -> Tensor:
    """The result of the second of two runs on a stream of their own, as a capture needs it: kernels are loaded then."""
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        compute()
        out = compute()
    main.wait_stream(side)
    return out


def capture(step: Callable[[], Any], pool: Any) -> torch.cuda.CUDAGraph:
    """Records what `step` does as a graph. Other threads may use the device meanwhile: only calls of this one count."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()):  # given back also where the recording breaks
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()
    return graph
