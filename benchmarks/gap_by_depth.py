"""The gap between sampler and trainer on a pretrained model, by depth of context, beside transformers' own.

    skyrl-tx get-model smollm2-135m models/smollm2-135m
    python benchmarks/gap_by_depth.py models/smollm2-135m --write

At each depth the sampler continues a text (this project's own docs) at temperature 1, without a stop, and the trainer
scores what it drew; the gap is the difference of the two log-probabilities of a drawn token. Beside it stand
transformers' own forward passes of the same rows, in bfloat16 against float32: the error that every computation in
bfloat16 has. Each of three ways: float32, bfloat16, and bfloat16 with model.head_dtype=float32. What that head costs
is the CPU time and peak memory of a forward and backward pass of 2,048 tokens, in packed rows of 64.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, no_text, write
from logits_memory import peak_reset, resident, resident_peak
from transformers import AutoModelForCausalLM, AutoTokenizer

from skyrl.config.schema import ModelConfig, SamplerConfig
from skyrl.models.forward import CausalLM, collate
from skyrl.pretrained.load import build_model
from skyrl.sampler.make import make_sampler
from skyrl.types import Datum, SampleRequest, SamplingParams

DEPTHS = {"0-256": 16, "256-1k": 512, "1k-4k": 2048, "4k-8k": 6144}  # tokens before the drawn ones
WAYS = {
    "float32": ("float32", "auto"),
    "bfloat16": ("bfloat16", "auto"),
    "bfloat16, float32 head": ("bfloat16", "float32"),
}
MIB = 1 << 20


def built(args: argparse.Namespace, tokenizer: Any, way: str) -> CausalLM:
    """The model in one of the three ways."""
    dtype, head = WAYS[way]
    cfg = ModelConfig(path=str(args.folder), dtype=dtype, head_dtype=head)
    return build_model(cfg, tokenizer, dtype=getattr(torch, dtype))


def text_ids(tokenizer: Any) -> np.ndarray:
    """Ids of ordinary text, as long as the deepest context."""
    text = "\n\n".join(
        (ROOT / "docs" / name).read_text() for name in ("architecture.md", "sampler.md", "checkpoints.md")
    )
    ids = np.array(tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int64)
    assert len(ids) >= max(DEPTHS.values()), "the text is too short"
    return ids


def draw(model: CausalLM, ids: np.ndarray, args: argparse.Namespace) -> tuple[dict[str, list[Datum]], str]:
    """Rows drawn at each depth, with the sampler's log-probabilities; and the path that drew."""
    longest = max(args.depths.values()) + args.new
    sampler = make_sampler(model, SamplerConfig(), decode=no_text, max_length=longest)
    rows: dict[str, list[Datum]] = {}
    for name, depth in args.depths.items():
        for number in range(args.samples):
            params = SamplingParams(max_tokens=args.new, seed=depth + number)
            sampler.add(SampleRequest(f"{number}", ids[:depth], params))
        samples = []
        while sampler.unfinished():
            samples += sampler.step()
        rows[name] = []
        for sample in samples:
            whole = np.concatenate([ids[:depth], sample.tokens])
            weights = (np.arange(len(whole) - 1) >= depth - 1).astype(np.float32)
            logprobs = np.concatenate([np.zeros(depth - 1), sample.logprobs]).astype(np.float32)
            rows[name].append(Datum(whole[:-1], whole[1:], weights, sampling_logprobs=logprobs))
    return rows, sampler.backend


@torch.no_grad()
def trained(model: CausalLM, row: Datum) -> np.ndarray:
    """The trainer's log-probabilities of the drawn tokens."""
    out = model(collate([row], torch.float32, "cpu"))
    return out.logprobs_T.numpy()[row.weights > 0]


@torch.no_grad()
def plain(net: Any, row: Datum) -> np.ndarray:
    """transformers' own log-probabilities of the drawn tokens."""
    drawn = int((row.weights > 0).sum())
    logits = net(torch.tensor(row.tokens)[None], use_cache=False, logits_to_keep=drawn).logits[0]
    targets = torch.tensor(row.targets[-drawn:])
    return torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0].numpy()


def figures(gaps: list[np.ndarray]) -> dict[str, float]:
    """Mean and largest distance over all tokens."""
    all_ = np.abs(np.concatenate(gaps).astype(np.float64))
    return {"mean": float(f"{all_.mean():.3g}"), "max": float(f"{all_.max():.3g}"), "tokens": len(all_)}


def price(model: CausalLM, ids: np.ndarray) -> dict[str, float]:
    """CPU seconds (best of 3) and growth of the peak of memory, gradients included; both passes, 2,048 tokens."""
    rows = [Datum(ids[i : i + 64], ids[i + 1 : i + 65], np.ones(64, np.float32)) for i in range(0, 2048, 64)]
    seconds = []
    for turn in range(4):
        if turn == 0:
            gc.collect()
            before = resident()
            peak_reset()
        start = time.process_time()
        model(collate(rows, torch.float32, "cpu")).logprobs_T.sum().backward()
        seconds.append(time.process_time() - start)
    return {"cpu_seconds": round(min(seconds[1:]), 2), "peak_mib": round((resident_peak() - before) / MIB)}


def main() -> None:
    """Measures all ways and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--new", type=int, default=64, help="tokens drawn in each sample")
    parser.add_argument("--samples", type=int, default=2, help="samples at each depth")
    parser.add_argument("--depths", default=",".join(DEPTHS), help="those to measure, with commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--price", choices=list(WAYS), help="only that of one way: what a process of its own measures")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    args.depths = {name: DEPTHS[name] for name in args.depths.split(",")}
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    ids = text_ids(tokenizer)
    if args.price:
        print(json.dumps(price(built(args, tokenizer, args.price), ids)))
        return
    nets = {
        name: AutoModelForCausalLM.from_pretrained(args.folder, dtype=getattr(torch, name), attn_implementation="sdpa")
        for name in ("float32", "bfloat16")
    }
    ways: dict[str, Any] = {}
    for name, (dtype, _) in WAYS.items():
        model = built(args, tokenizer, name)
        start = time.process_time()
        rows, path = draw(model, ids, args)
        seconds = time.process_time() - start
        found: dict[str, Any] = {"sampler": path, "sampling_cpu_seconds": round(seconds, 1), "depths": {}}
        for depth, some in rows.items():
            drawn = [row.sampling_logprobs[row.weights > 0] for row in some if row.sampling_logprobs is not None]
            scores = [trained(model, row) for row in some]
            exact = [plain(nets["float32"], row) for row in some]
            found["depths"][depth] = {
                "sampler_trainer": figures([a - b for a, b in zip(drawn, scores, strict=True)]),
                "trainer_transformers_float32": figures([a - b for a, b in zip(scores, exact, strict=True)]),
            }
            if dtype == "bfloat16":
                rounded = [plain(nets["bfloat16"], row) for row in some]
                found["depths"][depth]["transformers_bfloat16_float32"] = figures(
                    [a - b for a, b in zip(rounded, exact, strict=True)]
                )
            print(name, path, depth, found["depths"][depth], flush=True)
        del model  # what was freed is not always given back, and would hide how the peak grows
        gc.collect()
        command = [sys.executable, __file__, str(args.folder), "--price", name, "--threads", str(args.threads)]
        found["price"] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(name, found["price"], f"sampling {seconds:.1f} CPU s", flush=True)
        ways[name] = found
    if args.write:
        print(write("gap_by_depth", {"model": args.folder.name, "threads": args.threads, "ways": ways}))


if __name__ == "__main__":
    main()
