"""One dict of named things per extension point; a name that is not there is answered with the names that are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from skyrl.types import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """Named things of one kind. `kind` is the word used in errors, for example "loss"."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._things: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that stores its argument under `name`. Raises UserError when the name is taken."""

        def keep(thing: T) -> T:
            if name in self._things and getattr(self._things[name], "__qualname__", None) != getattr(
                thing, "__qualname__", None
            ):
                raise UserError(f"{self.kind} {name!r} is registered twice; give one of them another name")
            self._things[name] = thing
            return thing

        return keep

    def get(self, name: str, where: str = "") -> T:
        """The thing called `name`. `where` is the config path to blame in the error."""
        if name not in self._things:
            place = f"{where}: " if where else ""
            raise UserError(f"{place}no {self.kind} called {name!r}; choose one of: {', '.join(self.names())}")
        return self._things[name]

    def things(self) -> list[T]:
        """All of what is registered, in the order in which it was."""
        return list(self._things.values())

    def names(self) -> list[str]:
        return sorted(self._things)

    def __contains__(self, name: object) -> bool:
        return name in self._things
