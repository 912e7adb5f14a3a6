"""Twelve cookbook recipes (fourteen runs) against one server of two ranks; then three that must learn."""

from __future__ import annotations

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
    """Two steps, stopped, and two more give the losses of four in one go, bit for bit."""
    options = ("save_every=1", "rolling_save_every=0", "lr_schedule=constant")
    whole = run("chat_sl", server, hub, tmp_path / "whole", download, *options)
    run("chat_sl", server, hub, tmp_path / "parts", download, *options, "max_steps=2")
    parts = run("chat_sl", server, hub, tmp_path / "parts", download, *options, keep_log=True)
    assert parts.curve("train_mean_nll")[-2:] == whole.curve("train_mean_nll")[-2:]


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
