"""Packed and padded attention against a loop over rows with a plain masked softmax."""

import numpy as np
import pytest
import torch

from skyrl.models import packed
from skyrl.models.packed import PackedAttention, PaddedAttention, banned, collate
from skyrl.types import Datum, UserError

H, K, C = 4, 2, 8
LENGTHS = [5, 24, 1, 13, 20, 24, 3]


def starts_of(lengths):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def loop(query, key, value, lengths, scale, window, softcap):
    """The slow reference: every row and head on its own."""
    outs, start = [], 0
    for n in lengths:
        rows = slice(start, start + n)
        for h in range(query.shape[0]):
            k = h * key.shape[0] // query.shape[0]
            s = query[h, rows] @ key[k, rows].T * scale
            s = softcap * torch.tanh(s / softcap) if softcap else s
            i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
            seen = (j <= i) & (i - j < (window or n + 1))
            outs.append((rows, h, torch.softmax(s.masked_fill(~seen, float("-inf")), -1) @ value[k, rows]))
        start += n
    out = torch.zeros(start, query.shape[0], value.shape[-1], dtype=query.dtype)
    for rows, h, o in outs:
        out = out.index_put((torch.arange(rows.start, rows.stop), torch.tensor(h)), o)
    return out


def qkv(lengths, dtype=torch.float64, value_channels=C):
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    shapes = [(tokens, H, C), (tokens, K, C), (tokens, K, value_channels)]
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    return made, [x.transpose(0, 1) for x in made]  # as transformers gives them: [heads, T, C] views of [T, heads, C]


CASES = [(None, None), (4, None), (None, 2.0), (4, 2.0), (24, None)]


@pytest.mark.parametrize(("window", "softcap"), CASES)
@pytest.mark.parametrize("fused", [False, True])
def test_packed_equals_the_loop(window, softcap, fused, monkeypatch):
    if fused:
        monkeypatch.setattr(packed, "MAX_SCORES", 0)
    leaves, (q, k, v) = qkv(LENGTHS)
    up = torch.randn(sum(LENGTHS), H, C, dtype=torch.float64)
    want = loop(q, k, v, LENGTHS, 0.3, window, softcap)
    attention = PackedAttention(starts_of(LENGTHS), max(LENGTHS))
    for _ in range(2):  # the second layer uses what the first one prepared
        got = attention.attend(0, q, k, v, scale=0.3, window=window, softcap=softcap)
        assert (got - want).abs().max() < 1e-12
        a = torch.autograd.grad((got * up).sum(), leaves, retain_graph=True)
        b = torch.autograd.grad((want * up).sum(), leaves, retain_graph=True)
        assert all((x - y).abs().max() < 1e-12 for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("window", "softcap"), CASES)
def test_padded_equals_the_loop(window, softcap):
    lengths = [6, 6, 6]
    _, (q, k, v) = qkv(lengths)
    got = PaddedAttention(3, 6).attend(0, q, k, v, scale=0.3, window=window, softcap=softcap)
    assert (got - loop(q, k, v, lengths, 0.3, window, softcap)).abs().max() < 1e-12


def test_other_shapes_of_heads():
    leaves, (q, k, v) = qkv([7, 2, 9], value_channels=5)
    attention = PackedAttention(starts_of([7, 2, 9]), 9)
    assert (
        attention.attend(0, q, k, v, scale=1.0, window=None, softcap=None) - loop(q, k, v, [7, 2, 9], 1.0, None, None)
    ).abs().max() < 1e-12
    full = q.contiguous()  # every head its own keys, and heads first in memory
    got = attention.attend(1, full, full, full, scale=1.0, window=None, softcap=None)
    assert (got - loop(q, q, q, [7, 2, 9], 1.0, None, None)).abs().max() < 1e-12


def test_rows_do_not_see_each_other():
    """NaN and inf in one row leave the others as they were, values and gradients."""
    leaves, (q, k, v) = qkv(LENGTHS)
    attention = PackedAttention(starts_of(LENGTHS), max(LENGTHS))
    clean = attention.attend(0, q, k, v, scale=0.3, window=None, softcap=None)
    bad = [x.detach().clone() for x in leaves]
    for x in bad:
        x[5:29] = float("nan")  # the whole second row, which shares its bucket with others
        x.requires_grad_()
    out = attention.attend(0, *(x.transpose(0, 1) for x in bad), scale=0.3, window=None, softcap=None)
    others = torch.ones(sum(LENGTHS), dtype=torch.bool)
    others[5:29] = False
    assert torch.equal(out[others], clean[others])
    out[others].sum().backward()
    assert all(torch.isfinite(x.grad[others]).all() for x in bad)


def test_buckets_waste_little():
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 400, 200).tolist()
    attention = PackedAttention(starts_of(lengths), max(lengths))
    padded = sum(rows * longest for rows, longest in attention._shapes())
    assert padded < 1.2 * sum(lengths) and len(attention._shapes()) < 16


def test_window_counts_the_token_itself():
    assert banned(4, 2, torch.device("cpu")).tolist() == [
        [False, True, True, True],
        [False, False, True, True],
        [True, False, False, True],
        [True, True, False, False],
    ]


def row(n, **more):
    return Datum(np.arange(n), np.arange(n) + 1, np.ones(n, np.float32), **more)


def test_collate_packs_in_order():
    mb = collate([row(3, name="a"), row(1), row(2)], torch.float64, "cpu")
    assert mb.tokens_T.tolist() == [0, 1, 2, 0, 0, 1] and mb.targets_T.tolist() == [1, 2, 3, 1, 1, 2]
    assert mb.positions_T.tolist() == [0, 1, 2, 0, 0, 1] and mb.row_T.tolist() == [0, 0, 0, 1, 2, 2]
    assert mb.starts_S1.tolist() == [0, 3, 4, 6] and mb.starts_S1.dtype == torch.int32 and mb.max_length == 3
    assert mb.weights_T.dtype == torch.float64 and mb.sampling_logprobs_T is None and mb.returns_T is None
    assert mb.tokens_T.dtype == mb.positions_T.dtype == mb.row_T.dtype == torch.int64


def test_collate_wants_a_field_from_all_rows_or_none():
    with_it = row(2, advantages=np.ones(2), name="x/0/0")
    assert collate([with_it, with_it], torch.float32, "cpu").advantages_T.dtype == torch.float32
    with pytest.raises(UserError, match="row y/1/0: no advantages"):
        collate([with_it, row(3, name="y/1/0")], torch.float32, "cpu")
    with pytest.raises(ValueError, match="at least one row"):
        collate([], torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_copy_of_a_micro_batch_carries_what_single_ones_do(dtype, monkeypatch):
    rows = [
        Datum(np.arange(n), np.arange(2 * n).reshape(n, 2), np.ones((n, 2)) / 3, advantages=np.full(n, 1e300))
        for n in (1, 7, 30)
    ]  # fmt: skip
    want = vars(collate(rows, dtype, "cpu"))
    monkeypatch.setattr(packed, "move_each", packed.move_together)
    found = vars(collate(rows, dtype, "cpu"))
    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    assert len({value.untyped_storage().data_ptr() for value in tensors.values()}) == 1 and len(tensors) == 7
    for name, value in want.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
        else:
            assert found[name] == value, name
