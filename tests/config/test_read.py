"""Every option is read by the program: one that is parsed and never read would be a setting that does nothing."""

import ast
from pathlib import Path

from skyrl.config.options import all_options

ROOT = Path(__file__).resolve().parents[2]
# Files that name options without acting on them.
SILENT = {"schema.py", "schema_server.py", "options.py", "validation.py", "algorithm_rules.py", "docs.py"}


def attributes_read() -> set[tuple[str, str]]:
    """(name before the dot, attribute) of every attribute that is read in skyrl/, "" where it is no plain name."""
    found: set[tuple[str, str]] = set()
    for path in (ROOT / "skyrl").rglob("*.py"):
        if path.parent.name == "config" and path.name in SILENT:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                before = node.value
                name = before.attr if isinstance(before, ast.Attribute) else getattr(before, "id", "")
                found.add((name, node.attr))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and len(node.args) > 1:
                before, attr = node.args[0], node.args[1]
                name = before.attr if isinstance(before, ast.Attribute) else getattr(before, "id", "")
                if isinstance(attr, ast.Constant):
                    found.add((name, attr.value))
    return found


def test_every_option_is_read_somewhere():
    """Read as <its group>.<option>, from a variable that holds a config, or under a name that no other option has."""
    read = attributes_read()
    names = [option.path.rpartition(".")[2] for option in all_options()]
    read |= {("", name) for _, name in read if names.count(name) == 1}
    unread = set()
    for option in all_options():
        group, _, name = option.path.rpartition(".")
        holders = {group.rpartition(".")[2] or "cfg", "cfg", "config", "options", "tiny", "settings", ""}
        if not any((holder, name) in read for holder in holders):
            unread.add(option.path)
    assert not unread
