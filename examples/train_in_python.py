"""Training from Python: two runs that differ in one option, and what they have left.

    python examples/train_in_python.py
    torchrun --nproc_per_node=2 examples/train_in_python.py batch.num_steps=20

Options are written as on the command line. A run folder that is finished answers at once, one that was stopped goes on.
"""

import json
import sys
from pathlib import Path

from skyrl.api import train


def main(*options: str) -> dict[str, float]:
    """Mean reward of the last step for each advantage."""
    found = {}
    for name in ("grpo", "rloo"):
        folder = train(f"algorithm.advantage.name={name}", f"run.name=compare-{name}", *options)
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        found[name] = [line["reward:mean"] for line in lines if "reward:mean" in line][-1]
    return found


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
