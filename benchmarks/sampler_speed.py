"""Tokens per second of the sampler against transformers' generate with a static cache, in turns in one process.

    python benchmarks/sampler_speed.py [--sizes tiny,m12,m100] [--dtype bfloat16] [--threads 1] [--repeats 3] [--write]
    python benchmarks/sampler_speed.py --sizes smollm2-135m --batch 16 --llama BUILD/bin/llama-batched-bench --write

Every turn draws `--new` tokens for `--batch` different prompts of `--prompt` tokens at temperature 1, no stop. A size
is one of common.py's, with random weights, or a model's folder. The best turn of each side counts (both are disturbed
by the same machine), the medians are kept beside it.

limit: what the machine could do at most, measured in the same run: prompts at the rate of the fastest product of large
matrices, then each step of decoding in the longer of two times, its products at that rate and one reading of weights
and of the sequences' keys and values at the rate at which numbers are summed up. The products of attention and drawing
are not in it. weights_alone: the same without keys and values, as if attention read nothing.

--llama: llama.cpp's own benchmark of a batch, built by whoever wants to compare, on the same weights and number
format (--gguf, by its convert_hf_to_gguf.py; by default <folder>.gguf). It draws nothing, so
its time lacks what sampling costs. --write stores the result under benchmarks/baselines/<device>/sampler_speed.json, of
a folder's model under sampler_speed_<folder>_<batch>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from common import SHAPES, no_text, qwen3, write

from skyrl.config.schema import SamplerConfig
from skyrl.models.forward import CausalLM
from skyrl.sampler.make import make_sampler
from skyrl.types import SampleRequest, SamplingParams


def model_of(size: str, dtype: str) -> transformers.PreTrainedModel:
    """A model of a named size, or the one in a folder."""
    if size in SHAPES:
        return qwen3(size, getattr(torch, dtype))
    return transformers.AutoModelForCausalLM.from_pretrained(size, dtype=getattr(torch, dtype)).eval()


def peer(size: str, args: argparse.Namespace, ids: torch.Tensor) -> Callable[[], int]:
    """One turn of generate with a static cache."""
    generate: Any = model_of(size, args.dtype).generate

    def turn() -> int:
        out = generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=args.new, min_new_tokens=args.new, eos_token_id=None, pad_token_id=0,
            cache_implementation="static",
        )  # fmt: skip
        return out[:, ids.shape[1] :].numel()

    return turn


def ours(size: str, args: argparse.Namespace, ids: torch.Tensor, backend: str) -> tuple[Callable[[], int], str]:
    """One turn of the sampler, prefill included, and the name of the path that ran."""
    model = CausalLM(model_of(size, args.dtype))
    length = args.prompt + args.new
    sampler = make_sampler(model, SamplerConfig(backend=backend), decode=no_text, max_length=length)
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


def limit(size: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds that a turn takes at least, and the two rates that say so: products per second and bytes per second."""
    model = model_of(size, args.dtype)
    dtype, config = getattr(torch, args.dtype), model.config
    weights = sum(p.numel() for p in model.parameters())  # tied ones once: the head's count
    channels = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * channels * dtype.itemsize  # keys and values
    square = torch.randn(2048, 2048, dtype=dtype)
    many = torch.randint(0, 1 << 30, (2**26,))  # 512 MiB of int64: more than any cache holds
    best = {"flops": 0.0, "bytes": 0.0}
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(square, square)
        middle = time.perf_counter()
        many.sum()
        best["flops"] = max(best["flops"], 2 * 2048**3 / (middle - start))
        best["bytes"] = max(best["bytes"], many.nbytes / (time.perf_counter() - middle))
    prefill, products = (2 * weights * args.batch * n / best["flops"] for n in (args.prompt, 1))

    def seconds(of_token: int) -> float:
        read = (weights * dtype.itemsize + args.batch * (args.prompt + n) * of_token for n in range(1, args.new))
        return prefill + sum(max(products, one / best["bytes"]) for one in read)

    return {**best, "seconds": seconds(token), "weights_alone": seconds(0)}


def llama(args: argparse.Namespace, size: str) -> float:
    """Seconds of llama.cpp for the same prompts and tokens, without drawing: the best of its runs."""
    gguf = args.gguf or str(Path(size).resolve()) + ".gguf"
    shape = [
        "-npp",
        args.prompt,
        "-ntg",
        args.new,
        "-npl",
        args.batch,
        "-c",
        args.batch * (args.prompt + args.new) + 64,
    ]
    command = [args.llama, "-m", gguf, *map(str, shape), "-t", str(args.threads), "-tb", str(args.threads)]
    told = subprocess.run([*command, "--output-format", "jsonl"], capture_output=True, text=True, check=True)
    return min(json.loads(line)["t"] for line in told.stdout.splitlines() if line.startswith("{"))


def compare(size: str, args: argparse.Namespace) -> dict[str, object]:
    """Both sides in turns after one warm-up each."""
    generator = torch.Generator().manual_seed(1)
    vocab = model_of(size, args.dtype).config.vocab_size
    ids = torch.randint(3, vocab, (args.batch, args.prompt), generator=generator)
    turn, backend = ours(size, args, ids, args.backend)
    sides = {"sampler": turn, "generate_static": peer(size, args, ids)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    tokens = {name: turn() for name, turn in sides.items()}
    others: list[float] = []
    least: list[dict[str, float]] = []
    for _ in range(args.repeats):
        least.append(limit(size, args))
        if args.llama:
            others.append(llama(args, size))
        for name, turn in sides.items():
            start = time.perf_counter()
            assert turn() == tokens[name] == args.batch * args.new
            seconds[name].append(time.perf_counter() - start)
    result: dict[str, object] = {
        "size": Path(size).name,
        "parameters": sum(p.numel() for p in model_of(size, "bfloat16").parameters()),
        "backend": backend,
    }
    for name, times in seconds.items():
        result[f"{name}_tokens_per_second"] = round(tokens[name] / min(times))
        result[f"{name}_tokens_per_second_median"] = round(tokens[name] / statistics.median(times))
    result["ratio"] = round(min(seconds["generate_static"]) / min(seconds["sampler"]), 2)
    bound = min(least, key=lambda one: one["seconds"])
    result["limit"] = {key: round(value, 4) for key, value in bound.items()}
    result["share_of_limit"] = round(bound["seconds"] / min(seconds["sampler"]), 3)
    result["share_of_limit_weights_alone"] = round(bound["weights_alone"] / min(seconds["sampler"]), 3)
    if others:
        result["llama_cpp_tokens_per_second"] = round(args.batch * args.new / min(others))
        result["ratio_to_llama_cpp"] = round(min(others) / min(seconds["sampler"]), 2)
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
    parser.add_argument("--llama", default="", help="path of llama-batched-bench")
    parser.add_argument("--gguf", default="", help="the model in llama.cpp's format")
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
        folder = "" if args.sizes.split(",")[0] in SHAPES else f"_{Path(args.sizes).name}_{args.batch}"
        print(write(f"sampler_speed{folder}", {"workload": workload, "results": results}))


if __name__ == "__main__":
    main()
