"""The crash bundle: what a person wants to see of a run that ended badly, in one folder inside the run folder."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from skyrl.args import is_secret
from skyrl.run_dir import RunReader, collect_versions

METRICS_BYTES = 64 << 10
# Variables that say how the job was started, but for secrets (SLURM_JWT). Others may hold anything.
PREFIXES = ("SLURM_", "NCCL_", "GLOO_", "OMP_", "CUDA_VISIBLE", "PYTORCH_", "TORCH", "MASTER_", "HF_HUB_OFFLINE")
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


def write_bundle(run_folder: Path, report: str, table: dict[int, dict[str, Any]], stacks: dict[int, str]) -> str:
    """The path of <run folder>/crash-<time>/, or, in words, why there is none. Never raises for a disk that is full.

    Files: report.txt (why the run ended), phases.json (rank -> what it did last), stacks/rank-<n>.txt, config.yaml,
    metrics.jsonl (the last lines), environment.json (versions, packages, how the job was started).
    """
    folder = Path(run_folder) / f"crash-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        if folder.exists():
            folder = folder.with_name(f"{folder.name}-{secrets.token_hex(2)}")
        (folder / "stacks").mkdir(parents=True)
        (folder / "report.txt").write_text(report.rstrip() + "\n")
        phases = {str(rank): entry for rank, entry in sorted(table.items())}
        (folder / "phases.json").write_text(json.dumps(phases, indent=1) + "\n")
        for rank, stack in sorted(stacks.items()):
            (folder / "stacks" / f"rank-{rank}.txt").write_text(stack)
        if (run_folder / "config.yaml").exists():
            shutil.copyfile(run_folder / "config.yaml", folder / "config.yaml")
        reader, file = RunReader(run_folder), "metrics.jsonl"
        if lines := reader.before(file, reader.size(file), METRICS_BYTES):
            (folder / file).write_bytes(lines if len(lines) < METRICS_BYTES else lines[lines.find(b"\n") + 1 :])
        (folder / "environment.json").write_text(json.dumps(_environment(), indent=1) + "\n")
    except OSError as problem:
        return f"no crash bundle: {problem.strerror or problem}"
    return str(folder)


def _environment() -> dict[str, Any]:
    packages = sorted({f"{one.metadata['Name']}=={one.version}" for one in distributions()}, key=str.lower)
    names = [key for key in os.environ if (key.startswith(PREFIXES) and not is_secret(key)) or key in NAMES]
    started = {key: os.environ[key] for key in names}
    return {"versions": collect_versions(), "started_by": dict(sorted(started.items())), "packages": packages}
