"""Lays a model out over the ranks: from the name of a strategy to an instance of it."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch

from skyrl.config.schema import RunConfig
from skyrl.distributed.init import World
from skyrl.pretrained.load import build_model, build_on_meta, load_into
from skyrl.strategies.base import Strategy
from skyrl.strategies.fsdp import FSDPStrategy
from skyrl.strategies.replicated import ReplicatedStrategy
from skyrl.strategies.zero import ZeroStrategy
from skyrl.tracking.advisories import warn_fallback
from skyrl.types import few


def make_strategy(
    name: str,
    cfg: RunConfig,
    world: World,
    tokenizer: Any,
    *,
    dtype: torch.dtype,
    head: Literal["logits", "value", "reward"],
    trainable: bool,
    masters: bool = False,
) -> Strategy:
    """A module with the weights of `model.path` under strategy `name`, ready to train or, frozen, to score with.

    `masters`: of a frozen one in full precision too, since it is going to be averaged (FSDP2 always has them). A frozen
    model beside a DeepSpeed one is FSDP2's. Collective. Raises UserError for a model that cannot be had.
    """
    offload, low = cfg.strategy.offload, dtype == torch.bfloat16
    given: Any = {"head": head, "max_row_tokens": cfg.batch.max_row_tokens}
    build = partial(build_on_meta, cfg.model, tokenizer, **given)
    if name.startswith("zero") and trainable:
        stage = int(name[-1])
        home = torch.device("cpu") if stage == 3 else world.device
        model = build_model(cfg.model, tokenizer, device=home, dtype=dtype, seed=cfg.seed, **given)
        if kept := sorted(model.kept(dtype)):
            warn_fallback(f"DeepSpeed rounds to bfloat16 what ddp has in float32: {few(kept)}")
        for p in map(model.get_parameter, kept):
            p.data = p.data.to(dtype)
        return ZeroStrategy(stage, model, partial(build, dtype=dtype), world, dtype=dtype, offload=offload)
    if name in ("single", "ddp"):
        module = build_model(cfg.model, tokenizer, device=world.device, dtype=dtype, seed=cfg.seed, **given)
        return ReplicatedStrategy(module, world, trainable=trainable, masters=masters, optimizer=cfg.optim.name)
    return FSDPStrategy(
        partial(build, dtype=torch.float32 if low else dtype),
        lambda module, device: load_into(module, cfg.model, device=device, seed=cfg.seed),
        world,
        dtype=dtype,
        shard_size=cfg.strategy.shard_size if name == "hsdp" else 0,
        offload=offload == "all",
        reshard_after_forward=cfg.strategy.reshard_after_forward,
        trainable=trainable,
        optimizer=cfg.optim.name,
    )
