"""wandb (offline, real) and TensorBoard (read back); missing packages are one line."""

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


def test_missing_tensorboard_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r'tracking.tensorboard=true: .*pip install "skyrl-spmd\[tensorboard\]"'):
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
    with pytest.raises(UserError, match=r'tracking.trackio=true: .*pip install "skyrl-spmd\[trackio\]"'):
        make_tracker(config(trackio=True), tmp_path, 0)


TRACKIO = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_sinks import config, run_steps
offset = run_steps(config(trackio=True), Path(sys.argv[2]), 1, 3)
run_steps(config(trackio=True), Path(sys.argv[2]), 4, 5, resume_from=offset)
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("skyrl")
print(run, [(one["step"], one.get("rl/reward.mean")) for one in SQLiteStorage.get_logs("skyrl", run)])
"""


@pytest.mark.slow
def test_trackio_keeps_one_run_in_its_folder_and_calls_nobody(tmp_path):
    pytest.importorskip("trackio")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        env = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path), "NO_PROXY": ""}
        env |= {"HTTP_PROXY": address, "HTTPS_PROXY": address, "ALL_PROXY": address}
        command = [sys.executable, "-c", TRACKIO, str(Path(__file__).parent), str(tmp_path / "run")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        with pytest.raises(BlockingIOError):
            server.accept()
    run = f"run-{(tmp_path / 'run' / 'wandb_id').read_text()}"  # the id that wandb and TensorBoard have too
    points = [(1, None), *((step, step / 3) for step in range(2, 6))]
    assert done.stdout == f"{run} {points}\n"


WANDB = """
import sys
from pathlib import Path
from skyrl.config.schema import RunConfig, TrackingConfig
sys.path.insert(0, sys.argv[1])
from test_sinks import config, run_steps
offset = run_steps(config(wandb="offline"), Path(sys.argv[2]), 1, 3)
run_steps(config(wandb="offline"), Path(sys.argv[2]), 4, 5, resume_from=offset)
"""


def test_wandb_offline_writes_into_the_run_folder_keeps_its_id_and_calls_nobody(tmp_path):
    pytest.importorskip("wandb")
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0)
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    home = tmp_path / "home"
    home.mkdir()
    env = {**os.environ, "HOME": str(home), "WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40}
    env |= {"HTTP_PROXY": address, "HTTPS_PROXY": address, "ALL_PROXY": address, "NO_PROXY": ""}
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", WANDB, here, str(tmp_path / "run")], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(BlockingIOError):
        server.accept()
    server.close()
    run = (tmp_path / "run" / "wandb_id").read_text()
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{run}.wandb"))
    assert len(files) == len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) >= 1
    data = b"".join(path.read_bytes() for path in files)
    assert b"rl/reward.mean" in data and b"warmup/reward.mean" in data and b"max_tokens_per_microbatch" in data
