"""`skyrl-tx doctor`: what is wrong with this machine, in under a minute, before a job waits in a queue for it.

Each check yields findings: ok, warn or fail, what was seen, what to do. Nothing is changed, and the only files written
are below the folder that is looked at, and removed again.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

from skyrl.args import Parser, path_arg
from skyrl.distributed import network as net
from skyrl.distributed.place import in_allocation, in_step
from skyrl.files import text_of
from skyrl.launch import machine
from skyrl.launch.hosts import free_port
from skyrl.launch.rank import cache_folders
from skyrl.types import UserError

GIB = 2**30
TORCH_SECONDS, COLLECTIVE_SECONDS, SLURM_SECONDS = 45, 45, 20
SYNCS, SLOW_SYNC_SECONDS, SLOW_RENAME_SECONDS = 20, 0.05, 0.05
LEAST_FREE, LEAST_SHM, LEAST_FILES, LEAST_PROCESSES = 10 * GIB, GIB // 4, 4096, 4096
MAX_FILE_SKEW = 2.0
WIDTH = len("interface chosen")  # the longest name of a check
SHARED = "nfs nfs4 lustre gpfs beegfs cephfs ceph wekafs panfs fuse.sshfs 9p virtiofs".split()
CGROUP_MEMORY = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # version 2, version 1
TORCH = """
import json, torch
from skyrl.planner.device import choose, look
from skyrl.types import UserError
facts = look("auto", 0)
out = {"version": facts.torch, "cuda": facts.cuda, "count": facts.count, "nccl": facts.nccl}
try:
    out["notes"] = choose("auto", "auto", facts).notes
    for index in range(out["count"]):
        x = torch.randn(512, 512, device=f"cuda:{index}", dtype=torch.float32)
        error = (x @ x - (x.double() @ x.double()).float()).abs().max().item()
        out.setdefault("errors", []).append(error)
except UserError as error:
    out["refused"] = str(error)
print(json.dumps(out))
"""
COLLECTIVE = """
import sys, time, datetime, torch, torch.distributed as dist
backend, rank, size, file = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
if backend == "nccl":
    torch.cuda.set_device(device)
limit = datetime.timedelta(seconds=30)
dist.init_process_group(backend, f"tcp://127.0.0.1:{file}", rank=rank, world_size=size, timeout=limit)
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


@dataclass(frozen=True)
class Finding:
    """One line: `status` is ok, warn (works, slower or riskier) or fail (a run would not work)."""

    check: str
    status: str
    seen: str
    todo: str = ""


Findings = Iterator[Finding]


def warn_unless(good: bool, check: str, seen: str, todo: str) -> Finding:
    """ok, or warn with what to do."""
    return Finding(check, "ok", seen) if good else Finding(check, "warn", seen, todo)


def doctor(args: Sequence[str]) -> int:
    """Runs the command line; 0, or 1 when a check failed."""
    p = Parser(prog="skyrl-tx doctor", description="Checks this machine; 1 when a check fails.")
    p.add_argument(
        "folder", nargs="?", default="runs", type=path_arg, help="folder for runs, to see how fast it is (runs)"
    )
    p.add_argument("--json", action="store_true", help="for programs")
    flags = p.parse_args(list(args))
    begun = time.monotonic()
    checks: list[Callable[[], Findings]] = [versions, cpus, memory, limits, partial(disk, flags.folder), caches]
    checks += [network, partial(clocks, flags.folder), slurm, gpus, collective]
    findings: list[Finding] = []
    with ThreadPoolExecutor(4) as pool:
        # The slow ones, which are last, begin first; each is shown when those before it are.
        running = [pool.submit(lambda check: list(check()), check) for check in reversed(checks)]
        for found in reversed(running):
            findings += found.result()
            if not flags.json and found.result():
                print(text(found.result()), flush=True)
    seconds = time.monotonic() - begun
    failed = sum(finding.status == "fail" for finding in findings)
    if flags.json:
        report = {"host": socket.gethostname(), "ok": not failed, "seconds": round(seconds, 2)}
        print(json.dumps({**report, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        warned = sum(finding.status == "warn" for finding in findings)
        print(f"{len(findings)} findings, warnings: {warned}, failures: {failed}, {seconds:.1f} s")
    return 1 if failed else 0


def text(findings: Sequence[Finding]) -> str:
    """The findings for a person, what to do below what was seen."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<4}  {finding.check:<{WIDTH}}  {finding.seen}")
        if finding.todo:
            lines.append(f"{'':<{WIDTH + 6}}  -> {finding.todo}")
    return "\n".join(lines)


# ---- this machine


def versions() -> Findings:
    """Python and the packages, against what this skyrl asks for."""
    yield Finding("python", "ok", f"{platform.python_version()}, {sys.executable}")
    try:
        wanted = [Requirement(text) for text in requires("skyrl-spmd") or ()]
    except PackageNotFoundError:
        seen = "skyrl is not installed, only on the path"
        yield Finding("packages", "warn", seen, "pip install -e . checks versions")
        return
    found: list[str] = []
    wrong: list[str] = []
    for one in wanted:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            have = version(one.name)
        except PackageNotFoundError:
            wrong.append(f"{one.name} is missing")
            continue
        found.append(f"{one.name} {have}")
        if not one.specifier.contains(have, prereleases=True):
            wrong.append(f"{one.name} {have}, wanted {one.specifier}")
    if wrong:
        yield Finding("packages", "fail", "; ".join(wrong), "make install, or pip install -c constraints.txt -e .")
    else:
        yield Finding("packages", "ok", ", ".join(found))


def gpus() -> Findings:
    """What nvidia-smi lists, what torch sees, and a product on each GPU against float64."""
    try:
        visible, count = machine.visible_gpus(machine.query_gpus())
    except UserError as error:
        yield Finding("gpus", "fail", str(error), "use another node, and tell who runs this one")
        return
    try:
        done = subprocess.run([sys.executable, "-c", TORCH], capture_output=True, text=True, timeout=TORCH_SECONDS)
    except subprocess.TimeoutExpired:
        todo = "a driver or a disk hangs; use another node"
        yield Finding("torch", "fail", f"no answer within {TORCH_SECONDS} s", todo)
        return
    if done.returncode:
        seen = f"ended with {done.returncode}: {_last_line(done.stderr)}"
        yield Finding("torch", "fail", seen, "install torch again, or mend the driver")
        return
    yield from check_gpus(visible, count, json.loads(done.stdout))


def check_gpus(visible: Sequence[machine.Gpu], count: int, torch: dict[str, Any]) -> Findings:
    """Whether `torch` (what TORCH printed) sees all `count` devices, multiplies right, and they are of one kind."""
    build = torch["version"] + (f", CUDA {torch['cuda']}, NCCL {torch['nccl'] or 'not asked'}" if torch["cuda"] else "")
    if refused := torch.get("refused", ""):  # as a run would be
        seen, _, todo = refused.partition("; ")
        yield Finding("torch", "fail", f"{build}: {seen}", todo)
        return
    if torch["count"] < count:
        seen = f"{build}: sees {torch['count']} of {count} GPUs"
        yield Finding("torch", "fail", seen, "install a torch with CUDA that fits the driver (nvidia-smi shows it)")
        return
    notes = "; ".join(torch.get("notes", ()))
    yield warn_unless(not notes, "torch", build, notes)
    if not count:
        yield Finding("gpus", "ok", "none; runs use the CPU")
        return
    names = sorted({f"{gpu.name}, {gpu.memory_mib / 1024:.0f} GiB" for gpu in visible})
    seen = f"{count} x {'; '.join(names) or 'unnamed'}"
    wrong = [str(i) for i, error in enumerate(torch.get("errors", ())) if not error < 1.0]  # NaN is wrong too
    if wrong:
        yield Finding("gpus", "fail", f"{seen}: wrong products on {', '.join(wrong)}", "leave these GPUs out")
    else:
        todo = "different GPUs in one job wait for the slowest; ask for one kind"
        yield warn_unless(len(names) <= 1, "gpus", seen, todo)


def cpus() -> Findings:
    """Cores that this process may use, against those of the machine, the cgroup and Slurm."""
    found = machine.look()
    allowed = len(found.cpus)
    seen = f"{len(found.cores)} cores, {allowed} of {os.cpu_count() or 1} CPUs allowed"
    slurm, threads, todo = os.environ.get("SLURM_CPUS_ON_NODE", ""), os.environ.get("OMP_NUM_THREADS", ""), ""
    if found.quota is not None and found.quota < allowed:
        seen += f", the cgroup gives {found.quota:g}"
        todo = f"libraries that count CPUs start {allowed} threads; set OMP_NUM_THREADS={int(found.quota) or 1}"
    elif slurm.isdecimal() and int(slurm) < allowed:
        seen += f"; this job has {slurm}"
        todo = "Slurm does not bind here: use skyrl-tx launch, which gives each rank its share, or set OMP_NUM_THREADS"
    elif threads.isdecimal() and int(threads) > allowed:
        seen += f"; OMP_NUM_THREADS={threads}"
        todo = "unset OMP_NUM_THREADS, or lower it"
    elif found.visible_gpus and len(found.cores) < 2 * found.visible_gpus:
        seen += f" for {found.visible_gpus} GPUs"
        todo = "ask for more, --cpus-per-task: environments and packing need at least 2 cores a GPU"
    yield warn_unless(not todo, "cpus", seen, todo)


def memory() -> Findings:
    """Main memory that is free, the cgroup's limit, and /dev/shm, which NCCL and data loaders use."""
    found = psutil.virtual_memory()
    seen = f"{found.available / GIB:.1f} of {found.total / GIB:.1f} GiB free"
    limit = min((int(t) for t in map(text_of, map(Path, CGROUP_MEMORY)) if t.isdecimal()), default=found.total)
    if 0 < limit < found.total:
        seen += f", the cgroup gives {limit / GIB:.1f}"
    enough = min(found.available, limit) >= 2 * GIB
    yield warn_unless(enough, "memory", seen, "end what else runs here, or ask for more memory")
    try:
        size = shutil.disk_usage("/dev/shm")
    except OSError:
        todo = "mount it; in a container --shm-size=8g or --ipc=host"
        yield Finding("shared memory", "fail", "no /dev/shm", todo)
        return
    seen = f"/dev/shm {size.free / GIB:.2f} of {size.total / GIB:.2f} GiB free"
    todo = "NCCL needs it between GPUs of a node; in a container --shm-size=8g or --ipc=host"
    yield warn_unless(size.free >= LEAST_SHM, "shared memory", seen, todo)


def limits() -> Findings:
    """Open files, processes, locked memory (for InfiniBand), core dumps."""
    for name, what, least, todo in (
        ("open files", resource.RLIMIT_NOFILE, LEAST_FILES, "ulimit -n 65536 before the start"),
        ("processes", resource.RLIMIT_NPROC, LEAST_PROCESSES, "ulimit -u 65536, or ask who runs the cluster"),
    ):
        soft, hard = resource.getrlimit(what)
        yield warn_unless(not 0 <= soft < least, name, f"{_limit(soft)} (at most {_limit(hard)})", todo)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY and _infiniband():
        todo = "InfiniBand needs ulimit -l unlimited; ask who runs the cluster (slurmd: LimitMEMLOCK=infinity)"
        yield Finding("locked memory", "fail", _limit(soft), todo)
    core, _ = resource.getrlimit(resource.RLIMIT_CORE)
    if core:
        yield Finding("core dumps", "warn", _limit(core), "ulimit -c 0: a dump of one rank can fill the disk")


def disk(folder: Path) -> Findings:
    """Free space, kind, locks, and the time of a small synced write and of a rename where runs are kept."""
    place = existing(folder.absolute())
    scratch = place / f".skyrl-doctor-{secrets.token_hex(4)}"
    try:
        scratch.mkdir()
    except OSError as error:
        yield Finding("disk", "fail", f"{place}: {error.strerror}", "give a folder that you may write to")
        return
    try:
        yield from _disk_findings(place, scratch)
    except OSError as error:
        yield Finding("disk", "fail", f"{place}: {error.strerror}", "free some space, or give another folder")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _disk_findings(place: Path, scratch: Path) -> Findings:
    kind, free = file_system(place), shutil.disk_usage(place).free
    where = f"{place} ({kind or 'unknown'}{', shared' if kind in SHARED else ''})"
    todo = "checkpoints need space; free some"
    yield warn_unless(free >= LEAST_FREE, "disk", f"{where}: {free / GIB:.0f} GiB free", todo)
    syncs, renames = [], []
    for number in range(SYNCS):
        target = scratch / str(number)
        begun = time.perf_counter()
        with open(target, "wb") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
        between = time.perf_counter()
        os.replace(target, scratch / "final")
        syncs.append(between - begun)
        renames.append(time.perf_counter() - between)
    sync, rename = sorted(syncs)[SYNCS // 2], sorted(renames)[SYNCS // 2]
    seen = f"synced write {1e3 * sync:.1f} ms (worst {1e3 * max(syncs):.0f}), rename {1e3 * rename:.2f} ms"
    todo = "a slow file server: keep checkpoint.async_save, save less often (checkpoint.every_steps)"
    yield warn_unless(sync <= SLOW_SYNC_SECONDS and rename <= SLOW_RENAME_SECONDS, "disk speed", seen, todo)
    with open(scratch / "final", "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield Finding("disk locks", "ok", "work")
        except OSError as error:
            todo = "nothing keeps a second run out of a run folder here; never start the same run twice"
            yield Finding("disk locks", "warn", str(error.strerror), todo)


def caches() -> Findings:
    """Where compiled kernels go: a shared file system makes ranks on other nodes fail or wait."""
    places = {variable: existing(folder) for variable, folder in cache_folders().items()}
    shared = [f"{variable} ({place})" for variable, place in places.items() if file_system(place) in SHARED]
    seen = f"on a shared file system: {', '.join(shared)}" if shared else "on this node"
    todo = "skyrl-tx launch and the batch scripts move them; without these, set SKYRL_LOCAL_CACHE=/tmp/..."
    yield warn_unless(not shared, "kernel caches", seen, todo)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next((place for place in (path, *path.parents) if place.exists()), path)


def file_system(path: Path) -> str:
    """The kind of file system that a path is on, as the kernel names it; "" where it does not say."""
    kind, longest = "", -1
    for mount in psutil.disk_partitions(all=True):  # in the order of mounting: a later one covers an earlier one
        if len(mount.mountpoint) >= longest and path.resolve().is_relative_to(mount.mountpoint):
            kind, longest = mount.fstype, len(mount.mountpoint)
    return kind


# ---- between machines


def network() -> Findings:
    """Interfaces that are up, what NCCL and gloo are told to use, and whether this host's name means an address."""
    up = [
        f"{name}{f' {one.speed / 1000:g} Gb/s' if one.speed else ''} mtu {one.mtu}"
        for name, one in sorted(psutil.net_if_stats().items())
        if one.isup and name != "lo"
    ]
    seen = ", ".join(up + _infiniband()) or "loopback alone"
    yield warn_unless(bool(up), "interfaces", seen, "one node is all that works")
    for variable in (net.GLOO, net.NCCL):
        if problem := net.interface_problem(variable):
            seen, _, todo = problem.rpartition("; ")
            yield Finding("interface chosen", "fail", seen, todo)
    host = socket.gethostname()
    try:
        addresses = sorted({str(info[4][0]) for info in socket.getaddrinfo(host, None)})
    except OSError:
        todo = "runs find the interface by themselves; other programs ask for the name: add it to /etc/hosts"
        yield Finding("host name", "warn", f"{host} has no address", todo)
        return
    reachable = not all(a.startswith("127.") or a == "::1" for a in addresses)
    todo = "other nodes cannot reach that; runs find the interface by themselves, other programs may not"
    yield warn_unless(reachable, "host name", f"{host} is {', '.join(addresses)}", todo)


def collective() -> Findings:
    """A sum over two processes: gloo always, NCCL where there are two GPUs."""
    yield _collective("gloo")
    try:
        _, count = machine.visible_gpus(machine.query_gpus())
    except UserError:
        return  # gpus() says it
    if count > 1:
        yield _collective("nccl")


def _collective(backend: str) -> Finding:
    port, ranks = free_port(os.getpid()), []
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
        return Finding(backend, "fail", f"two processes did not meet within {COLLECTIVE_SECONDS} s", todo)
    finally:
        for process in ranks:
            process.kill()
    for process, (_, errors) in zip(ranks, outputs, strict=True):
        if process.returncode:
            return Finding(backend, "fail", _last_line(errors), todo)
    right, seconds = outputs[0][0].split()
    if right != "1":
        return Finding(backend, "fail", "a sum over two processes is wrong", todo)
    return Finding(backend, "ok", f"two processes; a sum of 4 MiB takes {1e3 * float(seconds):.1f} ms")


def slurm() -> Findings:
    """Whether batch jobs can be sent, and whether they may be queued again after a stop."""
    if shutil.which("sbatch") is None:
        yield Finding("slurm", "ok", "not here")
        return
    answer = _run(["scontrol", "show", "config"])
    if answer is None:
        todo = "sbatch would not work from here either; try another login node"
        yield Finding("slurm", "fail", "the controller does not answer", todo)
        return
    options = dict(re.findall(r"^(\w+)\s+= (.*?)\s*$", answer, re.M))
    seen = f"{options.get('SLURM_VERSION', '?')}, cluster {options.get('ClusterName', '?')}"
    if in_step() or in_allocation():
        seen += f", job {os.environ['SLURM_JOB_ID']} on {os.environ.get('SLURM_JOB_NODELIST', '?')}"
    yield Finding("slurm", "ok", seen)
    if options.get("JobRequeue") == "0":
        yield Finding("requeue", "ok", "off by default here; our batch scripts ask for it")
    wait = options.get("KillWait", "").split()
    if wait and wait[0].isdecimal() and int(wait[0]) < 30:
        todo = "a run that is cancelled or at its limit has that long to save; keep --signal=USR1@180"
        yield Finding("kill wait", "warn", f"{wait[0]} s", todo)


def clocks(folder: Path) -> Findings:
    """This node's clock against the file server's, and against the other nodes of a Slurm job."""
    try:
        with tempfile.NamedTemporaryFile(dir=existing(folder.absolute()), prefix=".skyrl-doctor-") as file:
            before = time.time()
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
            changed = os.stat(file.name).st_mtime
            skew = max(before - changed, changed - time.time(), 0.0)
        todo = "resumes compare times of files: ask who runs the cluster to mend time service"
        yield warn_unless(skew <= MAX_FILE_SKEW, "clock", f"{skew:.1f} s from the file server's", todo)
    except OSError:
        pass  # disk() says it
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    if nodes > 1 and (in_allocation() or in_step()):
        yield _node_clocks(nodes)


def _node_clocks(nodes: int) -> Finding:
    before = time.time()
    command = ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "date", "+%s.%N"]
    answer = _run(command)
    after = time.time()
    times = [float(line) for line in (answer or "").split() if re.fullmatch(r"\d+\.\d+", line)]
    if len(times) < nodes:
        return Finding("clocks", "fail", f"{len(times)} of {nodes} nodes answered", "leave that node out (--exclude)")
    skew = max(max(times) - after, before - min(times), 0.0)
    seen = f"{nodes} nodes; at most {max(skew, max(times) - min(times)):.1f} s apart"
    todo = "deadlines are seen at different times: mend time service on the nodes"
    return warn_unless(skew <= net.MAX_SKEW, "clocks", seen, todo)


def _run(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _infiniband() -> list[str]:
    return sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))


def _last_line(errors: str) -> str:
    return (errors.strip().splitlines() or ["no message"])[-1][:200]


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)
