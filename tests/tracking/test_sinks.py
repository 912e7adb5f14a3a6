"""wandb (offline), TensorBoard and Trackio, real and read back by their own readers, also after a kill and a resume;
missing packages are one line."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from skyrl.config.schema import RunConfig, TrackingConfig
from skyrl.tracking import make_tracker
from skyrl.types import UserError


def config(**options):
    return RunConfig(tracking=TrackingConfig(console="off", **options))


def run_steps(cfg, folder, first, last, resume_from=None):
    folder.mkdir(exist_ok=True)
    tracker = make_tracker(cfg, folder, 0, resume_from=resume_from)
    for step in range(first, last + 1):
        tracker.add({"reward:mean": step / 3, "loss:sum": -1.5})
        tracker.finish_step(step, "warmup" if step == 1 else "rl")
    offset = tracker.offset()
    tracker.close()
    return offset


def test_tensorboard_reads_back(tmp_path):
    pytest.importorskip("tensorboard")
    run_steps(config(tensorboard=True), tmp_path, 1, 4)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = events.Scalars("rl/reward:mean".replace(":", "."))
    assert [point.step for point in points] == [2, 3, 4]
    assert all(math.isclose(point.value, point.step / 3, rel_tol=1e-6) for point in points)
    assert [point.step for point in events.Scalars("warmup/loss.sum")] == [1]
    (told,) = events.Tensors("run_id/text_summary")
    assert told.tensor_proto.string_val[0].decode() == (tmp_path / "wandb_id").read_text()


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path):
    """For both of its readers: the one for programs, and that of its server."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator

    offset = run_steps(config(), tmp_path, 1, 2)
    offset = run_steps(config(tensorboard=True), tmp_path, 3, 4, resume_from=offset)  # switched on later
    run_steps(config(tensorboard=True), tmp_path, 5, 6, resume_from=offset)  # killed before its next checkpoint
    run_steps(config(tensorboard=True), tmp_path, 5, 7, resume_from=offset)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [point.step for point in events.Scalars("rl/loss.sum")] == [2, 3, 4, 5, 6, 7]
    assert [point.step for point in events.Scalars("warmup/loss.sum")] == [1]
    events = plugin_event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [point.step for point in events.Tensors("rl/loss.sum")] == [2, 3, 4, 5, 6, 7]
    assert len(events.Tensors("run_id/text_summary")) == 1


def test_missing_tensorboard_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"tracking.tensorboard=true: .*pip install .skyrl-spmd\[tensorboard\]."):
        make_tracker(config(tensorboard=True), tmp_path, 0)


def test_missing_wandb_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match='tracking.wandb=offline: .*pip install "wandb'):
        make_tracker(config(wandb="offline"), tmp_path, 0)


def test_wandb_is_not_imported_when_off(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    make_tracker(config(), tmp_path, 0).close()


def test_missing_trackio_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match=r"tracking.trackio=true: .*pip install .skyrl-spmd\[trackio\]."):
        make_tracker(config(trackio=True), tmp_path, 0)


KILLED = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_sinks import config
from skyrl.tracking import make_tracker
folder, name = Path(sys.argv[2]), sys.argv[3]
folder.mkdir(exist_ok=True)
cfg = config(**{name: "offline" if name == "wandb" else True})
resume_from, steps = (None, range(1, 161)) if len(sys.argv) == 4 else (int(sys.argv[4]), range(101, 171))
tracker = make_tracker(cfg, folder, 0, resume_from=resume_from)
for step in steps:
    tracker.add({f"part-{i}:mean": step / 3 for i in range(20)})
    tracker.finish_step(step, "warmup" if step == 1 else "rl")
    if step == 100:
        print(tracker.offset(), flush=True)  # the checkpoint
if resume_from is None:
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
tracker.close()
"""


def kill_and_resume(name, folder):
    """A run of 160 steps, killed after its checkpoint of step 100, and its second start, which does 170. Asserts that
    nobody was called."""
    (folder / "home").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        env = {**os.environ, "TRACKIO_DIR": str(folder / "trackio"), "HOME": str(folder / "home"), "NO_PROXY": ""}
        env |= {"HTTP_PROXY": address, "HTTPS_PROXY": address, "ALL_PROXY": address}
        env |= {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40}
        command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(folder / "run"), name]
        killed = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
        assert killed.returncode == -9, killed.stderr
        done = subprocess.run([*command, killed.stdout.strip()], env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        with pytest.raises(BlockingIOError):
            server.accept()
    return (folder / "run" / "wandb_id").read_text(), env


def test_wandb_offline_has_each_step_once_after_a_kill_in_the_run_folder_and_calls_nobody(tmp_path):
    pytest.importorskip("wandb")
    run, env = kill_and_resume("wandb", tmp_path)
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert [path.name for path in files] == [f"run-{run}.wandb"] * 2
    steps = []
    for path in files:
        read = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        told = subprocess.run(read, env=env, capture_output=True, text=True, timeout=60)
        lines = [json.loads(line) for line in told.stdout.splitlines()]
        points = [line["history"]["item"] for line in lines if line["type"] == "history"]
        steps.append([point.get("rl/step", point.get("warmup/step")) for point in points])
        assert all(
            point.get("rl/part-3.mean", step / 3) == step / 3 for point, step in zip(points, steps[-1], strict=True)
        )
    assert sum(steps, []) == [*range(1, 171)] and len(steps[0]) > 60  # nothing twice, nothing left out
    assert b"max_tokens_per_microbatch" in files[0].read_bytes()


@pytest.mark.slow
def test_trackio_has_each_step_once_after_a_kill_in_its_folder_and_calls_nobody(tmp_path):
    pytest.importorskip("trackio")
    run, env = kill_and_resume("trackio", tmp_path)
    code = """if True:
        from trackio.sqlite_storage import SQLiteStorage
        (run,) = SQLiteStorage.get_runs("skyrl")
        print(run, [(one["step"], one.get("rl/part-3.mean")) for one in SQLiteStorage.get_logs("skyrl", run)])"""
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    points = [(1, None), *((step, step / 3) for step in range(2, 171))]
    assert told.stdout == f"run-{run} {points}\n", told.stderr
