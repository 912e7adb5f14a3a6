"""Before any group is made all ranks agree on their device, versions and options; else one line says who does not."""

import dataclasses
import os
import re
import signal
import threading
import time
import types

import pytest
import torch
import torch.distributed as dist
from small import small_config

from skyrl.distributed import agreement, init
from skyrl.distributed import meet as meeting
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


def test_a_text_that_begins_like_a_path_is_compared(tmp_path):
    cfg = small_config()

    def options(closing, path="/a/data.jsonl"):
        env = dataclasses.replace(cfg.env, options={**cfg.env.options, "closing": closing})
        return options_of_all(dataclasses.replace(cfg, env=env, data=dataclasses.replace(cfg.data, path=path)))

    for one, other in (("/think", "/end"), (".", ","), (".*42", ".*43"), ("~", "/"), ("/x y", "/")):
        assert options(one) != options(other)
    for name in "ab":
        (tmp_path / name).mkdir()
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert options(a, "/b/data.jsonl") == options(b)
    assert options(a) != options(f"{tmp_path}/missing")


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


def forked(work):
    """The process id of a child that does this; it never returns."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(9)
    return child


def test_a_store_that_stands_still_at_the_start_ends_every_rank_in_time(tmp_path, monkeypatch):
    """The process that keeps it is stopped: connections to it are made, and no call returns."""
    for module in (agreement, meeting):
        monkeypatch.setattr(module, "READ_SECONDS", 0.5)
    monkeypatch.setattr(agreement, "MARGIN_SECONDS", 0.5)
    told, tell = os.pipe()
    wait, go = os.pipe()

    def keep():
        os.close(go)
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        os.write(tell, b"%05d" % store.port)
        time.sleep(600)

    keeper = forked(keep)
    try:
        port = int(os.read(told, 5))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))

        def making(store):
            with group_start(store, 1, 2, 1):
                store.get("never")

        calls = {
            "meet": lambda store: meeting.meet(1, 2, 1),
            "agree": lambda store: agree_on_start(store, 1, 2, facts("b"), 1),
            "groups": making,
        }

        def rank(name):
            os.close(go)
            os.dup2(os.open(tmp_path / name, os.O_CREAT | os.O_WRONLY), 2)
            store = dist.TCPStore("127.0.0.1", port, None, False)
            os.write(tell, b"x")
            os.read(wait, 1)
            calls[name](store)

        children = {name: forked(lambda name=name: rank(name)) for name in calls}
        assert all(os.read(told, 1) == b"x" for _ in children)
        os.kill(keeper, signal.SIGSTOP)
        os.close(go)
        for name, child in children.items():
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1, name
            said = (tmp_path / name).read_text()
            assert said.startswith(f"skyrl: error: the store at 127.0.0.1:{port}, in which the ranks meet, does not")
            assert said.count("\n") == 1, said
    finally:
        os.kill(keeper, signal.SIGKILL)
        os.waitpid(keeper, 0)


def test_a_wheel_without_cuda_beside_nvidia_devices_is_seen_for_real(tmp_path):
    """The whole way, with this torch and a machine of files; on a GPU there is nothing to refuse."""
    if torch.cuda.is_available():
        pytest.skip("torch works with this machine's GPU")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    found = look("auto", 0, tmp_path)
    assert bool(found.wheels) is hasattr(torch.cuda, "PYTORCH_RELEASES_CODE_CC")  # torch 2.7 does not know its builds
    assert found.nvidia == ("/dev/nvidia0",)
    with pytest.raises(UserError, match="this machine has GPUs .*/dev/nvidia0"):
        choose("auto", "auto", dataclasses.replace(found, visible=None))


LAZILY = "CUDA call failed lazily at initialization with error: device >= 0 INTERNAL ASSERT FAILED"


@pytest.mark.parametrize("place", ["device_count", "set_device", "init", "get_device_properties"])
@pytest.mark.parametrize(
    "error, told",
    [
        (torch.cuda.DeferredCudaCallError(f"{LAZILY}\n\nCUDA call was originally invoked at:\n"), LAZILY),
        (RuntimeError("CUDA  error: out of memory\nCUDA kernel errors"), "CUDA error: out of memory"),
        (AttributeError("module 'torch._C' has no attribute '_x'"), "module 'torch._C' has no attribute '_x'"),
        (OSError("libcuda.so.1: cannot open shared object file"), "libcuda.so.1: cannot open shared object file"),
        (KeyError(), "KeyError"),
    ],
)
def test_a_runtime_that_does_not_start_is_told_whatever_it_raises(monkeypatch, place, error, told):
    def fail(*args):
        raise error

    of_cuda = {"device_count": lambda: 1, "set_device": lambda rank: None, "init": lambda: None, place: fail}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch._C, "_cuda_getArchFlags", lambda: "sm_90", raising=False)
    for name, function in of_cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)
    assert look("auto", 0).problem == told


def test_a_build_without_nccl_still_has_its_gpu(monkeypatch):
    orin = types.SimpleNamespace(name="Orin", uuid="u", major=8, minor=7)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch._C, "_cuda_getArchFlags", lambda: "sm_87", raising=False)
    monkeypatch.delattr(torch._C, "_nccl_version", raising=False)
    for name, value in {"device_count": 1, "set_device": None, "init": None, "get_device_properties": orin}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(torch, "ones", lambda *args, device: torch.zeros(1))  # the CPU in place of the GPU
    found = look("auto", 0)
    assert found.problem == found.nccl == "" and found.capability == (8, 7)
    assert choose("auto", "auto", found).kind == "cuda"


@pytest.mark.parametrize("error", [torch.cuda.DeferredCudaCallError(f"{LAZILY}\n\nat:"), KeyError("x"), OSError("y")])
def test_what_a_rank_raises_before_it_has_a_device_is_told_to_all(monkeypatch, capsys, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(init, "look", fail)
    monkeypatch.setattr(agreement, "READ_SECONDS", 0.0)
    with pytest.raises(UserError) as caught:
        init._choose_together(small_config(), dist.HashStore(), "127.0.0.1", 0)
    name = type(error).__name__
    assert f": {name}: " in str(caught.value) and "\n" not in str(caught.value)
    assert f"{name}: " in capsys.readouterr().err  # with its traceback, on this rank


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


@pytest.mark.parametrize(
    "text, remedy",
    [
        ("NCCL error in: x\nLast error:\nCuda failure 2 'out of memory'", "nothing of this run is loaded yet"),
        ("NCCL error in: x\nLast error:\nFailed to CUDA calloc async 608 bytes", "nothing of this run is loaded yet"),
        (
            "CUDA out of memory. GPU 0 has a total capacity of 79.11 GiB. Process 999 has 78.90 GiB memory in use. "
            "Including non-PyTorch memory, this process has 0.20 GiB memory in use.",
            r"another process \(999\) holds 78.90 GiB",
        ),
    ],
)
def test_memory_that_lacks_while_the_group_is_made_is_not_the_networks(text, remedy):
    with (
        pytest.raises(RunError, match=f"could not be made .*; {remedy}") as caught,
        group_start(dist.HashStore(), 0, 1, 60),
    ):
        raise RuntimeError(text)
    assert "NCCL_DEBUG" not in str(caught.value) and "dry_run" not in str(caught.value)
