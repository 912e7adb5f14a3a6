"""The cookbook's recipes, unmodified, against one server: that each comes to its end, and three learning curves.

    SKYRL_TEST_CLIENTS=<folder> python benchmarks/tinker_cookbook.py [--write] [--ranks 2] [--only math_rl]

Offline in an imitation hub with a random Qwen3 of hidden size 64. math_rl (arithmetic) starts from weights that
chat_sl trained for a few steps on such sums, since a random model has nothing to reinforce.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, write

sys.path[:0] = [str(ROOT / "tests" / "tinker"), str(ROOT / "tests" / "system")]

from clients import Missing, cookbook_python  # noqa: E402
from cookbook import RECIPES, run_recipe  # noqa: E402
from hub import MODEL, add_data, make_hub  # noqa: E402
from serving import serve  # noqa: E402

RENDERER = "renderer_name=qwen3_disable_thinking"
CURVES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sl_loop": (("max_steps=15", "learning_rate=0.01", "save_every=0", "lora_rank=32"), ("train_mean_nll",)),
    "dpo": (("max_steps=20", "learning_rate=0.002"), ("dpo_loss", "accuracy", "margin")),
}
SUMS = (
    "dataset=sums.jsonl",
    RENDERER,
    "batch_size=64",
    "lora_rank=32",
    "learning_rate=0.01",
    "lr_schedule=constant",
    "save_every=0",
    "eval_every=0",
    "rolling_save_every=0",
)
REINFORCED = (
    RENDERER,
    "group_size=16",
    "groups_per_batch=16",
    "max_tokens=5",
    "lora_rank=32",
    "learning_rate=0.001",
    "save_every=0",
)
NOTE = (
    "math_rl: 0.1 of the reward is for an answer that ends in time, the rest for a right one. What rises here is the "
    "first; adapters on a frozen random model of 64 channels do not learn to add, and right answers stay near chance."
)


def curves(names: list[str], url: str, hub: Path, folder: Path, sums: int, steps: int) -> dict[str, Any]:
    """Options and metric curves of the recipes that must learn."""
    found: dict[str, Any] = {}
    for name, (options, numbers) in CURVES.items():
        if name in names:
            run = run_recipe(RECIPES[name], url, hub, folder / f"{name}-curve", *options, download=True, timeout=900)
            found[name] = {"options": run.options, **{number: rounded(run.curve(number)) for number in numbers}}
            print(name, found[name], flush=True)
    if "math_rl" in names:
        supervised = run_recipe(
            RECIPES["chat_sl"], url, hub, folder / "sums", *SUMS, f"max_steps={sums}", download=True, timeout=3600
        )
        start = f"load_checkpoint_path={supervised.checkpoints[-1]['state_path']}"
        more = (*REINFORCED, f"max_steps={steps}", start)
        run = run_recipe(RECIPES["math_rl"], url, hub, folder / "sums-rl", *more, download=True, timeout=3600)
        found["math_rl"] = {
            "supervised_before": {"options": supervised.options, "nll": rounded(supervised.curve("train_mean_nll"))},
            "options": run.options,
            **{key: rounded(run.curve(f"env/all/{key}")) for key in ("reward/total", "correct", "format")},
        }
        print("math_rl", found["math_rl"], flush=True)
    return found


def end_of(name: str, url: str, hub: Path, folder: Path) -> dict[str, Any]:
    """Seconds, options and numbers of a recipe that came to its end, or why it did not."""
    start = time.monotonic()
    try:
        run = run_recipe(RECIPES[name], url, hub, folder / name, download=True, timeout=900)
    except AssertionError as error:
        return {"failed": str(error)[-2000:]}
    numbers = {number: rounded(run.curve(number)) for number in RECIPES[name].numbers}
    return {"seconds": round(time.monotonic() - start, 1), "options": run.options, **numbers}


def rounded(values: list[float]) -> list[float]:
    """Four digits after the point."""
    return [round(value, 4) for value in values]


def main() -> int:
    """The command line. Returns 1 if a recipe failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[*RECIPES])
    parser.add_argument("--sums", type=int, default=20, help="supervised steps before math_rl's curve")
    parser.add_argument("--steps", type=int, default=25, help="steps of math_rl's curve")
    args = parser.parse_args()
    try:
        cookbook_python(download=True)
    except Missing as why:
        print(f"the cookbook cannot be had: {why}")
        return 0
    ends: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        hub = make_hub(Path(folder) / "hub")
        add_data(hub)
        with serve(Path(folder) / "server", hub / MODEL, ranks=args.ranks, aliases=(MODEL,)) as server:
            for name in (name for name in RECIPES if name in args.only):
                ends[name] = end_of(name, server.url, hub, Path(folder))
                print(name, ends[name], flush=True)
            learned = curves(args.only, server.url, hub, Path(folder), args.sums, args.steps)
    figures = {"ranks": args.ranks, "recipes": ends, "curves": learned, "note": NOTE}
    figures = json.loads(json.dumps(figures).replace(folder, "<folder>"))
    if args.write:
        print(write("tinker_cookbook", figures))
    return int(any("failed" in one for one in ends.values()))


if __name__ == "__main__":
    sys.exit(main())
