"""How far parameters drift apart when only the layout differs: ranks, micro-batch budget, ddp or fsdp, packing.

    python benchmarks/layout_invariance.py                   # the whole matrix, a few minutes on two cores
    python benchmarks/layout_invariance.py --shape small --worlds 1,2
    python benchmarks/layout_invariance.py --eps 1e-6        # another eps of Adam than the default 1e-8

Each layout makes the same 5 optimizer steps (PPO with clipping, KL term, entropy bonus, gradient clipping, weight
decay; 8 groups of 4 rows, 3 to 60 tokens, prompts not trained; the lengths leave the ranks unequal loads, which the
rows' exchange evens out). Then all pairs of layouts are compared: l2 norm of the difference over l2 norm, over all
parameters together, and the largest absolute difference of one parameter.

In float32 Adam amplifies rounding: where a gradient is nearly 0, m / (sqrt(v) + eps) with a small eps turns its noise
into a part of a whole step, and the first such element shifts all later gradients. A larger --eps shows how much of
the distance is that.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skyrl.algorithms.reductions import REDUCTIONS
from skyrl.config.load import load_config
from skyrl.config.schema import RunConfig
from skyrl.distributed.balance import rebalance
from skyrl.distributed.collectives import all_reduce_sum
from skyrl.distributed.init import World, init_distributed, shutdown
from skyrl.engine import Engine, ModelSpec
from skyrl.types import AdamParams, Datum, LossSpec

SHAPES = {
    "small": (32, 2, 2, 48),  # channels, layers, heads, channels of the MLP
    "tiny": (256, 4, 4, 704),  # the default recipe's, 3.1M parameters
}
STEPS, GROUPS, SAMPLES, LONGEST = 5, 8, 4, 60
BUDGETS = (96, 4096)  # tokens; the longest row has 60
VOCABULARY = 100
SPEC = LossSpec("ppo", {"clip_low": 0.2, "clip_high": 0.2}, kl_coef=0.05, entropy_coef=0.01)
ADAM = AdamParams(lr=3e-4, weight_decay=0.01, grad_clip_norm=1.0)


@dataclass(frozen=True)
class Layout:
    """One way to lay the same computation out."""

    world: int
    strategy: str
    budget: int
    packing: bool
    dtype: str

    @property
    def name(self) -> str:
        """Short and unique."""
        return f"{self.dtype} {self.world} {self.strategy} {self.budget} {'packed' if self.packing else 'padded'}"


def layouts(world: int, dtypes: tuple[str, ...]) -> list[Layout]:
    """All layouts of `world` ranks."""
    replicated = "single" if world == 1 else "ddp"
    return [
        Layout(world, strategy, budget, packing, dtype)
        for dtype in dtypes
        for strategy in (replicated, "fsdp")
        for budget in BUDGETS
        for packing in (True, False)
    ]


def rows_of(step: int, world: World) -> list[Datum]:
    """This rank's rows of a step: group g is on rank g % ranks, as in the loop, then rows move for equal loads."""
    mine: list[tuple[int, int, Datum]] = []
    for group in range(GROUPS):
        if group % world.size != world.rank:
            continue
        rng = np.random.default_rng([step, group])
        prompt = rng.integers(4, VOCABULARY, rng.integers(2, 12))
        longest = rng.integers(4, LONGEST - len(prompt))
        scores = rng.normal(size=SAMPLES)
        scores = (scores - scores.mean()) / scores.std(ddof=1)
        for sample in range(SAMPLES):
            ids = np.concatenate([prompt, rng.integers(4, VOCABULARY, rng.integers(1, longest))])
            mask = np.arange(len(ids) - 1) >= len(prompt) - 1
            noise = [rng.normal(size=len(mask)) for _ in range(2)]
            row = Datum(
                tokens=ids[:-1],
                targets=ids[1:],
                weights=mask.astype(np.float64),
                sampling_logprobs=np.where(mask, -np.log(VOCABULARY) + 0.2 * noise[0], 0.0),
                reference=np.where(mask, -np.log(VOCABULARY) + 0.2 * noise[1], 0.0),
                advantages=np.where(mask, scores[sample], 0.0),
                name=f"{group}/{sample}",
            )
            mine.append((group, sample, row))
    weights = REDUCTIONS.get("token_mean")(
        [row.weights != 0 for _, _, row in mine],
        np.array([group for group, _, _ in mine]),
        np.array([sample for _, sample, _ in mine]),
        lambda x: all_reduce_sum(world, x),
    )
    for (_, _, row), weight in zip(mine, weights, strict=True):
        row.weights = weight
    return rebalance(world, [row for _, _, row in mine])


@functools.cache
def config_of(shape: str) -> RunConfig:
    """What all layouts of a model have in common."""
    channels, layers, heads, ffn = SHAPES[shape]
    sizes = dict(hidden_size=channels, num_layers=layers, num_heads=heads, num_kv_heads=heads // 2, ffn_size=ffn)
    return load_config([*(f"model.tiny.{name}={value}" for name, value in sizes.items()), "run.threads=1"])


def train_one(layout: Layout, shape: str, adam: AdamParams = ADAM) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Whole parameters after the steps (rank 0; {} elsewhere) and the loss of each step. Collective."""
    cfg = config_of(shape)
    cfg = replace(
        cfg,
        model=replace(cfg.model, dtype=layout.dtype),
        strategy=replace(cfg.strategy, name=layout.strategy),
        batch=replace(cfg.batch, max_tokens_per_microbatch=layout.budget, packing=layout.packing),
    )
    world = init_distributed(cfg)
    engine = Engine(cfg, world, dtype=layout.dtype, strategy=layout.strategy, max_row_tokens=LONGEST)
    engine.create("policy", ModelSpec())
    losses = []
    for step in range(STEPS):
        losses.append(engine.forward_backward(rows_of(step, world), SPEC).metrics["loss:sum"])
        engine.optim_step("policy", adam)
    dtype = torch.float64 if layout.dtype == "float64" else torch.float32
    return engine.models["policy"].strategy.full_state_dict(dtype), losses


def run_layouts(folder: Path, shape: str, wanted: list[Layout], adam: AdamParams = ADAM) -> None:
    """Trains each layout and, on rank 0, writes <folder>/<name>.pt. Collective; every layout has this many ranks."""
    for layout in wanted:
        start = time.perf_counter()
        weights, losses = train_one(layout, shape, adam)
        if weights:
            torch.save({"weights": weights, "losses": losses}, Path(folder) / f"{layout.name}.pt")
            print(f"{layout.name}: {time.perf_counter() - start:.1f} s", flush=True)


def compare(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> tuple[float, float]:
    """(l2 norm of a - b over l2 norm of b, largest absolute difference), over all parameters."""
    difference = scale = largest = 0.0
    for name, theirs in b.items():
        gap = a[name].double() - theirs.double()
        difference += float(gap.square().sum())
        scale += float(theirs.double().square().sum())
        largest = max(largest, float(gap.abs().max()))
    return (difference / scale) ** 0.5, largest


def compare_all(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """Every pair of the named results."""
    loaded = {name: torch.load(Path(folder) / f"{name}.pt")["weights"] for name in names}
    out = []
    for a, b in itertools.combinations(names, 2):
        relative, largest = compare(loaded[b], loaded[a])
        out.append({"a": a, "b": b, "relative_l2": relative, "max_abs": largest})
    return out


def hardware() -> dict[str, object]:
    """What ran this."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__, "numpy": np.__version__}


def commit() -> str:
    """The commit of this checkout, with "+" when files of skyrl/ or this one are changed."""
    root = Path(__file__).resolve().parents[1]

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True).stdout.strip()

    dirty = git("status", "--porcelain", "--", "skyrl", "benchmarks/layout_invariance.py")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if dirty else "")


def report(folder: Path, names: dict[str, list[str]], args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The JSON of a whole run; prints a summary."""
    result: dict[str, Any] = {
        "what": "parameters after 5 optimizer steps, all pairs of layouts of one dtype",
        "command": "python benchmarks/layout_invariance.py " + " ".join(sys.argv[1:]),
        "commit": commit(),
        "hardware": hardware(),
        "shape": dict(zip(("hidden_size", "num_layers", "num_heads", "ffn_size"), SHAPES[args.shape], strict=True)),
        "steps": STEPS,
        "rows_per_step": GROUPS * SAMPLES,
        "optimizer": {"lr": args.lr, "eps": args.eps, "weight_decay": ADAM.weight_decay, "clip": ADAM.grad_clip_norm},
        "limits": {"float32": 1e-6, "float64": 1e-12},
        "seconds": round(seconds, 1),
    }
    for dtype, found in names.items():
        pairs = compare_all(folder, found)
        worst = max(pairs, key=lambda pair: pair["relative_l2"])
        first = torch.load(folder / f"{found[0]}.pt")
        result[dtype] = {
            "layouts": found,
            "losses": first["losses"],
            "pairs_above_limit": sum(pair["relative_l2"] > result["limits"][dtype] for pair in pairs),
            "worst_relative_l2": worst["relative_l2"],
            "worst_max_abs": max(pair["max_abs"] for pair in pairs),
            "pairs": pairs,
        }
        above = result[dtype]["pairs_above_limit"]
        print(f"{dtype}: {len(pairs)} pairs, {above} above {result['limits'][dtype]:g}")
        print(f"  worst relative l2 {worst['relative_l2']:.3g} ({worst['a']} / {worst['b']})")
    return result


def main() -> None:
    """Starts torchrun once for each world size, compares, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default="1,2,4")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--dtypes", default="float32,float64")
    parser.add_argument("--eps", type=float, default=ADAM.eps, help="Adam's")
    parser.add_argument("--lr", type=float, default=ADAM.lr, help="learning rate")
    parser.add_argument("--out", default="", help="JSON file to write")
    parser.add_argument("--inside", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    dtypes = tuple(args.dtypes.split(","))
    if args.inside:
        adam = replace(ADAM, eps=args.eps, lr=args.lr)
        run_layouts(Path(args.inside), args.shape, layouts(int(os.environ["WORLD_SIZE"]), dtypes), adam)
        shutdown()
        return
    start = time.perf_counter()
    worlds = [int(text) for text in args.worlds.split(",")]
    with tempfile.TemporaryDirectory() as name:
        for world in worlds:
            subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", __file__,
                 "--shape", args.shape, "--dtypes", args.dtypes, "--eps", str(args.eps), "--lr", str(args.lr),
                 "--inside", name],
                check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        found = {dtype: [one.name for world in worlds for one in layouts(world, (dtype,))] for dtype in dtypes}
        result = report(Path(name), found, args, time.perf_counter() - start)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
