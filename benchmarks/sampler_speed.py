"""Tokens per second of the sampler against transformers' generate with a static cache, in turns in one process.

    python benchmarks/sampler_speed.py [--sizes tiny,m12,m100] [--dtype bfloat16] [--threads 1] [--repeats 3] [--write]

Every turn draws `--new` tokens for `--batch` different prompts of `--prompt` tokens at temperature 1, no stop. The
best turn of each side counts (both are disturbed by the same machine), the medians are kept beside it. --write stores
the result under benchmarks/baselines/<device>/sampler_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from common import SHAPES, qwen3, write

from skyrl.config.schema import SamplerConfig
from skyrl.models.forward import CausalLM
from skyrl.sampler.make import make_sampler
from skyrl.types import SampleRequest, SamplingParams


def peer(size: str, args: argparse.Namespace, ids: torch.Tensor) -> Callable[[], int]:
    """One turn of generate with a static cache."""
    net = qwen3(size, getattr(torch, args.dtype))

    def turn() -> int:
        out = net.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=args.new, min_new_tokens=args.new, eos_token_id=None, pad_token_id=0,
            cache_implementation="static",
        )  # fmt: skip
        return out[:, ids.shape[1] :].numel()

    return turn


def ours(size: str, args: argparse.Namespace, ids: torch.Tensor, backend: str) -> tuple[Callable[[], int], str]:
    """One turn of the sampler, prefill included, and the name of the path that ran."""
    model = CausalLM(qwen3(size, getattr(torch, args.dtype)))
    length = args.prompt + args.new
    sampler = make_sampler(model, SamplerConfig(backend=backend), decode=str, max_length=length)
    version = 0

    def turn() -> int:
        nonlocal version
        version += 1
        sampler.refresh(version)  # as in a training step: weights repacked, nothing cached
        for row, prompt in enumerate(ids.numpy()):
            params = SamplingParams(max_tokens=args.new, seed=version * 10_000 + row)
            sampler.add(SampleRequest(str(row), prompt.astype(np.int64), params))
        count = 0
        while sampler.unfinished():
            count += sum(len(sample.tokens) for sample in sampler.step())
        return count

    return turn, sampler.backend


def compare(size: str, args: argparse.Namespace) -> dict[str, object]:
    """Both sides in turns after one warm-up each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, SHAPES[size][-1], (args.batch, args.prompt), generator=generator)
    turn, backend = ours(size, args, ids, args.backend)
    sides = {"sampler": turn, "generate_static": peer(size, args, ids)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    tokens = {name: turn() for name, turn in sides.items()}
    for _ in range(args.repeats):
        for name, turn in sides.items():
            start = time.perf_counter()
            assert turn() == tokens[name] == args.batch * args.new
            seconds[name].append(time.perf_counter() - start)
    result: dict[str, object] = {
        "size": size,
        "parameters": sum(p.numel() for p in qwen3(size, torch.float32).parameters()),
        "backend": backend,
    }
    for name, times in seconds.items():
        result[f"{name}_tokens_per_second"] = round(tokens[name] / min(times))
        result[f"{name}_tokens_per_second_median"] = round(tokens[name] / statistics.median(times))
    result["ratio"] = round(min(seconds["generate_static"]) / min(seconds["sampler"]), 2)
    result["load"] = round(os.getloadavg()[0], 2)
    return result


def main() -> None:
    """Measures, prints one line per size, and stores the result if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="tiny,m12,m100")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0, help="0 = all cores")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backend", default="auto", choices=["auto", "fused", "module"])
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    args.threads = args.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    results = []
    for size in args.sizes.split(","):
        results.append(compare(size, args))
        print(json.dumps(results[-1]), flush=True)
    if args.write:
        workload = {key: getattr(args, key) for key in ("dtype", "batch", "prompt", "new", "repeats", "threads")}
        print(write("sampler_speed", {"workload": workload, "results": results}))


if __name__ == "__main__":
    main()
