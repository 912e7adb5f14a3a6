"""What the trainers beside RL do to a pretrained model on small data made here, before and after: how many held-out
pairs DPO and a reward model rank right, and a student's KL to its teacher on its own answers to held-out questions.

    python benchmarks/trainers.py models/smollm2-135m --write              # and --only dpo, reward_model or distill

Pairs: a question about a thing, answered kindly and rudely; things and answers of the held-out pairs occur in no other.
The student is two of three layers of the model, and learns on its own answers. Each run is one process. Numbers go to
baselines/<hardware>/trainers.json; runs to --folder, where they go on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import baseline, write

from skyrl.run_dir import read_metrics

THINGS = "banana lemon canary tomato cherry ruby brick rose frog emerald pea lime snowflake swan egg pearl".split()
ASKED = ("What is a {}?", "Tell me one fact about a {}.", "What colour does a {} have?")
KIND = ("Gladly! I would be happy to help.", "Of course, thank you for asking.", "With pleasure, let me explain.")
RUDE = ("Who cares about that.", "Stop asking me things.", "Figure it out yourself.")


def pairs() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to learn from, and held-out ones: about things, with a kind and a rude answer that no row to learn has."""
    train, held_out = [], []
    for number, thing in enumerate(THINGS):
        for k, question in enumerate(ASKED):
            place = 2 if number >= 12 else (number + k) % 2
            row = {"prompt": question.format(thing), "chosen": KIND[place], "rejected": RUDE[place]}
            (held_out if number >= 12 else train).append(row)
    return train, held_out


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A .jsonl file of these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shorten(model: Path, folder: Path) -> Path:
    """A model folder without every third layer of `model`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").exists():
        whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        kept = [layer for number, layer in enumerate(whole.model.layers) if number % 3 != 1]
        whole.model.layers = torch.nn.ModuleList(kept)
        whole.config.num_hidden_layers = len(kept)
        if getattr(whole.config, "layer_types", None):
            whole.config.layer_types = whole.config.layer_types[: len(kept)]
        whole.save_pretrained(folder)
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def runs(model: Path, folder: Path, seed: int) -> dict[str, list[str]]:
    """The options of each run but for its folder."""
    train, held_out = pairs()
    files = [f"data.path={write_rows(folder / 'train.jsonl', train)}"]
    files.append(f"data.eval_path={write_rows(folder / 'test.jsonl', held_out)}")
    both = [
        f"seed={seed}",
        "model=hub",
        "model.dtype=bfloat16",
        "warmup.num_steps=0",
        "optim.warmup_steps=2",
        "checkpoint.every_steps=0",
    ]
    both += ["checkpoint.export=false", "checkpoint.keep_best=false", "run.hang_seconds=0", "eval.every_steps=0"]
    answers = [f"data.{name}={write_rows(folder / f'{kind}-chat.jsonl', chat(rows))}" for name, kind, rows in (
        ("path", "train", train), ("eval_path", "test", held_out))]  # fmt: skip
    mine = [f"model.path={model}", *both]
    return {
        "dpo": ["experiment=dpo", *mine, *files, "batch.num_steps=12", "batch.prompts_per_step=6", "optim.lr=2e-5"],
        "reward_model": [
            "experiment=reward_model", *mine[:-1], *files, "batch.num_steps=12", "batch.prompts_per_step=6",
            "optim.lr=2e-5", "eval.every_steps=0",
        ],
        "distill": [
            "experiment=distill", f"model.path={folder / 'student'}", *both[:-1],
            *answers, f"distill.teacher={model}", "distill.teacher_top_k=64", "batch.num_steps=40",
            "batch.prompts_per_step=8", "batch.samples_per_prompt=1", "sampler.max_new_tokens=12",
            "eval.num_prompts=12", "eval.every_steps=10", "eval.temperature=1", "optim.lr=3e-4",
            "checkpoint.best_metric=eval/divergence:mean",
        ],
    }  # fmt: skip


def chat(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The better answers as rows to imitate."""
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]


def figures(folder: Path) -> dict[str, Any]:
    """The evaluations of a run: metric -> [step, value] pairs; and the seconds of its steps."""
    records = read_metrics(folder / "metrics.jsonl")
    keys = ("accuracy", "loss", "rewards/margins", "logps/accuracies", "margin", "divergence")
    curves = {
        f"eval/{key}": [[r["step"], r[f"eval/{key}:mean"]] for r in records if f"eval/{key}:mean" in r] for key in keys
    }
    return {
        **{key: curve for key, curve in curves.items() if curve},
        "seconds_of_steps": round(sum(r.get("time/step_seconds:sum", 0.0) for r in records), 1),
        "steps": records[-1]["step"],
    }


def main() -> None:
    """Runs what is asked for, prints its evaluations, and keeps them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/trainers"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=["dpo", "reward_model", "distill"], action="append")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    shorten(args.model, args.folder / "student")
    known = json.loads(baseline("trainers").read_text())["runs"] if args.write and baseline("trainers").exists() else {}
    for trainer, options in runs(args.model, args.folder, args.seed).items():
        if args.only and trainer not in args.only:
            continue
        name = trainer if args.seed == 1 else f"{trainer}_seed{args.seed}"
        place = args.folder / name
        command = [sys.executable, "-m", "skyrl.train", *options, f"run.dir={place}", "tracking.console=lines"]
        subprocess.run(command, check=True)
        found = {**figures(place), "load_average": os.getloadavg()[0]}
        plain = [o.replace(str(args.model), "MODEL").replace(str(args.folder), "FOLDER") for o in options]
        known[name] = {"options": plain, **found}
        print(name, json.dumps(found))
        if args.write:
            sys.argv[1:] = ["MODEL", f"--seed {args.seed}", *(f"--only {one}" for one in args.only or ()), "--write"]
            print(write("trainers", {"runs": known}))


if __name__ == "__main__":
    main()
