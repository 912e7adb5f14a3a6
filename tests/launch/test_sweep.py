"""A run's result, points that are done, and why a job is or is not queued again."""

import json
import subprocess

import pytest
from loop import loop_config

from skyrl import sweep
from skyrl.run_dir import read_result
from skyrl.types import RunError, StopRun


def test_a_point_that_is_done_is_not_run_again(tmp_path, capsys, monkeypatch):
    cfg = loop_config(tmp_path / "run")
    accuracy = sweep.play(cfg, "train", sweep=True)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["accuracy"] == accuracy == sweep.final_values(tmp_path / "run" / "metrics.jsonl")[sweep.OBJECTIVE]
    before = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    monkeypatch.setattr("skyrl.trainers.rl.train", lambda cfg: pytest.fail("was run again"))
    assert sweep.play(cfg, "train", sweep=True) == accuracy
    assert f"done already, accuracy {accuracy:.4f}" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == before


def test_other_options_or_more_steps_are_another_point(tmp_path):
    cfg = loop_config(tmp_path / "run")
    digests = {
        sweep.point_digest(loop_config(tmp_path / "run", *more))
        for more in ([], ["batch.num_steps=3"], ["optim.lr=1e-3"], ["seed=5"])
    }
    assert len(digests) == 4
    assert sweep.point_digest(cfg) == sweep.point_digest(loop_config(tmp_path / "elsewhere", "run.threads=3"))


@pytest.mark.parametrize("text", ["", "[]", '{"digest": 1'])
def test_a_result_that_cannot_be_read_is_none(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    assert read_result(tmp_path) is None and sweep.run_state(tmp_path) == "unfinished"


def test_sweeps_that_run_elsewhere_keep_their_files_on_the_shared_disk(tmp_path):
    assert sweep.sweep_folder(["seed=1,2"]) is None
    assert (
        sweep.sweep_folder(["hydra/launcher=slurm"]) == "runs/.sweeps" == sweep.sweep_folder(["hydra/sweeper=accuracy"])
    )
    assert sweep.best_of(str(tmp_path)) == ""
    (tmp_path / "optimization_results.yaml").write_text(
        "name: optuna\nbest_params:\n  optim.lr: 0.01\nbest_value: 0.5\n"
    )
    assert sweep.best_of(str(tmp_path)) == "best point: optim.lr=0.01 (accuracy 0.5000)"
    assert sweep.best_of(str(tmp_path)) == ""


def test_what_travels_back_to_the_sweep(monkeypatch):
    for name in ("SLURM_JOB_ID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RunError, match="a point of the sweep failed: no such thing"):
        sweep.leave(ValueError("no such\nthing"), 1)
    with pytest.raises(RunError, match="stopped; not queued again: this is no Slurm job; the same sweep goes on"):
        sweep.leave(StopRun("stopped"), 75)


def slurm(state, asked, code=0):
    """Answers of scontrol; the real one is asked in tests/slurm."""

    def ask(command, **kwargs):
        asked.append(command[1])
        out = f"JobId=7 JobState={state} Reason=None " if command[1] == "show" else ""
        return subprocess.CompletedProcess(command, code, out, "slurm_requeue error")

    return ask


def test_only_a_job_that_still_runs_is_queued_again():
    env, asked = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}, []
    assert sweep.requeue(5, env, slurm("RUNNING", asked)) == "" and asked == ["show", "requeue"]
    assert sweep.requeue(5, env, slurm("COMPLETING", asked)) == "job 7 was cancelled"
    assert sweep.requeue(2, env, slurm("RUNNING", asked)) == "it was 2 times already (SKYRL_MAX_REQUEUES)"
    assert sweep.requeue(5, env, slurm("RUNNING", asked, code=1)) == "slurm_requeue error"
    assert sweep.requeue(5, {}, slurm("RUNNING", asked)) == "this is no Slurm job"
