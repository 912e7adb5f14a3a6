"""Wrappers: what stands between the run and any environment, `env.wrappers=[name]`, the first one innermost."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from skyrl.config.schema import EnvConfig
from skyrl.envs.base import ENVIRONMENTS, Environment, StepResult, environment_options, named_with_options, takes_seed
from skyrl.registry import Registry
from skyrl.types import Message, Prompt, UserError


class Wrapper(Environment):
    """Changes what passes between the model and the environment `self.env`, as Gymnasium's wrappers do.

    Subclasses write those of `action`, `observation` and `result` that they need, or override reset, step and close
    whole. Keyword arguments of the constructor, which hands `env` on, are options: env.wrappers=[{name: x, option: 1}].
    One instance belongs to one episode. `in_process` and async methods are the environment's business; a wrapper
    without `in_process = True` has all calls made in workers.
    """

    def __init__(self, env: Environment) -> None:
        self.env = env

    def action(self, text: str) -> str:
        """What the environment reads where the model wrote `text`."""
        return text

    def observation(self, messages: list[Message]) -> list[Message]:
        """What the model reads where the environment said `messages`, first and after each turn."""
        return messages

    def result(self, result: StepResult) -> StepResult:
        """What a turn comes to: reward, done and metrics. The observation in it went through `observation` already."""
        return result

    def reset(self, prompt: Prompt, seed: int = 0) -> list[Message]:
        self.prompt = prompt
        with_seed = {"seed": seed} if takes_seed(type(self.env).reset) else {}
        return _then(self.env.reset(prompt, **with_seed), self.observation)

    def step(self, text: str) -> StepResult:
        return _then(self.env.step(self.action(text)), self._seen)

    def close(self) -> None:
        return self.env.close()

    def _seen(self, result: StepResult) -> StepResult:
        if isinstance(result, StepResult) and result.observation:  # anything else is refused where it is checked
            result.observation = self.observation(result.observation)
        return self.result(result)


def _then(value: Any, follow: Callable[[Any], Any]) -> Any:
    """follow(value), awaited first where an async environment gave it."""
    if not inspect.isawaitable(value):
        return follow(value)

    async def later() -> Any:
        return follow(await value)

    return later()


WRAPPERS: Registry[type[Wrapper]] = Registry("wrapper")


def register_wrapper(name: str) -> Callable[[type[Wrapper]], type[Wrapper]]:
    """Class decorator: makes a Wrapper known to env.wrappers. Raises UserError for anything else, or a name taken."""

    def keep(cls: type[Wrapper]) -> type[Wrapper]:
        if not (isinstance(cls, type) and issubclass(cls, Wrapper)):
            raise UserError(f"register_wrapper({name!r}): {cls!r} is no subclass of skyrl.Wrapper")
        return WRAPPERS.register(name)(cls)

    return keep


def classes_of(cfg: EnvConfig) -> list[type[Environment]]:
    """The class of the environment, then those of its wrappers. Raises UserError for a name that is unknown."""
    # mypy looks for the hash of an environment where the class is what is hashed
    return [ENVIRONMENTS.get(cfg.name, "env.name"), *(cls for cls, _ in _wrappers(cfg))]  # type: ignore[arg-type]


def is_async(cfg: EnvConfig) -> bool:
    """Whether calls of the environment or of its wrappers wait, so that one worker makes many at once."""
    inner, *wrappers = classes_of(cfg)
    return inner.is_async(environment_options(cfg)) or any(cls.is_async({}) for cls in wrappers)


def make_environment(cfg: EnvConfig) -> Environment:
    """A new environment for one episode, or several one after the other. Raises UserError for bad options."""
    made = classes_of(cfg)[0](**environment_options(cfg))
    made.name = cfg.name  # type: ignore[misc]  # where it is known by its module, nothing has registered it
    for cls, options in _wrappers(cfg):
        inner, made = made, cls(made, **options)
        if getattr(made, "env", None) is not inner:
            raise UserError(f"env.wrappers: the constructor of {cls.__name__} has to call super().__init__(env)")
        made.name = f"{inner.name} in {cls.__name__}"  # type: ignore[misc]
        made.retries = inner.retries  # type: ignore[misc]
    return made


def _wrappers(cfg: EnvConfig) -> list[tuple[type[Wrapper], dict[str, Any]]]:
    """Class and checked options of each wrapper."""
    return [
        named_with_options(given, f"env.wrappers[{i}]", WRAPPERS.get, "wrapper", beside=("env",))
        for i, given in enumerate(cfg.wrappers)
    ]
