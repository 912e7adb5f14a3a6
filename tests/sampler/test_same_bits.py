"""What the sampler says about its tokens and what training says of them later: the same bits, in float32 on a CPU."""

import numpy as np
import pytest
import torch

from skyrl import kernels
from skyrl.kernels import exact_ops
from skyrl.models import logprobs, packed
from skyrl.models.forward import collate
from skyrl.models.lora import routed
from skyrl.sampler.runners import cpu_kernels
from skyrl.types import Datum, SampleRequest, SamplingParams
from tests.sampler.test_adapters import llama
from tests.sampler.test_cpu_kernels import KINDS, build
from tests.sampler.tools import adapter, qwen3, run, sampler


@pytest.fixture(params=["kernels", "onednn"], autouse=True)
def path(request, monkeypatch):
    """What both sides compute with: compiled kernels, or oneDNN's products and float64 between them."""
    if request.param == "onednn":
        for module in (kernels, cpu_kernels):
            monkeypatch.setattr(module, "library", lambda: (None, "off in this test"))
        if not exact_ops.has_packed_product(torch.float32):
            pytest.skip("torch without oneDNN")
    elif why := kernels.library()[1]:
        pytest.skip(why)
    return request.param


def same(gap):
    """All but a few numbers: float64 sums in another order may lie on two sides of a border of float32."""
    return not gap.any() if kernels.library()[0] is not None else (gap != 0).mean() < 0.02 and np.abs(gap).max() < 1e-6


def drawn(model, adapters=None, temperature=1.0, longest=30, count=12, **changes):
    """Rows with the sampled tokens at their end, and what the sampler said of these; adapters take turns."""
    rng = np.random.default_rng(0)
    names = ["policy", *(adapters or {})]
    asked = [
        SampleRequest(
            str(i),
            rng.integers(1, 90, rng.integers(2, longest)),
            SamplingParams(9, temperature=temperature, seed=i),
            model=names[i % len(names)],
        )
        for i in range(count)
    ]
    engine = sampler(model, backend="fused", adapters=adapters, **changes)
    assert engine.backend == ("fused" if kernels.library()[0] is None else "kernels")
    samples = run(engine, asked)
    rows, said = [], []
    for request in asked:
        sample = samples[request.uid]
        ids = np.concatenate([request.tokens, sample.tokens])
        rows.append(Datum(ids[:-1], ids[1:], np.ones(len(ids) - 1), name=request.model))
        said.append(sample.logprobs)
    return rows, said


def differences(model, rows, said, adapters=None, temperature=1.0, entropy=False):
    """Training's log-probabilities minus the sampler's, of one packed microbatch."""
    mb = collate(rows, torch.float32, "cpu")
    segments, at = [], 0
    for row in rows:
        segments.append((at, at + len(row.tokens), (adapters or {}).get(row.name)))
        at += len(row.tokens)
    if adapters:
        with routed(model, segments):
            out = model(mb, temperature=temperature, entropy=entropy)
    else:
        out = model(mb, temperature=temperature, entropy=entropy)
    parts = out.logprobs_T.detach().numpy()
    ends = [stop for _, stop, _ in segments]
    return np.concatenate([parts[end - len(own) : end] - own for end, own in zip(ends, said, strict=True)])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_in_any_packing(kind):
    model = build(kind)
    rows, said = drawn(model, block_tokens=5)
    assert np.abs(np.concatenate(said)).max() > 1
    for some in (slice(0, 12), slice(3, 4), slice(5, 9)):
        assert same(differences(model, rows[some], said[some]))
    assert same(differences(model, rows, said, entropy=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_temperatures_and_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = qwen3()
        rows, said = drawn(model, temperature=0.7)
        assert same(differences(model, rows, said, temperature=0.7))
        assert differences(model, rows, said, temperature=0.8).all()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("make", [qwen3, llama])
def test_adapters(make):
    """Ranks that fill a block of a sum and that do not, on all products, with biases and without."""
    model = make()
    adapters = {f"r{rank}": adapter(model, f"r{rank}", rank=rank, alpha=2.0 * rank) for rank in (4, 33)}
    rows, said = drawn(model, adapters)
    assert {row.name for row in rows} == {"policy", "r4", "r33"}
    assert same(differences(model, rows, said, adapters))


def test_long_rows_and_a_large_vocabulary(monkeypatch):
    """Rows of hundreds of tokens, a vocabulary whose logits are taken a few rows at a time, recomputed layers."""
    monkeypatch.setattr(exact_ops, "KEEP_SCORES", 1 << 18)
    model = qwen3(vocab_size=20_000, hidden_size=64)
    model.checkpoint_layers()
    rows, said = drawn(model, longest=300, count=6, max_length=400)
    assert max(len(row.tokens) for row in rows) > 200
    assert same(differences(model, rows, said))


def test_where_bits_may_differ(monkeypatch):
    """Long rows, above kernels.LONGEST or with scores above MAX_SCORES, are attended in tiles; vocabularies beyond a
    few rows' room are summed in blocks."""
    model = qwen3()
    rows, said = drawn(model)
    monkeypatch.setattr(kernels, "LONGEST", 8)
    monkeypatch.setattr(packed, "MAX_SCORES", 0)
    gap = differences(model, rows, said)
    assert gap.any() and np.abs(gap).max() < 1e-5
    monkeypatch.undo()
    model = qwen3(vocab_size=300)
    rows, said = drawn(model)
    monkeypatch.setattr(logprobs, "ROWS", 1 << 20)
    monkeypatch.setitem(logprobs.BLOCK_BYTES, "cpu", 1 << 10)
    gap = differences(model, rows, said)
    assert gap.any() and np.abs(gap).max() < 2e-6
