"""The real cookbook's recipes, unmodified, with small settings through their own options; one process each."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from clients import client_environment, cookbook_python
from hub import MODEL

RECIPES_MODULE = "tinker_cookbook.recipes"
FRESH = "behavior_if_log_dir_exists=delete"


@dataclass(frozen=True)
class Recipe:
    """How one recipe is run. `steps`: rows of metrics.jsonl at least; `numbers`: what a row must name."""

    module: str
    options: tuple[str, ...]
    steps: int = 2
    numbers: tuple[str, ...] = ()
    asks: bool = True  # has the option that empties its log folder


def _rl(module: str, *options: str, steps: int = 2, asks: bool = True) -> Recipe:
    small = ("max_steps=2", "eval_every=0")
    return Recipe(module, (*small, *options), steps, ("env/all/reward/total",), asks)


SMALL_MATH = ("env=arithmetic", "group_size=4", "groups_per_batch=8", "max_tokens=5", "lora_rank=8", "save_every=1")
RECIPES: dict[str, Recipe] = {
    "sl_loop": Recipe(
        "sl_loop", ("batch_size=32", "max_steps=3", "lora_rank=8", "save_every=2"), 3, ("train_mean_nll",), asks=False
    ),
    "sl_basic": Recipe("sl_basic", ("max_steps=2", "lora_rank=8"), 2, ("train_mean_nll",), asks=False),
    "chat_sl": Recipe(
        "chat_sl.train",
        ("dataset=talks.jsonl", "batch_size=32", "max_steps=4", "lora_rank=8", "save_every=2", "rolling_save_every=1"),
        4,
        ("train_mean_nll",),
    ),
    "rl_loop": Recipe(
        "rl_loop",
        ("batch_size=4", "group_size=4", "max_tokens=16", "max_steps=2", "lora_rank=8", "save_every=1"),
        2,
        ("reward/total",),
        asks=False,
    ),
    "rl_basic": _rl(
        "rl_basic",
        "max_tokens=4",
        "lora_rank=8",
        "max_steps=1",
        "remove_constant_reward_groups=True",  # 2048 rows of 530 tokens otherwise
        steps=1,
        asks=False,
    ),
    "math_rl": _rl("math_rl.train", *SMALL_MATH),
    "math_rl_async": _rl("math_rl.train", *SMALL_MATH, "max_steps_off_policy=2"),
    "math_rl_streaming": _rl(
        "math_rl.train",
        *SMALL_MATH,
        "stream_minibatch_config.groups_per_batch=8",
        "stream_minibatch_config.num_minibatches=2",
    ),
    "guess_number": _rl(
        "multiplayer_rl.guess_number.train",
        "renderer_name=qwen3_disable_thinking",
        "batch_size=2",
        "group_size=4",
        "max_tokens=8",
    ),
    "shorter": _rl(
        "preference.shorter.train",
        "renderer_name=qwen3_disable_thinking",
        "batch_size=4",
        "group_size=4",
        "max_tokens=8",
    ),
    "dpo": Recipe("preference.dpo.train", ("batch_size=16", "max_steps=2"), 2, ("dpo_loss",)),
    "on_policy_distillation": Recipe(
        "distillation.on_policy_distillation",
        (
            f"teacher_model={MODEL}",
            "dataset=deepmath",
            "group_size=2",
            "groups_per_batch=8",
            "max_tokens=8",
            "lora_rank=8",
            "max_steps=2",
            "eval_every=0",
            "save_every=1",
        ),
        2,
        ("teacher_kl",),
    ),
    "prompt_distillation": Recipe(
        "prompt_distillation.train",
        ("file_path=distilled.jsonl", "batch_size=32", "max_steps=2", "lora_rank=8", "eval_every=0"),
        2,
        ("train_mean_nll",),
    ),
    "text_arena": _rl(
        "multiplayer_rl.text_arena.train",
        "renderer_name=qwen3_disable_thinking",
        "batch_size=4",
        "num_train_datapoints=8",
        "num_test_datapoints=4",
        "max_tokens=8",
    ),
}


@dataclass
class RecipeRun:
    """What a recipe left: its rows of metrics.jsonl, checkpoints.jsonl, and output."""

    rows: list[dict]
    checkpoints: list[dict]
    output: str
    log_path: Path
    options: list[str] = field(default_factory=list)

    def curve(self, name: str) -> list[float]:
        """The values of a metric, in order; rows without it are left out. Raises KeyError if no row has it."""
        values = [row[name] for row in self.rows if name in row]
        if not values:
            names = sorted({key for row in self.rows for key in row})
            raise KeyError(f"no row of metrics.jsonl has {name}; there are {names}")
        return values


def run_recipe(
    recipe: Recipe,
    url: str,
    hub: Path,
    log_path: Path,
    *more: str,
    download: bool,
    timeout: float = 240,
    keep_log: bool = False,
) -> RecipeRun:
    """Runs `python -m tinker_cookbook.recipes.<module> options` in the hub. `more`: further options, the last of a
    name counts. Raises AssertionError with the end of its output when it fails."""
    python = cookbook_python(download=download)
    if not keep_log:
        shutil.rmtree(log_path, ignore_errors=True)
    options = {option.partition("=")[0]: option for option in (*recipe.options, *more)}
    options["model_name"] = f"model_name={MODEL}"
    options["log_path"] = f"log_path={log_path}"
    if recipe.asks:
        options["behaviour"] = "behavior_if_log_dir_exists=resume" if keep_log else FRESH
    command = [str(python), "-m", f"{RECIPES_MODULE}.{recipe.module}", *options.values()]
    env = client_environment(url, [], HOME=str(log_path.parent), TINKER_COOKBOOK_RUNS=str(log_path.parent))
    try:
        done = subprocess.run(command, cwd=hub, env=env, capture_output=True, text=True, timeout=timeout)
        output, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        parts = [part.decode(errors="replace") for part in (late.stdout, late.stderr) if part]
        output, code = "".join(parts), None
    if code != 0:
        raise AssertionError(f"{' '.join(command[1:])}: exit code {code}\n{output[-6000:]}")
    return RecipeRun(
        _lines(log_path / "metrics.jsonl"), _lines(log_path / "checkpoints.jsonl"), output, log_path, command[3:]
    )


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
