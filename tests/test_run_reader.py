"""RunReader: what a viewer may rely on while a run is written, damaged or absent."""

import json

import pytest

from skyrl.run_dir import RunReader, find_run, find_runs
from skyrl.types import UserError


def test_metrics_are_read_from_where_the_last_call_ended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "phase": "rl", "loss:sum": "nan"}\n{"step": 2, "ph')
    run = RunReader(tmp_path)
    (first,), end = run.metrics()
    assert first["step"] == 1 and first["loss:sum"] != first["loss:sum"]
    assert run.metrics(end) == ([], end)  # the torn line is not a record yet
    with open(path, "a") as stream:
        stream.write('ase": "rl"}\n')
    assert run.metrics(end)[0] == [{"step": 2, "phase": "rl"}]
    path.write_text('{"step": 1, "phase": "rl"}\n')  # a resume cut it back
    assert run.metrics(10_000) == ([{"step": 1, "phase": "rl"}], 27)
    path.write_text("{}\n[1]\n")
    with pytest.raises(UserError, match="metrics.jsonl, line 2: not a record"):
        run.metrics()


def test_what_is_absent_or_damaged_is_empty(tmp_path):
    run = RunReader(tmp_path / "none")
    assert (run.metrics(), run.config(), run.starts(), run.result()) == (([], 0), {}, [], {})
    assert run.dumps() == run.checkpoints() == run.crashes() == [] and run.state() == "unfinished"
    for name, text in {"config.yaml": "a: [", "versions.json": '{"a"', "result.json": "[]"}.items():
        (tmp_path / name).write_text(text)
    run = RunReader(tmp_path)
    assert (run.config(), run.starts(), run.result()) == ({}, [], {})


def test_runs_are_found_by_their_files_and_in_order_of_writing(tmp_path, monkeypatch):
    for name in ("b", "a", "no_run"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / "b" / "config.yaml").write_text("seed: 1")
    (tmp_path / "runs" / "a" / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    assert {run.name for run in find_runs(tmp_path / "runs")} == {"a", "b"} and find_runs(tmp_path / "absent") == []
    monkeypatch.chdir(tmp_path)
    assert find_run(tmp_path / "runs" / "a", "show").name == find_run(type(tmp_path)("a"), "show").name == "a"
    with pytest.raises(UserError, match="show: no run folder x here"):
        find_run(type(tmp_path)("x"), "show")
    with pytest.raises(UserError, match="is no run: it has neither"):
        find_run(tmp_path / "runs" / "no_run", "show")
