"""Small models and plain references for the sampler's tests."""

from __future__ import annotations

import copy

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from skyrl.config.schema import SamplerConfig
from skyrl.models.forward import CausalLM, precise
from skyrl.models.lora import Adapter
from skyrl.sampler.make import make_sampler
from skyrl.sampler.sampler import Sampler
from skyrl.types import LoraSpec, Sample, SampleRequest, SamplingParams

VOCAB = 97
TOLERANCE = 2e-5  # of log-probs with weights as large as here: float32 alone is off by up to 1e-5 from float64


def qwen3(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> CausalLM:
    """A random Qwen3 whose logits are far from flat."""
    torch.manual_seed(seed)
    shape = dict(
        hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=VOCAB, max_position_embeddings=512, initializer_range=0.25, tie_word_embeddings=True,
    )  # fmt: skip
    net = Qwen3ForCausalLM(Qwen3Config(**{**shape, **changes}, attn_implementation="sdpa")).to(dtype)
    return CausalLM(net)


def text(tokens, after=None) -> str:
    """Token 1 is "a", 2 is "b", ..., 27 is "ab", 28 "abc", 0 and the rest are "."."""
    return "".join(chr(96 + t) if 1 <= t <= 26 else {27: "ab", 28: "abc"}.get(int(t), ".") for t in map(int, tokens))


def sampler(model: CausalLM, **changes) -> Sampler:
    """A sampler with the module path unless told otherwise."""
    ours = [key for key in ("max_length", "adapters", "record_experts") if key in changes]
    given = {"max_length": 128} | {key: changes.pop(key) for key in ours}
    return make_sampler(model, SamplerConfig(**{"backend": "module", **changes}), decode=text, **given)


def adapter(model: CausalLM, name: str, size: float = 0.1, **spec) -> Adapter:
    """An adapter whose B is random: it changes every logit; size 0 leaves it fresh."""
    dtype = next(model.parameters()).dtype
    made = Adapter(
        model, LoraSpec(**{"rank": 4, "alpha": 8.0, "seed": sum(name.encode()), **spec}), name=name, dtype=dtype
    )
    generator = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for _, up in made.pairs.values():
            up.copy_(size * torch.randn(up.shape, generator=generator))
    return made


def merged(model: CausalLM, adapter: Adapter) -> CausalLM:
    """The model with W + scale B A in place of every adapted W, by plain float64 arithmetic."""
    net = copy.deepcopy(model.net)
    for path, (down, up) in adapter.pairs.items():
        linear = net.get_submodule(path)
        weight = linear.weight.detach().double() + adapter.scale * up.detach().double() @ down.detach().double()
        linear.weight = torch.nn.Parameter(weight.to(linear.weight.dtype))  # a new one: the head may be tied
    return CausalLM(net)


def prompts(count: int, seed: int = 0, low: int = 1, high: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB, rng.integers(low, high)) for _ in range(count)]


def run(engine: Sampler, requests: list[SampleRequest]) -> dict[str, Sample]:
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
    check_pool(pool)
    assert pool.held() == 0 and engine.step() == []
    assert not any(known.unfinished for known in engine._adapters._known.values())
    return done


def requests(contexts, samples: int = 1, model: str = "", **params) -> list[SampleRequest]:
    """`samples` requests of each context, uid "prompt/sample" (with a model "model:prompt/sample"), each with its own
    seed."""
    before = f"{model}:" if model else ""
    return [
        SampleRequest(
            f"{before}{p}/{g}", tokens, SamplingParams(**{"max_tokens": 20, "seed": 1000 * p + g, **params}), model
        )
        for p, tokens in enumerate(contexts)
        for g in range(samples)
    ]


@torch.no_grad()
def plain_logits(model: CausalLM, tokens) -> torch.Tensor:
    """Logits [L, V] of one row by a plain transformers forward; in float64 for a float32 model without experts."""
    net = model.net
    if net.dtype == torch.float32 and not hasattr(net.config, "num_experts_per_tok"):
        net = copy.deepcopy(net).double()
    implementation = net.config._attn_implementation
    net.set_attn_implementation("eager")  # sdpa leaves soft caps out
    try:
        with torch.no_grad(), precise(net.dtype):
            logits = net(input_ids=torch.tensor(np.asarray(tokens))[None], use_cache=False).logits[0]
    finally:
        net.set_attn_implementation(implementation)
    return logits if logits.dtype == torch.float64 else logits.float()


def reference_logprobs(model: CausalLM, context, tokens, temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities of `tokens` after `context` by a plain transformers forward."""
    logits = plain_logits(model, np.concatenate([context, tokens]))
    logprobs = torch.log_softmax(logits / temperature, -1)[len(context) - 1 : -1]
    return logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy()


def check_pool(pool):
    """No block is lost, doubled or in a wrong place."""
    free, cached = set(pool._free), set(pool._cached)
    held = {block for block in range(1, pool.num_blocks + 1) if pool._holders[block] > 0}
    assert not (free & cached or free & held or cached & held)
    assert len(pool._free) + len(pool._cached) + len(held) == pool.num_blocks
    for key, (_, block) in pool._content.items():
        assert pool._key[block] == key and block not in free
