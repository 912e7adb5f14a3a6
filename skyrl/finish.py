"""The end of a run: last checkpoint, export, curves, and where to find them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from skyrl.checkpoint import Checkpointer, read_checkpoint
from skyrl.config.load import from_dict
from skyrl.distributed.collectives import on_leader
from skyrl.distributed.init import World
from skyrl.engine import Engine
from skyrl.planner.plan import make_plan, model_facts
from skyrl.run import Run, check_base, create_policy
from skyrl.tracking.curves import write_curves
from skyrl.types import UserError
from skyrl.weight_check import fingerprint


def finish(run: Run) -> None:
    """Exports the policy, draws the curves and says where everything is. Safe to call again on a finished run."""
    cfg, folder, state = run.cfg, run.folder, run.state
    run.checkpointer.wait()
    for line in run.checkpointer.poll():
        run.say(line)
    if cfg.checkpoint.export:
        run.engine.export("policy", folder.export)
    run.tracker.offset()  # syncs
    picture = folder.path / "curves.png"
    curves = on_leader(run.world, lambda: write_curves(folder.metrics, picture))
    accuracy = f"{state.accuracy:.3f}" if state.accuracy is not None else "not measured"
    first = f" (before RL {state.first_accuracy:.3f})" if state.first_accuracy is not None else ""
    run.say(f"done: held-out accuracy {accuracy}{first}")
    run.say(f"  run folder  {folder.path}")
    run.say(f"  curves      {curves}")
    if cfg.checkpoint.export:
        run.say(f"  model       {folder.export}   (transformers.AutoModelForCausalLM.from_pretrained)")
        if cfg.model.lora.rank:
            run.say(f"  adapter     {folder.export / 'adapter'}   (peft.PeftModel.from_pretrained)")


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
