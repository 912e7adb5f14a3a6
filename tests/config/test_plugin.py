"""A user's own loss and advantage, each with a parameter of its own, from the command line to the numbers of a run;
and how libraries are imported."""

import gc
import sys

import pytest
from loop import LOOP
from small import SMALL

from skyrl.run_dir import read_metrics
from skyrl.trainers import importing_libraries

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


@pytest.fixture
def train(warm, tmp_path):
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    mine = ["plugins=[my_plugin]", "algorithm.loss.name=times", "algorithm.advantage.name=flat", "run.dir=run"]

    def run(*options: str):
        return warm.run(*SMALL, *LOOP, *mine, *options, cwd=tmp_path)

    return run


def test_parameters_of_a_plugin_reach_its_loss_and_advantage(train, tmp_path):
    done = train("algorithm.loss.params.scale=3", "algorithm.advantage.params.level=0.5")
    assert done.code == 0, done.stderr
    steps = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss/scale:mean" in record]
    assert len(steps) == 2
    assert all(step["loss/scale:mean"] == 3.0 and step["loss/level:mean"] == 0.5 for step in steps)
    # Another number is another run: going on from the folder of this one is refused.
    other = train("algorithm.loss.params.scale=4", "algorithm.advantage.params.level=0.5")
    assert other.code == 2 and "algorithm.loss.params.scale: 3.0 -> 4.0" in other.stderr


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
def test_a_mistake_is_one_line(train, option, told):
    done = train(option)
    assert done.code == 2 and done.stderr == f"skyrl: error: {told}\n"


def test_nothing_looks_for_garbage_while_libraries_are_imported(monkeypatch):
    """Also after an import that fails; and never in a process that has torch already, nor against a person's wish."""
    with importing_libraries():
        assert gc.isenabled() == ("torch" in sys.modules)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    frozen = gc.get_freeze_count()
    try:
        with pytest.raises(ImportError), importing_libraries():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() and gc.get_freeze_count() > frozen
        gc.disable()
        with importing_libraries():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
