"""A run that is asked to stop leaves within seconds, with all saved, and goes on without a trace in its numbers."""

import json
import signal

import pytest
from launcher import LETTERS, lines_in, when

from skyrl.checkpoint_folder import list_checkpoints
from skyrl.tracking.base import without_wall_clock
from skyrl.tracking.jsonl import read_metrics

pytestmark = pytest.mark.ranks
RUN = [*LETTERS, "run.dir=run", "plugins=[letters,pace]"]
LEFT, INTERRUPTED = 75, 130


def records(run):
    return [without_wall_clock(record) for record in read_metrics(run / "metrics.jsonl")]


def pace(phase, step, what="0.7", rank=None):
    """What each rank runs first: makes that phase long (tests/system/plugins/pace.py)."""
    lines = f"import os; os.environ['SKYRL_PACE'] = '{phase}:{step}:{what}'"
    return lines + (f"; os.environ['SKYRL_PACE_RANK'] = '{rank}'" if rank is not None else "")


def stops(run):
    return [json.loads(line) for line in (run / "stops.jsonl").read_text().splitlines()]


def finishes_like(warm, whole, tmp_path, ranks=2):
    """Starts the command again and holds its numbers against those of the uninterrupted run, bit for bit."""
    done = warm.run(*RUN, cwd=tmp_path, ranks=ranks)
    assert done.code == 0, done.stderr
    assert records(tmp_path / "run") == records(whole)
    assert not (tmp_path / "run" / "requeue").exists()


@pytest.mark.parametrize(
    ("phase", "step", "number", "only"),
    [
        ("warm-up", 3, signal.SIGTERM, [1]),
        ("generation", 3, signal.SIGUSR1, [1]),
        ("generation", 1, signal.SIGTERM, [0, 1]),
        ("training", 3, signal.SIGUSR1, [0]),
        ("evaluation", 4, signal.SIGTERM, [1]),
        ("saving", 2, signal.SIGTERM, [0, 1]),
    ],
)
def test_a_signal_in_each_phase(warm, whole, tmp_path, phase, step, number, only):
    run = tmp_path / "run"
    there = when(lambda: all((tmp_path / f"in-{rank}").exists() for rank in ((0,) if phase == "saving" else (0, 1))))
    done = warm.run(*RUN, cwd=tmp_path, ranks=2, kill=there, only=only, number=number, before=pace(phase, step))
    assert done.code == LEFT, done.stderr
    assert done.errors == [] and f"stopped by {signal.Signals(number).name} on rank" in done.stdout
    (stop,) = stops(run)
    assert stop["reason"] == signal.Signals(number).name and stop["rank"] in only and stop["seconds"] < 10
    assert (stop["phase"] == phase or phase == "saving") and (run / "requeue").exists()
    newest = list_checkpoints(run / "checkpoints")[-1]
    assert newest.tag == stop["checkpoint"] and newest.state["done"] == stop["done"]
    assert lines_in(run / "metrics.jsonl") == stop["done"] - newest.state["half"]
    if phase == "generation":  # left in the middle: nothing was played to its end
        assert not list((run / "rollouts").glob(f"{stop['done'] + 1:06d}-*"))
    if phase == "evaluation":  # learned, but not yet evaluated and recorded
        assert newest.state["half"] and newest.state["pending"]
    finishes_like(warm, whole, tmp_path)
