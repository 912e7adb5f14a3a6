"""Timelines for Perfetto of a run that was made, and a profile of a step of a run that goes on."""

import json
from types import SimpleNamespace

import pytest
from loop import run_loop

from skyrl import cli
from skyrl.run_dir import PROFILE_REQUEST, RunReader
from skyrl.tracking import profiler
from skyrl.tracking.profiler import StepProfiler
from skyrl.tracking.trace import RequestLog, chrome_trace
from skyrl.types import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, of whose second step a profile was asked for while it went on."""
    folder = tmp_path_factory.mktemp("run")
    before, profiler.LOOK_SECONDS = profiler.LOOK_SECONDS, 0.0
    begin = StepProfiler.begin

    def ask(self, step):
        if step == 2:
            cli.COMMANDS["profile"]([str(folder)])
            with pytest.raises(UserError, match="asks for one already"):
                cli.COMMANDS["profile"]([str(folder)])
        begin(self, step)

    StepProfiler.begin = ask
    try:
        run_loop(folder, "batch.num_steps=3")
    finally:
        StepProfiler.begin, profiler.LOOK_SECONDS = begin, before
    return folder


def test_a_live_run_profiles_the_steps_that_were_asked_for(run):
    assert [path.name for path in (run / "profiles").iterdir()] == ["steps-000002-000002-rank-0.json"]
    names = {event.get("name") for event in json.loads(next((run / "profiles").iterdir()).read_text())["traceEvents"]}
    assert {"aten::add", "MulBackward0"} <= names  # of the update, forward and backward
    assert not (run / PROFILE_REQUEST).exists()


def test_trace_writes_the_spans_of_the_steps_asked_for(run, tmp_path, capsys):
    out = tmp_path / "t.json"
    cli.COMMANDS["trace"]([str(run), "--steps", "2:3", "-o", str(out)])
    assert f"wrote {out}: steps 2 to 3" in capsys.readouterr().out
    events = json.loads(out.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    steps = {event["name"]: event for event in spans if event["name"].startswith("step ")}
    assert list(steps) == ["step 2 (rl)", "step 3 (rl)"] and min(event["ts"] for event in spans) == 0
    line = RunReader(run).system(0)[3]
    (training,) = [event for event in spans if event["name"] == "training" and event["ts"] > steps["step 3 (rl)"]["ts"]]
    (told,) = [span for span in line["spans"] if span[0] == "training"]
    assert training["dur"] == pytest.approx(1e6 * (told[2] - told[1]), abs=1)
    for event in spans:  # all of a step lies within it
        assert any(
            s["ts"] <= event["ts"] and event["ts"] + event["dur"] <= s["ts"] + s["dur"] + 1 for s in steps.values()
        )
    assert {event["name"] for event in events if event["ph"] == "C"} >= {"cpu", "memory_gib"}


@pytest.mark.parametrize("steps", ["7:9", "x", "3", "3:2", "-1:2"])
def test_steps_that_are_not_there_are_refused(run, steps):
    with pytest.raises(UserError, match=rf"trace --steps {steps}: give A:B within 0:3"):
        cli.COMMANDS["trace"]([str(run), f"--steps={steps}"])


def test_what_cannot_be_asked_is_refused(run, tmp_path):
    for args, words in (
        ([str(run), "--steps", "0"], "give 1 to 100"),
        ([str(run), "--rank", "1"], "has rank 0 alone"),
        ([str(run)], "is not running"),
        ([str(tmp_path)], "is no run"),
    ):
        with pytest.raises(UserError, match=words):
            cli.COMMANDS["profile"](args)
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match=r"has no system/rank-\*.jsonl"):
        cli.COMMANDS["trace"]([str(tmp_path)])
    with pytest.raises(UserError, match="cannot be written"):
        cli.COMMANDS["trace"]([str(run), "-o", str(tmp_path / "no" / "t.json")])


def test_requests_that_are_no_requests_are_taken_away_and_other_ranks_leave_theirs(tmp_path, capsys):
    one, other = StepProfiler(tmp_path, 0), StepProfiler(tmp_path, 1)
    (tmp_path / PROFILE_REQUEST).write_text('{"rank": 1, "steps": 2}')
    one.begin(1)
    assert (tmp_path / PROFILE_REQUEST).exists()
    (tmp_path / PROFILE_REQUEST).write_text('{"rank": 1, "st')
    other.begin(1), StepProfiler(tmp_path, 0).begin(1)
    assert not (tmp_path / PROFILE_REQUEST).exists() and "no request for a profile" in capsys.readouterr().out


def test_requests_of_a_server_overlap_on_a_row_for_each_kind():
    log = RequestLog(0.0)
    train, optim = type("TrainRequest", (), {}), type("OptimStep", (), {})
    for session, kind, times in (
        ("a", train, (1.0, 2.0, 4.0)),
        ("a", train, (1.5, 4.0, 5.0)),
        ("a", optim, (3.0, 0.0, 6.0)),
        ("b", train, (0.0, 0.0, 1.0)),
    ):
        arrived, started, finished = times
        state = SimpleNamespace(state="done" if started else "failed")
        log.add(
            SimpleNamespace(
                session=session, request=kind(), arrived=arrived, started=started, finished=finished, outcome=state
            )
        )
    assert (
        log.values()["requests/TrainRequest/done:total"] == 2 and log.values()["requests/OptimStep/failed:total"] == 1
    )
    assert log.values()["requests/TrainRequest/seconds:total"] == 7.5
    events = log.trace("a")["traceEvents"]
    begins = [(event["name"], event["ts"]) for event in events if event["ph"] == "b"]
    assert ("TrainRequest waits", 0.0) in begins and ("TrainRequest runs", 1e6) in begins and len(begins) == 6
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"OptimStep", "TrainRequest"}
    assert log.trace("nobody")["traceEvents"] == [] and chrome_trace([])["traceEvents"] == []
