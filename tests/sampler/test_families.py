"""Greedy sampling equals transformers' generate token for token, and log-probs equal a plain forward, per family."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from skyrl.models.attention import AttentionOptions
from skyrl.models.attention_calls import layer_calls
from skyrl.models.forward import CausalLM, collate
from skyrl.sampler.runners import paged
from skyrl.sampler.runners.base import KVCache
from skyrl.types import Datum
from tests.families import FAMILIES, WINDOW, make_net, needs_newer
from tests.sampler.tools import TOLERANCE, adapter, merged, reference_logprobs, requests, run, sampler

FUSED = {"qwen2", "qwen3", "llama3"}  # the mistral of the list has a window, so it takes the module path


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request):
    """Name, model, prompts of several lengths, and what generate gives, 20 tokens each (longer than the window)."""
    net = make_net(request.param, attention="eager")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 96, length) for length in (1, 5, 19, 33)]
    answers = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt)[None]
        out = net.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, eos_token_id=None
        )
        answers.append(out[0, len(prompt) :].tolist())
    assert WINDOW < 20
    return request.param, CausalLM(net), prompts, answers


@pytest.mark.parametrize("backend", ["module", "auto"])
def test_greedy_equals_generate(family, backend):
    name, model, prompts, answers = family
    engine = sampler(model, backend=backend, block_tokens=4)
    if backend == "auto":
        assert (engine.backend != "module") == (name in FUSED)
    asked = requests(prompts, temperature=0.0)
    drawn = run(engine, asked)
    for request, answer in zip(asked, answers, strict=True):
        assert drawn[request.uid].tokens.tolist() == answer
        expected = reference_logprobs(model, request.tokens, drawn[request.uid].tokens)
        np.testing.assert_allclose(drawn[request.uid].logprobs, expected, atol=TOLERANCE, rtol=0)


def test_sampled_logprobs_equal_a_plain_forward(family):
    _, model, prompts, _ = family
    asked = requests(prompts, samples=3, temperature=1.0)
    engine = sampler(model, backend="auto", block_tokens=4, kv_cache_gib=0)
    drawn = run(engine, asked)
    for request in asked:
        expected = reference_logprobs(model, request.tokens, drawn[request.uid].tokens)
        np.testing.assert_allclose(drawn[request.uid].logprobs, expected, atol=TOLERANCE, rtol=0)


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor with scores that an operator gives inside: [n, K, G or L, S]."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() == 4 and out.shape[-1] == KEYS and out.shape[-2] != 8:
            self.size = max(self.size, out.numel())
        return out


KEYS = 48


@pytest.mark.parametrize("length", [1, 5])
def test_capped_scores_of_many_sequences_are_computed_in_blocks(length, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = [(20, 4, length, 8), (20, 2, KEYS, 8), (20, 2, KEYS, 8)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    mask = torch.zeros(20, 1, length, KEYS, dtype=torch.float64)
    for sequence in range(20):
        mask[sequence, :, :, 2 * sequence + 1 :] = float("-inf")
    want = paged.attention(q, k, v, mask, AttentionOptions(0.5, softcap=2.0))
    monkeypatch.setattr(paged, "MAX_SCORES", 4 * KEYS * 3)
    with Largest() as largest:
        got = paged.attention(q, k, v, mask, AttentionOptions(0.5, softcap=2.0))
    assert torch.equal(got, want) or (got - want).abs().max() < 1e-14
    assert 0 < largest.size <= paged.MAX_SCORES


def test_layers_that_share_keys_and_values_keep_them_once():
    calls = layer_calls(CausalLM(make_net("gemma3n_text")))
    shapes = [call.shape for call in calls]
    assert [shape.same_as for shape in shapes] == [None, None, 0, 1]
    cache = KVCache(shapes, 2, 4, torch.float32, torch.device("cpu"))
    assert cache.keys[2] is cache.keys[0] and cache.values[3] is cache.values[1]
    assert KVCache.block_bytes(shapes, 4, torch.float32) == 2 * 2 * 2 * 8 * 4 * 4  # layers, heads, keys and values


def test_longrope_is_chosen_by_the_longest_sequence_and_training_chooses_the_same():
    """Rows that all are beyond the length of pretraining are those of generate; shorter ones have the factors of these,
    since none is known to end before."""
    net = make_net("phi3_long", attention="eager")
    long = np.random.default_rng(0).integers(2, 96, 19)
    ids = torch.from_numpy(long)[None]
    want = net.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, eos_token_id=None)
    model = CausalLM(net)
    drawn = run(
        sampler(model, block_tokens=4, max_length=40), requests([long, long[:3]], temperature=0.0, max_tokens=8)
    )
    assert drawn["0/0"].tokens.tolist() == want[0, 19:].tolist()
    rows = [np.concatenate([context, drawn[uid].tokens]) for context, uid in ((long, "0/0"), (long[:3], "1/0"))]
    mb = collate([Datum(x[:-1], x[1:], np.ones(len(x) - 1)) for x in rows], torch.float32, "cpu")
    trained = model(mb).logprobs_T.detach().split([len(x) - 1 for x in rows])
    for uid, logprobs in zip(("0/0", "1/0"), trained, strict=True):
        np.testing.assert_allclose(drawn[uid].logprobs, logprobs[-8:], atol=TOLERANCE, rtol=0)


@needs_newer
def test_latent_attention_keeps_the_small_vector_alone():
    """Bytes of a token are those of the rank and the rotated part; an adapter of kv_b_proj counts."""
    model = CausalLM(make_net("deepseek_v3"))
    shapes = [call.shape for call in layer_calls(model)]
    assert [(shape.num_heads, shape.key_size, shape.value_size) for shape in shapes] == [(1, 16 + 8, 0)] * 2
    assert KVCache.block_bytes(shapes, 1, torch.float32) == 2 * 24 * 4  # expanded: 2 * 4 heads * (16 + 4) * 4
    adapters = {name: adapter(model, name, mlp=False) for name in ("a", "b")}
    contexts = [np.arange(2, 2 + n) for n in (3, 9, 5)]
    engine = sampler(model, block_tokens=4, adapters=adapters)
    asked = [request for name in ("", "a", "b") for request in requests(contexts, model=name, temperature=1.0)]
    drawn = run(engine, asked)
    for request in asked:
        whole = model if not request.model else merged(model, adapters[request.model])
        expected = reference_logprobs(whole, request.tokens, drawn[request.uid].tokens)
        np.testing.assert_allclose(drawn[request.uid].logprobs, expected, atol=TOLERANCE, rtol=0)
