"""`make test-oldest`: the suite on the oldest Python that this machine has, and the oldest torch, transformers,
accelerate and DeepSpeed that pyproject.toml allows; all else as constraints.txt pins it, where that goes together.

python tests/oldest.py FOLDER [--pip "..."] [--resume] [pytest's own words]: FOLDER gets an environment of its own,
once. What could not be had is listed at the end, and is no failure: the line says that it was not tried. In passed.txt
are the tests that passed or were skipped; with --resume these are left out, so that an hour may be spent in parts.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("torch", "transformers", "accelerate", "deepspeed")
# Pins of what these bring themselves, which newer ones of constraints.txt do not fit.
THEIRS = (*PARTS, "tokenizers", "huggingface-hub", "hf-xet", "peft", "setuptools")
PASSED = "SKYRL_OLDEST_PASSED"  # the path of passed.txt, for pytest, to which this module is a plugin
# Read once: tests take variables away, and reports come while they are.
KEEPS = "" if "PYTEST_XDIST_WORKER" in os.environ else os.environ.get(PASSED, "")
LEFT_OUT = "slow or gpu or tinker or slurm or browser"


def floors(text: str) -> dict[str, str]:
    """name -> the lowest version that pyproject.toml allows."""
    return {name: re.search(rf'"{name}>=([0-9.]+)', text)[1] for name in PARTS}


def newest_patch(name: str, floor: str) -> str:
    """A requirement for the last patch of the oldest release: mistakes of its first day are not what is looked for."""
    return f"{name}=={floor}" if floor.count(".") > 1 else f"{name}~={floor}.0"


def oldest_python() -> str:
    """The oldest interpreter from 3.10 on that is on the path or among pyenv's, and starts."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for minor in range(10, sys.version_info.minor):
        name = f"python3.{minor}"
        for found in filter(None, [shutil.which(name), *map(str, pyenv.glob(f"3.{minor}.*/bin/{name}"))]):
            if subprocess.run([found, "-c", "import venv"], capture_output=True).returncode == 0:
                return found
    return sys.executable


def constraints(folder: Path) -> Path:
    """constraints.txt without the pins that older releases do not go with."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.startswith("#") or line.partition("==")[0] not in THEIRS]
    path = folder / "constraints.txt"
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return path


def install(folder: Path, more: list[str]) -> list[str]:
    """Makes the environment. Returns a line for each part whose oldest release could not be had."""
    python, missing = folder / "bin" / "python", []
    subprocess.run([oldest_python(), "-m", "venv", str(folder)], check=True)
    pip = [
        str(python),
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        *more,
        "-c",
        str(constraints(folder)),
    ]
    subprocess.run([*pip, "-U", "pip"], check=True)  # an old Python brings one that searches for a quarter of an hour
    asked = []
    for name, floor in floors((ROOT / "pyproject.toml").read_text(encoding="utf-8")).items():
        wanted = newest_patch(name, floor)
        done = subprocess.run([*pip, *asked, wanted], capture_output=True, text=True)
        if done.returncode:
            missing.append(f"{wanted}: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}")
        else:
            asked.append(wanted)
    subprocess.run([*pip, *asked, "-e", f"{ROOT}[dev,dashboard,age,deepspeed]"], check=True)
    (folder / "not-tried.txt").write_text("".join(f"{line}\n" for line in missing), encoding="utf-8")
    return missing


def pytest_collection_modifyitems(config, items):
    """Of pytest: leaves out what has passed in the parts before."""
    done = set(Path(os.environ[PASSED]).read_text(encoding="utf-8").splitlines())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_logreport(report):
    """Of pytest: keeps what has passed or was skipped; of several processes the one that hears of all."""
    if KEEPS and (report.skipped or (report.when == "call" and report.passed)):
        with open(KEEPS, "a", encoding="utf-8") as file:
            file.write(f"{report.nodeid}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=lambda text: Path(text).absolute())
    parser.add_argument("--pip", type=shlex.split, default=[], help="options for pip, in one word")
    parser.add_argument("--resume", action="store_true", help="only what has not passed yet")
    given, words = parser.parse_known_args()
    folder = given.folder
    if not (folder / "not-tried.txt").exists():
        shutil.rmtree(folder, ignore_errors=True)
        install(folder, given.pip)
    python = str(folder / "bin" / "python")
    # A build for CUDA that has once looked for a GPU does not look again in forked ranks: none is shown to it.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", PASSED: str(folder / "passed.txt")}
    env.setdefault("OMP_NUM_THREADS", "1")
    with open(env[PASSED], "a" if given.resume else "w", encoding="utf-8"):
        pass
    command = [
        python,
        "-m",
        "pytest",
        "-p",
        "tests.oldest",
        "-p",
        "no:cacheprovider",
        "--ignore=tests/cuda_build",  # of today's build for a GPU, which is not tried: 2.7's fake tensors abort
        "-m",
        f"not ({LEFT_OUT})",
        *words,
    ]
    code = subprocess.run(command, cwd=ROOT, env=env).returncode
    shown = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True).stdout
    held = [line for line in shown.splitlines() if line.partition("==")[0] in PARTS]
    version = subprocess.run([python, "--version"], capture_output=True, text=True).stdout.strip()
    print(f"\ntried with {version}, {', '.join(held)}")
    for line in (folder / "not-tried.txt").read_text(encoding="utf-8").splitlines():
        print(f"not tried: {line}")
    print(
        f"not tried: {LEFT_OUT.replace(' or ', ', ')}; the Tinker SDK, which needs Python 3.11; a GPU's build of torch"
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
