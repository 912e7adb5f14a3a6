"""A trade-off between two objectives, by weight and by bound, against its exact solution. Five minutes of one core.

An answer has up to 8 characters. With x the part of 8 that was written, "coverage" is 1 - (1 - x)^2, "brevity" 1 - x.
For a weight w of brevity the best x is 1 - w / 2; with a bound b from below on the mean of brevity alone it is 1 - b.
table: the policy is a softmax over the nine lengths; the loop's own weights, multipliers and advantages are used on
sampled groups, in 200 steps with three seeds. model: a tiny random model writes the characters, in runs of the loop
itself, one seed. Measured are the means over the last steps.

    python benchmarks/objectives.py --write
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import write

from skyrl.algorithms.advantages import ADVANTAGES, RewardRows
from skyrl.algorithms.objectives import Objectives
from skyrl.api import Environment, Prompt, StepResult, register_environment, train
from skyrl.run_dir import read_metrics

LONGEST, STEPS, LAST = 8, 100, 20
WEIGHTS, BOUNDS = (0.25, 0.5, 1.0, 1.5, 1.75), (0.125, 0.25, 0.5, 0.75, 0.875)
TABLE_STEPS, GROUPS, SAMPLES, RATE = 200, 8, 8, 8.0
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
    "optim.lr=1e-3",
    "algorithm.loss.entropy_coef=0.005",
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
        return StepResult(worth(len(text)), True)


def worth(length: int) -> dict[str, float]:
    """Both objectives of an answer."""
    part = min(1.0, length / LONGEST)
    return {"coverage": 1.0 - (1.0 - part) ** 2, "brevity": 1.0 - part}


def in_table(weights: dict[str, float], constraints: dict[str, dict[str, float]], seed: int) -> dict[str, float]:
    """The same means of a softmax over lengths."""
    rng, objectives, count = np.random.default_rng(seed), Objectives(weights, constraints), GROUPS * SAMPLES
    logits, late = np.zeros(LONGEST + 1), []
    for _ in range(TABLE_STEPS):
        chances = np.exp(logits - logits.max())
        chances /= chances.sum()
        lengths = rng.choice(LONGEST + 1, size=count, p=chances)
        told = [worth(length) for length in lengths]
        rows = RewardRows(
            group_D=np.repeat(np.arange(GROUPS), SAMPLES),
            episode_D=np.arange(count),
            rewards=[np.array([objectives.combine(one)[0]]) for one in told],
            masks=[np.ones(1, bool)] * count,
            valid_D=np.ones(count, bool),
        )
        for length, advantage in zip(
            lengths, ADVANTAGES.get("dr_grpo").compute(rows, lambda x: x, params={}).advantages, strict=True
        ):
            logits += RATE * advantage[0] / count * ((np.arange(LONGEST + 1) == length) - chances)
        objectives.measured = {name: [one[name] for one in told] for name in told[0]}
        late.append({name: math.fsum(one) / count for name, one in objectives.measured.items()})
        objectives.update()
    return {name: round(statistics.fmean(one[name] for one in late[-50:]), 3) for name in late[0]}


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
    found: dict[str, Any] = {"table": [], "model": []}
    for weight in WEIGHTS:
        for seed in range(3):
            found["table"].append(
                {"weight": weight, "best brevity": weight / 2, "seed": seed, **in_table({"brevity": weight}, {}, seed)}
            )
    for bound in BOUNDS:
        for seed in range(3):
            limits = {"brevity": {"min": bound, "step": 0.1}}
            found["table"].append({"bound": bound, "best brevity": bound, "seed": seed, **in_table({}, limits, seed)})
    print(*found["table"], sep="\n", flush=True)
    for given_as, value in (("weight", 1.0), ("bound", 0.25), ("bound", 0.5), ("bound", 0.75)):
        weights, bounds = "algorithm.objectives.weights.brevity", "algorithm.objectives.constraints.brevity"
        option = f"{weights}={value}" if given_as == "weight" else f"{bounds}={{min: {value}, step: 0.1}}"
        best = value / 2 if given_as == "weight" else value
        found["model"].append({given_as: value, "best brevity": best, **point(option)})
        print(found["model"][-1], flush=True)
    if given.write:
        write("objectives", found)


if __name__ == "__main__":
    main()
