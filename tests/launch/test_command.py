"""skyrl-tx launch: what it says, what it refuses before anything is started, and the codes it ends with."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from skyrl.launch import command, hosts
from skyrl.launch.command import Job, exit_code, launch, parser, ranks_of, torchrun
from skyrl.launch.machine import Gpu, Machine
from skyrl.types import UserError


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def refused(*args):
    with pytest.raises(UserError) as error:
        launch(args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_dry_run_prints_the_whole_command_and_starts_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert launch(["--nproc", "2", "--dry-run", "--", "train", "seed=3", "run.name=a b"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and list(tmp_path.iterdir()) == []
    lines = err.splitlines()
    assert lines[1].startswith("launch: local rank 0: ") and "2 ranks" in lines[0]
    assert "OMP_NUM_THREADS=" in lines[3] and "--nproc-per-node=2" in lines[3]
    assert lines[3].endswith("-m skyrl.launch.rank train seed=3 'run.name=a b'")


def test_mistakes_are_found_before_anything_starts():
    assert "say what to run after --, one of: train, sft, serve" in refused()
    assert "walk: say what to run" in refused("--", "walk")
    assert "did you mean optim.lr?" in refused("--", "train", "optim.lrr=1")
    assert "service.prt: no such option" in refused("serve", "service.prt=1")
    assert "--nproc=none: give a number of ranks, or auto" in refused("--nproc", "none", "--", "train")
    assert "unrecognized arguments: --gpu" in refused("--gpu", "4", "--", "train")
    assert "--print shows a batch script: add --slurm" in refused("--print", "--", "train")
    assert "'b:x' is neither a name nor name:ranks" in refused("--hosts", "a,b:x", "--", "train")
    assert "a host is there twice" in refused("--hosts", "a,a", "--", "train")


def test_slurm_has_chosen_the_hosts(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert "Slurm has chosen the hosts" in refused("--hosts", "a", "--", "train")
    assert "--max-restarts needs torchrun" in refused("--max-restarts", "2", "--", "train")


def test_inside_an_allocation_srun_starts_the_ranks(monkeypatch, capsys):
    for name, value in {"JOB_ID": "1", "NNODES": "2", "NTASKS_PER_NODE": "3", "CPUS_ON_NODE": "8"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert launch(["--dry-run", "--", "sft", "warmup.num_steps=2"]) == 0
    told = capsys.readouterr().err
    assert (
        told.startswith("launch: srun --kill-on-bad-exit=0") and "--ntasks" not in told
    )  # the allocation's own layout
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    launch(["--dry-run", "--", "train"])
    assert "--nodes=2 --ntasks=8 --ntasks-per-node=4" in capsys.readouterr().err
    launch(["--dry-run", "--nproc", "1", "--", "train"])
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1" in capsys.readouterr().err


def test_hosts_get_the_same_settings_and_no_secrets(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("SKYRL_API_KEYS", "me:secret")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert launch(["--hosts", "a,me@b:4", "--port", "20123", "--dry-run", "--", "train", "seed=2"]) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert "ssh -o BatchMode=yes -o ConnectTimeout=20 a 'cd " in first and " me@b 'cd " in second
    assert "--rendezvous=a:20123 --address=b --max-restarts=0 -- train seed=2" in second
    assert "--nproc=4" in second and "--nproc=auto" in first and "--node-rank=1" in second
    assert "NCCL_DEBUG=INFO" in first and "secret" not in first + second


def test_a_host_that_cannot_be_reached_is_named():
    assert "a: no route; it must be reachable without a password" in refused(
        "--hosts", "a,b", "--rsh", "sh -c 'echo no route >&2; exit 255' {host}", "--", "train"
    )
    assert "no-such-program" in refused("--hosts", "a,b", "--rsh", "no-such-program {host}", "--", "train")


def test_ranks_never_outnumber_gpus():
    machine = Machine((Gpu(0, "", "", 0),), 2, ((0,), (1,), (2,)), {0: 0, 1: 0, 2: 0})
    assert ranks_of("auto", machine) == 2
    with pytest.raises(UserError, match="--nproc=3: this node shows 2 GPUs"):
        ranks_of("3", machine)


def test_torchrun_takes_a_port_of_the_kernels_choice_or_the_given_one():
    flags = parser().parse_args(["--max-restarts", "3"])
    assert "--rdzv-endpoint=127.0.0.1:0" in torchrun(flags, 2) and "--max-restarts=3" in torchrun(flags, 2)
    own = parser().parse_args(["--nnodes", "2", "--node-rank", "1", "--rendezvous", "a:2", "--address", "b"])
    assert {"--rdzv-endpoint=a:2", "--local-addr=b", "--rdzv-conf=is_host=0,join_timeout=300"} < set(torchrun(own, 2))


def test_codes(tmp_path):
    job, now = Job("train", (), tmp_path), time.time()
    assert exit_code(0, [signal.SIGTERM], job, now) == 0 and exit_code(1, [], job, now) == 1
    assert exit_code(1, [], job, now, left=True) == 75
    (tmp_path / "requeue").write_text("{}")
    assert exit_code(1, [], job, now) == 75 and exit_code(1, [signal.SIGINT], job, now) == 130
    os.utime(tmp_path / "requeue", (now - 60, now - 60))  # of an earlier start
    assert exit_code(1, [signal.SIGTERM], job, now) == 1
    assert exit_code(1, [signal.SIGUSR1], Job("serve", (), None), now) == 75


def test_batch_scripts_ask_whether_a_run_wants_to_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask = ["--asks-again", str(time.time()), "--", "train", "run.dir=run"]
    assert launch(ask) == 1
    Path("run").mkdir()
    Path("run/requeue").touch()
    assert launch(ask) == 0


def test_children_of_a_dead_launcher_get_sigterm(tmp_path):
    """What Child promises, even for kill -9 of its parent."""
    child = "import signal, sys; signal.signal(15, lambda *_: (open('told', 'w'), sys.exit())); "
    child += "print(1, flush=True); signal.pause()"
    parent = "from skyrl.launch.processes import Child; import os; "
    parent += f"Child([{sys.executable!r}, '-c', {child!r}], os.environ).wait()"
    root = str(Path(command.__file__).resolve().parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=tmp_path, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
    )
    assert process.stdout.readline() == b"1\n"
    process.kill()
    process.wait()
    until = time.monotonic() + 20
    while not (tmp_path / "told").exists():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_hosts_are_read():
    assert hosts.read_hosts("a, me@b:4", "auto") == [hosts.Host("a", "auto"), hosts.Host("me@b", "4")]
    assert hosts.Host("me@b", "4").address == "b" and isinstance(parser(), argparse.ArgumentParser)
