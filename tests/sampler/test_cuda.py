"""The CUDA runner: its indices, paddings and borders on a CPU against a slow stand-in written from the contract of
torch.nn.attention.varlen (which has no CPU kernel); the real kernels and graphs where there is a GPU."""

import numpy as np
import pytest
import torch

from skyrl.models.forward import CausalLM
from skyrl.sampler.runners import cuda
from tests.families import make_net
from tests.sampler.tools import adapter, merged, prompts, qwen3, reference_logprobs, requests, run, sampler


def slow_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa, seqused_k, block_table
):
    """torch's documented meaning: pages of each sequence by block_table, queries aligned at the end of the keys."""
    assert cu_seq_k is None and key.dim() == 4 and block_table.dtype == torch.int32
    out = torch.empty_like(query)
    group = query.shape[1] // key.shape[2]
    assert enable_gqa or group == 1
    for s in range(len(seqused_k)):
        rows, count = slice(cu_seq_q[s], cu_seq_q[s + 1]), int(seqused_k[s])
        length = rows.stop - rows.start
        assert length <= max_q and count <= max_k
        k, v = (x[block_table[s].long()].flatten(0, 1)[:count].repeat_interleave(group, 1) for x in (key, value))
        scores = torch.einsum("qhc,khc->hqk", query[rows], k) * scale
        at = torch.arange(count - length, count)[:, None]
        seen = torch.arange(count)[None] <= at
        if window_size[0] >= 0:
            seen &= torch.arange(count)[None] >= at - window_size[0]
        out[rows] = torch.einsum("hqk,khc->qhc", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)
    return out


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(cuda, "varlen_function", lambda: slow_varlen)
    monkeypatch.setattr("skyrl.sampler.make.page_size", lambda wanted, *rest: 8)
    monkeypatch.setattr("skyrl.sampler.make._DISAGREEMENTS", {})
    monkeypatch.setattr("skyrl.sampler.make.unsupported_reason", lambda plan, cache: "off in this test")


@pytest.mark.parametrize("backend", ["module", "fused"])
def test_padded_batches_and_pages(stand_in, backend):
    model = qwen3()
    asked = requests(prompts(6), samples=3, max_tokens=15)  # 18 sequences: padded to 24, then fewer
    engine = sampler(model, backend=backend, kv_cache_gib=50 * 3 * 2 * 2 * 16 * 4 * 8 / 2**30)
    assert isinstance(engine._runner, cuda.CudaRunner) and engine.backend == backend
    engine._scheduler.max_prefill_tokens = 11
    drawn = run(engine, asked)
    assert engine.metrics()["sampler/preemptions:sum"] > 0 and len(engine._runner._buffers) > 1
    for request in asked:
        expected = reference_logprobs(model, request.tokens, drawn[request.uid].tokens)
        np.testing.assert_allclose(drawn[request.uid].logprobs, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["module", "fused"])
def test_adapters_beside_padding(stand_in, backend):
    model = qwen3()
    adapters = {name: adapter(model, name) for name in "ab"}
    models = {"": model} | {name: merged(model, each) for name, each in adapters.items()}
    asked = [r for name in models for r in requests(prompts(3), samples=2, model=name, max_tokens=12)]
    engine = sampler(model, backend=backend, adapters=adapters)
    assert isinstance(engine._runner, cuda.CudaRunner)
    drawn = run(engine, asked)
    engine.forget_adapter("a")
    for request in asked:
        expected = reference_logprobs(models[request.model], request.tokens, drawn[request.uid].tokens)
        np.testing.assert_allclose(drawn[request.uid].logprobs, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_windows(stand_in, family):
    model = CausalLM(make_net(family))
    asked = requests([np.arange(2, 30), np.arange(5, 9)], samples=2)
    drawn = run(sampler(model, backend="module"), asked)
    for request in asked:
        expected = reference_logprobs(model, request.tokens, drawn[request.uid].tokens)
        np.testing.assert_allclose(drawn[request.uid].logprobs, expected, atol=1e-5, rtol=0)


def test_second_update_is_seen_in_place(stand_in):
    model = qwen3()
    engine = sampler(model, backend="fused")
    asked = requests(prompts(2))
    addresses = {tensor.data_ptr() for tensor in engine._runner._inner._qk_scale}
    for version in (1, 2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
        engine.refresh(version)
        drawn = run(engine, asked)
        for request in asked:
            expected = reference_logprobs(model, request.tokens, drawn[request.uid].tokens)
            np.testing.assert_allclose(drawn[request.uid].logprobs, expected, atol=1e-5, rtol=0)
    assert addresses == {tensor.data_ptr() for tensor in engine._runner._inner._qk_scale}


def test_the_installed_torch_is_asked_for_what_it_has():
    """On 2.13 the paged arguments are there; where they are not, the answer is None, not an error later."""
    function = cuda.varlen_function()
    assert function is None or callable(function)
    if torch.__version__ >= "2.13":
        assert function is not None
    assert cuda.page_size(16, [], torch.bfloat16, torch.device("cpu")) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["module", "fused"])
@pytest.mark.parametrize("graphs", [False, True])
def test_on_a_gpu(backend, graphs):
    model = qwen3(dtype=torch.bfloat16, hidden_size=256, head_dim=64).cuda()
    exact = qwen3(dtype=torch.bfloat16, hidden_size=256, head_dim=64).to(torch.float32)
    engine = sampler(model, backend=backend, cuda_graphs=graphs)
    asked = requests(prompts(9), samples=3)
    drawn = run(engine, asked)
    gaps = [drawn[r.uid].logprobs - reference_logprobs(exact, r.tokens, drawn[r.uid].tokens) for r in asked]
    assert np.sqrt(np.mean(np.concatenate(gaps) ** 2)) < 0.2
    assert engine.backend == backend
