"""The in-process side of tinker_door.py: one measurement inside a torchrun program, by the SDK of skyrl.tinker.

torchrun ... in_process.py '{"kind": "step", ...}' <weights> <answer.json> <folder of the service>
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tinker
from workload import KINDS

import skyrl.tinker


def main() -> None:
    """Rank 0 measures and writes the answer; the other ranks work for it."""
    order, weights, answer, folder = json.loads(sys.argv[1]), *sys.argv[2:5]
    options = {"folder": str(Path(folder) / "state"), "aliases": {order["model"]: ""}}
    with skyrl.tinker.service_client(model={"path": weights}, run={"threads": 1}, service=options) as service:
        seen = KINDS[order["kind"]](tinker, service, order)
    Path(answer).write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
