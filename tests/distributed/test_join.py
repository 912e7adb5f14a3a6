"""Ranks that do not come are named in bounded time; those that are gone at the end, too."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from skyrl.distributed.init import _meet
from skyrl.types import RunError

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
    dist.PrefixStore("skyrl//0", lone).set("here/2", "1")
    start = time.monotonic()
    with pytest.raises(
        RunError, match=r"1 of 3 ranks did not come to 127.0.0.1:\d+ within run.join_seconds=2 \(ranks 1\)"
    ):
        _meet(0, 3, 2)
    assert time.monotonic() - start < 10


def test_a_place_where_nobody_answers_is_one_line(lone, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    monkeypatch.setenv("RANK", "1")
    start = time.monotonic()
    with pytest.raises(RunError, match="the 3 ranks did not meet at 127.0.0.1:1 within run.join_seconds=2") as caught:
        _meet(1, 3, 2)
    assert time.monotonic() - start < 20 and "\n" not in str(caught.value)
    assert os.environ["RANK"] == "1"


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
