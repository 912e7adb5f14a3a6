"""What this node has: GPUs, the CPUs this process may use, NUMA nodes, a cgroup's share; and which rank gets which.

Reads /proc, /sys and nvidia-smi only; no torch, so that a launcher answers at once and a GPU is left alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from skyrl.files import text_of
from skyrl.types import UserError

MAX_GPU_RANK_THREADS = 16  # a rank with a GPU packs rows and plays environments; more threads only cost memory
GPU_QUERY = "index,uuid,pci.bus_id,name,memory.total"
GPU_SECONDS = 20


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi tells it. `node` is its NUMA node, -1 where the machine does not say."""

    index: int
    uuid: str
    name: str
    memory_mib: int
    node: int = -1


@dataclass(frozen=True)
class Machine:
    """`gpus` are those this process sees, in CUDA's order; `visible_gpus` counts them also where nvidia-smi knows no
    single ones (MIG). `cores` are the hardware threads of each physical core, allowed ones only; `nodes` maps each
    allowed CPU to its NUMA node. `quota` is the cgroup's limit in CPUs, None without one."""

    gpus: tuple[Gpu, ...]
    visible_gpus: int
    cores: tuple[tuple[int, ...], ...]
    nodes: Mapping[int, int]
    quota: float | None = None

    @property
    def cpus(self) -> tuple[int, ...]:
        """Logical CPUs this process may use."""
        return tuple(sorted(cpu for core in self.cores for cpu in core))

    @property
    def usable_cores(self) -> int:
        """Physical cores, or the cgroup's share where that is less; at least 1."""
        return max(1, min(len(self.cores), int(self.quota) if self.quota else len(self.cores)))

    def describe(self) -> str:
        """One line for a person."""
        quota = f", the cgroup gives {self.quota:g} of them" if self.quota and self.quota < len(self.cpus) else ""
        numa = len(set(self.nodes.values()))
        names = sorted({gpu.name for gpu in self.gpus})
        gpus = f"{self.visible_gpus} GPUs ({', '.join(names) or 'unnamed'})" if self.visible_gpus else "no GPU"
        return f"{gpus}, {len(self.cores)} cores ({len(self.cpus)} CPUs{quota}), {numa} NUMA node{'s' * (numa != 1)}"


@dataclass(frozen=True)
class Share:
    """What one rank of a node gets: CPUs to stay on (() = all) and threads to compute with."""

    cpus: tuple[int, ...]
    threads: int


def look(sys_root: Path = Path("/sys"), environment: Mapping[str, str] = os.environ) -> Machine:
    """The machine as this process may use it: affinity, cgroup and CUDA_VISIBLE_DEVICES respected."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    gpus, count = visible_gpus(query_gpus(sys_root), environment)
    return Machine(
        gpus=gpus,
        visible_gpus=count,
        cores=cores_of(allowed, sys_root),
        nodes=nodes_of(allowed, sys_root),
        quota=cpu_quota(sys_root),
    )


def cpu_list(text: str) -> list[int]:
    """The CPUs of the kernel's notation, "0-3,8"; [] for an empty text."""
    found: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found += range(int(first), int(last or first) + 1)
    return found


def show_cpus(cpus: Sequence[int]) -> str:
    """The kernel's notation of some CPUs."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def cores_of(allowed: Sequence[int], sys_root: Path = Path("/sys")) -> tuple[tuple[int, ...], ...]:
    """The allowed CPUs grouped by physical core, in order; each CPU a core of its own where the kernel does not say."""
    left, cores = set(allowed), []
    for cpu in sorted(allowed):
        if cpu not in left:
            continue
        told = text_of(sys_root / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = tuple(sorted((set(cpu_list(told)) | {cpu}) & left))
        left -= set(core)
        cores.append(core)
    return tuple(cores)


def nodes_of(allowed: Sequence[int], sys_root: Path = Path("/sys")) -> dict[int, int]:
    """NUMA node of each allowed CPU; 0 where the kernel does not say."""
    nodes = dict.fromkeys(allowed, 0)
    for folder in sorted((sys_root / "devices/system/node").glob("node[0-9]*")):
        for cpu in cpu_list(text_of(folder / "cpulist")):
            if cpu in nodes:
                nodes[cpu] = int(folder.name[4:])
    return nodes


def cpu_quota(sys_root: Path = Path("/sys")) -> float | None:
    """CPUs that the cgroup of this process gives in the mean; None = no limit. Version 2, or version 1 of cgroups."""
    root = sys_root / "fs/cgroup"
    limits = []
    for line in text_of(Path("/proc/self/cgroup")).splitlines():
        _, kinds, path = line.split(":", 2)
        if not kinds:
            folder = root / path.lstrip("/")
            for place in (folder, *folder.parents):
                quota, _, period = text_of(place / "cpu.max").partition(" ")
                if quota.isdecimal() and period.isdecimal():
                    limits.append(int(quota) / int(period))
                if place == root:
                    break
        elif "cpu" in kinds.split(","):
            for place in (root / "cpu" / path.lstrip("/"), root / "cpu"):
                quota, period = text_of(place / "cpu.cfs_quota_us"), text_of(place / "cpu.cfs_period_us")
                if quota.isdecimal() and period.isdecimal():
                    limits.append(int(quota) / int(period))
    return min(limits) if limits else None


def query_gpus(sys_root: Path = Path("/sys")) -> list[Gpu]:
    """All GPUs of the node, as nvidia-smi lists them; [] without nvidia-smi. Raises UserError when it fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GPU_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"nvidia-smi: no answer within {GPU_SECONDS} s; the driver hangs, use another node") from None
    if done.returncode:
        if not list(Path("/dev").glob("nvidia[0-9]*")):
            return []  # installed, for a machine of the cluster that has GPUs
        raise UserError(f"nvidia-smi: {(done.stdout + done.stderr).strip().splitlines()[0]}; mend the driver")
    return parse_gpus(done.stdout, sys_root)


def parse_gpus(text: str, sys_root: Path = Path("/sys")) -> list[Gpu]:
    """What nvidia-smi's CSV lines (GPU_QUERY) say."""
    gpus = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        index, uuid, bus, name, memory = (part.strip() for part in line.split(",", 4))
        # nvidia-smi writes the PCI domain with 8 digits, sysfs with 4
        node = text_of(sys_root / "bus/pci/devices" / bus.lower()[-12:] / "numa_node")
        gpus.append(Gpu(int(index), uuid, name, int(memory) if memory.isdecimal() else 0, int(node or "-1")))
    return gpus


def visible_gpus(gpus: Sequence[Gpu], environment: Mapping[str, str] = os.environ) -> tuple[tuple[Gpu, ...], int]:
    """(the GPUs that CUDA_VISIBLE_DEVICES lets through, in its order; how many devices CUDA will see)."""
    if (chosen := environment.get("CUDA_VISIBLE_DEVICES")) is None:
        return tuple(gpus), len(gpus)
    found, count = [], 0
    for name in chosen.split(","):
        name = name.strip()
        match = [gpu for gpu in gpus if name == str(gpu.index) or (name and gpu.uuid.startswith(name))]
        if name.startswith("MIG-"):
            count += 1
        elif not match:
            break  # CUDA ignores what follows a device that is not there
        else:
            found.append(match[0])
            count += 1
    return tuple(found), count


def shares(machine: Machine, ranks: int, *, bind: bool = True) -> list[Share]:
    """What each of a node's ranks gets, by local rank.

    Ranks with a GPU get cores of the GPU's NUMA node, split among the ranks there; others get neighbouring cores.
    Nobody is bound (cpus=()) when there are fewer cores than ranks, or a NUMA node has too few for its GPUs.
    """
    threads = max(1, machine.usable_cores // ranks)
    if machine.visible_gpus:
        threads = min(threads, MAX_GPU_RANK_THREADS)
    free = [Share((), threads)] * ranks
    if not bind or len(machine.cores) < ranks:
        return free
    cores = sorted(machine.cores, key=lambda core: (machine.nodes[core[0]], core[0]))
    gpus = machine.gpus[:ranks]
    if len(gpus) == ranks and all(gpu.node in machine.nodes.values() for gpu in gpus):
        local: dict[int, list[int]] = defaultdict(list)
        for rank, gpu in enumerate(gpus):
            local[gpu.node].append(rank)
        groups = [(members, [c for c in cores if machine.nodes[c[0]] == node]) for node, members in local.items()]
    else:
        groups = [(list(range(ranks)), cores)]
    given = list(free)
    for members, mine in groups:
        if len(mine) < len(members):
            return free
        for place, rank in enumerate(members):
            own = mine[len(mine) * place // len(members) : len(mine) * (place + 1) // len(members)]
            given[rank] = replace(free[rank], cpus=tuple(sorted(cpu for core in own for cpu in core)))
    return given
