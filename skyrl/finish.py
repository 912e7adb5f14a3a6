"""The end of a run: last checkpoint, export, curves, and where to find them."""

from __future__ import annotations

from skyrl.distributed.collectives import on_leader
from skyrl.run import Run
from skyrl.tracking.curves import write_curves


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
