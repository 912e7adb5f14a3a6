"""skyrl-tx sweep-table: points, seeds, mean and spread."""

import json
import shutil
import statistics

import pytest
import yaml

from skyrl.config.load import load_config, to_dict
from skyrl.sweep import RESULT, sweep_table
from skyrl.types import UserError


def make_run(folder, name, accuracy, *options, done=True):
    run = folder / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(load_config([*options, f"run.dir={run}"]))))
    records = [{"step": 0, "phase": "rl", "eval/accuracy:mean": 0.0}]
    records += [{"step": 1, "phase": "rl", "reward:mean": 2 * accuracy, "eval/accuracy:mean": accuracy}]
    records += [{"step": 2, "phase": "rl", "reward:mean": None}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if done:
        (run / RESULT).write_text("{}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Composing a config takes a second, so once for all tests; they get copies."""
    tmp_path = tmp_path_factory.mktemp("sweep")
    for lr in ("1e-3", "1e-4"):
        for seed, accuracy in ((1, 0.5), (2, 0.7), (3, 0.9)):
            more = 0.05 if lr == "1e-3" else 0.0
            make_run(tmp_path, f"{lr}-{seed}", accuracy + more, f"optim.lr={lr}", f"seed={seed}", f"run.threads={seed}")
    make_run(tmp_path, "1e-4-4", 0.1, "optim.lr=1e-4", "seed=4", done=False)
    return tmp_path


@pytest.fixture
def sweep(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "sweep")


def test_mean_and_spread_over_seeds(sweep, capsys):
    sweep_table([str(sweep), "--json"])
    points = json.loads(capsys.readouterr().out)["points"]
    assert [point["options"] for point in points] == [{"optim.lr": 1e-4}, {"optim.lr": 1e-3}]
    assert points[0]["seeds"] == [1, 2, 3] and points[0]["unfinished"] == [4] and points[1]["unfinished"] == []
    found = points[0]["metrics"]["eval/accuracy:mean"]
    values = [0.5, 0.7, 0.9]
    assert found["mean"] == pytest.approx(statistics.mean(values)) and found["std"] == pytest.approx(
        statistics.stdev(values)
    )
    assert found["values"] == {"1": 0.5, "2": 0.7, "3": 0.9} and (found["min"], found["max"]) == (0.5, 0.9)
    assert points[1]["metrics"]["reward:mean"]["mean"] == pytest.approx(1.5)


def test_the_text(sweep, capsys):
    sweep_table([str(sweep), "--metric", "eval/accuracy:mean"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["optim.lr", "seeds", "eval/accuracy:mean", "unfinished", "state", "folders"]
    numbers = ["0.0001", "1,2,3", "0.7000", "+-", "0.2000", "4"]
    assert (
        lines[1].split() == [*numbers, "3", "finished,", "1", "unfinished", "1e-4-1", "and", "3", "more"]
        and len(lines) == 3
    )


def test_lengths_are_points_of_their_own(tmp_path, capsys):
    make_run(tmp_path, "a", 0.5, "batch.num_steps=10")
    make_run(tmp_path, "b", 0.6, "batch.num_steps=20")
    sweep_table([str(tmp_path)])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["batch.num_steps", "10", "20"]


def refused(*args):
    with pytest.raises(UserError) as error:
        sweep_table(args)
    return str(error.value)


def test_mistakes_and_duplicates(sweep, tmp_path, capsys):
    assert "no folder nowhere here" in refused("nowhere")
    assert "--metric=x: no run has it; there are eval/accuracy:mean" in refused(str(sweep), "--metric", "x")
    (tmp_path / "empty").mkdir()
    assert "no runs in" in refused(str(tmp_path / "empty"))
    make_run(sweep, "again", 0.1, "optim.lr=1e-3", "seed=2")
    sweep_table([str(sweep), "--json"])
    told = json.loads(capsys.readouterr().out)["points"][1]
    assert told["seeds"] == [1, 2, 3] and told["again"] == ["again"] and len(told["folders"]) == 4
    (sweep / "again" / "config.yaml").write_text("- no\n- mapping\n")
    assert "not the config of a run" in refused(str(sweep))
