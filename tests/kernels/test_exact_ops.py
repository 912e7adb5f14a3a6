"""Float32 operations with less rounding against float64: how far off, and their gradients."""

from types import FunctionType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import make_net

from skyrl import kernels
from skyrl.kernels import exact_ops
from skyrl.models.forward import CausalLM, collate
from skyrl.types import Datum


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """Root mean square of the error, relative to that of `want`."""
    return float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())


def gradients(function, inputs, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    up = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(dtype)
    return out.detach(), torch.autograd.grad(out, leaves, up)


def close(ours, theirs, inputs, value_limit):
    (got, grads), (want, exact) = gradients(ours, inputs, torch.float32), gradients(theirs, inputs, torch.float64)
    assert off(got, want) < value_limit
    assert all(off(a, b) < 1e-6 for a, b in zip(grads, exact, strict=True))


@pytest.fixture(params=["kernels", "onednn", "torch"])
def path(request, monkeypatch):
    """With the compiled kernels, with oneDNN's products, and without either."""
    if request.param != "kernels":
        monkeypatch.setattr(kernels, "library", lambda: (None, "off in this test"))
    elif why := kernels.library()[1]:
        pytest.skip(why)
    if request.param == "torch":
        monkeypatch.setattr(exact_ops, "has_packed_product", lambda dtype: False)
    elif not exact_ops.has_packed_product(torch.float32):
        pytest.skip("torch without oneDNN")
    return request.param


@pytest.mark.parametrize("inner", [33, 256, 704, 2816])
@pytest.mark.parametrize("path", ["kernels", "onednn"], indirect=True)
def test_a_row_of_a_product_depends_on_nothing_beside_it(path, inner):
    """Whatever the number of rows and columns; also of the product with the transposed weight, which is the gradient's.
    What training computes in one long product, the sampler computes in steps of other sizes."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(700, inner), torch.randn(170, inner), torch.randn(170)
    whole, turned = exact_ops.product(x, weight, bias), exact_ops.matmul(x, weight.t().contiguous())
    assert off(whole, F.linear(x.double(), weight.double(), bias.double())) < 1e-6
    for rows in (*range(1, 40), 63, 64, 65, 128, 255, 256, 511, 699):
        for start in (0, 700 - rows):
            part = slice(start, start + rows)
            assert torch.equal(exact_ops.product(x[part], weight, bias), whole[part]), rows
            assert torch.equal(exact_ops.matmul(x[part], weight.t().contiguous()), turned[part]), rows
    for columns in (slice(0, 1), slice(5, 21), slice(100, 170)):
        assert torch.equal(exact_ops.product(x, weight[columns], bias[columns]), whole[:, columns])
        assert torch.equal(exact_ops.product(x, weight[columns]).add_(bias[columns]), whole[:, columns])


def test_linear_sums_in_blocks(path):
    limit = 6e-7 if path == "onednn" else 1.7e-7  # one sum of 704: 3.7e-7
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 50, 704), torch.randn(65, 704) * 0.02, torch.randn(65)
    close(exact_ops.linear, F.linear, (x, weight, bias), limit)
    close(exact_ops.linear, F.linear, (x[..., :33], weight[:, :33]), limit)  # a last block of one


def test_linear_leaves_other_numbers_alone(path):
    x, weight = torch.randn(4, 64), torch.randn(5, 64)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(exact_ops.linear(x.to(dtype), weight.to(dtype)), F.linear(x.to(dtype), weight.to(dtype)))
    assert exact_ops.linear(x[:0], weight).shape == (0, 5)


def test_products_as_zero3_writes_them_are_taken_too(path):
    """DeepSpeed puts its own function in the place of F.linear; in careful passes it gives the same bits."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(50, 704), torch.randn(65, 704), torch.randn(65)
    with exact_ops.enabled(True):
        drawn = [x.matmul(weight.t()), x @ weight.t(), torch.matmul(x, weight.t())]
        biased = torch.addmm(bias, x, weight.t())
        scores = torch.matmul(x.view(2, 25, 704), x.view(2, 704, 25))
    assert all(torch.equal(one, exact_ops.linear(x, weight)) for one in drawn)
    assert torch.equal(biased, exact_ops.linear(x, weight, bias))
    assert torch.equal(scores, torch.matmul(x.view(2, 25, 704), x.view(2, 704, 25)))  # no weight in it


ODD_CALLS = {
    "by name": lambda x, w: F.silu(input=F.linear(input=x, weight=w, bias=w[:, 0])),
    "a vector": lambda x, w: F.linear(x, w[0]),
    "one bias": lambda x, w: F.linear(x, w, w[:1, 0]),
    "added rows": lambda x, w: torch.addmm(x @ w.t() + 1, x, w.t()),
    "an added number": lambda x, w: torch.addmm(w[0, 0], x, w.t()),
    "no columns": lambda x, w: x @ w[:0].t(),
}


@pytest.mark.parametrize("call", ODD_CALLS.values(), ids=ODD_CALLS)
def test_calls_that_torch_takes_in_other_shapes_are_torch_s(path, call):
    """A kernel sees no shapes: of a bias that is not one number a column it would read what lies behind it."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 64), torch.randn(33, 64)
    with exact_ops.enabled(True):
        got = call(x, weight)
        with pytest.raises(RuntimeError):
            F.linear(x[:, :60], weight)
    want = call(x.double(), weight.double())
    assert got.shape == want.shape and torch.allclose(got.double(), want, rtol=1e-4, atol=1e-4)


def test_attention_is_rounded_once(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(exact_ops, "CHUNK_SCORES", 2 * 14 * 7)  # two matrices at a time, one in the last chunk
    q, k, v = torch.randn(5, 14, 64) * 3, torch.randn(5, 7, 64) * 3, torch.randn(5, 7, 64)
    bias = torch.zeros(14, 7).masked_fill(torch.ones(7, 7).triu(1).bool().repeat(2, 1), float("-inf"))

    def plain(q, k, v):
        return torch.softmax(q @ k.transpose(1, 2) * 0.2 + bias.to(q.dtype), -1) @ v

    def ours(q, k, v):
        return exact_ops.attend(q, k, v, bias, 0.2)

    close(ours, plain, (q, k, v), 4e-8)  # float32 throughout: 6e-7


@pytest.mark.parametrize("kept", [1 << 24, 3 * 27 * 27])
def test_causal_attention_by_the_kernels(kept, monkeypatch):
    """Two queries a key, rows that do not fill vectors; weights kept, or computed again two matrices at a time."""
    if why := kernels.library()[1]:
        pytest.skip(why)
    monkeypatch.setattr(exact_ops, "KEEP_SCORES", kept)
    torch.manual_seed(0)
    q, k, v = torch.randn(5, 54, 48), torch.randn(5, 27, 48), torch.randn(5, 27, 48)
    bias = torch.zeros(54, 27).masked_fill(torch.ones(27, 27).triu(1).bool().repeat(2, 1), float("-inf"))

    def plain(q, k, v):
        return torch.softmax(q @ k.transpose(1, 2) * 0.3 + bias.to(q.dtype), -1) @ v

    assert exact_ops.kernel_can_attend(q, 2, 27, 48, 48) and not exact_ops.kernel_can_attend(q, 2, 27, 40, 40)
    assert not exact_ops.kernel_can_attend(q.double(), 2, 27, 48, 48) and not exact_ops.kernel_can_attend(
        q, 2, kernels.LONGEST + 1, 48, 48
    )
    close(lambda *x: exact_ops.attend_causal(*x, 0.3), plain, (q, k, v), 2e-7)


def test_activation(path):
    x = torch.randn(7, 37) * 20  # its last numbers do not fill a vector
    close(exact_ops.silu, F.silu, (x,), 1e-7)
    assert torch.equal(exact_ops.silu(x.double()), F.silu(x.double()))


def test_norms(path):
    torch.manual_seed(0)
    x, weight = torch.randn(200, 256) * 5, 1 + 0.1 * torch.randn(256)

    def plain(x, weight):
        return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))

    close(lambda x, w: exact_ops.rms_norm(x, w, 1e-6), plain, (x, weight), 7e-8 if path == "kernels" else 9e-8)
    if path != "kernels":
        return
    want = plain(x.double(), weight.double())

    def common(y):  # an error of all channels of a row does not average out
        return float(((y.double() / want).mean(-1) - 1).abs().max())

    assert common(exact_ops.rms_norm(x, weight, 1e-6)) < 2e-8 < 5e-8 < common(plain(x, weight))


def microbatch():
    rng = np.random.default_rng(0)
    return collate(
        [Datum(rng.integers(0, 96, n), rng.integers(0, 96, n), rng.random(n)) for n in (5, 24, 13)],
        torch.float32,
        "cpu",
    )


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_recomputed_layers_give_the_same_bits(name, path):
    """A layer that is recomputed in the backward pass, outside of `enabled`, is rounded as in the forward pass."""
    mb, seen = microbatch(), []
    for recompute in (False, True):
        model = CausalLM(make_net(name, std=0.1))
        if recompute:
            model.checkpoint_layers()
        out = model(mb)
        (out.logprobs_T * mb.weights_T).sum().backward()
        seen.append([out.logprobs_T.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert not exact_ops.is_enabled()


def test_norms_are_replaced_in_our_forward_only(monkeypatch):
    calls = []
    monkeypatch.setattr(exact_ops, "rms_norm", lambda x, weight, eps: calls.append(1) or rms_norm(x, weight, eps))
    rms_norm, mb = exact_ops.__dict__["_Norm"].apply, microbatch()
    model = CausalLM(make_net("qwen3"))
    model.net(input_ids=mb.tokens_T[None, :5], skyrl_attention=_Own())
    assert not calls
    model(mb)
    assert len(calls) == 4 * len(model.layers()) + 1  # two of the layer, of queries, of keys; the last one
    calls.clear()
    model.to(torch.bfloat16)(mb)
    CausalLM(make_net("gemma2"))(mb)  # its norms multiply by 1 + weight
    assert not calls


class _Own:
    def attend(self, layer, query, key, value, options):
        group = query.shape[0] // key.shape[0]
        key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=options.scale).transpose(0, 1)


@pytest.mark.skipif(kernels.library()[0] is None, reason="no kernels here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40,), (3, 64), (5, 7)])
def test_rows_are_summed_as_torch_sums_them_in_float32(dtype, shape):
    """To the bit; rows that nobody takes are zero; of a view whose parts do not follow each other as well."""
    index = torch.cat([torch.arange(9), torch.arange(4), torch.tensor([11, 2])])
    plain = torch.randn(len(index), *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    turned = plain.transpose(0, 1).contiguous().transpose(0, 1) if plain.ndim == 3 else plain
    want = torch.zeros(12, *shape).index_put_((index,), plain.float(), accumulate=True).to(dtype)
    for x in (plain, turned):
        assert torch.equal(exact_ops.sum_rows(x, index, 12), want)
    assert exact_ops.sum_rows(plain.double(), index, 12) is None


def norm_of(size):
    norm = make_net("qwen3").model.norm
    norm.weight = torch.nn.Parameter(torch.linspace(-2, 3, size).bfloat16())
    return norm


@pytest.mark.skipif(kernels.library()[0] is None, reason="no kernels here")
@pytest.mark.parametrize("size", [16, 576])
def test_bfloat16_norms_are_the_module_s_bits_and_their_gradients_nearer_to_float64(size, monkeypatch):
    norm = norm_of(size)
    x = 2 * torch.randn(3, 50, size, generator=torch.Generator().manual_seed(1))
    up = torch.randn(3, 50, size, generator=torch.Generator().manual_seed(2))
    plain, found = type(norm).forward, {}
    exact_ops.hook_norms(norm)
    for name, on in (("module", False), ("ours", True)):
        leaf = x.bfloat16().requires_grad_()
        with exact_ops.enabled(on):
            out = norm(leaf)
        assert on == ("HalfNorm" in out.grad_fn.name())
        found[name] = out, *torch.autograd.grad(out, [leaf, norm.weight], up.bfloat16())
    assert torch.equal(found["ours"][0], found["module"][0])
    precise = x.bfloat16().double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    scale = (precise.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    want = torch.autograd.grad(weight * precise * scale, [precise, weight], up.bfloat16().double())
    for ours, theirs, exact in zip(found["ours"][1:], found["module"][1:], want, strict=True):
        assert ours.dtype == torch.bfloat16 and off(ours, exact) < 1.4 * off(theirs, exact) < 0.01
    assert off(found["ours"][1], want[0]) < off(found["module"][1], want[0])
    with exact_ops.enabled(True), monkeypatch.context() as m:  # without a compiler, and for float32 inputs
        m.setattr(kernels, "library", lambda: (None, "off in this test"))
        assert torch.equal(norm(x.bfloat16()), plain(norm, x.bfloat16()))


@pytest.mark.skipif(kernels.library()[0] is None, reason="no kernels here")
@pytest.mark.parametrize("family", ["llama3", "olmo2", "gpt_oss"])
def test_a_bfloat16_norm_rounds_where_its_family_does(family):
    """Llama's rounds before it multiplies by its weight, those of OLMo 2 and gpt-oss do not."""
    norm = make_net(family, hidden_size=64).model.norm.bfloat16()
    x = 3 * torch.randn(50, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    plain = norm(x)
    exact_ops.hook_norms(norm)
    with exact_ops.enabled(True):
        out = norm(x)
    assert torch.equal(out, plain) and ("HalfNorm" in out.grad_fn.name()) == (family == "llama3")


@pytest.mark.skipif(kernels.library()[0] is None, reason="no kernels here")
def test_a_bfloat16_gate_of_every_number_there_is():
    """Both values and gradients, as near to float64 as a rounding, down to what bfloat16 keeps no digits of."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[torch.isfinite(every) & ((every == 0) | (every.abs() > 1e-30))]
    every = every[: len(every) // 16 * 16]
    found = []
    for kind in (torch.bfloat16, torch.float64):
        gate, up = (x.to(kind).requires_grad_() for x in (every, torch.ones_like(every)))
        out = exact_ops._HalfGate.apply(gate, up) if kind == torch.bfloat16 else F.silu(gate) * up
        found.append((out, *torch.autograd.grad(out, [gate, up], torch.ones_like(out))))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2**-7, atol=1e-4)


def half_parts():
    """The MLP and the attention of one layer in bfloat16, with sizes that the kernels take; x, cos and sin."""
    net = make_net("qwen3", hidden_size=64, intermediate_size=96, head_dim=32).bfloat16()
    model = CausalLM(net)
    x = torch.randn(1, 37, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    cos, sin = net.model.rotary_emb(x, torch.arange(37)[None])
    return model, net.model.layers[0].mlp, net.model.layers[0].self_attn, x, cos, sin


@pytest.mark.skipif(kernels.library()[0] is None, reason="no kernels here")
@pytest.mark.parametrize("part", ["gate", "rotation"])
def test_gates_and_rotary_embeddings_in_bfloat16_are_the_module_s(part):
    """Rotations to the bit, gates but for a rounding here and there (another e^x); gradients nearer to float64."""
    _, mlp, attention, x, cos, sin = half_parts()
    mlp.down_proj = torch.nn.Identity()
    turn = type(attention).forward.__globals__[exact_ops.ROTARY]
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(1, 37, 4, 32, generator=generator).bfloat16().transpose(1, 2)
    k = torch.randn(1, 37, 2, 32, generator=generator).bfloat16().transpose(1, 2)

    def parts(given):
        if part == "gate":
            return [mlp(given[0])]
        return list(turn(*given, *(t.to(given[0].dtype) for t in (cos, sin))))

    found = {}
    for name, on, dtype in (("module", False, None), ("ours", True, None), ("float64", False, torch.float64)):
        mlp.double() if dtype else mlp.bfloat16()
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in ([x] if part == "gate" else [q, k])]
        with exact_ops.enabled(on):
            out = parts(leaves)
        assert on == ("_Half" in out[0].grad_fn.name())
        up = [torch.cos(torch.arange(o.numel(), dtype=torch.float64)).view(o.shape).to(o.dtype) for o in out]
        weights = [*mlp.parameters()] if part == "gate" else []
        found[name] = out, torch.autograd.grad(out, [*leaves, *weights], up)
    for ours, theirs in zip(found["ours"][0], found["module"][0], strict=True):
        assert ours.shape == theirs.shape and ours.dtype == torch.bfloat16
        same = (ours == theirs).double().mean()
        assert same == 1 if part == "rotation" else same > 0.995 and off(ours, theirs.double()) < 1e-3
    for ours, theirs, exact in zip(found["ours"][1], found["module"][1], found["float64"][1], strict=True):
        assert ours.dtype == torch.bfloat16 and off(ours, exact) < 1.1 * off(theirs, exact) < 0.02


@pytest.mark.skipif(kernels.library()[0] is None, reason="no kernels here")
@pytest.mark.parametrize("length", [1, 5, 16, 17, 80, 133])
@pytest.mark.parametrize("group, scale", [(1, 0.125), (3, 1.7), (2, -0.5), (2, 0.0)])
def test_a_causal_softmax_in_bfloat16_is_rounded_once_each_way(length, group, scale):
    torch.manual_seed(length)
    scores = (4 * torch.randn(3, group * length, length)).bfloat16()
    scores[0, 0, 0] = 1e38  # a huge product leaves its row finite all the same
    unseen = torch.ones(length, length).triu(1).bool().repeat(group, 1)
    given = [scores.clone().requires_grad_(), scores.double().requires_grad_()]
    grad = torch.randn_like(scores)
    got = exact_ops.causal_softmax(given[0] * 1, scale)
    want = (given[1] * scale).masked_fill(unseen, float("-inf")).softmax(-1)
    assert (got.double() - want).detach().abs().max() < 2**-8 and not got[:, unseen].any()
    got.backward(grad)
    weights = got.detach().double()  # as they are kept
    exact = weights * (grad.double() - (weights * grad.double()).sum(-1, keepdim=True)) * scale
    worst = (given[0].grad.double() - exact).abs().max()
    assert worst <= 2**-8 * exact.abs().max() and not given[0].grad[:, unseen].any()
    scores[1, -1, 0] = float("nan")
    assert exact_ops.causal_softmax(scores, scale)[1, -1].isnan().all()


@pytest.mark.skipif(kernels.library()[0] is None, reason="no kernels here")
def test_a_bfloat16_model_with_and_without_them(monkeypatch):
    """The whole: log-probabilities and gradients of both are as near to float32."""
    model = half_parts()[0]
    rows = [Datum(t[:-1], t[1:], np.ones(len(t) - 1, np.float32)) for t in (np.arange(3, 40), np.arange(9, 20))]
    calls, found, real = [], {}, exact_ops.run
    for name in ("ours", "modules", "float32"):
        with monkeypatch.context() as m:
            if name == "modules":
                m.setattr(exact_ops, "is_ready", lambda *tensors: False)
            m.setattr(exact_ops, "run", lambda kind, *args: (calls.append(kind), real(kind, *args)))
            model.to(torch.float32 if name == "float32" else torch.bfloat16)
            model.zero_grad()
            out = model(collate(rows, torch.float32, "cpu")).logprobs_T
            out.sum().backward()
        found[name] = out.detach(), torch.cat([p.grad.flatten().double() for p in model.parameters()])
        used = {"skyrl_gated_half", "skyrl_rotate_half", "skyrl_gated_half_gradient"}
        used |= {"skyrl_causal_softmax_half", "skyrl_causal_softmax_half_gradient"}
        assert (used <= set(calls)) == (name == "ours")
        calls.clear()
    for ours, theirs, exact in zip(found["ours"], found["modules"], found["float32"], strict=True):
        assert off(ours, exact.double()) < 1.2 * off(theirs, exact.double()) < 0.2


class _Sum(torch.nn.Module):
    act_fn = torch.nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class _Tanh(torch.nn.Module):
    def forward(self, x):
        return self.down_proj(torch.tanh(self.gate_proj(x)) * self.up_proj(x))


class _Clamped(torch.nn.Module):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7.0)) * self.up_proj(x))


class _Limited(torch.nn.Module):
    """Clamps by an attribute that it may have or not."""

    def forward(self, x):
        gate, limit = self.act_fn(self.gate_proj(x)), getattr(self, "limit", None)
        return self.down_proj((gate if limit is None else gate.clamp(max=limit)) * self.up_proj(x))


class _Wide(torch.nn.Module):
    """As Beam's: the same numbers in float32, rounded once in bfloat16."""

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj((self.act_fn(gate.float()) * up.float()).to(gate.dtype))


class _Slope(torch.nn.Module):
    """SiLU as it is made without an argument."""

    def __init__(self, slope=1.0):
        super().__init__()
        self.slope = slope

    def forward(self, x):
        return F.silu(self.slope * x) / self.slope


def apply_rotary_pos_emb(q, k, cos, sin):
    """Of pairs side by side, not of halves."""
    pairs = [torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) for x in (q, k)]
    return tuple(x * cos + pair * sin for x, pair in zip((q, k), pairs, strict=True))


class _Pairs(torch.nn.Module):
    def forward(self, q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin)


def _turn_wide(q, k, cos, sin):
    """As HunYuan's: of halves, in float32, rounded once in bfloat16."""
    wide = (torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1).float() for x in (q, k))
    return tuple((x.float() * cos + other * sin).to(x.dtype) for x, other in zip((q, k), wide, strict=True))


WideRotation = type("WideRotation", (_Pairs,), {
    "forward": FunctionType(_Pairs.forward.__code__, {"apply_rotary_pos_emb": _turn_wide}),
})  # fmt: skip


def test_modules_that_compute_otherwise_are_left_alone():
    """Whatever they are called, and whatever names they hold."""
    mlp, silu = type(make_net("qwen3").model.layers[0].mlp), torch.nn.SiLU()
    assert exact_ops._is_gate(mlp, silu) and not exact_ops._is_gate(mlp, torch.nn.GELU())
    assert not exact_ops._is_gate(mlp, _Slope(1.7))
    assert not any(exact_ops._is_gate(kind, silu) for kind in (_Sum, _Tanh, _Clamped, _Limited, _Wide))
    assert not any(exact_ops._turns_halves(kind) for kind in (_Pairs, WideRotation, torch.nn.Linear))
    for family in ("gemma2", "cohere"):  # a gate of GELU; embeddings of pairs
        net = make_net(family)
        before = [type(module) for module in net.modules()]
        exact_ops.hook_half_ops(net)
        kept = [a is b for a, b in zip(before, map(type, net.modules()), strict=True)]
        assert all(
            same for same, kind in zip(kept, before, strict=True)
            if kind.__name__ == ("Gemma2MLP" if family == "gemma2" else "CohereAttention")
        )  # fmt: skip
        assert not all(kept)
