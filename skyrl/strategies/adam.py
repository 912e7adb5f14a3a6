"""What one AdamW step needs around torch's optimizer: an accurate norm, the refusal of what is not finite, clipping."""

from __future__ import annotations

import torch
from torch import Tensor

from skyrl.types import AdamParams, RunError

_BLOCK = 1024


def square_sum(tensor: Tensor) -> Tensor:
    """Sum of squares, float64 scalar on the tensor's device.

    torch adds float32 squares one after the other on a CPU, which over millions of elements is off by 1e-4; blocks
    summed in float32 and added in float64 are not, and cost no more.
    """
    flat = tensor.detach().reshape(-1)
    whole = flat.numel() // _BLOCK * _BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, _BLOCK), dim=1).double().square().sum()
    return blocks + torch.linalg.vector_norm(flat[whole:], dtype=torch.float64).square()


def check_finite(norm: float) -> None:
    """Raises RunError for the norm of a gradient that must not reach the weights."""
    if not norm < float("inf"):
        raise RunError(
            f"the gradient is not finite (norm {norm}); no weight was changed; lower the learning rate, or go on "
            "from a checkpoint before"
        )


def clip(gradients: list[Tensor], norm: float, adam: AdamParams) -> None:
    """Scales gradients, whose global norm is `norm`, down to adam.grad_clip_norm (0 = never)."""
    if adam.grad_clip_norm > 0 and norm > adam.grad_clip_norm:
        torch._foreach_mul_(gradients, adam.grad_clip_norm / norm)


def set_options(optimizer: torch.optim.Optimizer, adam: AdamParams) -> None:
    """Makes the next step one with these parameters: they belong to the call, not to the optimizer."""
    for group in optimizer.param_groups:
        group.update(lr=adam.lr, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay)
