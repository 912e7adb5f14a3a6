"""The gated delta rule against its formula and transformers' modules; packed rows know nothing of others."""

import sys
import types

import numpy as np
import pytest
import torch
from families import LINEAR, make_net

from skyrl.models.forward import CausalLM, collate, precise
from skyrl.models.linear_attention import (
    CHUNK,
    DeltaRule,
    StateShape,
    cuda_rule,
    gated_delta_rule,
    is_delta_net,
)
from skyrl.models.packed import PackedAttention
from skyrl.types import Datum


def inputs(length, rows=2, heads=3, key=4, value=5, dtype=torch.float64, decay=1.0, many=1):
    """Queries, keys, values, decay, beta and a state, as the rule takes them."""
    generator = torch.Generator().manual_seed(length)
    make = lambda *shape: torch.randn(rows, heads, *shape, generator=generator, dtype=torch.float64)  # noqa: E731
    query, keys = (torch.nn.functional.normalize(make(length, key), dim=-1) for _ in "qk")
    gates = -decay * make(length, many).exp(), make(length).sigmoid()
    return [x.to(dtype) for x in (query, keys, make(length, value), *gates, make(key, value))]


def formula(query, key, value, decay, beta, state):
    outs = []
    for t in range(query.shape[2]):
        state = state * decay[:, :, t].exp()[..., None]
        held = torch.einsum("bhkv,bhk->bhv", state, key[:, :, t])
        new = beta[:, :, t, None] * (value[:, :, t] - held)
        state = state + key[:, :, t, :, None] * new[..., None, :]
        outs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, :, t]))
    return torch.stack(outs, 2), state


@pytest.mark.parametrize("length", [1, 2, 7, 64, 65, 150])
@pytest.mark.parametrize("decay", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("many", [1, 4])
def test_chunks_of_any_length_give_the_formula(length, decay, many):
    """One decay of a head and token, and one of each channel of the keys."""
    given = inputs(length, decay=decay, many=many)
    want = formula(*given)
    for chunk in (1, 3, min(CHUNK, length)):
        for ours, theirs in zip(gated_delta_rule(*given, chunk), want, strict=True):
            assert (ours - theirs).abs().max() < 1e-12


def test_a_token_that_forgets_all_does_not_spoil_those_after_it():
    """In float32 the decays after it are differences of large sums."""
    given = inputs(60, dtype=torch.float32, decay=1e-2)
    given[3][:, :, 5] = -3e4
    want = formula(*(x.double() for x in given))
    for ours, theirs in zip(gated_delta_rule(*given, CHUNK), want, strict=True):
        assert (ours - theirs).abs().max() < 1e-6


def test_kernels_of_flash_linear_attention(monkeypatch):
    """They are asked with the rule's own numbers, in their layout: a stand-in computes with these. It has not run on a
    GPU."""
    asked = []

    def chunk_gated_delta_rule(q, k, v, g, beta, *, scale, initial_state, output_final_state):
        asked.append((q.dtype, g.dtype, beta.dtype, initial_state.dtype, output_final_state))
        turned = [x.transpose(1, 2).float() for x in (q * scale, k, v, g.unsqueeze(-1), beta)]
        out, state = gated_delta_rule(*turned, initial_state, 64)
        return out.transpose(1, 2).to(q.dtype), state

    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["fla.ops.gated_delta_rule"].chunk_gated_delta_rule = chunk_gated_delta_rule
    cuda_rule.cache_clear()
    given = [x.requires_grad_() for x in inputs(150, dtype=torch.float32)]
    ours, theirs = cuda_rule()(*given, CHUNK), gated_delta_rule(*given, CHUNK)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and 0 < (a - b).abs().max() < 0.05
    assert asked == [(torch.bfloat16, *[torch.float32] * 3, True)]
    (ours[0].sum() + ours[1].sum()).backward()
    assert all(x.grad.isfinite().all() for x in given)
    monkeypatch.setitem(sys.modules, "fla", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "fla.ops")
    monkeypatch.delitem(sys.modules, "fla.ops.gated_delta_rule")
    cuda_rule.cache_clear()
    assert cuda_rule() is gated_delta_rule
    cuda_rule.cache_clear()


def test_gradients():
    for chunk, many in ((1, 1), (3, 1), (3, 3)):
        given = [x.requires_grad_() for x in inputs(5, rows=1, heads=1, key=3, value=2, many=many)]
        assert torch.autograd.gradcheck(lambda *x, chunk=chunk: gated_delta_rule(*x, chunk), given)


def test_rows_padded_together_leave_the_states_of_their_own():
    """Pieces of unequal length, one after the other, are the whole."""
    rule = DeltaRule(torch.randn(22, 4), torch.randn(22), torch.tanh, 1, StateShape(3, 22, 2, 4, 7))
    lengths, generator = [9, 2, 5], torch.Generator().manual_seed(0)
    sizes = (22, 2, 2)
    rows = [[torch.randn(n, size, generator=generator) for size in sizes] for n in lengths]
    rows = [[mixed, -decay.exp(), beta.sigmoid()] for mixed, decay, beta in rows]
    whole = [rule.run(*(x[None] for x in row)) for row in rows]
    states, outs = rule.shape.empty(3, torch.float32, torch.device("cpu")), [[] for _ in rows]
    for start, end in ((0, 1), (1, 5), (5, 9)):
        real = torch.tensor([[t < n for t in range(start, end)] for n in lengths])
        part = [torch.full((3, end - start, size), 1e3) for size in sizes]
        for i, row in enumerate(rows):
            for padded, x in zip(part, row, strict=True):
                padded[i, : max(0, lengths[i] - start)] = x[start:end]
        out, states = rule.run(*part, states, real)
        for i, n in enumerate(lengths):
            outs[i].append(out[i, : max(0, n - start)])
    for i, (out, after) in enumerate(whole):
        assert (torch.cat(outs[i]) - out[0]).abs().max() < 1e-12
        assert torch.equal(states[0][i], after[0][0]) and (states[1][i] - after[1][0]).abs().max() < 1e-12


def rows_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [Datum(rng.integers(0, 96, n), rng.integers(0, 96, n), rng.random(n)) for n in lengths]


@pytest.mark.parametrize("name", LINEAR)
def test_a_packed_module_is_transformers_module_row_by_row(name):
    """Outputs and gradients of one layer in float64, of inputs and parameters."""
    net = make_net(name).double()
    module = next(module for module in net.modules() if is_delta_net(module))
    lengths, generator = [3, 70, 1, 20, 2], torch.Generator().manual_seed(0)
    x = torch.randn(1, sum(lengths), 32, generator=generator, dtype=torch.float64, requires_grad=True)
    up = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    leaves, results = [x, *module.parameters()], []
    with precise(torch.float64):
        want = torch.cat([module(hidden_states=row) for row in x.split(lengths, 1)], 1)
        CausalLM(net)  # makes the module ask
        attention = PackedAttention(torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32), lengths)
        got = module(hidden_states=x, skyrl_attention=attention)
        results = [torch.autograd.grad((out * up).sum(), leaves) for out in (got, want)]
    assert (got - want).abs().max() < 1e-12
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 1e-11 * (1 + theirs.abs().max())


@pytest.mark.parametrize("name", ["olmo_hybrid", "qwen3_5"])
def test_no_row_leaks_into_another(name):
    """A row's log-probabilities and gradients are the same whatever lies before it, and beside it in the padding."""
    model = CausalLM(make_net(name).double())
    (own,) = rows_of([24])
    results = []
    for others in ([], rows_of([7, 30], 1), rows_of([7, 30], 2)):
        rows = [*others, own]
        mb = collate(rows, torch.float64, "cpu")
        model.zero_grad()
        logprobs = model(mb).logprobs_T[-24:]
        logprobs.sum().backward()
        results.append([logprobs, *(p.grad for p in model.parameters())])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (a - b).abs().max() < 1e-11 * (1 + b.abs().max())
