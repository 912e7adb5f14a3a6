"""skyrl-tx launch: what it says, what it refuses before anything is started, and the codes it ends with."""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from skyrl.launch import command, hosts, sbatch
from skyrl.launch.command import Job, exit_code, launch, parser, ranks_of, torchrun
from skyrl.launch.hosts import ANSWER, read_port
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
    assert "say what to run after --, one of: train, sft, control, evaluate, serve" in refused()
    assert "walk: say what to run" in refused("--", "walk")
    assert "did you mean optim.lr?" in refused("--", "train", "optim.lrr=1")
    assert "service.prt: no such option" in refused("serve", "service.prt=1")
    assert "argument --nproc: none: give a number of ranks, or auto" in refused("--nproc", "none", "--", "train")
    assert "unrecognized arguments: --gpu" in refused("--gpu", "4", "--", "train")
    assert "--print shows a batch script: add --slurm" in refused("--print", "--", "train")
    assert "'b:x' is neither a name nor name:ranks" in refused("--hosts", "a,b:x", "--", "train")
    assert "a host is there twice" in refused("--hosts", "a,a", "--", "train")


# What a real Slurm 22.05 has said of a job with two GPUs on one node and one on another.
GPUS = (
    "Nodes=node0 CPU_IDs=0-7 Mem=200 GRES=gpu:h100:2(IDX:0,2) Nodes=node1 CPU_IDs=0-5 Mem=200 GRES=gpu:1(IDX:0),nic:1"
)


@pytest.fixture
def job(monkeypatch, tmp_path):
    """job(what scontrol says of it, **SLURM_ variables): this is a shell of that job, on node0 and node1."""

    def enter(told="", **variables):
        for name, value in {"JOB_ID": "1", "JOB_NUM_NODES": "2", "JOB_NODELIST": "node[0-1]", **variables}.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        scontrol = tmp_path / "scontrol"
        names = 'case $3 in "node[0-1]") printf "node0\\nnode1\\n";; *) echo "$3";; esac'
        scontrol.write_text(f"#!/bin/bash\nif [ $2 = hostnames ]; then {names}; else echo ' {told}'; fi\n")
        scontrol.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return enter


def test_slurm_has_chosen_the_hosts(job):
    job()
    assert "Slurm has chosen the hosts" in refused("--hosts", "a", "--", "train")
    assert "--max-restarts needs torchrun" in refused("--max-restarts", "2", "--", "train")


def laid_out(capsys, nproc=0):
    """(srun's flags for the ranks, what else is said)."""
    return " ".join(sbatch.layout(nproc)[0]), capsys.readouterr().err.splitlines()


def no_layout(nproc):
    with pytest.raises(UserError) as error:
        sbatch.layout(nproc)
    return str(error.value)


def test_inside_an_allocation_srun_starts_the_ranks(job, capsys):
    job(TASKS_PER_NODE="3(x2)", JOB_CPUS_PER_NODE="6(x2)", NTASKS="6")
    six = "--nodes=2 --ntasks=6 --cpus-per-task=2 --export=ALL --ntasks-per-node=3"
    assert laid_out(capsys) == (six, [])
    assert launch(["--dry-run", "--", "sft", "warmup.num_steps=2"]) == 0
    assert f"launch: srun --kill-on-bad-exit=0 --wait=120 {six} {sys.executable} -m skyrl" in capsys.readouterr().err
    assert laid_out(capsys, 1)[0].startswith("--nodes=2 --ntasks=2 --cpus-per-task=6 ")
    assert laid_out(capsys, 4) == (
        "--nodes=2 --ntasks=8 --cpus-per-task=1 --export=ALL --ntasks-per-node=4",
        ["launch: idle with 8 ranks: 2 of 6 CPUs on node0, 2 of 6 CPUs on node1"],
    )
    assert laid_out(capsys, 7)[0].endswith(" --ntasks-per-node=7 --overcommit")
    job(STEP_ID="4294967290", STEP_NUM_TASKS="1")
    assert laid_out(capsys)[0] == six  # the shell of salloc


def test_ranks_follow_uneven_nodes(job, capsys):
    job(TASKS_PER_NODE="2,1", JOB_CPUS_PER_NODE="2,1")
    assert laid_out(capsys)[0] == (
        "--nodes=2 --ntasks=3 --cpus-per-task=1 --export=ALL --distribution=arbitrary --nodelist=node0,node0,node1"
    )
    # Variables of this node alone, and of an outer job: what the controller says counts.
    job(GPUS, TASKS_PER_NODE="1(x2)", JOB_CPUS_PER_NODE="8,6", GPUS_ON_NODE="7", GPUS="9", CPUS_PER_TASK="3")
    flags, said = laid_out(capsys)
    assert flags.startswith("--nodes=2 --ntasks=3 --cpus-per-task=4 ") and "=node0,node0,node1" in flags
    assert said == ["launch: idle with 3 ranks: 2 of 6 CPUs on node1"]
    assert "--ntasks=2 --cpus-per-task=6 " in laid_out(capsys, 1)[0]
    assert "2 ranks (--nproc, SKYRL_RANKS_PER_NODE): job 1 has 1 GPUs on node1; give at most" in no_layout(2)
    job(GPUS.replace("gpu:1", "mps:1"), TASKS_PER_NODE="1(x2)")
    assert "2 GPUs on 2 nodes and none on node1; ask for some on each (--gpus-per-node)" in no_layout(0)


def test_srun_inherits_no_other_job_and_no_other_world(job, monkeypatch):
    job(MEM_PER_CPU="1", MEM_PER_NODE="2", CPU_BIND="x", GPUS_PER_NODE="3", EXPORT_ENV="NONE", JOB_CPUS_PER_NODE="2")
    for name in ("RANK", "MASTER_ADDR", "OMPI_COMM_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "a=b\nc")
    inside = sbatch.layout(0)[1]
    gone = {name for name in os.environ if name not in inside}
    assert gone >= {"SLURM_MEM_PER_CPU", "SLURM_MEM_PER_NODE", "SLURM_CPU_BIND", "SLURM_GPUS_PER_NODE", "RANK"}
    assert gone >= {"SLURM_EXPORT_ENV", "MASTER_ADDR", "OMPI_COMM_WORLD_SIZE", "TORCHELASTIC_RUN_ID"}
    assert inside["KEPT"] == "a=b\nc" and inside["SLURM_JOB_ID"] == "1" and "KEPT" not in gone


def test_launches_that_would_not_know_of_each_other_are_refused():
    """`srun skyrl-tx launch` on two nodes: each would train alone, in one folder."""
    step = {"SLURM_JOB_ID": "41", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    for started in (step, {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}):
        with pytest.raises(UserError, match="launches would not know of each other; start one, outside of srun"):
            command._refuse_several(started)
    command._refuse_several({**step, "SLURM_STEP_NUM_TASKS": "1"})


def test_what_stays_idle_is_said():
    found, job = Machine((), 2, ((0,),), {0: 0}), {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "3"}
    assert command.idle_share(found, 1, job) == (
        "idle: 2 of 3 nodes (start it outside of srun to use all), 1 of 2 GPUs (--nproc auto uses all)"
    )
    assert command.idle_share(found, 2, {**job, "SLURM_JOB_NUM_NODES": "1"}) == command.idle_share(found, 1, {}) == ""


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
    assert ranks_of(0, machine) == 2
    with pytest.raises(UserError, match="--nproc=3: this node shows 2 GPUs"):
        ranks_of(3, machine)


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


def test_what_start_files_of_a_shell_print_is_no_answer(monkeypatch):
    """.bashrc, a module system, conda: before, after, without a line's end, in colour."""
    noise = "echo 'Welcome 20111'; printf '\\033[31mloading 7 modules'"
    line = f"{noise}; printf 'x{ANSWER}20123\\ny'; echo 'bye 5'"
    assert hosts._ask_port(f"sh -c {shlex.quote(line)}", hosts.Host("a", 0)) == 20123
    assert read_port("20111\n") is None and read_port(f"{ANSWER}1\n{ANSWER}2\n") == 2
    with pytest.raises(UserError, match="a: Welcome 20111; it must be reachable"):
        hosts._ask_port("sh -c 'echo Welcome 20111'", hosts.Host("a", 0))


def test_hosts_are_read():
    assert hosts.read_hosts("a, me@b:4", 0) == [hosts.Host("a", 0), hosts.Host("me@b", 4)]
    assert hosts.Host("me@b", 4).address == "b" and isinstance(parser(), argparse.ArgumentParser)
