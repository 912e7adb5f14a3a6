"""The page docs/options.md, from conf/ and the schema: `python docs/options.py > docs/options.md`. A test holds it
up to date."""

from skyrl.config.docs import by_group, config_groups


def options_markdown() -> str:
    """The page docs/options.md: recipes, groups, and a table for each group of options."""
    lines = [
        "# Options",
        "",
        "Generated from the `schema*.py` of `skyrl/config/` and `conf/`, not written by hand:",
        "`python docs/options.py > docs/options.md`.",
        "Parameters of advantages and losses are declared in `skyrl/algorithms/`.",
        "How options are set is in [config.md](config.md). `skyrl.sft` reads all but `algorithm`, `service` and what",
        "is about steps and updates of RL alone (`batch.num_steps`, `optim.lr`, ...), and refuses these;",
        "`skyrl.evaluate` reads none of what is about training;",
        "`skyrl.serve` reads `service` and what is named in [the server](#the-server).",
    ]
    for group, names in config_groups().items():
        lines += ["", f"## `{group}=`", "", "| name | what it is |", "|---|---|"]
        lines += [f"| `{name}` | {_cell(comment)} |" for name, comment in names.items()]
    for group, about, options in by_group(""):
        lines += ["", f"## {group or 'top level'}", "", about or "The run or the server as a whole.", ""]
        lines += ["| option | type | default | what it does |", "|---|---|---|---|"]
        lines += [f"| `{o.path}` | {_cell(o.type)} | `{o.default!r}` | {_cell(o.doc)} |" for o in options]
    lines += ["", "## The server", "", "What `python -m skyrl.serve` reads; of the groups above it uses `model=`.", ""]
    for group, _, options in by_group("serve"):
        read = ", ".join(f"`{option.path.rpartition('.')[2]}`" for option in options)
        lines.append(f"- {group or 'top level'}: {read}")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


if __name__ == "__main__":
    print(options_markdown(), end="")
