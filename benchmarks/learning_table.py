"""What each algorithm recipe learns on one small task with one budget: reward, KL to the start, length.

    python benchmarks/learning_table.py --seeds 1 2 --write            # every recipe of conf/algorithm
    python benchmarks/learning_table.py grpo maxrl --seeds 1 --minutes 5

Sums of one-digit numbers (a right digit counts a quarter), a model of 19,000 parameters, a supervised warm-up that
gets some of them right, then the same number of steps, prompts and samples for each recipe, with its own parameters
and one learning rate for all. It says that a recipe learns, not which one is best: nothing was tuned. Runs share
one process; each is written down when done.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, write

from skyrl.config.load import load_config
from skyrl.run_dir import read_metrics
from skyrl.trainers import run_trainer

BUDGET = (
    "model.tiny.hidden_size=32 model.tiny.num_heads=2 model.tiny.num_kv_heads=1 model.tiny.num_layers=2 "
    "model.tiny.ffn_size=48 env.options.min_digits=1 env.options.max_digits=1 env.options.work=false "
    "env.options.partial=0.25 sampler.max_new_tokens=4 warmup.num_steps=80 warmup.rows_per_step=64 warmup.lr=1e-2 "
    "batch.num_steps=30 batch.prompts_per_step=16 batch.samples_per_prompt=8 optim.lr=2e-3 eval.num_prompts=64 "
    "eval.every_steps=10 checkpoint.export=false checkpoint.async_save=false tracking.console=off run.threads=1"
).split()
# The distance to the start is measured with a weight that does nothing.
MEASURED = ["algorithm.kl.coef=1e-9", "algorithm.kl.estimator=k2"]


def rl_steps() -> int:
    """Steps of RL of each run."""
    return int(next(one for one in BUDGET if one.startswith("batch.num_steps=")).partition("=")[2])


def learn(recipe: str, seed: int) -> dict[str, Any]:
    """Figures of one run."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        options = [*BUDGET, *MEASURED, f"algorithm={recipe}", f"seed={seed}", f"run.dir={folder}/run"]
        run_trainer("train", load_config(options))
        records = read_metrics(Path(folder) / "run" / "metrics.jsonl")
    rl = [record for record in records if record["phase"] == "rl" and "reward:mean" in record]
    if len(rl) != rl_steps():
        raise SystemExit(f"{recipe}, seed {seed}: not finished")
    learned = [record for record in rl if "kl/behaviour_reference:mean" in record]
    return {
        "recipe": recipe,
        "seed": seed,
        "reward_first": rl[0]["reward:mean"],
        "reward_last_5": statistics.mean(record["reward:mean"] for record in rl[-5:]),
        "held_out": [record["eval/accuracy:mean"] for record in records if "eval/accuracy:mean" in record],
        "kl_to_start": learned[-1]["kl/behaviour_reference:mean"] if learned else None,
        "length_first": rl[0]["length:mean"],
        "length_last": rl[-1]["length:mean"],
        "seconds": time.monotonic() - began,
    }


def table(runs: list[dict[str, Any]]) -> str:
    """One line per recipe: reward of the first step, mean of the last five with its range over seeds, and the rest."""
    lines = [
        "| recipe | seeds | reward, first | last 5 | range | KL to the start | length |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe in dict.fromkeys(run["recipe"] for run in runs):
        mine = [run for run in runs if run["recipe"] == recipe]
        first, last, kl, length = (
            [run[key] for run in mine if run[key] is not None]
            for key in ("reward_first", "reward_last_5", "kl_to_start", "length_last")
        )
        mean = statistics.mean
        lines.append(
            f"| {recipe} | {len(mine)} | {mean(first):.2f} | {mean(last):.2f} | {min(last):.2f} to {max(last):.2f} "
            f"| {mean(kl) if kl else float('nan'):.3f} | {mean(length):.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs what was asked for and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.stem for path in (ROOT / "conf" / "algorithm").glob("*.yaml"))
    parser.add_argument("recipes", nargs="*", default=[], help=f"of: {', '.join(known)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no run begins after this many")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    began = time.monotonic()
    for recipe in args.recipes or known:
        for seed in args.seeds:
            if time.monotonic() - began > 60 * args.minutes:
                continue
            try:
                runs.append(learn(recipe, seed))
            except Exception as error:  # what a recipe refuses is said in the table's file
                failed[recipe] = f"{type(error).__name__}: {error}"
                continue
            print({key: value for key, value in runs[-1].items() if key != "held_out"}, flush=True)
            if args.write:
                write("learning_table", {"budget": " ".join(BUDGET), "runs": runs, "failed": failed})
    print(table(runs))
    for recipe, why in failed.items():
        print(f"{recipe}: {why}")


if __name__ == "__main__":
    main()
