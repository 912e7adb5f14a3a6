"""Docstrings of options reach --help and docs/options.md, and that page is up to date."""

import re
import runpy
from collections import Counter
from pathlib import Path

import pytest

from skyrl.config.options import all_options, groups, short_names, suggest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "options.md"
options_markdown = runpy.run_path(str(PAGE.with_suffix(".py")))["options_markdown"]


def test_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == options_markdown(), (
        "run: python docs/options.py > docs/options.md"
    )  # fmt: skip


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
    others = {"checkpoint.export", "tracking.tensorboard", "tracking.rollouts_every", "model.revision", "run.name"}
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
    "": (4, "seed, dry_run, experiment, plugins"),
    "model": (19, "which weights in which numbers, with the shape of tiny (6) and adapters (5)"),
    "strategy": (5, "one layout, its device, and one number for each layout that needs it"),
    "sampler": (14, "what is drawn (7), the memory it takes and when (7)"),
    "batch": (8, "a step is prompts, samples, updates; the rest is memory"),
    "optim": (9, "AdamW (5), its schedule (4)"),
    "algorithm": (21, "five independent parts: advantage, loss, KL, filters, critic"),
    "env": (5, "which task, its own options, and its limits"),
    "data": (6, "two sources, an order, two limits, and what is left out"),
    "chat": (2, "what the template is told, and what rewards read"),
    "eval": (4, "when, on what, how"),
    "warmup": (3, "as little as a supervised phase needs"),
    "checkpoint": (7, "when, what is kept (4: the best by which metric), how it is written"),
    "tracking": (6, "one switch for each place numbers go to"),
    "debug": (3, "one switch for each doubt"),
    "run": (12, "name, place, resume, the patience of ranks, and what may differ between their nodes"),
    "service": (19, "address, keys, names, and one limit for each thing clients could exhaust"),
}


def test_each_group_keeps_its_budget():
    counts = Counter(option.path.split(".")[0] if "." in option.path else "" for option in all_options())
    assert counts.keys() == BUDGET.keys()
    over = {group: count for group, count in counts.items() if count > BUDGET[group][0]}
    assert not over, f"more options than budgeted: {over}; remove one, or raise the budget with its reason"
