"""A run survives kill -9 at any moment, and another number of ranks, without any trace in its numbers."""

import math
import shutil

import pytest
from launcher import LETTERS, draw, lines_in, when

from skyrl.run_dir import read_metrics, read_rollouts
from skyrl.tracking.base import without_wall_clock

pytestmark = pytest.mark.ranks
STEPS = [("warmup", n) for n in range(1, 5)] + [("rl", n) for n in range(5, 11)]
# How the work was spread, and what only one rank can see of it.
LAYOUT = ("sampler/", "microbatches", "padding", "flops/")
# Writing a checkpoint takes half a second more, so that a kill can fall into it.
SLOW_SAVE = """
import time, skyrl.checkpoint.checkpointer as c
real = c.publish
c.publish = lambda *args: (time.sleep(0.5), real(*args))[1]
"""


def records(run):
    return [without_wall_clock(record) for record in read_metrics(run / "metrics.jsonl")]


def test_a_deterministic_run_gives_the_same_bits_again(warm, whole, tmp_path):
    done = warm.run(*LETTERS, "run.dir=run", cwd=tmp_path, ranks=2)
    assert done.code == 0, done.stderr
    ours, theirs = records(tmp_path / "run"), records(whole)
    assert [(r["phase"], r["step"]) for r in theirs] == STEPS
    assert ours == theirs
    assert len({r["reward:mean"] for r in theirs if r["phase"] == "rl"}) > 2 and theirs[-1]["grad_norm:mean"] > 0


def killed_and_resumed(warm, whole, tmp_path, kills, before=""):
    """One kill after another, each in a new start of the same command, then a start that may finish."""
    run = tmp_path / "run"
    for kill in kills:
        done = warm.run(*LETTERS, "run.dir=run", cwd=tmp_path, ranks=2, kill=kill, before=before)
        assert done.code == -9
    done = warm.run(*LETTERS, "run.dir=run", cwd=tmp_path, ranks=2)
    assert done.code == 0, done.stderr
    assert records(run) == records(whole)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["000002", "000004", "000006", "000008", "000010"]
    for name in ("000005", "000010", "eval-000010"):
        assert list(read_rollouts(run / "rollouts", name)) == list(read_rollouts(whole / "rollouts", name))


def at_random(seed, run):
    random = draw(seed)
    after = sorted(random.sample(range(10), 2))
    return [when(lambda n=n: lines_in(run / "metrics.jsonl") > n, delay=random.random() * 0.05) for n in after]


@pytest.mark.parametrize("seed", [0, 1])
def test_kill_at_random_steps(warm, whole, tmp_path, seed):
    killed_and_resumed(warm, whole, tmp_path, at_random(seed, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 14))
def test_kill_at_more_random_steps(warm, whole, tmp_path, seed):
    killed_and_resumed(warm, whole, tmp_path, at_random(seed, tmp_path / "run"))


@pytest.mark.parametrize("tag", ["000004", "000008"])
def test_kill_during_a_save(warm, whole, tmp_path, tag):
    folder = tmp_path / "run" / "checkpoints"
    writing = when(lambda: any(folder.glob(f"{tag}.tmp-*/*.distcp")), delay=0.1)
    killed_and_resumed(warm, whole, tmp_path, [writing], before=SLOW_SAVE)


def test_kill_right_after_a_save_and_before_the_first(warm, whole, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    started = when(lambda: lines_in(tmp_path / "run" / "metrics.jsonl") > 0)
    killed_and_resumed(warm, whole, tmp_path, [started, when(lambda: (folder / "000006").exists())])


def test_saves_in_the_background_never_leave_more_than_an_interval_unsaved(warm, whole, tmp_path):
    """When checkpoint n is complete no later step counts as done, however slow the disk; sampling went on meanwhile."""
    watched = """
import pathlib, time, skyrl.checkpoint.checkpointer as c, skyrl.trainers.rl as t
publish, generate, played = c.publish, t.generate_groups, []
t.train_rl.__defaults__ = (lambda run, step: (generate(run, step), played.append(run.state.global_step))[0],)
def slow(folder, tmp, manifest):
    time.sleep(0.5)
    steps = len(pathlib.Path("run/metrics.jsonl").read_text().splitlines())
    print(f"seen {int(manifest['tag'])} {steps} {played[-1] if played else 0}", flush=True)
    return publish(folder, tmp, manifest)
c.publish = slow
"""
    done = warm.run(*LETTERS, "run.dir=run", cwd=tmp_path, ranks=2, before=watched)
    assert done.code == 0, done.stderr
    seen = [tuple(map(int, line.split()[1:])) for line in done.stdout.splitlines() if line.startswith("seen ")]
    assert [(tag, steps) for tag, steps, _ in seen] == [(n, n) for n in (2, 4, 6, 8, 10)]
    assert [played for *_, played in seen[2:4]] == [6, 8]  # the next step had been sampled by then
    assert records(tmp_path / "run") == records(whole)


def close(ours, theirs, tolerance=1e-5):
    """Equal but for rounding; the keys too."""
    assert [(r["phase"], r["step"]) for r in ours] == [(r["phase"], r["step"]) for r in theirs]
    for our, their in zip(ours, theirs, strict=True):
        keys = {key for key in their if not key.startswith(LAYOUT)}
        assert keys == {key for key in our if not key.startswith(LAYOUT)}
        for key in keys - {"phase"}:
            assert math.isclose(our[key], their[key], rel_tol=tolerance, abs_tol=tolerance), (their["step"], key)


def played(run, tag):
    """What was drawn in a step, whoever drew it."""
    rows = read_rollouts(run / "rollouts", tag)
    return sorted((row["uid"], row["index"], row["turns"][0]["tokens"], row["reward"]) for row in rows)


@pytest.mark.parametrize(("ranks", "options"), [(1, []), (4, []), (2, ["strategy.name=fsdp"])])
def test_resume_on_other_ranks_and_strategies(warm, whole, cut, tmp_path, ranks, options):
    run = cut("000006")
    done = warm.run(*LETTERS, "run.dir=run", *options, cwd=tmp_path, ranks=ranks)
    assert done.code == 0 and "resuming from run/checkpoints/000006: rl step 6" in done.stdout, done.stderr
    close(records(run), records(whole))
    for tag in ("000007", "000009", "000010"):
        assert played(run, tag) == played(whole, tag)
    if options:  # and back
        for later in ("000009", "000010"):
            shutil.rmtree(run / "checkpoints" / later, ignore_errors=True)
        done = warm.run(*LETTERS, "run.dir=run", cwd=tmp_path, ranks=2)
        assert done.code == 0 and "000008: rl step 8" in done.stdout, done.stderr
        close(records(run), records(whole))
