"""Three nodes with a network and a disk each: what differs and what is lost is named; pauses are forgiven."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from jobs import ROOT, RUN, address, command, environment, queued, steps, until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]
CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"
HANG = 20  # run.hang_seconds; what is lost is named within this and some seconds
LONG = ["run.dir=run", "env.options.sleep=0.1", "batch.num_steps=1000", f"run.hang_seconds={HANG}"]


def place():
    """The folder of the cluster; `local` in it is another disk on each node, disk.node<k> from outside."""
    return Path(os.environ["SLURM_CONF"]).parent


def cluster(*args):
    subprocess.run(["bash", CLUSTER, *args], check=True)


def start(nodes):
    return ["srun", "--kill-on-bad-exit=0", f"-N{nodes}", f"-n{nodes}", "--time=10", "python", "-m", "skyrl.train"]


def srun(*args):
    return [*start(3), *RUN, *args]


def errors(text):
    return [line for line in text.splitlines() if line.startswith("skyrl: error: ")]


def process_of(rank):
    """The process of a rank of this cluster; all nodes share this machine's process numbers."""
    marks = {f"SLURM_PROCID={rank}", f"SLURM_CONF={os.environ['SLURM_CONF']}"}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"skyrl.train" in (folder / "cmdline").read_bytes():
                if marks <= {*(folder / "environ").read_bytes().decode().split("\0")}:
                    if (folder / "comm").read_text().startswith("python"):
                        return int(folder.name)
        except OSError:
            continue
    raise AssertionError(f"no process of rank {rank}")


@pytest.fixture
def run(tmp_path):
    """A run on three nodes that has learned some steps."""
    log = open(tmp_path / "log", "w")  # noqa: SIM115 - until the run has ended
    process = subprocess.Popen(srun(*LONG), cwd=tmp_path, env=environment(), stdout=log, stderr=subprocess.STDOUT)
    until(lambda: steps(tmp_path / "run") >= 5 or process.poll() is not None, 120)
    assert process.poll() is None, (tmp_path / "log").read_text()
    yield process, tmp_path / "log"
    subprocess.run(["scancel", "--full", "-u", "root"], env=environment())
    process.wait(60)
    log.close()


@pytest.mark.parametrize(
    ("loss", "mend", "lost"),
    [
        (("cut", "2"), ("mend", "2"), "rank 2"),
        (("cut", "0"), ("mend", "0"), "rank 0"),  # the store goes with it
        (("on", "1", "ip", "route", "add", "blackhole"), ("on", "1", "ip", "route", "del", "blackhole"), "rank "),
    ],
    ids=["node", "node of rank 0", "one direction of a link"],
)
def test_a_node_that_is_lost_is_named_in_time(run, loss, mend, lost):
    process, log = run
    if loss[0] == "on":
        loss, mend = (*loss, address("node2")), (*mend, address("node2"))
    begun = time.monotonic()
    cluster(*loss)
    try:
        until(lambda: errors(log.read_text()), 60)
        assert time.monotonic() - begun < HANG + 25
        line = errors(log.read_text())[0]
        assert line.startswith(f"skyrl: error: {lost}") and "cannot be reached from node" in line, line
    finally:
        cluster(*mend)


def test_a_process_that_is_lost_is_named_from_another_node(run):
    process, log = run
    pid = process_of(1)
    os.kill(pid, signal.SIGKILL)
    until(lambda: errors(log.read_text()), 60)
    assert f"rank 1 (process {pid} on node1): its process is gone" in errors(log.read_text())[0]


def test_a_store_that_stands_still_is_named(run):
    process, log = run
    pid = process_of(0)
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: len(errors(log.read_text())) >= 2, 100)
        assert "rank 0 on node0 or who started it does not answer any more" in errors(log.read_text())[0]
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_suspended_job_goes_on(tmp_path):
    """During a call of an environment, for longer than any of its deadlines."""
    options = ("env.options.sleep=0.5", "env.timeout_seconds=3", "run.hang_seconds=5", "run.dir=run")
    log = open(tmp_path / "log", "w")  # noqa: SIM115
    process = subprocess.Popen(srun(*options), cwd=tmp_path, env=environment(), stdout=log, stderr=subprocess.STDOUT)
    until(lambda: steps(tmp_path / "run") >= 4 or process.poll() is not None, 120)
    assert process.poll() is None, (tmp_path / "log").read_text()
    (job,) = queued(tmp_path)
    time.sleep(1.5)
    assert command("scontrol", "suspend", job, cwd=tmp_path).returncode == 0
    time.sleep(15)
    assert command("scontrol", "resume", job, cwd=tmp_path).returncode == 0
    assert process.wait(200) == 0, (tmp_path / "log").read_text()
    assert errors((tmp_path / "log").read_text()) == [] and steps(tmp_path / "run") == 10


def test_a_run_folder_on_disks_of_the_nodes_is_refused(tmp_path):
    done = command(*srun(f"run.dir={place() / 'local' / 'run'}"), cwd=tmp_path, timeout=150)
    assert done.returncode != 0 and "saved checkpoint" not in done.stdout
    line = errors(done.stderr)[0]
    assert "not one folder on all hosts: what rank 0 on node0 writes to" in line
    assert "is not there on ranks 1, 2 on node1, node2" in line


def test_data_that_differs_on_one_node_is_named(tmp_path):
    """On disks of their own data may lie, as long as it is the same."""
    data = [option for option in RUN if "letters" not in option and not option.startswith("eval.num")]
    data += ["env.name=gsm8k", f"data.path={place() / 'local' / 'train.jsonl'}", "run.dir=run", "eval.num_prompts=2"]

    def write(node, answer):
        rows = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(20)]
        text = "\n".join(json.dumps(row) for row in [*rows, {"question": "20 + 1?", "answer": f"#### {answer}"}])
        for name in ("train.jsonl", "test.jsonl"):
            (place() / f"disk.node{node}" / name).write_text(text + "\n")

    for node in range(3):
        write(node, "22" if node == 1 else "21")
    done = command(*start(3), *data, cwd=tmp_path, timeout=150)
    assert done.returncode != 0
    assert "the nodes are not alike: data.train is 21 prompts, " in errors(done.stderr)[0]
    assert "on rank 1 on node1, and 21 prompts, " in errors(done.stderr)[0]
    write(1, "21")
    done = command(*start(2), *data, cwd=tmp_path, timeout=150)
    assert done.returncode == 0, done.stderr
    assert sorted(json.loads((tmp_path / "run" / "versions.json").read_text())[-1]["hosts"]) == ["node0", "node1"]


def test_two_machines_by_hand(tmp_path):
    """The commands of docs/cluster.md, on two of the nodes."""
    text = (ROOT / "docs" / "cluster.md").read_text().split("## Two machines by hand")[1].split("## ")[0]
    lines = [line.strip().replace("10.0.0.1", address("node0")) for line in text.splitlines() if "torchrun" in line]
    cluster_is = {name: value for name, value in os.environ.items() if name.startswith("SLURM_TEST_")}
    env = environment(**cluster_is)
    options = [option for option in RUN if not option.startswith("run.dir")]
    nodes = [
        subprocess.Popen(
            ["bash", CLUSTER, "on", str(node), *line.split(), *options],
            cwd=tmp_path,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for node, line in enumerate(lines)
    ]
    said = [node.communicate(timeout=150)[0] for node in nodes]
    assert len(nodes) == 2 and [node.returncode for node in nodes] == [0, 0], said
    assert "done: held-out accuracy" in said[0] and steps(tmp_path / "run") == 10
