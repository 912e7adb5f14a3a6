"""What runs learned: held-out scores before and after RL, per seed, read from run folders.

    torchrun --nproc_per_node=2 -m skyrl.train seed=1        # and seed=2, seed=3
    python benchmarks/learning.py arithmetic runs/arithmetic-seed1 runs/arithmetic-seed2 runs/arithmetic-seed3 --write

Prints one row per folder; with --write keeps the whole curves under baselines/<hardware>/learning_<name>.json, with
--plot a picture beside it.

--began: folders whose exports the runs began from, in the same order: what these cost counts. --beside: runs of
supervised training alone, in the same order, that are read up to the same budget. A budget is counted in passes of a
token through the model, which a busy machine does not change: one for each that is sampled or read before sampling,
three for each that is trained (forward, and twice as much backward). Evaluations are left out. --show: further metrics
of evaluations, such as env/parses.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

import yaml
from common import baseline, write

from skyrl.evaluation.scores import exact_interval
from skyrl.run_dir import read_metrics

EVALUATED = re.compile(r"eval/([^/]+/)?accuracy:mean")  # of the run's own prompts, or of its one set of eval.sets


def passes(record: dict[str, Any]) -> float:
    """Of tokens through the model in one step."""
    sampled = record.get("sampler/tokens:sum", 0.0) + record.get("sampler/prefill_tokens:sum", 0.0)
    return 3 * record.get("tokens:sum", 0.0) + sampled


def evaluations(folder: Path, names: list[str], spent: float = 0.0) -> list[dict[str, Any]]:
    """Each evaluation of a run: phase, step in it, what was spent until then (after `spent` of another run), and its
    metrics."""
    found = []
    for record in read_metrics(folder / "metrics.jsonl"):
        spent += passes(record)
        prefix = next((key.removesuffix("accuracy:mean") for key in record if EVALUATED.fullmatch(key)), None)
        if prefix is not None:
            metrics = {name: record[f"{prefix}{name}:mean"] for name in ("accuracy", *names)}
            found.append({"phase": record["phase"], "step": record["step"], "passes": spent, **metrics})
    return found


def read_run(folder: Path, names: list[str], began: Path | None, beside: Path | None) -> dict[str, Any]:
    """Figures of one finished run: seed, accuracies, curve, wall seconds of all steps, gap, command and commit."""
    records = read_metrics(folder / "metrics.jsonl")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    start = json.loads((folder / "versions.json").read_text())[-1]
    curve = [(r["step"], r["eval/accuracy:mean"]) for r in records if r["phase"] == "rl" and "eval/accuracy:mean" in r]
    warm = [r["eval/accuracy:mean"] for r in records if r["phase"] == "warmup" and "eval/accuracy:mean" in r]
    if not curve or curve[-1][0] != config["warmup"]["num_steps"] + config["batch"]["num_steps"]:
        raise SystemExit(f"{folder}: not finished")
    run = {
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
    first = evaluations(began, names) if began else []
    spent = sum(map(passes, read_metrics(began / "metrics.jsonl"))) if began else 0.0
    told = evaluations(folder, names, spent)
    run["evaluations"] = [*first, *told]
    if began:  # what the first run was given, and what of it this one began with
        run["steps"]["warmup"] = yaml.safe_load((began / "config.yaml").read_text())["warmup"]["num_steps"]
    if beside:
        alone = evaluations(beside, names)
        inside = [one for one in alone if one["passes"] < told[-1]["passes"]]
        if len(inside) == len(alone):
            raise SystemExit(
                f"{beside}: has spent {alone[-1]['passes']:.3g}, less than {folder}: {told[-1]['passes']:.3g}"
            )
        run["supervised"] = alone[: len(inside) + 1]  # the first one that has spent as much, or more
    return run


def summary(runs: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """Of each metric, per seed and as the mean over seeds: the share of held-out prompts that fail it before RL, after,
    and after supervised training alone with the same budget, at its end and at its best evaluation, of which those of
    the warm-up are some; per seed with the exact 95 % interval (of greedy answers, which are right or wrong)."""
    found: dict[str, Any] = {}
    for name in ("accuracy", *names):
        shares: dict[str, list[float]] = {}
        for run in runs:
            rl = [one[name] for one in run["evaluations"] if one["phase"] == "rl"]
            warm = [one[name] for one in run["evaluations"] if one["phase"] != "rl"]
            shares.setdefault("before", []).append(1 - (warm or rl)[-1 if warm else 0])
            shares.setdefault("after", []).append(1 - rl[-1])
            if alone := [one[name] for one in run.get("supervised", ())]:
                shares.setdefault("supervised", []).append(1 - alone[-1])
                shares.setdefault("supervised_best", []).append(1 - max(*alone, *warm))
        prompts = int(runs[0]["held_out_prompts"])
        found[f"fails_{name}"] = {
            key: {
                "mean": statistics.fmean(values),
                "seeds": values,
                "intervals": [exact_interval(round(value * prompts), prompts) for value in values],
            }
            for key, values in shares.items()
        }
    return found


def plot(name: str, runs: list[dict[str, Any]], names: list[str]) -> Path:
    """The picture: each metric over the budget, RL after its warm-up, and supervised training alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = ["accuracy", *names]
    figure, panels = pyplot.subplots(1, len(shown), figsize=(5.2 * len(shown), 3.6), squeeze=False)
    for panel, metric in zip(panels[0], shown, strict=True):
        for run in runs:
            parts = [
                ("warm-up", "tab:orange", [one for one in run["evaluations"] if one["phase"] != "rl"]),
                ("RL", "tab:blue", [one for one in run["evaluations"] if one["phase"] == "rl"]),
                ("supervised alone", "tab:gray", run.get("supervised", [])),
            ]
            for label, color, points in parts:
                if points:
                    line = [one["passes"] / 1e6 for one in points], [one[metric] for one in points]
                    panel.plot(*line, color=color, marker=".", linewidth=1, label=label if run is runs[0] else None)
        panel.set_xlabel("10^6 passes of a token, training and sampling")
        panel.set_ylabel(f"held-out {metric}")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(f"{name}: {len(runs)} seeds, {int(runs[0]['held_out_prompts'])} held-out prompts, greedy")
    figure.tight_layout()
    path = baseline(f"learning_{name}").with_suffix(".png")
    figure.savefig(path, dpi=90)
    return path


def main() -> None:
    """Reads the folders and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--began", nargs="*", type=Path, default=[])
    parser.add_argument("--beside", nargs="*", type=Path, default=[])
    parser.add_argument("--show", nargs="*", default=[])
    parser.add_argument("--run-command", default="", help="what was typed to make the folders, to be kept")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    for others in (args.began, args.beside):
        if others and len(others) != len(args.folders):
            parser.error("--began and --beside have a folder for each run")
    nothing = [None] * len(args.folders)
    triples = zip(args.folders, args.began or nothing, args.beside or nothing, strict=True)
    runs = [read_run(folder, args.show, began, beside) for folder, began, beside in triples]
    for run in runs:
        print(
            f"seed {run['seed']}: {run['before_rl']:.3f} -> {run['after_rl']:.3f}, {run['seconds']:.0f} s, "
            f"gap mean {run['logprob_gap_mean']:.1e} max {run['logprob_gap_max']:.1e}"
        )
    found = summary(runs, args.show)
    for metric, shares in found.items():
        for key, one in shares.items():
            seeds = ", ".join(f"{value:.3f}" for value in one["seeds"])
            print(f"{metric:<16} {key:<16} {one['mean']:.3f}  ({seeds})")
    if args.write:
        print(write(f"learning_{args.name}", {"run_command": args.run_command, "summary": found, "runs": runs}))
    if args.plot:
        print(plot(args.name, runs, args.show))


if __name__ == "__main__":
    main()
