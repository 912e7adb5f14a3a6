"""Training from Python: two runs that differ in one option, and what they have left.

    python examples/train_in_python.py
    torchrun --nproc_per_node=2 examples/train_in_python.py batch.num_steps=20

Options are written as on the command line. A run folder that is finished answers at once, one that was stopped goes on.
"""

import sys

import skyrl


def main(*options: str) -> dict[str, float]:
    """Mean reward of the last step for each advantage."""
    found = {}
    for name in ("grpo", "rloo"):
        config = [f"algorithm.advantage.name={name}", f"run.name=compare-{name}", *options]
        found[name] = skyrl.SkyRLTrainer(config=config).train()["reward:mean"]
    return found


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
