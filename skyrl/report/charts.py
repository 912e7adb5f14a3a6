"""Curves in characters and in SVG, and text that a terminal shows as it is and does not obey."""

from __future__ import annotations

import bisect
import html
import itertools
import math
import statistics
import unicodedata
from collections.abc import Sequence
from typing import Any

Points = Sequence[tuple[float, float]]  # (step, value), steps rising
BLOCKS = "▁▂▃▄▅▆▇█"
SIMPLE = {**{block: str(n) for n, block in enumerate(BLOCKS, start=1)}, "\u2800": " ", "…": "~"}
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a braille character, by column and row
LENGTH = "length (tokens)"
# What people look at first: a title, and metrics of which the first that a run has counts.
CURVES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward", ("reward:mean",)),
    ("held-out accuracy", ("eval/accuracy:mean",)),
    ("held-out reward", ("eval/reward:mean",)),
    ("supervised loss (nats)", ("nll:mean",)),
    ("entropy (nats)", ("entropy:mean",)),
    (LENGTH, ("length:mean",)),
    ("tokens/s", ("speed/tokens_per_second:mean",)),
    ("truncated (share)", ("cut_by_length:mean",)),
    ("log-prob gap (nats)", ("logprob_gap:mean",)),
    ("KL (nats)", ("kl_reference:mean", "kl/behaviour_reference:mean", "approx_kl:mean")),
    ("gradient norm", ("grad_norm:mean",)),
    ("critic loss", ("critic/loss:sum",)),
    ("MFU", ("speed/mfu:mean",)),
)


def curves_of(records: Sequence[dict[str, Any]]) -> list[tuple[str, list[tuple[float, float]]]]:
    """The title and the finite (step, value) points of each of CURVES that a run has; then of named objectives."""
    names = sorted({key for r in records[-50:] for key in r if key.startswith("reward/")})
    found: dict[str, list[tuple[float, float]]] = {}
    for title, keys in (*CURVES, *((f"objective {key[7:].rpartition(':')[0]}", (key,)) for key in names)):
        for key in keys:
            pairs = [(float(r["step"]), r[key]) for r in records if isinstance(r.get(key), (int, float))]
            if points := [pair for pair in pairs if math.isfinite(pair[1])]:
                title = "length (steps)" if title == LENGTH and "env_steps:sum" in records[-1] else title
                found.setdefault(title, points)
    return list(found.items())


def thin(points: Points, count: int) -> list[tuple[float, float]]:
    """At most `count` points: means over stretches of equal length in steps."""
    if len(points) <= count:
        return list(points)
    first, last = points[0][0], points[-1][0]
    buckets: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        buckets.setdefault(min(count - 1, int((point[0] - first) / ((last - first) or 1) * count)), []).append(point)
    return [(statistics.fmean(x for x, _ in part), statistics.fmean(y for _, y in part)) for part in buckets.values()]


def sparkline(points: Points, width: int = 32) -> str:
    """One line of blocks, from the least to the greatest value."""
    values = [y for _, y in thin(points, width)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    return "".join(BLOCKS[int((y - low) / ((high - low) or 1) * 7.999)] for y in values)


def braille(points: Points, width: int, height: int) -> list[str]:
    """`height` lines of `width` characters, two by four dots in each, joined from point to point."""
    cells = [[0] * width for _ in range(height)]
    kept = thin(points, 2 * width)
    xs, ys = [x for x, _ in kept], [y for _, y in kept]
    low, high = min(ys), max(ys)
    columns = [round((x - xs[0]) / ((xs[-1] - xs[0]) or 1) * (2 * width - 1)) for x in xs]
    rows = [round((high - y) / (high - low) * (4 * height - 1)) if high > low else 2 * height for y in ys]
    dots = list(zip(columns, rows, strict=True))
    for (x0, y0), (x1, y1) in zip(dots, dots[1:] or dots, strict=False):
        count = max(abs(x1 - x0), abs(y1 - y0), 1)
        for part in range(count + 1):
            x, y = round(x0 + (x1 - x0) * part / count), round(y0 + (y1 - y0) * part / count)
            cells[y // 4][x // 2] |= DOTS[x % 2][y % 4]
    return ["".join(chr(0x2800 + cell) for cell in row) for row in cells]


def svg(title: str, points: Points, width: int = 420, height: int = 150) -> str:
    """A curve as inline SVG, with its first and last step, least and greatest value."""
    kept = thin(points, 300)
    xs, ys = [x for x, _ in kept], [y for _, y in kept]
    low, high, across, down = min(ys), max(ys), xs[-1] - xs[0], max(ys) - min(ys)
    at = [
        (52 + (x - xs[0]) / (across or 1) * (width - 62), 10 + (high - y) / (down or 1) * (height - 32))
        for x, y in kept
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    bottom, right = height - 20, width - 10
    words = (48, 14, f"{high:.4g}"), (48, bottom, f"{low:.4g}"), (70, height - 4, xs[0]), (right, height - 4, xs[-1])
    texts = "".join(f'<text x="{x}" y="{y}">{text}</text>' for x, y, text in words)
    shapes = f'<path d="M52 6V{bottom}H{right}"/><polyline points="{line}"/>{texts}'
    label = html.escape(f"{title}: {ys[-1]:.5g} at step {xs[-1]:g}")
    picture = f'<svg role="img" aria-label="{label}" viewBox="0 0 {width} {height}">{shapes}</svg>'
    return f"<figure><figcaption>{label}</figcaption>{picture}</figure>"


def printable(text: str) -> str:
    """The text with control and direction characters written out: what a model writes must not steer a terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def replace_unknown(error: UnicodeError) -> tuple[str, int]:
    """An error handler (codecs.register_error) for a terminal without UTF-8: it shows curves by letters that it has."""
    assert isinstance(error, UnicodeEncodeError)
    lost = error.object[error.start : error.end]
    return "".join("*" if "\u2800" < c < "\u2900" else SIMPLE.get(c, "?") for c in lost), error.end


def cut(text: str, width: int) -> str:
    """As much of one line of printable text as `width` columns hold; "…" for what is left out."""
    text = printable(" ".join(text.split("\n"))).replace("\t", " ")
    wide = (0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
    ends = list(itertools.accumulate(wide))
    return text if not ends or ends[-1] <= width else text[: bisect.bisect_right(ends, width - 1)] + "…"[:width]
