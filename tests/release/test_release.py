"""What is published, from a tag to a run of what was installed (`make release-check`): the version, both archives, an
empty environment. Of the checkout only what is committed counts."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSION = "9.8.7"
PACKAGED = ("skyrl", "conf", "launch/slurm", "launch/grafana")  # what the wheel has of the tree, beside docs/metrics.md

pytestmark = pytest.mark.skipif(
    os.environ.get("SKYRL_TEST_RELEASE") != "1", reason="builds, and installs torch: make release-check"
)


def run(*command: object, cwd: Path, **env: str) -> str:
    words = [str(word) for word in command]
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    done = subprocess.run(words, cwd=cwd, env={**clean, **env}, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A clone of what is committed, with a tag on it."""
    folder = tmp_path_factory.mktemp("clone") / "skyrl"
    run("git", "clone", "-q", "--no-hardlinks", "--depth=1", ROOT.as_uri(), folder, cwd=ROOT)
    run("git", "tag", f"v{VERSION}", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def built(clone) -> dict[str, Path]:
    run(sys.executable, "-m", "hatchling", "build", cwd=clone)
    (wheel,) = (clone / "dist").glob("*.whl")
    (sdist,) = (clone / "dist").glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def test_the_tag_is_the_version(built, clone):
    assert built["wheel"].name == f"skyrl_spmd-{VERSION}-py3-none-any.whl"
    assert built["sdist"].name == f"skyrl_spmd-{VERSION}.tar.gz"
    run("git", "-c", "user.name=x", "-c", "user.email=x@y", "commit", "-q", "--allow-empty", "-m", "later", cwd=clone)
    later = run(sys.executable, "-m", "hatchling", "version", cwd=clone).strip()
    assert re.fullmatch(r"9\.8\.8\.dev1\+g[0-9a-f]+", later)


def test_twine_accepts_both(built, clone):
    said = run(sys.executable, "-m", "twine", "check", "--strict", *built.values(), cwd=clone)
    assert said.count("PASSED") == 2


def test_the_archives_are_complete(built, clone):
    tracked = run("git", "ls-files", cwd=clone).splitlines()
    with zipfile.ZipFile(built["wheel"]) as archive:
        names = set(archive.namelist())
        held = {name: archive.read(name) for name in names if name.endswith((".dist-info/METADATA", "LICENSE"))}
    for path in tracked:
        if path.startswith(tuple(f"{folder}/" for folder in PACKAGED)) or path == "docs/metrics.md":
            assert (path if path.startswith("skyrl/") else f"skyrl/{path}") in names, path
    kinds = {Path(name).suffix for name in names}
    assert {".cpp", ".html", ".css", ".js", ".yaml", ".sbatch"} <= kinds, kinds
    info = f"skyrl_spmd-{VERSION}.dist-info"
    assert held[f"{info}/licenses/LICENSE"] == (clone / "LICENSE").read_bytes()
    assert "skyrl/dashboard/static/uplot-LICENSE" in names  # of the script beside it
    assert not any(name.startswith(("tests/", "benchmarks/", "docs/")) or "__pycache__" in name for name in names)
    metadata = held[f"{info}/METADATA"].decode()
    assert f"\nVersion: {VERSION}\n" in metadata and "\nLicense-Expression: Apache-2.0\n" in metadata
    with tarfile.open(built["sdist"]) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    links = {name for name in tracked if (clone / name).is_symlink()}  # of the tests, which archives leave out
    assert set(tracked) - links <= sources
    assert {"LICENSE", "PKG-INFO", "pyproject.toml", "tests/release/test_release.py"} <= sources


def test_a_wheel_from_the_sdist_is_the_same(built, tmp_path):
    """Without git: the version is in the sdist."""
    with tarfile.open(built["sdist"]) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / f"skyrl_spmd-{VERSION}"
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=folder)
    with zipfile.ZipFile(tmp_path / built["wheel"].name) as ours, zipfile.ZipFile(built["wheel"]) as theirs:
        assert sorted(ours.namelist()) == sorted(theirs.namelist())
        changed = [name for name in ours.namelist() if ours.read(name) != theirs.read(name)]
        assert changed == [], changed


def test_it_trains_from_an_empty_environment(built, tmp_path):
    """The wheel with its own requirements, nowhere near a checkout. Options for pip as PIP_ARGS of make has them."""
    home, empty = tmp_path / "env", tmp_path / "empty"
    empty.mkdir()
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    more = os.environ.get("SKYRL_TEST_PIP_ARGS", "").split()
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *more, "-c", ROOT / "constraints.txt"]
    run(*pip, "torch", cwd=empty)
    run(*pip, f"{built['wheel']}[serve]", cwd=empty)
    assert run(home / "bin" / "skyrl-tx", "--version", cwd=empty) == f"skyrl {VERSION}\n"
    assert "skyrl-tx <command>" in run(home / "bin" / "skyrl-tx", "--help", cwd=empty)
    options = "run.name=first batch.num_steps=2 warmup.num_steps=2 eval.num_prompts=4 model.tiny.num_layers=2".split()
    env = {"OMP_NUM_THREADS": "1", "PATH": f"{home / 'bin'}:{os.environ['PATH']}"}
    said = run(home / "bin" / "torchrun", "--nproc_per_node=2", "-m", "skyrl.train", *options, cwd=empty, **env)
    assert "done: held-out accuracy" in said and (empty / "runs/first/export/model.safetensors").exists()
    card = (empty / "runs/first/export/README.md").read_text(encoding="utf-8")
    assert f"skyrl {VERSION}" in card
