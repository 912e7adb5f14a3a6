"""Attention over rows that lie end to end (training), and the collation of rows into a Microbatch.

Letters: H heads, K key/value heads, G = H / K, T packed tokens, L length of one row, B rows of a bucket, C channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from skyrl.algorithms.prefixes import shared_prefixes
from skyrl.algorithms.truncation import packed_support
from skyrl.kernels import exact_ops
from skyrl.models.attention import Attention, AttentionOptions
from skyrl.models.linear_attention import CHUNK, DeltaRule
from skyrl.planner.device import VARLEN_RELEASE, torch_release
from skyrl.tracking.advisories import warn_fallback
from skyrl.types import ROW_FIELDS, Datum, Microbatch, UserError

# Above this many scores of all buckets together (B x H x L x L) the fused kernel is used, which keeps none of them; on
# a GPU, and where they are capped, above KEEP_SCORES, which the memory plan counts. No more exist at once.
MAX_SCORES = 1 << 26
# Rows shorter than this part of the longest row of their bucket open a bucket of their own.
BUCKET_RATIO = 0.75

INTEGER_FIELDS = ("tokens_T", "targets_T", "positions_T", "row_T")
ALIGNMENT = 64  # bytes between which the arrays of one copy lie
FILLED_FIELDS = ("clip_low", "clip_high", "ratio_mask")  # a row may lack them where others have them
# Stands in where a rank has no row and a sharded forward pass needs one: a token of weight 0.
PADDING_ROW = Datum(
    tokens=np.zeros(1, np.int64), targets=np.zeros(1, np.int64), weights=np.zeros(1, np.float32), name="padding"
)


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """Numbers of log-probabilities and losses for a model in `dtype`: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def collate(
    rows: list[Datum],
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    fill: Mapping[str, float] | None = None,
    share: bool = False,
) -> Microbatch:
    """Rows packed end to end in the order given; positions restart at 0 in each.

    `dtype` is that of the float fields (see loss_dtype). An optional field is there when any row has it. Rows without
    clip bounds among rows with them get those of `fill` (else 0), rows without a ratio mask their trained tokens.
    `share`: with indices of the beginnings that rows have in common, where they are worth it (algorithms.prefixes).
    Targets and weights are [T, K], with the largest K, when any row has several targets.
    Raises: UserError naming the first row that lacks another field which other rows have; ValueError without rows.
    """
    if not rows:
        raise ValueError("a microbatch needs at least one row")
    lengths = np.array([len(row.tokens) for row in rows], dtype=np.int64)
    starts = np.cumsum([0, *lengths], dtype=np.int32)

    floats = np.float64 if dtype == torch.float64 else np.float32
    fields = {
        "tokens_T": [row.tokens for row in rows],
        "targets_T": _widened([row.targets for row in rows]),
        "positions_T": [np.arange(n) for n in lengths],
        "row_T": [np.repeat(np.arange(len(rows)), lengths)],
        "weights_T": _widened([row.weights for row in rows]),
        **{f"{key}_T": arrays for key in ROW_FIELDS[2:] if (arrays := _optional(rows, key, fill or {})) is not None},
    }
    with np.errstate(over="ignore"):  # what is too large for float32 becomes inf, which the loss finds
        packed = {
            name: np.concatenate(arrays).astype(np.int64 if name in INTEGER_FIELDS else floats, copy=False)
            for name, arrays in fields.items()
        }
    packed |= packed_support(rows)
    if any(row.experts is not None for row in rows):
        shape = next(row.experts.shape[1:] for row in rows if row.experts is not None)
        free = (np.full((len(row.tokens), *shape), -1) if row.experts is None else row.experts for row in rows)
        packed["experts_TLK"] = np.concatenate([one.astype(np.int16) for one in free])
    if share:
        packed |= shared_prefixes(rows)
    moved = move({**packed, "starts_S1": starts}, torch.device(device))
    return Microbatch(**moved, lengths=tuple(lengths.tolist()))


def move(arrays: dict[Any, np.ndarray], device: torch.device) -> dict[Any, Tensor]:
    """Tensors on the device; on a CPU they are the arrays themselves. The host does not wait for a GPU."""
    if device.type == "cuda":
        return move_together(arrays, device)
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def move_all(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """`move` of arrays without names."""
    return list(move(dict(enumerate(arrays)), device).values())


def to_device(values: Any, device: torch.device, dtype: Any = None) -> Tensor:
    """`move` of one array, or of what numpy makes an array of."""
    return move_all(device, np.ascontiguousarray(values, dtype))[0]


def move_together(arrays: dict[Any, np.ndarray], device: torch.device) -> dict[Any, Tensor]:
    """The same by one copy out of pinned memory that the host does not wait for: a micro-batch has a dozen arrays, each
    of which would hold up the host until the GPU has done what was queued before."""
    ends = np.cumsum([-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays.values()])
    whole = np.empty(int(ends[-1]), dtype=np.uint8)
    starts = [0, *ends[:-1].tolist()]
    for start, array in zip(starts, arrays.values(), strict=True):
        whole[start : start + array.nbytes] = np.frombuffer(array.tobytes(), dtype=np.uint8)
    host = torch.from_numpy(whole)
    moved = (host.pin_memory() if torch.cuda.is_available() else host).to(device, non_blocking=True)
    return {
        name: moved[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for start, (name, array) in zip(starts, arrays.items(), strict=True)
    }


def _optional(rows: list[Datum], key: str, fill: Mapping[str, float]) -> list[Any] | None:
    """The field `key` of each row; None when no row has it."""
    arrays = [getattr(row, key) for row in rows]
    if all(array is None for array in arrays):
        return None
    for i, row in enumerate(rows):
        if arrays[i] is not None:
            continue
        if key == "ratio_mask":
            trained = row.weights != 0
            arrays[i] = (trained.any(1) if trained.ndim == 2 else trained).astype(np.float64)
        elif key in FILLED_FIELDS:
            arrays[i] = np.full(len(row.tokens), fill.get(key, 0.0))
        else:
            raise UserError(f"row {row.name or i}: no {key}, which other rows of the batch have; give all or none")
    return arrays


def _widened(arrays: list[Any]) -> list[Any]:
    """All [L], or all [L, K] with zeros where a row has fewer columns."""
    if all(array.ndim == 1 for array in arrays):
        return arrays
    arrays = [array if array.ndim == 2 else array[:, None] for array in arrays]
    width = max(array.shape[1] for array in arrays)
    return [np.pad(array, ((0, 0), (0, width - array.shape[1]))) for array in arrays]


def banned(length: int, window: int | None, device: torch.device, chunk: int | None = None) -> Tensor:
    """True [L, L] where query i must not see key j: j after i, not among the `window` tokens up to i, or in another
    piece of `chunk` tokens."""
    place = torch.arange(length, device=device)
    behind = place[:, None] - place[None, :]
    out = behind < 0 if window is None else (behind < 0) | (behind >= window)
    return out if chunk is None else out | (place[:, None] // chunk != place[None, :] // chunk)


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """softmax over the last dimension; `sinks`, one score more for each row [..., 1], takes its part of the weight."""
    if sinks is None:
        return torch.softmax(scores, -1, dtype=dtype)
    sinks = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, sinks], -1), -1, dtype=dtype)[..., :-1]


def varlen_refusal(query_HTC: Tensor, value_KTC: Tensor, softcap: float | None, sinks_H: Tensor | None) -> str:
    """Why torch's variable-length attention does not take these on CUDA; "" when it does."""
    channels = query_HTC.shape[-1]
    if query_HTC.dtype not in (torch.bfloat16, torch.float16):
        return f"{str(query_HTC.dtype).removeprefix('torch.')} (it takes bfloat16 and float16)"
    if softcap or sinks_H is not None:
        return "the model caps its scores" if softcap else "the model has attention sinks"
    if torch_release() < VARLEN_RELEASE:
        return f"torch {torch.__version__} has none of the form that is needed (2.11 and newer do)"
    if channels > 256 or channels % 8 or value_KTC.shape[-1] != channels:
        return f"heads of {channels} and {value_KTC.shape[-1]} channels (it takes equal multiples of 8 up to 256)"
    return ""  # an older GPU computes in float32: planner.device refuses bfloat16 there


@cache
def varlen() -> tuple[Callable[..., Any], frozenset[str]]:
    """torch's variable-length attention and the names of its arguments: grouped heads and paged keys came with 2.13.
    Its module imports half of torch's compiler, 1.5 s of a process that may never use it."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


class _Gather(torch.autograd.Function):
    """x_NC[index_M]; every row of x appears at most once outside padding, so the gradient is again a gather or a copy.

    `back_N`: where each row of x went. None when some rows of x are padding: their gradient is 0.
    """

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, index_M: Tensor, back_N: Tensor | None) -> Tensor:
        ctx.index_M, ctx.back_N, ctx.rows = index_M, back_N, x_NC.shape[0]
        return x_NC.index_select(0, index_M)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_MC = grads[0]
        if ctx.back_N is not None:
            return grad_MC.index_select(0, ctx.back_N), None, None
        out_NC = grad_MC.new_zeros((ctx.rows, grad_MC.shape[1]))
        return out_NC.index_copy_(0, ctx.index_M, grad_MC), None, None


class _Spread(torch.autograd.Function):
    """x_NC[index_M], where a row of x may be taken many times. Its gradient is summed in float32 for half precision,
    which torch's own rounds each time, and by a kernel on a CPU that has kernels."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, index_M: Tensor) -> Tensor:
        ctx.index_M, ctx.shape = index_M, x_NC.shape
        return x_NC.index_select(0, index_M)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_M,), index_M = grads, ctx.index_M
        if (summed := exact_ops.sum_rows(grad_M, index_M, ctx.shape[0])) is not None:
            return summed, None
        out_N = torch.zeros(ctx.shape, dtype=loss_dtype(grad_M.dtype), device=grad_M.device)
        # in a fixed order, unlike index_add_ on CUDA
        return out_N.index_put_((index_M,), grad_M.to(out_N.dtype), accumulate=True).to(grad_M.dtype), None


def spread(x_NC: Tensor, index_M: Tensor) -> Tensor:
    """x[index], [M, ...], whose gradient is quick and exact where rows are taken many times."""
    return _Spread.apply(x_NC, index_M)


class SharedAttention:
    """`inner` for layers that see each beginning once (algorithms.prefixes): it runs over whole rows, and of equal
    results one is taken."""

    def __init__(self, inner: Attention, mb: Microbatch) -> None:
        assert mb.place_T is not None and mb.distinct_U is not None
        self.inner, self.place_T, self.distinct_U = inner, mb.place_T, mb.distinct_U

    def attend(
        self, layer: int, query_HUC: Tensor, key_KUC: Tensor, value_KUC: Tensor, options: AttentionOptions
    ) -> Tensor:
        given = (query_HUC, key_KUC, value_KUC)
        query, key, value = (spread(x.transpose(0, 1), self.place_T).transpose(0, 1) for x in given)
        return spread(self.inner.attend(layer, query, key, value, options), self.distinct_U)

    def recur(self, layer: int, rule: DeltaRule, *given: Tensor) -> Tensor:
        return spread(self.inner.recur(layer, rule, *(spread(x, self.place_T) for x in given)), self.distinct_U)


@dataclass
class _Layout:
    """For one number of heads: `out_N` takes packed rows [T * heads] into the buckets [B, heads, L], `back` returns."""

    out_N: Tensor
    back: Tensor


class PackedAttention:
    """Causal attention inside each packed row; exact and differentiable.

    Which way is taken where: docs/models.md. In buckets scores are computed with batched matrix products, because on a
    CPU the fused kernel's bfloat16 backward is about ten times slower (and equal in float32), unless they would take
    too much memory: then by the fused kernel, or in blocks of queries where that cannot do it.
    """

    def __init__(self, starts_S1: Tensor, lengths: Sequence[int]) -> None:
        self.starts_S1, self._lengths, self.device = starts_S1, lengths, starts_S1.device
        self.max_length, self._starts = max(lengths), list(accumulate(lengths, initial=0))
        self._layouts: dict[int, _Layout] = {}
        self._bias: dict[tuple[int, int, int | None, torch.dtype], Tensor] = {}
        self._bucket_list: list[list[int]] | None = None
        self._pieces: dict[int, PackedAttention] = {}

    # Buckets: rows sorted by length, longest first; each bucket is padded to its longest row.

    def _buckets(self) -> list[list[int]]:
        if self._bucket_list is None:
            self._bucket_list = []
            for row in sorted(range(len(self._lengths)), key=lambda s: -self._lengths[s]):
                if self._bucket_list:
                    longest = self._lengths[self._bucket_list[-1][0]]
                    if self._lengths[row] >= BUCKET_RATIO * longest or longest <= 16:
                        self._bucket_list[-1].append(row)
                        continue
                self._bucket_list.append([row])
        return self._bucket_list

    def _shapes(self) -> list[tuple[int, int]]:
        return [(len(rows), self._lengths[rows[0]]) for rows in self._buckets()]

    def _layout(self, heads: int) -> _Layout:
        if heads not in self._layouts:
            out, back, base = [], np.zeros((self._starts[-1], heads), dtype=np.int64), 0
            for rows in self._buckets():
                longest = self._lengths[rows[0]]
                first, length = (np.array([x[s] for s in rows]) for x in (self._starts, self._lengths))
                real_BL = np.arange(longest)[None, :] < length[:, None]
                # Padding repeats the row's first token: finite, never seen by a real query, dropped on the way back.
                token_BL = first[:, None] + np.where(real_BL, np.arange(longest)[None, :], 0)
                source_BHL = token_BL[:, None, :] * heads + np.arange(heads)[None, :, None]
                place_BHL = base + np.arange(source_BHL.size).reshape(source_BHL.shape)
                back[token_BL[real_BL]] = place_BHL.transpose(0, 2, 1)[real_BL]
                out.append(source_BHL.reshape(-1))
                base += source_BHL.size
            self._layouts[heads] = _Layout(*move_all(self.device, np.concatenate(out), back.reshape(-1)))
        return self._layouts[heads]

    def attend(
        self, layer: int, query_HTC: Tensor, key_KTC: Tensor, value_KTC: Tensor, options: AttentionOptions
    ) -> Tensor:
        if options.chunk is not None and options.chunk < self.max_length:  # pieces of a row are rows
            pieces = self._in_pieces(options.chunk)
            return pieces.attend(layer, query_HTC, key_KTC, value_KTC, replace(options, chunk=None))
        options = _within_rows(options, self.max_length)
        if query_HTC.is_cuda:
            refusal = varlen_refusal(query_HTC, value_KTC, options.softcap, options.sinks_H)
            if not refusal:
                return self._varlen(query_HTC, key_KTC, value_KTC, options.scale, options.window)
            warn_fallback(f"training attends without FlashAttention: {refusal}")
        return self._bucketed(query_HTC, key_KTC, value_KTC, options)

    def _in_pieces(self, chunk: int) -> PackedAttention:
        """The same tokens with every row cut into pieces of `chunk` tokens."""
        if chunk not in self._pieces:
            lengths = [min(chunk, length - at) for length in self._lengths for at in range(0, length, chunk)]
            starts = to_device([0, *accumulate(lengths)], self.device, np.int32)
            self._pieces[chunk] = PackedAttention(starts, lengths)
        return self._pieces[chunk]

    def _varlen(
        self, query_HTC: Tensor, key_KTC: Tensor, value_KTC: Tensor, scale: float, window: int | None
    ) -> Tensor:
        query, key, value = (x.transpose(0, 1).contiguous() for x in (query_HTC, key_KTC, value_KTC))
        attend, names = varlen()
        if query.shape[1] != key.shape[1]:
            if "enable_gqa" in names:
                attend = partial(attend, enable_gqa=True)
            else:
                key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        starts, longest = self.starts_S1, self.max_length
        seen = (-1 if window is None else window - 1, 0)  # left and right of the token itself
        return attend(query, key, value, starts, starts, longest, longest, scale=scale, window_size=seen)

    def _bucketed(self, query_HTC: Tensor, key_KTC: Tensor, value_KTC: Tensor, options: AttentionOptions) -> Tensor:
        heads, tokens, _ = query_HTC.shape
        kv_heads = key_KTC.shape[0]

        def spread(x_HTC: Tensor) -> Tensor:
            layout = self._layout(x_HTC.shape[0])
            flat = x_HTC.transpose(0, 1).reshape(-1, x_HTC.shape[-1])
            return _Gather.apply(flat, layout.out_N, layout.back)

        query, key, value = spread(query_HTC), spread(key_KTC), spread(value_KTC)
        shapes = self._shapes()
        sizes = [rows * longest for rows, longest in shapes]
        parts = zip(
            shapes,
            query.split([n * heads for n in sizes]),
            key.split([n * kv_heads for n in sizes]),
            value.split([n * kv_heads for n in sizes]),
            strict=True,
        )
        scores = sum(rows * heads * longest**2 for rows, longest in shapes)
        kept = MAX_SCORES if options.is_plain and not query.is_cuda else exact_ops.KEEP_SCORES
        outs, keep = [], scores <= kept
        for (rows, longest), q, k, v in parts:
            q = q.view(rows, kv_heads, heads // kv_heads, longest, -1)
            k, v = k.view(rows, kv_heads, longest, -1), v.view(rows, kv_heads, longest, -1)
            own = _within_rows(options, longest)
            sampled = own.window is None and own.is_plain  # as the sampler's kernels attend
            if sampled and exact_ops.kernel_can_attend(q, q.shape[2], longest, q.shape[-1], v.shape[-1]):
                q, k, v = (x.reshape(rows * kv_heads, -1, x.shape[-1]) for x in (q, k, v))
                out = exact_ops.attend_causal(q, k, v, own.scale)
            elif keep:
                out = self._products(q, k, v, own)
            elif not own.is_plain or (q.is_cuda and q.dtype == torch.float64):  # for which a GPU's fused kernel is none
                out = self._in_blocks(q, k, v, own)
            else:
                out = self._fused(q, k, v, own.scale, own.window)
            outs.append(out.reshape(rows * heads * longest, -1))
        packed = outs[0] if len(outs) == 1 else torch.cat(outs)
        padded = packed.shape[0] != tokens * heads
        layout = self._layout(heads)
        out = _Gather.apply(packed, layout.back, None if padded else layout.out_N)
        return out.view(tokens, heads, -1)

    def _products(self, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """q [B, K, G, L, C], k and v [B, K, L, C] -> [B, K, G, L, C], by two batched products and a softmax."""
        rows, kv_heads, group, longest, channels = q.shape
        scale, softcap = options.scale, options.softcap
        q = q.reshape(rows * kv_heads, group * longest, channels)
        k, v = (x.reshape(rows * kv_heads, longest, -1) for x in (k, v))
        if options.is_plain and options.window is None and exact_ops.is_ready(q, k):
            weights = exact_ops.causal_softmax(torch.bmm(q, k.transpose(1, 2)), scale)
            return torch.bmm(weights, v).view(rows, kv_heads, group, longest, -1)
        bias = self._causal_bias(group, longest, options.window, q.dtype)
        if exact_ops.is_float32_cpu(q) and options.is_plain:
            return exact_ops.attend(q, k, v, bias, scale).view(rows, kv_heads, group, longest, -1)
        bias, k = bias.expand(rows * kv_heads, -1, -1), k.transpose(1, 2)
        scores = torch.bmm(q, k) * scale if softcap else torch.baddbmm(bias, q, k, alpha=scale)
        scores = torch.tanh(scores / softcap) * softcap + bias if softcap else scores
        weights = softmax_with_sinks(scores, _sinks_of(options.sinks_H, rows, kv_heads, longest))
        return torch.bmm(weights, v).view(rows, kv_heads, group, longest, -1)

    def _in_blocks(self, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """The same a block of queries at a time; the backward pass computes each block's scores again."""
        window, softcap = options.window, options.softcap
        rows, kv_heads, group, longest, _ = q.shape
        k, v = k.reshape(rows * kv_heads, longest, -1), v.reshape(rows * kv_heads, longest, -1)
        # scores, capped, weights and a gradient exist together
        step = max(1, MAX_SCORES // 4 // (rows * kv_heads * group * longest))

        def block(q: Tensor, k: Tensor, v: Tensor, first: int, low: int) -> Tensor:
            count = q.shape[3]
            queries = torch.arange(first, first + count, device=q.device).unsqueeze(1)
            behind = queries - torch.arange(low, low + k.shape[1], device=q.device)
            unseen = behind < 0 if window is None else (behind < 0) | (behind >= window)
            scores = torch.bmm(q.reshape(rows * kv_heads, group * count, -1), k.transpose(1, 2)) * options.scale
            scores = torch.tanh(scores / softcap) * softcap if softcap else scores
            scores = scores.masked_fill(unseen.repeat(group, 1), float("-inf"))
            weights = softmax_with_sinks(scores, _sinks_of(options.sinks_H, rows, kv_heads, count))
            return torch.bmm(weights, v).view(rows, kv_heads, group, count, -1)

        outs = []
        for first in range(0, longest, step):
            last, low = min(longest, first + step), 0 if window is None else max(0, first - window + 1)
            given = q[..., first:last, :], k[:, low:last], v[:, low:last], first, low
            outs.append(checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 3)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """The same by scaled_dot_product_attention, which never holds all scores."""
        rows, kv_heads, group, longest, channels = q.shape
        q = q.reshape(rows * kv_heads, group, longest, channels)
        k, v = (x.reshape(rows * kv_heads, 1, longest, -1).expand(-1, group, -1, -1) for x in (k, v))
        mask = None if window is None else ~banned(longest, window, q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
        return out.view(rows, kv_heads, group, longest, -1)

    def recur(self, layer: int, rule: DeltaRule, mixed_TC: Tensor, decay_TH: Tensor, beta_TH: Tensor) -> Tensor:
        """Every row begins with no state. The backward pass computes the rule again, so only its inputs are kept."""
        layout, outs = self._layout(1), []
        flat = torch.cat([decay_TH, beta_TH], 1)
        sizes = [rows * longest for rows, longest in self._shapes()]
        parts = zip(*(_Gather.apply(x, layout.out_N, layout.back).split(sizes) for x in (mixed_TC, flat)), strict=True)
        for (rows, longest), (mixed, gates) in zip(self._shapes(), parts, strict=True):
            step = max(1, MAX_SCORES // 16 // (longest * rule.shape.num_heads * CHUNK))
            mixed, gates = mixed.view(rows, longest, -1), gates.view(rows, longest, -1)
            for some, gate in zip(mixed.split(step), gates.split(step), strict=True):
                given = rule, some, *gate.split([decay_TH.shape[1], beta_TH.shape[1]], -1)
                out = checkpoint(
                    lambda rule, *x: rule.run(*x)[0], *given, use_reentrant=False, preserve_rng_state=False
                )
                outs.append(out.flatten(0, 1))
        packed = (outs[0] if len(outs) == 1 else torch.cat(outs)).flatten(1)
        out = _Gather.apply(packed, layout.back, None if len(packed) != len(mixed_TC) else layout.out_N)
        return out.unflatten(1, (rule.shape.num_heads, -1))

    def _causal_bias(self, group: int, longest: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """0 or -inf, [G * L, L]; every query sees at least itself, so no row of a softmax is empty."""
        place = (group, longest, window, dtype)
        if place not in self._bias:
            bias = torch.zeros(longest, longest, dtype=dtype, device=self.device)
            self._bias[place] = bias.masked_fill_(banned(longest, window, self.device), float("-inf")).repeat(group, 1)
        return self._bias[place]


def _within_rows(options: AttentionOptions, longest: int) -> AttentionOptions:
    """The same for rows of at most `longest` tokens, where a window as long as they are is none."""
    beyond = options.window is not None and options.window >= longest
    return replace(options, window=None) if beyond else options


def _sinks_of(sinks_H: Tensor | None, rows: int, kv_heads: int, queries: int) -> Tensor | None:
    """The sinks beside scores [rows * K, G * queries, L], [rows * K, G * queries, 1]."""
    if sinks_H is None:
        return None
    return sinks_H.view(1, kv_heads, -1, 1).expand(rows, -1, -1, queries).reshape(rows * kv_heads, -1, 1)


class PaddedAttention:
    """One padded row per sequence, [S * L] tokens in all: plain masked softmax, the slow path to compare with."""

    def __init__(self, num_rows: int, length: int) -> None:
        self.num_rows, self.length = num_rows, length

    def attend(
        self, layer: int, query_HTC: Tensor, key_KTC: Tensor, value_KTC: Tensor, options: AttentionOptions
    ) -> Tensor:
        group = query_HTC.shape[0] // key_KTC.shape[0]

        def rows(x_HTC: Tensor) -> Tensor:
            return x_HTC.unflatten(1, (self.num_rows, self.length)).transpose(0, 1)

        query, key, value = rows(query_HTC), rows(key_KTC), rows(value_KTC)
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        if exact_ops.is_float32_cpu(query):  # as exact as what it is compared with
            query, key, value = query.double(), key.double(), value.double()
        scores = query @ key.transpose(-1, -2) * options.scale
        if options.softcap:
            scores = torch.tanh(scores / options.softcap) * options.softcap
        unseen = banned(self.length, options.window, scores.device, options.chunk)
        scores = scores.masked_fill(unseen, float("-inf"))
        sinks = None if options.sinks_H is None else options.sinks_H[:, None, None]
        out = softmax_with_sinks(scores, sinks, loss_dtype(scores.dtype)).to(value.dtype) @ value
        return out.to(query_HTC.dtype).permute(0, 2, 1, 3).flatten(0, 1)

    def recur(self, layer: int, rule: DeltaRule, mixed_TC: Tensor, decay_TH: Tensor, beta_TH: Tensor) -> Tensor:
        """A token at a time."""
        mixed, decay, beta = (x.unflatten(0, (self.num_rows, self.length)) for x in (mixed_TC, decay_TH, beta_TH))
        return rule.run(mixed, decay, beta, chunk=1)[0].flatten(0, 1)
