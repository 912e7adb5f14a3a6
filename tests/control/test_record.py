"""Recorded episodes: the GIF, and its place in the report."""

import base64
import json
import re

import numpy as np
import pytest
from PIL import Image

from skyrl.report import page as report_page
from skyrl.run_dir import RunReader

gymnasium = pytest.importorskip("gymnasium", reason="the extra control is not installed")

import catch  # noqa: E402, F401

from skyrl.trainers.control.record import FRAMES, SIDE, record_episode, render_problem  # noqa: E402


def test_an_episode_as_a_gif(tmp_path):
    env = gymnasium.make("Catch-v0", render_mode="rgb_array")
    assert render_problem(env) == ""
    path = tmp_path / "episodes" / "000010.gif"
    assert record_episode(env, lambda observation: 1, path) in (-1.0, 1.0)
    picture = Image.open(path)
    assert picture.format == "GIF" and picture.n_frames == 8 and picture.size == (SIDE, SIDE)
    assert picture.info["duration"] == 100 and picture.info["loop"] == 0
    first = np.asarray(picture.convert("L"))
    picture.seek(7)
    assert not np.array_equal(first, np.asarray(picture.convert("L")))


class Long(catch.Catch):
    """Never ends by itself."""

    def step(self, action):
        super().step(action)
        self.row %= 7
        return self.pixels(), 1.0, False, False, {}


def test_a_long_episode_has_fewer_frames_and_lasts_as_long(tmp_path):
    total = record_episode(Long(render_mode="rgb_array"), lambda observation: 0, tmp_path / "a.gif", max_steps=400)
    picture = Image.open(tmp_path / "a.gif")
    assert total == 400.0 and FRAMES / 2 <= picture.n_frames <= FRAMES
    durations = []
    for number in range(picture.n_frames):
        picture.seek(number)
        durations.append(picture.info["duration"])
    assert sum(durations) == pytest.approx(400 * 100, rel=0.02)


def test_what_cannot_be_drawn():
    assert "render_mode None; it has: rgb_array" in render_problem(gymnasium.make("Catch-v0"))
    env = gymnasium.make("Catch-v0", render_mode="rgb_array")
    env.unwrapped.render = lambda: 1 / 0
    assert render_problem(env) == "drawing it raised ZeroDivisionError: division by zero"


def test_the_report_shows_them(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "phase": "control"}) + "\n")
    assert "Recorded episodes" not in report_page.page(RunReader(tmp_path))
    env = gymnasium.make("Catch-v0", render_mode="rgb_array")
    for step in (10, 20, 30):
        record_episode(env, lambda observation: 1, tmp_path / "episodes" / f"{step:06d}.gif")
    (tmp_path / "episodes" / "notes.gif").write_text("not one of ours")

    def shown():
        text = report_page.page(RunReader(tmp_path))
        found = re.findall(r'<img src="data:image/gif;base64,([^"]+)" alt="an episode of step (\d+)">', text)
        return text, {int(step): base64.b64decode(data) for data, step in found}

    text, found = shown()
    assert found == {step: (tmp_path / "episodes" / f"{step:06d}.gif").read_bytes() for step in (10, 20, 30)}
    assert "<script" not in text and text.index("step 10<") < text.index("step 30<")
    sizes = [len(base64.b64encode(data)) for data in found.values()]
    monkeypatch.setattr(report_page, "PICTURES", sizes[0] + sizes[2])
    text, found = shown()
    assert set(found) == {10, 30} and "1 more are in the run's folder episodes." in text
