"""Paged attention by torch.nn.attention.varlen on CUDA, and decode steps replayed as CUDA graphs.

Used where the installed torch has the paged form (argument `block_table`) and its kernel takes the model's layers;
elsewhere CUDA runs the gathered attention of paged.py. A decode step is padded to one of a few batch sizes; padding
rows write to block 0, see one key and are cut off. Steps with adapters are not recorded: they run call by call.

Legend: T tokens of a step, B sequences, W blocks of a sequence, H heads, K key/value heads, C channels.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from skyrl.sampler.runners.base import DecodeInputs, KVCache, PrefillChunk, chunk_segments, last_rows
from skyrl.sampler.runners.paged import PagedRunner
from skyrl.sampler.runners.sampling import sample

if TYPE_CHECKING:
    from skyrl.models.lora import Adapter, Segment
    from skyrl.sampler.runners.attention_calls import LayerCall

log = logging.getLogger(__name__)

FLASH_PAGE = 256  # tokens; Flash Attention 2 takes pages of a multiple of this, version 3 any


def varlen_function() -> Callable[..., Any] | None:
    """torch's variable-length attention, if it is there and knows block tables."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"block_table", "seqused_k", "window_size", "enable_gqa"} <= set(names) else None


def page_size(wanted: int, calls: list[LayerCall], dtype: torch.dtype, device: torch.device) -> int:
    """Tokens of a block for which paged attention works on this device: `wanted`, else FLASH_PAGE; 0 = for none."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or varlen_function() is None:
        return 0
    if any(call.softcap is not None or call.shape.key_size != call.shape.value_size for call in calls):
        return 0
    shapes = {(call.num_heads, call.shape.num_heads, call.shape.key_size) for call in calls}
    for size in dict.fromkeys((wanted, FLASH_PAGE)):
        if all(probe_kernel(size, *shape, dtype, device) for shape in shapes):
            return size
    return 0


@lru_cache(maxsize=64)
def probe_kernel(size: int, heads: int, kv_heads: int, channels: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether one query over two shuffled pages gives what plain attention gives."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    keys, values, query = (
        noise(3, size, kv_heads, channels),
        noise(3, size, kv_heads, channels),
        noise(1, heads, channels),
    )
    table = torch.tensor([[2, 1]], dtype=torch.int32, device=device)
    step = VarlenAttention(None, torch.zeros(0), [0, 1], [size + 1], 1, 2 * size, table)
    try:
        out = step.over(query, keys, values, channels**-0.5, None)
    except RuntimeError as error:
        log.info("paged attention with blocks of %d tokens: %s", size, str(error).splitlines()[0])
        return False
    seen = [torch.cat([x[2], x[1, :1]]).float().repeat_interleave(heads // kv_heads, 1) for x in (keys, values)]
    weights = torch.einsum("hc,shc->hs", query[0].float(), seen[0]).mul(channels**-0.5).softmax(-1)
    return bool(torch.allclose(torch.einsum("hs,shc->hc", weights, seen[1]), out[0].float(), atol=0.05))


class VarlenAttention:
    """Attention of one step over a cache of layout [blocks, block_tokens, K, C]."""

    def __init__(
        self,
        cache: KVCache | None,
        slots_T: Tensor,
        firsts: Any,
        lengths: Any,
        max_query: int,
        max_keys: int,
        table: Tensor,
    ) -> None:
        device = table.device
        self._cache, self._slots_T, self._table_BW = cache, slots_T, table
        self._firsts = torch.as_tensor(firsts, dtype=torch.int32, device=device)  # [B + 1], borders of the queries
        self._lengths = torch.as_tensor(lengths, dtype=torch.int32, device=device)  # [B], keys of each
        self._max_query, self._max_keys = max_query, max_keys

    def attend(
        self,
        layer: int,
        query_HTC: Tensor,
        key_KTC: Tensor,
        value_KTC: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """See skyrl.models.attention.Attention; without soft cap."""
        assert self._cache is not None
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        for cache, new in ((keys, key_KTC), (values, value_KTC)):
            cache.flatten(0, 1).index_copy_(0, self._slots_T, new.transpose(0, 1))
        return self.over(query_HTC.transpose(0, 1).contiguous(), keys, values, scale, window)

    def over(self, query_THC: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
        """Attention of queries over pages, aligned at the end: the last query of a sequence sees all its keys."""
        function = varlen_function()
        assert function is not None
        return function(
            query_THC,
            keys,
            values,
            self._firsts,
            None,
            self._max_query,
            self._max_keys,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query_THC.shape[1] != keys.shape[2],
            seqused_k=self._lengths,
            block_table=self._table_BW,
        )


class _Buffers:
    """Inputs of a decode step of a fixed batch size, at fixed addresses."""

    def __init__(self, cache: KVCache, size: int, width: int) -> None:
        device = cache.device
        self.tokens, self.positions, self.slots = (
            torch.zeros(size, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.lengths = torch.ones(size, dtype=torch.int32, device=device)
        self.table = torch.zeros(size, width, dtype=torch.int32, device=device)
        firsts = torch.arange(size + 1, dtype=torch.int32, device=device)
        keys = width * cache.block_tokens
        self.attention = VarlenAttention(cache, self.slots, firsts, self.lengths, 1, keys, self.table)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None

    def fill(self, batch: DecodeInputs, block_tokens: int) -> None:
        """Takes over a batch; rows beyond it become padding."""
        count, size = len(batch.tokens_B), len(self.tokens)
        slots_B = batch.table_BW[np.arange(count), batch.positions_B // block_tokens].astype(np.int64) * block_tokens
        slots_B += batch.positions_B % block_tokens
        packed = np.zeros((3, size), dtype=np.int64)
        packed[:, :count] = batch.tokens_B, batch.positions_B, slots_B
        moved = torch.from_numpy(packed).to(self.tokens.device)
        for buffer, row in zip((self.tokens, self.positions, self.slots), moved, strict=True):
            buffer.copy_(row)
        self.lengths.copy_(moved[1] + 1)
        width = min(batch.table_BW.shape[1], self.table.shape[1])
        table = np.zeros((size, self.table.shape[1]), dtype=np.int32)
        table[:count, :width] = batch.table_BW[:, :width]
        self.table.copy_(torch.from_numpy(table))


class CudaRunner:
    """Runs the module or the fused plan with paged attention; decode steps as graphs if asked."""

    sample = staticmethod(sample)

    def __init__(self, inner: PagedRunner, cache: KVCache, *, max_length: int, max_running: int, graphs: bool) -> None:
        self._inner, self._cache, self._graphs = inner, cache, graphs and cache.device.type == "cuda"
        self._width = -(-max_length // cache.block_tokens)
        self._sizes = sorted({1, 2, 4, *range(8, max_running, 8), max_running})
        self._buffers: dict[int, _Buffers] = {}
        self._pool: Any = None

    @property
    def name(self) -> str:
        return self._inner.name

    def prefill(self, chunks: list[PrefillChunk]) -> Tensor | None:
        """Fills the cache; logits [complete chunks, V] float32 of the last token of each complete chunk, if any."""
        size, device = self._cache.block_tokens, self._cache.device
        tokens = np.concatenate([p.sequence.tokens[p.start : p.end] for p in chunks])
        positions = np.concatenate([np.arange(p.start, p.end) for p in chunks])
        lengths = [p.end - p.start for p in chunks]
        table = np.zeros((len(chunks), max(len(p.sequence.blocks) for p in chunks)), dtype=np.int32)
        for row, p in zip(table, chunks, strict=True):
            row[: len(p.sequence.blocks)] = p.sequence.blocks
        owner = np.repeat(np.arange(len(chunks)), lengths)
        slots = table[owner, positions // size].astype(np.int64) * size + positions % size
        tokens_T, positions_T, slots_T, table_BW = (
            torch.from_numpy(x).to(device) for x in (tokens, positions, slots, table)
        )
        firsts, ends = np.cumsum([0, *lengths]), [p.end for p in chunks]
        attention = VarlenAttention(self._cache, slots_T, firsts, ends, max(lengths), max(ends), table_BW)
        segments, drawing = chunk_segments(chunks)
        hidden_TC = self._inner.hidden(tokens_T, positions_T, attention, segments)
        return self._inner.logits(last_rows(hidden_TC, chunks), drawing) if any(p.complete for p in chunks) else None

    def decode(self, batch: DecodeInputs) -> Tensor:
        """Logits [B, V] float32 of the newest token of each sequence; adds it to the cache."""
        count = len(batch.tokens_B)
        size = next(size for size in self._sizes if size >= count)
        if size not in self._buffers:
            self._buffers[size] = _Buffers(self._cache, size, self._width)
        buffers = self._buffers[size]
        buffers.fill(batch, self._cache.block_tokens)
        if batch.segments is not None:  # a graph would fix the adapters; the padding belongs to nobody
            segments = [*batch.segments, *([(count, size, None)] if count < size else [])]
            return self._compute(buffers, segments)[:count]
        if self._graphs and buffers.graph is None:
            self._capture(buffers)
        if buffers.graph is None:
            return self._compute(buffers)[:count]
        assert buffers.logits is not None
        buffers.graph.replay()
        return buffers.logits[:count].clone()  # drawing overwrites it

    def refresh(self) -> None:
        """The parameters changed in place; graphs read them where they are."""
        self._inner.refresh()

    def forget(self, adapter: Adapter) -> None:
        """Drops what is kept of an adapter."""
        self._inner.forget(adapter)

    def _compute(self, buffers: _Buffers, segments: list[Segment] | None = None) -> Tensor:
        hidden = self._inner.hidden(buffers.tokens, buffers.positions, buffers.attention, segments)
        return self._inner.logits(hidden, segments)

    def _capture(self, buffers: _Buffers) -> None:
        """Records one step. What it computes while warming up is what the replay computes again: same slots, same
        values. A model that cannot be recorded runs without graphs, said once."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._compute(buffers)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                buffers.logits = self._compute(buffers)
        except RuntimeError as error:
            log.info("decoding without CUDA graphs: %s", str(error).splitlines()[0])
            self._graphs = False
            return
        self._pool = self._pool or graph.pool()
        buffers.graph = graph
