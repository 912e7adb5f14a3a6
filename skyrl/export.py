"""A Hugging Face folder from any checkpoint, made by one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from skyrl.checkpoint import Checkpointer, read_checkpoint
from skyrl.config.load import from_dict
from skyrl.distributed.init import World
from skyrl.engine import Engine
from skyrl.loop import check_base, create_policy
from skyrl.planner.plan import make_plan, model_facts
from skyrl.types import UserError
from skyrl.weight_check import fingerprint


def export_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Writes the policy of a checkpoint, of any strategy and world size, as a Hugging Face folder; one process.

    The config that the checkpoint keeps says which model it is; an adapter needs the model under it to be there still.
    Raises UserError for a checkpoint that is damaged or not there, and for a `folder` that exists.
    """
    if folder.exists():
        raise UserError(f"export: {folder} exists; give a new folder")
    info = read_checkpoint(checkpoint)
    cfg = from_dict(info.state["config"])
    cfg = replace(cfg, strategy=replace(cfg.strategy, name="single", device="cpu"))
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    plan = make_plan(cfg, 1, model_facts=model_facts(cfg), device="cpu")
    engine = Engine(cfg, world, dtype=plan.dtype, strategy="single", max_row_tokens=plan.max_row_tokens)
    create_policy(engine, trainable=False)
    check_base(fingerprint(engine, "base") if cfg.model.lora.rank else "", info, cfg)
    tensors = engine.state(optimizer=False)
    reader = Checkpointer(
        checkpoint.parent, keep_last=0, keep_best=False, async_save=False, rank=0, world_size=1, group=None
    )
    reader.load(checkpoint, tensors, partial=True)
    engine.load_state(tensors, optimizer=False)
    engine.export("policy", folder)
