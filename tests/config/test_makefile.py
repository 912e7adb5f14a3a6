"""What the Makefile does without a person looking on."""

import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
PIN = str(PINS[0].specifier).removeprefix("==")


def make(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """`make test-cuda-build` with a Python that does nothing, in place of a virtual environment."""
    for name in (".installed", ".installed-test", "bin/python"):
        (folder / "venv" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "venv" / name).write_text("#!/bin/sh\n")
        (folder / "venv" / name).chmod(0o755)
    command = ["make", "test-cuda-build", f"VENV={folder}/venv", *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "version, fits", [(PIN, True), (f"{PIN}+cu130", True), ("2.0.1+cu118", False), (f"{PIN}1", False)]
)
def test_a_build_of_another_release_is_not_tested_without_a_word(tmp_path, version, fits):
    (tmp_path / "build/torch").mkdir(parents=True)
    (tmp_path / "build/torch/version.py").write_text(f"__all__ = []\n__version__ = '{version}'\n")
    done = make(tmp_path, f"CUDA_TORCH={tmp_path}/build")
    assert (done.returncode == 0) is fits, done.stderr
    assert fits or f"does not hold torch {PIN}, which constraints.txt pins" in done.stderr


def test_another_pin_gets_another_build(tmp_path):
    assert f".cuda-torch/{PIN}" in make(tmp_path, "-n").stdout
