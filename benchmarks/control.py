"""PPO on Gymnasium environments beside stable-baselines3's: the same hyperparameters, environments and evaluations.

curves: each seed is trained by both; every so many steps ten episodes are played with the likeliest actions. What the
file has of other seeds, and with --only of the other library, stays: each run has the commit it was made at. speed:
steps of environments per second of a process's own time on a CPU, which others on the machine hardly change, over whole
steps of the loop, in turns. ranks: the same on one rank and on two. Needs the extras `control` and `benchmarks`.

    python benchmarks/control.py curves cartpole --steps 60_000 --seeds 5 --write
    python benchmarks/control.py curves halfcheetah --steps 150000 --seeds 3 --only skyrl --write
    python benchmarks/control.py speed --seeds 3 --write
    python benchmarks/control.py ranks --seeds 3 --steps 8192 --write
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, baseline, provenance, write
from filelock import FileLock

from skyrl.config.load import load_config
from skyrl.config.schema import RunConfig
from skyrl.run_dir import read_metrics
from skyrl.trainers.control import control

EPISODES = 10
COLOURS = {"skyrl": "#2563eb", "stable-baselines3": "#d97706"}


def options(recipe: str, steps: int, seed: int, folder: str, every: int) -> list[str]:
    """The command line of one run of ours, without what costs time beside training."""
    return [
        f"experiment={recipe}", f"control.total_steps={steps}", f"seed={seed}", f"run.dir={folder}", "run.threads=1",
        f"eval.every_steps={every}", f"control.eval_episodes={EPISODES}", "checkpoint.every_steps=0",
        "checkpoint.export=false", "checkpoint.keep_best=false", "tracking.console=off", "tracking.system=false",
    ]  # fmt: skip


def ours(recipe: str, steps: int, seed: int, every: int) -> dict[str, Any]:
    """Steps, mean returns of the evaluations, and steps per CPU second of a step of the loop (median)."""
    clock: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_config(options(recipe, steps, seed, f"{folder}/run", every), mode="control")
        control(cfg, [lambda step, metrics: clock.append(time.process_time())])
        records = read_metrics(Path(folder, "run", "metrics.jsonl"))
    batch = cfg.control.n_envs * cfg.control.n_steps
    return result(
        [(r["step"] * batch, r["eval/reward:mean"]) for r in records if "eval/reward:mean" in r], clock, batch
    )


def result(found: list[tuple[int, float]], clock: list[float], batch: int) -> dict[str, Any]:
    """What is kept of a run, from (steps, return) of its evaluations and the CPU time at the end of each step."""
    seconds = [b - a for a, b in zip(clock[:-1], clock[1:], strict=True)]
    told = {"steps": [at for at, _ in found if at], "returns": [round(value, 2) for at, value in found if at]}
    return {**told, "steps_per_cpu_second": round(batch / statistics.median(seconds))}


def reference(cfg: RunConfig, steps: int, seed: int, every: int) -> dict[str, Any]:
    """The same of stable-baselines3's PPO, whose defaults are set to the options of `cfg`."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecNormalize, sync_envs_normalization

    c, gae = cfg.control, cfg.algorithm.advantage.params
    env: Any = make_vec_env(c.env_id, c.n_envs, seed=seed)
    held: Any = make_vec_env(c.env_id, 1, seed=seed + 10_000)
    if c.normalize_observations or c.normalize_rewards:
        given: dict[str, Any] = {"norm_obs": c.normalize_observations, "gamma": gae["gamma"]}
        env = VecNormalize(env, norm_reward=c.normalize_rewards, **given)
        held = VecNormalize(held, norm_reward=False, training=False, **given)
    rate = cfg.optim.lr
    falling = {"linear": lambda left: rate * (cfg.optim.final_lr_ratio + (1 - cfg.optim.final_lr_ratio) * left)}
    model = PPO(
        "MlpPolicy", env, learning_rate=falling.get(cfg.optim.schedule, rate),
        n_steps=c.n_steps, batch_size=c.minibatch_size, n_epochs=c.epochs,
        gamma=gae["gamma"], gae_lambda=gae["lam"], clip_range=cfg.algorithm.loss.params["clip_high"],
        ent_coef=cfg.algorithm.loss.entropy_coef, vf_coef=0.5 * c.value_coef, max_grad_norm=cfg.optim.grad_clip_norm,
        seed=seed, device="cpu",
    )  # fmt: skip
    found: list[tuple[int, float]] = []
    clock: list[float] = []
    batch = c.n_envs * c.n_steps

    class Evaluate(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:  # an iteration has been learned from, but for the first time
            if self.num_timesteps and self.num_timesteps // batch % every == 0:
                measure(self.num_timesteps)
            clock.append(time.process_time())

    def measure(at: int) -> None:
        if isinstance(env, VecNormalize):
            sync_envs_normalization(env, held)
        found.append((at, float(np.mean(evaluate_policy(model, held, EPISODES, deterministic=True, warn=False)[0]))))

    model.learn(steps, callback=Evaluate())
    if not found or found[-1][0] != model.num_timesteps:
        measure(model.num_timesteps)
    return result(found, clock, batch)


def curves(recipe: str, steps: int, seeds: range, libraries: list[str], keep: str) -> None:
    """The libraries on each seed, in turns; after each run the file `keep` has it beside those that it had."""
    cfg = load_config([f"experiment={recipe}"], mode="control")
    every = max(1, steps // (cfg.control.n_envs * cfg.control.n_steps) // 20)
    commit = provenance()["commit"]
    told: dict[str, Any] = {"env": cfg.control.env_id, "total_steps": steps, "runs": {}}
    for seed in seeds:
        for library in libraries:
            made = ours(recipe, steps, seed, every) if library == "skyrl" else reference(cfg, steps, seed, every)
            run = {"seed": seed, "commit": commit, **made}
            with FileLock(f"{tempfile.gettempdir()}/{keep or 'unkept'}.lock"):  # others may measure other seeds
                if keep and baseline(keep).exists():
                    told["runs"] = json.loads(baseline(keep).read_text())["runs"]
                others = [one for one in told["runs"].get(library, []) if one["seed"] != seed]
                told["runs"][library] = sorted([*others, run], key=lambda one: one["seed"])
                told |= summary(told["runs"], recipe)
                if keep:
                    write(keep, told)
                    draw(told, ROOT / "docs" / "images" / f"{keep}.svg")
            print(library, seed, json.dumps({key: value for key, value in told.items() if key != "runs"}), flush=True)


def summary(runs: dict[str, list[dict[str, Any]]], recipe: str) -> dict[str, Any]:
    """Seeds, and what is read from the runs of each library: the mean at the end and the deviation between seeds."""
    finals = {name: [one["returns"][-1] for one in found] for name, found in runs.items()}
    told: dict[str, Any] = {"seeds": {name: [one["seed"] for one in found] for name, found in runs.items()}}
    told["final_mean"] = {name: round(statistics.fmean(values), 1) for name, values in finals.items()}
    told["final_deviation"] = {k: round(statistics.stdev(v), 1) for k, v in finals.items() if len(v) > 1}
    if recipe == "cartpole":
        told["first_at_475"] = {name: [first_at(one, 475) for one in found] for name, found in runs.items()}
    return told


def first_at(run: dict[str, Any], bound: float) -> int | None:
    """Steps at the first evaluation that reaches the bound."""
    return next((at for at, value in zip(run["steps"], run["returns"], strict=True) if value >= bound), None)


def draw(told: dict[str, Any], path: Path) -> None:
    """Mean and range over seeds of both, as an SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, found in ((name, found) for name, found in told["runs"].items() if found):
        values = np.array([one["returns"] for one in found])
        axes.fill_between(found[0]["steps"], values.min(0), values.max(0), color=COLOURS[name], alpha=0.18, lw=0)
        axes.plot(found[0]["steps"], values.mean(0), color=COLOURS[name], label=f"{name}, {len(found)} seeds")
    axes.set(title=told["env"], xlabel="steps of environments", ylabel="return, 10 greedy episodes")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)


def speed(rounds: int, steps: int) -> dict[str, Any]:
    """Medians over rounds in which both are run in turns, without evaluations between."""
    told: dict[str, Any] = {}
    for recipe in ("cartpole", "halfcheetah", "hopper"):
        cfg = load_config([f"experiment={recipe}"], mode="control")
        found: dict[str, list[int]] = {"skyrl": [], "stable-baselines3": []}
        for seed in range(rounds):
            found["skyrl"].append(ours(recipe, steps, seed, 10**6)["steps_per_cpu_second"])
            found["stable-baselines3"].append(reference(cfg, steps, seed, 10**6)["steps_per_cpu_second"])
        told[recipe] = {name: {"median": statistics.median(rates), "all": rates} for name, rates in found.items()}
        print(recipe, json.dumps(told[recipe]), flush=True)
    return {"unit": "steps of environments per CPU second", **told}


def ranks(rounds: int, steps: int) -> dict[str, Any]:
    """One rank and two in turns under torchrun, without evaluations: steps of environments per second on the wall, and
    per second of rank 0's own time on a CPU, which is what cores that nobody else uses would give at most."""
    told: dict[str, Any] = {}
    for recipe in ("cartpole", "halfcheetah"):
        found: dict[str, list[Any]] = {"1": [], "2": []}
        for seed, size in ((seed, size) for seed in range(rounds) for size in found):
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
            command += [__file__, "rank", recipe, f"--steps={steps}", f"--first-seed={seed}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[size].append(json.loads(next(x for x in done.stdout.splitlines() if x.startswith("{"))))
        told[recipe] = {f"{size} ranks": rates for size, rates in found.items()}
        for name in found["1"][0]:
            one, two = (statistics.median(rate[name] for rate in found[size]) for size in found)
            told[recipe][f"gain_{name}"] = round(two / one, 2)
        print(recipe, json.dumps(told[recipe]), flush=True)
    return {"unit": "steps of environments per second, all ranks together", **told}


def one_rank(recipe: str, steps: int, seed: int) -> None:
    """A rank of `ranks`: prints its rates, medians over steps of the loop."""
    clock: list[tuple[float, float]] = []
    folder = f"{tempfile.gettempdir()}/skyrl-ranks-{os.environ['TORCHELASTIC_RUN_ID']}-{os.environ['MASTER_PORT']}"
    cfg = load_config(options(recipe, steps, seed, folder, 10**6), mode="control")
    control(cfg, [lambda step, metrics: clock.append((time.perf_counter(), time.process_time()))])
    if clock:  # of rank 0, which writes the records besides
        seconds = np.median(np.diff(np.array(clock), axis=0), axis=0)
        wall, cpu = (cfg.control.n_envs * cfg.control.n_steps / seconds).round()
        print(json.dumps({"per_second": wall, "per_cpu_second": cpu}), flush=True)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("curves", "speed", "ranks", "rank"))
    p.add_argument("recipe", nargs="?", default="cartpole")
    p.add_argument("--steps", type=int, default=16_384)
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--only", default="", choices=("", *COLOURS), help="one of the libraries")
    p.add_argument("--first-seed", type=int, default=1)
    p.add_argument("--name", default="", help="of the file; by default control_<recipe>")
    p.add_argument("--write", action="store_true")
    given = p.parse_args()
    torch.set_num_threads(1)
    if given.what == "curves":
        seeds = range(given.first_seed, given.first_seed + given.seeds)
        name = given.name or f"control_{given.recipe}"
        libraries = [given.only] if given.only else list(COLOURS)
        return curves(given.recipe, given.steps, seeds, libraries, name if given.write else "")
    if given.what == "rank":
        return one_rank(given.recipe, given.steps, given.first_seed)
    told = (speed if given.what == "speed" else ranks)(given.seeds, given.steps)
    if given.write:
        write(f"control_{given.what}", told)


if __name__ == "__main__":
    main()
