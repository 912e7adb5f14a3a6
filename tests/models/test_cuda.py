"""What only a GPU runs: the varlen kernel and the float32 product of half-precision inputs."""

import pytest
import torch
from families import make_net
from test_forward import make_rows, plain
from test_packed import LENGTHS, loop, qkv, starts_of

from skyrl.models.attention import AttentionOptions
from skyrl.models.forward import CausalLM, collate
from skyrl.models.logprobs import log_probs, matmul_float
from skyrl.models.packed import PackedAttention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (None, 2.0), (24, None)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_equals_the_loop(window, softcap, dtype, monkeypatch):
    leaves, (q, k, v) = qkv(LENGTHS)
    want = loop(q, k, v, LENGTHS, 0.3, window, softcap)
    grads = torch.autograd.grad(want.square().sum(), leaves)
    own = [x.detach().to("cuda", dtype).requires_grad_() for x in leaves]
    attention = PackedAttention(starts_of(LENGTHS).cuda(), LENGTHS)
    if dtype == torch.bfloat16 and not softcap:
        monkeypatch.setattr(attention, "_bucketed", None)  # the kernel must be what answers
    got = attention.attend(0, *(x.transpose(0, 1) for x in own), AttentionOptions(0.3, window, softcap))
    ours = torch.autograd.grad(got.square().sum(), own)
    limit = 0.02 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip((got, *ours), (want, *grads), strict=True):
        assert (a.cpu().double() - b).norm() < limit * b.norm()


def test_product_of_bfloat16_is_not_rounded():
    hidden, weight = torch.randn(64, 512, device="cuda").bfloat16(), torch.randn(1000, 512, device="cuda").bfloat16()
    want = hidden.double() @ weight.double().T
    gap = (matmul_float(hidden, weight).double() - want).abs().max()
    assert gap < 1e-3 < (want.bfloat16().double() - want).abs().max()


def test_logprobs_in_blocks():
    hidden, weight = (torch.randn(n, 256, device="cuda").bfloat16().requires_grad_() for n in (512, 5000))
    targets = torch.randint(0, 5000, (512,), device="cuda")
    logp, entropy = log_probs(hidden, weight, targets, entropy=True, chunk_tokens=64)
    precise = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    z = torch.log_softmax(precise[0] @ precise[1].T, -1)
    want = z.gather(1, targets[:, None])[:, 0]
    assert (logp - want).abs().max() < 1e-3 and (entropy + (z.exp() * z).sum(-1)).abs().max() < 1e-3
    ours, ref = torch.autograd.grad(logp.sum(), [hidden, weight]), torch.autograd.grad(want.sum(), precise)
    assert all((a.double() - b).norm() < 0.01 * b.norm() for a, b in zip(ours, ref, strict=True))


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "mistral"])
def test_a_family_in_bfloat16(name):
    rows = make_rows()
    want = plain(make_net(name, std=0.1), rows)
    model = CausalLM(make_net(name, std=0.1)).to("cuda", torch.bfloat16)
    got = model(collate(rows, torch.float32, "cuda")).logprobs_T.cpu()
    assert (got - want).abs().mean() < 0.02
