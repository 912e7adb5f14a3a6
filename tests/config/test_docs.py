"""Docstrings of options reach --help and docs/options.md, and that page is up to date."""

from pathlib import Path

import pytest

from skyrl.config.docs import options_markdown
from skyrl.config.options import all_options, groups, short_names, suggest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "options.md"


def test_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == options_markdown(), (
        "run: python -m skyrl.config.docs > docs/options.md"
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


def test_suggestions():
    assert suggest("optim.lrr") == "optim.lr"
    assert suggest("loss.clip_low") == "algorithm.loss.params.clip_low"
    assert suggest("experimnt", ("experiment",)) == "experiment"
    assert suggest("qqqqqqq") == ""
