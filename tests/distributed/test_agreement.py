"""Before any group is made all ranks agree on their device, versions and options; else one line says who does not."""

import dataclasses
import re
import threading
import time

import pytest
import torch
import torch.distributed as dist
from small import small_config

from skyrl.distributed import agreement
from skyrl.distributed.agreement import agree_on_start, group_start, judge, options_of_all
from skyrl.planner.device import choose, look
from skyrl.types import RunError, UserError


def facts(host: str, **changes):
    same = {"device": "cuda", "dtype": "bfloat16", "torch": "2.13.0", "NCCL": "2.29.7", "transformers": "5.5.0"}
    same |= {key: changes.pop(key) for key in list(changes) if key in same and key != "device"}
    plain = {"host": host, "error": "", "device": "NVIDIA H100", "uuid": "", "options": {"optim.lr": 1e-5}}
    if "kind" in changes:
        same["device"] = changes.pop("kind")
    return {**plain, "same": same, **changes}


def nodes(*changes):
    """Two ranks a node, with these changes for the ranks of each."""
    return {rank: facts(f"node{rank // 2}", **dict(changes[rank // 2])) for rank in range(2 * len(changes))}


@pytest.mark.parametrize(
    "found, words",
    [
        (
            nodes({}, {"error": "torch is built for the CPU alone"}),
            "ranks 2, 3 on node1: torch is built for the CPU alone",
        ),
        ({0: facts("a"), 1: facts("b", error="driver")}, r"rank 1 on b \(NVIDIA H100\): driver"),
        (
            nodes({}, {"kind": "cpu"}, {}),
            "differ in device: cpu on ranks 2, 3 on node1, cuda on ranks 0, 1, 4, 5 on node0, node2; .*cpu",
        ),
        (nodes({"kind": "cpu"}, {}, {}), "differ in device: cpu on ranks 0, 1 on node0, cuda on"),
        (
            nodes({}, {"torch": "2.12.1"}),
            "differ in torch: 2.12.1 on ranks 2, 3 on node1, 2.13.0 on .*; give all nodes the same",
        ),
        (nodes({}, {"NCCL": "2.21.5"}), "differ in NCCL"),
        (nodes({}, {}, {"dtype": "float32"}), "differ in dtype: float32 on .*; give model.dtype=float32"),
        (
            nodes({}, {}, {"options": {"optim.lr": 1e-4}}),
            "differ in optim.lr: 0.0001 on ranks 4, 5 on node2, 1e-05 on .*same options",
        ),
        (
            {0: facts("a", uuid="GPU-1"), 1: facts("a", uuid="GPU-1")},
            "ranks 0 and 1 on a have the same GPU .*GPU-1.*one process for each",
        ),
        (
            {r: facts(f"n{r}", **({"error": "x"} if r else {})) for r in range(99)},
            "ranks 1, 2, 3, 4 and 94 more on n1, n2, n3, n4 and 94 more: x",
        ),
    ],
)
def test_who_does_not_fit_is_named(found, words):
    text = judge(found)
    assert text is not None and re.search(words, text) and "\n" not in text, text


def test_what_may_differ():
    assert judge(nodes({}, {})) is None
    assert judge({0: facts("a", uuid="GPU-1"), 1: facts("b", uuid="GPU-1"), 2: facts("a", uuid="GPU-2")}) is None
    assert judge(nodes({"device": "NVIDIA H100"}, {"device": "NVIDIA A100"})) is None
    cfg = small_config()
    elsewhere = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, dir="/scratch/x", threads=3))
    assert options_of_all(cfg) == options_of_all(elsewhere) and "optim.lr" in options_of_all(cfg)


def start(found, seconds=20):
    """What each rank raised, all of them against one real store; a rank without facts does not answer."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    raised: dict[int, BaseException | None] = {}

    def rank(number):
        mine = dist.TCPStore("127.0.0.1", store.port, None, False)
        mine.set(f"here/{number}", f"node{number}")
        try:
            if found[number] is not None:
                agree_on_start(mine, number, len(found), found[number], seconds)
            raised[number] = None
        except (UserError, RunError) as error:
            raised[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return raised


def test_every_rank_raises_the_same_line_at_once():
    assert start([facts("a"), facts("b")]) == {0: None, 1: None}
    begun = time.monotonic()
    raised = start([facts("a"), facts("b", error="strategy.device=auto: broken"), facts("c")])
    assert {(type(error), str(error)) for error in raised.values()} == {
        (UserError, "rank 1 on b (NVIDIA H100): strategy.device=auto: broken")
    }
    assert time.monotonic() - begun < 10


def test_a_rank_whose_driver_hangs_is_named_in_time(monkeypatch):
    monkeypatch.setattr(agreement, "READ_SECONDS", 0.5)
    raised = start([facts("a"), facts("b"), None], seconds=1)
    assert raised[2] is None and str(raised[0]) == str(raised[1])
    assert isinstance(raised[0], RunError) and str(raised[0]).startswith("rank 2 on node2 came, and did not say within")
    known = start([facts("a"), facts("b", error="broken"), None], seconds=1)  # an error says more than who is late
    assert "rank 1 on b (NVIDIA H100): broken" == str(known[0])


def test_a_wheel_without_cuda_beside_nvidia_devices_is_seen_for_real(tmp_path):
    """The whole way, with this torch and a machine of files; on a GPU there is nothing to refuse."""
    if torch.cuda.is_available():
        pytest.skip("torch works with this machine's GPU")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    found = look("auto", 0, tmp_path)
    assert found.wheels and found.nvidia == ("/dev/nvidia0",)
    with pytest.raises(UserError, match="this machine has GPUs .*/dev/nvidia0"):
        choose("auto", "auto", dataclasses.replace(found, visible=None))


def test_who_is_still_in_the_start_of_the_group_is_named():
    store = dist.HashStore()
    for rank in range(4):
        store.set(f"here/{rank}", f"node{rank // 2}")
    with group_start(store, 0, 4, 60):
        pass
    line = agreement.still_starting(store, 1, 4, 60)
    assert "within run.join_seconds=60: ranks 1, 2, 3 on node0, node1 not ready" in line
    with pytest.raises(
        RunError, match="rank 1 on .*: the group of ranks could not be made .Bootstrap : no socket.*NCCL_SOCKET"
    ):
        with group_start(store, 1, 4, 60):
            raise dist.DistBackendError(
                "NCCL error in: x, internal error\nLast error:\nBootstrap : no socket interface found"
            )
    assert not store.check(["made/1"])
