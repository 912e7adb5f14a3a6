"""A rank that hangs, is stopped, raises or is lost ends the job soon, named with its phase and its stack."""

import json
import signal
import time

import pytest
from launcher import LETTERS, when

pytestmark = pytest.mark.ranks
# The first of each phase may take ten times as long; an environment's call 6.5 s.
RUN = [*LETTERS, "run.dir=run", "plugins=[letters,pace]", "run.hang_seconds=3", "env.timeout_seconds=0.5"]


def pace(phase, step, what, rank):
    setting = f"os.environ['SKYRL_PACE'] = '{phase}:{step}:{what}'"
    return f"import os; {setting}; os.environ['SKYRL_PACE_RANK'] = '{rank}'"


def ended(done, tmp_path, words, phases):
    """One line with these words, exit code 1, and a crash bundle in which rank 1 and rank 0 are in these phases."""
    assert done.code in (1, -9), done.stderr  # a process that is stopped has to be killed
    (line,) = done.errors
    for word in words:
        assert word in line, line
    (bundle,) = (tmp_path / "run").glob("crash-*")
    assert f"run/{bundle.name}" in line
    table = json.loads((bundle / "phases.json").read_text())
    assert {rank: table[rank]["phase"] for rank in phases} == phases
    assert {"report.txt", "phases.json", "config.yaml", "metrics.jsonl", "environment.json", "stacks"} == {
        path.name for path in bundle.iterdir()
    }
    assert (bundle / "metrics.jsonl").read_text().splitlines()[0].startswith('{"step": 1, "phase": "warmup"')
    assert any(one.startswith("torch==") for one in json.loads((bundle / "environment.json").read_text())["packages"])
    return bundle, table


@pytest.mark.parametrize(
    ("phase", "step", "rank", "patience"),
    [pytest.param("generation", 7, 1, 6.5, marks=pytest.mark.slow), ("training", 7, 0, 3)],
)
def test_a_rank_that_hangs_is_named_with_its_stack(warm, tmp_path, phase, step, rank, patience):
    done = warm.run(*RUN, cwd=tmp_path, ranks=2, before=pace(phase, step, "hang", rank))
    words = [
        f"rank {rank} (process ",
        "makes no progress (for ",
        f"it was in {phase}, step {step}",
        "other ranks wait in ",
    ]
    bundle, table = ended(done, tmp_path, words, {str(rank): phase})
    assert patience <= table[str(rank)]["seconds_without_progress"] < patience + 4
    last = done.stderr.splitlines()[-3:]
    assert "pace.py" in last[-2] and "time.sleep(3600)" in last[-1]  # what is read first is the culprit's stack
    assert "time.sleep(3600)" in (bundle / "stacks" / f"rank-{rank}.txt").read_text()
    assert "all_" in (bundle / "stacks" / f"rank-{1 - rank}.txt").read_text()


def test_a_process_that_is_stopped_is_named(warm, tmp_path):
    there = when((tmp_path / "in-1").exists, delay=0.4)
    done = warm.run(
        *RUN, cwd=tmp_path, ranks=2, kill=there, only=[1], number=signal.SIGSTOP, before=pace("training", 7, "1", 1)
    )
    words = [
        "rank 1 (process ",
        "does not answer any more (for",
        "it was in training, step 7",
        "its process is stopped (SIGSTOP)",
    ]
    ended(done, tmp_path, words, {"1": "training", "0": "training"})


def test_collectives_that_do_not_fit_are_a_deadlock(warm, tmp_path):
    done = warm.run(*RUN, cwd=tmp_path, ranks=2, before=pace("training", 7, "apart", 1))
    words = ["waits, as all ranks do, in a collective that the others are not in", "it was in training, step 7"]
    ended(done, tmp_path, words, {"1": "training", "0": "training"})


@pytest.mark.slow
def test_a_slow_rank_is_no_hang(warm, tmp_path):
    """Rank 1 plays for longer than any patience, but plays; rank 0 waits for it."""
    slow = pace("generation", 7, "2", 1)
    done = warm.run(*RUN[:-2], "run.hang_seconds=1", "env.timeout_seconds=0.2", cwd=tmp_path, ranks=2, before=slow)
    assert done.code == 0 and done.stderr == "", done.stderr
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps[6]["time/collect_seconds:sum"] > 7


@pytest.mark.parametrize(
    ("what", "word"),
    [
        ("raise", "something nobody thought of"),
        pytest.param("memory", "out of memory", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_raises(warm, tmp_path, what, word):
    done = warm.run(*RUN, cwd=tmp_path, ranks=2, before=pace("training", 7, what, 1))
    bundle, table = ended(done, tmp_path, ["rank 1"], {"1": "training"})
    assert "rank 1 in training, step 7" in (bundle / "report.txt").read_text()
    assert word in (bundle / "report.txt").read_text() and table["0"]["process"] != table["1"]["process"]
    if what == "raise":
        assert "failed in training, step 7" in done.errors[0]
        assert done.stderr.splitlines()[-1] == "AssertionError: something nobody thought of"
    else:
        assert word in done.errors[0]


@pytest.mark.parametrize("victim", [1, 0])
def test_a_rank_that_is_killed(warm, tmp_path, victim):
    """Also rank 0, with which the store goes when there is no torchrun."""
    there = when((tmp_path / f"in-{victim}").exists, delay=0.4)
    start = time.monotonic()
    done = warm.run(*RUN, cwd=tmp_path, ranks=2, kill=there, only=[victim], before=pace("training", 7, "1", victim))
    assert len(done.errors) == 1 and f"rank {victim} (process " in done.errors[0], done.stderr
    assert "ended without a message" in done.errors[0] and time.monotonic() - start < 60
    (bundle,) = (tmp_path / "run").glob("crash-*")
    if victim == 1:
        assert "ended without a message (rank 1 was in training, step 7)" in done.errors[0]
        assert json.loads((bundle / "phases.json").read_text())["1"]["phase"] == "training"
    else:
        assert "no word from the other ranks" in (bundle / "report.txt").read_text()
