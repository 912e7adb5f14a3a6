"""The norm of a gradient, accurate for any number of elements."""

from __future__ import annotations

import torch
from torch import Tensor

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
