"""What every benchmark writes beside its figures: hardware, versions, commit, command, load."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def processor() -> str:
    """The CPU's name, or the GPU's where there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def hardware_name() -> str:
    """Folder of baselines/ for this machine: "cpu-2core", "nvidia-h100-80gb-hbm3"."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{len(os.sched_getaffinity(0))}core"


def provenance() -> dict[str, Any]:
    """Where and when a figure was measured."""
    import torch
    import transformers

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True).stdout.strip()

    return {
        "hardware": {"processor": processor(), "cores": len(os.sched_getaffinity(0)), "system": platform.platform()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no", "--", "skyrl", "benchmarks")),
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "load_average": os.getloadavg()[0],
    }


def write(name: str, figures: dict[str, Any]) -> Path:
    """Writes baselines/<hardware>/<name>.json and returns its path."""
    path = ROOT / "benchmarks" / "baselines" / hardware_name() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**provenance(), **figures}, indent=1) + "\n")
    return path
