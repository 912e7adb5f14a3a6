"""Which optimizer steps the masters: AdamW (adam.py), Muon for the matrices of hidden layers, or AdamW in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from skyrl.strategies.adam import make_adam
from skyrl.strategies.base import full_tensor, local_tensor
from skyrl.types import UserError

BOUNDS = ("absmax1", "absmax2")  # the largest of each block of both moments in 8 bits
QUANTISED = ("state1", "state2", *BOUNDS)  # what bitsandbytes keeps of a tensor, beside constants
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
STEPS = 5
TINY = 1e-7


def matrix_names(module: Any) -> set[str]:
    """The parameters that Muon steps: matrices of decoder layers, and stacks of them (a mixture's experts). Embeddings,
    heads, norms, biases and convolutions are AdamW's."""
    inside = {
        id(p)
        for layer in module.layers()
        for name, p in layer.named_parameters()
        if p.ndim == 2 or (p.ndim == 3 and "conv" not in name)
    }
    return {name for name, p in module.named_parameters() if id(p) in inside}


def make_optimizer(
    name: str, masters: Sequence[Tensor], matrices: Sequence[Tensor], device: torch.device, *, fused: bool
) -> torch.optim.Optimizer:
    """The optimizer of these masters, with its state from the start; `matrices` are stepped by Muon, on `device`.
    Raises UserError where its package is missing."""
    if name == "adamw8bit":
        return _make_adam8bit(masters)
    adam = make_adam(masters, fused=fused)
    return Muon(adam, matrices, device) if name == "muon" else adam


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: the direction of a matrix's step is U V^T of U S V^T, which is the mean of its
    gradients with Nesterov's look ahead. All else is stepped by `adam`, whose state and options these are too.

    Source: Jordan et al. 2024 (Muon: An optimizer for hidden layers in neural networks, blog), the quintic
    Newton-Schulz iteration with its coefficients; the step's size and decoupled weight decay: Liu et al. 2025 (Muon is
    Scalable for LLM Training), arXiv 2502.16982: 0.2 sqrt(max(rows, columns)), so that one learning rate serves both
    optimizers. Differs: the iteration is in bfloat16 on a GPU, as published, and on a CPU in the masters' numbers. A
    sharded matrix is gathered, made orthogonal on every rank, and each rank keeps its part: one gather of a float32
    matrix at a time.
    """

    def __init__(self, adam: torch.optim.AdamW, matrices: Sequence[Tensor], device: torch.device) -> None:
        self.adam, self.matrices, self.device = adam, list(matrices), device
        self.param_groups, self.state = adam.param_groups, adam.state
        self.param_groups[0]["momentum"] = 0.0
        for p in self.matrices:
            self.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p)}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of both."""
        self.adam.zero_grad(set_to_none)
        for p in self.matrices:
            p.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both; options are those that `set_options` has put into the groups."""
        self.adam.step()
        group = self.param_groups[0]
        for p in self.matrices:
            state, grad = self.state[p], p.grad
            assert grad is not None
            mean, own = state["exp_avg"], local_tensor(p)
            local_tensor(mean).lerp_(local_tensor(grad), 1.0 - group["momentum"])
            ahead = grad.lerp(mean, group["momentum"])
            direction = _part_of(orthogonal(full_tensor(ahead.to(self.device))), p)
            size = 0.2 * max(p.shape[-2:]) ** 0.5
            own.mul_(1.0 - group["lr"] * group["weight_decay"]).sub_(direction.to(own), alpha=group["lr"] * size)
            state["step"] += 1


def orthogonal(matrix: Tensor) -> Tensor:
    """U V^T of the matrix (or of each in a stack) U S V^T, about: singular values of 0.7 to 1.2; zero stays zero."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + TINY)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).to(matrix.dtype)


def _part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has, cut as `like` is; nothing is sent."""
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    if whole.device.type != mesh.device_type:
        whole = whole.to(mesh.device_type)
    spread = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return spread.redistribute(placements=like.placements).to_local()


def _make_adam8bit(masters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW, whose moments are in 8 bits by blocks of 256 (Dettmers et al. 2021, arXiv 2110.02861). Its
    state is there from the start, and the number of steps is a tensor, as in torch's."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"optim.name=adamw8bit: bitsandbytes cannot be imported ({error}); install the extra with "
            "pip install 'skyrl-spmd[bitsandbytes]', or use optim.name=adamw"
        ) from None

    class _Counted(AdamW8bit):  # type: ignore[misc]
        def update_step(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
            state, count = self.state[p], self.state[p]["step"]
            state["step"] = int(count)
            super().update_step(group, p, gindex, pindex)
            state["step"] = count.add_(1)

    adam = _Counted([nn.Parameter(p, requires_grad=True) if not isinstance(p, nn.Parameter) else p for p in masters])
    args: Any = adam.args
    args.min_8bit_size = 0  # one flat buffer: small tensors in it are in 8 bits as well
    for index, p in enumerate(adam.param_groups[0]["params"]):
        adam.init_state(adam.param_groups[0], p, 0, index)
        adam.state[p]["step"] = torch.zeros((), device=p.device)
    return adam
