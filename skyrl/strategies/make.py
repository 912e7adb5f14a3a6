"""Lays a model out over the ranks: from the name of a strategy to an instance of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from skyrl.config.schema import RunConfig
from skyrl.distributed.init import World
from skyrl.models.load import build_model, build_on_meta, load_into
from skyrl.strategies.base import Strategy
from skyrl.strategies.fsdp import FSDPStrategy
from skyrl.strategies.replicated import ReplicatedStrategy


def make_strategy(
    name: str, cfg: RunConfig, world: World, tokenizer: Any, *, dtype: torch.dtype, head: str, trainable: bool
) -> Strategy:
    """A module with the weights of `model.path` under strategy `name`, ready to train or, frozen, to score with.

    Collective. Raises UserError for a model that cannot be loaded or is not supported.
    """
    if name == "fsdp":
        master = torch.float32 if dtype == torch.bfloat16 else dtype

        def fill(module: nn.Module) -> None:
            load_into(module, cfg.model, device=world.device, seed=cfg.seed)

        return FSDPStrategy(
            lambda: build_on_meta(cfg.model, tokenizer, head=head, dtype=master),
            fill,
            world,
            dtype=dtype,
            reshard_after_forward=cfg.strategy.reshard_after_forward,
            trainable=trainable,
        )
    module = build_model(cfg.model, tokenizer, device=world.device, dtype=dtype, head=head, seed=cfg.seed)
    return ReplicatedStrategy(module, world, trainable=trainable)
