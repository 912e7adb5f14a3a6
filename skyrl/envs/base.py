"""What an environment is, how one is found by name and made from options. Plain Python: no torch, no tokens.

An environment speaks messages and text. Who plays it (rollout.py) turns messages into tokens, draws the answer, and
calls it in a worker process (skyrl/workers) or through guard.py alone, so an environment may raise, hang, die or return
nonsense without spoiling a run silently.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from skyrl.args import expand_home
from skyrl.config.schema import DataConfig, EnvConfig
from skyrl.envs.data_files import data_file, read_prompts
from skyrl.envs.rewards.base import Reward, RewardOption, find_reward
from skyrl.registry import Registry
from skyrl.types import Message, Metrics, Prompt, UserError

Split = Literal["train", "test"]


@dataclass
class StepResult:
    """What an environment answers to one turn of the model.

    `reward` belongs to this turn; an episode's reward is the sum. It is a number, or named objectives such as
    {"accuracy": 1.0}; a turn may give some of them, an episode that ends with `done` all, and one that a limit cuts has
    0 for the rest. `observation` is what the model reads next (at least one message unless `done`).
    Metric keys end in their reduction (":mean", ":sum", ":max", ":min"), which
    holds over the turns that report one, then over episodes. "correct:mean", 0 or 1 on the last step, is what
    evaluation calls accuracy; the last one reported counts. Others are logged as "env/<key>".
    """

    reward: float | dict[str, float]
    done: bool
    observation: list[Message] = field(default_factory=list)
    metrics: Metrics = field(default_factory=dict)


class RetryableError(Exception):
    """Raised by an environment or a reward for what may pass: a server that is busy, a connection that broke. The call
    is made again; when that does not help, the episode is masked and counted, never scored and never a reason to stop.
    """


class Environment:
    """One instance plays one episode at a time: reset, step until done, close. Each of them may be `async def`; then
    one worker process plays many episodes at once.

    Subclasses write `step`; the keyword arguments of their constructor are the options a user sets as env.options.<x>,
    checked against the annotations (a `Path` comes with its `~` expanded). A constructor argument called `max_turns`
    receives env.max_turns. Instances are made per episode, so keep constructors cheap (files and models belong in
    module level caches). What a constructor takes as **more is unchecked, or has the names, types and defaults of the
    arguments of `more_options`.
    """

    name: ClassVar[str] = ""  # set by register_environment
    more_options: ClassVar[Callable[..., Any] | None] = None
    in_process: ClassVar[bool] = False  # calls are fast and safe, and made in the rank itself; not inherited
    retries: ClassVar[int] = 0  # above 0: a call that raises anything is made again so often, as for RetryableError
    prompt: Prompt

    def reset(self, prompt: Prompt) -> list[Message]:
        """Starts an episode and returns the messages the model answers first. Here: the prompt's own messages.

        An override that has an argument `seed` receives one that is keyed by the run's seed, the prompt and the sample,
        never by rank or time. One that is `async def` is awaited, as step and close are.
        """
        self.prompt = prompt
        return list(prompt.messages)

    def step(self, text: str) -> StepResult:
        """Scores one turn of the model: `text` is what it wrote, without the stop token."""
        raise NotImplementedError(f"environment {self.name!r} has no step()")

    def close(self) -> None:
        """Frees what reset and step took. Called once, also after an error."""

    @classmethod
    def plays_in_process(cls, options: dict[str, Any]) -> bool:
        """Whether calls are made in the rank itself although env.workers is above 0. Here: what the class says."""
        return bool(vars(cls).get("in_process", False))

    @classmethod
    def is_async(cls, options: dict[str, Any]) -> bool:
        """Whether calls wait, so that one worker makes many at once. Here: a method is `async def`."""
        return any(inspect.iscoroutinefunction(getattr(cls, name)) for name in ("reset", "step", "close"))

    @classmethod
    def objective_names(cls, options: dict[str, Any]) -> Sequence[str]:
        """Names of all objectives that its rewards give, if they are known before anything is played. Here: unknown."""
        return ()

    @classmethod
    def group_rewards(cls, options: dict[str, Any]) -> RewardOption:
        """Rewards, by name, of all samples of a prompt together (`register_reward(..., group=True)`), or of all
        episodes of a rank (batch=True). Each adds its objectives to the last turns of the samples when all have ended;
        texts are those of the last turns. A number that a turn of this environment gave is then the objective "reward".
        Here: none."""
        return []

    @classmethod
    def row_checks(cls, options: dict[str, Any]) -> list[Callable[[Prompt], object]]:
        """Functions that are called with each prompt at the start and raise UserError for one that cannot be scored.
        Here: none."""
        return []

    @classmethod
    def dataset(cls, options: dict[str, Any], data: DataConfig, split: Split, seed: int) -> Sequence[Prompt]:
        """The prompts of this environment for "train" or "test"; uids "<env>/<split>/<n>". Options are checked already.

        `Prompt.extra["answer"]` is what rewards compare with, `extra["solution"]` a text to imitate in supervised
        warm-up, `extra["source"]` the file:line it came from. Here: rows of data.path (test: of data.eval_path or the
        test file beside it) with a field "messages" or "prompt"; all other fields go to `extra`.
        """
        del options, seed
        return read_prompts(data_file(data, split), cls.name, split, data.max_prompts if split == "train" else 0)


ENVIRONMENTS: Registry[type[Environment]] = Registry("environment")


def register_environment(name: str) -> Callable[[type[Environment]], type[Environment]]:
    """Class decorator: makes an Environment known as env.name=<name>.

    Raises UserError for something that is no Environment, a name that is taken, or a class that has a name already.
    """

    def keep(cls: type[Environment]) -> type[Environment]:
        if not (isinstance(cls, type) and issubclass(cls, Environment)):
            raise UserError(f"register_environment({name!r}): {cls!r} is no subclass of skyrl.api.Environment")
        if cls.__dict__.get("name") not in (None, "", name):
            raise UserError(
                f"register_environment({name!r}): {cls.__name__} is called {cls.name!r} already; subclass it"
            )
        kept = ENVIRONMENTS.register(name)(cls)
        kept.name = name
        return kept

    return keep


def environment_options(cfg: EnvConfig) -> dict[str, Any]:
    """Keyword arguments for the environment cfg.name: cfg.options, checked, and max_turns where it is taken.

    Raises UserError naming env.options.<x> for an unknown option, a wrong type or a missing one.
    """
    # mypy looks for the hash of an environment where the class is what is hashed
    cls = ENVIRONMENTS.get(cfg.name, "env.name")  # type: ignore[arg-type]
    takes_turns = "max_turns" in _signature(cls)[0]  # type: ignore[arg-type]
    if takes_turns and "max_turns" in cfg.options:
        raise UserError("env.options.max_turns: this is an option of every environment; set env.max_turns instead")
    options = check_options(cls, cfg.options, "env.options", f"environment {cfg.name!r}", beside=("max_turns",))
    return {**options, **({"max_turns": cfg.max_turns} if takes_turns else {})}


def check_options(
    cls: Callable[..., Any], given: dict[str, Any], where: str, who: str, beside: tuple[str, ...]
) -> dict[str, Any]:
    """`given` as keyword arguments of a class, or of a function behind text and prompt: a text where a Path is wanted
    becomes one. `beside` are arguments that others give. Raises UserError, `where` a config path, for an unknown
    option, a wrong type or a missing one."""
    allowed, open_ended = _signature(cls)
    allowed = {key: value for key, value in allowed.items() if key not in beside}
    options = {}
    for key, value in given.items():
        if key not in allowed and not open_ended:
            recipe = " (a recipe of another environment may have set it: start from experiment=custom)"
            known = (", ".join(allowed) or "none") + recipe * (where == "env.options")
            raise UserError(f"{where}.{key}: {who} has no such option; it has: {known}")
        hint = allowed[key][0] if key in allowed else Any
        if not _matches(value, hint):
            raise UserError(f"{where}.{key}={value!r}: {who} wants {_spell(hint)} here")
        is_path = isinstance(value, str) and Path in _alternatives(hint)
        options[key] = Path(expand_home(value, f"{where}.{key}")) if is_path else value
    for key, (hint, default) in allowed.items():
        if default is NEEDED and key not in options:
            raise UserError(f"{where}.{key}: {who} needs it; give it {_spell(hint)}")
    return options


def named_with_options(
    given: Any, where: str, find: Callable[[str, str], Any], kind: str, beside: tuple[str, ...] = ()
) -> tuple[Any, dict[str, Any]]:
    """The thing of this kind that an option names, as text or {name: ..., option: ...}, and its options, checked as
    `check_options` does. Raises UserError."""
    options = dict(given) if isinstance(given, dict) else {"name": given}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"{where}={given!r}: give the name of a {kind}, or {{name: ..., option: ...}}")
    thing = find(name, where)
    return thing, check_options(getattr(thing, "fn", thing), options, where, f"{kind} {name!r}", beside)


def chosen_rewards(option: Any, where: str = "env.options.reward") -> list[tuple[Reward, dict[str, Any]]]:
    """The rewards that an option names, each with its parameters (see RewardOption). Raises UserError."""
    listed = isinstance(option, list)
    given = [(f"{where}[{i}]", one) for i, one in enumerate(option)] if listed else [(where, option)]
    found = [named_with_options(one, place, find_reward, "reward") for place, one in given]
    if not found or len({reward.name for reward, _ in found}) < len(found):
        raise UserError(f"{where}={option!r}: wanted the name of a reward, or a list of different ones (one lambda)")
    return found


def objective_names_of(cfg: EnvConfig) -> Sequence[str]:
    """Names of the objectives that the environment cfg.name gives with these options, if they are known: not behind
    wrappers, which may give others."""
    return () if cfg.wrappers else ENVIRONMENTS.get(cfg.name, "env.name").objective_names(environment_options(cfg))


def group_rewards_of(cfg: EnvConfig, *, batch: bool = False) -> list[tuple[Reward, dict[str, Any]]]:
    """The rewards of whole groups, or of whole batches, that the environment cfg.name has with these options, with
    their parameters. Raises UserError for one that is neither."""
    option = ENVIRONMENTS.get(cfg.name, "env.name").group_rewards(environment_options(cfg))
    found = chosen_rewards(option, f"env.name={cfg.name}: group_rewards()") if option else []
    for reward, _ in found:
        if not (reward.group or reward.batch):
            raise UserError(f"env.name={cfg.name}: group_rewards(): reward {reward.name!r} is not of a group")
    return [(reward, params) for reward, params in found if reward.batch == batch]


@functools.cache
def takes_seed(reset: Callable) -> bool:
    """Whether a reset has an argument `seed`."""
    parameters = inspect.signature(reset).parameters.values()
    return any(one.name == "seed" or one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)


def options_of(thing: Callable[..., Any]) -> dict[str, str]:
    """Every option of an environment, or parameter of a reward's function, with its default in words; "(needed)"
    without one."""
    allowed, _ = _signature(thing)
    return {
        name: "(needed)" if default is NEEDED else repr(default)
        for name, (_, default) in allowed.items()
        if name != "max_turns"
    }


NEEDED = inspect.Parameter.empty  # in the place of a default


@functools.cache
def _signature(thing: Callable[..., Any]) -> tuple[dict[str, tuple[Any, Any]], bool]:
    """Options of a class, or of a function behind text and prompt: {name: (type, default)}, and whether it takes
    any. Cached: made once for each."""
    call: Any = thing.__init__ if isinstance(thing, type) else thing  # type: ignore[misc]
    if call is object.__init__:
        return {}, False
    try:
        hints = typing.get_type_hints(call)
    except (NameError, TypeError):  # a name that exists for type checkers only, written in C: options go unchecked
        hints = {}
    allowed: dict[str, tuple[Any, Any]] = {}
    open_ended = False
    for parameter in list(inspect.signature(call).parameters.values())[1 if isinstance(thing, type) else 2 :]:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            more = getattr(thing, "__dict__", {}).get(
                "more_options"
            )  # of the class itself: a subclass has a ** of its own
            allowed, open_ended = (allowed | _signature(more)[0], False) if more else (allowed, True)
        elif parameter.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
            allowed[parameter.name] = (hints.get(parameter.name, Any), parameter.default)
    return allowed, open_ended


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that a union has, or the one that there is."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _matches(value: object, hint: Any) -> bool:
    """Whether a value from YAML fits an annotation. Annotations that YAML cannot express are not checked."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if len(alternatives := _alternatives(hint)) > 1:
        return any(_matches(value, one) for one in alternatives)
    if origin is Literal:
        return value in arguments
    if origin is dict:
        return isinstance(value, dict)
    if origin in (list, tuple):
        inner = arguments[0] if arguments else Any
        return isinstance(value, (list, tuple)) and all(_matches(item, inner) for item in value)
    if hint is type(None):
        return value is None
    if hint in (int, float):  # True is an int for Python, hardly ever for a person
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, str)
    return isinstance(value, hint) if hint in (bool, str, list, dict) else True


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of: " + ", ".join(str(argument) for argument in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
