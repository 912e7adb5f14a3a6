"""Log-probabilities and entropy from hidden states, in blocks of the vocabulary: no [T, V] tensor ever exists."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from skyrl import kernels
from skyrl.algorithms.truncation import cut_logits
from skyrl.kernels import exact_ops
from skyrl.planner.device import torch_release
from skyrl.tracking.advisories import warn_fallback

# float32 logits that exist at once. On a CPU a block that stays in the cache is 1.8 times as fast as one of 64 MiB.
BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
ROWS = 96  # of whole logits: fewer at a time would read the head too often


@dataclass(frozen=True)
class HeadSpec:
    """From the head's product to logits: z = softcap * tanh(product * scale / softcap); softcap 0 = no capping."""

    scale: float = 1.0
    softcap: float = 0.0


def head_spec(config: Any) -> HeadSpec:
    """Scale and soft-capping that the family applies to its logits (Gemma, Cohere, Granite, ...)."""
    config = config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None):  # Cohere
        scale *= float(config.logit_scale)
    if getattr(config, "logits_scaling", None):  # Granite divides, HyperCLOVA X multiplies
        scaling = float(config.logits_scaling)
        scale *= scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    return HeadSpec(scale, float(getattr(config, "final_logit_softcapping", None) or 0.0))


def sums_in_float32(x: Tensor) -> bool:
    """Whether products of half-precision inputs on the device of `x` come in float32 without a cast before."""
    return x.is_cuda and torch_release() >= (2, 8)


def matmul_float(hidden_TC: Tensor, weight_VC: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """hidden @ weight.T + bias in float32 (float64 for float64), [T, V].

    Half-precision inputs are summed in float32 on CUDA (torch 2.8 and newer); elsewhere the result is rounded once to
    their dtype first, as transformers does: another would need float32 inputs, at five times the price on a CPU. With
    hidden states in float32 a half-precision head is cast to it (model.head_dtype=float32).
    """
    weight_VC, bias_V = weight_VC.to(hidden_TC.dtype), None if bias_V is None else bias_V.to(hidden_TC.dtype)
    half = hidden_TC.dtype in (torch.bfloat16, torch.float16)
    if half and sums_in_float32(hidden_TC):
        out = torch.mm(hidden_TC, weight_VC.t(), out_dtype=torch.float32)
        return out if bias_V is None else out.add_(bias_V.float())
    if exact_ops.is_float32_cpu(hidden_TC) and exact_ops.is_float32_cpu(weight_VC):
        return exact_ops.product(hidden_TC, weight_VC, bias_V)
    if half and hidden_TC.is_cuda:
        warn_fallback(
            f"logits are rounded to half precision: torch {torch.__version__} has no other product (2.8 does)"
        )
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
    """Both directions walk over blocks of the vocabulary (docs/models.md), the forward pass over whole rows of logits
    where that gives the sampler's bits and the vocabulary is not large.

    Optional low-rank pair: u [T, R] and B [V, R] add u B^T to the product; targets may be [T, K]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TC: Tensor,
        weight_VC: Tensor,
        bias_V: Tensor | None,
        low_TR: Tensor | None,
        up_VR: Tensor | None,
        targets: Tensor,
        temperature: float,
        head: HeadSpec,
        block: int,
        want_entropy: bool,
        support_2N: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        targets_TK = targets if targets.ndim == 2 else targets[:, None]
        product = _Product(hidden_TC, weight_VC, bias_V, low_TR, up_VR, support_2N)
        tokens = hidden_TC.shape[0]
        rows = block * tokens // weight_VC.shape[0]  # whole ones that fit into the same memory
        whole = tokens > 0 and rows >= min(ROWS, tokens) and exact_ops.matches_sampler(hidden_TC, weight_VC)
        by, size = (_by_rows, rows) if whole else (_by_blocks, block)
        out_TK, logz_T, entropy_T = by(product, targets_TK, head, temperature, size, want_entropy)
        ctx.save_for_backward(hidden_TC, weight_VC, bias_V, low_TR, up_VR, targets, logz_T, entropy_T, support_2N)
        ctx.plan = (temperature, head, block)
        ctx.set_materialize_grads(False)
        # cloned: a view as the output of a sharded root loses its pre-backward hook when it is written to
        return (out_TK if targets.ndim == 2 else out_TK[:, 0].clone()), entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        hidden_TC, weight_VC, bias_V, low_TR, up_VR, targets, logz_T, entropy_T, support_2N = ctx.saved_tensors
        temperature, head, block = ctx.plan
        grad, grad_entropy_T = grads
        if grad is None and grad_entropy_T is None:
            return (None,) * 11
        targets_TK = targets if targets.ndim == 2 else targets[:, None]
        grad_TK = grad if grad is None or grad.ndim == 2 else grad[:, None]
        vocab = weight_VC.shape[0]
        want = ctx.needs_input_grad
        dhidden = torch.zeros(hidden_TC.shape, dtype=logz_T.dtype, device=hidden_TC.device) if want[0] else None
        dweight = torch.empty_like(weight_VC) if want[1] else None
        dbias = torch.empty_like(bias_V) if want[2] and bias_V is not None else None
        dlow = torch.zeros(low_TR.shape, dtype=logz_T.dtype, device=low_TR.device) if want[3] else None
        dup = torch.empty_like(up_VR) if want[4] else None
        product = _Product(hidden_TC, weight_VC, bias_V, low_TR, up_VR, support_2N)
        fused = product.takes_kernels(head, targets_TK)
        if fused:
            targets_TK = targets_TK.contiguous()
            grad_T = torch.zeros_like(logz_T) if grad_TK is None else grad_TK[:, 0].contiguous()
            grad_entropy_T = None if entropy_T is None or grad_entropy_T is None else grad_entropy_T.contiguous()
            rest = logz_T, grad_T, entropy_T, grad_entropy_T
        for start in range(0, vocab, block):
            stop = min(start + block, vocab)
            if fused:
                z, at = product.raw(slice(start, stop)), (head.scale / temperature, targets_TK, start)
                exact_ops.run("skyrl_logit_gradient", z.dtype == torch.bfloat16, z, *z.shape, *at, *rest)
                dz = z.to(hidden_TC.dtype)
            else:
                z = product.logits(slice(None), slice(start, stop), head, temperature)
                # at least -1 but for what is cut off, which has no gradient
                capped = (z * (temperature / head.softcap)).clamp_(min=-1.0).square_() if head.softcap else None
                dz = _logit_gradient(z, start, targets_TK, logz_T, entropy_T, grad_TK, grad_entropy_T)
                if capped is not None:  # d softcap * tanh(x / softcap) / dx = 1 - tanh^2
                    dz.mul_(capped.neg_().add_(1.0))
                dz = dz.mul_(head.scale / temperature).to(hidden_TC.dtype)
            if dhidden is not None:
                put = dhidden.add_ if vocab > block else dhidden.copy_
                put(exact_ops.matmul(dz, weight_VC[start:stop].to(dz.dtype)))
            if dweight is not None:
                _put_outer(dz, hidden_TC, dweight[start:stop])
            if dbias is not None:
                dbias[start:stop] = dz.sum(0, dtype=logz_T.dtype)
            if dlow is not None:
                dlow.add_(dz @ up_VR[start:stop].to(dz.dtype))
            if dup is not None:
                _put_outer(dz, low_TR, dup[start:stop])
        return (
            None if dhidden is None else dhidden.to(hidden_TC.dtype),
            dweight,
            dbias,
            None if dlow is None else dlow.to(low_TR.dtype),
            dup,
            *(None,) * 6,
        )


def _put_outer(dz: Tensor, x: Tensor, out: Tensor) -> None:
    """out = dz^T x, rounded to the dtype of `out`."""
    if out.dtype == dz.dtype and not exact_ops.is_float32_cpu(dz):
        torch.mm(dz.t(), x, out=out)
    else:
        out.copy_(exact_ops.sum_of_outer(dz, x))


@dataclass(frozen=True)
class _Product:
    """hidden W^T + bias, and u B^T where there is a low-rank pair, for a part at a time."""

    hidden_TC: Tensor
    weight_VC: Tensor
    bias_V: Tensor | None
    low_TR: Tensor | None
    up_VR: Tensor | None
    support_2N: Tensor | None

    @cached_property
    def _packed(self) -> exact_ops.Packed:
        return exact_ops.pack(self.weight_VC)

    def takes_kernels(self, head: HeadSpec, targets_TK: Tensor) -> bool:
        """Whether kernels take what `raw` gives: bfloat16 on a CPU, one target a token, no logits cut or capped."""
        plain = self.support_2N is None and not head.softcap and targets_TK.shape[1] == 1
        half = exact_ops.is_bfloat16_cpu(self.hidden_TC) and exact_ops.is_bfloat16_cpu(self.weight_VC)
        return plain and half and kernels.library()[0] is not None

    def raw(self, entries: slice) -> Tensor:
        """The product for all tokens and some entries before scaling: in bfloat16, or in float32 with the low-rank
        pair; a pair of zeros changes no bit of what kernels make of it."""
        bias_V = None if self.bias_V is None else self.bias_V[entries].to(self.hidden_TC.dtype)
        half = torch.nn.functional.linear(self.hidden_TC, self.weight_VC[entries], bias_V)
        if self.low_TR is None or self.up_VR is None:
            return half
        return half.float().add_(matmul_float(self.low_TR, self.up_VR[entries]))

    def logits(self, tokens: slice, entries: slice, head: HeadSpec, temperature: float) -> Tensor:
        """Logits / temperature of some tokens for some entries of the vocabulary."""
        if entries == slice(None) and exact_ops.uses_onednn(self.hidden_TC, self.weight_VC):
            product = exact_ops.packed_product(self.hidden_TC[tokens], self._packed, self.bias_V)
        else:
            bias_V = None if self.bias_V is None else self.bias_V[entries]
            product = matmul_float(self.hidden_TC[tokens], self.weight_VC[entries], bias_V)
        if self.low_TR is not None and self.up_VR is not None:
            low_TR, up_VR = self.low_TR[tokens], self.up_VR[entries]
            if product.dtype != low_TR.dtype or exact_ops.is_float32_cpu(low_TR):
                product.add_(matmul_float(low_TR, up_VR))
            else:
                product.addmm_(low_TR, up_VR.t())
        logits = finish_logits(product, head)
        if self.support_2N is not None:
            cut_logits(logits, tokens.start or 0, entries.start or 0, self.support_2N)
        return logits if temperature == 1.0 else logits.div_(temperature)


def _by_blocks(
    product: _Product, targets_TK: Tensor, head: HeadSpec, temperature: float, block: int, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities at the targets, logs of the sums of exponentials, entropies; `block` entries of the vocabulary
    at a time."""
    hidden_TC, vocab = product.hidden_TC, product.weight_VC.shape[0]
    tokens, dtype = hidden_TC.shape[0], torch.float64 if hidden_TC.dtype == torch.float64 else torch.float32
    peak_T = torch.full((tokens,), float("-inf"), dtype=dtype, device=hidden_TC.device)
    total_T = torch.zeros_like(peak_T)
    target_TK = torch.zeros(targets_TK.shape, dtype=dtype, device=hidden_TC.device)
    moment_T = torch.zeros_like(peak_T) if want_entropy else None  # sum of exp(z - peak) * z
    fused, targets_TK = product.takes_kernels(head, targets_TK), targets_TK.contiguous()
    for start in range(0, vocab, block):
        if fused:
            z, at = product.raw(slice(start, start + block)), (head.scale / temperature, targets_TK, start)
            half = z.dtype == torch.bfloat16
            exact_ops.run("skyrl_logit_sums", half, z, *z.shape, *at, target_TK, peak_T, total_T, moment_T)
            continue
        z = product.logits(slice(None), slice(start, start + block), head, temperature)
        inside_TK, place_TK = _within(targets_TK, start, z.shape[1])
        target_TK = torch.where(inside_TK, z.gather(1, place_TK), target_TK)
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
    # the difference first: logz is as large as the logits, and its rounding would be that of every log-probability
    return (target_TK - peak_T[:, None]) - total_T.log()[:, None], logz_T, entropy_T


def _by_rows(
    product: _Product, targets_TK: Tensor, head: HeadSpec, temperature: float, rows: int, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same with whole rows of logits, `rows` tokens at a time: the sampler's numbers, to the bit."""
    parts = []
    for start in range(0, len(targets_TK), rows):
        here = slice(start, start + rows)
        z = product.logits(here, slice(None), head, 1.0)
        logprobs_TK, logz_T = exact_ops.log_softmax_at(z, targets_TK[here], temperature)
        entropy_T = None
        if want_entropy:
            surprise = z.div_(temperature).sub_(logz_T[:, None])
            entropy_T = -(torch.exp(surprise).mul_(surprise)).sum(1)
        parts.append((logprobs_TK, logz_T, entropy_T))
    logprobs, logz, entropy = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(logz), torch.cat(entropy) if want_entropy else None


def _within(targets_TK: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in the block of `width` entries from `start` on, and their places in it (others: anywhere)."""
    return (targets_TK >= start) & (targets_TK < start + width), (targets_TK - start).clamp(0, width - 1)


def _logit_gradient(
    z: Tensor,
    start: int,
    targets_TK: Tensor,
    logz_T: Tensor,
    entropy_T: Tensor | None,
    grad_TK: Tensor | None,
    grad_entropy_T: Tensor | None,
) -> Tensor:
    """Gradient with respect to z; destroys z. With p = exp(z - logz) and H the entropy,
    d logp / dz = onehot - p and dH / dz = -p * (z - logz + H)."""
    surprise = z.sub_(logz_T[:, None])
    p = torch.exp(surprise)
    grad_T = None if grad_TK is None else grad_TK.sum(1) if grad_TK.shape[1] > 1 else grad_TK[:, 0]
    if grad_entropy_T is not None and entropy_T is not None:
        dz = surprise.add_(entropy_T[:, None]).mul_(p).mul_(-grad_entropy_T[:, None])
        if grad_T is not None:
            dz.addcmul_(p, grad_T[:, None], value=-1)
    else:
        assert grad_T is not None
        dz = p.mul_(-grad_T[:, None])
    if grad_TK is not None:
        inside_TK, place_TK = _within(targets_TK, start, dz.shape[1])
        dz.scatter_add_(1, place_TK, torch.where(inside_TK, grad_TK, 0.0))
    return dz


def log_probs(
    hidden_TC: Tensor,
    weight_VC: Tensor,
    targets: Tensor,
    *,
    bias_V: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    temperature: float = 1.0,
    head: HeadSpec = HeadSpec(),
    entropy: bool = False,
    chunk_tokens: int = 0,
    support_2N: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits / temperature) at the targets, and entropy if asked; float32 (float64 for float64), nats.

    `targets` [T], or [T, K] for K of them at each position; the log-probabilities have the same shape, entropy is [T].
    `support_2N`: tokens and entries of the vocabulary; the softmax of a token that is there is over its entries alone,
    and the log-probability of another target about -1e20.
    `low_rank`: (u [T, R], B [V, R]) adds u B^T to hidden W^T, before the family's scaling.
    At most BLOCK_BYTES of float32 logits exist at once, or as much as `chunk_tokens` whole rows would take, but no less
    than 128 entries of the vocabulary for all tokens. Raises: ValueError for a temperature not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: log-probabilities of training need one above 0")
    vocab, tokens = weight_VC.shape[0], max(1, hidden_TC.shape[0])
    budget = chunk_tokens * vocab if chunk_tokens else BLOCK_BYTES.get(hidden_TC.device.type, 64 << 20) // 4
    block = min(vocab, max(128, budget // tokens // 128 * 128))
    low_TR, up_VR = low_rank or (None, None)
    return _LogProbs.apply(
        hidden_TC, weight_VC, bias_V, low_TR, up_VR, targets, float(temperature), head, block, entropy, support_2N
    )
