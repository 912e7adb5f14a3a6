"""A base model that can add a bit: what reinforcement in the cookbook's math_rl needs to have something to reinforce.

    python benchmarks/tinker/adder.py <folder> [steps]

trains it with skyrl.sft, all parameters, on the questions of math_rl's arithmetic (sums of two numbers from 0 to
100) in the prompt that the recipe's renderer writes. As Qwen3 does, it thinks before it answers; here in column sums,
last column first with the carry: "What is 37 + 58?" -> "<think>15,09</think>95". Training ends while it is still
wrong more often than right.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tinker"), str(ROOT / "tests" / "system")]

from hub import make_model, write_lines  # noqa: E402
from launcher import environment  # noqa: E402

from skyrl.tasks.arithmetic import column_sums  # noqa: E402

LARGEST = 100
HELD_OUT = 512  # of 10,201 questions
SHAPE = {"hidden": 128, "layers": 4}
OPTIONS = (
    "experiment=custom",
    "env.name=single_turn",
    "env.options.reward=math_last_number",
    "sampler.max_new_tokens=16",
    "warmup.rows_per_step=64",
    "warmup.lr=2e-3",
    f"eval.num_prompts={HELD_OUT}",
    "eval.temperature=1",
    "checkpoint.every_steps=50",
    "checkpoint.keep_last=1",
)


def talk(a: int, b: int) -> dict[str, Any]:
    """A question as math_rl asks it, after the recipe's example, with the text that the model learns."""
    messages = [
        {"role": "user", "content": "What is 4 + 5?"},
        {"role": "assistant", "content": "9"},
        {"role": "user", "content": f"What is {a} + {b}?"},
    ]
    return {
        "messages": messages,
        "answer": str(a + b),
        "solution": f"<think>{column_sums(a, b)}</think>{a + b}",
    }


def train_adder(folder: Path, *, steps: int, ranks: int = 2, seed: int = 1) -> tuple[Path, dict[str, Any]]:
    """(Hugging Face folder of the trained model, what its training was).

    Everything lies in `folder`; a second call takes over what an interrupted one has, and returns at once what is
    done. Raises subprocess.CalledProcessError when training fails.
    """
    run = folder / "run"
    if not (folder / "test.jsonl").exists():
        make_model(folder / "random", **SHAPE)
        questions = [talk(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
        random.Random(seed).shuffle(questions)
        write_lines(folder / "train.jsonl", questions[HELD_OUT:])
        write_lines(folder / "test.jsonl", questions[:HELD_OUT])
    options = [
        *OPTIONS,
        f"seed={seed}",
        f"warmup.num_steps={steps}",
        f"model.path={folder / 'random'}",
        f"data.path={folder / 'train.jsonl'}",
        f"run.dir={run}",
    ]
    if not (run / "export").exists():
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [*launcher, "-m", "skyrl.sft", *options, "run.threads=1"]
        subprocess.run(command, cwd=folder, env=environment(), check=True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return run / "export", {
        "options": options,
        "shape": SHAPE,
        "loss_every_20_steps": [round(row["loss:sum"], 4) for row in rows[19::20]],
        "held_out_accuracy": next(row["eval/accuracy:mean"] for row in reversed(rows) if "eval/accuracy:mean" in row),
        "seconds": round(sum(row["time/step_seconds:sum"] for row in rows), 1),
    }


if __name__ == "__main__":
    print(train_adder(Path(sys.argv[1]).resolve(), steps=int(sys.argv[2]) if len(sys.argv) > 2 else 400))
