"""Writes docs/options.md: `python -m skyrl.config.docs > docs/options.md`. A test holds the file up to date."""

from __future__ import annotations

from skyrl.config.help import config_groups
from skyrl.config.options import all_options, groups
from skyrl.config.schema import RunConfig
from skyrl.config.serve import ServeConfig


def options_markdown() -> str:
    """The whole page: recipes, groups, and a table of options for each part of a run's and of a server's config."""
    lines = [
        "# Options",
        "",
        "Generated from `skyrl/config/schema.py`, `skyrl/config/serve.py` and `conf/`, not written by hand:",
        "`python -m skyrl.config.docs > docs/options.md`.",
        "How they are set is in [config.md](config.md).",
    ]
    for group, names in config_groups().items():
        lines += ["", f"## `{group}=`", "", "| name | what it is |", "|---|---|"]
        lines += [f"| `{name}` | {_cell(comment)} |" for name, comment in names.items()]
    lines += _tables(RunConfig, "##", "The run as a whole.")
    lines += ["", "## The server", "", "`python -m skyrl.serve`. Of the groups above it uses `model=`."]
    lines += _tables(ServeConfig, "###", "The server as a whole.")
    return "\n".join(lines) + "\n"


def _tables(root: type, heading: str, about_root: str) -> list[str]:
    lines: list[str] = []
    abouts, last = groups(root), None
    for option in all_options(root):
        group = option.path.rpartition(".")[0]
        if group != last:
            about = abouts.get(group, about_root)
            lines += ["", f"{heading} {group or 'top level'}", "", about, ""]
            lines += ["| option | type | default | what it does |", "|---|---|---|---|"]
            last = group
        lines.append(f"| `{option.path}` | {_cell(option.type)} | `{option.default!r}` | {_cell(option.doc)} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


if __name__ == "__main__":
    print(options_markdown(), end="")
