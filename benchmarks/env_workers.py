"""What calls of environments cost in worker processes and in the rank itself, and what a verifier that hangs costs.

calls: 4,000 steps of one turn that do nothing, by the number of workers. loop: the default recipe (arithmetic), its
environment in the rank and in two workers, in turn; seconds of a step without the first, and processor seconds of the
rank and of all processes, which a busy machine changes less. hung: seconds until 64
sequences are sampled when the verifier of one in 16 never returns (deadline: 3 s), in workers and in the rank.

    python benchmarks/env_workers.py --write
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

from common import write

from skyrl.config.schema import EnvConfig
from skyrl.envs.base import Environment, StepResult, register_environment
from skyrl.tasks.arithmetic import Arithmetic
from skyrl.types import Prompt
from skyrl.workers.pool import open_calls, shut_pool

CALLS, AT_ONCE, SKIPPED = 4000, 64, 1


@register_environment("nothing")
class Nothing(Environment):
    """Takes no time."""

    def step(self, text: str) -> StepResult:
        return StepResult(1.0, True)


@register_environment("arithmetic_apart")
class ArithmeticApart(Arithmetic):
    """The built-in one in workers: what a class says of itself is not inherited."""


def calls_per_second(workers: int) -> float:
    """Episodes of one turn, so many at once as a rollout of the default recipe has."""
    prompt = Prompt("p", "nothing", [{"role": "user", "content": "1+1="}])
    with open_calls(EnvConfig("nothing", workers=workers)) as calls:
        key = iter(range(10**9))

        def play(count: int) -> float:
            start, opened, done = time.perf_counter(), 0, 0
            while done < count:
                while opened < min(count, done + AT_ONCE):
                    calls.open(next(key), prompt, 0)
                    opened += 1
                for answer in calls.poll(wait=True):
                    if isinstance(answer.outcome.value, StepResult):
                        calls.close(answer.key)
                        done += 1
                    else:
                        calls.step(answer.key, "2")
            return count / (time.perf_counter() - start)

        play(200)
        found = play(CALLS)
    shut_pool()
    return found


def step_seconds(name: str, steps: int) -> dict[str, float]:
    """Of the default recipe without warm-up and evaluation: median seconds of a step, processor seconds of the run."""
    from skyrl.config.load import load_config
    from skyrl.run_dir import read_metrics
    from skyrl.trainers.rl import train

    folder = Path(tempfile.mkdtemp())
    more = [f"env.name={name}", f"batch.num_steps={steps}", f"run.dir={folder}/run", "warmup.num_steps=0"]
    cfg = load_config([*more, "eval.every_steps=0", "checkpoint.export=false", "run.threads=1"])
    begun = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    train(cfg)
    shut_pool()
    lines = [line for line in read_metrics(folder / "run" / "metrics.jsonl") if "time/step_seconds:sum" in line]
    ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    rank, children = (b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in zip(begun, ended, strict=True))
    return {
        "step": statistics.median(line["time/step_seconds:sum"] for line in lines[SKIPPED:]),
        "rank_cpu": rank,
        "all_cpu": rank + children,
    }


@register_environment("hangs")
class Hangs(Environment):
    """Two turns; the first call of one episode in 16 hangs, where told to."""

    def __init__(self, *, hang: bool = False) -> None:
        self.hang, self.turns = hang, 0

    def step(self, text: str) -> StepResult:
        self.turns += 1
        if self.hang and self.prompt.uid.endswith("/0") and self.turns == 1:
            time.sleep(60)
        return StepResult(1.0, self.turns == 2, [{"role": "user", "content": "and now?"}])


def seconds_until_sampled(workers: int, hang: bool) -> float:
    """From the start of a rollout to the last step of the sampler."""
    from skyrl.config.load import load_config
    from skyrl.distributed.init import init_distributed
    from skyrl.engine import Engine, ModelSpec
    from skyrl.rollout import RolloutConfig, rollout
    from skyrl.types import SamplingParams

    cfg = load_config(["run.threads=1"])
    engine = Engine(cfg, init_distributed(cfg), dtype="float32", strategy="single", max_row_tokens=160)
    engine.create("policy", ModelSpec())
    env = EnvConfig("hangs", {"hang": hang}, max_turns=2, workers=workers, timeout_seconds=3.0, on_error="mask")
    prompts = [(i, Prompt(f"hangs/{i % 16}", "hangs", [{"role": "user", "content": "1+1="}])) for i in range(64)]
    with engine.sampling() as sampler:
        last, step = [0.0], sampler.step

        def timed() -> list:
            found = step()
            last[0] = time.perf_counter()
            return found

        sampler.step = timed  # type: ignore[method-assign]
        rollout(sampler, prompts[:8], RolloutConfig(env, SamplingParams(4), 1, 160, (0,)), engine.chat)  # warm
        start = time.perf_counter()
        rollout(sampler, prompts, RolloutConfig(env, SamplingParams(48), 1, 160, (1,)), engine.chat)
    shut_pool()
    return last[0] - start


def main() -> None:
    """Measures, prints, and with --write keeps the figures."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--write", action="store_true")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=10)
    args = p.parse_args()
    calls = {str(workers): round(max(calls_per_second(workers) for _ in range(2))) for workers in (0, 1, 2)}
    print(calls, flush=True)
    loop: dict[str, list[dict[str, float]]] = {"arithmetic": [], "arithmetic_apart": []}
    for _ in range(args.rounds):  # in turn: the machine's speed changes
        for name, found in loop.items():
            found.append(step_seconds(name, args.steps))
    ratios = {
        what: [round(apart[what] / here[what], 4) for here, apart in zip(*loop.values(), strict=True)]
        for what in ("step", "rank_cpu", "all_cpu")
    }
    print(loop, ratios, flush=True)
    hung = {
        f"{place}, {state}": round(min(seconds_until_sampled(workers, hang) for _ in range(2)), 3)
        for place, workers in (("workers", 2), ("in process", 0))
        for state, hang in (("none hangs", False), ("one in 16 hangs", True))
    }
    print(hung, flush=True)
    figures = {
        "seconds_until_all_is_sampled": hung,
        "calls_per_second": calls,
        "loop": loop,
        "workers_over_in_process": {**ratios, "medians": {what: statistics.median(x) for what, x in ratios.items()}},
    }
    if args.write:
        write("env_workers", figures)


if __name__ == "__main__":
    main()
