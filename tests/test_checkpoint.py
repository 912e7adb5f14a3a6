"""Checkpoints on one process: complete or absent, verified before anything is touched, kept and deleted as asked."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from skyrl.checkpoint import checkpointer
from skyrl.checkpoint.checkpointer import Checkpointer
from skyrl.checkpoint.folder import Best, clean_leftovers, find_resume, latest, list_checkpoints, read_checkpoint
from skyrl.types import UserError


def make(folder, **options):
    settings = dict(keep_last=0, keep_best=False, async_save=False, rank=0, world_size=1, group=None)
    return Checkpointer(Path(folder), **{**settings, **options})


def some_tensors(seed=0, size=5):
    generator = torch.Generator().manual_seed(seed)
    return {
        "policy": {
            "model": {"a.weight": torch.randn(size, 3, generator=generator), "b": torch.randn((), generator=generator)},
            "optimizer": {"a.weight": {"exp_avg": torch.randn(size, 3, generator=generator).bfloat16(), "step": 7}},
        },
        "counts": [torch.arange(4), torch.tensor([True, False])],
    }


def same(left, right):
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return type(left) is type(right) and left == right


def names(folder):
    return sorted(os.listdir(folder))


STATE = {"step": 3, "phase": "rl", "data": {"epoch": 1, "position": 17}, "best": 0.1 + 0.2, "kl": 1e-17, "none": None}


def test_everything_comes_back_bit_for_bit(tmp_path):
    saver = make(tmp_path, config_digest="abc")
    saver.save("step-3", some_tensors(0), STATE, score=0.5)
    (line,) = saver.poll()
    assert "saved checkpoint" in line and "step-3" in line
    target = some_tensors(1)
    target["policy"]["optimizer"]["a.weight"]["step"] = 0
    kept = target["policy"]["model"]["a.weight"]
    state = make(tmp_path).load(tmp_path / "step-3", target)
    assert state == STATE and same(target, some_tensors(0))
    assert target["policy"]["model"]["a.weight"] is kept  # in place
    info = latest(tmp_path)
    assert (info.tag, info.score, info.world_size, info.config_digest) == ("step-3", 0.5, 1, "abc")
    there = sum(f.stat().st_size for f in info.path.iterdir() if f.name != "manifest.json")
    assert sum(entry["bytes"] for entry in info.files.values()) == there


def test_training_goes_on_while_the_save_is_written(tmp_path):
    saver = make(tmp_path, async_save=True)
    tensors = {"policy": {"w": torch.zeros(300_000), "scalar": torch.zeros(()), "view": torch.zeros(8, 4)[:, 1:3]}}
    for step in range(1, 6):
        for value in tensors["policy"].values():
            value.fill_(step)
        state = {"step": step}
        saver.save(f"step-{step}", tensors, state, score=None)
        for value in tensors["policy"].values():
            value.fill_(-1)  # at once, as an optimizer would
        state["step"] = -1
    saver.wait()
    assert len(saver.poll()) == 5
    for step in range(1, 6):
        target = {"policy": {"w": torch.empty(300_000), "scalar": torch.empty(()), "view": torch.empty(8, 2)}}
        assert saver.load(tmp_path / f"step-{step}", target) == {"step": step}
        assert all((value == step).all() for value in target["policy"].values())


def test_save_returns_before_the_disk_is_done_and_poll_never_waits(tmp_path, monkeypatch):
    gate = threading.Event()
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (gate.wait(20), real(handle))[1])
    saver = make(tmp_path, async_save=True)
    saver.save("step-1", some_tensors(), {"step": 1}, score=None)
    assert saver.poll() == [] and latest(tmp_path) is None and not saver.close(timeout_seconds=0.05)
    gate.set()
    assert saver.close()
    assert len(saver.poll()) == 1 and latest(tmp_path).tag == "step-1"


def test_keeps_the_last_and_the_best(tmp_path):
    saver = make(tmp_path, keep_last=2, keep_best=True)
    for step, score in [(1, 0.2), (2, 0.9), (3, None), (4, float("nan")), (5, 0.9), (6, 0.1)]:
        saver.save(f"s{step}", some_tensors(), {"step": step}, score=score)
    assert names(tmp_path) == ["s2", "s5", "s6"]  # of equal scores the earlier one
    saver = make(tmp_path, keep_last=1, keep_best=False)
    saver.save("s7", some_tensors(), {"step": 7}, score=None)
    assert names(tmp_path) == ["s7"]


@pytest.mark.parametrize("mode, kept", [("max", "s3"), ("min", "s2")])
def test_keeps_the_first_of_the_best_of_its_metric(tmp_path, mode, kept):
    nan, inf = float("nan"), float("inf")
    other = make(tmp_path, keep_last=0, best=Best("eval/other:mean", mode))
    other.save("other", some_tensors(), {}, score=99.0 if mode == "max" else -99.0)
    saver = make(tmp_path, keep_last=1, keep_best=True, best=Best("eval/length:mean", mode))
    assert not saver.improves(nan) and saver.improves(1.0)
    for number, score in enumerate([1.0, -2.0, 3.0, nan, 3.0, -2.0, inf, -inf, 0.0, None]):
        saver.save(f"s{number + 1}", some_tensors(), {}, score=score)
    assert names(tmp_path) == ["s10", kept]
    for value in (3.0, -2.0, 0.0, nan, inf, -inf):
        assert not saver.improves(value)
    assert saver.improves(4.0) == (mode == "max") and saver.improves(-3.0) == (mode == "min")


def test_newest_is_the_one_written_last_not_the_highest_step(tmp_path):
    saver = make(tmp_path, keep_last=2)
    saver.save("step-20", some_tensors(), {"step": 20}, score=None)
    saver.save("step-40", some_tensors(), {"step": 40}, score=None)
    saver.save("step-30", some_tensors(1), {"step": 30}, score=None)  # resumed from step-20 by hand
    assert [info.tag for info in list_checkpoints(tmp_path)] == ["step-40", "step-30"]
    assert latest(tmp_path).tag == "step-30"
    saver.save("step-40", some_tensors(2), {"step": 40, "again": True}, score=None)  # replaces
    assert names(tmp_path) == ["step-30", "step-40"] and latest(tmp_path).state["again"]


def test_damaged_files_are_named_before_a_weight_is_touched(tmp_path):
    whole, tmp_path = tmp_path / "whole", tmp_path / "checkpoints"
    saver = make(tmp_path)
    saver.save("s1", some_tensors(0), {"step": 1}, score=None)
    saver.save("s2", some_tensors(0), {"step": 2}, score=None)
    shutil.copytree(tmp_path / "s2", whole)
    for file in names(whole):
        for damage in ("truncate", "flip", "remove"):
            shutil.rmtree(tmp_path / "s2")
            shutil.copytree(whole, tmp_path / "s2")
            path = tmp_path / "s2" / file
            data = bytearray(path.read_bytes())
            if damage == "truncate":
                path.write_bytes(data[:-1])
            elif damage == "flip":
                data[len(data) // 2] ^= 1
                path.write_bytes(data)
            else:
                path.unlink()
            target = some_tensors(1)
            with pytest.raises(UserError) as caught:
                saver.load(tmp_path / "s2", target)
            text = str(caught.value)
            assert str(tmp_path / "s2") in text and "\n" not in text, (file, damage)
            assert f"run.resume={tmp_path / 's1'}" in text and "move that folder away" in text
            if not (file == "manifest.json" and damage == "remove"):
                assert file in text
            assert same(target, some_tensors(1))
            if file == "manifest.json" and damage != "remove":
                with pytest.raises(UserError, match="manifest.json is damaged"):
                    latest(tmp_path)


def test_another_model_is_refused_with_names(tmp_path):
    saver = make(tmp_path)
    saver.save("s1", some_tensors(), {"step": 1}, score=None)
    other = some_tensors(1)
    other["policy"]["model"]["c"] = other["policy"]["model"].pop("b")
    with pytest.raises(UserError, match="it lacks policy/model/c; it has besides policy/model/b"):
        saver.load(tmp_path / "s1", other)
    with pytest.raises(UserError, match=r"a.weight is \[5, 3\] float32 there and \[6, 3\] float32 here"):
        saver.load(tmp_path / "s1", some_tensors(1, size=6))
    other = some_tensors(1)
    other["policy"]["model"]["a.weight"] = other["policy"]["model"]["a.weight"].double()
    with pytest.raises(UserError, match=r"float32 there and \[5, 3\] float64 here"):
        saver.load(tmp_path / "s1", other)
    part = {"policy": {"model": some_tensors(1)["policy"]["model"]}}
    with pytest.raises(UserError, match="it has besides counts/0, counts/1, policy/optimizer/a.weight/exp_avg and 1 m"):
        saver.load(tmp_path / "s1", part)
    saver.load(tmp_path / "s1", part, partial=True)
    assert same(part["policy"]["model"], some_tensors()["policy"]["model"])


def test_replacing_that_fails_keeps_the_old_one(tmp_path, monkeypatch):
    saver = make(tmp_path)
    saver.save("s1", some_tensors(0), {"step": 1}, score=None)
    real = Path.rename

    def rename(path, target):
        if path.is_dir() and ".tmp-" in path.name:
            raise OSError(5, "Input/output error")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(UserError, match="not saved .Input/output error.; .*last complete checkpoint is .*s1"):
        saver.save("s1", some_tensors(1), {"step": 1}, score=None)
    assert names(tmp_path) == ["s1"]
    target = some_tensors(2)
    saver.load(tmp_path / "s1", target)
    assert same(target, some_tensors(0))


def test_error_of_any_single_sync_is_reported(tmp_path, monkeypatch):
    saver = make(tmp_path)
    saver.save("s0", some_tensors(0), {"step": 0}, score=None)
    real, calls = os.fsync, []

    def fail_once(handle):
        calls.append(handle)
        if len(calls) == failing:
            raise OSError(5, "Input/output error")
        real(handle)

    monkeypatch.setattr(os, "fsync", fail_once)
    for failing in range(1, 6):  # data, DCP's metadata, manifest, the folder, the folder above
        calls.clear()
        with pytest.raises(UserError, match="checkpoint .*s1: not saved .Input/output error"):
            saver.save("s1", some_tensors(1), {"step": 1}, score=None)
        assert names(tmp_path) == (["s0"] if failing < 5 else ["s0", "s1"])
    failing = 0
    calls.clear()
    saver.save("s1", some_tensors(1), {"step": 1}, score=None)
    assert len(calls) == 5 and latest(tmp_path).tag == "s1"


def test_what_resume_finds(tmp_path):
    assert find_resume("auto", tmp_path / "absent") is None
    saver = make(tmp_path / "checkpoints")
    saver.save("s1", some_tensors(), {"step": 1}, score=None)
    saver.save("s2", some_tensors(), {"step": 2}, score=None)
    assert find_resume("auto", tmp_path / "checkpoints").tag == "s2"
    assert find_resume("never", tmp_path / "checkpoints") is None
    assert find_resume(str(tmp_path / "checkpoints" / "s1"), tmp_path / "other").tag == "s1"
    with pytest.raises(UserError, match="run.resume=nowhere: no complete checkpoint there; .*known: .*s1, .*s2"):
        find_resume("nowhere", tmp_path / "checkpoints")


def test_state_that_json_would_change_is_our_bug(tmp_path):
    saver = make(tmp_path)
    for bad in ({"a": (1, 2)}, {1: "a"}, {"a": torch.tensor(1)}, {"a": {"b": [b"x"]}}):
        with pytest.raises(TypeError, match="JSON"):
            saver.save("s1", some_tensors(), bad, score=None)
    with pytest.raises(TypeError, match="checkpoint entry x"):
        saver.save("s1", {"x": object()}, {}, score=None)
    with pytest.raises(ValueError, match="two entries have this name"):
        saver.save("s1", {"a": {"b/c": torch.ones(1)}, "a/b": {"c": torch.ones(1)}}, {}, score=None)
    with pytest.raises(AssertionError, match="tag"):
        saver.save("a/b", some_tensors(), {}, score=None)
    assert names(tmp_path) == []


KILLED = """
import os, sys, time, torch
from pathlib import Path
from skyrl.checkpoint import checkpointer
from skyrl.checkpoint.checkpointer import Checkpointer
folder, where = Path(sys.argv[1]), sys.argv[2]
saver = Checkpointer(folder, keep_last=1, keep_best=False, async_save=True, rank=0, world_size=1, group=None)
saver.save("s1", {"w": torch.full((1000,), 1.0)}, {"step": 1}, score=None, block=True)
def stop(*args, **options):
    print("here", flush=True)
    time.sleep(60)
import skyrl.checkpoint.checkpointer as module, skyrl.checkpoint.folder as folder_module
if where == "data":
    module._HashingStream.write = stop
elif where == "manifest":
    folder_module.write_atomic = stop
elif where == "before rename":
    real = Path.rename
    Path.rename = lambda path, to: stop() if path.is_dir() else real(path, to)
elif where == "before deletion":
    folder_module.shutil.rmtree = stop
saver.save("s2", {"w": torch.full((1000,), 2.0)}, {"step": 2}, score=None)
time.sleep(60)
"""


@pytest.mark.parametrize(
    "where, survivor", [("data", 1), ("manifest", 1), ("before rename", 2), ("before deletion", 2)]
)
def test_kill_nine_leaves_whole_checkpoints_only(tmp_path, where, survivor):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), where], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = [name for name in names(tmp_path) if ".tmp-" in name or ".trash-" in name]
    assert len(left) == 1, names(tmp_path)
    assert all(".tmp-" not in info.tag and info.path.name == info.tag for info in list_checkpoints(tmp_path))
    (line,) = clean_leftovers(tmp_path)
    assert ("finished now" in line) == (where == "before rename")
    info = latest(tmp_path)
    assert info.tag == f"s{survivor}"
    target = {"w": torch.empty(1000)}
    assert make(tmp_path).load(info.path, target) == {"step": survivor}
    assert (target["w"] == survivor).all()
    assert clean_leftovers(tmp_path) == []
    make(tmp_path, keep_last=1).save("s3", target, {"step": 3}, score=None)
    assert names(tmp_path) == ["s3"]


def test_kill_at_random_times_never_leaves_a_bad_newest(tmp_path):
    script = KILLED.split("def stop")[0] + (
        "print('here', flush=True)\n"
        "for step in range(2, 10000):\n"
        "    saver.save(f's{step}', {'w': torch.full((200000,), float(step))}, {'step': step}, score=None)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), ""], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    time.sleep(0.7)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    clean_leftovers(tmp_path)
    info = latest(tmp_path)
    target = {"w": torch.empty(200000 if info.state["step"] > 1 else 1000)}
    step = make(tmp_path).load(info.path, target)["step"]
    assert (target["w"] == step).all() and len(names(tmp_path)) <= 2


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_full_disk_is_one_line_and_loses_nothing(small_disk, asynchronous):
    saver = make(small_disk, async_save=asynchronous)
    small, big = {"w": torch.ones(1000)}, {"w": torch.ones(1000), "x": torch.ones(500_000)}
    saver.save("s1", small, {"step": 1}, score=None, block=True)
    with pytest.raises(UserError) as caught:
        saver.save("s2", big, {"step": 2}, score=None)
        while True:
            saver.poll()
            time.sleep(0.01)
    text = str(caught.value)
    assert "No space left on device" in text and "free some space" in text and "\n" not in text
    assert f"the last complete checkpoint is {small_disk / 's1'}" in text
    assert names(small_disk) == ["s1"]  # what it had written makes room again
    assert saver.load(small_disk / "s1", small) == {"step": 1}
    saver.wait()  # told once
    saver.save("s3", small, {"step": 3}, score=None, block=True)
    assert latest(small_disk).tag == "s3"


def test_disk_that_fills_up_at_any_byte(small_disk):
    """The last pages go to data, metadata or manifest: each place must report, none may leave a false checkpoint."""
    saver = make(small_disk)
    failed = 0
    for used_kib in range(960, 1024, 4):
        (small_disk / "filler").write_bytes(b"x" * (used_kib << 10))
        try:
            saver.save("s1", {"w": torch.ones(4000)}, {"step": 1}, score=None)
            saver.load(small_disk / "s1", {"w": torch.empty(4000)})
            shutil.rmtree(small_disk / "s1")
        except UserError as problem:
            failed += 1
            assert "No space left on device" in str(problem)
        assert names(small_disk) == ["filler"]
        (small_disk / "filler").unlink()
    assert 0 < failed < 16


def test_limit_on_file_sizes(tmp_path):
    script = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from skyrl.checkpoint.checkpointer import Checkpointer\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "saver = Checkpointer(Path(sys.argv[1]), keep_last=0, keep_best=False, async_save=False, rank=0,\n"
        "                     world_size=1, group=None)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try:\n"
        "    saver.save('s1', {'w': torch.ones(1000000)}, {}, score=None)\n"
        "except ValueError as problem:\n"
        "    print(type(problem).__name__, problem)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("UserError checkpoint") and "File too large" in done.stdout, done
    assert names(tmp_path) == []


def test_read_only_folder(small_disk):
    saver = make(small_disk / "checkpoints")
    saver.save("s1", some_tensors(), {"step": 1}, score=None)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="not saved .Read-only file system.*last complete checkpoint is .*s1"):
        saver.save("s2", some_tensors(), {"step": 2}, score=None)
    assert saver.load(small_disk / "checkpoints" / "s1", some_tensors()) == {"step": 1}


def test_folder_whose_name_is_taken_by_a_file(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    saver = make(tmp_path / "checkpoints", async_save=True)
    saver.save("s1", some_tensors(), {"step": 1}, score=None)
    with pytest.raises(UserError, match="no complete checkpoint exists yet"):
        saver.wait()


def test_manifest_of_a_later_format(tmp_path):
    from skyrl.checkpoint.folder import digest

    make(tmp_path).save("s1", some_tensors(), {"step": 1}, score=None)
    path = tmp_path / "s1" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    manifest["format"] = 99
    path.write_text(json.dumps({**manifest, "digest": digest(manifest)}))
    with pytest.raises(UserError, match="format 99 of skyrl"):
        read_checkpoint(tmp_path / "s1")


@pytest.mark.parametrize("comes", [False, True])
def test_saved_is_said_once_every_part_of_another_host_is_seen(tmp_path, monkeypatch, comes):
    """Rank 1 says what it has written; where its disk is its own, rank 0 never sees it, and over NFS only later."""
    monkeypatch.setattr(checkpointer, "SEEN_SECONDS", 1.0 if comes else 0.3)
    saver = make(tmp_path)
    gathered = saver._all_gather

    def with_rank_1(value):
        if not isinstance(value, dict):
            return gathered(value)
        (folder,) = tmp_path.glob("s1.tmp-*")
        if comes:
            threading.Timer(0.3, lambda: (folder / "__1_0.distcp").write_bytes(b"0123456789")).start()
        return [value, {"__1_0.distcp": {"bytes": 10, "sha256": "84d89877"}}]

    monkeypatch.setattr(saver, "_all_gather", with_rank_1)
    if comes:
        saver.save("s1", some_tensors(), {"step": 1}, score=None, block=True)
        assert "saved checkpoint" in saver.poll()[0] and latest(tmp_path).tag == "s1"
    else:
        with pytest.raises(UserError, match=r"not saved: file __1_0.distcp is missing as rank 0 on .* run.dir"):
            saver.save("s1", some_tensors(), {"step": 1}, score=None, block=True)
        assert saver.poll() == [] and names(tmp_path) == []
