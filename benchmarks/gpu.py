"""What one GPU does: decode speed, training MFU, hand-over, log-prob gap and peak memory, at the shapes of real models.

Random weights, so no download: the shape of Qwen3-0.6B or Qwen3-4B is written to a temporary folder and opened as a
user's model. Decoding is held against what the memory's bandwidth allows: a decode step reads all weights once and
the keys and values of every running sequence; nothing else is counted.

    python benchmarks/gpu.py --size 0.6b --write           # on a GPU machine; --size 4b for the other
    python benchmarks/gpu.py --size toy --requests 8       # a check of this script on a CPU
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import write

from skyrl.config.load import load_config
from skyrl.distributed.init import init_distributed, shutdown
from skyrl.engine import Engine, ModelSpec
from skyrl.models.tiny import tiny_tokenizer
from skyrl.planner.plan import make_plan, model_sizes
from skyrl.tracking.flops import ModelShape, causal_attended, peak_flops, train_flops
from skyrl.types import AdamParams, Datum, LossSpec, SampleRequest, SamplingParams

# layers, hidden, heads, kv heads, head size, ffn, vocabulary
SHAPES = {
    "0.6b": (28, 1024, 16, 8, 128, 3072, 151936),
    "4b": (36, 2560, 32, 8, 128, 9728, 151936),
    "toy": (2, 64, 4, 2, 16, 128, 512),
}


def write_model(folder: Path, size: str) -> None:
    """A model folder with random weights in the shape of `size`, and the project's small tokenizer."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    layers, hidden, heads, kv_heads, head, ffn, vocab = SHAPES[size]
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def sync() -> float:
    """The clock after the device has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def bandwidth() -> float:
    """Bytes per second that a device copy reads and writes: the ceiling that decoding is held against."""
    source = torch.empty(2**30 if torch.cuda.is_available() else 2**26, dtype=torch.uint8)
    source = source.to("cuda" if torch.cuda.is_available() else "cpu")
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        start = sync()
        target.copy_(source)
        best = min(best, sync() - start)
    return 2 * source.numel() / best


def decode(engine: Engine, args: argparse.Namespace, sizes) -> dict[str, float]:
    """Tokens per second over all requests, prefill included, and the bandwidth's limit for the same lengths."""
    rng = np.random.default_rng(0)
    low, high = args.lengths
    prompts, outs = rng.integers(low, high + 1, (2, args.requests))
    requests = [
        SampleRequest(str(i), rng.integers(3, 100, n), SamplingParams(int(m), seed=i))
        for i, (n, m) in enumerate(zip(prompts, outs, strict=True))
    ]
    result: dict[str, float] = {}
    for name in ("first", "second"):  # the first pass compiles and captures
        with engine.sampling("policy") as sampler:
            start = sync()
            for request in requests:
                sampler.add(request)
            drawn = []
            while sampler.unfinished():
                drawn += sampler.step()
            seconds = sync() - start
        tokens = sum(len(sample.tokens) for sample in drawn)
        result[f"{name}_pass_tokens_per_second"] = tokens / seconds
    weights = sizes.num_parameters * 2
    per_token = sizes.cache_bytes_per_token("bfloat16")
    total = 0.0
    for step in range(int(outs.max())):
        running = outs > step
        total += weights + per_token * float((prompts[running] + step).sum())
    result["limit_tokens_per_second"] = float(outs.sum()) / (total / bandwidth())
    result["part_of_limit"] = result["second_pass_tokens_per_second"] / result["limit_tokens_per_second"]
    rows = []
    for request, sample in zip(requests[:16], sorted(drawn, key=lambda s: int(s.uid))[:16], strict=True):
        ids = np.concatenate([request.tokens, sample.tokens])
        rows.append(Datum(ids[:-1], ids[1:], np.ones(len(ids) - 1, np.float32)))
    scored = engine.score(rows, 1.0).logprobs
    gaps = np.concatenate(
        [
            np.abs(row[len(r.tokens) - 1 :] - s.logprobs)
            for row, r, s in zip(scored, requests, sorted(drawn, key=lambda s: int(s.uid)), strict=False)
        ]
    )
    result.update(logprob_gap_mean=float(gaps.mean()), logprob_gap_max=float(gaps.max()))
    return result


def training(engine: Engine, args: argparse.Namespace, sizes) -> dict[str, float]:
    """Seconds and MFU of forward, backward and optimizer over 4 micro-batches of packed rows of 512 tokens, and the
    time from the end of an update to the first sampled token."""
    rng = np.random.default_rng(1)
    length = min(512, args.packed)
    rows = []
    for _ in range(4 * args.packed // length):
        ids = rng.integers(3, 100, length + 1)
        logprobs = np.full(length, -4.0, np.float32)
        rows.append(
            Datum(
                ids[:-1],
                ids[1:],
                np.full(length, 1e-4),
                sampling_logprobs=logprobs,
                advantages=np.ones(length, np.float32),
            )
        )
    spec = LossSpec("importance_sampling")
    times = []
    for _ in range(args.steps):
        start = sync()
        engine.forward_backward(rows, spec)
        engine.optim_step("policy", AdamParams(1e-6))
        times.append(sync() - start)
    start = sync()
    with engine.sampling("policy") as sampler:
        entered = sync() - start
        sampler.add(SampleRequest("0", rng.integers(3, 100, 16), SamplingParams(1)))
        while sampler.unfinished():
            sampler.step()
        first = sync() - start
    shape = ModelShape(sizes.matmul_parameters, sizes.num_layers, sizes.num_heads * sizes.head_size)
    flops = train_flops(shape, len(rows) * length, causal_attended([length] * len(rows)))
    seconds = float(np.median(times[2:] or times))
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    out = {"step_seconds": seconds, "tokens_per_second": len(rows) * length / seconds, "tflops": flops / seconds / 1e12}
    if peak:
        out["mfu"] = flops / seconds / peak
    return {**out, "hand_over_seconds": entered, "first_token_seconds": first}


def main() -> None:
    """Runs all parts on one device and prints, or with --write keeps, the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="0.6b")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--lengths", type=int, nargs=2, default=(100, 1024))
    parser.add_argument("--packed", type=int, default=4096, help="tokens of a micro-batch in training")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--strategy", default="single")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args.size)
        cfg = load_config(
            [
                f"model.path={folder}",
                "model.dtype=bfloat16",
                f"model.activation_checkpointing={str(args.checkpointing).lower()}",
                f"strategy.name={args.strategy}",
                f"batch.max_tokens_per_microbatch={args.packed}",
                "env.options={}",
                f"sampler.max_running={args.requests}",
            ]
        )
        world = init_distributed(cfg)
        sizes = model_sizes(cfg)
        plan = make_plan(cfg, world.size, model_sizes=sizes, device=world.choice)
        engine = Engine(cfg, world, dtype="bfloat16", strategy=plan.strategy, max_row_tokens=sizes.max_positions)
        engine.create("policy", ModelSpec())
    figures = {"model": f"qwen3-{args.size} shape, random", "parameters": sizes.num_parameters, "options": vars(args)}
    figures["decode"] = decode(engine, args, sizes)
    figures["training"] = training(engine, args, sizes)
    if torch.cuda.is_available():
        figures["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    for part in ("decode", "training"):
        print(part, {key: round(value, 4) for key, value in figures[part].items()})
    if args.write:
        print(write(f"gpu_{args.size}", figures))
    shutdown()


if __name__ == "__main__":
    main()
