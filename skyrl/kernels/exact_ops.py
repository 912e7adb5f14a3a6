"""Float32 on a CPU, rounded as the sampler rounds.

Two correct float32 computations of one log-probability differ by up to 2e-5 (docs/LOG.md). So where there are kernels
(skyrl.kernels), training computes products, norms, activations and attention with the very code that samples. A token's
result then does not depend on the rows beside it, and a model with a decode plan gives the sampler's bits.

Without kernels both sides take oneDNN's packed product, in which a row's result does not depend on those beside it
either (the plain product's does), and compute what lies between in float64, or in operations that round once.

Where there is neither, sums are taken in blocks: a sum of n products in one accumulator is off by about sqrt(n)
roundings, in blocks by a few. Other dtypes and devices are left as they are, but for what torch would make several
passes over in bfloat16: norms, gates and rotary embeddings (`_HalfNorm`, `_HalfGate`, `_HalfRotation`).

Letters: N rows, K inner, V columns; for attention N matrices, M queries, L keys, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skyrl import kernels
from skyrl.kernels import KEEP_SCORES

BLOCK = 32  # products summed in one accumulator: 32 halves the error of a K of 256
CHUNK_SCORES = 1 << 19  # float64 scores of attention that exist at once, 4 MiB: stays in the cache
PACK_ROWS = 32  # oneDNN packs weights for a number of rows; other numbers work as well


def is_float32_cpu(x: Tensor) -> bool:
    """Whether x is of the kind that is handled here: float32 on a CPU."""
    return x.dtype == torch.float32 and x.device.type == "cpu"


def is_bfloat16_cpu(x: Tensor) -> bool:
    """Whether x is bfloat16 on a CPU, which kernels take for some operations."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


def uses_kernels(*tensors: Tensor) -> bool:
    """Whether what is computed from these is computed by the sampler's kernels: float32 on a CPU that has kernels."""
    return all(map(is_float32_cpu, tensors)) and kernels.library()[0] is not None


def uses_onednn(*tensors: Tensor) -> bool:
    """Whether it is computed by oneDNN's packed product, and in float64 between: no kernels, and torch has it."""
    return all(map(is_float32_cpu, tensors)) and kernels.library()[0] is None and has_packed_product(torch.float32)


def matches_sampler(*tensors: Tensor) -> bool:
    """Whether what is computed from these has the sampler's bits, or all but a few of them: one of the two."""
    return uses_kernels(*tensors) or uses_onednn(*tensors)


@cache
def has_packed_product(dtype: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN's packed product for these numbers."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Packed(NamedTuple):
    """A weight in oneDNN's order, of at least two columns of results, and how many of these are wanted."""

    weight: Tensor
    columns: int


def pack(weight_VK: Tensor) -> Packed:
    """A copy of a weight for `packed_product`."""
    weight_VK = weight_VK.detach()
    columns = len(weight_VK)
    if columns == 1:
        weight_VK = weight_VK.expand(2, -1)
    return Packed(torch.ops.mkldnn._reorder_linear_weight(weight_VK.contiguous(), PACK_ROWS), columns)


def packed_product(x_NK: Tensor, packed: Packed, bias_V: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, [N, V]. Each number depends on its row of x, its column of the weight and its bias alone;
    so one row is computed as two, and one column as well: oneDNN sums a vector's product in another order."""
    rows = len(x_NK)
    if rows == 1:
        x_NK = x_NK.expand(2, -1).contiguous()
    if bias_V is not None:  # whose strides oneDNN does not look at
        bias_V = bias_V.expand(max(2, packed.columns)).contiguous()
    out_NV = torch.ops.mkldnn._linear_pointwise(x_NK, packed.weight, bias_V, "none", [], "")
    if rows > 1 and packed.columns > 1:
        return out_NV
    return out_NV[:rows, : packed.columns].contiguous()


def product(x_NK: Tensor, weight_VK: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, [N, V], by kernels, oneDNN or sums of BLOCK products. Has no gradient; `linear` does."""
    if kernels.library()[0] is not None:
        return _product(x_NK, weight_VK, bias_V, weight_VK.shape[0], turned=False)
    if x_NK.numel() and has_packed_product(torch.float32):
        return packed_product(x_NK.detach(), pack(weight_VK), None if bias_V is None else bias_V.detach())
    out_NV = torch.mm(x_NK[:, :BLOCK], weight_VK[:, :BLOCK].t())
    for at in range(BLOCK, x_NK.shape[1], BLOCK):
        out_NV.addmm_(x_NK[:, at : at + BLOCK], weight_VK[:, at : at + BLOCK].t())
    return out_NV if bias_V is None else out_NV.add_(bias_V)


def matmul(a_NK: Tensor, b_KV: Tensor) -> Tensor:
    """a @ b, [N, V], as `product` where it is exact; torch.mm elsewhere. Has no gradient."""
    if uses_kernels(a_NK, b_KV):
        return _product(a_NK, b_KV, None, b_KV.shape[1], turned=True)
    if a_NK.numel() and uses_onednn(a_NK, b_KV):
        return packed_product(a_NK.detach(), pack(b_KV.t()))
    return a_NK @ b_KV


def sum_of_outer(a_NV: Tensor, b_NK: Tensor) -> Tensor:
    """a.T @ b, [V, K], a sum over all tokens: by kernels, else by torch.mm, for oneDNN would take one accumulator for
    all of them, and is not faster once a and b are transposed for it. Has no gradient."""
    if uses_kernels(a_NV, b_NK):
        return _product(a_NV.t(), b_NK, None, b_NK.shape[1], turned=True)
    return a_NV.t() @ b_NK


def _product(x_NK: Tensor, weight: Tensor, bias_V: Tensor | None, columns: int, *, turned: bool) -> Tensor:
    x_NK, weight = x_NK.detach().contiguous(), weight.detach().contiguous()
    bias_V = None if bias_V is None else bias_V.detach().contiguous()
    (rows, inner), panels = x_NK.shape, -(-columns // kernels.PANEL)
    out_NV, room = x_NK.new_empty(rows, columns), x_NK.new_empty(panels * kernels.PANEL * inner)
    if not inner or not columns:
        return out_NV.zero_() if bias_V is None else out_NV.copy_(bias_V.expand_as(out_NV))
    run("skyrl_product", x_NK, rows, inner, weight, turned, bias_V, out_NV, columns, room)
    return out_NV


def sum_rows(x_M: Tensor, index_M: Tensor, rows: int) -> Tensor | None:
    """[rows, ...]: the sum of those x_M whose index is the row's, in float32 and in their order. None where no kernel
    can: of bfloat16 or float32 on a CPU that has kernels, the last dimension's numbers side by side."""
    kind = x_M.device.type == "cpu" and x_M.dtype in (torch.float32, torch.bfloat16) and x_M.ndim in (2, 3)
    if not kind or x_M.stride(-1) != 1 or kernels.library()[0] is None:
        return None
    out = x_M.new_empty(rows, *x_M.shape[1:])
    parts, part_stride = (1, 0) if x_M.ndim == 2 else (x_M.shape[1], x_M.stride(1))
    shape = len(x_M), parts, x_M.shape[-1], x_M.stride(0), part_stride
    run("skyrl_sum_rows", x_M.dtype == torch.bfloat16, x_M, *shape, index_M.contiguous(), out, rows)
    return out


def run(name: str, *args: Any) -> None:
    """Calls a kernel on tensors, contiguous but where it is told strides (None: a null pointer), and numbers, with
    torch's number of threads."""
    pointers = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
    getattr(kernels.library()[0], name)(*pointers, torch.get_num_threads())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, weight_VK: Tensor, bias_V: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_NK, weight_VK)
        return product(x_NK, weight_VK, bias_V)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_NK, weight_VK), grad_NV = ctx.saved_tensors, grads[0]
        want_x, want_weight, want_bias = ctx.needs_input_grad
        return (
            matmul(grad_NV, weight_VK) if want_x else None,
            sum_of_outer(grad_NV, x_NK) if want_weight else None,
            grad_NV.sum(0) if want_bias else None,
        )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As torch.nn.functional.linear; `product` where `is_float32_cpu`, with gradients by `matmul`. What torch would
    refuse or broadcast is left to it, since a kernel sees no shapes."""
    given = (input, weight) if bias is None else (input, weight, bias)
    fits = weight.ndim == 2 and weight.shape[1:] == input.shape[-1:]
    fits = fits and (bias is None or bias.shape == weight.shape[:1])
    if not (fits and input.numel() and weight.numel() and all(map(is_float32_cpu, given))):
        return _PLAIN_LINEAR(input, weight, bias)
    # the shape is given outside: what a function of autograd returns as a view must not be added to in place
    return _Linear.apply(input.reshape(-1, input.shape[-1]), weight, bias).view(*input.shape[:-1], -1)


def _attention_gradients(
    q_NMC: Tensor, k_NLC: Tensor, v_NLC: Tensor, p_NML: Tensor, scale: float, grad_NMC: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries, keys and values, with weights p."""
    dv_NLC = torch.bmm(p_NML.transpose(1, 2), grad_NMC)
    dp_NML = torch.bmm(grad_NMC, v_NLC.transpose(1, 2))
    ds_NML = torch._softmax_backward_data(dp_NML, p_NML, -1, dp_NML.dtype).mul_(scale)
    return torch.bmm(ds_NML, k_NLC), torch.bmm(ds_NML.transpose(1, 2), q_NMC), dv_NLC


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_NMC: Tensor, k_NLC: Tensor, v_NLC: Tensor, bias_ML: Tensor, scale: float) -> Tensor:
        (count, queries, _), keys = q_NMC.shape, k_NLC.shape[1]
        p_NML = q_NMC.new_empty(count, queries, keys)
        out_NMC = q_NMC.new_empty(count, queries, v_NLC.shape[-1])
        bias_1ML = bias_ML.double()[None]
        step = max(1, CHUNK_SCORES // (queries * keys))
        for at in range(0, count, step):
            part = slice(at, at + step)
            k_NCL = k_NLC[part].double().transpose(1, 2)
            p = torch.baddbmm(bias_1ML, q_NMC[part].double(), k_NCL, alpha=scale).softmax(-1)
            p_NML[part], out_NMC[part] = p, torch.bmm(p, v_NLC[part].double())
        ctx.save_for_backward(q_NMC, k_NLC, v_NLC, p_NML)
        ctx.scale = scale
        return out_NMC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_NMC, k_NLC, v_NLC, p_NML = ctx.saved_tensors
        return *_attention_gradients(q_NMC, k_NLC, v_NLC, p_NML, ctx.scale, grads[0]), None, None


def attend(q_NMC: Tensor, k_NLC: Tensor, v_NLC: Tensor, bias_ML: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T + bias) v, [N, M, C]: inside in float64, weights kept and gradients taken in float32."""
    return _Attend.apply(q_NMC, k_NLC, v_NLC, bias_ML, scale)


class _AttendCausal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_NMC: Tensor, k_NLC: Tensor, v_NLC: Tensor, scale: float) -> Tensor:
        q_NMC, k_NLC, v_NLC = (x.detach().contiguous() for x in (q_NMC, k_NLC, v_NLC))
        count, keys, _ = k_NLC.shape
        keep = count * q_NMC.shape[1] * keys <= KEEP_SCORES
        out_NMC, p_NML = _attend_causal(q_NMC, k_NLC, v_NLC, scale, want_weights=keep)
        ctx.save_for_backward(q_NMC, k_NLC, v_NLC, p_NML)
        ctx.scale = scale
        return out_NMC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_NMC, k_NLC, v_NLC, p_NML = ctx.saved_tensors
        if p_NML is not None:
            return *_attention_gradients(q_NMC, k_NLC, v_NLC, p_NML, ctx.scale, grads[0]), None
        out = tuple(map(torch.empty_like, (q_NMC, k_NLC, v_NLC)))
        step = max(1, KEEP_SCORES // (q_NMC.shape[1] * k_NLC.shape[1]))
        for at in range(0, len(k_NLC), step):
            part = slice(at, at + step)
            q, k, v = q_NMC[part], k_NLC[part], v_NLC[part]
            p = _attend_causal(q, k, v, ctx.scale, want_weights=True)[1]
            assert p is not None
            for whole, grad in zip(out, _attention_gradients(q, k, v, p, ctx.scale, grads[0][part]), strict=True):
                whole[part] = grad
        return *out, None


def _attend_causal(
    q_NMC: Tensor, k_NLC: Tensor, v_NLC: Tensor, scale: float, *, want_weights: bool
) -> tuple[Tensor, Tensor | None]:
    (count, queries, channels), keys = q_NMC.shape, k_NLC.shape[1]
    out_NMC = torch.empty_like(q_NMC)
    p_NML = q_NMC.new_empty(count, queries, keys) if want_weights else None
    run("skyrl_attend", q_NMC, k_NLC, v_NLC, out_NMC, p_NML, count, queries // keys, keys, channels, scale)
    return out_NMC, p_NML


def kernel_can_attend(q: Tensor, group: int, keys: int, channels: int, value_channels: int) -> bool:
    """Whether `attend_causal` can: heads of that many channels, `group` queries a key, rows of `keys` tokens."""
    fits = channels == value_channels <= kernels.MAX_CHANNELS and group <= kernels.MAX_GROUP
    return fits and channels % kernels.MULTIPLE == 0 and keys <= kernels.LONGEST and uses_kernels(q)


def attend_causal(q_NMC: Tensor, k_NLC: Tensor, v_NLC: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T) v, [N, M, C], each query over the keys up to its own place: to the bit as the sampler.

    The M queries are those of M / L heads, one head after the other. Weights beyond KEEP_SCORES are computed again."""
    return _AttendCausal.apply(q_NMC, k_NLC, v_NLC, scale)


def inverse_norm(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, kept as 1: summed in float64, rounded once."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64).square_()
    return square.div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.shape[-1] % kernels.MULTIPLE == 0 and uses_kernels(x, weight):
            x, scale = x.detach().contiguous(), weight.detach().contiguous()
            out, r = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
            run("skyrl_norm", x, scale, out, r, r.numel(), x.shape[-1], eps)
            ctx.save_for_backward(x, weight, r)
            return out
        r = inverse_norm(x, eps)
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        normed = x * r
        both = grads[0] * normed
        mean = (both @ weight).div_(x.shape[-1]).unsqueeze(-1)
        dx = (grads[0] * weight).addcmul_(normed, mean, value=-1).mul_(r)
        return dx, both.reshape(-1, x.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, in float32 with a factor of float64."""
    return _Norm.apply(x, weight, eps)


class _HalfNorm(torch.autograd.Function):
    """In bfloat16, rounded forward as transformers' module rounds; gradients without roundings on the way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, scale = x.detach().contiguous(), weight.detach().contiguous()
        out, r = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        run("skyrl_norm_half", x, scale, out, r, r.numel(), x.shape[-1], eps)
        ctx.save_for_backward(x, weight, r)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        dx, dweight = torch.empty_like(x), torch.empty_like(weight, dtype=torch.float32)
        given = grads[0].contiguous(), x, weight.contiguous(), r
        run("skyrl_norm_half_gradient", *given, dx, dweight, r.numel(), x.shape[-1])
        return dx, dweight.to(weight.dtype), None


class _HalfGate(torch.autograd.Function):
    """silu(gate) * up in bfloat16, one pass each way; rounded as `_HalfNorm` rounds."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.detach().contiguous(), up.detach().contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        run("skyrl_gated_half", gate, up, out, out.numel())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        saved = ctx.saved_tensors  # once: checkpointing gives them out no second time
        out = tuple(map(torch.empty_like, saved))
        run("skyrl_gated_half_gradient", grads[0].contiguous(), *saved, *out, out[0].numel())
        return out


class _HalfRotation(torch.autograd.Function):
    """Rotary embedding of halves, of x [1, H, N, C] in bfloat16, one pass each way; rounded as `_HalfNorm` rounds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _rotate(grads[0], *ctx.saved_tensors, back=True), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    _, heads, tokens, size = x.shape
    out = x.new_empty(1, tokens, heads, size)
    run("skyrl_rotate_half", x, cos, sin, out, tokens, heads, size, x.stride(2), x.stride(1), back)
    return out.transpose(1, 2)


class _CausalSoftmax(torch.autograd.Function):
    """In bfloat16, in place and rounded once, its gradient as well."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, scale: float) -> Tensor:
        ctx.mark_dirty(scores)
        ctx.scale, length = scale, scores.shape[-1]
        run("skyrl_causal_softmax_half", scores, scores.numel() // length, length, scale)
        ctx.save_for_backward(scores)
        return scores

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        out, length = torch.empty_like(weights), weights.shape[-1]
        given = grads[0].contiguous(), weights, out, out.numel() // length, length, ctx.scale
        run("skyrl_causal_softmax_half_gradient", *given)
        return out, None


def causal_softmax(scores: Tensor, scale: float) -> Tensor:
    """softmax(scale * scores) of products [B, G * L, L], of which query i % L sees the keys up to its own, written over
    `scores`. For what `is_ready` takes."""
    return _CausalSoftmax.apply(scores, scale)


def exp(x: Tensor) -> Tensor:
    """e^x, rounded once. torch's own in float32 differs between the vectors of a tensor and its last few numbers."""
    return x.double().exp_().to(x.dtype)


def log_softmax_at(logits_TV: Tensor, targets_TK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at the targets, [T, K], and the log of the sum of exponentials, [T], as the
    sampler computes them. For float32 logits on a CPU."""
    if kernels.library()[0] is None:
        scaled_TV = logits_TV if temperature == 1.0 else logits_TV / temperature
        top_T1 = scaled_TV.amax(1, keepdim=True)
        shifted_TV = scaled_TV - top_T1
        mass_T1 = exp(shifted_TV).sum(1, keepdim=True, dtype=torch.float64).log_()
        logprobs_TK = shifted_TV.gather(1, targets_TK) - mass_T1
        return logprobs_TK.float(), (top_T1 + mass_T1).float().squeeze(1)
    logprobs_TK, logz_T = logits_TV.new_empty(targets_TK.shape), logits_TV.new_empty(len(logits_TV))
    shape = logits_TV.shape[1], targets_TK.contiguous(), targets_TK.shape[1], temperature
    run("skyrl_log_probs", logits_TV.contiguous(), len(logits_TV), *shape, logprobs_TK, logz_T)
    return logprobs_TK, logz_T


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.detach().contiguous()
        ctx.save_for_backward(x)
        if kernels.library()[0] is None:
            return _PLAIN_SILU(x.double(), True).float()  # for the reason of `exp`
        out = torch.empty_like(x)
        run("skyrl_silu", x, out, x.numel())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.ops.aten.silu_backward(grads[0], *ctx.saved_tensors)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """x * sigmoid(x), where it is exact by the kernels or in float64; never in place there."""
    return _Silu.apply(input) if matches_sampler(input) else _PLAIN_SILU(input, inplace)


_inside = False  # whether the forward pass that runs now is one of `enabled`


def is_enabled() -> bool:
    """Whether `enabled` is on: a layer that is recomputed later has to be recomputed the same way."""
    return _inside


_PLAIN_LINEAR, _PLAIN_SILU = F.linear, F.silu
_MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class _Operations(TorchFunctionMode):
    """Takes SiLU and products with weights: F.linear, and what DeepSpeed's zero3 puts in its place:
    x.matmul(weight.t())."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (_PLAIN_LINEAR, _PLAIN_SILU):
            func = linear if func is _PLAIN_LINEAR else silu
        if func in _MATMULS and not kwargs and args[1].ndim == 2:
            return linear(args[0], args[1].t())
        if func is torch.addmm and not kwargs and args[0].shape == args[2].shape[1:]:
            return linear(args[1], args[2].t(), args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def enabled(on: bool) -> Iterator[None]:
    """Inside, products, SiLU and the norms that `hook_norms` found are the ones of this module. `on` False: nothing."""
    global _inside
    if not on or _inside:
        yield
        return
    _inside = True
    try:
        with _Operations():
            yield
    finally:
        _inside = False


def hook_norms(net: nn.Module) -> None:
    """Makes plain RMS norms (weight, variance_epsilon; as Llama's) take `rms_norm` inside of `enabled`. Outside they
    stay transformers' own, so the check of a model against plain transformers when it is loaded (pretrained.load) also
    sees a norm that only looks like one."""
    for module in net.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            replace_forward(module, _norm)


def hook_half_ops(net: nn.Module) -> None:
    """Makes the gate of an MLP and the rotary embedding of an attention one pass over bfloat16 on a CPU with kernels,
    inside of `enabled`: where the code of their classes, tried on numbers, computes just these."""
    for module in net.modules():
        kind: Any = type(module)
        if isinstance(getattr(module, "act_fn", None), nn.Module) and _is_gate(kind, module.act_fn):
            replace_forward(module, _gate)
        elif _turns_halves(kind):
            module.__class__ = _with_rotation(kind)


def is_ready(*tensors: Tensor) -> bool:
    """Whether kernels take these: of bfloat16 on a CPU, inside of `enabled`."""
    return _inside and all(map(is_bfloat16_cpu, tensors)) and kernels.library()[0] is not None


class _Parts(SimpleNamespace):
    """A module that has these parts and fails where it is asked for another, also by getattr with a default."""

    def __getattr__(self, name: str) -> Any:
        raise LookupError(name)


def _computes(function: Any, given: tuple[Any, ...], want: list[Tensor]) -> bool:
    """Whether function(*given) is `want` to the bit, in bfloat16: it is then rounded after the same operations."""
    try:
        found = function(*given)
        pairs = zip([found] if isinstance(found, Tensor) else found, want, strict=True)
        return all(torch.equal(a, b) for a, b in pairs)
    except Exception:  # it is another kind of module, or of another signature
        return False


def _is_gate(kind: Any, activation: Any) -> bool:
    """Whether forward is down_proj(silu(gate_proj(x)) * up_proj(x)) for numbers of all sizes, since some clamp them."""
    a, x = torch.linspace(-12, 12, 64).sinh().bfloat16(), torch.full((), 1.5, dtype=torch.bfloat16)
    b, c = a.roll(7), a.roll(19)
    parts = _Parts(act_fn=activation, gate_proj=a.mul, up_proj=b.mul, down_proj=c.mul)
    return _computes(kind.forward, (parts, x), [F.silu(a * x) * (b * x) * c])


def _gate(module: Any, plain: Any, x: Tensor) -> Tensor:
    if not is_ready(x):
        return plain(x)
    gate, up = module.gate_proj(x), module.up_proj(x)
    fused = is_ready(gate, up) and gate.shape == up.shape and gate.shape[-1] % kernels.MULTIPLE == 0
    return module.down_proj(_HalfGate.apply(gate, up) if fused else module.act_fn(gate) * up)


ROTARY = "apply_rotary_pos_emb"


@cache
def _turns_halves(kind: Any) -> bool:
    """Whether its forward calls `ROTARY` of its file, and that is x cos + (-second half, first half) sin."""
    code = getattr(kind.forward, "__code__", None)
    if code is None or ROTARY not in code.co_names:
        return False
    q, k, cos, sin = torch.linspace(-4, 4, 96).bfloat16().reshape(4, 1, 3, 8)
    want = [(x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin)[None] for x in (q, k)]
    return _computes(kind.forward.__globals__[ROTARY], (q[None], k[None], cos, sin), want)


@cache
def _with_rotation(kind: Any) -> Any:
    """A subclass whose forward has `_rotary` under the name of its file's function."""
    plain = kind.forward
    names = {**plain.__globals__, ROTARY: partial(_rotary, plain.__globals__[ROTARY])}
    ours = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    ours.__kwdefaults__ = plain.__kwdefaults__
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "forward": ours})


def _rotary(plain: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
    same = all(len(x) == 1 and x.shape[2:] == cos.shape[-2:] for x in (q, k))  # [1, H, N, C] and [1, N, C]
    if args or kwargs or not is_ready(q, k, cos, sin) or not same or cos.shape[-1] % (2 * kernels.MULTIPLE):
        return plain(q, k, cos, sin, *args, **kwargs)
    cos, sin = cos.contiguous(), sin.contiguous()
    return tuple(_HalfRotation.apply(x, cos, sin) for x in (q, k))


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """`module(...)` becomes forward(module, plain, ...), `plain` being what its forward pass was. By a subclass: a
    module that holds itself in an attribute would keep its weights until the cyclic collector runs."""
    kind: Any = type(module)
    module.__class__ = _subclass(kind, forward)


@cache
def _subclass(kind: Any, forward: Callable[..., Any]) -> Any:
    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, partial(kind.forward, self), *args, **kwargs)

    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "forward": replaced})


def _norm(module: Any, plain: Any, x: Tensor) -> Tensor:
    if _inside and is_float32_cpu(x) and is_float32_cpu(module.weight):
        return rms_norm(x, module.weight, module.variance_epsilon)
    if is_ready(x, module.weight) and x.shape[-1] % kernels.MULTIPLE == 0 and _rounds_first(plain.func):
        return _HalfNorm.apply(x, module.weight, module.variance_epsilon)
    return plain(x)


@cache
def _rounds_first(forward: Any) -> bool:
    """Whether a norm rounds before it multiplies by its weight: Llama's does, those of OLMo 2 and gpt-oss do not."""
    weight, x = torch.linspace(-4, 4, 64).bfloat16().reshape(2, 32)
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    return _computes(forward, (_Parts(weight=weight, variance_epsilon=1e-6), x), [weight * normed.bfloat16()])
