"""Ranks that do not come are named in bounded time."""

import os
import time

import pytest
import torch.distributed as dist

from skyrl.distributed.init import _meet
from skyrl.types import RunError


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
