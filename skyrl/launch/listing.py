"""`skyrl-tx list`: every environment, reward, loss and the rest that a run can name, whose it is, and its options."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import skyrl.hub.policies  # noqa: F401
import skyrl.tasks  # noqa: F401
from skyrl.config.args import Parser
from skyrl.config.plugins import import_plugins
from skyrl.config.validation import REGISTERED  # which imports every algorithm
from skyrl.envs.base import options_of
from skyrl.envs.rewards.base import Reward
from skyrl.registry import Registry, origin
from skyrl.types import UserError

PLURALS = {"policy": "policies", "loss": "losses"}
assert REGISTERED


def list_things(args: Sequence[str]) -> None:
    """Runs the command line. Raises UserError."""
    kinds = {PLURALS.get(one.kind, one.kind.replace(" ", "-").lower() + "s"): one for one in Registry.all}
    p = Parser(prog="skyrl-tx list", description="What a run can name: whose it is, and its options.")
    p.add_argument("kind", nargs="?", default="", help=f"one of: {', '.join(kinds)} (all)")
    p.add_argument("--plugin", action="append", default=[], help="a plugin to import first; repeat for more")
    p.add_argument("--json", action="store_true", help="for programs")
    given = p.parse_args(list(args))
    if given.kind and given.kind not in kinds:
        raise UserError(f"list {given.kind}: no such kind; choose one of: {', '.join(kinds)}")
    import_plugins(given.plugin)
    found = {
        kind: [_entry(name, thing) for name, thing in registry.items()]
        for kind, registry in kinds.items()
        if given.kind in ("", kind)
    }
    if given.json:
        print(json.dumps(found, indent=1))
        return
    for kind, entries in found.items():
        width = max((len(entry["name"]) for entry in entries), default=0)
        print(kind if entries else f"{kind}: none")
        for entry in entries:
            options = "  ".join(f"{name}={value}" for name, value in entry["options"].items())
            print(f"  {entry['name']:<{width}}  {entry['from']:<12}  {options or '-'}")


def _entry(name: str, thing: Any) -> dict[str, Any]:
    code = getattr(thing, "fn", thing)
    ours = str(getattr(code, "__module__", "")).startswith("skyrl.")
    if hasattr(thing, "params"):
        options = thing.defaults()
    else:
        options = options_of(code) if isinstance(thing, Reward) or hasattr(thing, "dataset") else {}
    about = (getattr(code, "__doc__", None) or "").strip().partition("\n")[0]
    return {"name": name, "from": "skyrl" if ours else origin(thing), "about": about, "options": options}
