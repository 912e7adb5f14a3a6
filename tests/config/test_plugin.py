"""A user's own loss and advantage, each with a parameter of its own, from the command line to the numbers of a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from loop import LOOP
from small import SMALL

from skyrl.tracking.jsonl import read_metrics

ROOT = Path(__file__).resolve().parents[2]
# One file each; nothing else of the library knows them.
PLUGIN = """
import numpy as np

from skyrl.algorithms.advantages import Advantages
from skyrl.algorithms.declare import Advantage, Loss, Param

TIMES = Loss("times", needs=("advantages",), params={"scale": Param(2.0, "Times the loss", high=9.0)})
FLAT = Advantage("flat", params={"level": Param(1.0, "The advantage of every token")})

@TIMES
def times(outputs, rows, *, scale):
    loss_T = -scale * rows.advantages_T * outputs.logprobs_T
    return loss_T, {"scale:mean": 0 * loss_T.detach() + scale, "level:mean": rows.advantages_T}

@FLAT
def flat(rows, all_reduce_sum, *, level):
    return Advantages([np.where(mask, level, 0.0).astype(np.float32) for mask in rows.masks])
"""


def train(folder: Path, *options: str) -> subprocess.CompletedProcess:
    (folder / "my_plugin.py").write_text(PLUGIN)
    mine = ["plugins=[my_plugin]", "algorithm.loss.name=times", "algorithm.advantage.name=flat", "run.dir=run"]
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "skyrl.train", *SMALL, *LOOP, *mine, *options],
        cwd=folder,
        env={**clean, "PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_parameters_of_a_plugin_reach_its_loss_and_advantage(tmp_path):
    done = train(tmp_path, "algorithm.loss.params.scale=3", "algorithm.advantage.params.level=0.5")
    assert done.returncode == 0, done.stderr
    steps = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "scale:mean" in record]
    assert len(steps) == 2
    assert all(step["scale:mean"] == 3.0 and step["level:mean"] == 0.5 for step in steps)
    # Another number is another run: going on from the folder of this one is refused.
    other = train(tmp_path, "algorithm.loss.params.scale=4", "algorithm.advantage.params.level=0.5")
    assert other.returncode == 2 and "algorithm.loss.params.scale: 3.0 -> 4.0" in other.stderr


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (
            "algorithm.loss.params.scal=3",
            "algorithm.loss.params.scal=3.0: times has no such parameter; did you mean scale?",
        ),
        ("algorithm.loss.params.scale=10", "algorithm.loss.params.scale=10.0: times allows 0 to 9 (default 2)"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, option, told):
    done = train(tmp_path, option)
    assert done.returncode == 2 and done.stderr == f"skyrl: error: {told}\n"
