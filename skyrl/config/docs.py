"""The text of --help and of docs/options.md, both read from conf/ and from the schema. No torch.

`python -m skyrl.config.docs > docs/options.md` writes the page; a test holds it up to date.
"""

from __future__ import annotations

import textwrap
from itertools import groupby
from pathlib import Path

from skyrl.config.load import SERVE_GROUPS, config_dir
from skyrl.config.options import Option, all_options, groups, parameters

COMMANDS = {
    "train": """\
python -m skyrl.train                                    one process, the default recipe
torchrun --nproc_per_node=2 -m skyrl.train               the same on two processes
python -m skyrl.train experiment=gsm8k model.path=DIR data.path=FILE.jsonl
python -m skyrl.train optim.lr=1e-4 algorithm=dr_grpo    any option below, any group
python -m skyrl.train -m seed=1,2,3                      one run after the other
python -m skyrl.train --cfg job                          prints the whole config
python -m skyrl.train dry_run=true run.world_size=64     checks the plan for 64 ranks, prints memory""",
    "sft": """\
python -m skyrl.sft warmup.num_steps=500                 supervised training on the environment's solutions
torchrun --nproc_per_node=2 -m skyrl.sft                 the same on two processes
python -m skyrl.sft -m seed=1,2,3                        one run after the other
python -m skyrl.sft --cfg job                            prints the whole config""",
    "serve": """\
python -m skyrl.serve                                    the tiny model on http://127.0.0.1:8000
torchrun --nproc_per_node=2 -m skyrl.serve model=hub model.path=DIR
python -m skyrl.serve 'service.aliases={Qwen/Qwen3-8B: ""}' service.port=0
python -m skyrl.serve service.host=0.0.0.0 service.keys_file=keys.txt
python -m skyrl.serve --cfg job                          prints the whole config
python -m skyrl.serve dry_run=true                       checks the options, prints memory""",
}
FLAGS = """\
--help              this text
--cfg job|hydra|all the composed config; -p optim shows one part
-m, --multirun      a run for each combination of values, a=1,2 b=3,4
--info defaults     how the config was put together (also config, searchpath, plugins)
--dry-run           the same as dry_run=true"""


MULTIRUN = "-m, --multirun"


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


def _by_group(mode: str) -> list[tuple[str, str, list[Option]]]:
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
        textwrap.indent(COMMANDS[mode], "  "),
    ]
    flags = [line for line in FLAGS.splitlines() if mode != "serve" or not line.startswith(MULTIRUN)]
    parts += ["", "Flags", textwrap.indent("\n".join(flags), "  ")]
    for group, names in config_groups().items():
        if group not in used:
            continue
        title = "Recipes, experiment=" if group == "experiment" else f"Groups, {group}="
        parts += ["", title]
        for name, comment in names.items():
            parts.append(textwrap.fill(f"{name:<18}{comment}", 110, initial_indent="  ", subsequent_indent=" " * 20))
    parts += ["", "Options, with the default before any recipe (--cfg job shows the values that a command would use)"]
    for group, about, options in _by_group(mode):
        if group:
            parts += ["", f"  {group}: {about}"]
        for option in options:
            parts.append(f"    {option.path}={option.default!r}  ({option.type})")
            parts.append(wrap.fill(option.doc))
    return "\n".join(parts)


def options_markdown() -> str:
    """The page docs/options.md: recipes, groups, and a table for each group of options."""
    lines = [
        "# Options",
        "",
        "Generated from `skyrl/config/schema.py` and `conf/`, not written by hand:",
        "`python -m skyrl.config.docs > docs/options.md`.",
        "Parameters of advantages and losses are declared in `skyrl/algorithms/`.",
        "How options are set is in [config.md](config.md). `skyrl.sft` reads all but `algorithm` and `service`;",
        "`skyrl.serve` reads `service` and what is named in [the server](#the-server).",
    ]
    for group, names in config_groups().items():
        lines += ["", f"## `{group}=`", "", "| name | what it is |", "|---|---|"]
        lines += [f"| `{name}` | {_cell(comment)} |" for name, comment in names.items()]
    for group, about, options in _by_group(""):
        lines += ["", f"## {group or 'top level'}", "", about or "The run or the server as a whole.", ""]
        lines += ["| option | type | default | what it does |", "|---|---|---|---|"]
        lines += [f"| `{o.path}` | {_cell(o.type)} | `{o.default!r}` | {_cell(o.doc)} |" for o in options]
    lines += ["", "## The server", "", "What `python -m skyrl.serve` reads; of the groups above it uses `model=`.", ""]
    for group, _, options in _by_group("serve"):
        read = ", ".join(f"`{option.path.rpartition('.')[2]}`" for option in options)
        lines.append(f"- {group or 'top level'}: {read}")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


if __name__ == "__main__":
    print(options_markdown(), end="")
