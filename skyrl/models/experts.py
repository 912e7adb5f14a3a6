"""Which experts a mixture's routers choose: recorded by the sampler, replayed in training, evened out by a loss.

Where two of a router's scores nearly tie, rounding decides, and a token that goes another way in training than in
sampling has another log-probability, as no rounding of a product would give it. With replay (rollout routing replay,
arXiv 2510.11370) a trained row goes the way it was sampled: the choice is the sampler's, and the weights of the chosen
experts are computed, with their gradient, as ever.

All routers of transformers that are met here choose by one torch.topk over their experts, which is where we step in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from skyrl.kernels import exact_ops
from skyrl.models.lora import AdaptableModel, is_router
from skyrl.types import Microbatch, UserError


class Routing:
    """The routers of one model, first layer to last, and what they are told now: nothing outside of `recording` and
    `replaying`. Each layer writes at its own number, so layers that are computed again change nothing."""

    def __init__(self, routers: list[Any]) -> None:
        self.layers, self.k, self.experts = len(routers), int(routers[0].top_k), experts_behind(routers[0])
        self.chosen: dict[int, Tensor] | None = None  # [T, k] of each layer, while they are recorded
        self.batch: Microbatch | None = None
        self.shared = False  # whether the layers see each shared beginning of the batch once
        self.balance: dict[int, Tensor] | None = None  # [D] of each layer, where it is asked for
        for number, router in enumerate(routers):
            router.skyrl_routing = (self, number)
            exact_ops.replace_forward(router, _route)

    def given(self, layer: int) -> Tensor | None:
        """The choices [T, k] that a layer is to make, -1 where it is free; None = all free."""
        if self.batch is None or self.batch.experts_TLK is None:
            return None
        given_TK = self.batch.experts_TLK[:, layer].long()
        return given_TK[self.batch.distinct_U] if self.shared else given_TK

    def balance_D(self) -> Tensor:
        """How unevenly the experts are used by each row, mean over layers: 1 = evenly, at most experts / k.

        DeepSeek-V3's sequence-wise balance loss (arXiv 2412.19437, eq. 17 to 20) without its factor: for each expert,
        how often the row's tokens chose it times their mean probability of it. By rows and not by micro-batches, as
        that of Switch Transformers is, so that it is a sum over rows like every loss here. The gradient goes
        through the probabilities."""
        assert self.balance, "no router was asked"
        return torch.stack([self.balance[layer] for layer in range(self.layers)]).mean(0)

    def add_balance(self, layer: int, logits: Tensor, chosen: Tensor, sigmoid: bool) -> None:
        """Adds a layer's part: its router's logits [T, experts], its choices [T, k], and whether sigmoids are its
        scores."""
        assert self.batch is not None and self.balance is not None
        probs = logits.float().sigmoid() if sigmoid else logits.float().softmax(-1)
        probs = probs / probs.sum(-1, keepdim=True)
        if self.shared:
            probs, chosen = probs[self.batch.place_T], chosen[self.batch.place_T]
        rows = len(self.batch.lengths)
        count_D1 = self.batch.starts_S1.diff().to(probs.dtype).unsqueeze(1)
        used = torch.zeros_like(probs).scatter_(1, chosen, self.experts / self.k)
        used_DE, probs_DE = (
            probs.new_zeros(rows, self.experts).index_add(0, self.batch.row_T, x) for x in (used, probs)
        )
        self.balance[layer] = (used_DE / count_D1 * probs_DE / count_D1).sum(1)


def routing_of(model: AdaptableModel) -> Routing:
    """The routers of a model, hooked once. Raises UserError for a model without any, or with others than we know."""
    if model.routing is None:
        found = [m for layer in model.layers() for path, m in layer.named_modules() if path and is_router(path, layer)]
        if not found or not all(hasattr(router, "top_k") and experts_behind(router) for router in found):
            raise UserError(
                f"algorithm.router: model type {model.config.model_type!r} has no experts behind routers of "
                "transformers' interface; leave algorithm.router.replay and algorithm.router.aux_coef out"
            )
        model.routing = Routing(found)
    return model.routing


def experts_behind(router: Any) -> int:
    """How many experts a router chooses among; 0 where it does not say. ZeRO-3 leaves its weight no shape to ask."""
    return int(getattr(router, "n_routed_experts", 0) or getattr(router, "num_experts", 0))


@contextmanager
def recording(model: AdaptableModel) -> Iterator[dict[int, Tensor]]:
    """Inside, what each router chooses is kept: layer -> [T, k], of the last forward pass."""
    routing = routing_of(model)
    routing.chosen = {}
    try:
        yield routing.chosen
    finally:
        routing.chosen = None


@contextmanager
def replaying(model: AdaptableModel, batch: Microbatch, *, balance: bool) -> Iterator[Routing | None]:
    """Inside, the tokens of `batch` go to the experts that it names, where it names any, and with `balance` it is
    noted how evenly. Must last until the backward pass is over: checkpointed layers are computed again there."""
    if batch.experts_TLK is None and not balance:
        yield None
        return
    routing = routing_of(model)
    if batch.experts_TLK is not None and batch.experts_TLK.shape[1:] != (routing.layers, routing.k):
        given = "x".join(map(str, batch.experts_TLK.shape[1:]))
        raise UserError(f"rows name {given} experts a token, the model has {routing.layers}x{routing.k}")
    routing.batch, routing.shared, routing.balance = batch, False, {} if balance else None
    try:
        yield routing
    finally:
        routing.batch, routing.balance = None, None


class _TopK(TorchFunctionMode):
    """The top-k over all experts inside: notes its choice, which is `given` where that is not below 0, and whether
    scores are sigmoids. Where a choice is given no group of experts is left out before it (DeepSeek V2 would give the
    experts of other groups than its own the weight 0)."""

    def __init__(self, experts: int, k: int, given: Tensor | None) -> None:
        super().__init__()
        self.shape, self.given, self.sigmoid = (experts, k), given, False
        self.chosen: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), getattr(func, "__name__", "")
        if name == "sigmoid":
            self.sigmoid = True
        elif name == "masked_fill" and self.given is not None and out.shape == (len(self.given), self.shape[0]):
            return torch.where(self.given[:, :1] < 0, out, args[0])
        if name != "topk" or args[0].ndim != 2:
            return out
        if (args[0].shape[-1], out.indices.shape[-1]) != self.shape:
            return out  # over groups of experts, which choose first
        assert self.chosen is None, "a router that chooses twice"
        self.chosen = out.indices
        if self.given is not None:
            self.chosen = chosen = torch.where(self.given < 0, out.indices, self.given)
            return torch.return_types.topk((args[0].gather(-1, chosen), chosen))
        return out


def _route(module: Any, plain: Any, *args: Any) -> Any:
    routing, layer = module.skyrl_routing
    if routing.chosen is None and routing.batch is None:
        return plain(*args)
    with _TopK(routing.experts, routing.k, routing.given(layer)) as choice:
        out = plain(*args)
    if choice.chosen is None:
        raise UserError(
            f"algorithm.router: {type(module).__name__} does not choose by one top-k over its experts; leave it out"
        )
    if routing.chosen is not None:
        routing.chosen[layer] = choice.chosen
    if routing.balance is not None:
        routing.add_balance(layer, out[0], choice.chosen, choice.sigmoid)
    return out
