"""What each algorithm recipe learns on the default task with one budget: held-out accuracy before and after, KL to the
start, length.

    python benchmarks/learning_table.py --write                        # every recipe of conf/algorithm, seeds 1 and 2
    python benchmarks/learning_table.py grpo maxrl --seeds 1 --folder runs/mine

Two-digit sums with their work, as in the default recipe, and a model of half a million parameters instead of three.
Each seed has one supervised warm-up, whose export all its recipes begin from; then all have the same number of steps,
prompts and samples and one learning rate, with the recipe's own parameters; steps in which a recipe trains its critic
alone come on top. Losses that have a ratio take two updates
per batch (what clips has nothing to clip in the first), those without one take one, as they must. It says whether a
recipe learns, not which one is best: nothing was tuned.

Every finished run is a file in --folder. The same command goes on where it was ended, and two of them, with a seed
each, may run at a time; the table and the baseline are made of all files of this budget.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

from common import ROOT, provenance, write

import skyrl.loop
import skyrl.run
from skyrl.algorithms.declare import ADVANTAGES, LOSSES
from skyrl.config.load import load_config
from skyrl.files import write_atomic
from skyrl.run_dir import read_metrics
from skyrl.trainers import run_trainer

QUIET = (
    "tracking.console=off tracking.system=false checkpoint.every_steps=0 checkpoint.keep_best=false "
    "tracking.rollouts_every=0 run.threads=1 run.hang_seconds=0 eval.num_prompts=256"
).split()
WARM_UP = (
    "model.tiny.hidden_size=128 model.tiny.num_layers=3 model.tiny.num_heads=4 model.tiny.num_kv_heads=2 "
    "model.tiny.ffn_size=352 warmup.num_steps=200 eval.every_steps=0"
).split()
BUDGET = (
    "model=hub model.activation_checkpointing=false warmup.num_steps=0 optim.lr=1e-4 optim.warmup_steps=4 "
    "batch.num_steps=16 "
    "batch.prompts_per_step=16 batch.samples_per_prompt=8 eval.every_steps=0 checkpoint.export=false "
    "algorithm.kl.coef=1e-9 algorithm.kl.estimator=k2"  # a weight that does nothing: the distance is measured
).split()
# Two pictures a run would take longer than its steps.
skyrl.run.draw_beside = skyrl.loop.write_curves = lambda *_: None  # type: ignore[assignment]
# What a recipe is made for, where the default task has it not.
MADE_FOR = {"gdpo": ["env.options.reward=[exact, characters]"]}


def warm_up(seed: int, folder: Path) -> Path:
    """The export of the supervised warm-up of this seed, made where it is not there yet."""
    place = folder / f"warm-up-seed{seed}"
    if not (place / "export" / "config.json").exists():
        run_trainer("sft", load_config([*QUIET, *WARM_UP, f"seed={seed}", f"run.dir={place}"]))
    return place / "export"


def options_of(recipe: str, seed: int) -> list[str]:
    """The options of a run but for its folders."""
    options = [*QUIET, *BUDGET, *MADE_FOR.get(recipe, []), f"algorithm={recipe}", f"seed={seed}"]
    algorithm = load_config([f"algorithm={recipe}"]).algorithm
    if algorithm.critic.warmup_steps:
        options.append(f"batch.num_steps={16 + algorithm.critic.warmup_steps}")
    return [*options, f"batch.optim_steps_per_batch={2 if LOSSES.get(algorithm.loss.name).ratio else 1}"]


def learn(recipe: str, seed: int, folder: Path) -> dict[str, Any]:
    """The figures of one run, which are kept in `folder`: those that are there, if they are of the same options."""
    kept, options = folder / f"{recipe}-seed{seed}.json", options_of(recipe, seed)
    if kept.exists() and (found := json.loads(kept.read_text()))["options"] == options:
        return dict(found)
    export = warm_up(seed, folder)
    place, began, cpu = folder / f"{recipe}-seed{seed}", time.monotonic(), time.process_time()
    cfg = load_config([*options, f"model.path={export}", f"run.dir={place}"])
    result = {"recipe": recipe, "seed": seed, "options": options, "commit": provenance()["commit"]}
    run_trainer("train", cfg)
    records = read_metrics(place / "metrics.jsonl")
    rl = [one for one in records if one["phase"] == "rl" and "reward:mean" in one]
    if len(rl) != cfg.batch.num_steps:
        raise SystemExit(f"{place}: holds {len(rl)} steps of {cfg.batch.num_steps}; remove it to begin this run anew")
    learned = [one["kl/behaviour_reference:mean"] for one in rl if "kl/behaviour_reference:mean" in one]
    held_out = [one["eval/accuracy:mean"] for one in records if "eval/accuracy:mean" in one]
    result |= {
        "critic": ADVANTAGES.get(cfg.algorithm.advantage.name).critic,
        "held_out_before": held_out[0],
        "held_out_after": held_out[-1],
        "rewards": [round(one["reward:mean"], 4) for one in rl],
        "kl_to_start": learned[-1] if learned else None,
        "entropy_last": next((one["entropy:mean"] for one in reversed(rl) if "entropy:mean" in one), None),
        "length_first": rl[0]["length:mean"],
        "length_last": rl[-1]["length:mean"],
        "seconds": round(time.monotonic() - began, 1),
        "seconds_of_cpu": round(time.process_time() - cpu, 1),
    }
    write_atomic(kept, json.dumps(result))
    return result


def table(runs: list[dict[str, Any]]) -> str:
    """One line per recipe: held-out accuracy before and after, of each seed; the mean reward of the first and last five
    steps; KL and length of the last step. What rose by less than two standard errors of its seeds together is marked
    with a minus."""
    lines = [
        "| recipe | held-out before | after | learns | reward, first 5 | last 5 | KL to the start | length |",
        "|---|---|---|---|---|---|---|---|",
    ]
    mean = statistics.mean
    for recipe in sorted({run["recipe"] for run in runs}):
        mine = sorted((run for run in runs if run["recipe"] == recipe), key=lambda run: run["seed"])
        before, after = ([run[f"held_out_{when}"] for run in mine] for when in ("before", "after"))
        error = math.sqrt(sum(p * (1 - p) for p in (*before, *after)) / 256) / len(mine)
        first, last = (mean(mean(run["rewards"][part]) for run in mine) for part in (slice(5), slice(-5, None)))
        kl = [run["kl_to_start"] for run in mine if run["kl_to_start"] is not None]
        lines.append(
            f"| `{recipe}` | {', '.join(f'{x:.2f}' for x in before)} | {', '.join(f'{x:.2f}' for x in after)} "
            f"| {'yes' if mean(after) - mean(before) > 2 * error else '-'} | {first:.2f} | {last:.2f} "
            f"| {mean(kl) if kl else math.nan:.3f} | {mean(run['length_last'] for run in mine):.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs what was asked for and prints the table of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.stem for path in (ROOT / "conf" / "algorithm").glob("*.yaml"))
    parser.add_argument("recipes", nargs="*", default=[], help=f"of: {', '.join(known)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/learning_table"))
    parser.add_argument("--minutes", type=float, default=math.inf, help="no run begins after this many")
    parser.add_argument("--write", action="store_true", help="keep all that is there as the baseline")
    args = parser.parse_args()
    if unknown := sorted(set(args.recipes) - set(known)):
        parser.error(f"no recipe {unknown[0]}; choose of: {', '.join(known)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for seed, recipe in ((seed, recipe) for seed in args.seeds for recipe in args.recipes or known):
        if time.monotonic() - began < 60 * args.minutes:
            run = learn(recipe, seed, args.folder)
            print({key: value for key, value in run.items() if key not in ("options", "rewards", "commit")}, flush=True)
    files = [json.loads(path.read_text()) for path in sorted(args.folder.glob("*-seed*.json"))]
    runs = [one for one in files if one["options"] == options_of(one["recipe"], one["seed"])]
    if args.write:
        write("learning_table", {"warm_up": " ".join(WARM_UP), "budget": " ".join(BUDGET), "runs": runs})
    print(table(runs))


if __name__ == "__main__":
    main()
