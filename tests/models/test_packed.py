"""Packed and padded attention against a loop over rows with a plain masked softmax."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skyrl.models import packed
from skyrl.models.attention import AttentionOptions
from skyrl.models.packed import PackedAttention, PaddedAttention, banned, collate
from skyrl.planner import memory
from skyrl.planner.device import VARLEN_RELEASE, torch_release
from skyrl.planner.memory import ModelSizes
from skyrl.tracking.advisories import warn_fallback
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
@pytest.mark.parametrize("bound", [None, 0, 2000])  # scores that may exist at once: 0 = one query at a time
def test_packed_equals_the_loop(window, softcap, bound, monkeypatch):
    if bound is not None:
        monkeypatch.setattr(packed, "MAX_SCORES", bound)
        monkeypatch.setattr(packed.exact_ops, "KEEP_SCORES", 0)
    leaves, (q, k, v) = qkv(LENGTHS)
    up = torch.randn(sum(LENGTHS), H, C, dtype=torch.float64)
    want = loop(q, k, v, LENGTHS, 0.3, window, softcap)
    attention = PackedAttention(starts_of(LENGTHS), LENGTHS)
    for _ in range(2):  # the second layer uses what the first one prepared
        got = attention.attend(0, q, k, v, AttentionOptions(0.3, window, softcap))
        assert (got - want).abs().max() < 1e-12
        a = torch.autograd.grad((got * up).sum(), leaves, retain_graph=True)
        b = torch.autograd.grad((want * up).sum(), leaves, retain_graph=True)
        assert all((x - y).abs().max() < 1e-12 for x, y in zip(a, b, strict=True))


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that an operator gives inside."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize(
    ("lengths", "window"), [([4096], None), ([4096, 300], 2048), ([700] * 8, None), ([300, 200, 130, 80] * 5, None)]
)
def test_capped_scores_are_bounded_and_not_kept(lengths, window):
    """Gemma 2's attention: a step holds at most MAX_SCORES numbers, autograd only queries, keys and values."""
    tokens, kept, heads = sum(lengths), 0, 8
    leaves = [torch.empty(tokens, n, 64, device="meta", requires_grad=True) for n in (heads, 4, 4)]

    def keep(x):
        nonlocal kept
        if kept is not None:
            kept += x.nbytes
        return x

    attention = PackedAttention(starts_of(lengths).to("meta"), lengths)
    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            query, key, value = (x.transpose(0, 1) for x in leaves)
            out = attention.attend(0, query, key, value, AttentionOptions(scale=0.1, window=window, softcap=50.0))
        held, kept = kept, None
        out.sum().backward()
    assert largest.size <= packed.MAX_SCORES
    assert held < 20 * sum(x.nbytes for x in leaves)  # views of them, counted once for each block
    assert all(x.grad is not None for x in leaves)


@pytest.mark.parametrize("lengths", [[128, 100, 50, 25], [300], [150] * 6], ids=["kept", "one long row", "many rows"])
@pytest.mark.parametrize(
    ("dtype", "channels", "softcap"),
    [(torch.bfloat16, 264, None), (torch.bfloat16, 64, 50.0), (torch.float64, 64, None)],
)
def test_scores_that_a_gpu_keeps_without_flash_attention_are_in_the_plan(
    dtype, channels, softcap, lengths, monkeypatch
):
    """Tensors of a CPU that say they are a GPU's; with smaller bounds."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    for module in (packed.exact_ops, memory):
        monkeypatch.setattr(module, "KEEP_SCORES", 1 << 18)
    tokens, kept = sum(lengths), {}
    leaves = [torch.randn(n, tokens, channels, dtype=dtype, requires_grad=True) for n in (H, K, K)]

    def keep(x):
        if x.shape[-1] in lengths and x.shape[-2] % x.shape[-1] == 0:  # scores or weights: [..., queries, keys]
            kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    attention = PackedAttention(starts_of(lengths), lengths)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        attention.attend(0, *leaves, AttentionOptions(scale=0.1, window=None, softcap=softcap)).sum().backward()
    sizes = ModelSizes("", 0, 0, 1, 0, 0, H, K, channels, 0, 512, capped=bool(softcap))
    counted = memory.kept_scores(sizes, tokens, max(lengths), dtype=str(dtype).removeprefix("torch."))
    assert sum(kept.values()) <= counted <= 2 << 18 and bool(kept) == (len(lengths) == 4)


@pytest.mark.skipif(torch_release() < VARLEN_RELEASE, reason="no torch before has the kernel, and that is what is told")
@pytest.mark.parametrize(
    ("channels", "value_channels", "dtype", "softcap", "reason"),
    [
        (64, 64, torch.float32, None, "float32"),
        (64, 64, torch.bfloat16, 30.0, "caps its scores"),
        (512, 512, torch.bfloat16, None, "512"),
        (12, 12, torch.bfloat16, None, "multiples of 8"),
        (64, 32, torch.float16, None, "64 and 32"),
        (64, 64, torch.bfloat16, None, ""),
    ],
)
def test_attention_without_the_kernel_is_told(channels, value_channels, dtype, softcap, reason, monkeypatch, caplog):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.device.type == "meta"))
    warn_fallback.cache_clear()
    q, k = (torch.empty(n, 9, channels, dtype=dtype, device="meta") for n in (4, 2))
    value = torch.empty(2, 9, value_channels, dtype=dtype, device="meta")
    attention = PackedAttention(starts_of([9]).to("meta"), [9])
    for _ in range(2):
        out = attention.attend(0, q, k, value, AttentionOptions(scale=1.0, window=None, softcap=softcap))
    assert out.shape == (9, 4, value_channels)
    assert [reason in r.message for r in caplog.records] == ([True] if reason else [])


def test_what_may_differ_between_ranks_is_told_by_each(monkeypatch, caplog):
    """Which kernel there is, is the same on all; how much memory there is, may not be."""
    caplog.set_level("DEBUG")
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        warn_fallback.cache_clear()
        for every_rank in (False, True, True):
            warn_fallback("short of memory", every_rank=every_rank)
    told = [(record.levelname, record.getMessage()) for record in caplog.records if "short of" in record.getMessage()]
    own = ("WARNING", "rank 3: short of memory")
    assert told == [("WARNING", "short of memory")] * 2 + [("DEBUG", "short of memory"), own]


@pytest.mark.parametrize(("window", "softcap"), CASES)
def test_padded_equals_the_loop(window, softcap):
    lengths = [6, 6, 6]
    _, (q, k, v) = qkv(lengths)
    got = PaddedAttention(3, 6).attend(0, q, k, v, AttentionOptions(0.3, window, softcap))
    assert (got - loop(q, k, v, lengths, 0.3, window, softcap)).abs().max() < 1e-12


def test_other_shapes_of_heads():
    leaves, (q, k, v) = qkv([7, 2, 9], value_channels=5)
    attention = PackedAttention(starts_of([7, 2, 9]), [7, 2, 9])
    assert (
        attention.attend(0, q, k, v, AttentionOptions(1.0)) - loop(q, k, v, [7, 2, 9], 1.0, None, None)
    ).abs().max() < 1e-12
    full = q.contiguous()  # every head its own keys, and heads first in memory
    got = attention.attend(1, full, full, full, AttentionOptions(1.0))
    assert (got - loop(q, q, q, [7, 2, 9], 1.0, None, None)).abs().max() < 1e-12


def test_rows_do_not_see_each_other():
    """NaN and inf in one row leave the others as they were, values and gradients."""
    leaves, (q, k, v) = qkv(LENGTHS)
    attention = PackedAttention(starts_of(LENGTHS), LENGTHS)
    clean = attention.attend(0, q, k, v, AttentionOptions(0.3))
    bad = [x.detach().clone() for x in leaves]
    for x in bad:
        x[5:29] = float("nan")  # the whole second row, which shares its bucket with others
        x.requires_grad_()
    out = attention.attend(0, *(x.transpose(0, 1) for x in bad), AttentionOptions(0.3))
    others = torch.ones(sum(LENGTHS), dtype=torch.bool)
    others[5:29] = False
    assert torch.equal(out[others], clean[others])
    out[others].sum().backward()
    assert all(torch.isfinite(x.grad[others]).all() for x in bad)


def test_buckets_waste_little():
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 400, 200).tolist()
    attention = PackedAttention(starts_of(lengths), lengths)
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
    monkeypatch.setattr(packed, "move", packed.move_together)
    found = vars(collate(rows, dtype, "cpu"))
    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    assert len({value.untyped_storage().data_ptr() for value in tensors.values()}) == 1 and len(tensors) == 7
    for name, value in want.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_sinks_and_their_gradients(window, blocks, monkeypatch):
    """Against plain float64 arithmetic; with scores kept, and in blocks of queries that are computed again."""
    if blocks:
        monkeypatch.setattr(packed.exact_ops, "KEEP_SCORES", 0)
        monkeypatch.setattr(packed, "MAX_SCORES", 400)
    lengths, generator = (9, 4, 12), torch.Generator().manual_seed(0)
    given = [torch.randn(*shape, generator=generator).double() for shape in ((4, 25, 8), (2, 25, 8), (2, 25, 8), (4,))]
    results = []
    for plain in (True, False):
        query, key, value, sinks = own = [x.clone().requires_grad_() for x in given]
        if plain:
            outs, at = [], 0
            for n in lengths:
                q, k, v = query[:, at : at + n], *(x[:, at : at + n].repeat_interleave(2, 0) for x in (key, value))
                scores = (q @ k.mT * 0.3).masked_fill(packed.banned(n, window, torch.device("cpu")), float("-inf"))
                weights = torch.cat([scores, sinks[:, None, None].expand(-1, n, 1)], -1).softmax(-1)[..., :-1]
                outs.append((weights @ v).transpose(0, 1))
                at += n
            out = torch.cat(outs)
        else:
            attention = packed.PackedAttention(torch.tensor([0, 9, 13, 25], dtype=torch.int32), lengths)
            out = attention.attend(
                0, query, key, value, AttentionOptions(scale=0.3, window=window, softcap=None, sinks_H=sinks)
            )
        (out * torch.linspace(-1, 1, 8)).sum().backward()
        results.append([out.detach(), *(x.grad for x in own)])
    for want, got in zip(*results, strict=True):
        assert (want - got).abs().max() < 1e-12


def test_chunks_of_a_row_are_rows():
    lengths, generator = (9, 4, 12), torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 25, 8, generator=generator) for _ in range(3))
    given = AttentionOptions(0.3, chunk=5)
    packs = packed.PackedAttention(torch.tensor([0, 9, 13, 25], dtype=torch.int32), lengths)
    got, at = packs.attend(0, query, key, value, given), 0
    for n in lengths:
        row = [x[:, at : at + n] for x in (query, key, value)]
        want = packed.PaddedAttention(1, n).attend(0, *row, given)
        assert (got[at : at + n] - want).abs().max() < 1e-5
        at += n
