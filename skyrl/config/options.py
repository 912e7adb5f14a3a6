"""All options as a flat list, read from the dataclasses and the docstrings under their fields. No torch, no Hydra."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import sys
import typing
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from skyrl.config import schema


@dataclass(frozen=True)
class Option:
    """One option: dotted path, type as written, default, docstring in one line."""

    path: str
    type: str
    default: Any
    doc: str


@lru_cache
def _docstrings(module: str) -> dict[tuple[str, str], str]:
    """(class, field) -> the string literal that follows the field, in one line."""
    found: dict[tuple[str, str], str] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for item, after in zip(node.body, node.body[1:] + [None], strict=True):
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            if (
                isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                found[node.name, item.target.id] = " ".join(after.value.value.split())
    return found


def _walk(cls: type, prefix: str) -> list[Option]:
    options = []
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path = prefix + field.name
        if dataclasses.is_dataclass(types[field.name]):
            options += _walk(types[field.name], path + ".")
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        doc = _docstrings(cls.__module__).get((cls.__name__, field.name), "")
        options.append(Option(path, str(field.type), default, doc))
    return options


@lru_cache
def all_options(root: type = schema.RunConfig) -> tuple[Option, ...]:
    """Every option of `root`, in the order of the schema."""
    return tuple(_walk(root, ""))


@lru_cache
def groups(root: type = schema.RunConfig) -> dict[str, str]:
    """Dotted path of every group of options -> what it is about (the docstring of its class)."""

    def walk(cls: type, prefix: str) -> dict[str, str]:
        found = {}
        for name, kind in typing.get_type_hints(cls).items():
            if dataclasses.is_dataclass(kind):
                found[prefix + name] = " ".join(str(kind.__doc__).split())
                found.update(walk(kind, prefix + name + "."))
        return found

    return walk(root, "")


@lru_cache(maxsize=1)
def short_names() -> dict[str, str]:
    """Full path -> the shortest end of it that no other option of a run has ("optim.lr" stays, "top_k" is enough)."""
    paths = [option.path for option in all_options()]

    def shortest(path: str) -> str:
        parts = path.split(".")
        for count in range(1, len(parts)):
            tail = ".".join(parts[-count:])
            if sum(other == tail or other.endswith("." + tail) for other in paths) == 1:
                return tail
        return path

    return {path: shortest(path) for path in paths}


def suggest(path: str, extra: tuple[str, ...] = (), root: type = schema.RunConfig) -> str:
    """The option or group that was probably meant by `path`; "" when nothing is close."""
    known = [option.path for option in all_options(root)] + list(groups(root)) + list(extra)
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.7)
    if close:
        return close[0]
    # A right name in the wrong or no group: lr, loss.clip_low, model.num_layers.
    last = path.rsplit(".", 1)[-1]
    same_name = [name for name in known if name.rsplit(".", 1)[-1] == last]
    return same_name[0] if len(same_name) == 1 else " or ".join(same_name[:3])
