"""What a run left, as plain values; the machine it ran on; and how two such records are compared.

Only files that users read too are looked at: metrics.jsonl, rollouts/, checkpoints/ and export/ of a run folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import struct
import subprocess
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from commands import RENAMED

HERE = Path(__file__).parent
# Metrics that depend on the machine's speed and memory, not on what is computed.
NOT_COMPARED = ("time/", "speed/", "memory/")
# On another machine the same formulas round differently: numbers then agree to 1e-3 of their size or 1e-4.
RELATIVE, ABSOLUTE = 1e-3, 1e-4
# Shares of tokens beyond a bound jump by whole tokens where a value lies near the bound.
SHARES, OF_SHARES = "clipped:mean", 0.02


def fingerprint() -> dict[str, str]:
    """What decides about the last bits of a result: versions of torch, the processor, and the compiler of the CPU
    kernels ("none" where they are off)."""
    import torch

    cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split(":", 1) for line in cpu.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    flags = fields.get("flags", fields.get("Features", ""))
    found = {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "machine": platform.machine(),
        "cpu": fields.get("model name", ""),
        "cpu_flags": hashlib.sha256(flags.encode()).hexdigest()[:16],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    names = (os.environ.get("CXX", ""), "g++", "c++")
    compiler = next((path for name in names if (path := shutil.which(name))), None)
    if compiler is None or os.environ.get("SKYRL_CPU_KERNELS") == "0":
        return {**found, "kernels": "none"}
    told = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    return {**found, "kernels": told.splitlines()[0] if told else compiler}


# ---- a run folder


def read_run(folder: Path) -> dict[str, Any]:
    """Metrics by step, digests of what was drawn, of the newest checkpoint and of the export."""
    return {
        "metrics": read_metrics(folder / "metrics.jsonl"),
        "rollouts": read_rollouts(folder / "rollouts"),
        "weights": {
            **checkpoint_digests(max((folder / "checkpoints").iterdir())),
            **{
                f"{path.relative_to(folder)}": _digest_tensors(_load_safetensors(path))
                for path in sorted((folder / "export").rglob("*.safetensors"))
            },
        },
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, without what depends on time and memory."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.startswith(NOT_COMPARED)} for record in records]


def one_count(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of a release that counted the steps of RL from 1, and called supervised training alone a warm-up, as
    they are written today: steps are counted over all phases."""
    warmup = max((r["step"] for r in records if r["phase"] == "warmup"), default=0)
    phase = "warmup" if any(r["phase"] == "rl" for r in records) else "sft"
    return [
        {**r, "phase": phase if r["phase"] == "warmup" else r["phase"]}
        | {"step": r["step"] + (warmup if r["phase"] == "rl" and r["step"] <= warmup else 0)}
        for r in records
    ]


def read_rollouts(folder: Path) -> dict[str, dict[str, Any]]:
    """By step (for evaluations "eval-<step>"): the number of episodes, and digests of their tokens, log-probabilities
    and rewards. Which rank played an episode makes no difference."""
    episodes = defaultdict(list)
    for path in sorted(folder.glob("*.jsonl")):
        episodes[path.stem.rpartition("-r")[0]] += [json.loads(line) for line in path.read_text().splitlines()]
    found = {}
    for step, played in sorted(episodes.items()):
        played.sort(key=lambda one: (one["uid"], one["index"]))
        turns = [turn for one in played for turn in one[_now("turns")]]
        tokens = [[turn[_now("context")], turn[_now("tokens")]] for turn in turns]
        logprobs = [turn[_now("logprobs")] for turn in turns]
        rewards = [(one["uid"], one[_now("reward")], one[_now("stop")]) for one in played]
        found[step] = {
            "episodes": len(played),
            "tokens": _digest(json.dumps(tokens)),
            "logprobs": _digest(json.dumps(logprobs)),
            "rewards": _digest(json.dumps(rewards)),
        }
    return found


def checkpoint_digests(path: Path) -> dict[str, str]:
    """A digest for each kind of tensor of each model, such as policy/weights and critic/exp_avg."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(path)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, tensor in tensors.items():
        groups["/".join(name.split("/")[:2])][name] = tensor
    return {f"checkpoint/{group}": _digest_tensors(part) for group, part in sorted(groups.items())}


def _load_safetensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path)


def _digest_tensors(tensors: dict[str, Any]) -> str:
    import torch

    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _now(name: str) -> str:
    return RENAMED.get(name, name)


# ---- comparing


def metric_differences(recorded: list[dict[str, Any]], found: list[dict[str, Any]], *, exact: bool) -> list[str]:
    """One line for each recorded number that is not found again. Further metrics are no difference.

    exact: bit for bit; otherwise to RELATIVE or ABSOLUTE."""
    lines = []
    if len(recorded) != len(found):
        lines.append(f"{len(found)} records instead of {len(recorded)}")
    for before, now in zip(one_count(recorded), one_count(found), strict=False):
        place = f"{before['phase']} step {before['step']}"
        for name, value in before.items():
            other = now.get(_now(name))
            absolute = OF_SHARES if name.endswith(SHARES) else ABSOLUTE
            if not same(value, other, exact=exact, absolute=absolute):
                lines.append(f"{place}: {_now(name)} was {shown(value)}, is {shown(other)}")
    return lines


def same(value: Any, other: Any, *, exact: bool, absolute: float = ABSOLUTE) -> bool:
    """Whether two plain values are equal: numbers bit for bit or, if not exact, to RELATIVE or `absolute`."""
    if isinstance(value, float) or isinstance(other, float):
        if not isinstance(value, (int, float)) or not isinstance(other, (int, float)):
            return False
        if exact:
            return struct.pack("<d", value) == struct.pack("<d", other)
        return value == other or abs(value - other) <= max(absolute, RELATIVE * abs(value))
    return type(value) is type(other) and value == other


def shown(value: Any) -> str:
    """A value for eyes; of a float its bits too."""
    return f"{value!r} ({value.hex()})" if isinstance(value, float) else repr(value)


def digest_differences(recorded: dict[str, Any], found: dict[str, Any], what: str) -> list[str]:
    """One line for each recorded digest that is not found again."""
    return [
        f"{what} {name}: {part} differs"
        for name, value in recorded.items()
        for part in _differing(value, found.get(name))
    ]


def _differing(value: Any, other: Any) -> Iterator[str]:
    if isinstance(value, dict) and isinstance(other, dict):
        yield from (key for key in value if value[key] != other.get(key))
    elif value != other:
        yield "it"


# ---- the recorded files


def write_record(path: Path, value: dict[str, Any]) -> None:
    """JSON with one line for each item of a list or a map of the second level, so that a change is a short diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(_lines(value)) + "\n}\n", encoding="utf-8")


def _lines(value: dict[str, Any]) -> Iterable[str]:
    for key, item in value.items():
        if isinstance(item, dict) and item:
            inside = ",\n".join(f"  {json.dumps(name)}: {json.dumps(one)}" for name, one in item.items())
            yield f" {json.dumps(key)}: {{\n{inside}\n }}"
        elif isinstance(item, list) and item:
            inside = ",\n".join(f"  {json.dumps(one)}" for one in item)
            yield f" {json.dumps(key)}: [\n{inside}\n ]"
        else:
            yield f" {json.dumps(key)}: {json.dumps(item)}"


def read_record(path: Path) -> dict[str, Any]:
    """What write_record wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
