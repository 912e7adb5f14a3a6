"""Checks of this machine: versions, GPUs, cores, memory, limits, the disk of the runs, caches."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import resource
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from skyrl.launch import machine
from skyrl.launch.doctor import Finding, fail, ok, warn
from skyrl.launch.rank import CACHES
from skyrl.types import UserError

GIB = 2**30
TORCH_SECONDS = 45
SYNCS, SLOW_SYNC_SECONDS, SLOW_RENAME_SECONDS = 20, 0.05, 0.05
LEAST_FREE, LEAST_SHM, LEAST_FILES, LEAST_PROCESSES = 10 * GIB, GIB // 4, 4096, 4096
SHARED = (
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "cephfs",
    "ceph",
    "wekafs",
    "panfs",
    "fuse.sshfs",
    "9p",
    "virtiofs",
)
TORCH = """
import json, torch
out = {"version": torch.__version__, "cuda": torch.version.cuda, "count": torch.cuda.device_count()}
out["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
for index in range(out["count"]):
    x = torch.randn(512, 512, device=f"cuda:{index}", dtype=torch.float32)
    error = (x @ x - (x.double() @ x.double()).float()).abs().max().item()
    out.setdefault("errors", []).append(error)
print(json.dumps(out))
"""


def versions() -> list[Finding]:
    """Python and the packages, against what this skyrl asks for."""
    found = [ok("python", f"{platform.python_version()}, {sys.executable}")]
    try:
        wanted = [Requirement(text) for text in requires("skyrl") or ()]
    except PackageNotFoundError:
        return [
            *found,
            warn("packages", "skyrl is not installed, only on the path", "pip install -e . checks versions"),
        ]
    seen, wrong = [], []
    for one in wanted:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            have = version(one.name)
        except PackageNotFoundError:
            wrong.append(f"{one.name} is missing")
            continue
        seen.append(f"{one.name} {have}")
        if not one.specifier.contains(have, prereleases=True):
            wrong.append(f"{one.name} {have}, wanted {one.specifier}")
    if wrong:
        return [*found, fail("packages", "; ".join(wrong), "make install, or pip install -c constraints.txt -e .")]
    return [*found, ok("packages", ", ".join(seen))]


def gpus() -> list[Finding]:
    """What nvidia-smi lists, what torch sees, and a product on each GPU against float64."""
    try:
        listed = machine.query_gpus()
    except UserError as error:
        return [fail("gpus", str(error), "use another node, and tell who runs this one")]
    visible, count = machine.visible_gpus(listed)
    try:
        done = subprocess.run([sys.executable, "-c", TORCH], capture_output=True, text=True, timeout=TORCH_SECONDS)
    except subprocess.TimeoutExpired:
        return [fail("torch", f"no answer within {TORCH_SECONDS} s", "a driver or a disk hangs; use another node")]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return [fail("torch", f"ended with {done.returncode}: {last[:200]}", "install torch again, or mend the driver")]
    told = json.loads(done.stdout)
    return list(_gpu_findings(visible, count, told))


def _gpu_findings(visible: Sequence[machine.Gpu], count: int, told: dict) -> list[Finding]:
    build = f"{told['version']}, CUDA {told['cuda']}, NCCL {told['nccl']}" if told["cuda"] else told["version"]
    if told["count"] < count:
        seen = f"{build}: sees {told['count']} of {count} GPUs"
        return [fail("torch", seen, "install a torch with CUDA that fits the driver (nvidia-smi shows it)")]
    found = [ok("torch", build)]
    if not count:
        return [*found, ok("gpus", "none; runs use the CPU")]
    names = sorted({f"{gpu.name}, {gpu.memory_mib / 1024:.0f} GiB" for gpu in visible})
    seen = f"{count} x {'; '.join(names) or 'unnamed'}"
    wrong = [str(i) for i, error in enumerate(told.get("errors", ())) if not error < 1.0]  # NaN is wrong too
    if wrong:
        return [*found, fail("gpus", f"{seen}: wrong products on {', '.join(wrong)}", "leave these GPUs out")]
    if len(names) > 1:
        return [*found, warn("gpus", seen, "different GPUs in one job wait for the slowest; ask for one kind")]
    return [*found, ok("gpus", seen)]


def cpus() -> list[Finding]:
    """Cores that this process may use, against those of the machine, the cgroup and Slurm."""
    found = machine.look()
    allowed, here = len(found.cpus), os.cpu_count() or 1
    seen = f"{len(found.cores)} cores, {allowed} of {here} CPUs allowed"
    if found.quota is not None and found.quota < allowed:
        seen += f", the cgroup gives {found.quota:g}"
        todo = f"libraries that count CPUs start {allowed} threads; set OMP_NUM_THREADS={int(found.quota) or 1}"
        return [warn("cpus", seen, todo)]
    slurm = os.environ.get("SLURM_CPUS_ON_NODE", "")
    if slurm.isdecimal() and int(slurm) < allowed:
        todo = "Slurm does not bind here: use skyrl-tx launch, which gives each rank its share, or set OMP_NUM_THREADS"
        return [warn("cpus", f"{seen}; this job has {slurm}", todo)]
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) > allowed:
        return [warn("cpus", f"{seen}; OMP_NUM_THREADS={threads}", "unset OMP_NUM_THREADS, or lower it")]
    if found.visible_gpus and len(found.cores) < 2 * found.visible_gpus:
        todo = "ask for more, --cpus-per-task: environments and packing need at least 2 cores a GPU"
        return [warn("cpus", f"{seen} for {found.visible_gpus} GPUs", todo)]
    return [ok("cpus", seen)]


def memory() -> list[Finding]:
    """Main memory that is free, the cgroup's limit, and /dev/shm, which NCCL and data loaders use."""
    facts = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.M))
    total, free = (int(facts.get(name, "0")) * 1024 for name in ("MemTotal", "MemAvailable"))
    seen = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    limits = [int(t) for t in (_read("/sys/fs/cgroup/memory.max").strip(), _read(_V1_LIMIT).strip()) if t.isdecimal()]
    limit = min(limits, default=total)
    if 0 < limit < total:
        seen += f", the cgroup gives {limit / GIB:.1f}"
    least = warn("memory", seen, "end what else runs here, or ask for more memory")
    found = [least if min(free, limit) < 2 * GIB else ok("memory", seen)]
    try:
        size = shutil.disk_usage("/dev/shm")
    except OSError:
        return [*found, fail("shared memory", "no /dev/shm", "mount it; in a container --shm-size=8g or --ipc=host")]
    seen = f"/dev/shm {size.free / GIB:.2f} of {size.total / GIB:.2f} GiB free"
    if size.free < LEAST_SHM:
        todo = "NCCL needs it between GPUs of a node; in a container --shm-size=8g or --ipc=host"
        return [*found, warn("shared memory", seen, todo)]
    return [*found, ok("shared memory", seen)]


_V1_LIMIT = "/sys/fs/cgroup/memory/memory.limit_in_bytes"


def limits() -> list[Finding]:
    """Open files, processes, locked memory (for InfiniBand), core dumps."""
    found = []
    for name, what, least, todo in (
        ("open files", resource.RLIMIT_NOFILE, LEAST_FILES, "ulimit -n 65536 before the start"),
        ("processes", resource.RLIMIT_NPROC, LEAST_PROCESSES, "ulimit -u 65536, or ask who runs the cluster"),
    ):
        soft, hard = resource.getrlimit(what)
        seen = f"{_limit(soft)} (at most {_limit(hard)})"
        found.append(warn(name, seen, todo) if 0 <= soft < least else ok(name, seen))
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY and list(Path("/sys/class/infiniband").glob("*")):
        todo = "InfiniBand needs ulimit -l unlimited; ask who runs the cluster (slurmd: LimitMEMLOCK=infinity)"
        found.append(fail("locked memory", _limit(soft), todo))
    core, _ = resource.getrlimit(resource.RLIMIT_CORE)
    if core:
        found.append(warn("core dumps", _limit(core), "ulimit -c 0: a dump of one rank can fill the disk"))
    return found


def disk(folder: Path) -> list[Finding]:
    """Free space, kind, locks, and the time of a small synced write and of a rename where runs are kept."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    scratch = place / f".skyrl-doctor-{secrets.token_hex(4)}"
    try:
        scratch.mkdir()
    except OSError as error:
        return [fail("disk", f"{place}: {error.strerror}", "give a folder that you may write to")]
    try:
        return _disk_findings(place, scratch)
    except OSError as error:
        return [fail("disk", f"{place}: {error.strerror}", "free some space, or give another folder")]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _disk_findings(place: Path, scratch: Path) -> list[Finding]:
    kind, free = file_system(place), shutil.disk_usage(place).free
    where = f"{place} ({kind or 'unknown'}{', shared' if kind in SHARED else ''})"
    seen = f"{where}: {free / GIB:.0f} GiB free"
    found = [ok("disk", seen) if free >= LEAST_FREE else warn("disk", seen, "checkpoints need space; free some")]
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
    slow = sync > SLOW_SYNC_SECONDS or rename > SLOW_RENAME_SECONDS
    todo = "a slow file server: keep checkpoint.async_save, save less often (checkpoint.every_steps)"
    found.append(warn("disk speed", seen, todo) if slow else ok("disk speed", seen))
    handle = os.open(scratch / "final", os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found.append(ok("disk locks", "work"))
    except OSError as error:
        todo = "nothing keeps a second run out of a run folder here; never start the same run twice"
        found.append(warn("disk locks", str(error.strerror), todo))
    finally:
        os.close(handle)
    return found


def caches() -> list[Finding]:
    """Where compiled kernels go: a shared file system makes ranks on other nodes fail or wait."""
    home = Path.home()
    places = {"TRITON_CACHE_DIR": home / ".triton", **dict.fromkeys(("TORCH_EXTENSIONS_DIR", "CUDA_CACHE_PATH"), home)}
    shared = []
    for variable in CACHES:
        place = Path(os.environ.get(variable) or places.get(variable, Path("/tmp")))
        while not place.exists():
            place = place.parent
        if file_system(place) in SHARED:
            shared.append(f"{variable} ({place})")
    if not shared:
        return [ok("kernel caches", "on this node")]
    todo = "skyrl-tx launch and the batch scripts move them; without these, set SKYRL_LOCAL_CACHE=/tmp/..."
    return [warn("kernel caches", f"on a shared file system: {', '.join(shared)}", todo)]


def file_system(path: Path) -> str:
    """The kind of file system of a path that exists, as the kernel names it; "" where it does not say."""
    device, best = os.stat(path).st_dev, ""
    for line in _read("/proc/self/mountinfo").splitlines():
        front, _, back = line.partition(" - ")
        major, _, minor = front.split()[2].partition(":")
        if os.makedev(int(major), int(minor)) == device:
            best = back.split()[0]
    return best


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
