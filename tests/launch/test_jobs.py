"""wait, stop and gate: what a pipeline does with a run that somebody else started."""

import fcntl
import json
import threading
import time

import pytest

from skyrl.distributed.stop import INTERRUPTED, STOP_FILE, StopRequest, asked_by_file
from skyrl.launch import jobs
from skyrl.run_dir import mark_stop, run_state
from skyrl.types import UserError


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [{"step": 1, "phase": "rl", "eval/accuracy:mean": 0.5}, {"step": 2, "phase": "rl", "gap:max": "nan"}]
    lines.append({"step": 3, "phase": "rl", "eval/accuracy:mean": 0.9, "gap:mean": 0.25, "loss:sum": -2.0, "note": "x"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def finish(folder, state="finished"):
    (folder / "result.json").write_text(json.dumps({"state": state}))


class Live:
    """Holds the folder's lock, as a run does."""

    def __init__(self, folder):
        self.file = open(folder / "lock", "w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def end(self):
        self.file.close()


@pytest.mark.parametrize(
    ("conditions", "code"),
    [
        (["eval/accuracy>=0.9"], 0),
        (["eval/accuracy:mean > 0.9"], 1),
        (["loss<-1", "eval/accuracy<=0.9"], 0),
        (["loss<-1", "eval/accuracy<0.9"], 1),
        (["gap:max<1"], 1),  # NaN meets nothing
        (["gap:max>=0"], 1),
    ],
)
def test_gate_judges_the_last_values(run, conditions, code, capsys):
    finish(run)
    assert jobs.gate([str(run), *conditions]) == code
    assert ("FAILS" in capsys.readouterr().out) == (code == 1)
    assert jobs.gate([str(run), *conditions, "--json"]) == code
    told = json.loads(capsys.readouterr().out)
    assert told["passed"] == (code == 0) and len(told["conditions"]) == len(conditions)


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("eval/accuracy=0.9", "give a metric"),
        ("eval/accuracy>=high", "give a metric"),
        ("eval/accuracy>=nan", "give a metric"),
        ("eval/accuracy<1e400", "give a metric"),
        (">=1", "give a metric"),
        ("gap>1", "several; choose one of: gap:max, gap:mean"),
        ("eval/acuracy>1", "never logged it; did you mean eval/accuracy:mean"),
        ("phase>1", "never logged it"),
        ("note>1", "never logged it"),  # another tool's text among the numbers
    ],
)
def test_gate_refuses_what_it_cannot_judge(run, condition, words):
    finish(run)
    with pytest.raises(UserError, match=words):
        jobs.gate([str(run), condition])


def test_gate_does_not_pass_a_run_that_goes_on_or_was_lost(run):
    with pytest.raises(UserError, match="is unfinished; skyrl-tx wait"):
        jobs.gate([str(run), "eval/accuracy>=0.9"])
    live = Live(run)
    with pytest.raises(UserError, match="is running"):
        jobs.gate([str(run), "eval/accuracy>=0.9"])
    assert jobs.gate([str(run), "eval/accuracy>=0.9", "--unfinished"]) == 0
    live.end()


def test_wait_tells_how_a_run_ended(run, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(jobs, "LOST_SECONDS", 0.05)
    assert jobs.wait([str(run)]) == jobs.FAILS and "ended without a result" in capsys.readouterr().err
    (run / "requeue").write_text("{}")
    assert jobs.wait([str(run), "--stopped"]) == jobs.TEMPORARY
    assert jobs.wait([str(run), "--timeout", "0.05"]) == jobs.LATE  # it is to be started again
    live = Live(run)
    (run / "requeue").unlink()

    def later():
        time.sleep(0.1)
        finish(run)
        live.end()

    threading.Thread(target=later).start()
    assert jobs.wait([str(run)]) == jobs.HOLDS
    assert "running, step 3\n" in (told := capsys.readouterr().out) and told.endswith("finished, step 3\n")
    finish(run, "stopped")
    assert jobs.wait([str(run)]) == jobs.FAILS
    (run / "result.json").write_text('{"state": "stopped", "exit_code": null}')
    assert jobs.wait([str(run)]) == jobs.FAILS
    (run / "result.json").unlink()
    mark_stop(run, "SIGINT", StopRequest("SIGINT", 0, "training", 3).exit_code)
    assert jobs.wait([str(run), "--timeout", "60"]) == INTERRUPTED and run_state(run) == "stopped"
    assert "stopped, step 3\n" in capsys.readouterr().out
    assert jobs.wait([str(run.parent / "to come"), "--timeout", "0.05"]) == jobs.LATE


@pytest.mark.parametrize("seconds", ["0", "0.0", "-1", "nan", "inf"])
def test_seconds_that_never_pass_are_refused(run, seconds):
    for command in (jobs.wait, jobs.stop):
        with pytest.raises(UserError, match="--timeout: give seconds above 0, not '"):
            command([str(run), f"--timeout={seconds}"])


@pytest.mark.parametrize(("flags", "reason", "code"), [([], "skyrl-tx stop", 130), (["--requeue"], "stop file", 75)])
def test_stop_asks_through_the_run_folder(run, flags, reason, code, monkeypatch):
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.01)
    with pytest.raises(UserError, match="is unfinished: no process"):
        jobs.stop([str(run), *flags])
    assert not (run / STOP_FILE).exists()
    live = Live(run)
    assert jobs.stop([str(run), *flags, "--wait", "--timeout", "0.05"]) == jobs.LATE
    assert StopRequest(asked_by_file(run / STOP_FILE), 0, "", 0).exit_code == code
    assert asked_by_file(run / STOP_FILE) == reason
    live.end()


def test_only_a_run_is_stopped_or_judged(tmp_path):
    for command in (jobs.stop, lambda args: jobs.gate([*args, "a>1"])):
        with pytest.raises(UserError, match="no run folder"):
            command([str(tmp_path / "none")])
        with pytest.raises(UserError, match="is no run"):
            command([str(tmp_path)])
