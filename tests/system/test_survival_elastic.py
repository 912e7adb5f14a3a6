"""A stopped run goes on with other ranks: data position, refilled batches and the adaptive KL coefficient included."""

import json
import math
import signal

import pytest
from launcher import LETTERS, when

from skyrl.checkpoint.folder import list_checkpoints
from skyrl.run_dir import read_metrics, read_rollouts

pytestmark = pytest.mark.ranks
# Two samples of a group are equal often enough that most steps are refilled.
RUN = [*LETTERS, "run.dir=run", "plugins=[letters,pace]", "batch.samples_per_prompt=2", "sampler.max_new_tokens=3"]
RUN += [f"algorithm.filters.{option}" for option in ("zero_variance=true", "refill=true", "max_refill_rounds=4")]
RUN += ["algorithm.kl.coef=0.1", "algorithm.kl.target=0.05", "algorithm.kl.horizon=100"]
LAYOUT = ("sampler/", "microbatches", "padding", "flops/", "time/", "speed/", "memory/")


def pace(phase, step, what="0.5"):
    return f"import os; os.environ['SKYRL_PACE'] = '{phase}:{step}:{what}'"


@pytest.fixture(scope="module")
def straight(warm, tmp_path_factory):
    place = tmp_path_factory.mktemp("straight")
    done = warm.run(*RUN, cwd=place, ranks=2)
    assert done.code == 0, done.stderr
    return place / "run"


def played(run, tag):
    rows = read_rollouts(run / "rollouts", tag)
    return sorted((row["uid"], row["index"], row["turns"][0]["tokens"], row["reward"]) for row in rows)


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 3)])
def test_a_stop_between_refills_goes_on_with_other_ranks(warm, straight, tmp_path, first, second):
    run = tmp_path / "run"
    there = when((tmp_path / "in-0").exists, delay=0.2)
    one = {"cwd": tmp_path, "kill": there, "only": [0], "number": signal.SIGUSR1}
    assert warm.run(*RUN, **one, ranks=first, before=pace("generation", 8)).code == 75
    done = warm.run(*RUN, cwd=tmp_path, ranks=second)
    assert done.code == 0 and "rl step 7" in done.stdout, done.stderr
    ours, theirs = read_metrics(run / "metrics.jsonl"), read_metrics(straight / "metrics.jsonl")
    assert [(r["phase"], r["step"]) for r in ours] == [(r["phase"], r["step"]) for r in theirs]
    for our, their in zip(ours, theirs, strict=True):
        for key in (key for key in their if not key.startswith(LAYOUT) and key != "phase"):
            assert math.isclose(our[key], their[key], rel_tol=1e-5, abs_tol=1e-5), (their["step"], key)
    drawn = [len(played(run, f"{4 + step:06d}")) for step in range(1, 7)]
    assert max(drawn) > 8, "no step was refilled: the test shows less than it says"
    for step in range(1, 7):
        assert played(run, f"{4 + step:06d}") == played(straight, f"{4 + step:06d}")
    states = [list_checkpoints(folder / "checkpoints")[-1].state for folder in (run, straight)]
    assert states[0]["position"] == states[1]["position"] > 24
    assert math.isclose(states[0]["kl"]["coef"], states[1]["kl"]["coef"], rel_tol=1e-5)
    assert states[1]["kl"]["coef"] != 0.1 and json.loads((run / "stops.jsonl").read_text())["phase"] == "generation"
