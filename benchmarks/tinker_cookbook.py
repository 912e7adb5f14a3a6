"""The cookbook's recipes, unmodified, against one server: that each comes to its end, and four learning curves.

    SKYRL_TEST_CLIENTS=<folder> python benchmarks/tinker_cookbook.py [--write] [--folder F] [--ranks 2] [--only math_rl]

Offline in an imitation hub. All recipes, and the curves of sl_loop and dpo, run on a random Qwen3 of hidden size 64.
The curves of math_rl (arithmetic) run on a base that can add a bit, which tinker/adder.py trains first: a random model
never gives a right answer, and RL has nothing to reinforce. With --folder everything lies there, and a second call
goes on with what is missing; each figure names the commit it was measured at.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from common import ROOT, provenance, write

sys.path[:0] = [str(ROOT / folder) for folder in ("tests/tinker", "tests/system", "benchmarks/tinker")]

from adder import train_adder  # noqa: E402
from clients import Missing, cookbook_python  # noqa: E402
from cookbook import RECIPES, run_recipe  # noqa: E402
from hub import MODEL, add_data, make_hub  # noqa: E402
from serving import serve  # noqa: E402

MATH = (
    "group_size=16",
    "groups_per_batch=32",
    "max_tokens=16",
    "lora_rank=32",
    "learning_rate=0.001",
    "save_every=0",
)
MATH_NUMBERS = ("env/all/correct", "env/all/reward/total", "env/all/format")
# Recipe -> options of its curve and what is kept of it.
RANDOM_BASE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sl_loop": (("max_steps=15", "learning_rate=0.01", "save_every=0", "lora_rank=32"), ("train_mean_nll",)),
    "dpo": (("max_steps=20", "learning_rate=0.002"), ("dpo_loss", "accuracy", "margin")),
}
ADDER_BASE = {"math_rl": (MATH, MATH_NUMBERS), "math_rl_async": ((*MATH, "max_steps=25"), MATH_NUMBERS)}


class Parts:
    """The figures with their commits, one file each in a folder, so that an interrupted benchmark goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def do(self, group: str, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measures what is not there yet; a recipe that fails leaves {"failed": why} and is tried again."""
        if self.has(group, name):
            return
        try:
            found = measure()
        except AssertionError as error:
            found = {"failed": str(error)[-2000:]}
        found["commit"] = provenance()["commit"]
        print(group, name, found, flush=True)
        self._path(group, name).write_text(json.dumps(found))

    def has(self, group: str, name: str) -> bool:
        """Whether it is measured."""
        path = self._path(group, name)
        return path.exists() and "failed" not in json.loads(path.read_text())

    def of(self, group: str) -> dict[str, Any]:
        """Name -> figures of a group."""
        files = sorted(self.folder.glob(f"{group}.*.json"), key=lambda file: file.stat().st_mtime_ns)
        return {file.name.split(".")[1]: json.loads(file.read_text()) for file in files}

    def _path(self, group: str, name: str) -> Path:
        return self.folder / f"{group}.{name}.json"


def run_end(name: str, url: str, hub: Path, folder: Path) -> dict[str, Any]:
    """Seconds, options and numbers of a recipe that came to its end."""
    start = time.monotonic()
    run = run_recipe(RECIPES[name], url, hub, folder / name, download=True, timeout=900)
    numbers = {number: rounded(run.curve(number)) for number in RECIPES[name].numbers}
    return {"seconds": round(time.monotonic() - start, 1), "options": run.options, **numbers}


def run_curve(
    name: str, options: tuple[str, ...], numbers: tuple[str, ...], url: str, hub: Path, folder: Path
) -> dict[str, Any]:
    """Seconds, options and metric curves of a recipe that must learn."""
    start = time.monotonic()
    run = run_recipe(RECIPES[name], url, hub, folder / f"{name}-curve", *options, download=True, timeout=3600)
    curves = {number: rounded(run.curve(number)) for number in numbers}
    return {"seconds": round(time.monotonic() - start, 1), "options": run.options, **curves}


def rounded(values: list[float]) -> list[float]:
    """Four digits after the point."""
    return [round(value, 4) for value in values]


def on_random_base(names: list[str], parts: Parts, folder: Path, ranks: int) -> None:
    """Every recipe's end, and the supervised curves."""
    ends = [name for name in RECIPES if name in names and not parts.has("recipes", name)]
    learn = [name for name in RANDOM_BASE if name in names and not parts.has("curves", name)]
    if not ends and not learn:
        return
    hub = folder / "hub"
    if not hub.exists():
        add_data(make_hub(hub))
    with serve(folder / "server", hub / MODEL, ranks=ranks, aliases=(MODEL,)) as server:
        for name in ends:
            parts.do("recipes", name, partial(run_end, name, server.url, hub, folder))
        for name in learn:
            parts.do("curves", name, partial(run_curve, name, *RANDOM_BASE[name], server.url, hub, folder))


def on_adder(names: list[str], parts: Parts, folder: Path, ranks: int, warm: int, steps: int) -> None:
    """The base's own training, and RL on it."""
    learn = [name for name in ADDER_BASE if name in names and not parts.has("curves", name)]
    if not learn:
        return
    (folder / "adder").mkdir(exist_ok=True)
    weights, about = train_adder(folder / "adder", steps=warm, ranks=ranks)
    parts.do("base", "adder", lambda: about)
    hub = folder / "adder-hub"
    if not hub.exists():
        make_hub(hub, weights=weights)
    with serve(folder / "adder-server", hub / MODEL, ranks=ranks, aliases=(MODEL,)) as server:
        for name in learn:
            options, numbers = ADDER_BASE[name]
            more = (f"max_steps={steps}", *options)
            parts.do("curves", name, partial(run_curve, name, more, numbers, server.url, hub, folder))


@contextlib.contextmanager
def place(folder: Path | None) -> Iterator[Path]:
    """The folder that was asked for, else one that is gone afterwards."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary).resolve()


def main() -> int:
    """The command line. Returns 1 if a recipe failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--folder", type=Path, help="keeps what is done and goes on with it")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[*RECIPES])
    parser.add_argument("--warm", type=int, default=400, help="supervised steps of the base for math_rl's curves")
    parser.add_argument("--steps", type=int, default=50, help="steps of math_rl's curve")
    args = parser.parse_args()
    try:
        cookbook_python(download=True)
    except Missing as why:
        print(f"the cookbook cannot be had: {why}")
        return 0
    with place(args.folder) as folder:
        parts = Parts(folder / "parts")
        on_random_base(args.only, parts, folder, args.ranks)
        on_adder(args.only, parts, folder, args.ranks, args.warm, args.steps)
        figures = {"ranks": args.ranks, **{group: parts.of(group) for group in ("recipes", "base", "curves")}}
        figures = json.loads(json.dumps(figures).replace(str(folder), "<folder>"))
    if args.write:
        print(write("tinker_cookbook", figures))
    return int(any("failed" in one for group in ("recipes", "curves") for one in figures[group].values()))


if __name__ == "__main__":
    sys.exit(main())
