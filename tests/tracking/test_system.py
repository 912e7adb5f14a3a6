"""system/rank-<n>.jsonl: what a rank and its machine did in each step, of real runs, and on a machine with a GPU that
stands in for one."""

import json
import os
import sys
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from loop import run_loop

from skyrl.config.schema import RunConfig, TrackingConfig
from skyrl.run_dir import RunReader
from skyrl.tracking import make_tracker, system
from skyrl.tracking.advisories import warn_fallback
from skyrl.tracking.system import SystemRecorder


@pytest.mark.slow
@pytest.mark.ranks
def test_a_run_of_two_ranks_keeps_a_line_for_each_step_and_rank_and_goes_on_where_it_stopped(tmp_path):
    begin = time.time()
    seen = run_loop(tmp_path, "checkpoint.every_steps=1", size=2)
    reader = RunReader(tmp_path)
    assert reader.system_ranks() == [0, 1] and len(reader.system()) == 2 * len(seen.records)
    for rank in (0, 1):
        lines = reader.system(rank)
        assert [(one["step"], one["phase"]) for one in lines] == [(one["step"], one["phase"]) for one in seen.records]
        for one in lines[1:]:
            assert begin < one["time"] < time.time() and one["rank"] == rank
            spans = {name: (start, end) for name, start, end in one["spans"]}
            assert {"generation", "rollout", "training", "forward_backward", "optim_step"} <= set(spans)
            assert spans["training"][0] <= spans["forward_backward"][0] <= spans["forward_backward"][1]
            assert all(begin < start <= end <= one["time"] for start, end in spans.values())
            assert one["collective_bytes"] > 4 * 18_000  # the gradient of the small model, and what ranks agree on
            assert one["cpu"] >= 0 and 0 < one["memory_gib"] < one["host_memory_gib"] and "gpus" not in one
    with open(tmp_path / "system" / "rank-0.jsonl", "ab") as stream:
        stream.write(json.dumps({"step": 3, "phase": "rl"}).encode() + b'\n{"step": 4, "ph')  # died behind a checkpoint
    assert [one["step"] for one in reader.system(0)] == [one["step"] for one in seen.records] + [3]
    run_loop(tmp_path, "checkpoint.every_steps=1", "batch.num_steps=3")  # on one rank
    assert [one["step"] for one in reader.system(0)] == [0, 1, 2, 3] and "spans" in reader.system(0)[3]
    assert [one["step"] for one in reader.system(1)] == [0, 1, 2]


def test_a_new_start_without_a_checkpoint_begins_the_files_again_and_false_writes_none(tmp_path):
    one = SystemRecorder(tmp_path, 0)
    one.finish_step(1, "rl"), one.close()
    SystemRecorder(tmp_path, 1).close()
    SystemRecorder(tmp_path, 0).close()
    assert RunReader(tmp_path).system() == [] and RunReader(tmp_path / "none").system() == []
    run_loop(tmp_path / "off", "tracking.system=false", "batch.num_steps=1")
    assert not (tmp_path / "off" / "system").exists()


def test_bytes_are_those_of_the_step_and_quick_steps_repeat_the_state(tmp_path, monkeypatch):
    counts = iter([{"eth0": (100, 10), "lo": (5, 5)}, {"eth0": (150, 40), "ib0": (9, 9), "lo": (9, 9)}])

    def interfaces(pernic):
        return {k: SimpleNamespace(bytes_sent=a, bytes_recv=b) for k, (a, b) in next(counts).items()}

    monkeypatch.setattr(psutil, "net_io_counters", interfaces)
    given = iter([(7, [("wait exchange", 1.0, 2.0)]), (0, [])])
    one = SystemRecorder(tmp_path, 0, collectives=lambda: next(given))
    one.finish_step(1, "rl"), one.finish_step(2, "rl"), one.close()
    first, second = RunReader(tmp_path).system(0)
    assert (first["net_sent_bytes"], first["net_recv_bytes"]) == (50, 30)  # an interface that is new counts from now on
    assert first["interfaces"] == {"eth0": [50, 30]} and first["collective_bytes"] == 7
    (name, start, end), = first["spans"]  # fmt: skip
    assert name == "wait exchange" and end - start == pytest.approx(1.0)
    assert second["net_sent_bytes"] == 0 and second["interfaces"] == {} and second["collective_bytes"] == 0
    assert second["memory_gib"] == first["memory_gib"] and second["spans"] == []


def test_a_disk_that_is_full_ends_the_recording_and_not_the_run(tmp_path, caplog):
    warn_fallback.cache_clear()
    one = SystemRecorder(tmp_path, 0)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, one._file)
    one.finish_step(1, "rl"), one.flush(), one.finish_step(2, "rl"), one.close()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "rank-0.jsonl: not written any more (" in line and "space" in line


class NVMLError(Exception):
    pass


def nvml(uuids=("GPU-1234",)):
    """NVML on a machine with GPUs; the one asked for does not tell its power."""

    def handle(uuid):
        if uuid not in uuids:
            raise NVMLError("Not Found")
        return uuid

    def power(handle):
        raise NVMLError("Not Supported")

    return SimpleNamespace(
        NVMLError=NVMLError,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=87),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=3 * 2**30),
        nvmlDeviceGetPowerUsage=power,
        nvmlDeviceGetTemperature=lambda handle, sensor: 61,
    )


def test_a_machine_that_does_not_tell_ends_the_recording_and_not_the_run(tmp_path, monkeypatch, caplog):
    def hidden():
        raise psutil.NoSuchProcess(1)

    warn_fallback.cache_clear()
    monkeypatch.setattr(psutil, "Process", hidden)  # a container without /proc
    recorder = SystemRecorder(tmp_path, 0)
    recorder.finish_step(1, "rl")
    recorder.flush()
    assert not list(tmp_path.glob("system/*.jsonl")) and "not written any more" in caplog.text


def test_a_gpu_is_read_by_its_uuid_and_what_it_does_not_tell_is_left_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    one = SystemRecorder(tmp_path, 0, gpu="1234")
    one.finish_step(1, "rl"), one.close()
    assert RunReader(tmp_path).system(0)[0]["gpus"] == [{"util": 87, "memory_gib": 3.0, "temperature_c": 61}]
    warn_fallback.cache_clear()
    SystemRecorder(tmp_path, 0, gpu="5678").close()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    SystemRecorder(tmp_path, 0, gpu="1234").close()
    lines = [record.getMessage() for record in caplog.records]
    assert "NVML says Not Found" in lines[0] and 'pip install "skyrl-spmd[nvml]"' in lines[1]


def test_a_clock_that_is_set_moves_nothing(tmp_path, monkeypatch):
    one = SystemRecorder(tmp_path, 0)
    monkeypatch.setattr(system.time, "time", lambda: 0.0)
    one.finish_step(1, "rl"), one.close()
    assert RunReader(tmp_path).system(0)[0]["time"] > 1.7e9


def test_other_ranks_record_too(tmp_path):
    cfg = RunConfig(tracking=TrackingConfig(console="off"))
    tracker = make_tracker(cfg, tmp_path, 1, recorder=SystemRecorder(tmp_path, 1))
    with tracker.span("collect", "generation"), tracker.part("rollout"):
        pass
    assert tracker.finish_step(1, "rl") == {}
    tracker.close()
    (line,) = RunReader(tmp_path).system(1)
    assert [name for name, *_ in line["spans"]] == ["rollout", "generation"] and np.isfinite(line["cpu"])
