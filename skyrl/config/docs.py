"""The text of --help, read from conf/ and from the schema. No torch."""

from __future__ import annotations

import textwrap
from itertools import groupby
from pathlib import Path

from skyrl.args import config_dir, help_of
from skyrl.config.load import SERVE_GROUPS
from skyrl.config.options import Option, all_options, groups, parameters


def config_groups() -> dict[str, dict[str, str]]:
    """Group -> name -> the comment at the top of its file, in one line."""
    found: dict[str, dict[str, str]] = {}
    for folder in sorted(path for path in config_dir().iterdir() if path.is_dir()):
        files = sorted(folder.glob("*.yaml"))
        if files:
            found[folder.name] = {file.stem: _comment(file) for file in files}
    return found


def _comment(file: Path) -> str:
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.lstrip("# ").strip())
    return " ".join(lines)


def by_group(mode: str) -> list[tuple[str, str, list[Option]]]:
    """(group, what it is about, its options), in the order of the schema; group "" has the options of the top."""
    abouts = groups(mode)
    parts = groupby(all_options(mode), lambda option: option.path.rpartition(".")[0])
    found = []
    for group, options in parts:
        found.append((group, abouts.get(group, ""), list(options)))
        if of_it := [option for option in parameters() if option.path.startswith(f"{group}.params.")]:
            found.append((f"{group}.params", f"What {group}.name takes, a number each.", of_it))
    return found


def help_text(mode: str) -> str:
    """What --help prints for `python -m skyrl.<mode>`: commands, flags, recipes and the options that it reads."""
    used = (
        SERVE_GROUPS if mode == "serve" else [name for name in config_groups() if (mode, name) != ("sft", "algorithm")]
    )
    wrap = textwrap.TextWrapper(width=110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    parts = [
        f"python -m skyrl.{mode} [flags] [option=value ...]",
        "",
        "Commands",
        textwrap.indent(help_of(mode), "  "),
    ]
    flags = [line for line in help_of("flags").splitlines() if mode != "serve" or "--multirun" not in line]
    parts += ["", "Flags", textwrap.indent("\n".join(flags), "  ")]
    for group, names in config_groups().items():
        if group not in used:
            continue
        title = "Recipes, experiment=" if group == "experiment" else f"Groups, {group}="
        parts += ["", title]
        for name, comment in names.items():
            parts.append(textwrap.fill(f"{name:<20}{comment}", 110, initial_indent="  ", subsequent_indent=" " * 22))
    parts += ["", "Options, with the default before any recipe (--cfg job shows the values that a command would use)"]
    for group, about, options in by_group(mode):
        if group:
            parts += ["", f"  {group}: {about}"]
        for option in options:
            parts.append(f"    {option.path}={option.default!r}  ({option.type})")
            parts.append(wrap.fill(option.doc))
    return "\n".join(parts)
