"""Tracker: merging, spans, speeds, one exact line for each step, and cutting back on resume."""

import json
import math
import os
import subprocess
import sys
import time

import pytest

from skyrl.config.schema import BatchConfig, RunConfig, TrackingConfig
from skyrl.run_dir import read_metrics
from skyrl.tracking import Tracker, make_tracker
from skyrl.tracking.base import Sink, memory_metrics, speeds, without_wall_clock
from skyrl.tracking.jsonl import JsonlSink
from skyrl.types import UserError


class Keep(Sink):
    def __init__(self):
        self.records, self.begun, self.said = [], [], []

    def write(self, record):
        self.records.append(record)

    def begin(self, name):
        self.begun.append(name)

    def say(self, text):
        self.said.append(text)


def quiet(**options):
    return RunConfig(tracking=TrackingConfig(console="off", **options), batch=BatchConfig(num_steps=5))


def test_merging_by_the_end_of_the_key():
    tally = Tracker([Keep()])
    tally.add({"a:sum": 1, "a:mean": 1, "a:max": 1, "a:min": 1})
    tally.add({"a:sum": 2, "a:mean": 2, "a:max": 5, "a:min": -5})
    tally.add({"a:sum": 3, "a:mean": 6})
    merged = {key: value for key, value in tally.finish_step(1, "rl").items() if key.startswith("a:")}
    assert merged == {"a:sum": 6, "a:mean": 3, "a:max": 5, "a:min": -5}
    for key in ("a", "a:median", "sum"):
        with pytest.raises(ValueError, match="must end in one of :sum, :mean, :max, :min"):
            tally.add({key: 1.0})


def test_a_step_starts_empty_and_spans_add_up():
    sink = Keep()
    tracker = Tracker([sink])
    for _ in range(2):
        with tracker.span("collect"):
            time.sleep(0.02)
    with pytest.raises(KeyError), tracker.span("train"):
        raise KeyError
    tracker.add({"reward:mean": 0.5})
    metrics = tracker.finish_step(1, "rl")
    assert 0.04 <= metrics["time/collect_seconds:sum"] <= metrics["time/step_seconds:sum"] < 5
    assert "time/train_seconds:sum" in metrics
    tracker.finish_step(2, "rl")
    tracker.say("hello")
    assert sink.begun == ["collect", "collect", "train"] and sink.said == ["hello"]
    first, second = sink.records
    assert list(first)[:3] == ["step", "phase", "reward:mean"] and without_wall_clock(first)["reward:mean"] == 0.5
    assert without_wall_clock(second) == {"step": 2, "phase": "rl"}


def test_ranks_but_the_first_have_no_sinks_and_write_nothing(tmp_path):
    tracker = make_tracker(quiet(), tmp_path, 1)
    with tracker.span("collect"):
        tracker.add({"reward:mean": 1.0})
    assert tracker.finish_step(1, "rl") == {} and tracker.offset() == 0
    tracker.close()
    assert os.listdir(tmp_path) == []


def test_speeds_by_hand():
    metrics = {
        "trained_tokens:sum": 100.0,
        "sampled_tokens:sum": 60.0,
        "tokens:sum": 300.0,
        "flops/train:sum": 4e12,
        "flops/sample:sum": 2e12,
        "time/step_seconds:sum": 4.0,
        "time/collect_seconds:sum": 1.5,
        "time/train_seconds:sum": 2.0,
    }
    assert speeds(metrics, peak_flops=3e12) == {
        "speed/tokens_per_second:mean": 15.0,
        "speed/sampled_tokens_per_second:mean": 40.0,
        "speed/trained_tokens_per_second:mean": 150.0,
        "speed/mfu:mean": 0.5,
    }
    assert "speed/mfu:mean" not in speeds(metrics)
    assert speeds({"trained_tokens:sum": 8.0, "time/step_seconds:sum": 2.0}) == {"speed/tokens_per_second:mean": 4.0}
    assert speeds({"sampled_tokens:sum": 8.0, "time/step_seconds:sum": 0.0}) == {}


def test_floats_come_back_bit_for_bit_and_what_is_not_finite_as_itself(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    record = {"step": 1, "phase": "rl", "a:sum": 0.1 + 0.2, "b:mean": 5e-324, "c:max": math.inf, "d:min": -math.inf}
    sink.write({**record, "e:mean": math.nan})
    sink.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["e:mean"] == "nan"
    (back,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(back.pop("e:mean")) and back == record


def test_bad_lines_are_named_and_a_torn_last_one_is_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "phase": "rl"}\n{"step": 2, "phase": "rl"}\n{"st')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    path.write_text('{"step": 1, "phase": "rl"}\n{"st\n{"step": 3, "phase": "rl"}\n')
    with pytest.raises(UserError, match="line 2: not a record"):
        read_metrics(path)


def test_killed_and_resumed_run_has_each_step_once(tmp_path):
    """Steps 3 and 4 came after the checkpoint of step 2; the resumed run writes them again."""
    tracker = make_tracker(quiet(), tmp_path, 0)
    for step in range(1, 5):
        tracker.add({"reward:mean": step / 7})
        tracker.finish_step(step, "rl")
        if step == 2:
            offset = tracker.offset()
    whole = [without_wall_clock(record) for record in read_metrics(tmp_path / "metrics.jsonl")]
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 5, "ph')  # the kill
    tracker = make_tracker(quiet(), tmp_path, 0, resume_from=offset)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    for step in range(3, 5):
        tracker.add({"reward:mean": step / 7})
        tracker.finish_step(step, "rl")
    tracker.close()
    assert [without_wall_clock(record) for record in read_metrics(tmp_path / "metrics.jsonl")] == whole


def test_every_finished_step_survives_kill_nine(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from skyrl.tracking.jsonl import JsonlSink\n"
        "sink = JsonlSink(Path(sys.argv[1]))\n"
        "for step in range(100): sink.write({'step': step, 'phase': 'rl'})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "metrics.jsonl")], timeout=60)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(range(100))


def test_metrics_of_an_earlier_run_are_not_overwritten(tmp_path):
    tracker = make_tracker(quiet(), tmp_path, 0)
    tracker.finish_step(1, "rl")
    tracker.close()
    with pytest.raises(UserError, match="holds metrics of an earlier run; .*run.name"):
        make_tracker(quiet(), tmp_path, 0)
    make_tracker(quiet(), tmp_path, 0, resume_from=0).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_full_disk_is_one_line(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    os.symlink("/dev/full", tmp_path / "metrics.jsonl")
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="metrics.jsonl: cannot be written .No space left on device.; free") as caught:
        sink.write({"step": 1, "phase": "rl"})
    assert "\n" not in str(caught.value)


def test_memory_is_above_what_was_just_touched():
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert 1 / 16 < memory_metrics()["memory/peak_process_gib:max"] < 1024
