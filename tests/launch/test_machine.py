"""What a node has, and which rank gets which part. Trees below are laid out as the kernel lays out /sys."""

import os

import pytest

from skyrl.launch import machine
from skyrl.launch.machine import Gpu, Machine, Share

SMI = """\
0, GPU-aaaa, 00000000:17:00.0, NVIDIA H100 80GB HBM3, 81559
1, GPU-bbbb, 00000000:3D:00.0, NVIDIA H100 80GB HBM3, 81559
2, GPU-cccc, 00000000:97:00.0, NVIDIA H100 80GB HBM3, 81559
3, GPU-dddd, 00000000:BD:00.0, NVIDIA H100 80GB HBM3, 81559
"""


@pytest.fixture
def two_sockets(tmp_path):
    """Two NUMA nodes of 4 cores with two threads each; CPU 8 + i is the second thread of core i. Two GPUs a node."""
    for cpu in range(16):
        place = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(f"{cpu % 8},{cpu % 8 + 8}\n")
    for node, cpus in ((0, "0-3,8-11"), (1, "4-7,12-15")):
        place = tmp_path / f"devices/system/node/node{node}"
        place.mkdir(parents=True)
        (place / "cpulist").write_text(cpus + "\n")
    for bus, node in (("17", 0), ("3d", 0), ("97", 1), ("bd", 1)):
        place = tmp_path / f"bus/pci/devices/0000:{bus}:00.0"
        place.mkdir(parents=True)
        (place / "numa_node").write_text(f"{node}\n")
    return tmp_path


def of(root, gpus=(), allowed=range(16), quota=None):
    return Machine(
        tuple(gpus), len(gpus), machine.cores_of(list(allowed), root), machine.nodes_of(allowed, root), quota
    )


def test_the_kernels_lists():
    assert machine.cpu_list("0-3,8,10-11\n") == [0, 1, 2, 3, 8, 10, 11] and machine.cpu_list("\n") == []
    assert machine.show_cpus([11, 0, 1, 2, 3, 8, 10]) == "0-3,8,10-11"


def test_cores_are_whole_and_stay_on_their_node(two_sockets):
    found = of(two_sockets)
    assert found.cores[0] == (0, 8) and len(found.cores) == 8 and found.nodes[12] == 1
    assert (found.visible_gpus or found.usable_cores) == 8
    halves = machine.shares(found, 2)
    assert halves == [Share((0, 1, 2, 3, 8, 9, 10, 11), 4), Share((4, 5, 6, 7, 12, 13, 14, 15), 4)]
    assert machine.shares(found, 8)[7] == Share((7, 15), 1)


def test_ranks_with_gpus_stay_beside_them(two_sockets):
    gpus = machine.parse_gpus(SMI, two_sockets)
    assert [gpu.node for gpu in gpus] == [0, 0, 1, 1] and gpus[0].memory_mib == 81559
    found = of(two_sockets, gpus)
    assert (found.visible_gpus or found.usable_cores) == 4
    assert [share.cpus for share in machine.shares(found, 4)] == [
        (0, 1, 8, 9),
        (2, 3, 10, 11),
        (4, 5, 12, 13),
        (6, 7, 14, 15),
    ]
    turned = of(two_sockets, [gpus[3], gpus[0]])
    assert [share.cpus[0] for share in machine.shares(turned, 2)] == [4, 0]


def test_nobody_is_bound_where_it_would_hurt(two_sockets):
    gpus = machine.parse_gpus(SMI, two_sockets)
    few = of(two_sockets, gpus, allowed=[0, 4, 5, 6, 7])  # one core beside two of the GPUs
    assert machine.shares(few, 4) == [Share((), 1)] * 4
    assert machine.shares(of(two_sockets), 9) == [Share((), 1)] * 9
    assert machine.shares(of(two_sockets), 2, bind=False) == [Share((), 4)] * 2


def test_a_cgroups_share_counts(two_sockets):
    assert (
        of(two_sockets, quota=2.5).usable_cores == 2 and machine.shares(of(two_sockets, quota=2.5), 2)[0].threads == 1
    )
    folder = two_sockets / "fs/cgroup"
    folder.mkdir(parents=True)
    (folder / "cpu.max").write_text("250000 100000\n")
    assert machine.cpu_quota(two_sockets) == 2.5
    (folder / "cpu.max").write_text("max 100000\n")
    assert machine.cpu_quota(two_sockets) is None


def test_cuda_visible_devices():
    gpus = [Gpu(i, f"GPU-{c * 4}", "", 0) for i, c in enumerate("abcd")]
    pick = machine.visible_gpus
    assert pick(gpus, {}) == (tuple(gpus), 4) and pick(gpus, {"CUDA_VISIBLE_DEVICES": ""}) == ((), 0)
    assert pick(gpus, {"CUDA_VISIBLE_DEVICES": "2,0"}) == ((gpus[2], gpus[0]), 2)
    assert pick(gpus, {"CUDA_VISIBLE_DEVICES": "GPU-bb,9,1"}) == ((gpus[1],), 1)
    assert pick(gpus, {"CUDA_VISIBLE_DEVICES": "MIG-1,MIG-2"}) == ((), 2)


def test_this_machine():
    found = machine.look()
    assert set(found.cpus) == os.sched_getaffinity(0) and 1 <= found.usable_cores <= len(found.cores)
    assert set(found.nodes) == set(found.cpus) and "NUMA node" in found.describe()
