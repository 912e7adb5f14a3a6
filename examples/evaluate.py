"""Evaluation alone: the held-out accuracy of any model, pass@1 over several samples, nothing trained.

    python examples/evaluate.py experiment=arithmetic run.name=eval-tiny
    torchrun --nproc_per_node=8 examples/evaluate.py experiment=gsm8k model.path=runs/mine/export \
        data.path=train.jsonl eval.samples_per_prompt=4 eval.temperature=0.6 run.name=eval-mine

Each answer with its reward is in the run folder's rollouts.
"""

import sys

from skyrl.api import evaluate


def main(*options: str) -> dict[str, float]:
    """The metrics of the evaluation, by name."""
    return evaluate(*options)


if __name__ == "__main__":
    for name, value in sorted(main(*sys.argv[1:]).items()):
        print(f"{name:40} {value:.4f}")
