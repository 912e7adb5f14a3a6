"""Twelve releases of the Tinker client, one whole session each, against one server: release x step.

    SKYRL_TEST_CLIENTS=<folder> python benchmarks/tinker_matrix.py [--write] [--ranks 2] [--releases 0.3.0 0.38.0]

Releases that are not in the folder are downloaded. A step is "ok", "unknown" to the release, or what is wrong with it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, write

sys.path[:0] = [str(ROOT / "tests" / "tinker"), str(ROOT / "tests" / "system")]

from clients import RELEASES, Missing, drive  # noqa: E402
from facts import CHECKS, problems  # noqa: E402
from hub import MODEL, make_hub  # noqa: E402
from serving import serve  # noqa: E402


def judged(facts: dict[str, Any]) -> dict[str, str]:
    """Step -> "ok", "unknown" or what is wrong."""
    wrong = problems(facts, MODEL)
    return {
        step: wrong.get(step) or ("unknown" if "left_out" in facts[step] else "ok")
        for step in [*CHECKS, *(name for name in wrong if name not in CHECKS)]
    }


def main() -> int:
    """The command line. Returns 1 if anything is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--releases", nargs="*", default=list(RELEASES))
    args = parser.parse_args()
    table: dict[str, dict[str, str]] = {}
    agreement: dict[str, float] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        hub = make_hub(Path(folder) / "hub")
        with serve(Path(folder) / "server", hub / MODEL, ranks=args.ranks, aliases=(MODEL,)) as server:
            for release in args.releases:
                try:
                    facts = drive(release, server.url, hub, download=True, timeout=600, base_model=MODEL)
                except Missing as why:
                    print(f"{release}: cannot be had: {why}")
                    return 0
                table[release] = judged(facts)
                seconds[release] = sum(seen.get("seconds", 0) for name, seen in facts.items() if name in CHECKS)
                agreement[release] = facts.get("logprobs_agree", {}).get("sampled", float("nan"))
                counts = [sum(value == word for value in table[release].values()) for word in ("ok", "unknown")]
                bad = {k: v for k, v in table[release].items() if v not in ("ok", "unknown")}
                print(f"{release}: {counts[0]} ok, {counts[1]} unknown to it, {len(bad)} wrong {bad or ''}", flush=True)
    figures = {
        "ranks": args.ranks,
        "model": "random Qwen3, hidden 64, 2 layers, 268 tokens, float32",
        "releases": table,
        "seconds": {release: round(value, 1) for release, value in seconds.items()},
        "sampled_logprob_minus_training_forward_max": agreement,
    }
    if args.write:
        print(write("tinker_matrix", figures))
    else:
        print(json.dumps(figures, indent=1))
    return int(any(v not in ("ok", "unknown") for steps in table.values() for v in steps.values()))


if __name__ == "__main__":
    sys.exit(main())
