"""Greedy sampling equals transformers' generate token for token, and log-probs equal a plain forward, per family."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from skyrl.models.forward import CausalLM
from skyrl.sampler.runners import paged
from tests.families import FAMILIES, WINDOW, make_net
from tests.sampler.tools import TOLERANCE, reference_logprobs, requests, run, sampler

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
    want = paged.attention(q, k, v, mask, 0.5, 2.0)
    monkeypatch.setattr(paged, "MAX_SCORES", 4 * KEYS * 3)
    with Largest() as largest:
        got = paged.attention(q, k, v, mask, 0.5, 2.0)
    assert torch.equal(got, want) or (got - want).abs().max() < 1e-14
    assert 0 < largest.size <= paged.MAX_SCORES
