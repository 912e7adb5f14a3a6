"""One whole session with whichever release of the Tinker client is importable; runs as a script in its own process.

    python drive.py '{"base_model": "Qwen/Qwen3-8B"}'

Prints a JSON object for each step: {"step": name, "ok": true, facts...}, {"step": name, "ok": false, "error": ...} or
{"step": name, "left_out": why}; the first line says the release, the last is the step "end". Steps say what they saw;
facts.py says what must be true. Loss formulas stand in drive_training.py, in numpy, from the protocol's text, and know
nothing of the server.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from typing import Any

import tinker
from driving import STEPS, Run, Skip

for steps in ("drive_training", "drive_sampling", "drive_records"):  # importing adds the steps, in this order
    importlib.import_module(steps)


def main() -> None:
    """Runs the steps, or those of options["only"]."""
    options = json.loads(sys.argv[1])
    only = options.get("only")
    tell("release", {"release": tinker.__version__})
    run = Run(options)
    for name, function in STEPS:
        if only and name not in only:
            continue
        start = time.monotonic()
        facts: dict[str, Any]
        try:
            facts = {"ok": True, **(function(run) or {})}
        except Skip as reason:
            facts = {"left_out": str(reason)}
        except Exception as error:  # the fact is that it failed; the other steps go on
            traceback.print_exc()
            facts = {"ok": False, "error": f"{type(error).__name__}: {error}"[:600]}
        tell(name, {**facts, "seconds": round(time.monotonic() - start, 3)})
    tell("end", {"ok": True})


def tell(name: str, facts: dict) -> None:
    print(json.dumps({"step": name, **facts}, default=str), flush=True)


if __name__ == "__main__":
    main()
