"""What one AdamW step needs around torch's optimizer: an accurate norm, the refusal of what is not finite, clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from skyrl.types import AdamParams, RunError

_BLOCK = 1024
_SAFE = 1e36  # so far inside the range of float32 and bfloat16 that no rounding on the way leaves it
_LARGEST = torch.finfo(torch.float32).max
MOMENTS = ("exp_avg", "exp_avg_sq")


def square_sum(tensor: Tensor) -> Tensor:
    """Sum of squares, float64 scalar on the tensor's device.

    torch adds float32 squares one after the other on a CPU, which over millions of elements is off by 1e-4; blocks
    summed in float32 and added in float64 are not, and cost no more.
    """
    flat = tensor.detach().reshape(-1)
    whole = flat.numel() // _BLOCK * _BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, _BLOCK), dim=1).double().square().sum()
    return blocks + torch.linalg.vector_norm(flat[whole:], dtype=torch.float64).square()


def make_adam(params: Sequence[Tensor], *, fused: bool = True) -> torch.optim.AdamW:
    """AdamW over these weights; fused on a GPU in any case: one kernel, and no root of every second moment besides. It
    has its state from the start, so that a checkpoint always has the same tensors; the number of steps lies where a
    fused kernel wants it."""
    fused = fused or params[0].device.type == "cuda"
    adam = torch.optim.AdamW(params, lr=0.0, fused=fused, foreach=not fused)
    for p in params:
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        adam.state[p] = {"step": step, **{key: torch.zeros_like(p) for key in MOMENTS}}
    return adam


def set_options(optimizer: torch.optim.Optimizer, adam: AdamParams) -> None:
    """Makes the next step one with these parameters: they belong to the call, not to the optimizer."""
    for group in optimizer.param_groups:
        group.update(lr=adam.lr, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay)
        if "momentum" in group:
            group["momentum"] = adam.momentum


# ---- updates that are not finite -------------------------------------------------------------------------------------
# A finite gradient may still give weights or moments that are not: eps=0 divides 0 by 0 for a weight without gradient,
# and a huge learning rate or weight decay overflows. Bounds on what a step starts from show at almost no cost that
# this cannot happen; where they do not, the step is tried and taken back.


def largest(tensors: Sequence[Tensor]) -> Tensor:
    """The largest absolute value of all elements, float64 scalar; 0 without any element."""
    some = [t for t in tensors if t.numel()]
    if not some:
        return torch.zeros((), dtype=torch.float64, device=tensors[0].device if tensors else None)
    if some[0].is_cuda:
        return torch.stack(torch._foreach_norm(some, float("inf"))).max().double()
    ends = [end for t in some for end in torch.aminmax(t)]  # on a CPU six times as fast as a norm
    return torch.stack(ends).abs().max().double()


def check_factors(adam: AdamParams, step: float) -> None:
    """Raises RunError when what multiplies every element in the step with this number is out of range by itself."""
    if max(adam.lr / max(1.0 - adam.beta1**step, 1e-30), adam.lr * adam.weight_decay, adam.eps) > _LARGEST:
        raise update_not_finite(adam)


def surely_finite(adam: AdamParams, norm: float, step: float, sizes: Sequence[float]) -> bool:
    """Whether the step with this number (1, 2, ...) gives finite weights and moments whatever the elements are. `norm`:
    of the gradient, not clipped; sizes: bounds on the absolute values of the weights, exp_avg and exp_avg_sq."""
    weight, first, second = sizes
    gradient = min(norm, adam.grad_clip_norm) if adam.grad_clip_norm > 0 else norm
    corrections = (1.0 - adam.beta1**step, 1.0 - adam.beta2**step)
    if min(corrections) < 1e-6 or adam.eps < 1.0 / _SAFE:
        return False
    first, second = max(first, gradient), max(second, gradient * gradient)
    rate, ratio = adam.lr / corrections[0], first / adam.eps
    decayed = weight * (1.0 + adam.lr * adam.weight_decay)
    return all(value < _SAFE for value in (first, second / corrections[1], rate, ratio, decayed + rate * ratio))


def all_finite(tensors: Iterable[Tensor], ranks: torch.device | None = None) -> bool:
    """Whether every element is, of all ranks where a device for their collective is given."""
    wrong = sum(not bool(torch.isfinite(t.detach()).all()) for t in tensors)
    if ranks is not None:
        found = torch.tensor([float(wrong)], device=ranks)
        dist.all_reduce(found)
        wrong = int(found)
    return wrong == 0


def checked_step(
    optimizer: torch.optim.Optimizer,
    adam: AdamParams,
    gradients: list[Tensor],
    measures: Sequence[float],
    tensors: Sequence[Tensor],
    is_finite: Callable[[], bool],
) -> None:
    """Clips and makes one step. Raises RunError, with `tensors` (weights, moments, the number of steps) as before, when
    the gradient or the update is not finite.

    measures, the same on all ranks: the gradient's norm, the number of this step, and `sizes` as in surely_finite.
    is_finite: whether the weights and moments are, after the step."""
    norm, number, *sizes = measures
    if not norm < float("inf"):
        raise RunError(
            f"the gradient is not finite (norm {norm}); no weight was changed; lower the learning rate, or go on "
            "from a checkpoint before"
        )
    check_factors(adam, number)
    if adam.grad_clip_norm > 0 and norm > adam.grad_clip_norm:
        torch._foreach_mul_(gradients, adam.grad_clip_norm / norm)
    set_options(optimizer, adam)
    if surely_finite(adam, norm, number, sizes):
        optimizer.step()
        return
    kept = [t.clone() for t in tensors]
    optimizer.step()
    if not is_finite():
        for tensor, old in zip(tensors, kept, strict=True):
            tensor.copy_(old)
        raise update_not_finite(adam)


def update_not_finite(adam: AdamParams) -> RunError:
    """The refusal of such a step."""
    advice = (
        "with eps=0 a weight without gradient divides 0 by 0: give eps above 0, such as 1e-8"
        if adam.eps == 0
        else "lower the learning rate and weight decay, or give a larger eps"
    )
    return RunError(
        f"the update is not finite (lr={adam.lr:g}, eps={adam.eps:g}, weight_decay={adam.weight_decay:g}); no weight "
        f"was changed; {advice}"
    )
