"""What the tiny model learns of tasks of an application: code, tools, a customer; beside supervised training alone.

    python benchmarks/learning_tasks.py code --seeds 1 2 3 --folder runs/learning --write      # or tools, support

Each seed makes three runs, all from the same random weights and the same few demonstrations (solutions of training
tasks; conversations of a scripted expert where there are several turns):
first: a short supervised warm-up.
rl: RL from the warm-up's export, on all training tasks, of which it sees rewards and no solutions.
alone: supervised training alone on the demonstrations, until it has spent as many passes as the other two.
The runs stay in --folder; one that is finished is not made again. benchmarks/learning.py, whose figures these are,
says what is counted. --only: some of the three, to try numbers out. Further words are options of all three.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common import ROOT

from skyrl.config.load import load_config
from skyrl.config.schema import EnvConfig
from skyrl.data import make_prompts
from skyrl.envs import make_environment
from skyrl.sweep import play

EVERYWHERE = [
    "checkpoint.every_steps=0",
    "checkpoint.keep_best=false",
    "checkpoint.async_save=false",
    "tracking.rollouts_every=0",
    "run.threads=1",
    "model.dtype=float32",
]
SMALL = ["model=tiny", "model.tiny.hidden_size=96", "model.tiny.num_layers=2", "model.tiny.ffn_size=256"]


@dataclass(frozen=True)
class Task:
    """One task: its options, how many demonstrations there are, those of supervised runs and of RL, further metrics to
    show, and who demonstrates: an answer to (the turn's number, the prompt's extra, what was said last)."""

    options: list[str]
    demonstrations: int
    first: list[str]
    alone: list[str]
    rl: list[str]
    show: list[str] = field(default_factory=list)
    expert: Callable[[int, dict, str], str] = lambda turn, extra, said: extra["solution"]


def tool_expert(turn: int, extra: dict, said: str) -> str:
    """Calls once, and says what came back."""
    return extra["solution"] if turn == 0 else said.strip()


def support_expert(turn: int, extra: dict, said: str) -> str:
    """Asks for both facts, and acts."""
    return f"{extra['solution']}\n" if turn == 0 else f"action: {extra['action']}"


TASKS = {
    "code": Task(
        options=["eval.num_prompts=200"],
        demonstrations=64,
        first=["warmup.num_steps=80", "eval.every_steps=1000"],
        alone=["warmup.num_steps=420", "eval.every_steps=60"],  # at 5e-4 both seeds tried did worse
        rl=["batch.num_steps=150", "batch.prompts_per_step=16", "eval.every_steps=25", "optim.lr=2e-4"],
        show=["env/parses"],
    ),
    "tools": Task(
        options=["env.options.instruct=false", "env.options.tools=[calculator]", "sampler.max_new_tokens=32"],
        demonstrations=200,
        first=["warmup.num_steps=200", "warmup.lr=1e-3", "eval.every_steps=1000"],
        alone=["warmup.num_steps=400", "warmup.lr=1e-3", "eval.every_steps=50"],
        rl=["batch.num_steps=60", "batch.prompts_per_step=16", "eval.every_steps=20", "optim.lr=1e-4"],
        expert=tool_expert,
    ),
    "support": Task(
        options=["sampler.max_new_tokens=32"],
        demonstrations=100,
        first=["warmup.num_steps=250", "warmup.lr=1e-3", "warmup.rows_per_step=16", "eval.every_steps=1000"],
        alone=["warmup.num_steps=1200", "warmup.lr=1e-3", "warmup.rows_per_step=16", "eval.every_steps=100"],
        rl=["batch.num_steps=100", "batch.prompts_per_step=16", "eval.every_steps=20", "optim.lr=2e-4"],
        expert=support_expert,
    ),
}


def conversations(task: str, seed: int, count: int, options: list[str]) -> list[str]:
    """Rows of experiment=sft_chat as JSON: the expert's episodes on the first training prompts of this seed."""
    cfg = load_config([f"experiment={task}", "model=tiny", *options, f"seed={seed}"])
    rows = []
    for prompt in make_prompts(cfg, "train")[:count]:
        env = make_environment(EnvConfig(name=cfg.env.name, options=cfg.env.options, max_turns=cfg.env.max_turns))
        messages, turn, done = list(env.reset(prompt)), 0, False
        while not done:
            text = TASKS[task].expert(turn, prompt.extra, str(messages[-1]["content"]))
            result = env.step(text)
            messages += [{"role": "assistant", "content": text}, *result.observation]
            turn, done = turn + 1, result.done
        assert result.metrics["correct:mean"] == 1.0, messages
        rows.append(json.dumps({"messages": messages}) + "\n")
    return rows


def commands(name: str, seed: int, folder: Path, more: list[str]) -> dict[str, list[str]]:
    """What is run, by part: arguments of `python -m`."""
    task = TASKS[name]
    place = {part: folder / f"{name}-{part}-seed{seed}" for part in ("first", "rl", "alone")}
    common = [*EVERYWHERE, f"seed={seed}"]
    cfg = load_config([f"experiment={name}", "model=tiny", *task.options])
    played = {"name": name, "env": name, "num_prompts": cfg.eval.num_prompts, "max_turns": cfg.env.max_turns}
    played |= {"max_new_tokens": cfg.sampler.max_new_tokens, "options": dict(cfg.env.options)}
    rows, held_out = folder / f"{name}-seed{seed}.jsonl", folder / f"{name}-seed{seed}-held-out.jsonl"
    *made, last = conversations(name, seed, task.demonstrations + 1, task.options)
    folder.mkdir(parents=True, exist_ok=True)
    rows.write_text("".join(made))
    held_out.write_text(last)  # what nll is of
    shown = ["skyrl.sft", "experiment=sft_chat", *SMALL, *common, f"data.path={rows}", f"data.eval_path={held_out}"]
    shown += [f"eval.sets=[{_flow(played)}]", "checkpoint.best_metric=eval/nll:mean"]
    rl = ["skyrl.train", f"experiment={name}", *common, *task.options, "warmup.num_steps=0"]
    rl.append(f"model.path={place['first']}/export")
    return {
        "first": [*shown, *task.first, *more, f"run.dir={place['first']}"],
        "rl": [*rl, *task.rl, *more, f"run.dir={place['rl']}"],
        "alone": [*shown, *task.alone, *more, "checkpoint.export=false", f"run.dir={place['alone']}"],
    }


def _flow(value: object) -> str:
    """A value as Hydra's command line reads it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return json.dumps(value) if isinstance(value, (bool, type(None))) else str(value)


def main() -> None:
    """Makes the runs that are not there, and hands them to learning.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=Path("runs/learning"))
    parser.add_argument("--only", nargs="+", choices=["first", "rl", "alone"], default=["first", "rl", "alone"])
    parser.add_argument("--write", action="store_true")
    args, more = parser.parse_known_args()
    for seed in args.seeds:
        for part, words in commands(args.task, seed, args.folder, more).items():
            if part in args.only:
                print(" ".join(words), flush=True)
                began = time.process_time()
                play(load_config(words[1:]), words[0].partition(".")[2], sweep=True)  # not again where it is done
                print(f"{time.process_time() - began:.0f} s of this process's time", flush=True)
    if {"first", "rl", "alone"} <= {*args.only}:
        folders = {
            part: [str(args.folder / f"{args.task}-{part}-seed{seed}") for seed in args.seeds]
            for part in ("first", "rl", "alone")
        }
        told = [sys.executable, str(ROOT / "benchmarks" / "learning.py"), args.task, *folders["rl"]]
        told += ["--began", *folders["first"], "--beside", *folders["alone"]]
        if shown := TASKS[args.task].show:
            told += ["--show", *shown]
        if args.write:
            told += ["--write", "--plot", "--run-command", " ".join(["python", *sys.argv])]
        subprocess.run(told, check=True)


if __name__ == "__main__":
    main()
