"""A trade-off between two objectives, by weight and by bound, against its exact solution. Two minutes of one core.

A tiny random model writes up to 8 tokens. With x the part of 8 that it wrote, "coverage" is 1 - (1 - x)^2 and "brevity"
1 - x. For a weight w of brevity the best x is 1 - w / 2; with a bound b from below on the mean of brevity alone it is
1 - b. Each point is one run with one seed; what is measured are the means over its last steps.

    python benchmarks/objectives.py --write
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import write

from skyrl.api import Environment, Prompt, StepResult, register_environment, train
from skyrl.tracking.jsonl import read_metrics

LONGEST, STEPS, LAST = 8, 80, 20
WEIGHTS, BOUNDS = (0.25, 0.5, 1.0, 1.5), (0.25, 0.5, 0.75)
OPTIONS = [
    "experiment=custom",
    "model=tiny",
    "model.tiny.hidden_size=32",
    "model.tiny.num_layers=2",
    "model.tiny.ffn_size=64",
    "env.name=trade_off",
    f"sampler.max_new_tokens={LONGEST}",
    f"batch.num_steps={STEPS}",
    "batch.prompts_per_step=16",
    "batch.samples_per_prompt=8",
    "optim.lr=3e-3",
    "algorithm=dr_grpo",
    "eval.every_steps=0",
    "eval.num_prompts=1",
    "checkpoint.export=false",
    "tracking.console=off",
    "tracking.rollouts_every=0",
]


@register_environment("trade_off")
class TradeOff(Environment):
    """Nothing is asked but a length."""

    in_process = True

    @classmethod
    def objective_names(cls, options: dict[str, Any]) -> list[str]:
        return ["coverage", "brevity"]

    @classmethod
    def dataset(cls, options: dict[str, Any], data: Any, split: str, seed: int) -> list[Prompt]:
        return [Prompt(f"{cls.name}/{split}/{i}", cls.name, [{"role": "user", "content": "="}]) for i in range(16)]

    def step(self, text: str) -> StepResult:
        part = min(1.0, len(text) / LONGEST)
        return StepResult({"coverage": 1.0 - (1.0 - part) ** 2, "brevity": 1.0 - part}, True)


def point(*options: str) -> dict[str, float]:
    """The means of both objectives, and the multiplier, over the last steps of one run."""
    with tempfile.TemporaryDirectory() as folder:
        train(*OPTIONS, *options, f"run.dir={folder}/run")
        records = [record for record in read_metrics(Path(folder) / "run" / "metrics.jsonl") if record["step"]][-LAST:]
    names = {"coverage": "reward/coverage:mean", "brevity": "reward/brevity:mean"}
    names |= {"multiplier": "multiplier/brevity:mean"} if "multiplier/brevity:mean" in records[0] else {}
    return {short: round(statistics.fmean(record[name] for record in records), 3) for short, name in names.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keeps the figures in benchmarks/baselines")
    given = parser.parse_args()
    found: dict[str, Any] = {"by weight": [], "by bound": []}
    for weight in WEIGHTS:
        best = {"weight": weight, "best brevity": weight / 2}
        found["by weight"].append({**best, **point(f"algorithm.objectives.weights.brevity={weight}")})
        print(found["by weight"][-1], flush=True)
    for bound in BOUNDS:
        option = f"algorithm.objectives.constraints.brevity={{min: {bound}, step: 0.1}}"
        best = {"bound": bound, "best multiplier": 2 * bound}
        found["by bound"].append({**best, **point(option)})
        print(found["by bound"][-1], flush=True)
    if given.write:
        write("objectives", found)


if __name__ == "__main__":
    main()
