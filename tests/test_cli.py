"""skyrl-tx: commands, the table of runs, mistakes in one line."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import skyrl
from skyrl import cli
from skyrl.report.show import runs_table

ROOT = Path(__file__).resolve().parents[1]


def run(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    code = "import sys; sys.modules['torch'] = None; from skyrl.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("args", [(), ("--help",), ("help",)])
def test_help_lists_the_commands_without_torch(args):
    done = run(*args)
    assert done.returncode == 0
    assert all(f"  {command} " in done.stdout for command in cli.COMMANDS)


@pytest.mark.parametrize("args", [("--version",), ("train", "--version"), ("sft", "--version")])
def test_the_version_is_skyrls(args):
    done = run(*args)
    assert (done.returncode, done.stdout) == (0, f"skyrl {skyrl.__version__}\n")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_knows_its_version(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["skyrl-tx", command, "--version"])
    cli.main()
    assert capsys.readouterr().out == f"skyrl {skyrl.__version__}\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    code = "import sys; sys.modules['torch'] = None; from skyrl.cli import main; main()"
    command = f"{sys.executable} -c {shlex.quote(code)} train --help | head -1"
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", command], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            ("trian",),
            f"skyrl: error: trian: no such command; choose one of: {', '.join(cli.COMMANDS)}",
        ),
        (
            ("export", "a"),
            "skyrl: error: export: the following arguments are required: folder; skyrl-tx export --help lists the "
            "flags",
        ),
        (
            ("runs", "~nobody-here/x"),
            "skyrl: error: runs: argument folder: path=~nobody-here/x: no home folder of "
            "nobody-here here; give the whole path; skyrl-tx runs --help lists the flags",
        ),
        (("runs", "nowhere"), "skyrl: error: runs: no folder nowhere here; give one, or start a run first"),
        (("train", "optim.lrr=1"), "skyrl: error: optim.lrr: no such option; did you mean optim.lr?"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(tmp_path, args, line):
    done = run(*args, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (2, "", line)


def test_train_and_sft_reach_the_same_command_line(tmp_path):
    for command, name in (("train", "arithmetic-seed3"), ("sft", "arithmetic-sft-seed3")):
        done = run(command, "--dry-run", "seed=3", cwd=tmp_path)
        assert done.returncode == 0 and f"{name} in runs/{name}" in done.stdout
    assert "python -m skyrl.sft" in run("sft", "--help").stdout


def test_runs_shows_last_step_and_accuracy(tmp_path):
    def write(name: str, rows: list[dict], end: str = "") -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(
            "".join(json.dumps({"phase": "rl", **r}) + "\n" for r in rows) + end
        )

    write("one", [{"step": 0, "eval/accuracy:mean": 0.25}, {"step": 1}, {"step": 2, "eval/accuracy:mean": 0.5}], '{"st')
    write("two", [{"step": 7}])
    write("none", [])
    (tmp_path / "no-run").mkdir()
    (tmp_path / "one" / "export").mkdir()
    (tmp_path / "one" / "export" / "config.json").write_text("{}")
    command = ["train.py", "hydra/job_logging=none", "optim.lr=1e-5", "run.name=one", "experiment=custom"]
    (tmp_path / "one" / "versions.json").write_text(json.dumps([{"command": command}]))
    (tmp_path / "two" / "result.json").write_text("{}")
    rows = {line.split()[0]: line.split()[1:] for line in runs_table(tmp_path).splitlines()[1:]}
    assert rows == {
        "one": ["2", "0.500", "yes", "unfinished", "optim.lr=1e-5", "experiment=custom"],
        "two": ["7", "-", "-", "finished"],
        "none": ["-", "-", "-", "unfinished"],
    }
    assert runs_table(tmp_path / "one") == f"no runs in {tmp_path / 'one'}"


def test_plugins_of_the_current_folder_are_found_as_with_python_m(tmp_path):
    (tmp_path / "mine.py").write_text("print('PLUGIN', flush=True)")
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    code = "import sys; sys.path[0] = '/usr/bin'; from skyrl.cli import main; main()"  # as a console script has it
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--dry-run", "plugins=[mine]"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and "PLUGIN" in done.stdout, done.stderr
