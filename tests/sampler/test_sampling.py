"""What is drawn, against a float64 reference that sorts and sums in plain numpy."""

import numpy as np
import pytest
import torch

from skyrl.sampler.runners import sampling
from skyrl.sampler.runners.cpu_kernels import CpuKernelRunner, library
from skyrl.types import SamplingParams, UserError

V = 53


@pytest.fixture(params=["torch", "kernels"])
def function(request):
    """sampling.sample, and the compiled one, which must agree."""
    return sampling.sample if request.param == "torch" else compiled(exact=False)


def compiled(exact):
    if why := library()[1]:
        pytest.skip(why)
    runner = CpuKernelRunner.__new__(CpuKernelRunner)
    runner._library, runner._exact = library()[0], exact
    runner._model = type("Threads", (), {"threads": 1})
    return runner.sample


def reference(logits, p: SamplingParams):
    """Probabilities of what may be drawn, and log-probabilities over all tokens, float64."""
    z = np.asarray(logits, dtype=np.float64) / (p.temperature or 1.0)
    logprobs = z - z.max() - np.log(np.exp(z - z.max()).sum())
    q = np.exp(logprobs)
    if p.temperature == 0:
        return np.eye(len(z))[int(np.argmax(z))], logprobs
    order = np.argsort(-q, kind="stable")
    keep = np.zeros(len(z), dtype=bool)
    chosen = order[: p.top_k] if p.top_k else order
    mass, total = 0.0, q[chosen].sum()
    for token in chosen:
        if p.top_p < 1 and mass >= p.top_p * total and mass > 0:
            break
        keep[token] = True
        mass += q[token]
    keep &= q >= p.min_p * q.max()
    return q * keep / (q * keep).sum(), logprobs


RULES = [
    SamplingParams(1),
    SamplingParams(1, temperature=0.3),
    SamplingParams(1, temperature=2.5),
    SamplingParams(1, temperature=0.0),
    SamplingParams(1, top_k=1),
    SamplingParams(1, top_k=7, temperature=0.7),
    SamplingParams(1, top_p=0.6),
    SamplingParams(1, top_p=0.05),
    SamplingParams(1, min_p=0.2),
    SamplingParams(1, top_k=9, top_p=0.8, min_p=0.05, temperature=1.3),
]


@pytest.mark.parametrize("params", RULES, ids=lambda p: f"T{p.temperature} k{p.top_k} p{p.top_p} m{p.min_p}")
def test_inverts_the_exact_distribution(function, params):
    """4,000 evenly spaced points of [0, 1) give every token its exact share, so each inversion is right."""
    rng = np.random.default_rng(1)
    logits = (rng.standard_normal(V) * 2).astype(np.float32)
    count = 4000
    points = torch.from_numpy((np.arange(count) + 0.5) / count)
    rows = torch.from_numpy(np.tile(logits, (count, 1)))
    tokens, logprobs = function(rows, sampling.BatchSamplingParams.of([params] * count, V, torch.device("cpu")), points)
    q, expected = reference(logits, params)
    share = np.bincount(tokens.numpy(), minlength=V) / count
    assert np.abs(share - q).max() <= 1.01 / count
    assert set(np.flatnonzero(share)) <= set(np.flatnonzero(q))
    np.testing.assert_allclose(logprobs.numpy(), expected[tokens.numpy()], atol=2e-6, rtol=0)
    # and draws in the order of the vocabulary: that is what "inverse" means
    assert (np.diff(tokens.numpy()) >= 0).all()


def test_exact_rows_do_not_depend_on_the_batch():
    """Rows with cuts beside rows without: the same bits as each row alone, and right."""
    function = compiled(exact=True)
    test_rows_with_different_rules_do_not_mix(function)
    rng = np.random.default_rng(3)
    logits = torch.from_numpy((rng.standard_normal((40, 1000)) * 2).astype(np.float32))
    params, points = [RULES[i % len(RULES)] for i in range(40)], torch.from_numpy(rng.random(40))
    together = function(logits.clone(), sampling.BatchSamplingParams.of(params, 1000, torch.device("cpu")), points)
    for row, rule in enumerate(params):
        one = slice(row, row + 1)
        alone = function(
            logits[one].clone(), sampling.BatchSamplingParams.of([rule], 1000, torch.device("cpu")), points[one]
        )
        assert [x[row].numpy().tobytes() for x in together] == [x[0].numpy().tobytes() for x in alone]


def test_rows_with_different_rules_do_not_mix(function):
    rng = np.random.default_rng(2)
    logits = (rng.standard_normal((len(RULES), V)) * 2).astype(np.float32)
    points = torch.from_numpy(rng.random(len(RULES)))
    tokens, logprobs = function(
        torch.from_numpy(logits.copy()), sampling.BatchSamplingParams.of(RULES, V, torch.device("cpu")), points
    )
    for row, params in enumerate(RULES):
        q, expected = reference(logits[row], params)
        below = np.cumsum(q)
        assert tokens[row] == int(np.searchsorted(below, float(points[row]) * below[-1], side="right"))
        assert abs(float(logprobs[row]) - expected[int(tokens[row])]) < 2e-6


@pytest.mark.parametrize("vocab", [1, 5, 16, 255, 256, 257, 5000])
def test_ends_of_the_interval(function, vocab):
    """The points 0 and nearly 1 give the first and last token that have a probability, at every size."""
    logits = torch.zeros(4, vocab)
    logits[1, 0] = -200.0  # no weight in float32
    logits[2, -1] = -200.0
    logits[3, vocab // 2 :] = -200.0
    params = sampling.BatchSamplingParams.of([SamplingParams(1)] * 4, vocab, torch.device("cpu"))
    first, _ = function(logits.clone(), params, torch.zeros(4, dtype=torch.float64))
    last, _ = function(logits.clone(), params, torch.full((4,), 1 - 2.0**-53, dtype=torch.float64))
    only = vocab == 1
    assert first.tolist() == [0, 0 if only else 1, 0, 0]
    assert last.tolist() == [vocab - 1, vocab - 1, 0 if only else vocab - 2, max(vocab // 2 - 1, 0)]


def test_greedy_takes_the_lowest_index_among_equals(function):
    logits = torch.zeros(1, V)
    logits[0, [9, 4, 30]] = 3.0
    params = sampling.BatchSamplingParams.of([SamplingParams(1, temperature=0.0)], V, torch.device("cpu"))
    token, logprob = function(logits, params, torch.tensor([0.99], dtype=torch.float64))
    assert token.item() == 4
    assert abs(logprob.item() - (3 - np.log(3 * np.exp(3) + V - 3))) < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_finite_say_so(function, bad, temperature):
    logits = torch.zeros(2, V)
    logits[0, 7] = bad
    params = sampling.BatchSamplingParams.of([SamplingParams(1, temperature=temperature)] * 2, V, torch.device("cpu"))
    tokens, logprobs = function(logits, params, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert not np.isfinite(logprobs[0].item()) and np.isfinite(logprobs[1].item()) and 0 <= tokens.min()


def test_uniforms_are_keyed_reproducible_and_flat():
    seeds = [0, 1, 2, -5, 2**64 + 1]
    streams = sampling.stream(seeds)
    assert streams[1] == streams[4] and len(set(streams.tolist())) == 4
    one = sampling.uniforms(streams, np.full(5, 3))
    assert (one == sampling.uniforms(streams, np.full(5, 3))).all() and one[0] != one[1]
    assert sampling.uniforms(streams[[2]], np.array([3])) == one[2]  # whatever stands beside it
    grid = sampling.uniforms(np.repeat(sampling.stream(range(400)), 100), np.tile(np.arange(100), 400)).reshape(
        400, 100
    )
    assert grid.min() >= 0 and grid.max() < 1
    # chi-square over 64 cells (63 degrees of freedom: 1e-4 of the mass lies above 117) of draws and of neighbours
    for values in (grid.ravel(), (grid[1:] - grid[:-1]).ravel() % 1, (grid[:, 1:] - grid[:, :-1]).ravel() % 1):
        counts = np.bincount((values * 64).astype(int), minlength=64)
        assert ((counts - values.size / 64) ** 2 / (values.size / 64)).sum() < 117


def test_the_first_numbers_are_those_of_splitmix64():
    """The published test vector of seed 1234567 (state not mixed)."""
    state = np.array([1234567], dtype=np.uint64)
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    for index, value in enumerate(known):
        assert sampling.uniforms(state, np.array([index]))[0] == (value >> 11) * 2.0**-53


def test_large_vocabularies_are_drawn_in_chunks(monkeypatch):
    rng = np.random.default_rng(5)
    logits = torch.from_numpy(rng.standard_normal((9, V)).astype(np.float32))
    params = (RULES * 2)[:9]
    params, points = sampling.BatchSamplingParams.of(params, V, torch.device("cpu")), torch.from_numpy(rng.random(9))
    whole = sampling.sample(logits.clone(), params, points)
    monkeypatch.setattr(sampling, "_CHUNK_BYTES", 4 * V * 2)
    chunked = sampling.sample(logits.clone(), params, points)
    assert all(torch.equal(a, b) for a, b in zip(whole, chunked, strict=True))


@pytest.mark.parametrize(
    "change", [dict(max_tokens=0), dict(temperature=-1.0), dict(temperature=float("inf")), dict(top_k=-1),
               dict(top_p=0.0), dict(top_p=1.1), dict(min_p=-0.1), dict(min_p=2.0), dict(stop=("",))]
)  # fmt: skip
def test_parameters_out_of_range_are_refused(change):
    params = SamplingParams(**{"max_tokens": 1, **change})
    with pytest.raises(UserError, match=next(iter(change))):
        sampling.check(params, "here")
