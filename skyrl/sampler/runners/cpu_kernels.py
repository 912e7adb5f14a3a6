"""The decode plan as one call into skyrl/kernels/decode.cpp. Where there are no kernels (skyrl.kernels), the plan runs
in torch operations (fused.py), which the log says once.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from skyrl import kernels
from skyrl.kernels import LONGEST, MAX_CHANNELS, MAX_GROUP, MULTIPLE
from skyrl.models.decode_plan import DecodePlan
from skyrl.models.lora import Adapter, Segment
from skyrl.sampler.runners.base import DecodeInputs, KVCache, PrefillChunk, Runner, chunk_segments, prefill_arrays
from skyrl.sampler.runners.lowrank import STRUCTS, PackedAdapters, SegmentStruct
from skyrl.sampler.runners.paged import ModuleRunner
from skyrl.sampler.runners.sampling import BatchSamplingParams, sample

LONGEST_PREFILL = LONGEST  # tokens; longer contexts are prefilled by the module
_POINTER = ctypes.c_void_p


class _Layer(ctypes.Structure):
    _fields_ = [
        (name, _POINTER)
        for name in (
            "input_norm", "qkv", "qkv_bias", "query_norm", "key_norm", "out", "out_bias", "mlp_norm",
            "gate_up", "gate_up_bias", "down", "down_bias", "keys", "values",
        )
    ]  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("dtype", "layers", "hidden", "heads", "kv_heads", "channels", "ffn")),
        *((name, ctypes.c_int32) for name in ("vocab", "block_tokens", "threads", "float_head")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
        *((name, _POINTER) for name in ("embedding", "norm", "head", "head_bias", "cosines", "sines")),
        ("layer", ctypes.POINTER(_Layer)),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("count", "width", "num_logits", "num_segments")),
        *((name, _POINTER) for name in ("tokens", "positions", "table", "rows", "logits")),
        ("segments", ctypes.POINTER(SegmentStruct)),
    ]


def unsupported_reason(plan: DecodePlan, cache: KVCache) -> str:
    """Why the kernels cannot run this plan here; "" when they can."""
    hidden, ffn = plan.embedding.embedding_dim, plan.layers[0].down.in_features
    if cache.device.type != "cpu" or cache.dtype not in (torch.float32, torch.bfloat16):
        return "they are for float32 and bfloat16 on a CPU"
    if any(size % MULTIPLE for size in (hidden, ffn, plan.channels)) or plan.channels > MAX_CHANNELS:
        return f"channels are not multiples of {MULTIPLE}, or more than {MAX_CHANNELS} in a head"
    if plan.heads // plan.kv_heads > MAX_GROUP:
        return f"more than {MAX_GROUP} queries to a key"
    return library()[1]


@lru_cache(maxsize=1)
def library() -> tuple[ctypes.CDLL | None, str]:
    """skyrl.kernels.library, with its structs held against ours."""
    loaded, reason = kernels.library()
    if loaded is None:
        return None, reason
    theirs = (loaded.skyrl_layer_size(), loaded.skyrl_model_size(), loaded.skyrl_step_size())
    if theirs != (*map(ctypes.sizeof, (_Layer, _Model)), sum(map(ctypes.sizeof, (_Step, *STRUCTS)))):
        return None, "the library's structs differ from ours"
    loaded.skyrl_forward.argtypes = [ctypes.POINTER(_Model), ctypes.POINTER(_Step)]
    return loaded, ""


def _large_pages(size: int, dtype: torch.dtype) -> Tensor:
    """Zeros [size] in pages of 2 MiB where the system has them: weights are read from end to end at each step, and
    with pages of 4 KiB the processor spends up to a quarter of that time on looking up where they lie."""
    room = mmap.mmap(-1, size * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=dtype)


class CpuKernelRunner(Runner):
    """Runs a DecodePlan by kernels/decode.cpp. The result for a row depends on nothing but that row's own sequence, to
    the bit: neither on the batch, nor on others' adapters, nor on threads, nor on whether it was prefilled or decoded.

    `exact` keeps this also for contexts above LONGEST_PREFILL and for rows with cuts. Without, the former are prefilled
    by the module, which is faster there, and a batch in which some row has a cut is drawn by torch."""

    name = "kernels"

    def __init__(self, plan: DecodePlan, cache: KVCache, module: ModuleRunner, *, exact: bool = False) -> None:
        loaded, reason = library()
        if loaded is None:
            raise RuntimeError(reason)
        self._library, self._plan, self._cache, self._module, self._exact = loaded, plan, cache, module, exact
        self._half = int(cache.dtype == torch.bfloat16)
        self._adapters = PackedAdapters(loaded, plan, cache.dtype)
        sizes = [
            self._size(part) for layer in plan.layers for part in (layer.qkv, [layer.out], layer.gate_up, [layer.down])
        ]
        self._packed = _large_pages(sum(sizes) + self._size([plan.head]), cache.dtype)
        self.refresh()

    def refresh(self) -> None:
        """Packs the parameters as they are now."""
        plan, cache = self._plan, self._cache
        self._alive: list[Tensor] = []  # what the pointers point to beside what is packed
        self._end = 0  # of what is packed
        layers = (_Layer * len(plan.layers))()
        for to, layer, keys, values in zip(layers, plan.layers, cache.keys, cache.values, strict=True):
            to.input_norm, to.mlp_norm = self._live(layer.input_norm.weight), self._live(layer.mlp_norm.weight)
            if layer.qk_norms is not None:
                to.query_norm, to.key_norm = (self._live(norm.weight) for norm in layer.qk_norms)
            to.qkv, to.qkv_bias = self._pack(layer.qkv)
            to.out, to.out_bias = self._pack([layer.out])
            to.gate_up, to.gate_up_bias = self._pack(layer.gate_up, interleave=True)
            to.down, to.down_bias = self._pack([layer.down])
            to.keys, to.values = keys.data_ptr(), values.data_ptr()
        head, head_bias = self._pack([plan.head])
        self._layers = layers
        self._model = _Model(
            dtype=self._half, layers=len(layers), hidden=plan.embedding.embedding_dim, heads=plan.heads,
            kv_heads=plan.kv_heads, channels=plan.channels, ffn=plan.layers[0].down.in_features,
            vocab=plan.head.out_features, block_tokens=cache.block_tokens, threads=torch.get_num_threads(),
            float_head=plan.float_head, eps=plan.eps, scale=plan.scale, embedding=self._live(plan.embedding.weight),
            norm=self._live(plan.norm.weight), head=head, head_bias=head_bias, cosines=self._live(plan.cos_LC),
            sines=self._live(plan.sin_LC), layer=ctypes.cast(layers, ctypes.POINTER(_Layer)),
        )  # fmt: skip

    def prefill(self, chunks: list[PrefillChunk]) -> Tensor | None:
        """Fills the cache; logits [complete chunks, V] float32 of the last token of each complete chunk, if any."""
        if self._exact:
            return self._prefill(chunks)
        logits = []  # in order: a chunk may need keys of one before it
        for long, some in groupby(chunks, lambda chunk: chunk.end > LONGEST_PREFILL):
            part = (self._module.prefill if long else self._prefill)(list(some))
            logits += [] if part is None else [part]
        return torch.cat(logits) if logits else None

    def _prefill(self, chunks: list[PrefillChunk]) -> Tensor | None:
        lengths = [chunk.end - chunk.start for chunk in chunks]
        tokens, positions, _, table = prefill_arrays(chunks, self._cache.block_tokens)
        rows = (np.cumsum(lengths) - 1)[[chunk.complete for chunk in chunks]]
        table = np.repeat(table, lengths, axis=0)
        logits = self._forward(tokens, positions, table, rows, chunk_segments(chunks)[0])
        return logits if len(rows) else None

    def decode(self, batch: DecodeInputs) -> Tensor:
        """Logits [B, V] float32 of the newest token of each sequence; adds it to the cache."""
        rows = np.arange(len(batch.tokens_B))
        return self._forward(batch.tokens_B, batch.positions_B, batch.table_BW, rows, batch.segments)

    def forget(self, adapter: Adapter) -> None:
        """Drops the packed form of an adapter."""
        self._adapters.forget(adapter)

    def sample(self, logits_BV: Tensor, params: BatchSamplingParams, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
        """As sampling.sample, up to rounding; rows with cuts go there, one by one if bits matter."""
        if logits_BV.dtype != torch.float32 or (params.cut and not self._exact):
            return sample(logits_BV, params, uniforms_B)
        (count, vocab), logits_BV = logits_BV.shape, logits_BV.contiguous()
        tokens_B, logprobs_B = torch.empty(count, dtype=torch.int64), torch.empty(count)
        self._library.skyrl_sample(
            logits_BV.data_ptr(), count, vocab, uniforms_B.data_ptr(), params.temperatures.ctypes.data,
            tokens_B.data_ptr(), logprobs_B.data_ptr(), self._model.threads,
        )  # fmt: skip
        if params.cut:
            cut_B = (params.top_k_B < vocab) | (params.top_p_B < 1) | (params.min_p_B > 0)
            for row in np.flatnonzero(cut_B.numpy() & (params.temperatures > 0)):
                one = slice(row, row + 1)
                tokens_B[one], logprobs_B[one] = sample(logits_BV[one], params.rows(one), uniforms_B[one])
        return tokens_B, logprobs_B

    def _forward(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        table: np.ndarray,
        rows: np.ndarray,
        segments: list[Segment] | None,
    ) -> Tensor:
        logits = torch.empty(len(rows), self._plan.head.out_features)
        parts = self._adapters.segments(segments)
        step = _Step(
            len(tokens), table.shape[1], len(rows), 0 if parts is None else len(parts), tokens.ctypes.data,
            positions.ctypes.data, table.ctypes.data, rows.ctypes.data, logits.data_ptr(), parts,
        )  # fmt: skip
        self._library.skyrl_forward(ctypes.byref(self._model), ctypes.byref(step))
        return logits

    def _live(self, parameter: Tensor) -> int:
        self._alive.append(parameter.detach().contiguous())
        return self._alive[-1].data_ptr()

    def _size(self, parts: list[nn.Linear]) -> int:
        """Elements of the packed form of several linears over one input: whole lines of the cache."""
        columns = sum(part.out_features for part in parts)
        return -(-self._library.skyrl_packed_size(self._half, columns, parts[0].in_features) // 64) * 64

    def _pack(self, parts: list[nn.Linear], interleave: bool = False) -> tuple[int, int | None]:
        """Packed weight and bias of several linears over one input; the bias has room for whole vectors."""
        columns, inner = sum(part.out_features for part in parts), parts[0].in_features
        packed = self._packed[self._end : self._end + self._size(parts)]
        self._end += len(packed)
        first, threads = 0, torch.get_num_threads()
        for half, part in enumerate(parts):
            weight = part.weight.detach().contiguous()
            at = half if interleave else first
            self._library.skyrl_pack(
                self._half, packed.data_ptr(), weight.data_ptr(), part.out_features, inner, at, interleave, threads
            )
            first += part.out_features
        if all(part.bias is None for part in parts):
            return packed.data_ptr(), None
        biases = [part.weight.new_zeros(part.out_features) if part.bias is None else part.bias for part in parts]
        bias = torch.cat([bias.detach() for bias in biases]).to(self._cache.dtype)
        return packed.data_ptr(), self._live(nn.functional.pad(bias, (0, -columns % 32)))
