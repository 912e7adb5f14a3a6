"""What of a step at the tiny size is work on tokens, and what is the frame around it, by the loop's own processor time.

The default recipe on one rank, every step saved and written down (checkpoint.every_steps=1, rollouts_every=1), which
is more than a run does. Timed by the thread's own clock, each inside the loop and once: sampling (the sampler's steps),
environment calls, forward and backward, the optimizer; and the overheads: the rest of the collection (episodes,
rewards, rows), packing of micro-batches, moving rows between ranks, tracking, checkpoints.

    python benchmarks/step_parts.py --write
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections import defaultdict
from typing import Any

from common import write

WORK = ("sampling", "forward_backward", "optimizer")


def main() -> None:
    """Runs it and prints each part's share of a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--skip", type=int, default=3, help="first steps that are not counted")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("options", nargs="*")
    args = parser.parse_args()
    import skyrl.model as model
    import skyrl.trainers.generation as generation
    import skyrl.trainers.rl as rl
    from skyrl.checkpoint.checkpointer import Checkpointer
    from skyrl.config.load import load_config
    from skyrl.engine import Engine
    from skyrl.model import Model
    from skyrl.run import Run
    from skyrl.sampler.sampler import Sampler
    from skyrl.strategies.replicated import ReplicatedStrategy
    from skyrl.tracking.base import Tracker
    from skyrl.trainers import run_trainer
    from skyrl.workers.calls import LocalCalls

    spent: dict[str, float] = defaultdict(float)
    stack: list[float] = []  # seconds of the parts inside the one that runs

    def timed(owner: Any, name: str, part: str) -> None:
        real = getattr(owner, name)

        @functools.wraps(real)
        def call(*given: Any, **more: Any) -> Any:
            stack.append(0.0)
            start = time.thread_time()
            try:
                return real(*given, **more)
            finally:
                took = time.thread_time() - start
                spent[part] += took - stack.pop()
                if stack:
                    stack[-1] += took

        setattr(owner, name, call)

    timed(Sampler, "step", "sampling")
    for name in ("open", "step", "poll", "close"):
        timed(LocalCalls, name, "environment")
    timed(generation, "rollout", "collection")
    timed(generation, "note_groups", "collection")
    timed(generation, "record_episodes", "records")
    timed(rl, "to_rows", "rows")
    for name in ("add_reference", "add_advantages", "add_old_logprobs", "apply_reduction", "note_advantages"):
        timed(rl, name, "rows")
    timed(rl, "rebalance", "moving rows")
    timed(Model, "run_microbatch", "forward_backward")
    timed(ReplicatedStrategy, "optim_step", "optimizer")
    timed(model, "collate", "packing")
    for name in ("_plan_call", "_run"):
        timed(Engine, name, "packing")
    for name in ("add", "say", "progress"):
        timed(Tracker, name, "tracking")
    timed(Checkpointer, "save", "checkpoints")
    each: list[dict[str, float]] = []
    finish = Run.finish_step
    timed(Run, "finish_step", "tracking")
    counted = Run.finish_step

    def end(run: Run, step: int, phase: str) -> Any:
        out = counted(run, step, phase)
        if phase == "rl":
            each.append({**spent, "step": time.thread_time()})
        return out

    assert finish is not counted
    Run.finish_step = end  # type: ignore[assignment,method-assign]
    own = [f"run.dir={tempfile.mkdtemp()}/run", "run.threads=1", f"batch.num_steps={args.steps}", "warmup.num_steps=4"]
    own += ["eval.every_steps=0", "eval.num_prompts=1", "checkpoint.export=false", "tracking.console=lines"]
    own += ["checkpoint.every_steps=1", "tracking.rollouts_every=1"]
    run_trainer("train", load_config([*own, *args.options]))
    counted_steps = each[args.skip :]
    pairs = zip(counted_steps, counted_steps[1:], strict=False)
    steps = [{key: b.get(key, 0.0) - a.get(key, 0.0) for key in b} for a, b in pairs]
    middle = {key: statistics.median(one[key] for one in steps) for key in steps[0]}
    middle["the rest"] = middle["step"] - sum(value for key, value in middle.items() if key != "step")
    overhead = sum(value for key, value in middle.items() if key not in (*WORK, "step"))
    for key, value in sorted(middle.items(), key=lambda pair: -pair[1]):
        print(f"{key:<18} {1000 * value:8.2f} ms  {value / middle['step']:7.2%}")
    print(f"{'overheads':<18} {1000 * overhead:8.2f} ms  {overhead / middle['step']:7.2%}")
    if args.write:
        figures = {key: round(1000 * value, 3) for key, value in middle.items()}
        print(write("step_parts", {"milliseconds_a_step": figures, "overheads": round(overhead / middle["step"], 4)}))


if __name__ == "__main__":
    main()
