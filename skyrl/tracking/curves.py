"""One picture of a run, drawn from its metrics.jsonl: reward, accuracy, log-prob gap, loss, entropy, tokens/s."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrl.files import disk_reason
from skyrl.tracking.base import Record
from skyrl.tracking.jsonl import read_metrics
from skyrl.types import UserError

_ACCURACY = "eval/accuracy:mean"
_INK, _MUTED, _GRID, _SHADE = "#22262e", "#6b7280", "#e5e7eb", "#f3f1ea"


@dataclass(frozen=True)
class _Panel:
    """One small plot: its title and its lines as (label, keys of which the first present counts, colour)."""

    title: str
    lines: tuple[tuple[str, tuple[str, ...], str], ...]
    log: bool = False
    unit_range: bool = False  # values between 0 and 1
    sparse: bool = False  # points of evaluations, drawn with markers
    last_phase: bool = False  # the scale of an earlier phase would hide the last one
    from_zero: bool = False


_PANELS = (
    _Panel("Reward of training episodes", (("mean", ("reward:mean",), "#2563eb"),)),
    _Panel("Held-out accuracy", (("accuracy", (_ACCURACY,), "#059669"),), unit_range=True, sparse=True),
    _Panel(
        "Log-prob gap, sampler to trainer (nats)",
        (("mean", ("logprob_gap:mean",), "#d97706"), ("max", ("logprob_gap:max",), "#fbbf77")),
        log=True,
    ),
    _Panel("Loss", (("loss", ("loss:sum", "loss:mean"), "#7c3aed"),), last_phase=True),
    _Panel("Entropy (nats per token)", (("entropy", ("entropy:mean",), "#db2777"),)),
    _Panel(
        "Tokens per second",
        (
            ("whole step", ("speed/tokens_per_second:mean",), "#0891b2"),
            ("sampling alone", ("speed/sampled_tokens_per_second:mean",), "#a5d8e2"),
        ),
        from_zero=True,
    ),
)


def write_curves(metrics: Path, out: Path, *, title: str = "") -> Path | None:
    """Draws `metrics` (a metrics.jsonl) as a PNG at `out` and returns that path; None when there is nothing to draw.

    Phases follow each other on one axis; what comes before RL is shaded. Panels without numbers say so.
    Raises: UserError when the picture cannot be written.
    """
    records = read_metrics(metrics) if Path(metrics).exists() else []
    if not records:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    positions, spans = _axis(records)
    figure = Figure(figsize=(12.5, 6.4), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)  # no window, no global state, whatever backend the user has set
    for axes, panel in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
        _draw(axes, panel, records, positions, spans)
    figure.suptitle(title or _summary(records), x=0.01, ha="left", fontsize=12, color=_INK, fontweight="bold")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=120, format="png")
    except OSError as problem:
        raise UserError(
            f"{out}: the curves cannot be written ({disk_reason(problem, out)}); free some space there"
        ) from None
    return out


def _axis(records: list[Record]) -> tuple[list[int], list[tuple[str, int, int]]]:
    """Positions of the records on the common axis, and (phase, first, last) of each stretch of one phase."""
    positions: list[int] = []
    spans: list[tuple[str, int, int]] = []
    end = 0
    for phase, part in itertools.groupby(records, key=lambda record: record["phase"]):
        steps = [end + int(record["step"]) for record in part]
        spans.append((phase, end, max(end, *steps)))
        positions += steps
        end = spans[-1][2]
    return positions, spans


def _draw(
    axes: Any, panel: _Panel, records: list[Record], positions: list[int], spans: list[tuple[str, int, int]]
) -> None:
    drawn = 0
    for label, keys, colour in panel.lines:
        key = next((key for key in keys if any(key in record for record in records)), None)
        found = [(x, r[key], r["phase"]) for x, r in zip(positions, records, strict=True) if key in r]
        points = [p for p in found if math.isfinite(p[1]) and (p[1] > 0 or not panel.log)]
        if panel.last_phase and points:
            points = [p for p in points if p[2] == points[-1][2]]
        if not points:
            continue
        drawn += 1
        # Lines do not cross from one phase to the next, except between evaluations, which both measure the policy.
        phases = [""] if panel.sparse else list(dict.fromkeys(phase for _, _, phase in points))
        for phase in phases:
            part = [(x, y) for x, y, of in points if phase in ("", of)]
            _draw_line(axes, part, colour, label if phase == phases[0] else None, marked=panel.sparse or len(part) < 3)
        if panel.sparse:
            x, y, _ = points[-1]
            place = {"xytext": (6, 7), "ha": "left"} if len(points) == 1 else {"xytext": (0, 7), "ha": "right"}
            axes.annotate(f"{y:.3f}", (x, y), textcoords="offset points", color=_INK, fontsize=9, **place)
    _style(axes, panel, spans)
    if not drawn:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color=_MUTED)
        axes.set_yticks([])
    elif drawn > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=_MUTED, loc="best")


def _draw_line(axes: Any, points: list[tuple[int, float]], colour: str, label: str | None, *, marked: bool) -> None:
    xs, ys = zip(*points, strict=True)
    marker = {"marker": "o", "markersize": 4} if marked else {}
    if len(points) < 30 or marked:
        axes.plot(xs, ys, color=colour, lw=1.6, label=label, **marker)
    else:
        axes.plot(xs, ys, color=colour, lw=0.8, alpha=0.35)
        axes.plot(xs, _smooth(ys), color=colour, lw=1.8, label=label)


def _style(axes: Any, panel: _Panel, spans: list[tuple[str, int, int]]) -> None:
    axes.set_title(panel.title, loc="left", fontsize=10, color=_INK)
    axes.tick_params(colors=_MUTED, labelsize=8, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.grid(axis="y", color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    if panel.log and axes.lines:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
        axes.tick_params(which="minor", length=0, labelleft=False)
    if panel.from_zero and axes.lines:
        axes.set_ylim(bottom=0)
    if panel.unit_range:
        axes.set_ylim(-0.03, 1.06)
    last = max(spans[-1][2], 1)
    axes.set_xlim(-0.02 * last, 1.02 * last)
    axes.xaxis.get_major_locator().set_params(integer=True)
    for phase, start, end in spans:
        if phase != "rl" and end > start:
            axes.axvspan(start, end, color=_SHADE, zorder=0, lw=0)
            axes.text(start, 1.0, f" {phase}", transform=axes.get_xaxis_transform(), fontsize=8, color=_MUTED, va="top")
    axes.set_xlabel("step", fontsize=8, color=_MUTED)


def _smooth(values: Sequence[float], window: int = 9) -> list[float]:
    """Centred running median: one wild step does not bend the line."""
    half = window // 2
    return [statistics.median_high(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _summary(records: list[Record]) -> str:
    steps = sum(1 for record in records if record["phase"] == "rl" and record["step"] > 0)
    text = f"{steps} steps of RL" if steps else f"{len(records)} steps of {records[-1]['phase']}"
    before, after = (
        [r[_ACCURACY] for r in records if _ACCURACY in r and (r["phase"] == "rl" and r["step"] > 0) == learned]
        for learned in (False, True)
    )
    return f"{text}: held-out accuracy {before[-1]:.3f} to {after[-1]:.3f}" if before and after else text
