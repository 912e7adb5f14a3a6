"""One picture of a run, drawn from its metrics.jsonl while it goes and at its end.

`python -m skyrl.tracking.curves RUN` draws it anew. Needs no torch."""

from __future__ import annotations

import io
import itertools
import math
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skyrl.files import explain_write, write_atomic
from skyrl.run_dir import RunReader, read_metrics
from skyrl.tracking.base import Record

_ACCURACY = "eval/accuracy:mean"
_SPREAD = "reward_std:mean"
_INK, _MUTED, _GRID, _SHADE = "#22262e", "#6b7280", "#e5e7eb", "#f3f1ea"
_SHORT = 0.15  # what comes before RL takes at most this part of the axis
_Line = tuple[str, tuple[str, ...], str]  # label, keys of which the first present counts, colour


@dataclass(frozen=True)
class _Panel:
    """One small plot: its title and its lines; those of `right` have an axis of their own on that side."""

    title: str
    lines: tuple[_Line, ...]
    right: tuple[_Line, ...] = ()
    log: bool = False
    unit_range: bool = False  # values between 0 and 1
    sparse: bool = False  # points of evaluations, drawn with markers
    from_zero: bool = False


_REWARD = _Panel("Reward, and its spread within groups", (("mean", ("reward:mean",), "#2563eb"),))
_RETURN = _Panel(
    "Return of an episode",
    (("training", ("reward:mean",), "#2563eb"), ("held-out", ("eval/reward:mean",), "#059669")),
)
_LOSSES = ("loss:mean", "distill/divergence:mean", "nll:mean", "loss:sum")
_LOSS = _Panel("Loss (supervised steps: nats per token)", (("loss", _LOSSES, "#7c3aed"),))
_CUT: _Line = ("truncated", ("cut_by_length:mean",), "#f59e0b")
_KL: _Line = ("KL", ("kl_reference:mean", "kl/behaviour_reference:mean", "approx_kl:mean"), "#9333ea")
_GAPS: tuple[_Line, ...] = (("mean", ("logprob_gap:mean",), "#d97706"), ("max", ("logprob_gap:max",), "#fbbf77"))
_SAMPLING: _Line = ("sampling alone", ("speed/sampled_tokens_per_second:mean",), "#a5d8e2")
_SPEEDS: tuple[_Line, ...] = (("whole step", ("speed/tokens_per_second:mean",), "#0891b2"), _SAMPLING)
_LENGTHS = "Response length (tokens), truncated share"
_PANELS = (
    _Panel("Held-out accuracy", (("accuracy", (_ACCURACY,), "#059669"),), unit_range=True, sparse=True),
    _Panel(_LENGTHS, (("length", ("length:mean",), "#0f766e"),), (_CUT,), from_zero=True),
    _Panel("Entropy (nats per token), KL", (("entropy", ("entropy:mean",), "#db2777"),), (_KL,)),
    _Panel("Gradient norm, before clipping", (("norm", ("grad_norm:mean",), "#475569"),), from_zero=True),
    _Panel("Log-prob gap, sampler to trainer (nats)", _GAPS, log=True),
    _Panel("Tokens per second", _SPEEDS, from_zero=True),
    _Panel("Groups whose rewards are all equal (share)", (("equal", ("equal_groups",), "#b91c1c"),), unit_range=True),
)


def write_curves(metrics: Path, out: Path) -> Path | None:
    """Draws `metrics` (a metrics.jsonl) as a PNG at `out` and returns that path; None when there is nothing to draw.

    Phases follow each other on one axis; what comes before RL is shaded. Panels without numbers say so.
    Raises: UserError when the picture cannot be written.
    """
    records = read_metrics(metrics) if Path(metrics).exists() else []
    if not records:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    learned = any(record["phase"] == "rl" and record["step"] > 0 for record in records)
    for record in records:
        if groups := record.get("filters/groups:sum"):
            record["equal_groups"] = record.get("filters/zero_variance_groups:sum", 0.0) / groups
    positions, spans = _axis(records)
    shorten = _Shortened(spans)
    figure = Figure(figsize=(16.0, 6.4), facecolor="white")
    # The same places for every run: a layout that matplotlib computes from all labels takes as long as drawing them.
    figure.subplots_adjust(left=0.04, right=0.96, top=0.89, bottom=0.075, wspace=0.24, hspace=0.29)
    FigureCanvasAgg(figure)  # no window, no global state, whatever backend the user has set
    xs = [shorten(x) for x in positions]
    first = _RETURN if records[-1]["phase"] == "control" else _REWARD if learned else _LOSS
    for axes, panel in zip(figure.subplots(2, 4).flat, (first, *_PANELS), strict=True):
        _draw(axes, panel, records, xs)
        _style(axes, panel, spans, shorten)
    title = f"{_whose(metrics)}: {_summary(records)}".removeprefix(": ")
    figure.suptitle(title, parse_math=False, x=0.01, y=0.98, ha="left", fontsize=12, color=_INK, fontweight="bold")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    with explain_write(out, what="the curves"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, picture.getvalue())  # whoever looks meanwhile sees a whole one
    return out


def _whose(metrics: Path) -> str:
    """ "<run name> (<model>)", as the config.yaml beside the metrics says; "" without one."""
    config = RunReader(metrics.parent).config()
    run, model = (config.get(part) or {} for part in ("run", "model"))
    return f"{run.get('name')} ({model.get('path')})" if config else ""


class _Shortened:
    """Steps to places on the axis: what comes before RL takes a short part of it; `label` is the way back."""

    def __init__(self, spans: list[tuple[str, int, int]]) -> None:
        self.before = spans[-1][1] if spans[-1][0] == "rl" else 0
        rest = spans[-1][2] - self.before
        self.room = min(float(self.before), _SHORT * rest / (1 - _SHORT)) if rest else float(self.before)

    def __call__(self, step: float) -> float:
        if step <= self.before:
            return step * self.room / self.before if self.before else step
        return step - self.before + self.room

    def label(self, place: float, _: Any = None) -> str:
        """The step at a place of RL; within the shortened part nothing."""
        if place < self.room - 1e-9 and self.room < self.before:
            return ""
        return f"{place - self.room + self.before:.0f}"


def _axis(records: list[Record]) -> tuple[list[int], list[tuple[str, int, int]]]:
    """Positions of the records on the common axis, and (phase, first, last) of each stretch of one phase."""
    positions = [int(record["step"]) for record in records]
    spans: list[tuple[str, int, int]] = []
    for phase, part in itertools.groupby(zip(records, positions, strict=True), key=lambda pair: pair[0]["phase"]):
        start = spans[-1][2] if spans else 0
        spans.append((phase, start, max(start, *(step for _, step in part))))
    return positions, spans


def _draw(axes: Any, panel: _Panel, records: list[Record], xs: list[float]) -> None:
    """The lines of a panel; what was never logged is said."""
    drawn = []
    right = axes.twinx() if panel.right else None
    for place, (label, keys, colour) in [(axes, line) for line in panel.lines] + [
        (right, line) for line in panel.right
    ]:
        key = next((key for key in keys if any(key in record for record in records)), None)
        found = [(x, r[key], r["phase"]) for x, r in zip(xs, records, strict=True) if key in r]
        points = [p for p in found if math.isfinite(p[1])]
        if not points:
            continue
        drawn.append((label, colour, points))
        # Lines do not cross from one phase to the next, except between evaluations, which both measure the policy.
        phases = [""] if panel.sparse else list(dict.fromkeys(phase for _, _, phase in points))
        for phase in phases:
            part = [(x, y) for x, y, of in points if phase in ("", of)]
            _draw_line(place, part, colour, label if phase == phases[0] else None, marked=panel.sparse or len(part) < 3)
        if panel.sparse:
            x, y, _ = points[-1]
            at = {"xytext": (6, 7), "ha": "left"} if len(points) == 1 else {"xytext": (0, 7), "ha": "right"}
            axes.annotate(f"{y:.3f}", (x, y), textcoords="offset points", color=_INK, fontsize=9, **at)
    if panel is _REWARD:
        spread = [(x, r["reward:mean"], r[_SPREAD]) for x, r in zip(xs, records, strict=True) if _SPREAD in r]
        if spread:
            at_x, mean, std = (np.array(column) for column in zip(*spread, strict=True))
            axes.fill_between(at_x, mean - std, mean + std, color=panel.lines[0][2], alpha=0.15, lw=0)
    if not drawn:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color=_MUTED)
        axes.set_yticks([])
    elif len(panel.lines) + len(panel.right) > 1:
        handles = [axes.plot([], [], color=colour, label=label)[0] for label, colour, _ in drawn]
        axes.legend(handles=handles, frameon=False, fontsize=8, labelcolor=_MUTED, loc="best")
    values = [y for _, _, points in drawn for _, y, _ in points]
    if panel.log and any(values):  # 0 stands at the bottom of a scale that is logarithmic above the least other value
        least = min(y for y in values if y > 0)
        axes.set_yscale("symlog", linthresh=least, linscale=0.5)
        axes.set_ylim(0, 2 * max(values))
        axes.set_yticks(
            [0.0, *(10.0**e for e in range(math.floor(math.log10(least)), math.ceil(math.log10(max(values))) + 1))]
        )
    elif panel.log and values:
        axes.set_ylim(-0.05, 1.0)
        axes.set_yticks([0.0])
        axes.text(0.5, 0.5, "0 in every step", transform=axes.transAxes, ha="center", color=_MUTED)
    elif panel.from_zero and drawn:
        axes.set_ylim(bottom=0)
    for side in filter(None, (right,)):
        side.spines[["top", "right", "left"]].set_visible(False)
        side.tick_params(colors=_MUTED, labelsize=8, length=0)
        if "cut_by_length:mean" in panel.right[0][1]:
            side.set_ylim(-0.03, 1.06)


def _draw_line(axes: Any, points: list[tuple[float, float]], colour: str, label: str | None, *, marked: bool) -> None:
    xs, ys = zip(*points, strict=True)
    marker = {"marker": "o", "markersize": 4} if marked else {}
    if len(points) < 30 or marked:
        axes.plot(xs, ys, color=colour, lw=1.6, label=label, **marker)
    else:
        axes.plot(xs, ys, color=colour, lw=0.8, alpha=0.35)
        # A running median of nine: one wild step does not bend the line.
        smooth = [statistics.median_high(ys[max(0, i - 4) : i + 5]) for i in range(len(ys))]
        axes.plot(xs, smooth, color=colour, lw=1.8, label=label)


def _style(axes: Any, panel: _Panel, spans: list[tuple[str, int, int]], shorten: _Shortened) -> None:
    axes.set_title(panel.title, loc="left", fontsize=10, color=_INK)
    axes.tick_params(colors=_MUTED, labelsize=8, length=0)
    axes.tick_params(which="minor", length=0, labelleft=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.grid(axis="y", color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    if panel.unit_range:
        axes.set_ylim(-0.03, 1.06)
    last = max(shorten(spans[-1][2]), 1)
    axes.set_xlim(-0.02 * last, 1.02 * last)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter(shorten.label)
    for phase, start, end in spans:
        if phase != "rl" and end > start:
            axes.axvspan(shorten(start), shorten(end), color=_SHADE, zorder=0, lw=0)
            words = axes.text(shorten(start), 1.0, f" {phase} ({end - start})", transform=axes.get_xaxis_transform())
            words.set(fontsize=8, color=_MUTED, va="top")
    axes.set_xlabel("step", fontsize=8, color=_MUTED)


def _summary(records: list[Record]) -> str:
    steps = sum(1 for record in records if record["phase"] == "rl" and record["step"] > 0)
    text = f"{steps} steps of RL" if steps else f"{len(records)} steps of {records[-1]['phase']}"
    before, after = (
        [r[_ACCURACY] for r in records if _ACCURACY in r and (r["phase"] == "rl" and r["step"] > 0) == learned]
        for learned in (False, True)
    )
    return f"{text}: held-out accuracy {before[-1]:.3f} to {after[-1]:.3f}" if before and after else text


def draw_beside(run: Path) -> subprocess.Popen[bytes] | None:
    """Draws the curves of a run that goes on, in a process of its own that has what the machine has to spare; None when
    none can be started. It needs no torch and ends by itself."""
    command = [sys.executable, "-m", "skyrl.tracking.curves", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    except OSError:
        return None


if __name__ == "__main__":
    os.nice(19)
    write_curves(Path(sys.argv[1]) / "metrics.jsonl", Path(sys.argv[1]) / "curves.png")
