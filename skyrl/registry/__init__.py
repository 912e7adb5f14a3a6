"""One dict of named things per extension point; a name that is not there is answered with the names that are.

A name with a colon is where a thing lies, "package.module:Name": it is imported when it is asked for.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import sys
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from skyrl.types import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """Named things of one kind. `kind` is the word used in errors, for example "loss"."""

    all: ClassVar[list[Registry[Any]]] = []  # every extension point there is, in the order of import

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._things: dict[str, T] = {}
        Registry.all.append(self)

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that stores its argument under `name`. Raises UserError when the name is taken."""
        if not isinstance(name, str) or not name:
            raise UserError(f"{self.kind} {name!r}: a name is a text; write @register_{self.kind}('name')")

        def keep(thing: T) -> T:
            other = self._things.get(name)
            if other is not None and getattr(other, "__qualname__", None) != getattr(thing, "__qualname__", None):
                raise UserError(
                    f"{self.kind} {name!r} is registered twice, by {origin(other)} and by {origin(thing)}; give one of "
                    "them another name"
                )
            self._things[name] = thing
            return thing

        return keep

    def get(self, name: str, where: str = "") -> T:
        """The thing called `name`. `where` is the config path to blame in the error."""
        if name not in self._things and ":" in name:
            self._things[name] = self._import(name, where)
        if name not in self._things:
            place = f"{where}: " if where else ""
            known = (
                f"choose one of: {', '.join(self.names())}" if self._things else "a plugin may register some (plugins)"
            )
            raise UserError(f"{place}no {self.kind} called {name!r}; {known}")
        return self._things[name]

    def _import(self, name: str, where: str) -> T:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"{where or self.kind}={name}: {error}; write package.module:Name") from error

    def things(self) -> list[T]:
        """All of what is registered, in the order in which it was."""
        return list(self._things.values())

    def items(self) -> list[tuple[str, T]]:
        """Name and thing of all that is registered, sorted by name."""
        return sorted(self._things.items())

    def names(self) -> list[str]:
        return sorted(self._things)

    def __contains__(self, name: object) -> bool:
        return name in self._things


def import_extra(module: str, where: str, extra: str, otherwise: str) -> Any:
    """A module of a package that skyrl does without, imported when it is needed. Raises UserError that begins with
    `where`, names the extra that brings the package, and says what to do `otherwise`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0].replace("_", "-")
        get = f"run pip install 'skyrl-spmd[{extra}]', or {otherwise}"
        raise UserError(f"{where}: the package {name!r} is not installed; {get}") from error


_UNREADABLE = (OSError, SyntaxError, TypeError, tokenize.TokenError)  # no file, or one edited since it was imported


def origin(thing: Any) -> str:
    """Where something that a person has written is defined: "file:line", or its module where there is no file."""
    code = inspect.unwrap(getattr(thing, "fn", thing))
    try:
        line = inspect.findsource(code)[1] + 1  # no file, no text: OSError
        return f"{inspect.getsourcefile(code)}:{code.__code__.co_firstlineno if hasattr(code, '__code__') else line}"
    except _UNREADABLE:
        return str(getattr(code, "__module__", None) or type(thing).__module__)


def script_facts() -> dict[str, str]:
    """name -> digest of the code of each thing that is registered from the user's own script, which is no module that
    could be compared as a file: its text, and that of all it uses of the script's functions, classes and values. What
    else the script holds, such as how the run is started, may change."""
    script = sys.modules.get("__main__")
    facts = {}
    for registry in Registry.all:
        for name, thing in registry.items():
            code = getattr(thing, "fn", thing)
            if getattr(code, "__module__", None) == "__main__":
                text = _used_source(script, code)
                facts[f"code.script.{name}"] = hashlib.sha256(text.encode()).hexdigest()[:12]
    return facts


def _used_source(script: Any, thing: Any) -> str:
    """The source of `thing` and of the top-level definitions of its script that it uses, those they use, and so on."""
    try:
        own = inspect.getsource(thing)
        tree = ast.parse(Path(script.__file__).read_text(encoding="utf-8"))
    except (AttributeError, *_UNREADABLE):  # a notebook, or typed at the prompt
        try:
            return inspect.getsource(thing)
        except _UNREADABLE:
            return repr(getattr(thing, "__code__", thing).co_code) if hasattr(thing, "__code__") else ""
    defined: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined[node.name] = ast.unparse(node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.Import, ast.ImportFrom)):
            stored = [one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)]
            defined |= dict.fromkeys(stored, ast.unparse(node))
    top = defined.get(getattr(thing, "__name__", "")) or inspect.cleandoc(own)
    names, left = set(defined), [top]
    used: dict[str, str] = {}
    while left:
        text = left.pop()
        try:
            found = {one.id for one in ast.walk(ast.parse(text)) if isinstance(one, ast.Name)}
        except SyntaxError:  # a lambda amid a call
            found = {name for name in names if name in text}
        for name in sorted(found & names - used.keys()):
            used[name] = defined[name]
            left.append(defined[name])
    return "\n".join([top, *(used[name] for name in sorted(used))])
