"""What it brings to compute a prompt once for all its samples (batch.share_prefixes) in the training pass.

Rows of groups as the trainer makes them: `--groups` prompts with 8 and 16 samples each, prompts of 1/4, 1/2 and 3/4 of
rows of `--tokens` tokens. forward_backward of the same rows with and without, in turn, by the processor seconds of
this process (which a busy machine changes little); the ratio is the median over rounds of without / with. `score` is
the same for the pass without a gradient that old and reference log-probabilities take.

    python benchmarks/shared_prefixes.py --write
    python benchmarks/shared_prefixes.py --model folder/of/SmolLM2-135M --dtype bfloat16 --groups 2 --rounds 3 --write
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import numpy as np
from common import write

from skyrl.config.load import load_config
from skyrl.distributed.init import init_distributed
from skyrl.engine import Engine, ModelSpec
from skyrl.types import Datum, LossSpec


def rows_of(groups: int, size: int, prompt: int, length: int, vocabulary: int) -> list[Datum]:
    """Rows of `length` tokens whose first `prompt` are their group's; answers are drawn apart."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(groups):
        start = rng.integers(4, vocabulary, prompt)
        for _ in range(size):
            ids = np.concatenate([start, rng.integers(4, vocabulary, length + 1 - prompt)])
            mask = np.arange(length) >= prompt - 1
            drawn = np.where(mask, -5.0, 0.0)
            rows.append(Datum(ids[:-1], ids[1:], mask / mask.sum(), sampling_logprobs=drawn, advantages=mask * 1.0))
    return rows


def main() -> None:
    """Measures all shapes and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    cfg = load_config([f"model.path={args.model}", f"model.dtype={args.dtype}", "run.threads=1"])
    engine = Engine(cfg, init_distributed(cfg), dtype=args.dtype, strategy="single", max_row_tokens=args.tokens + 1)
    engine.create("policy", ModelSpec())
    vocabulary = engine.models["policy"].strategy.module.vocab_size
    spec, kept = LossSpec("ppo", {"clip_low": 0.2, "clip_high": 0.2}), engine.cfg

    def seconds(rows: list[Datum], shared: bool, kind: str) -> float:
        engine.cfg = dataclasses.replace(kept, batch=dataclasses.replace(kept.batch, share_prefixes=shared))
        start = time.process_time()
        if kind == "score":
            engine.score(rows, 1.0)
        else:
            engine.forward_backward(rows, spec)
        return time.process_time() - start

    found = []
    for size in (8, 16):
        for part in (0.25, 0.5, 0.75):
            rows = rows_of(args.groups, size, round(part * args.tokens), args.tokens, vocabulary)
            for kind in ("forward_backward", "score"):
                for shared in (True, False):
                    seconds(rows, shared, kind)
                pairs = [(seconds(rows, False, kind), seconds(rows, True, kind)) for _ in range(args.rounds)]
                one = {
                    "samples": size,
                    "prompt_part": part,
                    "pass": kind,
                    "apart_s": round(statistics.median(a for a, _ in pairs), 4),
                    "shared_s": round(statistics.median(b for _, b in pairs), 4),
                    "ratio": round(statistics.median(a / b for a, b in pairs), 3),
                    "ratio_of_tokens": round(size / (part + size * (1 - part)), 3),
                }
                print(one, flush=True)
                found.append(one)
    if args.write:
        name = "shared_prefixes" + ("" if args.model == "tiny" else "_smollm2")
        shape = {"tokens": args.tokens, "groups": args.groups, "dtype": args.dtype, "rounds": args.rounds}
        print(write(name, {**shape, "shapes": found}))


if __name__ == "__main__":
    main()
