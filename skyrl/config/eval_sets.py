"""What eval.sets names: each entry as the environment, data and sampling of one evaluation; and conditions on
a metric, as people type them: "eval/accuracy >= 0.9", of eval.stop_when and `skyrl-tx gate`. No torch."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import operator
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from skyrl.args import config_dir, expand_home
from skyrl.config.schema import DataConfig, EnvConfig, RunConfig
from skyrl.config.trainers import NO_REWARD
from skyrl.types import UserError

NAME = re.compile(r"(?!(?:reward|env|workers)$)[A-Za-z][A-Za-z0-9_.]*")  # "eval/reward/<objective>" is a metric already
COUNTS = ("num_prompts", "samples_per_prompt", "max_new_tokens", "max_turns")
KINDS: dict[str, Any] = {"name": str, "env": str, "path": str, "options": dict, "temperature": (int, float)}
KINDS |= dict.fromkeys(COUNTS, int)
OF_START = tuple(
    "run tracking strategy debug dry_run batch checkpoint warmup trainer preference reward_model distill".split()
)
NOTHING = ["experiment=custom", "env.name=''"]  # of the default recipe is left, where none is named
RECIPES = sorted(file.stem for file in (config_dir() / "experiment").glob("*.yaml"))
RELATIONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_CONDITION = re.compile(rf"\s*([^<>=\s]+)\s*(>=|<=|>|<)\s*({_NUMBER})\s*")


def read_condition(text: str) -> tuple[str, str, float] | None:
    """(metric, one of RELATIONS, a finite number); None for a text that is no condition."""
    found = _CONDITION.fullmatch(text)
    return (found[1], found[2], float(found[3])) if found and abs(float(found[3])) < math.inf else None


@dataclass(frozen=True)
class EvalSetConfig:
    """One entry of eval.sets with all that it leaves out filled in. `name`, "" for the run's own held-out prompts, is
    part of `prefix`, with which its metrics begin, and of `dump`, as which its episodes are kept. `own`: it is of the
    run's own environment."""

    name: str
    env: EnvConfig
    data: DataConfig
    num_prompts: int
    samples_per_prompt: int
    temperature: float
    max_new_tokens: int
    own: bool = True
    prefix: str = "eval/"
    dump: str = "eval"


def own_set(cfg: RunConfig) -> EvalSetConfig:
    """The run's own held-out prompts, as every run evaluates them."""
    how, length = cfg.eval, cfg.sampler.max_new_tokens
    return EvalSetConfig("", cfg.env, cfg.data, how.num_prompts, how.samples_per_prompt, how.temperature, length)


def eval_sets(cfg: RunConfig) -> list[EvalSetConfig]:
    """The sets of eval.sets, in that order. Raises UserError for an entry that cannot be read, and for two of one name.

    An entry is a name or a mapping; `env` (else its name) is an environment or a recipe of conf/experiment, from which
    its options and the length of an answer come. The run's own environment is meant as the run has it."""
    found = [_read(cfg, {"name": entry} if isinstance(entry, str) else entry) for entry in cfg.eval.sets]
    names = [one.name for one in found]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise UserError(f"eval.sets: two sets are called {twice!r}; give one another name: {{name: ..., env: {twice}}}")
    return found


def longest_answer(cfg: RunConfig) -> int:
    """Most tokens of one turn, in training and in any evaluation."""
    return max([cfg.sampler.max_new_tokens, *(one.max_new_tokens for one in eval_sets(cfg))])


def _read(cfg: RunConfig, entry: Any) -> EvalSetConfig:
    where = f"eval.sets: {json.dumps(entry, default=str)}"
    if not isinstance(entry, dict) or not isinstance(entry.get("name", entry.get("env")), str):
        raise UserError(f"{where}: wanted a name, or a mapping such as {{name: gsm8k, path: test.jsonl}}")
    for key, value in entry.items():
        if key not in KINDS:
            raise UserError(f"{where}: no such key {key!r}; a set has {', '.join(KINDS)}")
        if not isinstance(value, KINDS[key]) or isinstance(value, bool) or (key in COUNTS and value < 1):
            raise UserError(f"{where}: {key}={value!r}; wanted {'1 or more' if key in COUNTS else 'another value'}")
    name = str(entry.get("name", entry.get("env")))
    if not NAME.fullmatch(name):
        raise UserError(f"{where}: a name has letters, digits, _ and ., and is none of reward, env and workers")
    source, own = str(entry.get("env", name)), own_set(cfg)
    env, data, length = own.env, own.data, own.max_new_tokens
    if source != cfg.env.name:
        file = config_dir() / "experiment" / f"{source}.yaml"
        recipe = yaml.safe_load(file.read_text(encoding="utf-8")) if source in RECIPES else {}
        own, data = replace(own, own=False), DataConfig()
        parts = {"name": source, "options": {}, "wrappers": [], "max_turns": 1, **recipe.get("env", {})}
        env, length = replace(env, **parts), recipe.get("sampler", {}).get("max_new_tokens", length)
    if "path" in entry:
        data = replace(data, path="", eval_path=expand_home(entry["path"], "eval.sets"))
    options = {**env.options, **entry.get("options", {})}
    env = replace(env, options=options, max_turns=entry.get("max_turns", env.max_turns))
    given = {key: value for key, value in entry.items() if key in EvalSetConfig.__annotations__ and key != "env"}
    one = replace(own, **{"env": env, "data": data, "max_new_tokens": length, **given, "name": name})
    close = difflib.get_close_matches(source, RECIPES, n=3, cutoff=0.6)
    meant = f"or did you mean one of: {', '.join(close)}?" if close else f"no recipe is called {source}"
    meant = "" if source in RECIPES else f"; {meant}"
    if env.name in NO_REWARD:
        raise UserError(f"{where}: rows of env.name={env.name} are to be learned and give no reward; leave the set out")
    above = [k for k in cfg.eval.k if k > one.samples_per_prompt]
    for wrong, problem in (
        (
            not (one.temperature == 0 or 1e-6 <= one.temperature < float("inf")),
            f"temperature={one.temperature}; wanted 0 (greedy), or 1e-6 or more",
        ),
        (
            one.temperature == 0 and one.samples_per_prompt > 1,
            f"{one.samples_per_prompt} greedy episodes of one prompt are all equal; give a temperature above 0",
        ),
        (
            one.max_new_tokens < 1,
            f"has no length of an answer; give it max_new_tokens, or sampler.max_new_tokens{meant}",
        ),
        (above, f"eval.k={above} is above its samples_per_prompt={one.samples_per_prompt}; draw more, or lower k"),
    ):
        if wrong:
            raise UserError(f"eval.sets: {name}: {problem}")
    return replace(one, prefix=f"eval/{name}/", dump=f"eval-{name}")


def eval_problems(cfg: RunConfig) -> Iterator[str]:
    """One line for each rule that the options of evaluation break. Raises UserError for an entry of eval.sets."""
    if cfg.eval.stop_when and read_condition(cfg.eval.stop_when) is None:
        wanted = 'a metric, one of >= <= > <, and a number, such as "eval/accuracy:mean >= 0.95"'
        yield f"eval.stop_when={cfg.eval.stop_when}: wanted {wanted}"
    if (cfg.eval.stop_when or cfg.eval.patience) and cfg.eval.every_steps == 0:
        yield "eval.every_steps=0: eval.stop_when and eval.patience look at evaluations; raise it, or leave them out"
    if any(k < 1 for k in cfg.eval.k):
        yield f"eval.k={cfg.eval.k}: wanted numbers of samples, 1 or more"
    if (above := [k for k in cfg.eval.k if k > cfg.eval.samples_per_prompt]) and not cfg.eval.sets:
        yield f"eval.k={above} is above eval.samples_per_prompt={cfg.eval.samples_per_prompt}; draw more, or lower k"
    eval_sets(cfg)


# ---- a model that a run has made


def evaluation_options(overrides: Sequence[str]) -> list[str]:
    """What was typed for an evaluation, with model=<run folder, checkpoint, model's folder or hub name> in options that
    every command has: run.resume and model.path. Raises UserError for a run without a checkpoint."""
    found, names = [], [override.partition("=")[0] for override in overrides]
    for override in overrides:
        value = override.removeprefix("model=").strip("'\"")
        if not override.startswith("model=") or (config_dir() / "model" / f"{value}.yaml").is_file():
            found.append(override)
            continue
        folder = Path(expand_home(value, "model"))
        if value.startswith(("runs/", "./", "/")) and not folder.exists():
            raise UserError(f"model={value}: nothing is there; skyrl-tx runs lists the runs")
        if (folder / "checkpoints").is_dir():
            whole = [path for path in sorted(folder.glob("checkpoints/*")) if path.name.isdecimal()]
            if not whole:
                raise UserError(f"model={value}: this run has no checkpoint yet; wait for one, or give another model")
            folder = whole[-1]
        of_run = folder.parent.name == "checkpoints" or (folder / "manifest.json").is_file()
        found += [f"run.resume={folder}"] if of_run else ["model=hub", f"model.path={value}"]
    return [*(NOTHING[: 1 if "env.name" in names else 2] if "experiment" not in names else []), *found]


def options_of_model(cfg: RunConfig) -> dict[str, Any] | None:
    """The options, as nested dicts, of the run whose checkpoint (run.resume) or export (model.path) is evaluated; None
    for other models. Raises UserError for a file that cannot be read."""
    source, export = Path(cfg.run.resume) / "manifest.json", Path(cfg.model.path)
    of_run = cfg.run.resume not in ("auto", "never")
    if not of_run and (export.name != "export" or not (source := export.parent / "config.yaml").is_file()):
        return None
    try:
        told = yaml.safe_load(source.read_text(encoding="utf-8")) if not of_run else json.loads(source.read_bytes())
        return dict(told["state"]["config"] if of_run else {**told, "model": dataclasses.asdict(cfg.model)})
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{source}: cannot be read ({error}); it is damaged: give another checkpoint") from error


def with_run(values: dict[str, Any], run: dict[str, Any], typed: Collection[str]) -> dict[str, Any]:
    """The options of `run`, but for where and how it ran, with those that were `typed` as `values` has them."""
    merged = {group: values[group] if group in OF_START else run.get(group, values[group]) for group in values}
    merged["batch"] = {**values["batch"], "max_row_tokens": run.get("batch", {}).get("max_row_tokens", 0)}
    merged["eval"] = {**merged["eval"], "sets": []}  # without any named, its held-out prompts
    for path in typed:
        *groups, name = path.split(".")
        given, held = values, merged
        for group in groups:
            given, held[group] = given.get(group, {}), dict(held.get(group) or {})
            held = held[group]
        if name in given:
            held[name] = given[name]
    return merged
