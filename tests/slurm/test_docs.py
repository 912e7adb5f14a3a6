"""The commands of docs/cluster.md and docs/survival.md that need a Slurm or several machines, run as they stand there.

What else pages show is checked by tests/config/test_pages.py. Where starting is what matters, ranks end as soon as they
have told their place: training on several nodes is what the other files here do.
"""

import os
import re
import subprocess

import pytest
from containers import box
from jobs import ROOT, RUN, Job, address, command, environment, steps, stops, until
from test_nodes import CLUSTER
from test_pages import blocks, commands

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
PAGES = ("docs/cluster.md", "docs/survival.md")
# Heading -> the test below that runs its block; by hand: tests/slurm/test_nodes.py::test_two_machines_by_hand.
TRIED = ("Clusters", "Slurm in ten minutes", "Two machines by hand", "Modules and containers", "What torchrun does")
STUB = """
import os, socket, sys
of = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"
if {"skyrl.launch.rank", "skyrl.train"} & {*sys.orig_argv}:
    rank, size = (os.environ.get(own) or os.environ[name] for own, name in zip(("RANK", "WORLD_SIZE"), of))
    os.write(1, f"rank {rank} of {size} on {socket.gethostname()}\\n".encode())
    os._exit(0)
"""


def typed(*headings):
    """(block, its commands) of the two pages' blocks that need a cluster or several machines; below these headings."""
    for block in blocks():
        page, _, line = block.where.partition(":")
        if page in PAGES and {"slurm", "hosts"} & {*block.needs} and not {"network", "minutes"} & {*block.needs}:
            above = (ROOT / page).read_text().splitlines()[: int(line)]
            heading = next(one for one in above[::-1] if re.match("#+ ", one)).lstrip("# ")
            if not headings or heading in headings:
                yield block, [words for words, _ in commands(block)]


@pytest.fixture
def ends_early(tmp_path, monkeypatch):
    """Ranks tell their place and end."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(STUB)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), environment()["PYTHONPATH"]])}


def places(text):
    return sorted(re.findall(r"^rank (\d+) of (\d+) on (\S+)$", text, re.M))


def job_of(place, done):
    """The job that sbatch or launch --slurm has told."""
    assert done.returncode == 0, done.stderr
    number = re.findall(r"\d+", done.stdout)[-1]
    until(lambda: list(place.rglob(f"*-{number}.out")), 60)
    return Job(number, place, next(place.rglob(f"*-{number}.out")))


def test_every_block_is_run_here():
    assert [block.where for block, _ in typed()] == [block.where for block, _ in typed(*TRIED)]
    assert len([*typed()]) == 6


def test_the_ways_to_start(ends_early, tmp_path):
    """Two nodes with four ranks each, four times."""
    for block, lines in typed("Clusters"):
        for words in lines if "slurm" in block.needs else ():
            done = command(*words, cwd=tmp_path, timeout=120, **ends_early)
            if words[0] == "sbatch" or "--slurm" in words:
                job = job_of(tmp_path, done)
                assert job.end() == "COMPLETED", job.text()
                told = places(job.text())
            else:
                told = places(done.stdout)
            assert [(int(rank), size) for rank, size, _ in told] == [(rank, "8") for rank in range(8)], done.stderr
            assert {host for _, _, host in told} == {"node0", "node1"}


def test_hosts_over_a_remote_shell(ends_early, tmp_path):
    """The remote shell is that of two of the nodes' networks; a has as many ranks as cores."""
    (tmp_path / "rsh").write_text(f'exec bash "{CLUSTER}" on $((${{1##*.}} - 10)) bash -c "$2"\n')
    ((_, (words,)),) = ((block, lines) for block, lines in typed("Clusters") if "hosts" in block.needs)
    assert words[:4] == ["skyrl-tx", "launch", "--hosts", "a,b:4"]
    words[3] = f"{address('node0')},{address('node1')}:4"
    words[2:2] = ["--rsh", f"bash {tmp_path}/rsh {{host}} {{line}}"]
    number = {"SLURM_TEST_NUMBER": os.environ["SLURM_TEST_NUMBER"]}
    done = command(*words, cwd=tmp_path, timeout=150, **ends_early, **number)
    cores = len(os.sched_getaffinity(0))
    told = [(int(rank), size) for rank, size, _ in places(done.stdout)]
    assert told == [(rank, str(cores + 4)) for rank in range(cores + 4)], done.stderr


def test_slurm_in_ten_minutes(tmp_path):
    """A run on three nodes through all of it: queued again, suspended, resumed, cancelled with a save."""
    run, log, tail = tmp_path / "run", tmp_path / "tail", None
    job = Job("", tmp_path, log)
    ((_, lines),) = typed("Slurm in ten minutes")

    def on_from(known):
        until(lambda: steps(run) > known + 2, 150, job)

    def again():
        return job.fact("Restarts") == "1" and "resuming from" in job.text()

    more = [*RUN, "batch.num_steps=1000", "env.options.sleep=0.1"]
    try:
        for words in lines:
            line = " ".join(words).replace("<job>", job.id)
            if words[1] == "launch":
                done = command(*words, *more, cwd=tmp_path)
                job = job_of(tmp_path, done)
                assert job.log == tmp_path / "logs" / f"three-{job.id}.out"
            elif words[0] == "tail":
                tail = subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=tmp_path, stdout=log.open("w"))
                until(lambda: "3 nodes x 1 ranks" in log.read_text() and steps(run) >= 5, 150, job)
            else:
                known = steps(run)
                done = command(*line.split(), cwd=tmp_path, timeout=150)
                assert done.returncode == 0 or words[0] == "skyrl-tx", done.stderr
            if "--signal=USR1" in words:
                until(again, 150, job)
                on_from(known)
            elif "suspend" in words:
                assert job.state() == "SUSPENDED"
            elif "resume" in words:
                on_from(known)
        assert job.end() == "CANCELLED"
        until(lambda: "saved, not queued again" in job.text(), 30, job)
        assert [stop["reason"] for stop in stops(run)] == ["SIGUSR1", "SIGTERM"] and (run / "requeue").exists()
        assert job.fact("Restarts") == "1"
    finally:
        if tail is not None:
            tail.kill()
            tail.wait()


def test_modules_and_containers(ends_early, tmp_path):
    """A module with the program, and an image of each kind."""
    ((block, (by_hand, by_launch)),) = typed("Modules and containers")
    found = box("apptainer", tmp_path / "apptainer")
    if found.real:
        pytest.skip("an image of one's own is needed: tests/slurm/test_containers.py makes one")
    (tmp_path / "skyrl.sif").touch()
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "apptainer").write_text(f"#%Module\nprepend-path PATH {found.folder}\n")
    env = {**ends_early, "MODULEPATH": str(tmp_path / "modules")}
    job = job_of(tmp_path, command(*by_hand, cwd=tmp_path, **env))
    assert job.end() == "COMPLETED" and places(job.text()), job.text()
    (tmp_path / "skyrl.sqsh").touch()
    done = command(*by_launch[:3], "--print", *by_launch[3:], cwd=tmp_path, **env)
    assert f"export SKYRL_CONTAINER={tmp_path}/skyrl.sqsh\nexport SKYRL_CONTAINER_RUNTIME=enroot\n" in done.stdout
    assert "export SKYRL_CONTAINER_ARGS='--mount /data:/data'\n" in done.stdout, done.stderr


def test_a_batch_script_around_torchrun(tmp_path):
    """That of survival.md: the stop file, since SIGUSR1 would kill torchrun."""
    ((block, _),) = typed("What torchrun does")
    options = " ".join([*RUN, "batch.num_steps=1000", "env.options.sleep=0.1"])
    text = block.text.replace(
        "torchrun ...", "python -m torch.distributed.run --nproc-per-node=1 --local-addr=127.0.0.1"
    )
    (tmp_path / "script").write_text("#!/bin/bash\n" + text.replace("run.name=mine", f"run.name=mine {options}"))
    done = command("sbatch", "--output=log-%j.out", "--time=10", "script", cwd=tmp_path)
    job, run = job_of(tmp_path, done), tmp_path / "runs" / "mine"
    until(lambda: steps(run) >= 5, 150, job)
    assert command("scancel", "--signal=USR1", "--batch", job.id, cwd=tmp_path).returncode == 0
    until(lambda: job.fact("Restarts") == "1", 60, job)
    assert command("scancel", job.id, cwd=tmp_path).returncode == 0
    assert [stop["reason"] for stop in stops(run)] == ["stop file"]
