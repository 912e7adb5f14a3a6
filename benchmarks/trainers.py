"""What the trainers beside RL do to a pretrained model on small data made here, before and after: how many held-out
pairs DPO and a reward model rank right; how many held-out sums a student adds right, and its KL to its teacher on its
own answers to them.

    python benchmarks/trainers.py models/smollm2-135m --write              # and --only dpo, reward_model or distill
    python benchmarks/trainers.py models/smollm2-135m --only distill --teacher runs/<run of smollm2_arithmetic>/export

Pairs: a question about a thing, answered kindly and rudely; things and answers of the held-out pairs occur in no other.
The teacher is the model after RL on sums of two digits (experiment=smollm2_arithmetic); without --teacher there is no
distillation. The student is the model as it was, and learns from the teacher alone, at what it answers itself, to sums
that RL asked in the same words; it is measured at temperature 1. Each run is one process. Numbers go to
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
SUMS = (  # as experiment=smollm2_arithmetic asks them, and right when they are right there
    "env.name=arithmetic",
    "env.options={min_digits: 2, max_digits: 2, before: [{role: system, content: ''}], "
    "template: 'What is {a} {op} {b}? Reply with the number only.', reward: last_digits, partial: 0.1}",
)


def pairs() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to learn from, and held-out ones: about things, with a kind and a rude answer that no row to learn has."""
    train: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
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


def runs(model: Path, folder: Path, teacher: Path | None, seed: int) -> dict[str, list[str]]:
    """The options of each run but for its folder."""
    train, held_out = pairs()
    files = [f"data.path={write_rows(folder / 'train.jsonl', train)}"]
    files.append(f"data.eval_path={write_rows(folder / 'test.jsonl', held_out)}")
    both = [f"seed={seed}", "model=hub", f"model.path={model}", "model.dtype=bfloat16"]
    both += ["checkpoint.every_steps=0", "checkpoint.keep_best=false", "run.hang_seconds=0", "eval.every_steps=0"]
    ranked = [*both, *files, "warmup.num_steps=0", "checkpoint.export=false"]
    ranked += ["batch.num_steps=12", "batch.prompts_per_step=6", "optim.lr=2e-5", "optim.warmup_steps=2"]
    sums = [*both, *SUMS, "model.activation_checkpointing=false", "batch.max_tokens_per_microbatch=2048"]
    sums += ["sampler.max_new_tokens=8", "eval.num_prompts=128", "eval.temperature=1"]
    made = {
        "dpo": ["experiment=dpo", *ranked],
        "reward_model": ["experiment=reward_model", *ranked],
    }
    if teacher is not None:
        made["distill"] = [
            "experiment=distill", *sums, "warmup.num_steps=0", "checkpoint.export=false",
            f"distill.teacher={teacher}", "distill.teacher_top_k=64",
            "batch.num_steps=60", "batch.prompts_per_step=32", "batch.samples_per_prompt=1",
            "optim.lr=1e-4", "optim.schedule=linear", "optim.warmup_steps=2",
        ]  # fmt: skip
    return made


def name_of(trainer: str, seed: int) -> str:
    """The name of a run and of its folder."""
    return trainer if seed == 1 else f"{trainer}_seed{seed}"


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
    parser.add_argument("--teacher", type=Path, help="a model that adds: the export of smollm2_arithmetic")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=["dpo", "reward_model", "distill"], action="append")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    known = json.loads(baseline("trainers").read_text())["runs"] if args.write and baseline("trainers").exists() else {}
    for trainer, options in runs(args.model, args.folder, args.teacher, args.seed).items():
        if args.only and trainer not in args.only:
            continue
        name = name_of(trainer, args.seed)
        place = args.folder / name
        command = [sys.executable, "-m", "skyrl.train", *options, f"run.dir={place}", "tracking.console=lines"]
        subprocess.run(command, check=True)
        found = {**figures(place), "load_average": os.getloadavg()[0]}
        places = {str(args.teacher): "TEACHER", str(args.model): "MODEL", str(args.folder): "FOLDER"}
        plain = list(options)
        for real, word in places.items():
            plain = [option.replace(real, word) for option in plain]
        known[name] = {"options": plain, **found}
        print(name, json.dumps(found))
        if args.write:
            sys.argv[1:] = [
                "MODEL",
                f"--seed {args.seed}",
                *(["--teacher TEACHER"] if args.teacher else []),
                *(f"--only {one}" for one in args.only or ()),
                "--write",
            ]
            print(write("trainers", {"runs": known}))


if __name__ == "__main__":
    main()
