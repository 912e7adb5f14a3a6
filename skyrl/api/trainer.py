"""A run as an object: what a script of ten lines builds. Imports without torch.

trainer = skyrl.SkyRLTrainer(policy="Qwen/Qwen3-0.6B", environment=MyEnvironment, config=["batch.num_steps=50"])
print(trainer.train())
trainer.save("my_model")
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from skyrl.config.load import (
    as_overrides,
    config_dir,
    default_name,
    from_dict,
    load_config,
    resolve_run_dir,
    typed_options,
)
from skyrl.config.schema import RunConfig
from skyrl.config.validation import with_params
from skyrl.distributed import env
from skyrl.distributed.place import take_place
from skyrl.envs.adapters import as_environment
from skyrl.envs.base import ENVIRONMENTS, register_environment
from skyrl.envs.rewards import REWARDS
from skyrl.envs.rewards.base import register_reward, reward_names
from skyrl.hub.policies import POLICIES, Policy, model_folder, register_policy
from skyrl.main import end_now, set_torch_defaults
from skyrl.run_dir import final_values
from skyrl.sweep import play
from skyrl.tracking.hooks import check_hooks
from skyrl.types import Metrics, RunError, StopRun, UserError

if TYPE_CHECKING:
    from skyrl.run import Run


class SkyRLTrainer:
    """One run of RL, with the checks, checkpoints, resume and layouts of `python -m skyrl.train`; alone or, with every
    rank running the same script, under torchrun or srun.

    policy: a path, a hub name, `tiny`, the name, class or function of a registered policy, a transformers causal LM, or
    a pair of that and its tokenizer. environment: the name of one, a class, a function that makes one, or a foreign one
    that has an adapter (skyrl.envs.adapters). reward: the name of one, a function of text and prompt, a dict of either
    as "name" and its parameters, or a list of these (named objectives); the environment is then `single_turn`, unless
    one is named. config: option strings as on the command line, a dict, nested or by path, or a RunConfig. hooks:
    functions that are called after each step, or objects such as skyrl.Hook.

    The run folder is the same for the same options, so the script goes on where it was stopped. Raises UserError.
    """

    def __init__(
        self,
        policy: Any = None,
        environment: Any = None,
        reward: Any = None,
        config: Sequence[str] | Mapping[str, Any] | RunConfig = (),
        hooks: Sequence[Any] = (),
    ) -> None:
        _end_in_one_line()
        set_torch_defaults()
        take_place()
        check_hooks(hooks)
        given: dict[str, Any] = {}
        if policy is not None:
            given["model.path"] = _policy_name(policy)
        if environment is not None:
            given["env.name"] = _environment_name(environment)
        if reward is not None:
            given.setdefault("env.name", "single_turn")
            several = isinstance(reward, (list, tuple))
            given["env.options.reward"] = [_reward_name(one) for one in reward] if several else _reward_name(reward)
        named = [given.get("env.name", ""), given.get("model.path", ""), *reward_names(given.get("env.options.reward"))]
        self._things = [(kind, name, kind.get(name)) for kind in REWARDS.all for name in named if name in kind]
        self.hooks = tuple(hooks)
        self._told = False  # the table of this run has been printed by this process
        self.config = _with_given(config, given)

    @property
    def folder(self) -> Path:
        """The run folder: metrics, rollouts, checkpoints and the exported model."""
        return Path(self.config.run.dir)

    def train(self) -> Metrics:
        """Runs, or goes on, to the last step; the last value of every metric, the same on every rank. Collective.

        After a signal or at a deadline all is saved and the process ends with the exit status that asks launchers to
        start it again (75; 130 after an interrupt). Raises UserError and RunError.
        """
        self._run(lambda: play(self.config, "train", sweep=False, hooks=self.hooks))
        return final_values(self.folder / "metrics.jsonl")

    def evaluate(self) -> Metrics:
        """Plays the held-out prompts with the newest checkpoint of this run, or with the policy as it was given; the
        metrics, "eval/...", the same on every rank. Collective. Raises as `train` does."""
        return self._look(_evaluate)

    def save(self, folder: str | Path) -> None:
        """Writes the policy as the newest checkpoint has it, or as it was given, as a Hugging Face folder. Collective.
        An earlier folder of that name is replaced. Raises as `train` does."""
        self._look(lambda run: run.engine.export("policy", Path(folder).expanduser()))

    def _look(self, action: Callable[[Run], Any]) -> Any:
        """What `action` returns for the run as its newest checkpoint has it."""
        from skyrl.loop import open_run

        found = []

        def look() -> None:
            with contextlib.redirect_stdout(io.StringIO()) if self._told else contextlib.nullcontext():
                run = open_run(self.config)
            with run:
                run.take_hooks(self.hooks)
                found.append(action(run))

        self._run(look)
        return found[0]

    def _run(self, action: Callable[[], Any]) -> None:
        if self.config.dry_run:
            raise UserError("dry_run=true: for the command line, python -m skyrl.train --dry-run")
        for kind, name, thing in self._things:  # another trainer may have brought one of the same name since
            kind.register(name)(thing)
        try:
            action()
            self._told = True
        except StopRun as stop:
            print(f"skyrl: {stop}", file=sys.stderr, flush=True) if env.rank() == 0 else None
            env.report_to_launcher(str(stop))
            raise SystemExit(stop.exit_code) from None


def _evaluate(run: Run) -> Metrics:
    if not run.held_out:
        raise UserError("evaluate: there are no held-out prompts; set eval.every_steps above 0, or data.eval_path")
    return run.evaluate()


def _with_given(config: Any, given: dict[str, Any]) -> RunConfig:
    """The finished config of what the caller has written and what it was given as objects. Raises UserError."""
    if isinstance(config, RunConfig):
        values = dataclasses.asdict(config)
        for path, value in given.items():
            *groups, name = path.split(".")
            held = values
            for group in groups:
                held = held[group]
            held[name] = value
        cfg = with_params(from_dict(values))
        name = cfg.run.name or default_name(cfg, [f"{path}={value}" for path, value in given.items()])
        cfg = replace(cfg, run=replace(cfg.run, name=name))
        return replace(cfg, run=replace(cfg.run, dir=str(resolve_run_dir(cfg))))
    if isinstance(config, str) or not isinstance(config, (Mapping, Sequence)):
        raise UserError(f"config={config!r}: give a list of option strings, a dict or a RunConfig")
    words = list(as_overrides(config)) if isinstance(config, Mapping) else list(map(str, config))
    typed = typed_options(words)
    for path, value in given.items():
        if path in typed and typed[path].strip("'\"") != str(value):
            raise UserError(f"{path}={typed[path]}: in config, and {value!r} is given beside it; leave one of them out")
    known = {key: value for key, value in given.items() if not (key == "model.path" and value == "tiny")}
    if given.get("model.path") == "tiny":
        words.insert(0, "model=tiny")
    if "env.name" in given and "experiment" not in typed:
        name = given["env.name"].removesuffix("_model")  # support_model: the customer of `support`, played by a model
        known_recipe = name.isidentifier() and (config_dir() / "experiment" / f"{name}.yaml").is_file()
        words.insert(0, f"experiment={name if known_recipe else 'custom'}")
    return load_config([*words, *as_overrides(known)])


def _policy_name(policy: Any) -> str:
    """What model.path says for it. Raises UserError."""
    if isinstance(policy, (str, Path)):
        return str(policy)
    if name := next((name for name, thing in POLICIES.items() if thing is policy), ""):
        return name
    if isinstance(policy, Policy) or (isinstance(policy, type) and issubclass(policy, Policy)):
        register_policy(_name_of(policy))(policy if isinstance(policy, type) else policy.load)
        return _name_of(policy)
    model, tokenizer = policy if isinstance(policy, tuple) and len(policy) == 2 else (policy, None)
    return str(model_folder(model, tokenizer, "policy"))


def _environment_name(environment: Any) -> str:
    if isinstance(environment, str):
        ENVIRONMENTS.get(environment, "environment") if ":" in environment else None
        return environment
    name = next((name for name, thing in ENVIRONMENTS.items() if thing is environment), "") or _name_of(environment)
    if name not in ENVIRONMENTS or ENVIRONMENTS.get(name) is not environment:
        register_environment(name)(as_environment(environment, name))
    return name


def _reward_name(reward: Any) -> Any:
    if isinstance(reward, str):
        return reward
    if isinstance(reward, Mapping) and "name" in reward:
        return {**reward, "name": _reward_name(reward["name"])}
    if not callable(reward):
        raise UserError(f"reward={reward!r}: give the name of a reward, or a function of text and prompt, or a list")
    name = next((name for name, thing in REWARDS.items() if reward in (thing, getattr(thing, "fn", None))), "")
    if not name:
        name = _name_of(reward)
        register_reward(name)(reward)
    return name


def _name_of(thing: Any) -> str:
    """Where something that is not registered is defined: "script.py:Name", "package.module:Name"."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    module = str(named.__module__)
    if module == "__main__":
        module = Path(getattr(sys.modules["__main__"], "__file__", None) or "notebook").name
    return f"{module}:{named.__qualname__}"


def _end_in_one_line() -> None:
    """From here on an error that the script does not catch is told as on the command line: in one line where that is
    enough, by one rank, with the same exit status; and no rank waits for one that has failed."""
    before = sys.excepthook
    if getattr(before, "of_skyrl", False):
        return

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if env.in_group or isinstance(error, (UserError, RunError)):
            end_now(error, "train")
        before(kind, error, trace)

    tell.of_skyrl = True  # type: ignore[attr-defined]
    sys.excepthook = tell
