"""What differs between Slurms, shells and names: each job here only plans its run, so it takes seconds."""

import os
import sys

import pytest
from jobs import RUN, Job, command

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
DRY = (*RUN, "run.dir=run", "dry_run=true")
LEFT = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "192.0.2.1",
    "SLURM_MEM_PER_NODE": "7",
    "SLURM_EXPORT_ENV": "NONE",
}


def test_names_and_folders_of_any_letters(tmp_path):
    place = tmp_path / 'a, b="c" it\'s é 100%'
    place.mkdir()
    name = "a b=c,d/e 'f' é"
    flags = ["python", "-m", "skyrl.cli", "launch", "--slurm", "--name", name, "--sbatch=--comment=two words"]
    done = command(*flags, "--", "train", *DRY, cwd=place)
    assert done.returncode == 0, done.stderr
    job = Job(done.stdout.strip(), place, place / "logs" / f"a_b=c_d_e__f__é-{done.stdout.strip()}.out")
    assert job.end(120) == "COMPLETED" and "1 nodes x 1 ranks" in job.text(), job.text()


def test_what_shells_and_outer_jobs_leave_counts_no_more(tmp_path):
    """A place in another world, memory of an outer job; and three tasks on two nodes are three ranks."""
    job = Job.submit(tmp_path, "train.sbatch", *DRY, flags=("--nodes=2", "--ntasks=3"), **LEFT)
    assert job.end(120) == "COMPLETED", job.text()
    assert "3 ranks on 2 nodes (2 1)" in job.text() and "3 ranks" in job.text(), job.text()


def test_uneven_gpus_are_a_rank_each(tmp_path):
    flags = ("--nodes=2", "--nodelist=node1,node2", "--gpus=4", "--cpus-per-gpu=1")
    job = Job.submit(tmp_path, "train.sbatch", *DRY, flags=flags)
    assert job.end(120) == "COMPLETED" and "4 ranks on 2 nodes (3 1)" in job.text(), job.text()


def test_a_world_that_contradicts_the_step_is_refused(tmp_path):
    done = command("srun", "-n2", sys.executable, "-m", "skyrl.train", *DRY, cwd=tmp_path, RANK="0", WORLD_SIZE="1")
    assert done.returncode != 0 and "of 2 of srun, so 2 ranks would not know of each other" in done.stderr


def test_export_of_names_keeps_what_setup_sets(tmp_path):
    setup = tmp_path / "set up.sh"
    paths = os.pathsep.join(filter(None, command("printenv", "PYTHONPATH", cwd=tmp_path).stdout.split()))
    setup.write_text(f"export PYTHONPATH={paths}\n")
    names = ("--export=SKYRL_SETUP,SKYRL_PYTHON,PATH,SLURM_CONF", "--nodes=2", "--ntasks-per-node=1")
    job = Job.submit(tmp_path, "train.sbatch", *DRY, flags=names, SKYRL_SETUP=str(setup))
    assert job.end(120) == "COMPLETED" and "2 nodes x 1 ranks" in job.text(), job.text()
