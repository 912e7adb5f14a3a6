"""The gap between sampler and trainer on a mixture of experts, with and without `algorithm.router.replay`.

    python benchmarks/router_replay.py --write

A random Qwen3-MoE samples from random prompts, and the trainer scores what was drawn, in packed rows: once its routers
choose for themselves, once they go where the sampler's went. Beside the gap in log-probabilities stands how many
tokens go to another expert somewhere when they are free. Weights are random, so of the gap the ratio counts.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from common import no_text, write
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from skyrl.config.schema import SamplerConfig
from skyrl.models.experts import recording, replaying
from skyrl.models.forward import CausalLM, collate
from skyrl.sampler.make import make_sampler
from skyrl.types import Datum, SampleRequest, SamplingParams

SHAPE: dict[str, Any] = dict(
    vocab_size=4096, hidden_size=256, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2, head_dim=32,
    num_experts=32, num_experts_per_tok=4, moe_intermediate_size=128, norm_topk_prob=True, max_position_embeddings=1024,
)  # fmt: skip
PROMPT, NEW, ROWS, PACK = 64, 128, 32, 8


def drawn(model: CausalLM) -> list[Datum]:
    """Rows as training has them, of requests that ran together."""
    rng = np.random.default_rng(0)
    sampler = make_sampler(model, SamplerConfig(), decode=no_text, max_length=512, record_experts=True)
    prompts = {str(n): rng.integers(2, SHAPE["vocab_size"], PROMPT) for n in range(ROWS)}
    for uid, tokens in prompts.items():
        sampler.add(SampleRequest(uid, tokens, SamplingParams(NEW, seed=int(uid))))
    rows = []
    while sampler.unfinished():
        for sample in sampler.step():
            ids = np.concatenate([prompts[sample.uid], sample.tokens])
            scored = np.concatenate([np.zeros(PROMPT - 1, np.float32), sample.logprobs])
            weights = (np.arange(len(ids) - 1) >= PROMPT - 1).astype(float)
            rows.append(Datum(ids[:-1], ids[1:], weights, sampling_logprobs=scored, experts=sample.experts))
    return rows


def gap(model: CausalLM, rows: list[Datum], *, replay: bool) -> dict[str, float]:
    """Of the drawn tokens; `elsewhere`: the part of them that go to another expert in some layer."""
    gaps, elsewhere = [], []
    for start in range(0, len(rows), PACK):
        part = rows[start : start + PACK]
        batch = collate(part, torch.float32, "cpu")
        with torch.no_grad(), recording(model) as chosen:
            if replay:
                with replaying(model, batch, balance=False):
                    out = model(batch)
            else:
                out = model(batch)
        trained = batch.weights_T > 0
        assert batch.sampling_logprobs_T is not None and batch.experts_TLK is not None
        gaps.append((out.logprobs_T - batch.sampling_logprobs_T)[trained].double())
        own = torch.stack([chosen[layer] for layer in sorted(chosen)], 1).sort(-1).values
        elsewhere.append((own != batch.experts_TLK.long().sort(-1).values).any(-1).any(-1)[trained])
    whole, moved = torch.cat(gaps), torch.cat(elsewhere).double()
    k3 = whole.exp() - 1 - whole
    return {
        "mean": float(whole.abs().mean()),
        "p99": float(whole.abs().quantile(0.99)),
        "max": float(whole.abs().max()),
        "kl": float(k3.mean()),
        "elsewhere": float(moved.mean()),
        "tokens": len(whole),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"shape": SHAPE, "rows": ROWS, "prompt": PROMPT, "new": NEW}
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        net = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SHAPE))
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.08)
        model = CausalLM(net.to(dtype).eval())
        rows = drawn(model)
        name = str(dtype).removeprefix("torch.")
        result[name] = {"free": gap(model, rows, replay=False), "replayed": gap(model, rows, replay=True)}
        print(name, result[name])
    if args.write:
        write("router_replay", result)


if __name__ == "__main__":
    main()
