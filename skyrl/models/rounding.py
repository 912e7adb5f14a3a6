"""Float32 on a CPU with less rounding, at little more than the price of plain float32.

A sum of n products in one accumulator is off by about sqrt(n) roundings; summed in blocks it is off by a few. A trained
model multiplies that by its own condition, so a log-probability can be off by 2e-5 (docs/LOG.md). The sampler's kernels
do the same in C++. Other dtypes and devices are left as they are.

Letters: N rows, K inner, V columns; for attention N matrices, M queries, L keys, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

BLOCK = 32  # products summed in one accumulator: 32 halves the error of a K of 256
CHUNK_SCORES = 1 << 19  # float64 scores of attention that exist at once, 4 MiB: stays in the cache


def applies(x: Tensor) -> bool:
    """Whether x is of the kind that is handled here: float32 on a CPU."""
    return x.dtype == torch.float32 and x.device.type == "cpu"


def product(x_NK: Tensor, weight_VK: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, [N, V]; sums of BLOCK products are summed. Has no gradient; `linear` does."""
    out_NV = torch.mm(x_NK[:, :BLOCK], weight_VK[:, :BLOCK].t())
    for at in range(BLOCK, x_NK.shape[1], BLOCK):
        out_NV.addmm_(x_NK[:, at : at + BLOCK], weight_VK[:, at : at + BLOCK].t())
    return out_NV if bias_V is None else out_NV.add_(bias_V)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_VK: Tensor, bias_V: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_VK)
        return product(x.reshape(-1, x.shape[-1]), weight_VK, bias_V).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_VK = ctx.saved_tensors
        grad_NV = grads[0].reshape(-1, grads[0].shape[-1])
        want_x, want_weight, want_bias = ctx.needs_input_grad
        return (
            (grad_NV @ weight_VK).view(x.shape) if want_x else None,
            grad_NV.t() @ x.reshape(-1, x.shape[-1]) if want_weight else None,
            grad_NV.sum(0) if want_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As torch.nn.functional.linear; in blocks where `applies`. Gradients are plain float32 products."""
    if not (applies(x) and applies(weight) and x.numel()):
        return _PLAIN_LINEAR(x, weight, bias)
    return _Linear.apply(x, weight, bias)


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
        dv_NLC = torch.bmm(p_NML.transpose(1, 2), grads[0])
        dp_NML = torch.bmm(grads[0], v_NLC.transpose(1, 2))
        ds_NML = torch._softmax_backward_data(dp_NML, p_NML, -1, dp_NML.dtype).mul_(ctx.scale)
        return torch.bmm(ds_NML, k_NLC), torch.bmm(ds_NML.transpose(1, 2), q_NMC), dv_NLC, None, None


def attend(q_NMC: Tensor, k_NLC: Tensor, v_NLC: Tensor, bias_ML: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T + bias) v, [N, M, C]: inside in float64, weights kept and gradients taken in float32."""
    return _Attend.apply(q_NMC, k_NLC, v_NLC, bias_ML, scale)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64).square_()
        r64 = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        r = r64.float()
        ctx.save_for_backward(x, weight, r)
        # what r lost by rounding would be one common error of all channels, which does not average out
        return torch.addcmul(x * (r64 - r.double()).float(), x, r).mul_(weight)

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


_inside = False  # whether the forward pass that runs now is one of `careful`


def inside() -> bool:
    """Whether `careful` is on: a layer that is recomputed later has to be recomputed the same way."""
    return _inside


_PLAIN_LINEAR = F.linear
_MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class _Linears(TorchFunctionMode):
    """Takes products with weights: F.linear, and what DeepSpeed's zero3 puts in its place: x.matmul(weight.t())."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _PLAIN_LINEAR:
            return linear(*args, **(kwargs or {}))
        if func in _MATMULS and not kwargs and args[1].ndim == 2:
            return linear(args[0], args[1].t())
        if func is torch.addmm and not kwargs and args[1].ndim == 2:
            return linear(args[1], args[2].t(), args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def careful(on: bool) -> Iterator[None]:
    """Inside, products and the norms that `install` found are the ones of this module. `on` False: nothing."""
    global _inside
    if not on or _inside:
        yield
        return
    _inside = True
    try:
        with _Linears():
            yield
    finally:
        _inside = False


def install(net: nn.Module) -> None:
    """Makes plain RMS norms (weight, variance_epsilon; as Llama's) take `rms_norm` inside of `careful`. Outside they
    stay transformers' own, so the check of a model against plain transformers when it is loaded (models.load) also
    sees a norm that only looks like one."""
    for module in net.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = partial(_norm, module, module.forward)


def _norm(module: Any, plain: Any, x: Tensor) -> Tensor:
    if _inside and applies(x) and applies(module.weight):
        return rms_norm(x, module.weight, module.variance_epsilon)
    return plain(x)
