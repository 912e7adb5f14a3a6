"""Checks of what lies between machines: network, a collective over two processes, Slurm, clocks."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from skyrl.distributed import env as slurm_env
from skyrl.launch import machine
from skyrl.launch.doctor import Finding, fail, ok, warn
from skyrl.types import UserError

COLLECTIVE_SECONDS, SLURM_SECONDS = 45, 20
MAX_SKEW, MAX_FILE_SKEW = 2.0, 2.0
COLLECTIVE = """
import sys, time, datetime, torch, torch.distributed as dist
backend, rank, size, file = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
if backend == "nccl":
    torch.cuda.set_device(device)
limit = datetime.timedelta(seconds=30)
store = dist.TCPStore("127.0.0.1", int(file), size, is_master=rank == 0, timeout=limit)
dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
x = torch.arange(2**20, dtype=torch.float32, device=device) + rank
dist.all_reduce(x)
right = bool((x == size * torch.arange(2**20, device=device) + size * (size - 1) / 2).all())
begun = time.perf_counter()
for _ in range(5):
    dist.all_reduce(x)
if backend == "nccl":
    torch.cuda.synchronize()
seconds = (time.perf_counter() - begun) / 5
if rank == 0:
    print(int(right), seconds)
dist.destroy_process_group()
"""


def network(root: Path = Path("/sys/class/net")) -> list[Finding]:
    """Interfaces that are up, what NCCL and gloo are told to use, and whether this host's name means an address."""
    up = []
    for place in sorted(root.glob("*")):
        name = place.name
        if name == "lo" or _text(place / "operstate") not in ("up", "unknown"):
            continue
        speed = _text(place / "speed")
        fast = f" {int(speed) / 1000:g} Gb/s" if re.fullmatch(r"\d+", speed) else ""
        up.append(f"{name}{fast} mtu {_text(place / 'mtu') or '?'}")
    infiniband = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    seen = ", ".join(up + infiniband) or "loopback alone"
    found = [ok("interfaces", seen) if up else warn("interfaces", seen, "one node is all that works")]
    names = {name for _, name in socket.if_nameindex()}
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        chosen = os.environ.get(variable, "")
        if chosen and not chosen.startswith("^") and not any(n.startswith(chosen.lstrip("=")) for n in names):
            seen = f"{variable}={chosen}: no such interface; there are {', '.join(sorted(names))}"
            found.append(fail("interface chosen", seen, f"unset {variable}, or give one of these"))
    host = socket.gethostname()
    try:
        addresses = sorted({str(info[4][0]) for info in socket.getaddrinfo(host, None)})
    except OSError:
        todo = "gloo asks for it: add it to /etc/hosts, or set GLOO_SOCKET_IFNAME"
        return [*found, fail("host name", f"{host} has no address", todo)]
    if all(a.startswith("127.") or a == "::1" for a in addresses):
        todo = "other nodes cannot reach that: set GLOO_SOCKET_IFNAME to the interface between nodes"
        return [*found, warn("host name", f"{host} is {', '.join(addresses)}", todo)]
    return [*found, ok("host name", f"{host} is {', '.join(addresses)}")]


def collective() -> list[Finding]:
    """A sum over two processes: gloo always, NCCL where there are two GPUs."""
    found = [_collective("gloo")]
    try:
        _, count = machine.visible_gpus(machine.query_gpus())
    except UserError:
        return found  # told by gpus()
    return [*found, _collective("nccl")] if count > 1 else found


def _collective(backend: str) -> Finding:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    ranks = []
    for rank in range(2):
        command = [sys.executable, "-c", COLLECTIVE, backend, str(rank), "2", str(port)]
        ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    until, outputs = time.monotonic() + COLLECTIVE_SECONDS, []
    todo = (
        "set GLOO_SOCKET_IFNAME to an interface that is up (lo for one node)"
        if backend == "gloo"
        else "NCCL_DEBUG=INFO says more; NCCL_P2P_DISABLE=1 tells a broken link from a broken install"
    )
    try:
        for process in ranks:
            outputs.append(process.communicate(timeout=max(0.1, until - time.monotonic())))
    except subprocess.TimeoutExpired:
        return fail(backend, f"two processes did not meet within {COLLECTIVE_SECONDS} s", todo)
    finally:
        for process in ranks:
            process.kill()
    for process, (_, errors) in zip(ranks, outputs, strict=True):
        if process.returncode:
            return fail(backend, (errors.strip().splitlines() or ["ended without a word"])[-1][:200], todo)
    right, seconds = outputs[0][0].split()
    if right != "1":
        return fail(backend, "a sum over two processes is wrong", todo)
    return ok(backend, f"two processes; a sum of 4 MiB takes {1e3 * float(seconds):.1f} ms")


def slurm() -> list[Finding]:
    """Whether batch jobs can be sent, and whether they may be queued again after a stop."""
    if shutil.which("sbatch") is None:
        return [ok("slurm", "not here")]
    told = _run(["scontrol", "show", "config"])
    if told is None:
        todo = "sbatch would not work from here either; try another login node"
        return [fail("slurm", "the controller does not answer", todo)]
    options = dict(re.findall(r"^(\w+)\s+= (.*?)\s*$", told, re.M))
    seen = f"{options.get('SLURM_VERSION', '?')}, cluster {options.get('ClusterName', '?')}"
    if slurm_env.in_step() or slurm_env.in_allocation():
        seen += f", job {os.environ['SLURM_JOB_ID']} on {os.environ.get('SLURM_JOB_NODELIST', '?')}"
    found = [ok("slurm", seen)]
    if options.get("JobRequeue") == "0":
        found.append(ok("requeue", "off by default here; our batch scripts ask for it"))
    wait = options.get("KillWait", "").split()
    if wait and wait[0].isdecimal() and int(wait[0]) < 30:
        todo = "a run that is cancelled or at its limit has that long to save; keep --signal=USR1@180"
        found.append(warn("kill wait", f"{wait[0]} s", todo))
    return found


def clocks(folder: Path) -> list[Finding]:
    """This node's clock against the file server's, and against the other nodes of a Slurm job."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    found = []
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".skyrl-doctor-") as file:
            before = time.time()
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
            skew = max(before - os.stat(file.name).st_mtime, os.stat(file.name).st_mtime - time.time(), 0.0)
        seen = f"{skew:.1f} s from the file server's"
        todo = "resumes compare times of files: ask who runs the cluster to mend time service"
        found.append(warn("clock", seen, todo) if skew > MAX_FILE_SKEW else ok("clock", seen))
    except OSError:
        pass  # told by disk()
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    if nodes == 1 or not (slurm_env.in_allocation() or slurm_env.in_step()):
        return found
    return [*found, _node_clocks(nodes)]


def _node_clocks(nodes: int) -> Finding:
    before = time.time()
    command = ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "date", "+%s.%N"]
    told = _run(command)
    after = time.time()
    times = [float(line) for line in (told or "").split() if re.fullmatch(r"\d+\.\d+", line)]
    if len(times) < nodes:
        return fail("clocks", f"{len(times)} of {nodes} nodes answered", "leave that node out (--exclude)")
    skew = max(max(times) - after, before - min(times), 0.0)
    seen = f"{nodes} nodes; at most {max(skew, max(times) - min(times)):.1f} s apart"
    if skew > MAX_SKEW:
        return warn("clocks", seen, "deadlines are seen at different times: mend time service on the nodes")
    return ok("clocks", seen)


def _run(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # the speed of an interface that is down, or has none
        return ""
