"""A plain torchrun of ours says nothing of its own, and ends with the exit code of the run."""

import logging
import os
import signal
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from skyrl.distributed import env
from skyrl.launch import torchrun
from skyrl.launch.torchrun import LOGGERS, entry_point, starts_skyrl

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


@pytest.fixture
def quiet(monkeypatch):
    """This process as a torchrun of ours; what its hook does with an error."""
    monkeypatch.setattr(sys, "argv", ["/bin/torchrun", "--nproc_per_node=2", "-m", "skyrl.train", "seed=1"])
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setenv(env.EXIT_FILE, "")
    monkeypatch.setattr(os, "_exit", sys.exit)
    loggers = [logging.getLogger(f"torch.distributed.elastic.{name}") for name in LOGGERS]
    entry_point()
    assert all(logger.disabled for logger in loggers)
    yield lambda error: sys.excepthook(type(error), error, None)
    for logger in loggers:
        logger.disabled = False


def failed(tmp_path, code, told):
    file = tmp_path / "error.json"
    if told:
        file.write_text('{"message": {"message": "x", "extraInfo": {"timestamp": "1"}}}')
    return ChildFailedError("skyrl.train", {0: ProcessFailure(0, 41, code, str(file))})


@pytest.mark.parametrize("code, told, ends, said", [(2, True, 2, ""), (75, True, 75, ""), (-9, False, 1, "SIGKILL")])
def test_it_ends_with_the_code_of_the_rank_that_failed(quiet, tmp_path, capsys, code, told, ends, said):
    with pytest.raises(SystemExit) as end:
        quiet(failed(tmp_path, code, told))
    err = capsys.readouterr().err
    assert end.value.code == ends and said in err and err.count("\n") == (not told)


def test_a_killed_rank_that_another_has_told_about_is_told_once(quiet, tmp_path, capsys):
    error = failed(tmp_path, -9, False)
    error.failures[1] = failed(tmp_path, 1, True).failures[0]
    with pytest.raises(SystemExit) as end:
        quiet(error)
    assert end.value.code == 1 and capsys.readouterr().err == ""


def test_after_a_signal_it_ends_as_rank_0_did(quiet, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    env.leave_exit_code(0)
    monkeypatch.setenv("LOCAL_RANK", "0")
    env.leave_exit_code(75)
    with pytest.raises(SystemExit) as end:
        quiet(SignalException("told to end", signal.SIGTERM))
    assert end.value.code == 75


def test_after_a_signal_before_rank_0_has_begun_it_ends_as_signals_do(quiet):
    with pytest.raises(SystemExit) as end:
        quiet(SignalException("told to end", signal.SIGINT))
    assert end.value.code == 130 and not os.path.exists(os.environ[env.EXIT_FILE])


@pytest.mark.parametrize(
    "error, told",
    [
        (
            DistStoreError("Timed out after 601 seconds waiting for clients. 1/2 clients joined.\nC++ stack"),
            "did not meet (T",
        ),
        (DistNetworkError("The server socket has failed to listen. port: 29500, name: EADDRINUSE"), "or --standalone"),
    ],
)
def test_nodes_that_do_not_meet_are_one_line(quiet, capsys, error, told):
    with pytest.raises(SystemExit) as end:
        quiet(error)
    err = capsys.readouterr().err
    assert end.value.code == 1 and err.count("\n") == 1 and told in err


def test_an_error_of_torchrun_itself_is_shown(quiet, capsys):
    quiet(RuntimeError("the rendezvous failed"))
    assert "RuntimeError: the rendezvous failed" in capsys.readouterr().err


def test_only_a_torchrun_of_ours_is_quiet(tmp_path):
    ours, other = tmp_path / "ours.py", tmp_path / "other.py"
    ours.write_text("import skyrl\n")
    other.write_text("import torch  # as skyrl does\n")
    assert starts_skyrl(["/x/torchrun", "-m", "skyrl.sft"]) and starts_skyrl(["torchrun", str(ours)])
    assert starts_skyrl(["/x/torch/distributed/run.py", "--nnodes=1", "-m", "skyrl", "train"])
    assert not starts_skyrl(["torchrun", str(other)]) and not starts_skyrl(["torchrun", "-m", "trl.train"])
    assert not starts_skyrl(["/x/pytest", "-m", "skyrl.train"]) and not starts_skyrl(["torchrun", "gone.py"])


def test_the_entry_point_is_declared():
    line = PYPROJECT.read_text().split('[project.entry-points."torchrun.handlers"]\n')[1].splitlines()[0]
    name, value = (part.strip(' "') for part in line.split("="))
    assert EntryPoint(name, value, "torchrun.handlers").load() is torchrun.entry_point
