"""The text of --help: commands, recipes, groups and every option, read from conf/ and from the schema."""

from __future__ import annotations

import textwrap
from pathlib import Path

from skyrl.config.load import SERVE_GROUPS, config_dir
from skyrl.config.options import all_options, groups
from skyrl.config.schema import RunConfig
from skyrl.config.serve import ServeConfig

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


def help_text(mode: str) -> str:
    """All of --help for skyrl.train, skyrl.sft or skyrl.serve."""
    root, used = (ServeConfig, SERVE_GROUPS) if mode == "serve" else (RunConfig, tuple(config_groups()))
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
    abouts, last = groups(root), ""
    for option in all_options(root):
        group = option.path.rpartition(".")[0]
        if group != last:
            parts += ["", f"  {group}: {abouts[group]}"]
            last = group
        parts.append(f"    {option.path}={option.default!r}  ({option.type})")
        parts.append(wrap.fill(option.doc))
    return "\n".join(parts)
