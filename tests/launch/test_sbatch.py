"""Batch scripts: what launch --slurm renders, and that the server's runs the other one."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from skyrl.launch import sbatch
from skyrl.launch.command import launch, parser
from skyrl.types import UserError

SCRIPTS = Path(__file__).resolve().parents[2] / "launch" / "slurm"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def printed(capsys, *args):
    assert launch(["--slurm", "--print", *args]) == 0
    return capsys.readouterr().out


def test_bash_reads_the_scripts():
    for path in SCRIPTS.glob("*.sbatch"):
        subprocess.run(["bash", "-n", str(path)], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", str(path)], check=True)


def test_the_servers_script_runs_the_one_beside_it(tmp_path):
    """As Slurm runs it: a copy elsewhere, which has to ask where the original lies."""
    (tmp_path / "spool").mkdir()
    shutil.copy(SCRIPTS / "serve.sbatch", tmp_path / "spool" / "slurm_script")
    kept = tmp_path / "my scripts"
    shutil.copytree(SCRIPTS, kept)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho 'JobId=7 JobName=x'\necho '   Command={kept}/serve.sbatch a=b.sbatch c=d'\n")
    scontrol.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node0"}

    def run():
        script = ["bash", str(tmp_path / "spool" / "slurm_script"), "a=b"]
        done = subprocess.run(script, env={**env, "SKYRL_PYTHON": "nowhere"}, capture_output=True, text=True)
        return done.returncode, done.stderr

    code, told = run()
    assert code == 2 and told.startswith("skyrl: error: SKYRL_PYTHON=nowhere: there is no such program"), told
    (kept / "train.sbatch").unlink()
    code, told = run()
    assert code == 2 and told.count("\n") == 1 and "train.sbatch is not beside it" in told


@pytest.mark.parametrize("signal", ["USR1", "USR2", "XCPU", "HUP", "TERM"])
def test_a_signal_before_there_are_ranks_asks_to_be_queued_again(tmp_path, signal):
    """While modules or SKYRL_SETUP prepare the job: it died of the signal, or started ranks that nobody stops."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\ncase $2 in hostnames) echo node0;; *) echo "$1 JobState=RUNNING Reason=None ";; esac\n'
    )
    scontrol.chmod(0o755)
    (tmp_path / "setup.sh").write_text(f"kill -{signal} $$\n")
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node0"}
    env |= {
        "SLURM_JOB_END_TIME": "2",
        "MASTER_PORT": "2",
        "SLURMD_NODENAME": "node0",
        "SKYRL_PYTHON": "/bin/true",
        "SKYRL_SETUP": "setup.sh",
    }
    done = subprocess.run(["bash", str(SCRIPTS / "train.sbatch")], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout == "skyrl: job 7 is queued again (1 of at most 50)\nrequeue JobState=RUNNING Reason=None \n"


def test_a_whole_script(capsys, tmp_path):
    (tmp_path / "image.sif").touch()
    (tmp_path / "setup.sh").touch()
    flags = ["--nodes", "2", "--gpus", "4", "--cpus", "8", "--time", "8:00:00", "--partition", "p", "--account", "a"]
    flags += ["--module", "cuda/12.8", "--module", "gcc", "--setup", "setup.sh", "--container", "image.sif"]
    flags += ["--sbatch=--qos=high", "--max-requeues", "3", "--save-seconds", "240"]
    script = printed(capsys, *flags, "--", "train", "run.name=mine", "sampler.stop=['a b']")
    head, _, body = script.partition(sbatch.BODY)
    wanted = [
        "--job-name=mine", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=8",
        "--time=8:00:00", "--partition=p", "--account=a", "--signal=USR1@240", "--requeue", "--open-mode=append",
        f"--output={tmp_path}/logs/mine-%j.out", "--qos=high",
    ]  # fmt: skip
    assert [line[8:] for line in head.splitlines() if line.startswith("#SBATCH")] == wanted
    assert "export SKYRL_MODULES='cuda/12.8 gcc'\n" in head and f"export SKYRL_CONTAINER={tmp_path}/image.sif\n" in head
    assert f"export SKYRL_SETUP={tmp_path}/setup.sh\n" in head and "export SKYRL_MAX_REQUEUES=3\n" in head
    assert """set -- run.name=mine 'sampler.stop=['"'"'a b'"'"']'""" in head
    assert "scontrol requeue" in body and not (tmp_path / "logs").exists()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_arrays_have_a_log_for_each_task():
    script = rendered("--array", "1-4")
    assert "#SBATCH --array=1-4\n" in script and "/skyrl-train-%A_%a.out\n" in script
    serve = sbatch.render(parser().parse_args(["--slurm"]), "serve", ["service.port=8001"])
    assert "export SKYRL_COMMAND=serve\n" in serve


def rendered(*flags):
    return sbatch.render(parser().parse_args(["--slurm", *flags]), "train", [])


def test_values_of_the_header_are_quoted(tmp_path, monkeypatch):
    """What a real sbatch reads is in tests/slurm; here that nothing is lost or cut off."""
    odd = tmp_path / 'a, b="c" it\'s é 100%'
    odd.mkdir()
    monkeypatch.chdir(odd)
    name = "a b=c,d/e 'f' 20% é"
    script = rendered("--name", name, "--sbatch=--comment=two words", "--sbatch=--qos high")
    header = [shlex.split(line[8:]) for line in script.splitlines() if line.startswith("#SBATCH")]
    assert [f"--job-name={name}"] in header and ["--comment=two words"] in header and ["--qos", "high"] in header
    logs = str(odd).replace("%", "%%")
    assert [f"--output={logs}/logs/a_b=c_d_e__f__20__é-%j.out"] in header
    long = rendered("--name", 150 * "é")
    assert len(os.fsencode(re.search(r"/(é+-%j.out)", long)[1])) < 255 and 150 * "é" in long
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_container_is_a_file_or_a_name_that_its_program_knows(tmp_path):
    def exported(image, runtime=""):
        script = rendered("--container", image, "--container-runtime", runtime)
        lines = [line.partition("=") for line in script.splitlines() if line.startswith("export SKYRL_CONTAINER")]
        return {name.removeprefix("export SKYRL_"): value.strip("'") for name, _, value in lines}

    (tmp_path / "a.sqsh").touch()
    assert exported("a.sqsh") == {"CONTAINER": f"{tmp_path}/a.sqsh"}
    assert exported("a.sqsh", "enroot") == {"CONTAINER": f"{tmp_path}/a.sqsh", "CONTAINER_RUNTIME": "enroot"}
    for image, runtime in (("docker://a/b", "apptainer"), ("pytorch", "enroot"), ("nvcr.io#nvidia/pytorch:1", "pyxis")):
        assert exported(image, runtime) == {"CONTAINER": image, "CONTAINER_RUNTIME": runtime}
    for words, *flags in (
        ("--container=b.sif: not there", "b.sif"),
        ("not there", "a/b", "--container-runtime", "enroot"),
        ("give --container-runtime as well: apptainer,", "docker://a"),
        ("choose one of: apptainer", "b", "--container-runtime", "docker"),
    ):
        with pytest.raises(UserError, match=words):
            rendered("--container", *flags)


def refused(*args):
    with pytest.raises(UserError) as error:
        launch(["--slurm", *args])
    return str(error.value)


def test_a_time_that_ends_with_the_signal_to_save_is_refused():
    """The job would be asked to stop as soon as it starts, and queue itself again, over and over."""
    for time, seconds in {"5": 300, "5:30": 330, "1:00:00": 3600, "1-2": 93600, "1-2:30": 95400, "0-0:0:5": 5}.items():
        assert sbatch._seconds(time) == seconds
    assert [sbatch._seconds(time) for time in ("soon", "", "1:2:3:4", "INFINITE")] == [0, 0, 0, 0]
    told = refused("--time", "3", "--", "train")
    assert told.startswith("launch: --time=3: the signal to save comes 180 s before it (--save-seconds), so nothing")


def test_a_plan_that_cannot_work_is_refused_before_it_waits_in_the_queue(monkeypatch):
    assert "did you mean optim.lr?" in refused("--", "train", "optim.lrr=1")
    hsdp = refused("--nodes", "3", "--", "train", "strategy.name=hsdp", "strategy.shard_size=2")
    assert "strategy.shard_size=2" in hsdp and "3" in hsdp
    assert "not with --slurm" in refused("--max-restarts", "1", "--", "train")
    assert "--setup=nowhere: not there" in refused("--setup", "nowhere", "--", "train")
    assert "'qos': sbatch needs a flag of one line, as in --sbatch=--qos=high" in refused("--sbatch=qos", "--", "train")
    assert "--nproc=3: with --gpus=2 each GPU has a rank" in refused("--nproc", "3", "--gpus", "2", "--", "train")
    assert "--save-seconds: give numbers" in refused("--save-seconds", "-1", "--", "train")
    for flag in ("-n4", "--ntasks=4", "-N 2", "--gpus=3", "--gres=gpu:2", "--cpus-per-task=2", "-c2", "--array=1-2"):
        with pytest.raises(UserError, match=f"--sbatch={flag}: planned here; use --nodes"):
            rendered(f"--sbatch={flag}")
    with pytest.raises(UserError, match=r"'--job-name=a\\nb': sbatch needs a flag of one line"):
        rendered("--name", "a\nb")
    assert "file systems allow 255" in refused("--", "train", f"run.name={'x' * 300}")
    assert "the system allows 3900 for a folder" in refused("--", "train", f"run.dir={'/'.join(['d' * 200] * 20)}")
    assert "hydra/launcher=slurm" in refused("--", "train", "-m", "seed=1,2")
    assert "not made by skyrl-tx stage" in refused("--staged", ".", "--", "train")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "there is no sbatch here; --print shows the script" in refused("--", "train")
