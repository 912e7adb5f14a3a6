"""Environments of other libraries, recognised by their methods and run unchanged. Imports none of these libraries."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from skyrl.envs.base import Environment
from skyrl.types import UserError


def as_environment(thing: Any, name: str) -> type[Environment]:
    """The Environment class of a class, a function that makes environments, or a foreign one. Raises UserError."""
    if isinstance(thing, type) and issubclass(thing, Environment):
        return thing
    if isinstance(thing, Environment):
        raise UserError(
            f"environment={name}: an instance plays one episode; give the class, or a function that makes one"
        )
    if not callable(thing):
        raise UserError(f"environment={name}: {thing!r} is no name, class or function that makes an environment")
    try:
        made = thing()
    except Exception as error:
        raise UserError(f"environment={name}: making one raised {type(error).__name__}: {error}") from error
    if not isinstance(made, Environment):
        raise UserError(f"environment={name}: it makes a {type(made).__name__}, wanted a skyrl.Environment")
    return _from_factory(thing, type(made), name)


def _from_factory(make: Callable[..., Environment], kind: type[Environment], name: str) -> type[Environment]:
    """A class whose instances `make` makes, with the data of theirs and the options that `make` takes."""

    def init(self: Any, **options: Any) -> None:
        raise AssertionError("instances come from the function")

    parameters = list(inspect.signature(make).parameters.values())
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    init.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
    init.__annotations__ = dict(getattr(make, "__annotations__", {}))
    members = {"__new__": lambda cls, **options: _named(make(**options), name), "__init__": init, "name": name}
    found = type(kind.__name__, (kind,), {**members, "__module__": make.__module__, "__qualname__": make.__qualname__})
    return found


def _named(made: Environment, name: str) -> Environment:
    made.name = name  # type: ignore[misc]
    return made
