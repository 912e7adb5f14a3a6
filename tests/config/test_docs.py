"""Docstrings of options reach --help and docs/options.md; generated pages are up to date; what pages and examples tell
to type exists: commands, options, recipes, and the Python that they show."""

import ast
import importlib.util
import re
import runpy
import shlex
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from skyrl import cli
from skyrl.config.load import config_dir
from skyrl.config.options import all_options, groups, short_names, suggest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "options.md"
options_markdown = runpy.run_path(str(PAGE.with_suffix(".py")))["options_markdown"]
SITE = runpy.run_path(str(ROOT / "docs" / "site.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.*"))]
# What is told about the past, or generated from what is tested.
READ = {page.name: page.read_text(encoding="utf-8") for page in PAGES if page.name not in ("LOG.md", "options.md")}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 names types of the reference otherwise")
def test_pages_are_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == options_markdown(), (
        "run: python docs/options.py > docs/options.md"
    )  # fmt: skip
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == SITE["api_markdown"](), (
        "run: python docs/site.py --api > docs/api.md"
    )  # fmt: skip


def commands():
    """(page, words) of every command of skyrl in the pages, in blocks and in running text."""
    start = re.compile(
        r"(?:-m skyrl\.(?:train|sft|control|evaluate|serve)|skyrl-tx [a-z-]+|\b(?:train|serve)\.sbatch|"
        r"examples/evaluate\.py)(?=[ `\n])"
    )
    for page, text in READ.items():
        for line in text.replace("\\\n", " ").splitlines():
            for found in start.finditer(line):
                words = re.split(r"`|  #| \||, ", line[found.end() :], maxsplit=1)[0]
                try:
                    yield page, [*found[0].split(), *shlex.split(words)]
                except ValueError:  # the rest of a line is words of a sentence with an apostrophe
                    yield page, [*found[0].split(), *words.split()]


def test_every_command_of_the_pages_can_be_typed():
    """Its subcommand, its options and its recipes exist. That they do what is said: tests of each."""
    known = {option.path for option in all_options()} | {option.path for option in all_options("serve")}
    folders = {path.name for path in config_dir().iterdir() if path.is_dir()}
    wrong, seen = [], 0
    for page, words in commands():
        if words[0] == "skyrl-tx" and words[1] not in cli.COMMANDS and words[1] != "command":
            wrong.append((page, words[1]))
        for word in words:
            name, equals, value = word.partition("=")
            if not equals or not re.fullmatch(r"[a-z][\w./]*", name):
                continue
            seen += 1
            if name in folders and name != "experiment":
                exists = (config_dir() / name / f"{value}.yaml").is_file() or not value.isidentifier()
            elif name == "env" and "skyrl.control" in words[1]:
                continue
            elif name == "experiment":
                exists = (config_dir() / name / f"{value}.yaml").is_file() or value in ("mine", "...")
            else:
                exists = name in known or name.startswith(
                    ("hydra", "env.options.", "chat.template_kwargs.", "control.policy_options.")
                )
                exists = exists or bool(re.match(r"algorithm\.(loss|advantage)\.params\.", name)) or "lrr" in name
            if not exists:
                wrong.append((page, word))
    assert wrong == [] and seen > 130, (wrong, seen)


def test_the_python_of_the_pages_compiles_and_imports_what_exists():
    for page, text in READ.items():
        for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
            if page == "api.md":  # signatures
                continue
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("skyrl"):
                    # Looked up in the text of the module: importing it may take torch, which takes seconds.
                    source = Path(importlib.util.find_spec(node.module).origin).read_text(encoding="utf-8")
                    names = [one.name for one in node.names if one.name != "*"]
                    assert [name for name in names if not re.search(rf"\b{name}\b", source)] == [], (page, node.module)


def test_options_of_other_trainers_lead_to_options_of_ours():
    """The right column of the tables of migration.md."""
    known = {option.path for option in all_options()}
    tables = READ["migration.md"].split("## From TRL")[1]
    right = [line.split("|")[-2] for line in tables.splitlines() if line.startswith("| `")]
    named = [name.partition("=")[0] for cell in right for name in re.findall(r"`([a-z_]+\.[\w.=]+)`", cell)]
    assert len(named) > 60
    assert [
        name for name in named if name not in known and ".params." not in name and name != "env.options.reward"
    ] == []
    elsewhere = yaml.safe_load((config_dir() / "elsewhere.yaml").read_text(encoding="utf-8"))
    assert [name for name in elsewhere if name not in known] == ["env.options.reward"]
    theirs = [name for names in elsewhere.values() for name in names.split()]
    assert [name for name in theirs if theirs.count(name) > 1 or name in known] == []


def test_tables_are_whole():
    """Every row belongs to a table with a head and has as many cells as that: a blank line inside ends a table, and
    what follows is shown as plain text with bars."""
    wrong = []
    for page, text in {**READ, "LOG.md": (ROOT / "docs" / "LOG.md").read_text(encoding="utf-8")}.items():
        cells = 0
        for number, line in enumerate(
            re.sub(r"```.*?```", lambda f: "\n" * f[0].count("\n"), text, flags=re.S).splitlines(), 1
        ):
            row = line.startswith("|")
            count = len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line))) if row else 0
            if row and cells and count != cells:
                wrong.append((page, number, f"{count - 1} cells instead of {cells - 1}"))
            if row and not cells and not re.search(rf"^.*\n{re.escape(line)}\n\|[-| :]+\|$", "\n" + text, flags=re.M):
                wrong.append((page, number, "no head above it"))
            cells = count
    assert wrong == []


def test_links_lead_somewhere():
    """Files and headings, of README, docs and examples; the site's builder checks its own."""
    wrong = []
    for page in PAGES:
        text = (
            re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
            if page.suffix == ".md"
            else ""
        )
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, heading = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if "://" in target or target.startswith("mailto:"):
                continue
            if not file.exists() or (heading and file.suffix == ".md" and heading not in headings(file)):
                wrong.append((page.name, target))
    assert wrong == []


def headings(page: Path) -> set[str]:
    """Names by which links reach a page's headings."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in lines}


@pytest.mark.parametrize(("mode", "least"), [("train", 90), ("serve", 40)])
def test_every_option_and_group_is_documented(mode, least):
    assert [option.path for option in all_options(mode) if len(option.doc) < 5] == []
    assert [path for path, about in groups(mode).items() if len(about) < 5 or "(" in about[:20]] == []
    assert len({option.path for option in all_options(mode)}) == len(all_options(mode)) > least


def test_page_says_what_a_server_reads():
    page = options_markdown()
    told = page.split("## The server")[1]
    assert all(f"`{option.path.rpartition('.')[2]}`" in told for option in all_options("serve"))
    assert "lora" not in told and all(f"| `{option.path}` |" in page for option in all_options())


def test_docstring_under_a_field_belongs_to_it():
    docs = {option.path: option.doc for option in all_options()}
    assert docs["optim.beta1"] == "Decay of the mean of gradients."
    assert docs["env.on_error"].startswith("An environment or reward that raises") and "\n" not in docs["env.on_error"]


def test_short_names_stay_unique():
    names = short_names()
    assert names["sampler.top_k"] == "top_k" and names["optim.lr"] == "optim.lr"
    assert names["algorithm.critic.lr"] == "critic.lr" and names["seed"] == "seed"
    assert len(set(names.values())) == len(names)


def test_an_option_that_names_a_file_or_folder_is_typed_as_a_path():
    """So that its `~` is expanded: nobody has to think of it where it is read."""
    words = re.compile(r"\b(file|folder|path)\b", re.I)
    # What their texts mention is somebody else's folder, or part of one.
    others = {
        "plugins",
        "checkpoint.export",
        "tracking.tensorboard",
        "tracking.rollouts_every",
        "model.revision",
        "run.name",
        "dashboard.path_prefix",
    }
    texts = [o for o in all_options() if o.type in ("str", "list[str]", "dict[str, str]") and o.path not in others]
    assert [o.path for o in texts if words.search(o.doc) or words.search(o.path.replace("_", " "))] == []


def test_suggestions():
    assert suggest("optim.lrr") == "optim.lr"
    assert suggest("loss.clip_low") == "algorithm.loss.params.clip_low"
    assert suggest("experimnt", ("experiment",)) == "experiment"
    assert suggest("qqqqqqq") == ""


# Options of each group and why there may be so many. Parameters of losses and advantages do not count: a declaration
# brings them with what reads them.
BUDGET = {
    "": (5, "seed, dry_run, trainer, experiment, plugins"),
    "model": (
        21,
        "which weights in which numbers (the head's too), compiled or not, the shape of tiny (6), adapters (5)",
    ),
    "strategy": (5, "one layout, its device, and one number for each layout that needs it"),
    "sampler": (14, "what is drawn (7), the memory it takes and when (7)"),
    "batch": (9, "a step is prompts, samples, updates; the rest is memory and what is computed once"),
    "optim": (11, "which one, AdamW (5), its schedule (4), Muon's momentum"),
    "algorithm": (
        39,
        "nine parts: advantage, loss with its correction (6), KL, the reference (3), own successes (4), "
        "filters, critic, a mixture's routers (2), and how objectives add up (3)",
    ),
    "env": (10, "which task, its own options, what is put around it, its limits (4), the processes that call it (3)"),
    "data": (7, "two sources, an order, two limits, what is left out, and how often all of it is read"),
    "preference": (6, "which loss, and the numbers of each"),
    "reward_model": (1, "how rewards are kept around 0"),
    "distill": (4, "who teaches, on whose answers, which divergence, over how many tokens"),
    "chat": (2, "what the template is told, and what rewards read"),
    "eval": (9, "when, on what (6), how sure, and when training ends by it (2)"),
    "warmup": (5, "as little as a supervised phase needs: how long, how much, its rate and schedule (3)"),
    "control": (
        23,
        "the environment (5), how it is seen (5), a step and its minibatches (6), the policy (5), evaluations (2)",
    ),
    "checkpoint": (9, "when, what is kept (4: the best by which metric), how it is written, where the export goes (2)"),
    "tracking": (11, "one switch for each place numbers go to, and the words it is found by"),
    "alerts": (2, "an address, a program"),
    "debug": (3, "one switch for each doubt"),
    "run": (13, "name, place, resume, the patience of ranks, when it works, and what may differ between their nodes"),
    "service": (20, "address, keys, names, one limit for each thing clients could exhaust, one map of losses"),
    "feedback": (8, "a switch, a place, how old (2), how much of one client (2), what it may say (2)"),
    "dashboard": (14, "a switch, what it shows, its address (3); who may come in (9)"),
}


def test_each_group_keeps_its_budget():
    counts = Counter(option.path.split(".")[0] if "." in option.path else "" for option in all_options())
    assert counts.keys() == BUDGET.keys()
    over = {group: count for group, count in counts.items() if count > BUDGET[group][0]}
    assert not over, f"more options than budgeted: {over}; remove one, or raise the budget with its reason"
