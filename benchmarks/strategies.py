"""What each layout of weights over ranks costs: time and memory of a step, and what it sends.

    python benchmarks/strategies.py                    # 1, 2 and 4 ranks; writes baselines/<machine>/strategies.json
    python benchmarks/strategies.py --ranks 2 --kinds ddp,zero3 --steps 5 --dry

All make the same steps on the same rows (PPO, 16 rows of 16 to 96 tokens, two calls a step), so the losses have to be
equal; the gap is the largest difference from the first line's. Time: median of the steps after the first. Memory: the
peak of a rank while it steps (resident on a CPU, allocated on a GPU) above what it had before the model was made.
Bytes: payload of one rank's collectives (what goes in; for gathers what comes out), in one training step, in one
hand-over to the sampler, in one checkpoint's tensors.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import common  # noqa: E402

# "+": strategy.offload; "/": strategy.shard_size.
KINDS = "ddp fsdp fsdp+all hsdp/2 zero1 zero1+optimizer zero2 zero2+optimizer zero3 zero3+optimizer zero3+all".split()
MODEL = "hidden_size=256 num_layers=4 num_heads=4 num_kv_heads=2 ffn_size=704 vocab_size=2048".split()
ROWS = 16
GAP_LIMITS = (1e-5, 2e-2)  # of a loss, whose weights sum to 1: in float32 on a CPU, in bfloat16 on a GPU
# Ranks are forked from a process that has imported everything: the memory of a rank is then that of its model. Not on
# a GPU, whose memory torch counts: an import that asks for devices would start CUDA before the fork.
FORKS: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")


class Bytes(TorchDispatchMode):
    """Counts collectives by kind: `total` in bytes, `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.total: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")
        if name[0] in ("c10d", "_c10d_functional") and not name[2].startswith(("wait", "_wrap")):
            kind = next((k for k in ("gather", "scatter", "reduce", "broadcast") if k in name[2]), name[2])
            kind = {"gather": "all_gather", "scatter": "reduce_scatter"}.get(kind, kind)
            kind = "all_reduce" if kind == "reduce" and "all" in name[2] else kind
            self.calls[kind] += 1
            tensors = [sum(map(_size, group)) for group in _tensors([*args, out])]
            self.total[kind] += max(tensors, default=0)
        return out

    def report(self) -> dict[str, Any]:
        """kind -> bytes and calls."""
        return {kind: {"bytes": self.total[kind], "calls": self.calls[kind]} for kind in sorted(self.total)}


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(values: Any) -> list[list[torch.Tensor]]:
    groups = []
    for value in values:
        if isinstance(value, torch.Tensor):
            groups.append([value])
        elif isinstance(value, (list, tuple)):
            inner = _tensors(value)
            groups.append([t for group in inner for t in group])
    return groups


def rows_of(step: int) -> list[Any]:
    """The step's rows, the same whoever asks; weights sum to 1."""
    from skyrl.types import Datum

    rng = np.random.default_rng(step)
    rows = []
    for i in range(ROWS):
        length = int(rng.integers(16, 97))
        mask = (np.arange(length) >= 8).astype(np.float64)
        rows.append(
            Datum(
                tokens=rng.integers(4, 2000, length),
                targets=rng.integers(4, 2000, length),
                weights=mask,
                sampling_logprobs=np.log(1 / 2048) + 0.2 * rng.normal(size=length),
                advantages=rng.normal() * mask,
                name=f"{step}/{i}",
            )
        )
    total = sum(row.weights.sum() for row in rows)
    for row in rows:
        row.weights = row.weights / total
    return rows


def peak_reset() -> None:
    """From now on `peak` counts anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Most bytes this rank has held since `peak_reset`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def run_rank(kind: str, steps: int, out: Path, rank: int, size: int, port: int) -> None:
    """One rank's measurements, written to `out`/<rank>.json."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    from skyrl.config.load import load_config
    from skyrl.distributed.init import init_distributed, shutdown
    from skyrl.engine import Engine, ModelSpec
    from skyrl.types import AdamParams, LossSpec

    name, _, offload = kind.partition("+")
    name, _, shards = name.partition("/")
    options = [f"model.tiny.{one}" for one in MODEL] + ["run.threads=1", "batch.max_tokens_per_microbatch=512"]
    options += [f"strategy.name={'single' if name == 'ddp' and size == 1 else name}"]
    options += [f"strategy.offload={offload}"] if offload else []
    options += [f"strategy.shard_size={shards}"] if shards else []
    cfg = load_config(options)
    world = init_distributed(cfg)
    peak_reset()
    before = peak()
    dtype = "bfloat16" if world.device.type == "cuda" else "float32"
    engine = Engine(cfg, world, dtype=dtype, strategy=cfg.strategy.name, max_row_tokens=128)
    start = time.perf_counter()
    engine.create("policy", ModelSpec())
    build = time.perf_counter() - start
    spec = LossSpec("ppo", {"clip_low": 0.2, "clip_high": 0.2})
    losses, seconds = [], []

    def step(number: int) -> None:
        rows, begun = rows_of(number), time.perf_counter()
        losses.append(0.0)
        for part in (rows[: ROWS // 2], rows[ROWS // 2 :]):
            losses[-1] += engine.forward_backward(part[world.rank :: size], spec).metrics["loss:sum"]
        engine.optim_step("policy", AdamParams(lr=1e-3, grad_clip_norm=1.0))
        seconds.append(time.perf_counter() - begun)

    step(0)
    peak_reset()
    for number in range(1, steps):
        step(number)
    found: dict[str, Any] = {"build_seconds": build, "peak_bytes": peak() - before}
    found["step_seconds"] = median(seconds[1:])
    with Bytes() as sent:
        step(steps)
    found["step"] = sent.report()
    strategy = engine.models["policy"].strategy
    with torch.no_grad(), Bytes() as sent:
        strategy.gathered()
    found["hand_over"] = sent.report()
    with Bytes() as sent:
        strategy.state_dict(optimizer=True)
    found["checkpoint"] = sent.report()
    found["parameters"] = sum(t.numel() for t in strategy.state_dict(optimizer=False)["weights"].values())
    found["losses"] = losses
    (out / f"{world.rank}.json").write_text(json.dumps(found))
    shutdown()


def measure(kind: str, ranks: int, steps: int) -> dict[str, Any]:
    """One line of the table: the slowest and largest rank; bytes of rank 0."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            FORKS.Process(target=run_rank, args=(kind, steps, Path(folder), rank, ranks, port), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            if process.exitcode:
                raise SystemExit(f"{kind} on {ranks} ranks failed")
        parts = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    first = parts[0]
    worst = {key: max(part[key] for part in parts) for key in ("build_seconds", "peak_bytes", "step_seconds")}
    sent = {key: first[key] for key in ("step", "hand_over", "checkpoint", "parameters", "losses")}
    return {"kind": kind, "ranks": ranks, **worst, **sent}


def line(found: dict[str, Any], reference: list[float]) -> str:
    """A row of the printed table."""

    def mib(key: str) -> str:
        return f"{sum(part['bytes'] for part in found[key].values()) / 2**20:>8.1f}"

    gap = found["loss_gap"] = max(abs(a - b) for a, b in zip(found["losses"], reference, strict=True))
    kinds = " ".join(f"{k}:{v['bytes'] / 2**20:.1f}/{v['calls']}" for k, v in found["step"].items())
    return (
        f"{found['kind']:<16}{found['ranks']:>3}{found['step_seconds']:>9.3f}{found['peak_bytes'] / 2**20:>9.0f}"
        f"{mib('step')}{mib('hand_over')}{mib('checkpoint')}{gap:>10.1e}  {kinds}"
    )


def main() -> None:
    """Runs every kind on every number of ranks, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dry", action="store_true", help="writes no JSON")
    args = parser.parse_args()
    preload = ["skyrl.engine", "torch.distributed.fsdp"]
    if importlib.util.find_spec("deepspeed") is not None:
        os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.device_count() else "cpu"
        preload.append("deepspeed")
    FORKS.set_forkserver_preload(preload)
    found: list[dict[str, Any]] = []
    print("strategy      ranks   step s  MiB peak  step MiB  hand-over  checkpoint  loss gap   step MiB/calls by kind")
    for ranks in map(int, args.ranks.split(",")):
        for kind in args.kinds.split(","):
            if kind.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
                continue
            if "/" in kind and ranks % int(kind.partition("/")[2].partition("+")[0]):
                continue
            found.append(measure(kind, ranks, args.steps))
            print(line(found[-1], found[0]["losses"]), flush=True)
    limit = GAP_LIMITS[torch.cuda.is_available()]
    if wrong := [
        f"{one['kind']} on {one['ranks']} ranks: {one['loss_gap']:.1e}" for one in found if one["loss_gap"] > limit
    ]:
        raise SystemExit(f"losses differ from {found[0]['kind']}'s by more than {limit:.0e}: {'; '.join(wrong)}")
    if not args.dry:
        print(common.write("strategies", {"model": MODEL, "rows": ROWS, "layouts": found}))


if __name__ == "__main__":
    main()
