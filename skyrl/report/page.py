"""`skyrl-tx report`: one HTML file that holds everything: curves, sample rollouts, options, versions, advisories.

Nothing in it is asked for elsewhere, nothing is a script, and what the model wrote is text.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from skyrl.args import Parser, path_arg
from skyrl.config.load import flat
from skyrl.config.schema import RunConfig
from skyrl.files import explain_write, write_atomic
from skyrl.report.charts import curves_of, svg
from skyrl.report.show import facts, rows_of
from skyrl.run_dir.folder import RECORDINGS
from skyrl.run_dir.reader import RunReader, find_run

EPISODES, LONGEST = 4, 4000  # of each of two dumps; characters of a text
LARGEST = 2_000_000
PICTURES = 800_000  # bytes of recorded episodes, as the page holds them
STYLE = """
:root{color-scheme:light dark;--line:#8884;--ink:#2563eb}
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
h2{border-bottom:1px solid var(--line);margin-top:2rem}
td,th{padding:.15rem .8rem .15rem 0;text-align:left;vertical-align:top;overflow-wrap:anywhere}
pre{white-space:pre-wrap;overflow-wrap:anywhere;border-left:3px solid var(--line);margin:.3rem 0;padding:.2rem .8rem}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(20rem,1fr))}figure{margin:.5rem}
svg text{font-size:10px;fill:currentColor;text-anchor:end}svg path,polyline{fill:none;stroke:var(--line)}
svg polyline{stroke:var(--ink);stroke-width:1.5}
"""


def report(args: Sequence[str]) -> None:
    """Runs the command line. Raises UserError."""
    p = Parser(prog="skyrl-tx report", description="One HTML file about a run, that needs nothing else.")
    p.add_argument("run", type=path_arg, help="a run folder, or the name of one in runs")
    p.add_argument("-o", "--out", type=path_arg, help="file to write (<name of the run>.html, here)")
    given = p.parse_args(list(args))
    reader = find_run(given.run, "report")
    out = given.out or type(reader.path)(f"{reader.path.resolve().name}.html")
    reader.check_outside(out, f"report: --out={out}")
    text = page(reader).encode("utf-8", "replace")
    with explain_write(out, "give another --out", "report"):
        write_atomic(out, text)
    print(f"wrote {out}: {len(text) / 1000:,.0f} kB")


def page(reader: RunReader) -> str:
    """The whole file, below LARGEST bytes. Raises UserError for metrics that are damaged."""
    found, (records, _) = facts(reader), reader.metrics()
    curves = "".join(svg(title, points) for title, points in curves_of(records)[:24])
    options, defaults = flat(reader.config()), flat(dataclasses.asdict(RunConfig()))
    changed = {key: value for key, value in options.items() if key not in defaults or defaults[key] != value}
    parts = [
        f"<h1>{_e(found['name'])}</h1><p>Written {time.strftime('%Y-%m-%d %H:%M:%S %z')}.</p>{_table(rows_of(found))}",
        f'<h2>Curves</h2><div class="curves">{curves or "No step has ended yet."}</div>',
        f"<h2>Options that differ from the defaults</h2>{_table(changed.items())}",
    ]
    if recordings := _recordings(reader):
        parts.append(f"<h2>Recorded episodes</h2>{recordings}")
    room = LARGEST - 100_000 - sum(len(part.encode()) for part in parts)
    if reader.dumps() or not recordings:
        parts.append(f"<h2>Sample rollouts</h2>{_rollouts(reader, room)}")
    head = f'<meta charset="utf-8"><title>{_e(found["name"])}</title><style>{STYLE}</style>'
    body = "".join(parts)
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _rollouts(reader: RunReader, room: int) -> str:
    """Episodes of the first and the newest dump of training, as far as there is room."""
    names, out = [name for name in reader.dumps() if name.isdecimal()], ""
    for name in dict.fromkeys([*names[:1], *names[-1:]]):
        out += f"<h3>Step {int(name)}</h3>"
        for one in islice(reader.rollouts(name), EPISODES):
            title = (
                f"{one['uid']} sample {one['index']}: reward {one['reward']}, ended by {one['stop']} {one['invalid']}"
            )
            part, seen = f"<h4>{_e(title)}</h4>", ""
            for turn in one["turns"][:20]:
                context = turn["context_text"]
                part += (
                    f"<pre>{_e(_short(context.removeprefix(seen)))}</pre><pre><b>{_e(_short(turn['text']))}</b></pre>"
                )
                seen = context + turn["text"]
            if one["expected"] is not None:
                part += f"<p>expected: {_e(_short(str(one['expected'])))}</p>"
            room -= len(part.encode())
            if room < 0:
                return f"{out}<p>Further episodes are left out: they are too long for this page.</p>"
            out += part
    return out or "<p>None were dumped.</p>"


def _recordings(reader: RunReader) -> str:
    """The first recorded episode and the newest ones, as far as PICTURES goes; "" where there are none."""
    found, room = reader.recordings(), PICTURES
    figures, left_out = dict[str, str](), 0
    for path in dict.fromkeys([*found[-1:], *found[:1], *found[-2:0:-1]]):  # what matters most takes its room first
        data = base64.b64encode(path.read_bytes()).decode()
        if len(data) > room or len(figures) == 8:
            left_out += 1
            continue
        room -= len(data)
        picture = f'<img src="data:image/gif;base64,{data}" alt="an episode of step {int(path.stem)}">'
        figures[path.stem] = f"<figure>{picture}<figcaption>step {int(path.stem)}</figcaption></figure>"
    shown = "".join(figures[name] for name in sorted(figures))
    more = f"<p>{left_out} more are in the run's folder {RECORDINGS}.</p>" if left_out else ""
    return f'<div class="curves">{shown}</div>{more}' if found else ""


def _e(value: Any) -> str:
    return html.escape(str(value))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text) - LONGEST:,} characters more)"


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    cells = "".join(f"<tr><th>{_e(k)}</th><td>{_e(v)}</td></tr>" for k, v in rows)
    return f"<table>{cells}</table>"
