"""Writes docs/options.md: `python -m skyrl.config.docs > docs/options.md`. A test holds the file up to date."""

from __future__ import annotations

from skyrl.config.help import config_groups
from skyrl.config.options import all_options, groups


def options_markdown() -> str:
    """The whole page: recipes, groups, and a table of options for each part of the config."""
    lines = [
        "# Options",
        "",
        "Generated from `skyrl/config/schema.py` and `conf/`, not written by hand:",
        "`python -m skyrl.config.docs > docs/options.md`.",
        "How they are set is in [config.md](config.md).",
    ]
    for group, names in config_groups().items():
        lines += ["", f"## `{group}=`", "", "| name | what it is |", "|---|---|"]
        lines += [f"| `{name}` | {_cell(comment)} |" for name, comment in names.items()]
    abouts, last = groups(), None
    for option in all_options():
        group = option.path.rpartition(".")[0]
        if group != last:
            about = abouts.get(group, "The run as a whole.")
            lines += ["", f"## {group or 'top level'}", "", about, "", "| option | type | default | what it does |"]
            lines += ["|---|---|---|---|"]
            last = group
        lines.append(f"| `{option.path}` | {_cell(option.type)} | `{option.default!r}` | {_cell(option.doc)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


if __name__ == "__main__":
    print(options_markdown(), end="")
