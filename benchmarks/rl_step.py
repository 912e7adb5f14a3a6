"""One GRPO step of skyrl against TRL's on the same shapes, side by side: processes of both alternate in one run.

8 prompts x 8 samples x 64 tokens, 3.1M parameters (Qwen3, 4 layers, hidden 256, vocabulary 512), bfloat16, 2 ranks with
1 thread each, no reference model. Both draw exactly the same number of tokens: nothing ends early. skyrl keeps float32
masters and moments, TRL updates bfloat16 weights; both score with a trivial reward.

    python benchmarks/rl_step.py --write
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, write

SHAPE = dict(layers=4, hidden=256, heads=4, kv_heads=2, ffn=704, vocab=512)


def ours(args: argparse.Namespace) -> None:
    """The measured process: a real run, opened as a user's, with the end token among ordinary tokens."""
    import numpy as np

    from skyrl.api import Environment, StepResult, register_environment
    from skyrl.config.load import load_config
    from skyrl.distributed.init import shutdown
    from skyrl.loop import open_run
    from skyrl.trainers.rl import train_rl
    from skyrl.types import Prompt

    @register_environment("even_characters")
    class EvenCharacters(Environment):
        def step(self, text: str) -> StepResult:
            return StepResult(sum(ord(c) % 2 == 0 for c in text) / max(1, len(text)), True)

        @classmethod
        def dataset(cls, options, data, split, seed):
            letters = np.random.default_rng(0).integers(97, 123, (512, args.prompt_tokens))
            texts = ["".join(map(chr, row)) for row in letters]
            return [
                Prompt(f"{split}/{i}", "even_characters", [{"role": "user", "content": t}]) for i, t in enumerate(texts)
            ]

    folder = tempfile.mkdtemp() if os.environ.get("RANK", "0") == "0" else "unused"
    tiny = dict(hidden_size=SHAPE["hidden"], num_layers=SHAPE["layers"], num_heads=SHAPE["heads"])
    tiny.update(num_kv_heads=SHAPE["kv_heads"], ffn_size=SHAPE["ffn"], vocab_size=SHAPE["vocab"])
    cfg = load_config(
        [
            f"run.dir={folder}",
            f"run.threads={args.threads}",
            "algorithm=dapo",
            "algorithm.filters.zero_variance=false",
            "algorithm.filters.refill=false",
            "algorithm.filters.overlong=keep",
            "experiment=custom",
            "model=tiny",
            "env.name=even_characters",
            f"model.dtype={args.dtype}",
            *(f"model.tiny.{key}={value}" for key, value in tiny.items()),
            f"batch.num_steps={args.steps + args.warmup}",
            f"batch.prompts_per_step={args.prompts}",
            f"batch.samples_per_prompt={args.samples}",
            f"sampler.max_new_tokens={args.new_tokens}",
            "optim.lr=1e-4",
            "warmup.num_steps=0",
            "eval.every_steps=0",
            "eval.num_prompts=1",
            "checkpoint.every_steps=0",
            "checkpoint.export=false",
            "tracking.console=off",
            "tracking.rollouts_every=0",
        ]
    )
    run = open_run(cfg)
    run.engine.chat.end_tokens = {}
    with run:
        train_rl(run)
    if run.world.is_leader:
        records = [json.loads(line) for line in run.folder.metrics.read_text().splitlines()]
        records = [r for r in records if r["step"] > args.warmup]
        assert all(r["sampled_tokens:sum"] == args.prompts * args.samples * args.new_tokens for r in records)
        # the last step holds the closing evaluation and checkpoint
        keep = [r for r in records if "time/evaluate_seconds:sum" not in r]
        step = [r["time/step_seconds:sum"] for r in keep]
        print(json.dumps({"step": step, "sample": [r["time/collect_seconds:sum"] for r in keep]}), flush=True)
    shutdown()


def measure(side: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """One process group of one side; its per-step seconds."""
    own = ["--steps", str(args.steps), "--warmup", str(args.warmup), "--threads", str(args.threads)]
    own += ["--prompts", str(args.prompts), "--samples", str(args.samples), "--new-tokens", str(args.new_tokens)]
    own += ["--prompt-tokens", str(args.prompt_tokens), "--dtype", args.dtype]
    if side == "skyrl":
        target = [str(Path(__file__)), "--side", "skyrl", *own]
    else:
        shape = [x for k, v in SHAPE.items() for x in (f"--{k.replace('_', '-')}", str(v))]
        target = [str(ROOT / "benchmarks" / "peers" / "trl_grpo.py"), *own, *shape]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={args.ranks}", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(ROOT)}
    environment.update(HF_HUB_OFFLINE="1", WANDB_DISABLED="true", TRL_EXPERIMENTAL_SILENCE="1")
    done = subprocess.run([*command, *target], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def main() -> None:
    """Alternates the two sides and prints, or with --write keeps, medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in dict(prompts=8, samples=8, prompt_tokens=16, new_tokens=64, steps=12, warmup=2).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    for name, default in dict(threads=1, ranks=2, rounds=3).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--side", default="", help="internal: skyrl")
    parser.add_argument("--only", default="", help="measure one side: skyrl or trl")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.side:
        ours(args)
        return
    sides = [args.only] if args.only else ["trl", "skyrl"]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(args.rounds):
        for side in sides:
            times = measure(side, args)
            step, sample = statistics.median(times["step"]), statistics.median(times["sample"])
            found[side].append({"step_s": step, "sample_s": sample, "train_s": step - sample})
            print(f"round {number} {side:6s} step {step:.3f} s, sampling {sample:.3f} s", flush=True)
    figures = {
        "shape": {**SHAPE, **{k: v for k, v in vars(args).items() if k not in ("side", "only", "write")}},
        "rounds": found,
    }
    if len(sides) == 2:
        for key in ("step_s", "sample_s", "train_s"):
            ratios = [peer[key] / own[key] for peer, own in zip(found["trl"], found["skyrl"], strict=True)]
            figures[f"times_faster_{key[:-2]}"] = {
                "median": statistics.median(ratios),
                "min": min(ratios),
                "max": max(ratios),
            }
            print(f"{key}: {statistics.median(ratios):.2f}x faster than trl ({min(ratios):.2f} to {max(ratios):.2f})")
    if args.write:
        print(write("rl_step", figures))


if __name__ == "__main__":
    main()
