"""One GRPO step of skyrl against TRL's on the same shapes, side by side: processes of both alternate in one run.

8 prompts x 8 samples x 64 tokens, 3.1M parameters (Qwen3, 4 layers, hidden 256, vocabulary 512), bfloat16, 2 ranks with
1 thread each, no reference model. Both draw exactly the same number of tokens: nothing ends early. skyrl keeps float32
masters and moments, TRL updates bfloat16 weights; both score with a trivial reward. With --model the weights and the
tokenizer of that folder, without its chat template, stand in for the random ones; with --lora an adapter of that rank
on all linear layers is trained. The most memory that rank 0 has held is told in GiB.

    python benchmarks/rl_step.py --write
    python benchmarks/rl_step.py --model smollm2-135m --prompt-tokens 48 --steps 3 --warmup 1 --rounds 2 --write
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, write
from rl_prompts import prompt_texts

SHAPE = dict(layers=4, hidden=256, heads=4, kv_heads=2, ffn=704, vocab=512)


def ours(args: argparse.Namespace) -> None:
    """The measured process: a real run, opened as a user's, with the end token among ordinary tokens."""
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
            texts = prompt_texts(args.model, 512, args.prompt_tokens)
            return [
                Prompt(f"{split}/{i}", "even_characters", [{"role": "user", "content": t}]) for i, t in enumerate(texts)
            ]

    tiny = dict(hidden_size=SHAPE["hidden"], num_layers=SHAPE["layers"], num_heads=SHAPE["heads"])
    tiny.update(num_kv_heads=SHAPE["kv_heads"], ffn_size=SHAPE["ffn"], vocab_size=SHAPE["vocab"])
    cfg = load_config(
        [
            f"run.dir={args.folder}",
            f"run.threads={args.threads}",
            "algorithm=dapo",
            "algorithm.filters.zero_variance=false",
            "algorithm.filters.refill=false",
            "algorithm.filters.overlong=keep",
            "experiment=custom",
            *([f"model.path={args.model}"] if args.model else ["model=tiny"]),
            f"model.lora.rank={args.lora}",
            "env.name=even_characters",
            f"model.dtype={args.dtype}",
            *(f"model.tiny.{key}={value}" for key, value in tiny.items() if not args.model),
            f"batch.num_steps={args.steps + args.warmup}",
            f"batch.prompts_per_step={args.prompts}",
            f"batch.samples_per_prompt={args.samples}",
            f"batch.max_tokens_per_microbatch={args.microbatch}",
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
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        told = {"step": step, "sample": [r["time/collect_seconds:sum"] for r in keep], "gib": memory}
        print(json.dumps(told), flush=True)
    shutdown()


def without_template(model: Path, folder: Path) -> Path:
    """The model in `folder` without its chat template, so that a prompt is its text and nothing else on both sides."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("chat_template*", "*.safetensors"), dirs_exist_ok=True)
    for weights in model.glob("*.safetensors"):
        (folder / weights.name).symlink_to(weights.resolve())
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    return folder


def measure(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """One process group of one side; its per-step seconds and its memory."""
    own = ["--steps", str(args.steps), "--warmup", str(args.warmup), "--threads", str(args.threads)]
    own += ["--prompts", str(args.prompts), "--samples", str(args.samples), "--new-tokens", str(args.new_tokens)]
    own += ["--prompt-tokens", str(args.prompt_tokens), "--dtype", args.dtype]
    own += ["--model", args.model, "--lora", str(args.lora)]
    if side == "skyrl":
        target = [str(Path(__file__)), "--side", "skyrl", *own]
        target += ["--folder", tempfile.mkdtemp(), "--microbatch", str(args.microbatch)]
    else:
        shape = [x for k, v in SHAPE.items() for x in (f"--{k.replace('_', '-')}", str(v))]
        target = [str(ROOT / "benchmarks" / "peers" / "trl_grpo.py"), *own, *shape]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={args.ranks}", "--standalone"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(args.threads),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
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
    parser.add_argument(
        "--microbatch", type=int, default=8192, help="tokens in one pass of skyrl; TRL takes all at once"
    )
    parser.add_argument("--folder", default="", help="internal: the run's, the same on all ranks")
    parser.add_argument("--only", default="", help="measure one side: skyrl or trl")
    parser.add_argument("--model", default="", help="a folder with pretrained weights")
    parser.add_argument("--lora", type=int, default=0, help="the rank of an adapter; 0: all weights are trained")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.side:
        ours(args)
        return
    own_model = Path(args.model).name
    if args.model:
        args.model = str(without_template(Path(args.model), Path(tempfile.mkdtemp()) / own_model))
    sides = [args.only] if args.only else ["trl", "skyrl"]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(args.rounds):
        for side in sides:
            times = measure(side, args)
            step, sample = statistics.median(times["step"]), statistics.median(times["sample"])
            memory = times["gib"]
            found[side].append({"step_s": step, "sample_s": sample, "train_s": step - sample, "gib": memory})
            print(f"round {number} {side:6s} step {step:.3f} s, sampling {sample:.3f} s, {memory:.1f} GiB", flush=True)
    figures = {
        "shape": ({} if own_model else SHAPE)
        | {k: v for k, v in vars(args).items() if k not in ("side", "folder", "only", "write")}
        | {"model": own_model},
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
        name = f"rl_step_{own_model}" if own_model else "rl_step"
        print(write(f"{name}_lora" if args.lora else name, figures))


if __name__ == "__main__":
    main()
