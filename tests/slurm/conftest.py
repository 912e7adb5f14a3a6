"""These tests need the Slurm of cluster.sh: make test-slurm."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from jobs import RUN, Job

# Each worker of pytest has a cluster of its own: what one test loses, preempts or cuts off, no other one needs.
if "SLURM_CONF" in os.environ:
    start, own = re.match(r"(.*-)(\d+)/slurm.conf$", os.environ["SLURM_CONF"]).groups()
    number = os.environ.get("PYTEST_XDIST_WORKER", f"gw{own}").removeprefix("gw")
    assert Path(f"{start}{number}/slurm.conf").exists(), f"no cluster for worker {number}: set SLURM_TEST_CLUSTERS"
    os.environ.update(SLURM_TEST_NUMBER=number, SLURM_CONF=f"{start}{number}/slurm.conf")


def pytest_collection_modifyitems(items):
    here = os.path.dirname(__file__)
    ready = os.environ.get("SLURM_CONF") and os.environ.get("SKYRL_TEST_SLURM") == "1"
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.slurm)
            if not ready:
                item.add_marker(pytest.mark.skip(reason="needs a Slurm for tests: make test-slurm"))


@pytest.fixture(autouse=True)
def nothing_stays():
    """Jobs of a test that has failed would take the nodes from the next one."""
    yield
    subprocess.run(["scancel", "--full", f"--user={os.getuid()}"], check=True, capture_output=True)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """An uninterrupted run on two nodes."""
    place = tmp_path_factory.mktemp("whole")
    job = Job.submit(place, "train.sbatch", *RUN, "run.dir=run", flags=("--nodes=2",))
    assert job.end() == "COMPLETED", job.text()
    assert "2 nodes x 1 ranks" in job.text() and "done: held-out accuracy" in job.text()
    return place / "run"
