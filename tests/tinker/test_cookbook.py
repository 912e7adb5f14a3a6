"""Twelve cookbook recipes (fourteen runs) against one server of two ranks; then three that must learn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from clients import Missing
from cookbook import RECIPES, RecipeRun, run_recipe
from serving import Server


def run(name: str, server: Server, hub: Path, folder: Path, download: bool, *more: str, **how: object) -> RecipeRun:
    try:
        return run_recipe(RECIPES[name], server.url, hub, folder / name, *more, download=download, **how)
    except Missing as why:
        pytest.skip(f"cookbook: {why}")


@pytest.mark.tinker
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str, server: Server, hub: Path, tmp_path: Path, download: bool) -> None:
    done = run(name, server, hub, tmp_path, download)
    recipe = RECIPES[name]
    assert len(done.rows) >= recipe.steps
    for number in recipe.numbers:
        assert all(math.isfinite(value) for value in done.curve(number))
    assert server.alive()


@pytest.mark.tinker
@pytest.mark.timeout(600)
def test_chat_sl_goes_on_from_its_checkpoint(server: Server, hub: Path, tmp_path: Path, download: bool) -> None:
    """A run that is cut goes on from its last checkpoint with the weights that it had.

    Not with the very losses of an uncut run: the recipe posts step k before it saves the batch labelled k, and repeats
    it. That resumed weights and moments are bit-equal is asked of the SDK itself: resumed_equals_unbroken."""
    options = ("save_every=1", "rolling_save_every=0", "lr_schedule=constant", "learning_rate=0.003")
    whole = run("chat_sl", server, hub, tmp_path / "whole", download, *options)
    cut = run("chat_sl", server, hub, tmp_path / "parts", download, *options, "max_steps=2")
    # as a kill would leave it: to the recipe a run with a record "final" is complete
    path = cut.log_path / "checkpoints.jsonl"
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["name"] != "final"]
    assert 0 < len(kept) < len(cut.checkpoints)
    path.write_text("".join(f"{line}\n" for line in kept))
    parts = run("chat_sl", server, hub, tmp_path / "parts", download, *options, keep_log=True)
    resumed, losses = parts.curve("train_mean_nll")[len(cut.rows) :], whole.curve("train_mean_nll")
    assert resumed and len(parts.rows) > len(cut.rows)
    drop = losses[0] - losses[-1]
    # a start from scratch would begin at losses[0] again; a repeated step leaves it a little ahead
    assert drop > 0.02 and resumed[0] < losses[0] - 0.2 * drop
    assert losses[-1] - drop < resumed[-1] < losses[-1] + 0.1 * drop


@pytest.mark.tinker
@pytest.mark.timeout(600)
def test_sl_loop_learns(server: Server, hub: Path, tmp_path: Path, download: bool) -> None:
    done = run("sl_loop", server, hub, tmp_path, download, "max_steps=12", "learning_rate=0.01", "save_every=0")
    losses = done.curve("train_mean_nll")
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.tinker
@pytest.mark.timeout(600)
def test_dpo_learns(server: Server, hub: Path, tmp_path: Path, download: bool) -> None:
    done = run("dpo", server, hub, tmp_path, download, "max_steps=10", "learning_rate=0.002")
    losses = done.curve("dpo_loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)  # policy and reference are equal at first
    assert losses[-1] < 0.8 * losses[0]
