"""The picture of a run, from whole, short, partial and broken metrics."""

import math

import matplotlib.image
import numpy as np
import pytest

from skyrl.tracking.curves import _PANELS, _axis, _draw, _Shortened, _summary, _whose, write_curves
from skyrl.tracking.jsonl import to_json
from skyrl.types import UserError


def records(warmup=20, rl=60):
    rows = [{"step": s, "phase": "warmup", "loss:sum": 1 / s} for s in range(1, warmup + 1)]
    rows[-1:] = [{**row, "eval/accuracy:mean": 0.25} for row in rows[-1:]]
    for s in range(1, rl + 1):
        row = {"step": s, "phase": "rl", "reward:mean": s / rl, "loss:sum": 0.01, "entropy:mean": 1.0}
        row |= {
            "logprob_gap:mean": 1e-7 * s,
            "logprob_gap:max": math.inf,
            "grad_norm:mean": 1.0,
            "speed/tokens_per_second:mean": 1000.0,
        }
        row["grad_norm:mean"] = 1.0
        rows.append({**row, **({"eval/accuracy:mean": s / rl} if s % 10 == 0 else {})})
    return rows


def draw(tmp_path, rows):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(to_json(row) + "\n" for row in rows))
    return write_curves(path, tmp_path / "out" / "curves.png")


def has_colour(image, colour):
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return (np.abs(image[:, :, :3] - wanted).max(axis=2) < 0.02).sum() > (3000 if colour == "#f3f1ea" else 30)


def test_all_panels_of_a_whole_run(tmp_path):
    path = draw(tmp_path, records())
    image = matplotlib.image.imread(path)
    assert image.shape[:2] == (768, 1920) and path.stat().st_size > 30_000
    for colour in ("#2563eb", "#059669", "#d97706", "#475569", "#db2777", "#0891b2", "#f3f1ea"):
        assert has_colour(image, colour), colour


def test_what_is_missing_is_not_drawn(tmp_path):
    image = matplotlib.image.imread(draw(tmp_path, [{"step": 1, "phase": "rl", "reward:mean": 0.5}]))
    assert has_colour(image, "#2563eb") and not has_colour(image, "#059669") and not has_colour(image, "#f3f1ea")


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 0, "phase": "rl", "eval/accuracy:mean": 0.5}],
        [{"step": 1, "phase": "rl"}],
        [{"step": 1, "phase": "warmup", "loss:sum": math.nan}],
        [{"step": s, "phase": "rl", "logprob_gap:mean": 0.0} for s in range(3)],
        [{"step": s, "phase": "rl", "logprob_gap:mean": 1e-6} for s in range(3)],
    ],
)
def test_short_and_odd_runs(tmp_path, rows):
    assert draw(tmp_path, rows).stat().st_size > 5_000


def test_nothing_to_draw(tmp_path):
    assert write_curves(tmp_path / "absent.jsonl", tmp_path / "curves.png") is None
    assert draw(tmp_path, []) is None and not (tmp_path / "out").exists()


def test_phases_follow_each_other_on_the_axis():
    rows = [{"step": step, "phase": "warmup" if step < 3 else "rl"} for step in (1, 2, 3, 4)]
    positions, spans = _axis([*rows[:2], {"step": 2, "phase": "rl"}, *rows[2:]])  # evaluated before the first of RL
    assert positions == [1, 2, 2, 3, 4] and spans == [("warmup", 0, 2), ("rl", 2, 4)]


def test_a_long_warmup_takes_a_short_part_of_the_axis():
    shorten = _Shortened([("warmup", 0, 1500), ("rl", 1500, 1585)])
    assert shorten(1500) == pytest.approx(15) and shorten(1585) == pytest.approx(100)
    assert shorten.label(15.0) == "1500" and shorten.label(100.0) == "1585" and shorten.label(7.0) == ""
    alone = _Shortened([("sft", 0, 40)])
    assert alone(40) == 40 and alone.label(20.0) == "20"


def test_a_gap_of_0_is_drawn_as_0():
    from matplotlib.figure import Figure

    gap = next(panel for panel in _PANELS if panel.log)
    axes = Figure().subplots()
    _draw(axes, gap, [{"step": s, "phase": "rl", "logprob_gap:mean": 0.0} for s in (1, 2, 3)], [1, 2, 3])
    said = [text.get_text() for text in axes.texts]
    assert said == ["0 in every step"] and list(axes.lines[0].get_ydata()) == [0.0, 0.0, 0.0]


def test_name_and_model_are_in_the_title(tmp_path):
    (tmp_path / "config.yaml").write_text("run: {name: mine-seed1}\nmodel: {path: org/small}\n")
    assert _whose(tmp_path / "metrics.jsonl") == "mine-seed1 (org/small)" and _whose(tmp_path / "a" / "b") == ""


def test_title_tells_the_way_from_before_rl_to_now():
    assert _summary(records()) == "60 steps of RL: held-out accuracy 0.250 to 1.000"
    assert _summary(records(warmup=3, rl=0)) == "3 steps of warmup"


def test_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="the curves: .*curves.png: cannot be written"):
        draw(tmp_path, records(1, 1))
