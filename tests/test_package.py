"""The wheel: complete, and it runs from an empty folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)],
        check=True,
        cwd=folder,
        capture_output=True,
        timeout=120,
    )
    (built,) = folder.glob("skyrl_spmd-*.whl")
    return built


def test_wheel_holds_all_modules_and_all_of_conf(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"skyrl/conf/{path.relative_to(ROOT / 'conf').as_posix()}" in names
    for path in (ROOT / "skyrl").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in names
    for path in (ROOT / "skyrl" / "dashboard").rglob("*.*"):  # templates, scripts, the demo
        assert "__pycache__" in path.parts or path.is_dir() or path.relative_to(ROOT).as_posix() in names, path
    assert "skyrl/docs/metrics.md" in names
    assert not any(name.startswith(("tests/", "benchmarks/")) or "__pycache__" in name for name in names)


def test_installed_wheel_works_from_an_empty_folder(wheel, tmp_path):
    target, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = ["install", "-q", "--no-deps", "--no-index", "--no-compile", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True, timeout=120)
    env = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}

    def run(*args: str) -> str:
        done = subprocess.run(
            [sys.executable, *args], cwd=empty, env=env, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("-c", "import skyrl.config.load as load; print(load.config_dir())").strip()
    assert Path(where) == target / "skyrl" / "conf"  # not the checkout's
    shown = yaml.safe_load(run("-m", "skyrl.train", "--cfg", "job", "experiment=gsm8k"))
    assert shown["strategy"]["name"] == "fsdp" and shown["experiment"] == "gsm8k"
    assert "peak" in run("-m", "skyrl.train", "dry_run=true")
    assert "skyrl-tx <command>" in run("-m", "skyrl.cli")
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize(("rank", "told"), [(None, 1), ("0", 1), ("3", 0)])
def test_a_namesake_in_the_same_environment_is_told_once(tmp_path, rank, told):
    info = tmp_path / "skyrl_tx-9.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: skyrl-tx\nVersion: 9.1\n")
    env = {key: value for key, value in os.environ.items() if key != "RANK"} | ({"RANK": rank} if rank else {})
    env["PYTHONPATH"] = f"{tmp_path}:{ROOT}"
    done = subprocess.run([sys.executable, "-c", "import skyrl"], env=env, capture_output=True, text=True, timeout=60)
    lines = [line for line in done.stderr.splitlines() if "skyrl-tx 9.1 is installed in this environment" in line]
    assert done.returncode == 0 and len(lines) == told
