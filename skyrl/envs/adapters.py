"""Environments of other libraries, recognised by their methods and run unchanged. Imports none of these libraries.

methods of an instance                    whose it is
init, step                                skyrl-gym's text environments: extras are the fields of the data's row
get_observation, step                     textarena's games of one player
async initial_observation, step           the Tinker cookbook's Env and MessageEnv; make_envs: its EnvGroupBuilder
reset(seed=...), step                     Gymnasium's with texts as observations and actions
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from skyrl.config.schema import DataConfig
from skyrl.envs.base import Environment, Split, StepResult
from skyrl.types import Message, Prompt, UserError

OPENING = [{"role": "user", "content": "(the environment begins)"}]  # where the environment says the first words
NUM_TRAIN, NUM_TEST = 1000, 100  # beginnings, by their seeds, of an environment without data of its own


def as_environment(thing: Any, name: str) -> type[Environment]:
    """The Environment class of a class, a function that makes environments, or a foreign one. Raises UserError."""
    if isinstance(thing, type) and issubclass(thing, Environment):
        return thing
    if isinstance(thing, Environment):
        raise UserError(
            f"environment={name}: an instance plays one episode; give the class, or a function that makes one"
        )
    if hasattr(thing, "make_envs") and not isinstance(thing, type):
        return _class_of(_Cookbook, name, lambda: asyncio.run(thing.make_envs())[0])
    if not callable(thing):
        raise UserError(f"environment={name}: {thing!r} is no name, class or function that makes an environment")
    if hasattr(thing, "init") and hasattr(thing, "step"):  # a class of skyrl-gym, whose instances need a row
        return _class_of(_SkyRLGym, name, thing)
    try:
        made = thing()
    except Exception as error:
        raise UserError(f"environment={name}: making one raised {type(error).__name__}: {error}") from error
    if isinstance(made, Environment):
        return _from_factory(thing, type(made), name)
    if hasattr(made, "make_envs"):
        return as_environment(made, name)
    if hasattr(made, "step"):
        for methods, kind in (("get_observation", _TextArena), ("initial_observation", _Cookbook), ("reset", _Gym)):
            if hasattr(made, methods):
                return _class_of(kind, name, thing)
    raise UserError(
        f"environment={name}: it makes a {type(made).__name__}, wanted a skyrl.Environment, or one of Gymnasium, "
        "skyrl-gym, textarena or the Tinker cookbook"
    )


def _from_factory(make: Callable[..., Environment], kind: type[Environment], name: str) -> type[Environment]:
    """A class whose instances `make` makes, with the data of theirs and the options that `make` takes."""

    def new(cls: type[Environment], **options: Any) -> Environment:
        made = make(**options)
        made.name = name  # type: ignore[misc]
        return made

    def init(self: Any, **options: Any) -> None:
        """Only its signature is read: what `new` gives is made already."""

    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(make).parameters.values())
    init.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
    init.__annotations__ = dict(getattr(make, "__annotations__", {}))
    members = {"__new__": new, "__init__": init, "name": name, "__module__": make.__module__}
    return type(kind.__name__, (kind,), {**members, "__qualname__": make.__qualname__})


def _class_of(kind: type[_Foreign], name: str, make: Callable[..., Any]) -> type[Environment]:
    return type(kind.__name__, (kind,), {"make": staticmethod(make), "name": name, "__module__": "__main__"})


class _Foreign(Environment):
    """Plays an instance of another library, which `make` gives, one for each episode."""

    make: Callable[..., Any]
    inner: Any = None

    @classmethod
    def dataset(cls, options: dict[str, Any], data: DataConfig, split: Split, seed: int) -> Sequence[Prompt]:
        """Rows of data.path where it is given, else beginnings by their seeds."""
        if data is not None and data.path:
            return super().dataset(options, data, split, seed)
        first, count = (0, NUM_TRAIN) if split == "train" else (NUM_TRAIN, NUM_TEST)
        return [
            Prompt(f"{cls.name}/{split}/{i}", cls.name, list(OPENING), {"seed": first + i, "opened": True})
            for i in range(count)
        ]

    def reset(self, prompt: Prompt) -> list[Message]:
        """The messages that the environment begins with; after those of the prompt's row, if it has one."""
        self.prompt, self.inner = prompt, self.make()
        told = self.begin(int(prompt.extra.get("seed", 0)))
        return told if prompt.extra.get("opened") else [*prompt.messages, *told]

    def begin(self, seed: int) -> list[Message]:
        """What the instance says first."""
        raise NotImplementedError

    def close(self) -> None:
        if self.inner is not None and hasattr(self.inner, "close"):
            self.inner.close()


class _SkyRLGym(_Foreign):
    def reset(self, prompt: Prompt) -> list[Message]:
        self.prompt = prompt
        takes = inspect.signature(self.make).parameters
        self.inner = self.make(**({"env_config": {}, "extras": prompt.extra} if "extras" in takes else {}))
        messages, _ = self.inner.init(list(prompt.messages))
        return list(messages)

    def step(self, text: str) -> StepResult:
        told = self.inner.step(text)
        return StepResult(told["reward"], told["done"], list(told.get("observations") or []))


class _Gym(_Foreign):
    def begin(self, seed: int) -> list[Message]:
        observation, _ = self.inner.reset(seed=seed)
        return _user(observation)

    def step(self, text: str) -> StepResult:
        observation, reward, terminated, truncated, _ = self.inner.step(text)
        done = bool(terminated or truncated)
        return StepResult(reward, done, [] if done else _user(observation))


class _TextArena(_Foreign):
    def begin(self, seed: int) -> list[Message]:
        self.inner.reset(num_players=1, seed=seed)
        self.told = self.inner.get_observation()[1]
        return _user(self.told)

    def step(self, text: str) -> StepResult:
        done, _ = self.inner.step(action=text)
        if not done:
            told, before = self.inner.get_observation()[1], self.told
            self.told = told
            return StepResult(0.0, False, _user(told.removeprefix(before) or told))  # some repeat all from the start
        told = self.inner.close()
        rewards, self.inner = told[0] if isinstance(told, tuple) else told, None
        return StepResult((rewards or {}).get(0, 0.0), True)


class _Cookbook(_Foreign):
    """Its environments speak tokens through a renderer. With one in its place that hands messages and texts through,
    they speak ours, and no token is made twice."""

    def begin(self, seed: int) -> list[Message]:
        self.inner = getattr(self.inner, "message_env", self.inner)
        if hasattr(self.inner, "renderer"):
            self.inner.renderer = _Messages()
        told = asyncio.run(self.inner.initial_observation())
        self.messages = list(told[0] if isinstance(told, tuple) else told)
        return self._plain(self.messages)

    def step(self, text: str) -> StepResult:
        speaks = hasattr(self.inner, "renderer")
        told = asyncio.run(self.inner.step(text if speaks else {"role": "assistant", "content": text}))
        after = list(getattr(told, "next_messages", None) or getattr(told, "next_observation", None) or [])
        more, self.messages = after[len(self.messages) + 1 :], after  # the answer is there already
        metrics = {f"{key}:mean": value for key, value in told.metrics.items() if isinstance(value, (int, float))}
        if "correct:mean" in metrics:
            metrics["correct:mean"] = float(metrics["correct:mean"])
        return StepResult(told.reward, told.episode_done, [] if told.episode_done else self._plain(more), metrics)

    def _plain(self, messages: Any) -> list[Message]:
        if not all(isinstance(one, dict) for one in messages):
            raise TypeError("it gives tokens without a `renderer` of its own; only messages can be put to any model")
        return [dict(one) for one in messages]


class _Messages:
    """A renderer that renders nothing."""

    def build_generation_prompt(self, messages: list[Message], *args: Any, **more: Any) -> list[Message]:
        return messages

    def get_stop_sequences(self) -> list[str]:
        return []

    def parse_response(self, response: str) -> tuple[Message, Any]:
        ended = SimpleNamespace(is_stop_sequence=True, is_clean=True, value="stop_sequence")
        return {"role": "assistant", "content": response}, ended


def _user(observation: Any) -> list[Message]:
    if not isinstance(observation, str):
        raise TypeError(f"its observation is a {type(observation).__name__}; only texts can be put to a language model")
    return [{"role": "user", "content": observation}]
