"""Batch jobs in containers, with environment modules and a file to source.

The modules are real (environment-modules). apptainer and enroot are stand-ins that check the command line, the
environment, the folder and signals as the real programs do, and isolate nothing, unless SKYRL_TEST_PROGRAMS names a
folder with real ones; then the image is a root file system of its own. pyxis has no stand-in and is skipped without it.
"""

import json
import os
import tempfile
from pathlib import Path

import pytest
from containers import PATH, box
from jobs import ROOT, RUN, Job, numbers, stops, until

from skyrl.launch.stage import ENVIRONMENT_TEXT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
MODULES = Path("/usr/share/modules/init/bash")
# Every rank tells where it is. A plugin is imported before anything else is done.
PLUGIN = """
import json, os
image = os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER") or os.environ.get("IN_IMAGE")
names = "SLURM_PROCID", "TINY_MODULE", "TINY_SETUP", "RANK", "PATH", "QUOTED"
seen = {"image": image, "cwd": os.getcwd(), "mark": os.path.exists("/mark"), **{n: os.environ.get(n) for n in names}}
seen["staged"] = os.path.exists(os.environ["SKYRL_STAGED"] + "/options")
with open("seen.jsonl", "a") as file:
    file.write(json.dumps(seen) + chr(10))
"""
OPTIONS = [option for option in RUN if not option.startswith("plugins=")] + ["plugins=[letters,tell]", "run.dir=run"]


def prepare(place, folder):
    """A module that puts `folder` on the path, a file to source that tells of `set -u` and of arguments, and a staged
    folder elsewhere."""
    if not MODULES.exists():
        pytest.skip("environment-modules is not installed: tests/slurm/cluster.sh install")
    (place / "modules" / "tiny").mkdir(parents=True)
    text = f"#%Module\nsetenv TINY_MODULE loaded\nprepend-path PATH {folder}\n"
    (place / "modules" / "tiny" / "1.0").write_text(text)
    (place / "setup.sh").write_text('[ -n "$NOWHERE_SET" ] || export TINY_SETUP="$TINY_MODULE, $# arguments"\n')
    (place / "tell.py").write_text(PLUGIN)
    staged = Path(tempfile.mkdtemp(dir=place.parent))
    (staged / "environment.sh").write_text(ENVIRONMENT_TEXT)
    (staged / "options").write_text("eval.num_prompts=8\n")
    python = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "system" / "plugins"), str(place)])
    return {
        "MODULEPATH": str(place / "modules"),
        "SKYRL_MODULES": "tiny/1.0",
        "SKYRL_SETUP": "setup.sh",
        "SKYRL_STAGED": str(staged),
        "PYTHONPATH": python,
        "QUOTED": "two words",
    }


def seen(place):
    return [json.loads(line) for line in (place / "seen.jsonl").read_text().splitlines()]


def check(place, found, ranks):
    """Each start of each rank was in the image, in the job's folder, with the module's and the file's variables."""
    told = seen(place)
    assert sorted(one["SLURM_PROCID"] for one in told) == sorted(ranks)
    for one in told:
        assert Path(one["image"]).name in (Path(found.image).name, "tiny") and one["cwd"] == str(place), one
        assert one["TINY_MODULE"] == "loaded" and one["TINY_SETUP"] == "loaded, 0 arguments" and one["RANK"], one
        assert one["QUOTED"] == "two words" and str(found.folder) not in one["PATH"].split(":"), one
        assert one["mark"] == found.real and one["staged"]
        assert found.env.get("SKYRL_CONTAINER_RUNTIME") != "enroot" or one["PATH"] == PATH, one


@pytest.mark.parametrize("program", ["enroot", "pyxis"])
def test_a_run_in_a_container(whole, tmp_path, program):
    found = box(program, tmp_path)
    env = {**prepare(tmp_path, found.folder), **found.env, "SKYRL_CONTAINER": found.image}
    # pyxis keeps one container a node, by the job's number: here all nodes are one machine and would share it.
    flags = ("--ntasks-per-node=2",) if program == "pyxis" else ("--nodes=2",)
    job = Job.submit(tmp_path, "train.sbatch", *OPTIONS, flags=flags, **env)
    assert job.end() == "COMPLETED", job.text()
    assert numbers(tmp_path / "run")[1] == numbers(whole)[1]
    check(tmp_path, found, ["0", "1"])


@pytest.mark.parametrize("program", ["apptainer", "singularity"])
def test_a_signal_reaches_the_ranks_in_a_container_and_the_job_goes_on(whole, tmp_path, program):
    found = box(program, tmp_path)
    env = {**prepare(tmp_path, found.folder), **found.env, "SKYRL_CONTAINER": "tiny.sif"}
    job = Job.submit(tmp_path, "train.sbatch", *OPTIONS, "env.options.sleep=0.05", flags=("--nodes=2",), **env)
    metrics = tmp_path / "run" / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 5, 120, job)
    job.signal()
    assert job.end() == "COMPLETED", job.text()
    assert job.fact("Restarts") == "1" and [stop["reason"] for stop in stops(tmp_path / "run")] == ["SIGUSR1"]
    assert "is queued again (1 of at most 50)" in job.text() and "resuming from" in job.text()
    assert numbers(tmp_path / "run")[1] == numbers(whole)[1]
    check(tmp_path, found, ["0", "1", "0", "1"])


def errors(place, **env):
    """The lines of a job that must fail before any rank starts."""
    job = Job.submit(place, "train.sbatch", *RUN, **env)
    assert job.end() == "FAILED" and job.fact("ExitCode") == "2:0", job.text()
    assert "rendezvous" not in job.text()
    return [line for line in job.text().splitlines() if line.startswith("skyrl: error: ")]


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"SKYRL_MODULES": "nowhere/1"}, "SKYRL_MODULES=nowhere/1: module load failed"),
        ({"SKYRL_SETUP": "nowhere.sh"}, "SKYRL_SETUP=nowhere.sh: no such file on "),
        ({"SKYRL_PYTHON": "no_python"}, "SKYRL_PYTHON=no_python: there is no such program on "),
        (
            {"SKYRL_CONTAINER": "image"},
            "SKYRL_CONTAINER=image: set SKYRL_CONTAINER_RUNTIME to apptainer, singularity, ",
        ),
        ({"SKYRL_CONTAINER": "x.sif", "SKYRL_CONTAINER_RUNTIME": "docker"}, "SKYRL_CONTAINER_RUNTIME=docker: choose "),
        ({"SKYRL_CONTAINER": "nowhere.sif"}, "SKYRL_CONTAINER=nowhere.sif: no such image on "),
        (
            {"SKYRL_CONTAINER": "/nowhere/x.sqsh", "SKYRL_CONTAINER_RUNTIME": "enroot"},
            "SKYRL_CONTAINER=/nowhere/x.sqsh: no such image on ",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line(tmp_path, env, told):
    if "SKYRL_MODULES" in env:
        prepare(tmp_path, tmp_path)
    for program in ("apptainer", "enroot"):
        path = box(program, tmp_path / program).folder
        env = {**env, "PATH": f"{path}:{env.get('PATH', os.environ['PATH'])}:/usr/sbin"}
    lines = errors(tmp_path, **env)
    assert len(lines) == 1 and lines[0].startswith(f"skyrl: error: {told}"), lines


@pytest.mark.parametrize("program", ["apptainer", "enroot", "pyxis"])
def test_a_program_that_is_not_installed_is_told_in_one_line(tmp_path, program):
    if program == "pyxis":
        try:
            box(program, tmp_path / "box")
        except pytest.skip.Exception:
            pass
        else:
            pytest.skip("this Slurm has pyxis")
    env = {"SKYRL_CONTAINER": "docker://ubuntu", "SKYRL_CONTAINER_RUNTIME": program, "PATH": "/usr/bin:/bin:/usr/sbin"}
    lines = errors(tmp_path, **env)
    assert len(lines) == 1 and lines[0].startswith(
        f"skyrl: error: SKYRL_CONTAINER=docker://ubuntu: {program} is not installed on "
    )


def test_a_name_that_is_no_path_is_for_the_program_to_judge(tmp_path):
    """An image of a registry, a container of enroot's: not looked for as files."""
    for program, image in (("apptainer", "docker://ubuntu"), ("enroot", "nobody")):
        found = box(program, tmp_path / program)
        env = {**found.env, "PATH": f"{found.folder}:{os.environ['PATH']}:/usr/sbin", "SKYRL_CONTAINER": image}
        env["SKYRL_CONTAINER_RUNTIME"] = program
        job = Job.submit(tmp_path, "train.sbatch", *RUN, **env)
        assert job.end() == "FAILED" and "no such image" not in job.text()
        assert {"apptainer": "docker://ubuntu", "enroot": "No such file or directory: "}[program] in job.text()
