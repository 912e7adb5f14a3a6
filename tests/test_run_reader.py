"""RunReader: what a viewer may rely on while a run is written, damaged or absent."""

import json
import os
import time

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
    for bad in (
        "[1]",
        "{}",
        '{"step": 2}',
        '{"phase": "rl"}',
        '{"step": "2", "phase": "rl"}',
        '{"step": 2.5, "phase": "rl"}',
    ):
        path.write_text('{"step": 1, "phase": "rl"}\n' + bad + "\n")
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


def test_options_that_are_no_mappings_and_starts_without_a_command_count_as_damaged(tmp_path):
    run = RunReader(tmp_path)
    for text in ("algorithm: 7", "tracking: [a]", "batch: {a: &x [*x]}\nmodel: text", "- 1"):
        (tmp_path / "config.yaml").write_text(text)
        assert run.config() == {}, text
    (tmp_path / "versions.json").write_text('[{"command": {"a": 1}}, 3, {"command": ["skyrl-tx", "seed=2"]}]')
    assert run.starts() == [{"command": ["skyrl-tx", "seed=2"]}] and run.typed() == {"seed": "2"}
    (tmp_path / "advisories.jsonl").write_text(
        '{"name": "a"}\n{"name": ["b"], "step": 1, "text": "t", "remedy": "r"}\n'
    )
    assert [one["text"] for one in run.advisories()] == ["t"]
    (tmp_path / "system").mkdir()
    (tmp_path / "system" / "rank-0.jsonl").write_text('{"spans": []}\n{"step": 1, "time": 2.0}\n')
    assert run.system() == [{"rank": 0, "step": 1, "time": 2.0}]


def everything_of(run):
    """What any page or command reads of a run."""
    parts = [run.state(), run.config(), run.starts(), run.result(), run.stops(), run.advisories(), run.system()]
    parts += [run.token_texts(), run.logs(), run.crashes(), run.checkpoints()]
    for name in run.dumps():
        parts += [list(run.episodes(name)), run.episode(name, 0, 0), run.dumps_with("a"), run.trained(name)]
    return parts + [run.before(file, run.size(file), 1000) for file in run.logs()]


FILES = "config.yaml versions.json result.json stops.jsonl advisories.jsonl lock job.log system/rank-0.jsonl".split()
FILES += ["rollouts/000001-r0.jsonl", "rollouts/tokens-r0.json", "rollouts/000001-r0.jsonl.trained"]


def test_pipes_and_devices_keep_no_reader_waiting(tmp_path):
    for folder in ("system", "rollouts"):
        (tmp_path / folder).mkdir()
    for file in FILES:
        os.mkfifo(tmp_path / file)
    begun = time.monotonic()
    everything_of(RunReader(tmp_path))
    for file in FILES:
        (tmp_path / file).unlink()
        (tmp_path / file).symlink_to("/dev/zero")
    everything_of(RunReader(tmp_path))
    assert time.monotonic() - begun < 60  # not for ever


@pytest.mark.skipif(os.geteuid() != 0, reason="another owner of a link needs root")
def test_links_show_nobodys_files_but_their_owners(tmp_path):
    secret, runs = tmp_path / "secret", tmp_path / "runs"
    for folder in (secret, secret / "system", runs):
        folder.mkdir()
    line = {"step": 1, "phase": "hunter2", "time": 1, "name": "hunter2", "text": "hunter2", "remedy": "", "uid": "a"}
    for file in [*FILES[:-3], "metrics.jsonl", "dump"]:
        (secret / file).write_text(json.dumps({**line, "turns": [{"text": "hunter2"}]}) + "\n")

    def shown(run):
        found = [*everything_of(run)]
        try:
            found += run.metrics()[0]
        except UserError as error:
            found.append(str(error).replace(str(run.path), ""))
        return str(found).count("hunter2")

    (runs / "evil").mkdir()
    for file in [*FILES[:-3], "metrics.jsonl"]:
        if "/" not in file:
            (runs / "evil" / file).symlink_to(secret / file)
    (runs / "evil" / "system").symlink_to(secret / "system")
    (runs / "evil" / "crash-1").symlink_to(secret)
    (runs / "evil" / "rollouts").mkdir()
    (runs / "evil" / "rollouts" / "000001-r0.jsonl").symlink_to(secret / "dump")
    (runs / "whole").symlink_to(secret)
    assert shown(RunReader(runs / "evil")) > 5 and shown(RunReader(runs / "whole")) > 5  # whose link it is may read it
    for path in [*runs.rglob("*")]:
        if path.is_symlink():
            os.lchown(path, 4242, 4242)
    assert shown(RunReader(runs / "evil")) == 0 and shown(RunReader(runs / "whole")) == 0
    assert RunReader(runs / "evil").crashes() == []
    for path in secret.rglob("*"):
        os.chown(path, 4242, 4242)  # of the link's owner: theirs to show
    assert shown(RunReader(runs / "evil")) > 5


def test_metrics_that_may_not_be_read_are_told(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl: cannot be read"):
        RunReader(tmp_path).metrics()


def test_an_episode_lacks_nothing_and_what_was_trained_is_of_one_row(tmp_path):
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "000001-r0.jsonl").write_text('{"turns": [{}]}\n{"turns": [3]}\n{"turns": 1}\n7\n')
    (tmp_path / "rollouts" / "000001-r1.jsonl").write_text("")
    run = RunReader(tmp_path)
    ((_, _, one),) = run.episodes("000001")
    assert (one["uid"], one["turns"][0]["text"], one["turns"][0]["tokens"]) == ("", "", []) and one["reward"] != one[
        "reward"
    ]
    with pytest.raises(UserError, match="line 2: not an episode"):
        list(run.rollouts("000001"))
    for rank, told in enumerate(({"a/0/0": [3, [-1.0]], "b/0/0": [0, []]}, {"b/0/0": [1, []]})):
        (tmp_path / "rollouts" / f"000001-r{rank}.jsonl.trained").write_text(json.dumps(told))
    assert run.trained("000001") == {"a/0/0": [3, [-1.0]], "b/0/0": None} and run.dumps() == ["000001"]
