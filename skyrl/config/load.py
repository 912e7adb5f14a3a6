"""Command line and YAML to a frozen RunConfig. Hydra composes, the dataclasses decide; every error is one line.

Reads no weights, no data and no GPU; imports without torch.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, InterpolationResolutionError, OmegaConfBaseException

from skyrl.args import ENV_OPTIONS, config_dir, expand_home, hide_secrets
from skyrl.config.eval_sets import NOTHING, evaluation_options, longest_answer, options_of_model, with_run
from skyrl.config.options import (
    RENAMED,
    UNREAD,
    alias_problems,
    all_options,
    groups,
    reads,
    short_names,
    unknown_option,
)
from skyrl.config.schema import RunConfig, WarmupConfig
from skyrl.config.trainers import NO_REWARD, control_options, with_control_steps
from skyrl.config.validation import (
    CHOICES,
    check_serve,
    check_typed,
    ignored_on_resume,
    with_params,
    without_foreign_params,
)
from skyrl.hub.model_path import path_problem
from skyrl.types import UserError

VERSION_BASE = "1.3"
COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)
SCHEMA_NAME = "skyrl_schema"
SERVE_SCHEMA_NAME = "skyrl_serve_schema"
SERVE_GROUPS = ("model",)  # the folders of conf that serve.yaml uses
# What a server's engine is built with besides its options: how many sequences are on their way does not follow from a
# batch there, and rows have no typical length. Enough for any number of ranks.
MANY_PROMPTS = 1 << 20
TYPICAL_ROW = 1024
MAX_SUFFIX = 120
MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 3900  # of the 4096 for a file in it
# Command -> from what was typed to the options that every command has.
ENTRY_OPTIONS = {"evaluate": evaluation_options, "control": control_options}
# Overrides that do not say what a run computes, or that its name already holds.
UNNAMED = ("seed", "run", "tracking", "alerts", "dashboard", "experiment", "debug", "dry_run", "hydra", "trainer")


@functools.cache
def _schema() -> DictConfig:
    """RunConfig as OmegaConf's base, that YAML and command line may only override; merging into it makes a copy.

    OmegaConf marks what it makes from a frozen dataclass as read-only, which would refuse every override; the mark
    goes, types and the refusal of unknown keys stay. env.options belongs to the environment and takes any key, and so
    do a template's variables, a server's aliases, losses, references and objectives; parameters of a loss and an
    advantage are checked against their declarations.
    """
    node = OmegaConf.structured(RunConfig)
    _thaw(node)
    for free in (
        node.env.options,
        node.control.env_kwargs,
        node.control.policy_options,
        node.chat.template_kwargs,
        node.algorithm.advantage.params,
        node.algorithm.loss.params,
        node.algorithm.objectives.weights,
        node.algorithm.objectives.constraints,
        node.algorithm.reference.models,
        node.service.aliases,
        node.service.loss_substitutes,
    ):
        free._set_flag("struct", False)
    return node


@functools.cache
def register_schema() -> None:
    """Gives Hydra the schema of each command: what it does not read is not there, so Hydra refuses it by itself."""
    for name, mode in ((SCHEMA_NAME, "train"), (SERVE_SCHEMA_NAME, "serve")):
        node = copy.deepcopy(_schema())
        _prune(node, mode, "")
        ConfigStore.instance().store(name, node=node)


def _thaw(node: DictConfig) -> None:
    node._set_flag("readonly", None)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _thaw(child)


def _prune(node: DictConfig, mode: str, prefix: str) -> None:
    for key in list(node):
        path, child = f"{prefix}{key}", node._get_node(key)
        if not reads(mode, path):
            node._set_flag("struct", False)
            node.pop(key)
            node._set_flag("struct", None)
        elif isinstance(child, DictConfig) and path in groups():
            _prune(child, mode, f"{path}.")


def quote_text(override: str, *, sweep: bool = False) -> str:
    """An override as Hydra's grammar wants it, where the value is a text and the grammar would refuse it or take it for
    several: a path may have commas, equals signs, quotes, a `~`, and letters of any language. In a `sweep` commas
    stand between values."""
    key, equals, value = override.partition("=")
    if re.fullmatch(r"[\w./:@+ -]*", value, re.ASCII):
        return override
    if key.startswith("hydra."):  # no option of ours, whose values are expanded where the config is made
        return f"{key}={expand_home(value, key)}" if "~" in value and not re.search(r"['\"\\]", value) else override
    try:
        several = OverridesParser.create().parse_override(override).is_sweep_override()
        if sweep or not several:
            return override
    except HydraException:
        pass
    texts = {option.path for option in all_options() if option.type in ("path", "str")}
    if key.lstrip("+") in texts and not (sweep and re.search(r"[,()]", value)):
        escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value)
        return f"{key}='{escaped}'"
    if "~" not in value or re.search(r"['\"\\]", value):
        return override
    return key + equals + re.sub(r"[^\s,\[\]{}():]*~[^\s,\[\]{}()]*", lambda found: f"'{found[0]}'", value)


def _expand_homes(values: dict[str, Any]) -> dict[str, Any]:
    """`values`, changed in place: every option whose type is a path has its home folder written out."""
    for known in all_options():
        group, _, name = known.path.rpartition(".")
        held = _at(values, group) if group else values
        value = held.get(name)
        if known.type == "path" and isinstance(value, str):
            held[name] = expand_home(value, known.path)
        elif known.type == "dict[str, path]" and isinstance(value, dict):
            held[name] = {key: expand_home(path, f"{known.path}.{key}") for key, path in value.items()}
    return values


def load_config(overrides: Sequence[str] = (), *, mode: str = "train") -> RunConfig:
    """The RunConfig that `python -m skyrl.<mode> <overrides>` would run, run.name and run.dir filled.

    Raises: UserError for an unknown option, group or recipe, or a value of the wrong type.
    """
    register_schema()
    if mode in ENTRY_OPTIONS:
        overrides = ENTRY_OPTIONS[mode](overrides)
    overrides = [quote_text(override) for override in overrides]
    try:
        with initialize_config_dir(str(config_dir()), version_base=VERSION_BASE):
            composed = compose("serve" if mode == "serve" else "config", overrides=overrides)
    except COMPOSE_ERRORS as error:
        raise UserError(explain(error, mode)) from error
    return finish(composed, overrides, mode=mode)


NAMED = ("algorithm.reference.models", "service.aliases", "service.loss_substitutes")  # whose keys may have dots


def as_overrides(options: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Options that a script has as values, nested or by path, written as on the command line. Hydra's grammar quotes
    texts, but not the names in a mapping."""
    for name, value in options.items():
        path = prefix + name
        if isinstance(value, Mapping) and path not in NAMED:
            yield from as_overrides(value, f"{path}.")
        else:
            yield f"{path}={_as_typed(value)}"


def _as_typed(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{_as_typed(item)}' for key, item in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_as_typed, value))}]"
    return json.dumps(value, ensure_ascii=False, default=str)


def finish(composed: DictConfig, overrides: Sequence[str], *, mode: str = "train") -> RunConfig:
    """A composed config as a frozen RunConfig with run.name and run.dir filled; for a server its rules are checked and
    service.aliases has those of aliases_file too."""
    _refuse_unknown(composed, RunConfig, "", mode)
    try:
        values: Any = OmegaConf.to_container(composed)
        cfg = OmegaConf.to_object(OmegaConf.merge(_schema(), _expand_homes(values)))
    except OmegaConfBaseException as error:
        raise UserError(explain(error, mode)) from error
    assert isinstance(cfg, RunConfig)
    if problem := path_problem(cfg.model.path):
        raise UserError(f"model.path={cfg.model.path}: {problem}")
    if Path(cfg.model.tokenizer).is_file() and not cfg.model.tokenizer.lower().endswith(".gguf"):
        raise UserError(f"model.tokenizer={cfg.model.tokenizer}: is a file; give its folder")
    typed = typed_options(overrides)
    if mode == "serve":
        return _finish_serve(cfg)
    if mode == "sft" and typed.get("trainer", "sft") != "sft":
        raise UserError(f"trainer={cfg.trainer}: python -m skyrl.sft is sft; use python -m skyrl.train for others")
    if cfg.trainer not in CHOICES["trainer"]:
        raise UserError(f"trainer={cfg.trainer}: choose one of: {', '.join(CHOICES['trainer'])}")
    if typed.get("model") == "tiny" and cfg.model.path != "tiny":
        raise UserError(f"model=tiny: model.path={cfg.model.path} names another model; leave one of the two out")
    command = mode
    if mode == "control" and cfg.trainer != mode:
        raise UserError(
            f"trainer={cfg.trainer}: python -m skyrl.control is control; use a recipe of it, or skyrl.train"
        )
    if mode == "sft" or (mode == "train" and cfg.trainer != "rl"):
        mode = "sft" if mode == "sft" else cfg.trainer
        cfg = dataclasses.replace(cfg, trainer=mode)
    for key in typed:
        if key in UNREAD[mode] or (key in {option.path for option in all_options()} and not reads(mode, key)):
            raise UserError(unknown_option(key, mode=mode))
    cfg = with_control_steps(with_params(cfg))
    if mode == "evaluate" and "algorithm" in typed:  # a recipe; of the group objectives are read
        raise UserError("algorithm: skyrl.evaluate does not read it; leave it out")
    if mode == "evaluate":
        cfg, overrides = _finish_evaluate(cfg, overrides)
    check_typed(cfg, [key for key in typed if mode != "evaluate" or not key.startswith("eval.")])
    name = cfg.run.name or default_name(cfg, overrides, mode=command)
    if "/" in name or name.startswith("."):
        raise UserError(f"run.name={name}: a name has no / and no leading dot; give a folder with run.dir")
    run = dataclasses.replace(cfg.run, name=name)
    cfg = dataclasses.replace(cfg, run=run)
    folder = resolve_run_dir(cfg)
    if too_long := [part for part in folder.parts if len(os.fsencode(part)) > MAX_NAME_BYTES]:
        raise UserError(
            f"{'run.dir' if cfg.run.dir else 'run.name'}={too_long[0]}: {len(os.fsencode(too_long[0]))} bytes long, "
            f"and file systems allow {MAX_NAME_BYTES}; give a shorter name"
        )
    if (length := len(os.fsencode(folder.absolute()))) > MAX_PATH_BYTES:
        raise UserError(
            f"run.dir: its path is {length} bytes long, and the system allows {MAX_PATH_BYTES} for a folder"
        )
    return dataclasses.replace(cfg, run=dataclasses.replace(run, dir=str(folder)))


def _finish_evaluate(cfg: RunConfig, overrides: Sequence[str]) -> tuple[RunConfig, Sequence[str]]:
    """An evaluation's config, with the options of the run whose model it is where none are typed; and the overrides by
    which it is named, with that model."""
    overrides = [one for one in overrides if one not in NOTHING]
    if (run := options_of_model(cfg)) is not None:
        other = {
            "reward_model": "a reward model writes no answers; evaluate a policy, which may have it as a reward",
            "control": f"{cfg.run.resume} is a policy for control; skyrl.trainers.control.load_policy plays it",
        }
        if (trainer := run.get("trainer")) in other:
            raise UserError(f"model: {other[trainer]}")
        typed = [key for key in typed_options(overrides) if key != "model"]
        cfg = from_dict(with_run(dataclasses.asdict(cfg), to_dict(from_dict(run)), typed))
        overrides = [*overrides, f"model={cfg.model.path if cfg.run.resume == 'auto' else cfg.run.resume}"]
    if cfg.env.name in NO_REWARD:  # of the run, whose model is evaluated on something else
        cfg = dataclasses.replace(cfg, env=dataclasses.replace(cfg.env, name="", options={}))
    sampler = dataclasses.replace(cfg.sampler, max_new_tokens=longest_answer(cfg))
    batch = dataclasses.replace(cfg.batch, prompts_per_step=MANY_PROMPTS)
    return dataclasses.replace(cfg, sampler=sampler, batch=batch, warmup=WarmupConfig()), overrides


def _finish_serve(cfg: RunConfig) -> RunConfig:
    """A server's config: what its engine is built with is filled in, and all rules are checked."""
    longest, service = min(TYPICAL_ROW, cfg.batch.max_row_tokens or TYPICAL_ROW), cfg.service
    cfg = dataclasses.replace(
        cfg,
        experiment="serve",
        sampler=dataclasses.replace(cfg.sampler, max_new_tokens=1),
        batch=dataclasses.replace(cfg.batch, prompts_per_step=MANY_PROMPTS),
        data=dataclasses.replace(cfg.data, max_prompt_tokens=max(0, longest - 1)),
        run=dataclasses.replace(cfg.run, name="serve", dir=service.folder, resume="never"),
    )
    check_serve(cfg)
    if not service.aliases_file:
        return cfg
    aliases = _read_aliases(cfg) | service.aliases
    return dataclasses.replace(cfg, service=dataclasses.replace(service, aliases=aliases))


def _read_aliases(cfg: RunConfig) -> dict[str, str]:
    path = Path(cfg.service.aliases_file)
    where = f"service.aliases_file={path}"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}; give a file with a mapping of names to weights") from error
    except yaml.YAMLError as error:
        raise UserError(explain(error, "serve")) from error
    if not isinstance(values, dict) or not all(isinstance(v, str) for pair in values.items() for v in pair):
        raise UserError(f'{where}: not a mapping of names to weights; write lines such as Qwen/Qwen3-8B: ""')
    values = {name: expand_home(weights, f"{where}: {name}") for name, weights in values.items()}
    for problem in alias_problems(cfg, values, where):
        raise UserError(problem)
    return values


def resolve_run_dir(cfg: RunConfig) -> Path:
    """The run folder: run.dir, or runs/<run.name> in the current directory."""
    return Path(cfg.run.dir) if cfg.run.dir else Path("runs") / cfg.run.name


def typed_options(overrides: Sequence[str]) -> dict[str, str]:
    """Option or group -> value as typed, for each override; the last one counts, as it does in Hydra."""
    typed: dict[str, str] = {}
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        typed[re.sub(r"@.*", "", key)] = value
    return typed


def default_name(cfg: RunConfig, overrides: Sequence[str], *, mode: str = "train") -> str:
    """ "<experiment>[-sft|-evaluate]-seed<seed>[-<other overrides>]": the same command finds the same folder again.

    The order of the overrides does not matter; of two for one option the last counts, as it does in Hydra. Characters
    that are unsafe in a file name become one "_". What is beyond 120 characters becomes 6 hex digits of a hash.
    """
    typed = {key: value for key, value in typed_options(overrides).items() if key.split(".")[0] not in UNNAMED}
    kept = {key: hide_secrets(value, key) if key.startswith(ENV_OPTIONS) else value for key, value in typed.items()}
    named = {"train": f"-{cfg.trainer}" * ("trainer" in typed_options(overrides)), "control": ""}.get(mode, f"-{mode}")
    name = f"{cfg.experiment}{named}-seed{cfg.seed}"
    if not kept:
        return name
    short = short_names()
    words = sorted(f"{short.get(key, key)}={value}" for key, value in kept.items())
    suffix = "-".join(re.sub(r"[^A-Za-z0-9.=+-]+", "_", word).rstrip("_") for word in words)
    if len(suffix) > MAX_SUFFIX:
        digest = hashlib.sha256("\n".join(sorted(f"{key}={value}" for key, value in kept.items())).encode()).hexdigest()
        suffix = f"{suffix[: MAX_SUFFIX - 7]}-{digest[:6]}"
    return f"{name}-{suffix}"


def _refuse_unknown(node: DictConfig, cls: type, prefix: str, mode: str) -> None:
    """`+name=value` can put a key beside the fields of a dataclass, where nothing would ever read it."""
    fields = {field.name for field in dataclasses.fields(cls)}
    schema = "serve" if mode == "serve" else "train"
    for key in map(str, node):
        path = f"{prefix}{key}"
        if key not in fields or not reads(schema, path):
            raise UserError(_unknown(path, mode))
        child = node._get_node(key)
        kind = OmegaConf.get_type(child) if isinstance(child, DictConfig) else None
        if isinstance(child, DictConfig) and kind is not None and dataclasses.is_dataclass(kind):
            _refuse_unknown(child, kind, path + ".", mode)
    for key in fields:
        if key not in node and reads(schema, f"{prefix}{key}"):
            raise UserError(f"{prefix}{key}: cannot be removed; give it another value")


def _unknown(path: str, mode: str) -> str:
    folders = tuple(folder.name for folder in config_dir().iterdir() if folder.is_dir())
    return unknown_option(path, SERVE_GROUPS if mode == "serve" else folders, mode)


def explain(error: BaseException, mode: str = "train") -> str:
    """One line for a person from what Hydra or OmegaConf raised: place, given value, what is allowed."""
    if isinstance(error, OverrideParseException):
        return (
            f"cannot read {error.override!r}: write option=value, and put a value with special characters in quotes: "
            f"option='\"a=b\"'"
        )
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark
        place = f"{mark.name}, line {mark.line + 1}" if mark else "a file in conf"
        return f"{place}: not YAML: {error.problem}"
    if in_file := re.search(
        r"In '([^']+)': (\w+) raised while composing config:\s*(.*?)\s*full_key: (\S+)", str(error), re.S
    ):
        file, kind, what, path = in_file.groups()
        unknown = kind in ("ConfigKeyError", "ConfigAttributeError")
        if file.startswith("experiment/") and path == "experiment" and "DictConfig" in what:
            return f"{file}.yaml: a recipe sets options at the top; make its first line: # @package _global_"
        return f"{file}.yaml: " + (_unknown(path, mode) if unknown else f"{path}: {' '.join(what.split())}")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if name in ("submitit_slurm", "submitit_local", "optuna"):
            return f"{group}={name}: its package is not installed; get the extra: pip install 'skyrl-spmd[sweep]'"
        known = sorted(str(option) for option in error.options or [])
        meant = difflib.get_close_matches(name, known, n=1)
        if name in CHOICES.get(f"{group}.name", ()):
            meant = [f"{group}.name={name}"]
        hint = f"did you mean {meant[0]}? There are" if meant else "choose one of"
        return f"{group or 'config'}={name}: no such file in conf/{group}; {hint}: {', '.join(known)}"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    if removed := re.search(r"Error merging override ~([^\s=]+)", str(error)):
        return f"{removed.group(1)}: cannot be removed; give it another value"
    given = re.search(r"Error merging override \+*([^\s=]+)=(.*)", str(error))
    named = re.search(r"Could not (?:override|append value to) '([^']+)'", str(error))
    if isinstance(cause, InterpolationResolutionError):
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        path = str(cause.full_key)
        if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) or named:
            return _unknown(named.group(1) if named else path, mode)
        return _wrong_value(path, given.group(2) if given and given.group(1) == path else None, cause, mode)
    if named:
        return _unknown(named.group(1), mode)
    if isinstance(error, ConfigCompositionException) and "Ambiguous value" in str(error):
        return str(error).splitlines()[0] + "; a list needs brackets, [1,2]; a sweep over values needs -m"
    return " ".join(str(error).split("See https://")[0].split())


def _wrong_value(path: str, value: str | None, cause: OmegaConfBaseException, mode: str) -> str:
    text = f"{path}={value}" if value is not None else path
    for option in all_options(mode):
        if path.startswith(f"{option.path}.") and option.type == "dict[str, float]":
            return f"{text}: needs a number"
        if option.path == path:
            if option.type.startswith("list") and value:
                return f"{text}: needs a list, in brackets: {path}=[{value}]"
            return f"{text}: needs a value of type {option.type} (default {option.default!r}): {option.doc}"
    if path in groups(mode):
        names = ", ".join(option.path for option in all_options(mode) if option.path.startswith(path + "."))
        return f"{text}: is a group of options; set one of {names}"
    return f"{text}: {str(cause).splitlines()[0]}"


def to_dict(cfg: RunConfig) -> dict[str, Any]:
    """Plain dicts, lists and numbers, nested as the dataclasses are, of all that a run reads, to be shown, compared and
    kept: without the secrets of an environment (args.hide_secrets)."""
    unread = set() if cfg.feedback.enabled else {"service", "feedback"}
    unread |= set() if cfg.dashboard.enabled else {"dashboard"}
    values = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in unread}
    return {**values, "env": {**values["env"], "options": hide_secrets(values["env"]["options"])}}


def from_dict(values: dict[str, Any]) -> RunConfig:
    """The RunConfig with these values; what is absent keeps its default, and names of an earlier release are read as
    those of today. Raises UserError for an unknown key."""
    values, renamed = copy.deepcopy(values), False
    for old, new in RENAMED.items():
        (group, _, name), (new_group, _, new_name) = old.rpartition("."), new.rpartition(".")
        held = _at(values, group)
        if name in held:
            renamed = True
            _at(values, new_group, make=True)[new_name] = held.pop(name)
    try:
        composed = OmegaConf.merge(_schema(), _expand_homes(values))
        assert isinstance(composed, DictConfig)
        cfg = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    assert isinstance(cfg, RunConfig)
    return with_params(without_foreign_params(cfg)) if renamed else with_params(cfg, plugins=False)


def _at(values: dict[str, Any], path: str, *, make: bool = False) -> dict[str, Any]:
    """The nested dict at a dotted path; an empty one that is not in `values` where there is none, unless `make`."""
    for part in path.split("."):
        values = values.setdefault(part, {}) if make else values.get(part, {})
    return values if isinstance(values, dict) else {}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, "group.option" -> value."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return out


def _that_count(cfg: RunConfig | dict[str, Any]) -> tuple[dict[str, Any], str]:
    values = flat(to_dict(cfg) if isinstance(cfg, RunConfig) else cfg)
    if values.get("trainer") == "sft":  # runs of earlier releases do not say which of the two they are
        values["trainer"] = "rl"
    return values, str(values.get("optim.schedule"))


def config_diff(before: RunConfig | dict[str, Any], now: RunConfig | dict[str, Any]) -> list[str]:
    """ "option: before -> now" for every option that changes what a resumed run computes, sorted; [] = may go on.

    Left out are places, speed and layout (validation.ignored_on_resume). Takes resolved configs, or their dicts.
    """
    (old, old_schedule), (new, new_schedule) = _that_count(before), _that_count(now)
    lines = []
    for path in sorted(old.keys() | new.keys()):
        if path in old and path in new and old[path] == new[path]:
            continue
        if ignored_on_resume(path, old_schedule) and ignored_on_resume(path, new_schedule):
            continue
        lines.append(f"{path}: {old.get(path, '(absent)')} -> {new.get(path, '(absent)')}")
    return lines


def config_digest(cfg: RunConfig | dict[str, Any]) -> str:
    """16 hex digits, equal for two configs between which config_diff finds nothing."""
    values, schedule = _that_count(cfg)
    kept = {path: value for path, value in values.items() if not ignored_on_resume(path, schedule)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
