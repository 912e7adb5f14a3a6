"""`skyrl-tx compare A B`: where two runs part first, and why; of folders of runs, mean and spread."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skyrl.args import Parser, path_arg
from skyrl.config.load import config_diff
from skyrl.report.charts import printable
from skyrl.run_dir.folder import FINGERPRINT, changed_facts, config_changes, read_json
from skyrl.run_dir.reader import RunReader, find_run, find_runs
from skyrl.sweep import DEFAULT_METRICS, read_points
from skyrl.tracking.base import without_wall_clock
from skyrl.types import UserError, few

NOT_VERSIONS = ("started", "command", "hosts", "host", "platform")
# What is known first in a step comes first: what was drawn, what it was worth, what was learned.
ORDER = ("sampled_tokens", "length", "reward", "filters/", "advantage", "kl/", "logprob_gap", "loss", "grad_norm")
REASONS = {
    "options": "other options",
    "fingerprint": "other code, data or files",
    "versions": "other versions",
    "places": "another layout or place, which changes rounding at most",
}


def compare(args: Sequence[str]) -> None:
    """Runs the command line. Raises UserError."""
    p = Parser(prog="skyrl-tx compare", description="Where two runs part first, and why; or two folders of runs.")
    p.add_argument("a", type=path_arg, help="a run folder, the name of one in runs, or a folder of several runs")
    p.add_argument("b", type=path_arg, help="what it is compared with, of the same kind")
    p.add_argument("--metric", action="append", default=[], help="of folders of runs: repeat for more")
    p.add_argument("--json", action="store_true", help="for programs")
    given = p.parse_args(list(args))
    several = [
        path.is_dir() and not (path / "config.yaml").exists() and bool(find_runs(path)) for path in (given.a, given.b)
    ]
    if any(several) and not all(several):
        one = given.b if several[0] else given.a
        raise UserError(f"compare: {one} is no folder of runs, and the other is; give two runs, or two folders of runs")
    if given.metric and not any(several):
        raise UserError("compare: --metric is for folders of runs; of two runs every metric is compared")
    if any(several):
        found = compare_folders(given.a, given.b, given.metric or DEFAULT_METRICS)
        text = _describe_folders(found)
    else:
        found = compare_runs(find_run(given.a, "compare"), find_run(given.b, "compare"))
        text = _describe(found)
    print(json.dumps(found, indent=1, default=str) if given.json else printable(text))


def compare_runs(a: RunReader, b: RunReader) -> dict[str, Any]:
    """What `skyrl-tx compare --json` prints of two runs: "metric" and "rollout", the first places in which they part
    (None where they do not), wall-clock keys left out; "options" that compute something else, "places" that do not,
    "versions", and names of the "fingerprint" that differ; "why" in words."""
    before, now = a.config(), b.config()
    options = config_diff(before, now)
    counted = {line.partition(":")[0] for line in options}
    versions = [{k: v for k, v in (run.starts() or [{}])[-1].items() if k not in NOT_VERSIONS} for run in (a, b)]
    facts = read_json(b.path, FINGERPRINT)
    files = [name for part in changed_facts(a.path, facts) for name in part] if isinstance(facts, dict) else []
    records = [{(r["phase"], r["step"]): without_wall_clock(r) for r in run.metrics()[0]} for run in (a, b)]
    shared = [name for name in a.dumps() if name in set(b.dumps())]
    places = [line for line in config_changes(before, now) if line.partition(":")[0] not in counted]
    found: dict[str, Any] = {"a": str(a.path), "b": str(b.path), "steps": [len(one) for one in records]}
    found |= {"dumps": len(shared), "metric": _first_metric(*records), "rollout": _first_rollout(a, b, shared)}
    found |= {"options": options, "places": places, "versions": config_changes(*versions), "fingerprint": files}
    reason = next((f"{what}: {few(found[key])}" for key, what in REASONS.items() if found[key]), "")
    if not found["metric"] and not found["rollout"]:
        reason = "they do not part" if records[0].keys() & records[1].keys() else "they have no step in common"
    return {**found, "why": reason or "nothing that is recorded tells; debug.deterministic=true leaves out chance"}


def _first_metric(a: dict[Any, dict[str, Any]], b: dict[Any, dict[str, Any]]) -> dict[str, Any] | None:
    """The first step that both have and that differs, with every metric that does."""
    for place in [place for place in a if place in b]:
        old, new = a[place], b[place]
        both = {key: (old.get(key), new.get(key)) for key in dict.fromkeys([*old, *new])}
        keys = [key for key, pair in both.items() if repr(pair[0]) != repr(pair[1])]  # nan is equal to itself here
        keys = [
            key for key in keys if not key.startswith("eval/") or None not in both[key]
        ]  # one is evaluated more often
        if keys:
            keys.sort(key=lambda key: next((n for n, word in enumerate(ORDER) if key.startswith(word)), len(ORDER)))
            differ = {key: list(both[key]) for key in keys}
            return {"phase": place[0], "step": place[1], "differ": differ, "equal": len(old) - len(keys)}
    return None


def _first_rollout(a: RunReader, b: RunReader, shared: Sequence[str]) -> dict[str, Any] | None:
    """The first episode, of the first dump that both have, that is another one: where, and what of it."""
    for name in shared:
        other = {(e["uid"], e["index"]): e for e in b.rollouts(name)}
        for one in a.rollouts(name):
            found = other.get((one["uid"], one["index"]))
            what = "b has not played this prompt" if found is None else _episode_differs(one, found)
            if what:
                return {"dump": name, "uid": one["uid"], "index": one["index"], "what": what}
    return None


def _episode_differs(a: dict[str, Any], b: dict[str, Any]) -> str:
    """The first thing in which two episodes differ, in words; "" for none."""
    for number, (old, new) in enumerate(zip(a["turns"], b["turns"], strict=False), start=1):
        for ids, text, what in (("context", "context_text", "read"), ("tokens", "text", "wrote")):
            if (x := old[ids]) != (y := new[ids]):
                at = next(
                    (n for n, pair in enumerate(zip(x, y, strict=False)) if pair[0] != pair[1]), min(len(x), len(y))
                )
                texts = f"{old[text][-200:]!r} and {new[text][-200:]!r}"
                return f"turn {number}: the model {what} something else from token {at} on: {texts}"
        if old["reward"] != new["reward"]:
            return f"turn {number}: the same text, rewards {old['reward']} and {new['reward']}"
        if old["logprobs"] != new["logprobs"]:
            gap = np.abs(np.array(old["logprobs"], np.float64) - np.array(new["logprobs"], np.float64)).max()
            return f"turn {number}: the same text, log-probabilities that differ by up to {gap:.3g}"
    ends = [f"{len(e['turns'])} turns, ended by {e['stop']} {e['invalid']}".rstrip() for e in (a, b)]
    return "" if ends[0] == ends[1] else f"{ends[0]}, and {ends[1]}"


def _describe(found: dict[str, Any]) -> str:
    metric, rollout = found["metric"], found["rollout"]
    rows = [(key, f"{found[key]}, {steps} steps") for key, steps in zip("ab", found["steps"], strict=True)]
    rows.append(("metrics", "equal in every step that both have"))
    if metric:
        rows[-1] = "metrics", f"part in {metric['phase']} step {metric['step']}, in which {metric['equal']} are equal"
        pairs = list(metric["differ"].items())
        rows += [("", f"{key}: {old} and {new}") for key, (old, new) in pairs[:8]]
        rows += [("", f"and {len(pairs) - 8} more")] * (len(pairs) > 8)
    text = f"equal in the {found['dumps']} dumps that both have"
    if rollout:
        text = f"part in {rollout['dump']}: {rollout['uid']} sample {rollout['index']}: {rollout['what']}"
    rows.append(("rollouts", text))
    rows += [(key if n == 0 else "", line) for key in REASONS for n, line in enumerate(found[key][:12])]
    return "\n".join(f"{name:<13}{text}" for name, text in [*rows, ("why", found["why"])])


def compare_folders(a: Path, b: Path, metrics: Sequence[str]) -> dict[str, Any]:
    """What `skyrl-tx compare --json` prints of two folders of runs: a row for each metric of each point that both have,
    with mean and spread of the final values over seeds, the difference of the means, and its standard error (Welch: the
    spreads may differ). Raises UserError for folders without a point in common, and metrics that no run has."""
    one, two = read_points(a), read_points(b)
    pairs = [(x, y) for x in one for y in two if x.options == y.options or len(one) == len(two) == 1]
    if not pairs:
        raise UserError(f"compare: no point of {a} has the options of one of {b}; skyrl-tx sweep-table shows each")
    known = sorted({name for pair in pairs for point in pair for run in point.runs.values() for name in run})
    if unknown := [name for name in metrics if name not in (*known, *DEFAULT_METRICS)]:
        raise UserError(f"compare: --metric={unknown[0]}: no finished run has it; there are {', '.join(known)}")
    within = {"seed", *pairs[0][0].options}
    lines = config_diff(*(find_runs(path)[0].config() for path in (a, b)))
    options = [line for line in lines if line.partition(":")[0] not in within]
    rows: list[dict[str, Any]] = []
    for x, y, name in ((x, y, name) for x, y in pairs for name in metrics):
        p, q = x.spread(name), y.spread(name)
        rows.append({"options": x.options, "metric": name, "a": p, "b": q})
        if p and q:
            rows[-1]["difference"] = q["mean"] - p["mean"]
            if p["std"] is not None and q["std"] is not None:
                rows[-1]["error"] = math.sqrt(sum(s["std"] ** 2 / len(s["values"]) for s in (p, q)))
    return {"a": str(a), "b": str(b), "options": options, "rows": rows}


def _describe_folders(found: dict[str, Any]) -> str:
    lines = [f"a  {found['a']}", f"b  {found['b']}", *(f"   {line}" for line in found["options"])]
    for row in found["rows"]:
        sides = row["a"], row["b"]
        cells = [f"{s['mean']:.4f} +- {s['std'] or 0:.4f} of {len(s['values'])}" if s else "-" for s in sides]
        gap = f"b - a = {row['difference']:+.4f}" if "difference" in row else ""
        gap += f" (standard error {row['error']:.4f})" if "error" in row else ""
        point = " ".join(f"{key}={value}" for key, value in row["options"].items())
        lines.append(f"{row['metric']:<20} {cells[0]:<24} {cells[1]:<24} {gap}  {point}".rstrip())
    return "\n".join(lines)
