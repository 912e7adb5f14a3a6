"""The decode plan in torch operations: the same parameters, about a third of the calls of the module path.

On a CPU the weights are packed for oneDNN (one copy, rebuilt by refresh, left out above PACK_LIMIT): a packed product
is 1.2 (bfloat16) to 2.2 times (float32) faster at the sizes of a decode step. On a GPU nothing is copied.
In float32 every operation is the one that training takes where there are no kernels (skyrl.kernels.exact_ops).
Rows of one adapter lie together; a product costs two more calls for each adapter of a step.

Legend: T tokens of a step (B when decoding), H heads, K key/value heads, C channels of a head, S keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skyrl.kernels import exact_ops
from skyrl.models.attention import Attention, AttentionOptions
from skyrl.models.decode_plan import DecodePlan
from skyrl.models.logprobs import matmul_float, sums_in_float32
from skyrl.models.lora import Adapter, Segment
from skyrl.sampler.runners.base import KVCache
from skyrl.sampler.runners.paged import PagedAttention, PagedRunner
from skyrl.tracking.advisories import warn_fallback

PACK_LIMIT = 2 << 30  # bytes of weights above which nothing is packed, for memory's sake


class FusedRunner(PagedRunner):
    """Runs a DecodePlan over the cache."""

    name = "fused"

    def __init__(self, plan: DecodePlan, cache: KVCache) -> None:
        super().__init__(cache)
        self._plan = plan
        linears = [linear for layer in plan.layers for linear in (*layer.qkv, layer.out, *layer.gate_up, layer.down)]
        weights = sum(linear.weight.nbytes for linear in (*linears, plan.head))
        on_cpu = cache.device.type == "cpu"
        pack = on_cpu and weights <= PACK_LIMIT and exact_ops.has_packed_product(cache.dtype)
        if on_cpu and not pack:
            reason = f"above {PACK_LIMIT >> 30} GiB" if weights > PACK_LIMIT else f"no oneDNN product of {cache.dtype}"
            warn_fallback(f"sampling without packed weights: {reason}")
        exact = pack and cache.dtype == torch.float32  # training's roundings: see exact_ops
        self._ops: type[_Ops] = _ExactOps if exact else _Ops
        self._adapters: dict[int, Adapter] = {}  # by id: those whose weights the linears hold
        self._qkv = [_Linear(plan, layer.qkv, pack, exact) for layer in plan.layers]
        self._out = [_Linear(plan, [layer.out], pack, exact) for layer in plan.layers]
        self._gate_up = [_Linear(plan, layer.gate_up, pack, exact) for layer in plan.layers]
        self._down = [_Linear(plan, [layer.down], pack, exact) for layer in plan.layers]
        self._head = _Linear(plan, [plan.head], pack and not plan.float_head, exact)
        # products in bfloat16 with a mask are faster than torch's attention for one query on a CPU, not in float32
        self._products = on_cpu and cache.dtype == torch.bfloat16
        self._qk_scale: list[Tensor | None] = []
        self.refresh()

    def refresh(self) -> None:
        """Packs the parameters as they are now."""
        for linear in self._linears():
            linear.refresh()
        scales = [_qk_scale(self._plan, layer.qk_norms) for layer in self._plan.layers]
        if not self._qk_scale:
            self._qk_scale = scales
        for kept, new in zip(self._qk_scale, scales, strict=True):
            if kept is not None and new is not None:
                kept.copy_(new)  # in place: a CUDA graph reads it there

    def adapter_changed(self, adapter: Adapter) -> None:
        """Takes over an adapter's weights as they are now, where those of before were kept."""
        if id(adapter) in self._adapters:
            for linear in self._linears():
                linear.take(adapter)

    def forget(self, adapter: Adapter) -> None:
        """Drops what is kept of an adapter."""
        if self._adapters.pop(id(adapter), None) is not None:
            for linear in self._linears():
                linear.forget(adapter)

    def _decoding(self, attention: PagedAttention) -> Attention:
        return _ProductAttention(attention, self._plan.kv_heads) if self._products else attention

    def hidden(
        self, tokens_T: Tensor, positions_T: Tensor, attention: Attention, segments: list[Segment] | None = None
    ) -> Tensor:
        """Final, normed hidden states [T, channels of the model]."""
        for _, _, adapter in segments or ():
            self._take(adapter)
        plan, ops = self._plan, self._ops
        heads, kv_heads, channels, eps = plan.heads, plan.kv_heads, plan.channels, plan.eps
        options = AttentionOptions(plan.scale)
        x_TC = plan.embedding(tokens_T)
        half = channels // 2
        cos_T1C = plan.cos_LC.index_select(0, positions_T).unsqueeze(1)
        sin_T1C = plan.sin_LC.index_select(0, positions_T).unsqueeze(1)
        sin_T1C = torch.cat([-sin_T1C[..., :half], sin_T1C[..., half:]], -1)
        for index, layer in enumerate(plan.layers):
            normed = ops.norm(x_TC, layer.input_norm.weight, eps)
            qkv = self._qkv[index](normed, segments).view(-1, heads + 2 * kv_heads, channels)
            qk = qkv[:, : heads + kv_heads]
            if (qk_scale := self._qk_scale[index]) is not None:
                qk = ops.norm(qk, None, eps) * qk_scale
            turned = torch.cat([qk[..., half:], qk[..., :half]], -1)
            qk = ops.rotate(qk * cos_T1C, turned, sin_T1C).transpose(0, 1)
            value = qkv[:, heads + kv_heads :].transpose(0, 1)
            seen = attention.attend(index, qk[:heads], qk[heads:], value, options)
            x_TC = x_TC + self._out[index](seen.view(-1, heads * channels), segments)
            normed = ops.norm(x_TC, layer.mlp_norm.weight, eps)
            gate, up = self._gate_up[index](normed, segments).chunk(2, -1)
            x_TC = x_TC + self._down[index](ops.silu(gate) * up, segments)
        return ops.norm(x_TC, plan.norm.weight, eps)

    def logits(self, hidden_TC: Tensor, segments: list[Segment] | None = None) -> Tensor:
        """Logits [T, V] float32."""
        if self._head.packed:
            return self._head(hidden_TC, segments).to(torch.promote_types(hidden_TC.dtype, torch.float32))
        rows_TC = hidden_TC.float() if self._plan.float_head and not sums_in_float32(hidden_TC) else hidden_TC
        logits_TV = matmul_float(rows_TC, self._plan.head.weight, self._plan.head.bias)
        return self._head.add(hidden_TC, logits_TV, segments)

    def _linears(self) -> list[_Linear]:
        return [*self._qkv, *self._out, *self._gate_up, *self._down, self._head]

    def _take(self, adapter: Adapter | None) -> None:
        """Lets the linears join an adapter's weights, at its first use."""
        if adapter is not None and id(adapter) not in self._adapters:
            self._plan.check(adapter)
            self._adapters[id(adapter)] = adapter  # kept alive, so that its id stays its own
            for linear in self._linears():
                linear.take(adapter)


class _Ops:
    """What lies between the products."""

    @staticmethod
    def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    @staticmethod
    def rotate(x: Tensor, turned: Tensor, sin: Tensor) -> Tensor:
        return torch.addcmul(x, turned, sin)

    silu = staticmethod(F.silu)


class _ExactOps(_Ops):
    """The same with training's roundings: of float32 on a CPU without kernels."""

    @staticmethod
    def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        out = x * exact_ops.inverse_norm(x, eps)
        return out if weight is None else out.mul_(weight)

    @staticmethod
    def rotate(x: Tensor, turned: Tensor, sin: Tensor) -> Tensor:
        return turned.mul_(sin).add_(x)

    silu = staticmethod(exact_ops.silu)


class _ProductAttention(Attention):
    """One query per sequence by batched products over gathered blocks; half the time of torch's attention there."""

    def __init__(self, paged: PagedAttention, kv_heads: int) -> None:
        self._paged, (self._group,) = paged, paged.groups
        self._mask: Tensor | None = None
        self._kv_heads = kv_heads

    def attend(
        self, layer: int, query_HTC: Tensor, key_KTC: Tensor, value_KTC: Tensor, options: AttentionOptions
    ) -> Tensor:
        """See skyrl.models.attention.Attention; without window and soft cap."""
        heads, count, channels = query_HTC.shape
        self._paged.write(layer, key_KTC.transpose(0, 1), value_KTC.transpose(0, 1))
        keys = self._group.gather(self._paged.cache.keys[layer]).flatten(0, 1)
        values = self._group.gather(self._paged.cache.values[layer]).flatten(0, 1)
        if self._mask is None:
            mask = self._group.mask(None, None, keys.shape[1], keys.dtype)[:, 0]
            self._mask = mask.repeat_interleave(self._kv_heads, 0)
        query = (query_HTC.transpose(0, 1) * options.scale).reshape(-1, heads // self._kv_heads, channels)
        weights = torch.baddbmm(self._mask, query, keys.transpose(1, 2)).softmax(-1)
        return torch.bmm(weights, values).view(count, heads, channels)


class _Linear:
    """One product for several nn.Linear that read the same input; packed, or live without a copy."""

    def __init__(self, plan: DecodePlan, parts: list[nn.Linear], pack: bool, exact: bool) -> None:
        self._plan, self._parts, self.packed, self._exact = plan, parts, pack, exact
        # by id of the adapter: (columns, A, B) of each part, packed, or of all of them, B block by block
        self._pairs: dict[int, list[tuple[slice, Any, Any]]] = {}
        self._weight: exact_ops.Packed | None = None
        self._bias: Tensor | None = None

    def refresh(self) -> None:
        """Packs the weights as they are now."""
        if not self.packed:
            return
        weights = [part.weight for part in self._parts]
        weight = weights[0].detach() if len(weights) == 1 else torch.cat(weights)
        self._weight = exact_ops.pack(weight)
        biases = [part.bias for part in self._parts]
        if any(bias is not None for bias in biases):
            zero = [part.weight.new_zeros(part.out_features) for part in self._parts]
            self._bias = torch.cat([z if b is None else b for b, z in zip(biases, zero, strict=True)])

    def take(self, adapter: Adapter) -> None:
        """Joins an adapter's weights for the parts, in the parts' numbers: [ranks, in] and [out, ranks]. The second
        time in place, for a CUDA graph reads them there."""
        pairs = self._plan.adapted(adapter, self._parts)
        if not any(pair is not None for pair in pairs):
            return
        like = self._parts[0].weight
        if self._exact:
            ends = np.cumsum([part.out_features for part in self._parts])
            self._pairs[id(adapter)] = [
                (
                    slice(end - part.out_features, end),
                    exact_ops.pack(pair[0].to(like)),
                    exact_ops.pack(pair[1].to(like)),
                )
                for end, part, pair in zip(ends, self._parts, pairs, strict=True)
                if pair is not None
            ]
            return
        zeros = [(like.new_zeros(0, p.in_features), like.new_zeros(p.out_features, 0)) for p in self._parts]
        filled = [zero if pair is None else pair for pair, zero in zip(pairs, zeros, strict=True)]
        downs, ups = ([tensor.detach().to(like) for tensor in side] for side in zip(*filled, strict=True))
        joined = torch.cat(downs).t(), torch.block_diag(*ups).t()
        if id(adapter) in self._pairs:
            ((_, *kept),) = self._pairs[id(adapter)]
            for old, new in zip(kept, joined, strict=True):
                old.copy_(new)
            return
        self._pairs[id(adapter)] = [(slice(None), *joined)]

    def forget(self, adapter: Adapter) -> None:
        """Drops what `take` joined."""
        self._pairs.pop(id(adapter), None)

    def add(self, x: Tensor, y: Tensor, segments: list[Segment] | None) -> Tensor:
        """y, with scale * x A^T B^T added in place to the rows of each adapter."""
        for start, stop, adapter in segments or ():
            if adapter is None:
                continue
            for columns, down, up in self._pairs.get(id(adapter), ()):
                rows = x[start:stop]
                if self._exact:
                    low = exact_ops.packed_product(rows, down) * adapter.scale
                    y[start:stop, columns] += exact_ops.packed_product(low, up)
                elif up.dtype == y.dtype:
                    y[start:stop].addmm_(rows @ down, up, alpha=adapter.scale)
                else:  # float32 logits of a model in bfloat16
                    y[start:stop] += adapter.scale * (rows @ down @ up)
        return y

    def __call__(self, x: Tensor, segments: list[Segment] | None) -> Tensor:
        if self.packed:
            assert self._weight is not None
            y = exact_ops.packed_product(x, self._weight, self._bias)
        else:
            outputs = [F.linear(x, part.weight, part.bias) for part in self._parts]
            y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return self.add(x, y, segments)


def _qk_scale(plan: DecodePlan, norms: tuple[Any, Any] | None) -> Tensor | None:
    """Weights of the query and key norms, one row per head."""
    if norms is None:
        return None
    query, key = (norm.weight.detach() for norm in norms)
    return torch.cat([query.expand(plan.heads, -1), key.expand(plan.kv_heads, -1)])
