"""Log-probabilities and entropy from hidden states, in blocks of the vocabulary: no [T, V] tensor ever exists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# float32 logits that exist at once. On a CPU a block that stays in the cache is 1.8 times as fast as one of 64 MiB.
BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}


@dataclass(frozen=True)
class HeadSpec:
    """From the head's product to logits: z = softcap * tanh(product * scale / softcap); softcap 0 = no capping."""

    scale: float = 1.0
    softcap: float = 0.0


def matmul_float(hidden_TC: Tensor, weight_VC: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """hidden @ weight.T + bias in float32 (float64 for float64), [T, V].

    On CUDA half-precision inputs are summed and returned in float32; on a CPU they are rounded once to the input's
    dtype first, as transformers does, because a float32 result would need float32 inputs, at five times the price.
    """
    half = hidden_TC.dtype in (torch.bfloat16, torch.float16)
    if half and hidden_TC.is_cuda:
        out = torch.mm(hidden_TC, weight_VC.t(), out_dtype=torch.float32)
        return out if bias_V is None else out.add_(bias_V.float())
    out = torch.nn.functional.linear(hidden_TC, weight_VC, bias_V)
    return out.float() if half else out


def finish_logits(product: Tensor, head: HeadSpec) -> Tensor:
    """The family's own scaling and capping, in place."""
    if head.scale != 1.0:
        product.mul_(head.scale)
    if head.softcap:
        product.div_(head.softcap).tanh_().mul_(head.softcap)
    return product


class _LogProbs(torch.autograd.Function):
    """Both directions walk over blocks of the vocabulary, so each weight row's gradient is one product over all T:
    no float32 copy of the weight's gradient is needed. The backward pass recomputes the logits of each block."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TC: Tensor,
        weight_VC: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        temperature: float,
        head: HeadSpec,
        block: int,
        want_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        tokens, dtype = hidden_TC.shape[0], torch.float64 if hidden_TC.dtype == torch.float64 else torch.float32
        peak_T = torch.full((tokens,), float("-inf"), dtype=dtype, device=hidden_TC.device)
        total_T, target_T = torch.zeros_like(peak_T), torch.zeros_like(peak_T)
        moment_T = torch.zeros_like(peak_T) if want_entropy else None  # sum of exp(z - peak) * z
        for start in range(0, weight_VC.shape[0], block):
            z = _block_logits(hidden_TC, weight_VC, bias_V, start, block, head, temperature)
            inside_T = (targets_T >= start) & (targets_T < start + z.shape[1])
            picked_T = z.gather(1, (targets_T - start).clamp(0, z.shape[1] - 1)[:, None])[:, 0]
            target_T = torch.where(inside_T, picked_T, target_T)
            top_T = torch.maximum(peak_T, z.amax(1))
            shrink_T = torch.exp(peak_T - top_T)
            if moment_T is None:
                total_T = total_T * shrink_T + z.sub_(top_T[:, None]).exp_().sum(1)
            else:
                p = torch.exp(z - top_T[:, None])
                total_T = total_T * shrink_T + p.sum(1)
                moment_T = moment_T * shrink_T + p.mul_(z).sum(1)
            peak_T = top_T
        logz_T = peak_T + total_T.log()
        entropy_T = None if moment_T is None else logz_T - moment_T / total_T
        ctx.save_for_backward(hidden_TC, weight_VC, bias_V, targets_T, logz_T, entropy_T)
        ctx.plan = (temperature, head, block)
        ctx.set_materialize_grads(False)
        return target_T - logz_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        hidden_TC, weight_VC, bias_V, targets_T, logz_T, entropy_T = ctx.saved_tensors
        temperature, head, block = ctx.plan
        grad_T, grad_entropy_T = grads
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        if grad_T is None and grad_entropy_T is None:
            return (None,) * 8
        vocab = weight_VC.shape[0]
        dhidden = torch.zeros(hidden_TC.shape, dtype=logz_T.dtype, device=hidden_TC.device) if want_hidden else None
        dweight = torch.empty_like(weight_VC) if want_weight else None
        dbias = torch.empty_like(bias_V) if want_bias and bias_V is not None else None
        for start in range(0, vocab, block):
            stop = min(start + block, vocab)
            z = _block_logits(hidden_TC, weight_VC, bias_V, start, block, head, temperature)
            capped = (z * (temperature / head.softcap)).square_() if head.softcap else None
            dz = _logit_gradient(z, start, targets_T, logz_T, entropy_T, grad_T, grad_entropy_T)
            if capped is not None:  # d softcap * tanh(x / softcap) / dx = 1 - tanh^2
                dz.mul_(capped.neg_().add_(1.0))
            dz = dz.mul_(head.scale / temperature).to(hidden_TC.dtype)
            if dhidden is not None:
                dhidden.add_(dz @ weight_VC[start:stop]) if vocab > block else dhidden.copy_(dz @ weight_VC)
            if dweight is not None:
                torch.mm(dz.t(), hidden_TC, out=dweight[start:stop])
            if dbias is not None:
                dbias[start:stop] = dz.sum(0, dtype=logz_T.dtype)
        return (None if dhidden is None else dhidden.to(hidden_TC.dtype), dweight, dbias, None, None, None, None, None)


def _block_logits(
    hidden_TC: Tensor,
    weight_VC: Tensor,
    bias_V: Tensor | None,
    start: int,
    block: int,
    head: HeadSpec,
    temperature: float,
) -> Tensor:
    """Logits / temperature of the vocabulary entries start ... start + block, [T, block]."""
    rows = slice(start, start + block)
    product = matmul_float(hidden_TC, weight_VC[rows], None if bias_V is None else bias_V[rows])
    logits = finish_logits(product, head)
    return logits if temperature == 1.0 else logits.div_(temperature)


def _logit_gradient(
    z: Tensor,
    start: int,
    targets_T: Tensor,
    logz_T: Tensor,
    entropy_T: Tensor | None,
    grad_T: Tensor | None,
    grad_entropy_T: Tensor | None,
) -> Tensor:
    """Gradient with respect to z; destroys z. With p = exp(z - logz) and H the entropy,
    d logp / dz = onehot - p and dH / dz = -p * (z - logz + H)."""
    surprise = z.sub_(logz_T[:, None])
    p = torch.exp(surprise)
    if grad_entropy_T is not None and entropy_T is not None:
        dz = surprise.add_(entropy_T[:, None]).mul_(p).mul_(-grad_entropy_T[:, None])
        if grad_T is not None:
            dz.addcmul_(p, grad_T[:, None], value=-1)
    else:
        assert grad_T is not None
        dz = p.mul_(-grad_T[:, None])
    if grad_T is not None:
        inside_T = (targets_T >= start) & (targets_T < start + dz.shape[1])
        place_T = (targets_T - start).clamp(0, dz.shape[1] - 1)
        dz.scatter_add_(1, place_T[:, None], torch.where(inside_T, grad_T, 0.0)[:, None])
    return dz


def log_probs(
    hidden_TC: Tensor,
    weight_VC: Tensor,
    targets_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    head: HeadSpec = HeadSpec(),
    entropy: bool = False,
    chunk_tokens: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits / temperature) at the targets, and entropy if asked; [T] float32 (float64 for float64), nats.

    At most 64 MiB (CPU: 8 MiB) of float32 logits exist at once, or as much as `chunk_tokens` whole rows would take, but
    no less than 128 entries of the vocabulary for all tokens.
    Gradients are exact, for hidden, weight and bias. Raises: ValueError for a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: log-probabilities of training need one above 0")
    vocab, tokens = weight_VC.shape[0], max(1, hidden_TC.shape[0])
    budget = chunk_tokens * vocab if chunk_tokens else BLOCK_BYTES.get(hidden_TC.device.type, 64 << 20) // 4
    block = min(vocab, max(128, budget // tokens // 128 * 128))
    return _LogProbs.apply(hidden_TC, weight_VC, bias_V, targets_T, float(temperature), head, block, entropy)
