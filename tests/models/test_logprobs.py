"""Blocked log-probabilities and entropy against plain autograd over whole logits."""

import itertools

import pytest
import torch

from skyrl import kernels
from skyrl.models import logprobs
from skyrl.models.logprobs import HeadSpec, log_probs, matmul_float
from skyrl.tracking.advisories import warn_fallback

T, C, V = 13, 8, 300


def plain(hidden, weight, bias, targets, temperature, head):
    z = torch.nn.functional.linear(hidden, weight, bias)
    z = z.to(torch.float64 if z.dtype == torch.float64 else torch.float32) * head.scale
    if head.softcap:
        z = torch.tanh(z / head.softcap) * head.softcap
    logp = torch.log_softmax(z / temperature, -1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def inputs(dtype, bias=True, tokens=T, vocab=V):
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()  # noqa: E731
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[:2] = torch.tensor([0, vocab - 1])
    return make(tokens, C), make(vocab, C), make(vocab) if bias else None, targets


HEADS = [HeadSpec(), HeadSpec(scale=0.3), HeadSpec(softcap=2.0), HeadSpec(scale=1.7, softcap=3.0)]


@pytest.mark.parametrize("head", HEADS)
def test_equals_plain_autograd_in_float64(head):
    for temperature, bias, chunk in itertools.product((1.0, 0.6), (False, True), (0, 1)):
        hidden, weight, bias_V, targets = inputs(torch.float64, bias)
        leaves = [x for x in (hidden, weight, bias_V) if x is not None]
        up = torch.randn(2, T, dtype=torch.float64)
        want = plain(hidden, weight, bias_V, targets, temperature, head)
        grads = torch.autograd.grad((want[0] * up[0] + want[1] * up[1]).sum(), leaves)
        # chunk 1: one row of logits = V entries = 128 columns at a time, so three blocks, the last one short
        got = log_probs(
            hidden, weight, targets, bias_V=bias_V, temperature=temperature, head=head, entropy=True, chunk_tokens=chunk
        )
        ours = torch.autograd.grad((got[0] * up[0] + got[1] * up[1]).sum(), leaves)
        for a, b in zip((*got, *ours), (*want, *grads), strict=True):
            assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("head", HEADS)
def test_float32_whole_rows_and_blocks_are_near_float64(head):
    """With the kernels the forward pass takes whole rows (chunk 0), or blocks of entries where these are too many."""
    for temperature, chunk in itertools.product((1.0, 0.6), (0, 1)):
        values = []
        for dtype in (torch.float64, torch.float32):
            leaves = inputs(dtype)
            out = log_probs(
                *leaves[:2], leaves[3], bias_V=leaves[2], temperature=temperature, head=head, entropy=True,
                chunk_tokens=chunk,
            )  # fmt: skip
            up = torch.linspace(-1, 1, T).to(dtype)
            grads = torch.autograd.grad((out[0] * up + out[1] * up).sum(), leaves[:3])
            values.append([*(x.detach() for x in out), *grads])
        for want, got in zip(*values, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


def test_no_tokens_and_targets_that_are_no_token():
    hidden, weight, bias, targets = inputs(torch.float32)
    for chunk in (0, 1):
        none, entropy = log_probs(hidden[:0], weight, targets[:0], bias_V=bias, entropy=True, chunk_tokens=chunk)
        assert none.shape == entropy.shape == (0,)
    if kernels.library()[0] is not None:
        targets[:2] = torch.tensor([-1, V])
        found = log_probs(hidden, weight, targets, bias_V=bias)[0]
        assert found.isnan().tolist() == [True, True] + [False] * (T - 2)


@pytest.mark.parametrize("head", HEADS)
def test_low_rank_pair_and_many_targets_equal_plain_autograd(head):
    """Three blocks of the vocabulary, the last one short; targets repeat inside a position and lie in all blocks."""
    hidden, weight, bias_V, _ = inputs(torch.float64)
    generator = torch.Generator().manual_seed(1)
    low, up = (torch.randn(n, 4, generator=generator, dtype=torch.float64).requires_grad_() for n in (T, V))
    targets = torch.randint(0, V, (T, 5), generator=generator)
    targets[:, 1] = targets[:, 0]
    leaves = [hidden, weight, bias_V, low, up]
    g, g_entropy = torch.randn(T, 5, dtype=torch.float64), torch.randn(T, dtype=torch.float64)
    dense = (hidden @ weight.T + bias_V + low @ up.T) * head.scale
    if head.softcap:
        dense = torch.tanh(dense / head.softcap) * head.softcap
    logp = torch.log_softmax(dense / 0.7, -1)
    want = logp.gather(1, targets), -(logp.exp() * logp).sum(-1)
    grads = torch.autograd.grad((want[0] * g).sum() + (want[1] * g_entropy).sum(), leaves)
    got = log_probs(
        hidden,
        weight,
        targets,
        bias_V=bias_V,
        low_rank=(low, up),
        temperature=0.7,
        head=head,
        entropy=True,
        chunk_tokens=1,
    )
    assert got[0].shape == (T, 5)
    ours = torch.autograd.grad((got[0] * g).sum() + (got[1] * g_entropy).sum(), leaves)
    for a, b in zip((*got, *ours), (*want, *grads), strict=True):
        assert (a - b).abs().max() < 1e-12


def test_one_column_of_targets_is_the_plain_case_bit_for_bit():
    hidden, weight, _, targets = inputs(torch.float32, bias=False)
    one, many = log_probs(hidden, weight, targets)[0], log_probs(hidden, weight, targets[:, None])[0]
    assert torch.equal(one, many[:, 0])
    a, b = (torch.autograd.grad(x.sum(), [hidden, weight]) for x in (one, many))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_low_rank_pair_over_a_frozen_bfloat16_head():
    hidden, weight, _, targets = inputs(torch.bfloat16, bias=False, tokens=64)
    hidden, weight = hidden.detach(), weight.detach()
    low, up = (torch.randn(n, 4).bfloat16().requires_grad_() for n in (64, V))
    want_low, want_up = (x.detach().double().requires_grad_() for x in (low, up))
    logp = log_probs(hidden, weight, targets, low_rank=(low, up), chunk_tokens=1)[0]
    logp.sum().backward()
    dense = torch.log_softmax(hidden.double() @ weight.double().T + want_low @ want_up.T, -1)
    want = dense.gather(1, targets[:, None])[:, 0]
    want.sum().backward()
    for a, b in ((logp, want), (low.grad, want_low.grad), (up.grad, want_up.grad)):
        assert (a.double() - b).norm() < 0.02 * b.norm()


def test_each_output_alone_has_the_right_gradient():
    hidden, weight, _, targets = inputs(torch.float64, bias=False)
    want = plain(hidden, weight, None, targets, 1.0, HeadSpec())
    got = log_probs(hidden, weight, targets, entropy=True, chunk_tokens=1)
    for i in range(2):
        a = torch.autograd.grad(got[i].sum(), [hidden, weight], retain_graph=True)
        b = torch.autograd.grad(want[i].sum(), [hidden, weight], retain_graph=True)
        assert all((x - y).abs().max() < 1e-12 for x, y in zip(a, b, strict=True))
    without, nothing = log_probs(hidden, weight, targets, chunk_tokens=1)
    assert nothing is None and torch.equal(without, got[0])


def test_frozen_inputs_get_no_gradient():
    hidden, weight, _, targets = inputs(torch.float32, bias=False)
    weight = weight.detach()
    log_probs(hidden, weight, targets)[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_large_logits_stay_finite():
    hidden, weight, _, targets = inputs(torch.float32, bias=False)
    hidden, weight = (hidden * 1e3).detach().requires_grad_(), weight.detach().requires_grad_()
    logp, entropy = log_probs(hidden, weight, targets, entropy=True, chunk_tokens=1)
    (logp.sum() + entropy.sum()).backward()
    want, _ = plain(hidden.double(), weight.double(), None, targets, 1.0, HeadSpec())
    assert torch.isfinite(logp).all() and torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()
    assert (logp - want).abs().max() < 1e-2 and (entropy >= -1e-3).all()


def test_bfloat16_gradient_is_near_float64_and_blocks_change_nothing():
    hidden, weight, _, targets = inputs(torch.bfloat16, bias=False, tokens=64)
    results = []
    for chunk in (0, 1):
        logp, _ = log_probs(hidden, weight, targets, chunk_tokens=chunk)
        assert logp.dtype == torch.float32
        results.append((logp.detach(), *torch.autograd.grad(logp.sum(), [hidden, weight])))
    precise = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logp, _ = plain(*precise, None, targets, 1.0, HeadSpec())
    want = torch.autograd.grad(logp.sum(), precise)
    for logp_T, dhidden, dweight in results:
        assert dhidden.dtype == dweight.dtype == torch.bfloat16
        for a, b in ((logp_T, logp), (dhidden, want[0]), (dweight, want[1])):
            assert (a.double() - b).norm() < 0.02 * b.norm()


def test_temperature_must_be_positive():
    hidden, weight, _, targets = inputs(torch.float32, bias=False)
    with pytest.raises(ValueError, match="temperature=0"):
        log_probs(hidden, weight, targets, temperature=0.0)


def test_never_holds_all_logits():
    """The largest tensor made inside, in either direction, stays at the block's size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(one, torch.Tensor):
                    self.size = max(self.size, one.numel())
            return out

    hidden, weight, _, targets = inputs(torch.float32, bias=False, tokens=256, vocab=4096)
    with Largest() as seen:
        logp, entropy = log_probs(hidden, weight, targets, entropy=True, chunk_tokens=16)
        (logp + entropy).sum().backward()
    assert 256 * 128 <= seen.size <= max(16 * 4096, weight.numel())


def test_product_is_float32():
    assert matmul_float(torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(3, 4, dtype=torch.bfloat16)).dtype == (
        torch.float32
    )


def test_a_torch_without_such_products_on_a_gpu_rounds_logits_and_says_so(monkeypatch, caplog):
    """torch 2.7, whose mm has no out_dtype: tensors of a CPU that say they are a GPU's."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(logprobs, "torch_release", lambda: (2, 7))
    warn_fallback.cache_clear()
    x, weight, bias = torch.randn(5, 8).bfloat16(), torch.randn(7, 8).bfloat16(), torch.randn(7).bfloat16()
    for _ in range(2):
        out = matmul_float(x, weight, bias)
    assert out.dtype == torch.float32 and torch.equal(out, torch.nn.functional.linear(x, weight, bias).float())
    assert ["logits are rounded to half precision" in r.message for r in caplog.records] == [True]
    assert not logprobs.sums_in_float32(x)  # so that model.head_dtype=float32 casts before
    monkeypatch.setattr(logprobs, "torch_release", lambda: (2, 8))
    assert logprobs.sums_in_float32(x)


def test_a_float32_head_is_that_of_the_same_numbers_in_float32():
    """model.head_dtype=float32: hidden states in float32 and a head in bfloat16, with bias and a low-rank pair."""
    hidden, weight, bias_V, targets = inputs(torch.bfloat16)
    low, up = torch.randn(T, 2).requires_grad_(), torch.randn(V, 2).bfloat16().requires_grad_()
    values, gradients = [], []
    for cast in (lambda x: x, torch.Tensor.float):
        leaves = [x.detach().requires_grad_() for x in (hidden.float(), cast(weight), cast(bias_V), low, cast(up))]
        out = log_probs(
            *leaves[:2], targets, bias_V=leaves[2], low_rank=(leaves[3], leaves[4]), entropy=True, chunk_tokens=1
        )
        values.append(out)
        gradients.append(torch.autograd.grad(out[0].sum() + out[1].sum(), leaves))
    for mixed, whole in zip(*values, strict=True):
        assert mixed.dtype == torch.float32
        torch.testing.assert_close(mixed, whole, atol=1e-5, rtol=1e-5)
    for mixed, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(mixed, whole.to(mixed.dtype), atol=1e-5, rtol=1e-2)


@pytest.mark.skipif(kernels.library()[0] is None, reason="no kernels here")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale, temperature", [(1.0, 1.0), (1.7, 0.6)])
def test_kernels_of_a_bfloat16_head_are_their_twins_in_torch(bias, scale, temperature, monkeypatch):
    """Entropies and log-probabilities but for roundings of float32, gradients but for one of bfloat16; a vocabulary
    that fills no vector, in three blocks, logits far from 0, a row that is all but certain."""
    hidden, weight, bias_V, targets = inputs(torch.bfloat16, bias)
    with torch.no_grad():
        hidden[3] *= 30
    leaves = [x for x in (hidden, weight, bias_V) if x is not None]
    ups = torch.randn(3, 2, T)
    ups[1, 0], ups[2, 1] = 0, 0  # the entropy's gradient alone, and none of it

    def compute():
        out = log_probs(
            hidden,
            weight,
            targets,
            bias_V=bias_V,
            temperature=temperature,
            head=HeadSpec(scale),
            entropy=True,
            chunk_tokens=1,
        )
        loss = [(out[0] * up[0] + out[1] * up[1]).sum() if up[1].any() else (out[0] * up[0]).sum() for up in ups]
        return out, [torch.autograd.grad(one, leaves, retain_graph=True) for one in loss]

    taken = []
    run = logprobs.exact_ops.run
    monkeypatch.setattr(logprobs.exact_ops, "run", lambda name, *args: (taken.append(name), run(name, *args)))
    ours, grads = compute()
    assert taken == ["skyrl_logit_sums"] * 3 + ["skyrl_logit_gradient"] * 9
    monkeypatch.setattr(logprobs.kernels, "library", lambda: (None, ""))
    want, others = compute()
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)
    for mine, theirs in zip(grads, others, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-8 * float(b.abs().max()))


@pytest.mark.skipif(kernels.library()[0] is None, reason="no kernels here")
def test_kernels_of_a_bfloat16_head_hide_no_number_that_is_none():
    hidden, weight, _, targets = inputs(torch.bfloat16, bias=False)
    with torch.no_grad():
        hidden[1] = float("nan")
        hidden[2, 0] = float("inf")
    out, entropy = log_probs(hidden, weight, targets, entropy=True)
    assert out.isnan().tolist() == entropy.isnan().tolist() == [row in (1, 2) for row in range(T)]
    out.sum().backward()
    assert hidden.grad.isnan().any(1).tolist() == [row in (1, 2) for row in range(T)]


@pytest.mark.skipif(kernels.library()[0] is None, reason="no kernels here")
def test_kernels_of_a_bfloat16_head_read_targets_that_do_not_lie_side_by_side():
    hidden, weight, _, targets = inputs(torch.bfloat16, bias=False)
    column = torch.stack([targets, targets.flip(0)], 1)[:, :1]
    assert not column.is_contiguous()
    found = []
    for given in (column, targets):
        out, _ = log_probs(hidden, weight, given)
        found.append((out.flatten(), *torch.autograd.grad(out.sum(), [hidden, weight])))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
