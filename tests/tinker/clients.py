"""The real Tinker clients, one folder per release, made once and kept.

Each release goes into a folder of its own without dependencies; all twelve run on one shared folder of dependencies
and on this environment's numpy, torch and transformers. Folders lie under SKYRL_TEST_CLIENTS, else under the temporary
directory. Nothing is downloaded unless a caller asks for it (`make test-tinker` does).
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import importlib.metadata
import json
import os
import shutil
import site
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

RELEASES = (
    "0.3.0",
    "0.7.0",
    "0.13.1",
    "0.18.2",
    "0.22.7",
    "0.24.1",
    "0.25.0",
    "0.28.1",
    "0.30.4",
    "0.34.0",
    "0.36.0",
    "0.38.0",
)
NEWEST = RELEASES[-1]
# What the releases ask for together, less numpy, torch and transformers, which this environment has.
DEPENDENCIES = (
    "anyio>=3.5,<5",
    "click>=8",
    "distro>=1.7,<2",
    "httpx[http2]>=0.23,<1",
    "orjson>=3.10",
    "protobuf>=5.28",
    "pydantic>=2,<3",
    "pyqwest>=0.4.1",
    "rich>=13",
    "sniffio",
    "typing-extensions>=4.10",
    "zstandard>=0.24",
)
COOKBOOK = "tinker-cookbook[math-rl,multiplayer-rl]==0.5.8"
HERE = Path(__file__).resolve().parent


class Missing(Exception):
    """A client that cannot be had here; the text says why and what to do."""


def clients_folder() -> Path:
    """Where the clients lie: SKYRL_TEST_CLIENTS, else a folder of this user under the temporary directory."""
    given = os.environ.get("SKYRL_TEST_CLIENTS")
    return Path(given) if given else Path(tempfile.gettempdir()) / f"skyrl-test-clients-{getpass.getuser()}"


def release_path(release: str, *, download: bool) -> list[Path]:
    """The folders that PYTHONPATH needs for this release: its own and the dependencies', or none for the release that
    this environment has anyway. Raises Missing."""
    if sys.version_info < (3, 11):
        raise Missing("the Tinker client needs Python 3.11 or newer")
    if _own_release() == release:
        return []
    tag = f"py{sys.version_info.major}{sys.version_info.minor}"
    deps = _installed(clients_folder() / f"dependencies-{tag}", ["--upgrade", *DEPENDENCIES], download)
    return [_installed(clients_folder() / f"tinker-{release}", ["--no-deps", f"tinker=={release}"], download), deps]


def _own_release() -> str | None:
    """The release that this environment has, as extra dev brings it. Not by import: in pytest, tests/tinker itself
    answers to the name."""
    try:
        return importlib.metadata.version("tinker")
    except importlib.metadata.PackageNotFoundError:
        return None


def cookbook_python(*, download: bool) -> Path:
    """The interpreter of an environment with the cookbook. It sees this environment's packages behind its own, since
    a second torch would be gigabytes; what the cookbook pins (an older transformers) is its own."""
    if sys.version_info < (3, 11):
        raise Missing("the Tinker cookbook needs Python 3.11 or newer")
    folder = clients_folder() / f"cookbook-py{sys.version_info.major}{sys.version_info.minor}"
    python = folder / "bin" / "python"
    with _lock():
        if (folder / ".complete").exists():
            return python
        if not download:
            raise Missing(f"{folder} does not exist: make test-tinker makes it")
        shutil.rmtree(folder, ignore_errors=True)
        venv.EnvBuilder(with_pip=True, symlinks=True).create(folder)
        packages = next((folder / "lib").glob("python*/site-packages"))
        # "zz" and a path file: behind the environment's own packages on sys.path.
        (packages / "zz_outer.pth").write_text("\n".join(site.getsitepackages()) + "\n")
        _pip([str(python), "-m", "pip", "install", "-q", COOKBOOK])
        (folder / ".complete").touch()
    return python


def _installed(folder: Path, requirements: list[str], download: bool) -> Path:
    """`folder`, filled by pip on first use; a half-filled one is never seen, since it is renamed when done."""
    with _lock():
        if folder.exists():
            return folder
        if not download:
            raise Missing(f"{folder} does not exist: make test-tinker makes it")
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        _pip([sys.executable, "-m", "pip", "install", "-q", "--target", str(part), *requirements])
        part.rename(folder)
        return folder


_failed: list[str] = []


def _pip(command: list[str]) -> None:
    if _failed:  # no second wait for a network that is not there
        raise Missing(_failed[0])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        _failed.append(f"pip install {command[-1]}: no answer within 600 s")
        raise Missing(_failed[0]) from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        _failed.append(f"pip install {command[-1]}: {(errors or ['failed'])[-1]}")
        raise Missing(_failed[0])


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    folder = clients_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def client_environment(url: str, path: list[Path], **more: str) -> dict[str, str]:
    """The environment of a client process: a whole script needs no more than the URL and a key."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TINKER_", "PYTHON", "SKYRL_"))}
    proxies = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    return {
        **kept,
        **proxies,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "TINKER_BASE_URL": url,
        "TINKER_API_KEY": "tml-test",
        "TINKER_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def drive(release: str, url: str, cwd: Path, *, download: bool, timeout: float = 240, **options: object) -> dict:
    """Step -> the facts that tests/tinker/drive.py tells in one whole session of this release against `url`.

    cwd: the imitation Hub, where the client finds tokenizers by name. options: a JSON object for the script. A script
    that ends too early or too late has no "end"; "log" is what it wrote to stderr.
    """
    path = release_path(release, download=download)
    command = [sys.executable, str(HERE / "drive.py"), json.dumps(options)]
    env = client_environment(url, path)
    late = ""
    try:
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
        out, log = done.stdout, done.stderr
    except subprocess.TimeoutExpired as stopped:
        out, log = ((text or b"").decode(errors="replace") for text in (stopped.stdout, stopped.stderr))
        late = f"\nnot done after {timeout} s"
    facts: dict = {"log": log + late}
    for line in out.splitlines():
        if line.startswith("{"):
            seen = json.loads(line)
            facts[seen.pop("step")] = seen
    return facts
