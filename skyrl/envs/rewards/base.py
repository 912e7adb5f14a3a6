"""Reward functions by name: text and prompt in, one number or named objectives out; or of a group of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from skyrl.registry import Registry
from skyrl.types import Prompt, UserError

RewardFunction = Callable[..., Any]
RewardOption = str | dict[str, Any] | list[Any]
"""How an option names rewards: "math", {"name": "length", "limit": 64} with its parameters, or a list of these."""


@dataclass(eq=False)
class Reward:
    """A reward function and what `register_reward` was told of it; calling it calls the function."""

    name: str
    fn: RewardFunction
    answer: bool = False
    group: bool = False
    batch: bool = False
    rate: str = ""
    objectives: tuple[str, ...] = ()
    check: RewardFunction | None = None

    def __post_init__(self) -> None:
        self.__module__ = str(getattr(self.fn, "__module__", ""))
        self.__qualname__ = str(getattr(self.fn, "__qualname__", self.name))

    def __call__(self, *args: Any, **params: Any) -> Any:
        return self.fn(*args, **params)

    @property
    def objective(self) -> str:
        """What a number that it returns is called among other objectives: its name without the module before it."""
        return self.name.rpartition(":")[2]

    @property
    def known_objectives(self) -> tuple[str, ...]:
        """Names of what it returns, as far as that can be told before it is called."""
        returned = getattr(self.fn, "__annotations__", {}).get("return")
        return self.objectives or ((self.objective,) if returned in (float, int, "float", "int") else ())


REWARDS: Registry[Reward] = Registry("reward")


def register_reward(
    name: str,
    *,
    answer: bool = False,
    group: bool = False,
    batch: bool = False,
    rate: str = "",
    objectives: Iterable[str] = (),
    check: RewardFunction | None = None,
) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator: makes a function known as env.options.reward=<name>, alone or with others in a list.

    `fn(text, prompt)` returns a number, or named objectives such as {"accuracy": 1.0, "safety": 0.5}; `text` is what
    the model wrote, without the stop token. group: `fn(texts, prompt)` is called once for all samples of a prompt, when
    all have ended, and returns a number or objectives for each text, in order. batch: a class in place of a function, a
    skyrl.judges.batch.BatchReward, which scores all episodes of a rank at once. Further arguments are parameters
    (env.options.reward={name: <name>, limit: 64}). All numbers must be finite; what happens on an error or a hang is
    guard.py's business, so let errors out.

    answer: it reads `reference(prompt)`; a row without an answer is then refused at the start. rate: the share of texts
    with another number than 0 is logged as env/<rate>. objectives: the names that it returns, so that options that
    speak of others are refused at the start. check: `check(prompt, **parameters)`, called for each row at the start,
    raises UserError for one that the reward cannot score. Raises UserError when the name is taken.
    """

    def keep(fn: RewardFunction) -> RewardFunction:
        if not callable(fn):
            raise UserError(f"reward {name!r}: {fn!r} is no function of a text and a prompt")
        if batch and not hasattr(fn, "score"):
            raise UserError(f"reward {name!r}: batch=True is for a class with a method score(episodes, tools)")
        REWARDS.register(name)(Reward(str(name), fn, answer, group, batch, rate, tuple(objectives), check))
        return fn

    return keep


def reward_names(option: Any) -> list[str]:
    """The names in an option that names rewards."""
    given = option if isinstance(option, list) else [option] if option else []
    return [str(one.get("name", "")) if isinstance(one, dict) else str(one) for one in given]


def find_reward(name: str, where: str) -> Reward:
    """The reward called `name`, also a function as "package.module:name". Raises UserError naming `where`."""
    found: Any = REWARDS.get(name, where)
    if isinstance(found, Reward):
        return found
    if not callable(found):
        raise UserError(f"{where}={name}: it is no function of a text and a prompt")
    return next((one for one in REWARDS.things() if getattr(one, "fn", None) is found), Reward(name, found))


@dataclass(frozen=True)
class GroupCall:
    """A call of a group reward, of the texts of all samples of a prompt, that is still to be made."""

    reward: Reward
    params: dict[str, Any]
    texts: tuple[str, ...]

    def __call__(self, prompt: Prompt) -> Any:
        return self.reward(list(self.texts), prompt, **self.params)


def add_objectives(given: dict[str, Any], reward: Reward, value: Any) -> None:
    """Adds what a reward returned to the objectives that there are. Raises ValueError for none, or a name twice."""
    named = value if isinstance(value, Mapping) else {reward.objective: value}
    if not named:
        raise ValueError(f"reward {reward.name!r} gives no objective; return a number, or 0 for each name")
    for name, number in named.items():
        if name in given:
            raise ValueError(f"objective {name!r} is given twice; let reward {reward.name!r} return another name")
        given[name] = number


def reference(prompt: Prompt) -> str:
    """The right answer, prompt.extra["answer"] as text. Raises UserError when the prompt has none, or one that no text
    can equal: a list, NaN, blank text."""
    answer = prompt.extra.get("answer")
    if answer is None:
        raise UserError(f"{prompt.place}: field 'answer' is missing, and this reward needs it")
    if isinstance(answer, (dict, list, bytes)) or not str(answer).strip() or answer != answer:
        raise UserError(f"{prompt.place}: field 'answer' is {str(answer)[:60]!r}, wanted a text or a number")
    return str(answer)
