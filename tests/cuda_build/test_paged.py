"""The sampler's CUDA path without a GPU: what FlashAttention 2 takes, asked of its own entry; steps on fake tensors."""

import numpy as np
import pytest
import torch

from skyrl.models.attention_calls import layer_calls
from skyrl.models.decode_plan import make_decode_plan
from skyrl.models.forward import CausalLM
from skyrl.models.lora import Adapter, install
from skyrl.sampler.runners import cuda, sampling
from skyrl.sampler.runners.base import DecodeInputs, KVCache, PrefillChunk, Sequence
from skyrl.sampler.runners.fused import FusedRunner
from skyrl.sampler.runners.paged import ModuleRunner
from skyrl.types import LoraSpec, SamplingParams
from tests.families import make_net

DRIVER = "CUDA driver"  # what is missing once the borders have been accepted


@pytest.fixture
def flash2(cuda_entry, monkeypatch):
    """The sampler's varlen_attn is FlashAttention 2's entry, called on CPU tensors."""

    def attend(
        query, key, value, first, borders, max_q, max_k, *, scale, window_size, enable_gqa, seqused_k, block_table
    ):
        left, right = window_size
        return cuda_entry(
            torch.ops.aten._flash_attention_forward.default, query, key, value, first, borders, max_q, max_k,
            0.0, window_size == (-1, 0), False, scale=scale, window_size_left=left, window_size_right=right,
            seqused_k=seqused_k, alibi_slopes=None, block_table=block_table, num_splits=None,
        )  # fmt: skip

    monkeypatch.setattr(cuda, "varlen", lambda: (attend, {"block_table"}))
    cuda.kernel_refusal.cache_clear()
    yield
    cuda.kernel_refusal.cache_clear()


@pytest.mark.parametrize(
    ("page", "key_borders", "said"),
    [(256, True, DRIVER), (512, True, DRIVER), (256, False, "must be both set or both not set")],
)
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("heads", [(16, 8, 128), (4, 4, 64), (12, 2, 128), (8, 1, 256), (32, 8, 80)])
def test_what_flash_attention_2_takes(flash2, page, key_borders, said, windowed, heads):
    """The very call of the sampler: with cu_seq_k beside cu_seq_q. (It asks the device before it looks at pages.)"""
    form = cuda.PagedKernel(page, key_borders)
    refusal = cuda.kernel_refusal(form, (*heads, windowed), torch.bfloat16, torch.device("cpu"))
    assert said in refusal


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("window", [None, 1, 2, 500])
def test_steps_of_decoding_and_prefill_are_taken(flash2, count, window):
    table = torch.tensor([[2, 1], [3, 0]], dtype=torch.int32)
    keys = torch.randn(4, 256, 8, 128).bfloat16()
    form = cuda.PagedKernel(256, key_borders=True)
    borders, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, count, count + 1], [300, 9]))
    step = cuda.VarlenAttention(form, None, table[:0], borders, lengths, count, 512, table)
    with pytest.raises(RuntimeError, match=DRIVER):
        step.over(torch.randn(count + 1, 16, 128).bfloat16(), keys, keys, 0.1, window)


@pytest.fixture(params=["qwen3", "qwen2", "llama3", "mistral", "gemma3", "olmo2"])
def asked(request):
    """A model and what its layers ask of attention; made before tensors are fake."""
    model = CausalLM(make_net(request.param)).to(torch.bfloat16)
    return model, layer_calls(model)


@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_step_is_on_the_device_and_never_waits_for_it(asked, with_adapter, fake_cuda, operators):
    """Prefill, decode and draw: a tensor of another device, or a number that is read, is an error on fake tensors."""
    device, params = torch.device("cuda", 0), [SamplingParams(1, temperature=t, top_k=k) for t, k in ((1, 0), (0.5, 3))]
    model, calls = asked
    fake_cuda(model)
    model.net.tie_weights()
    cache = KVCache([call.shape for call in calls], 8, 256, torch.bfloat16, device, tokens_first=True)
    plan, one = make_decode_plan(model, calls, 128), None
    if with_adapter:
        install(model)
        one = Adapter(model, LoraSpec(rank=4), name="a", dtype=torch.bfloat16, device=device)
    for inner in (ModuleRunner(model, cache), *([] if isinstance(plan, str) else [FusedRunner(plan, cache)])):
        form = cuda.PagedKernel(256, key_borders=True)
        runner = cuda.CudaRunner(inner, form, cache, max_length=128, max_running=8, graphs=False)
        each = [Sequence(i, "", p, np.arange(9), 8, 8, np.zeros(1), adapter=one if i else None, blocks=[i + 1])
                for i, p in enumerate(params)]  # fmt: skip
        segments = [(0, 1, None), (1, 2, one)] if one else None
        batch = DecodeInputs(np.array([1, 2]), np.array([8, 8]), np.array([[1], [2]], dtype=np.int32), segments)
        with torch.no_grad(), operators:
            rules = sampling.BatchSamplingParams.of(params, model.vocab_size, device)
            cache.copy([(1, 3)])
            for logits in (runner.prefill([PrefillChunk(s, 0, 8) for s in each]), runner.decode(batch)):
                assert logits.dtype == torch.float32 and logits.device == device
                tokens, logprobs = runner.sample(logits, rules, torch.zeros(2, dtype=torch.float64, device=device))
                assert tokens.device == logprobs.device == device
    assert operators.counts["torch_attn._varlen_attn.default"] > 0
    assert not operators.counts["aten._local_scalar_dense.default"] and not operators.blocking
