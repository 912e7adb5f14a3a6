"""Sweeps whose points are Slurm jobs, through submitit."""

import json
import subprocess
import sys

import pytest
from jobs import RUN, command, environment, numbers, queued, steps, stops, until

pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install 'skyrl-spmd[sweep]'")
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
TRAIN = ("python", "-m", "skyrl.train")


def runs(place):
    return sorted(path.parent for path in (place / "runs").glob("*/metrics.jsonl"))


def test_a_stopped_point_goes_on_in_its_place_in_the_array(tmp_path):
    sweep = ["-m", "hydra/launcher=slurm", "hydra.launcher.timeout_min=20", "seed=1,2"]
    options = [*RUN, "env.options.sleep=0.05"]
    process = subprocess.Popen(
        [sys.executable, *TRAIN[1:], *options, *sweep],
        cwd=tmp_path,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        until(lambda: len(runs(tmp_path)) == 2 and min(map(steps, runs(tmp_path))) >= 4, 200)
        (array,) = {number.split("_")[0] for number in queued(tmp_path)}
        assert command("scancel", "--signal=USR1", f"{array}_1", cwd=tmp_path).returncode == 0
        out, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, out
    one, two = runs(tmp_path)
    assert [len(stops(one)), len(stops(two))] == [0, 1] and steps(two) == 10
    assert all(json.loads((run / "result.json").read_text())["accuracy"] is not None for run in (one, two))

    alone = tmp_path / "alone"
    alone.mkdir()
    done = command(*TRAIN, *options, "-m", "seed=2", cwd=alone, timeout=120)
    assert done.returncode == 0, done.stderr
    assert numbers(two) == numbers(runs(alone)[0]) and two.name == runs(alone)[0].name

    again = command(*TRAIN, *options, "-m", "seed=1,2", cwd=tmp_path)  # wherever it runs, it finds its points
    assert again.returncode == 0 and again.stdout.count("done already, accuracy") == 2


def test_a_point_of_two_ranks_over_two_nodes(tmp_path):
    sweep = ["-m", "hydra/launcher=slurm", "hydra.launcher.nodes=2", "hydra.launcher.timeout_min=20", "seed=1"]
    done = command(*TRAIN, *RUN, *sweep, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = runs(tmp_path)
    assert len(numbers(run)[1]) == 2 and steps(run) == 10  # a part of the checkpoint from each rank


def test_a_point_that_fails_is_told_where_the_sweep_runs(tmp_path):
    sweep = ["-m", "hydra/launcher=slurm", "hydra.launcher.timeout_min=20", "env.options.trouble=raise,''"]
    done = command(*TRAIN, *RUN, *sweep, cwd=tmp_path, timeout=300)
    told = [line for line in done.stderr.splitlines() if line.startswith("skyrl: error:")]
    assert done.returncode == 1 and len(told) == 1 and "a point of the sweep failed" in told[0], done.stderr
    assert "no such answer" in told[0]
    assert sum((run / "result.json").exists() for run in runs(tmp_path)) == 1  # the other one is done


def test_optuna_looks_for_the_best_accuracy_in_jobs(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install 'skyrl-spmd[sweep]'")
    sweep = [
        "-m",
        "hydra/launcher=slurm",
        "hydra/sweeper=accuracy",
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.n_jobs=2",
    ]
    space = "optim.beta1=interval(0.5,0.95)"
    done = command(*TRAIN, *RUN, *sweep, space, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    best = {json.loads((run / "result.json").read_text())["accuracy"] for run in runs(tmp_path)}
    assert len(runs(tmp_path)) == 3 and f"(accuracy {max(best):.4f})" in done.stdout
    assert "best point: optim.beta1=0." in done.stdout
    again = command(
        *TRAIN,
        *RUN,
        "-m",
        "hydra/sweeper=accuracy",
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.n_jobs=2",
        space,
        cwd=tmp_path,
    )
    assert again.stdout.count("done already") == 3  # the same seed asks for the same points
