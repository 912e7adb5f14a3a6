"""What runs learned: held-out accuracy before and after RL, per seed, read from run folders.

    torchrun --nproc_per_node=2 -m skyrl.train seed=1        # and seed=2, seed=3
    python benchmarks/learning.py arithmetic runs/arithmetic-seed1 runs/arithmetic-seed2 runs/arithmetic-seed3 --write

Prints one row per folder; with --write keeps the whole curves under baselines/<hardware>/learning_<name>.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from common import write

from skyrl.run_dir import read_metrics


def read_run(folder: Path) -> dict[str, Any]:
    """Figures of one finished run: seed, accuracies, curve, wall seconds of all steps, gap, command and commit."""
    records = read_metrics(folder / "metrics.jsonl")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    start = json.loads((folder / "versions.json").read_text())[-1]
    curve = [(r["step"], r["eval/accuracy:mean"]) for r in records if r["phase"] == "rl" and "eval/accuracy:mean" in r]
    warm = [r["eval/accuracy:mean"] for r in records if r["phase"] == "warmup" and "eval/accuracy:mean" in r]
    if not curve or curve[-1][0] != config["batch"]["num_steps"]:
        raise SystemExit(f"{folder}: not finished")
    return {
        "seed": config["seed"],
        "before_rl": warm[-1] if warm else curve[0][1],
        "after_rl": curve[-1][1],
        "curve": curve,
        "held_out_prompts": next(r["eval/episodes:sum"] for r in reversed(records) if "eval/episodes:sum" in r),
        "seconds": sum(r["time/step_seconds:sum"] for r in records),
        "logprob_gap_mean": max(r.get("logprob_gap:mean", 0.0) for r in records),
        "logprob_gap_max": max(r.get("logprob_gap:max", 0.0) for r in records),
        "steps": {"warmup": config["warmup"]["num_steps"], "rl": config["batch"]["num_steps"]},
        "dtype": config["model"]["dtype"],
        "versions": {key: start.get(key) for key in ("skyrl", "torch", "transformers", "python", "commit")},
    }


def main() -> None:
    """Reads the folders and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--run-command", default="", help="what was typed to make the folders, to be kept")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    runs = [read_run(folder) for folder in args.folders]
    for run in runs:
        print(
            f"seed {run['seed']}: {run['before_rl']:.3f} -> {run['after_rl']:.3f}, {run['seconds']:.0f} s, "
            f"gap mean {run['logprob_gap_mean']:.1e} max {run['logprob_gap_max']:.1e}"
        )
    if args.write:
        print(write(f"learning_{args.name}", {"run_command": args.run_command, "runs": runs}))


if __name__ == "__main__":
    main()
