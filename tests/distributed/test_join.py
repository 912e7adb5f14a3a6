"""Ranks that do not come are named in bounded time; those that are gone at the end, too."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from skyrl.distributed import meet as meeting
from skyrl.distributed import network
from skyrl.distributed.agreement import clock_problem
from skyrl.distributed.meet import meet
from skyrl.distributed.place import node_address
from skyrl.types import RunError, UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def lone(monkeypatch):
    """The environment of rank 0 of 3, whose launcher keeps the store; nobody else comes."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    values = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for key, value in {**values, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(key, value)
    return store


def test_ranks_that_do_not_come_are_named(lone):
    dist.PrefixStore("skyrl//0", lone).set("here/2", "127.0.0.1")
    start = time.monotonic()
    with pytest.raises(
        RunError, match=r"1 of 3 ranks did not come to 127.0.0.1:\d+ .* within run.join_seconds=2 \(ranks 1\)"
    ):
        meet(0, 3, 2)
    assert time.monotonic() - start < 10


def test_a_place_where_nobody_answers_is_one_line(lone, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    monkeypatch.setenv("RANK", "1")
    start = time.monotonic()
    with pytest.raises(
        RunError, match="the 3 ranks did not meet at 127.0.0.1:1 .* within run.join_seconds=2"
    ) as caught:
        meet(1, 3, 2)
    assert time.monotonic() - start < 20 and "\n" not in str(caught.value)
    assert os.environ["RANK"] == "1"


def together(lone, *ranks):
    """What each of these ranks gets when they meet at once: a thread each, over the store of `lone`."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        found = [pool.submit(meet, rank, len(ranks), 5) for rank in ranks]
    return [one.result() for one in found]


@pytest.fixture
def no_interface(monkeypatch):
    """The user has chosen none; what is set meanwhile goes at the end."""
    for name in (network.GLOO, network.NCCL):
        monkeypatch.setenv(name, "")


def test_gloo_and_nccl_use_the_interface_that_reached_the_store(lone, no_interface, monkeypatch):
    assert [address for _, address in together(lone, 0, 1)] == ["127.0.0.1", "127.0.0.1"]
    network.use_interface("127.0.0.1")
    assert (os.environ[network.GLOO], os.environ[network.NCCL]) == ("lo", "=lo")
    monkeypatch.setenv(network.GLOO, "ib7")
    with pytest.raises(UserError, match="GLOO_SOCKET_IFNAME=ib7: no such interface on .*, there are .*lo"):
        network.use_interface("127.0.0.1")
    monkeypatch.setenv(network.GLOO, "lo")
    for chosen, right in (
        ("l", True),
        ("=l", False),
        ("=lo", True),
        ("^docker", True),
        ("ib7,lo", True),
        ("ib", False),
    ):
        assert (network.interface_problem(network.NCCL, {network.NCCL: chosen}) == "") == right, chosen


def test_addresses_of_ranks(monkeypatch):
    """On the store's machine, whose name may mean 127.0.1.1 there, the address by which the others came counts."""
    monkeypatch.setattr(network, "interface_of", lambda address: {"10.0.0.1": "eth0"}.get(address, ""))

    class Told:
        def multi_get(self, keys):
            return [address.encode() for address in self.addresses]

    store = Told()
    store.addresses = ["", "127.0.1.1", "10.0.0.1", "192.168.0.9"]
    assert meeting._own_address(store, 4, "10.0.0.7") == "10.0.0.7"
    assert meeting._own_address(store, 4, "") == meeting._own_address(store, 4, "127.0.0.1") == "10.0.0.1"
    store.addresses = ["", "127.0.1.1"]
    assert meeting._own_address(store, 2, "") == "127.0.0.1"
    assert meeting._plain("::ffff:10.0.0.1") == "10.0.0.1" and meeting._plain("fe80::1%eth0") == "fe80::1"


def test_a_port_or_an_address_of_somebody_else_is_one_line(lone, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError, match=rf"MASTER_PORT={port} \(.*the environment\): another program"):
            meet(0, 3, 2)
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")  # for documentation: nobody has it
    with pytest.raises(RunError, match=r"192.0.2.1:\d+ \(.*from the environment.*: unset MASTER_ADDR, or set it"):
        meet(0, 3, 1)


@pytest.mark.parametrize("name, value", [("PORT", "99999"), ("PORT", "0"), ("PORT", "x")])
def test_a_place_that_cannot_be_is_refused_at_once(lone, monkeypatch, name, value):
    monkeypatch.setenv(f"MASTER_{name}", value)
    for rank in (0, 1):
        with pytest.raises(UserError, match=rf":{value} \(.*the environment\): no "):
            meet(rank, 3, 60)
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("MASTER_ADDR", "a..b")
    with pytest.raises(RunError, match=r"did not meet at a..b:29500 \(.*the environment\)"):
        meet(1, 3, 1)
    assert network.is_local("a..b") and not network.is_free(99999)
    with pytest.raises(UserError, match="has no address; set MASTER_ADDR"):
        node_address("a..b")


def test_clocks_that_are_off_are_named():
    assert clock_problem("b", 11.5, "a", 10.0) == "" == clock_problem("a", 90.0, "a", 10.0)
    assert clock_problem("b", 310.0, "a", 10.0).startswith("the clock of b is 300 s ahead of that of a: deadlines")
    assert clock_problem("b", 5.0, "a", 10.0).startswith("the clock of b is 5 s behind that of a: ")


AT_THE_END = """
import os, sys, time
from small import small_config
from skyrl.distributed import failure
from skyrl.distributed.init import init_distributed
world = init_distributed(small_config())
if world.rank == 0 and sys.argv[1] == "speaks":
    time.sleep(0.5)
    assert failure.claim_error_report()
    print("skyrl: error: the disk is full", file=sys.stderr, flush=True)
if world.rank == 0:
    os._exit(2)
"""


@pytest.mark.ranks
@pytest.mark.parametrize("other", ["speaks", pytest.param("is silent", marks=pytest.mark.slow)])
def test_a_rank_that_is_done_leaves_the_error_to_the_one_that_fails(other):
    """Found by benchmarks/chaos.py: with the disk read-only from the export on, rank 1 printed gloo's traceback."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    path = os.pathsep.join(str(ROOT / part) for part in ("", "tests"))
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": path}
    command = [sys.executable, "-c", AT_THE_END, other]
    ranks = [
        subprocess.Popen(command, env={**env, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    said = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 1]
    if other == "speaks":
        assert said == ["skyrl: error: the disk is full\n", ""]
    else:
        assert said[0] == "" and said[1].startswith("skyrl: error: rank 0 (process ") and said[1].count("\n") == 1
