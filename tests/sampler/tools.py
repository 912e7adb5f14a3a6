"""Small models and plain references for the sampler's tests."""

from __future__ import annotations

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from skyrl.config.schema import SamplerConfig
from skyrl.models.forward import CausalLM
from skyrl.sampler.local import LocalSampler, make_sampler
from skyrl.types import Sample, SampleRequest, SamplingParams

VOCAB = 97


def qwen3(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> CausalLM:
    """A random Qwen3 whose logits are far from flat."""
    torch.manual_seed(seed)
    shape = dict(
        hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=VOCAB, max_position_embeddings=512, initializer_range=0.25, tie_word_embeddings=True,
    )  # fmt: skip
    net = Qwen3ForCausalLM(Qwen3Config(**{**shape, **changes}, attn_implementation="sdpa")).to(dtype)
    return CausalLM(net)


def text(tokens) -> str:
    """Token 1 is "a", 2 is "b", ..., 27 is "ab", 28 "abc", 0 and the rest are "."."""
    return "".join(chr(96 + t) if 1 <= t <= 26 else {27: "ab", 28: "abc"}.get(int(t), ".") for t in map(int, tokens))


def sampler(model: CausalLM, **changes) -> LocalSampler:
    """A sampler with the module path unless told otherwise."""
    length = changes.pop("max_length", 128)
    return make_sampler(model, SamplerConfig(**{"backend": "module", **changes}), decode=text, max_length=length)


def prompts(count: int, seed: int = 0, low: int = 1, high: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB, rng.integers(low, high)) for _ in range(count)]


def run(engine: LocalSampler, requests: list[SampleRequest]) -> dict[str, Sample]:
    """Plays all requests; checks that no block is lost."""
    for request in requests:
        engine.add(request)
    done: dict[str, Sample] = {}
    for _ in range(20_000):
        if not engine.unfinished():
            break
        done.update({sample.uid: sample for sample in engine.step()})
    assert not engine.unfinished() and set(done) == {r.uid for r in requests}
    pool = engine._scheduler.pool
    pool.check()
    assert pool.held() == 0 and engine.step() == []
    return done


def requests(contexts, samples: int = 1, **params) -> list[SampleRequest]:
    """`samples` requests of each context, uid "prompt/sample", each with its own seed."""
    return [
        SampleRequest(f"{p}/{g}", tokens, SamplingParams(**{"max_tokens": 20, "seed": 1000 * p + g, **params}))
        for p, tokens in enumerate(contexts)
        for g in range(samples)
    ]


@torch.no_grad()
def reference_logprobs(model: CausalLM, context, tokens, temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities of `tokens` after `context` by a plain transformers forward."""
    ids = torch.tensor(np.concatenate([context, tokens]))[None]
    net = model.net
    net.set_attn_implementation("eager")  # sdpa leaves soft caps out
    try:
        logits = net(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        net.set_attn_implementation("skyrl")
    logprobs = torch.log_softmax(logits / temperature, -1)[len(context) - 1 : -1]
    return logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy()
