"""`skyrl-tx list`: every environment, reward, loss and the rest that a run can name, whose it is, and its options."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import skyrl.hub.policies  # noqa: F401
import skyrl.tasks  # noqa: F401
from skyrl.args import Parser
from skyrl.config.validation import REGISTERED  # which imports every algorithm
from skyrl.envs.base import options_of
from skyrl.envs.rewards.base import Reward
from skyrl.planner.control import EXTRA
from skyrl.registry import Registry, origin
from skyrl.registry.plugins import import_plugins
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
    if given.kind in ("", "policies"):  # with torch, which nothing else here needs
        try:
            import skyrl.trainers.control  # noqa: F401
        except ImportError as error:
            print(f"policies of trainer=control are not here: {error}; {EXTRA['control']}", file=sys.stderr)
    found = {
        kind: [_entry(name, thing, kind) for name, thing in registry.items()]
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


def _entry(name: str, thing: Any, kind: str) -> dict[str, Any]:
    code = getattr(thing, "fn", thing)
    ours = str(getattr(code, "__module__", "")).startswith("skyrl.")
    has_options = isinstance(thing, Reward) or hasattr(thing, "dataset") or kind == "policies"
    options = thing.defaults() if hasattr(thing, "params") else options_of(code) if has_options else {}
    options = {name: value for name, value in options.items() if name not in ("observation_space", "action_space")}
    about = (getattr(code, "__doc__", None) or "").strip().partition("\n")[0]
    return {"name": name, "from": "skyrl" if ours else origin(thing), "about": about, "options": options}
