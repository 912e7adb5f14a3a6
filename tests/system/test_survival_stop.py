"""A run that is asked to stop leaves within seconds, with all saved, and goes on without a trace in its numbers."""

import json
import signal

import pytest
from launcher import LETTERS, lines_in, when

from skyrl.checkpoint.folder import list_checkpoints
from skyrl.launch import jobs
from skyrl.run_dir import read_metrics
from skyrl.tracking.base import without_wall_clock

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
        ("generation", 7, signal.SIGUSR1, [1]),
        ("generation", 5, signal.SIGTERM, [0, 1]),
        ("training", 7, signal.SIGUSR1, [0]),
        ("evaluation", 8, signal.SIGTERM, [1]),
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
    assert newest.tag == stop["checkpoint"] and newest.state["global_step"] == stop["done"]
    assert lines_in(run / "metrics.jsonl") == stop["done"] - newest.state["unrecorded"]
    if phase == "generation":  # left in the middle: nothing was played to its end
        assert not list((run / "rollouts").glob(f"{stop['done'] + 1:06d}-*"))
    if phase == "evaluation":  # learned, but not yet evaluated and recorded
        assert newest.state["unrecorded"] and newest.state["pending"]
    finishes_like(warm, whole, tmp_path)


def test_a_signal_while_the_model_is_loaded(warm, tmp_path):
    there = when(lambda: all((tmp_path / f"in-{rank}").exists() for rank in (0, 1)))
    before = pace("opening", 0, "100")
    done = warm.run(*RUN, cwd=tmp_path, ranks=2, kill=there, only=[1], number=signal.SIGUSR1, before=before)
    assert done.code == LEFT and done.seconds < 60
    assert done.stderr == "skyrl: stopped by SIGUSR1 while opening; the same command starts again\n"
    assert (tmp_path / "run" / "requeue").exists() and not list_checkpoints(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize("how", ["deadline", "stop file", pytest.param("skyrl-tx stop", marks=pytest.mark.slow)])
def test_the_clock_and_a_file_stop_a_run_too(warm, whole, tmp_path, how):
    run = tmp_path / "run"
    clock = ["run.must_save_by=+7", "run.save_margin_seconds=3"] if how == "deadline" else []

    def touch():
        if how != "deadline" and (tmp_path / "in-1").exists():
            (tmp_path / "in-1").unlink()
            (run / "stop").touch() if how == "stop file" else jobs.stop([str(run)])
        return False

    done = warm.run(*RUN, *clock, cwd=tmp_path, ranks=2, kill=touch, before=pace("generation", 7, "3"))
    assert done.code == (INTERRUPTED if how == "skyrl-tx stop" else LEFT), done.stderr
    (stop,) = stops(run)
    assert stop["reason"] == how and not (run / "stop").exists()
    assert (run / "requeue").exists() == (done.code == LEFT)
    finishes_like(warm, whole, tmp_path)


@pytest.mark.slow
def test_slurms_end_of_the_job_is_a_deadline(warm, tmp_path):
    end = "import os, time; os.environ['SLURM_JOB_END_TIME'] = str(int(time.time()) + 30)"
    done = warm.run(*RUN, cwd=tmp_path, before=end)
    assert done.code == 2 and len(done.errors) == 1
    assert "SLURM_JOB_END_TIME: " in done.errors[0]
    assert " s from now, of which run.save_margin_seconds=120 are kept" in done.errors[0]
    later = f"{end}; os.environ['TORCHELASTIC_RESTART_COUNT'] = '1'"  # near the end of the job torchrun starts again
    assert warm.run(*RUN, cwd=tmp_path, before=later).code == LEFT
    done = warm.run(*RUN, "run.save_margin_seconds=20", cwd=tmp_path, before=f"{end}; {pace('training', 6, '15')}")
    assert done.code == LEFT and stops(tmp_path / "run")[0]["reason"] == "deadline"


@pytest.mark.slow
def test_ctrl_c_saves_and_a_second_one_ends_at_once(warm, whole, tmp_path):
    there = (tmp_path / "in-0").exists
    one = {"cwd": tmp_path, "number": signal.SIGINT}
    done = warm.run(*RUN, **one, kill=when(there), before=pace("generation", 7, "0.5"))
    assert done.code == INTERRUPTED and "skyrl: interrupted: stops with a save; once more ends at once" in done.stderr
    assert stops(tmp_path / "run")[0]["reason"] == "SIGINT" and not (tmp_path / "run" / "requeue").exists()
    (tmp_path / "in-0").unlink()
    # the second comes while the main thread is in a call that takes long
    twice = "import os, signal, threading as t; t.Timer(9, lambda: os.kill(os.getpid(), signal.SIGINT)).start(); "
    done = warm.run(*RUN, **one, kill=when(there), before=twice + pace("training", 9, "35"))
    assert done.code == INTERRUPTED and done.seconds < 20
    assert done.errors == ["skyrl: error: interrupted; the same command goes on from the last checkpoint"]
    done = warm.run(*RUN, cwd=tmp_path)
    assert done.code == 0 and lines_in(tmp_path / "run" / "metrics.jsonl") == 10
