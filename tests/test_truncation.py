"""Training on what a cut of the sampler leaves: one distribution in both, and gradients of that one."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from loop import run_loop
from small import SPEC, make_engine, weights_of

from skyrl.algorithms.truncation import join_support, split_support
from skyrl.engine import ModelSpec
from skyrl.models.logprobs import HeadSpec, log_probs
from skyrl.types import Datum, LoraSpec, SampleRequest, SamplingParams

T, C, V = 13, 8, 300
CUTS = dict(top_k=12, top_p=0.9, min_p=0.02)
OPTIONS = ["sampler.top_k=12", "sampler.top_p=0.9", "sampler.min_p=0.02"]


def make_support(targets):
    """Some ids for each token, its target among them; the first two tokens have none, the third its target alone."""
    rng = np.random.default_rng(0)
    ids = [np.zeros(0, np.int32)] * 2 + [np.array([int(targets[2])])]
    ids += [np.union1d(rng.choice(V, 5 * t, replace=False), [int(targets[t])]) for t in range(3, T)]
    return join_support(T, [(0, ids)])


@pytest.mark.parametrize("head", [HeadSpec(), HeadSpec(scale=1.7, softcap=3.0)])
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.float32, 3e-5)])
def test_log_probs_over_a_support_equal_plain_autograd(head, dtype, limit):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*n, generator=generator, dtype=torch.float64) for n in ((T, C), (V, C), (V,)))
    targets = torch.randint(0, V, (T,), generator=generator)
    support = make_support(targets)
    position = torch.from_numpy(np.repeat(np.arange(T), support.counts))
    support_2N = torch.stack([position, torch.from_numpy(support.ids.astype(np.int64))])
    outside = torch.ones(T, V, dtype=torch.bool)
    outside[support_2N[0], support_2N[1]] = False
    outside[:2] = False
    up = torch.randn(2, T, generator=generator, dtype=torch.float64)
    for temperature, chunk, entropy in itertools.product((1.0, 0.6), (0, 1), (True, False)):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        z = torch.nn.functional.linear(leaves[0], leaves[1], leaves[2]) * head.scale
        z = torch.tanh(z / head.softcap) * head.softcap if head.softcap else z
        logp = torch.log_softmax((z / temperature).masked_fill(outside, -torch.inf), -1)
        want = [logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp.masked_fill(outside, 0.0)).sum(-1)]
        used = want if entropy else want[:1]
        grads = torch.autograd.grad(sum((x * u).sum() for x, u in zip(used, up, strict=False)), leaves)
        ours = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        got = log_probs(
            ours[0], ours[1], targets, bias_V=ours[2], temperature=temperature, head=head, entropy=entropy,
            chunk_tokens=chunk, support_2N=support_2N,
        )  # fmt: skip
        got = got if entropy else got[:1]
        found = torch.autograd.grad(sum((x * u.to(dtype)).sum() for x, u in zip(got, up, strict=False)), ours)
        for a, b in zip((*got, *found), (*used, *grads), strict=True):
            assert (a.double() - b).abs().max() < limit
    assert got[0][2] == 0  # one token alone


def drawn_rows(engine, params, model="policy", count=6):
    """Rows of what a sampler drew for prompts that begin alike."""
    with engine.sampling(model) as sampler:
        for i in range(count):
            sampler.add(SampleRequest(str(i), np.arange(4, 14 + i % 2), replace(params, seed=i), model=model))
        done = {}
        while sampler.unfinished():
            done.update({sample.uid: sample for sample in sampler.step()})
    rows = []
    for i in range(count):
        prompt, sample = np.arange(4, 14 + i % 2), done[str(i)]
        ids, start = np.concatenate([prompt, sample.tokens]), len(prompt) - 1
        logprobs = np.zeros(len(ids) - 1)
        logprobs[start:] = sample.logprobs
        support = sample.support and join_support(len(ids) - 1, [(start, split_support(sample.support))])
        more = dict(advantages=np.full(len(logprobs), 0.5), reference=logprobs - 0.1, name=str(i), support=support)
        weights = (np.arange(len(logprobs)) >= start) / 50.0
        rows.append(Datum(ids[:-1], ids[1:], weights, sampling_logprobs=logprobs, **more))
    return rows


@pytest.mark.parametrize("backend", ["auto", pytest.param("module", marks=pytest.mark.slow)])
def test_the_trainer_sees_what_the_sampler_drew_from(backend):
    engine = make_engine("auto", "float32", f"sampler.backend={backend}")
    params = SamplingParams(12, temperature=0.8, processed_logprobs=True, **CUTS)
    rows = drawn_rows(engine, params)
    full = drawn_rows(engine, replace(params, processed_logprobs=False))
    scored = engine.score(rows, 0.8).logprobs
    whole = engine.score([replace(row, support=None) for row in rows], 0.8).logprobs
    for row, plain, found, dense in zip(rows, full, scored, whole, strict=True):
        assert (row.tokens == plain.tokens).all() and plain.support is None  # the draws are the same
        trained = row.weights != 0
        np.testing.assert_allclose(found[trained], row.sampling_logprobs[trained], atol=1e-6)
        np.testing.assert_allclose(dense[trained], plain.sampling_logprobs[trained], atol=1e-6)
        assert (row.support.counts[trained] >= 1).all() and (row.support.counts[trained] <= 12).all()
        assert (row.support.counts[~trained] == 0).all() and (found[~trained] == dense[~trained]).all()
        assert (found[trained] > dense[trained]).any()
        # the recorded ids hold all of the distribution, each of them what its log-probability says
        at = int(np.flatnonzero(trained)[-1])
        ids = split_support(row.support)[at]
        last = [replace(row, targets=np.append(row.targets[:-1], token)) for token in ids]
        assert at == len(row.tokens) - 1 and row.targets[at] in ids
        assert sum(np.exp(one[at]) for one in engine.score(last, 0.8).logprobs) == pytest.approx(1.0, abs=1e-5)


def step_of(*options, lora=False):
    """Log-probabilities and weights after a step of PPO in float64 on rows drawn with cuts."""
    engine, model = make_engine("auto", "float64", *options), "policy"
    if lora:
        engine.create("base", ModelSpec(trainable=False))
        for name in ("a", "b"):
            engine.create(name, ModelSpec(lora=LoraSpec(2, seed=1), base="base"))
        model = "a"
    rows = drawn_rows(engine, SamplingParams(8, temperature=0.9, processed_logprobs=True, **CUTS), model)
    if lora:  # two adapters in one micro-batch: each part has its own tokens and supports
        rows = [replace(row, model="ab"[i % 2]) for i, row in enumerate(rows)]
        out = engine.forward_backward(rows, SPEC, model=None, mix=True)
    else:
        out = engine.forward_backward(rows, SPEC)
    gradient = {n: p.grad.clone() for n, p in engine.models[model].strategy.module.named_parameters()}
    return out, gradient, weights_of(engine, model)


@pytest.mark.parametrize(
    "options",
    [
        ["batch.share_prefixes=false"],
        pytest.param(["batch.packing=false"], marks=pytest.mark.slow),
        ["model.logits_chunk_tokens=1"],
    ],
)
def test_the_layout_of_rows_changes_nothing(options):
    want, gradient, _ = step_of()
    got, other, _ = step_of(*options, "batch.max_tokens_per_microbatch=60")
    for a, b in zip(got.logprobs, want.logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    assert got.metrics["entropy:mean"] == pytest.approx(want.metrics["entropy:mean"], rel=1e-12)
    for name, g in gradient.items():
        torch.testing.assert_close(other[name], g, rtol=1e-9, atol=1e-14)


def test_adapters_have_their_own_tokens_supports():
    out, _, _ = step_of(lora=True)
    want, _, _ = step_of()  # fresh adapters add nothing, so log-probabilities are the base's
    for a, b in zip(out.logprobs, want.logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_a_run_learns_with_cuts_from_the_sampler_s_own_support(tmp_path):
    seen = run_loop(tmp_path / "run", *OPTIONS, "batch.epochs_per_batch=2", "algorithm.kl.coef=0.1", turns=2)
    for record in seen.rl:
        assert record["logprob_gap:max"] < 1e-5
        assert 1 < record["support:mean"] <= record["support:max"] <= 12
    assert seen.rl[0]["kl_reference:mean"] < seen.rl[1]["kl_reference:mean"]
    first = seen.updates()[0]
    for row in first.values():
        assert ((row.support.counts > 0) == (row.sampling_logprobs != 0))[row.support.counts != 1].all()
        np.testing.assert_allclose(row.reference[row.weights != 0], row.sampling_logprobs[row.weights != 0], atol=1e-5)


@pytest.mark.ranks
@pytest.mark.slow
def test_cuts_are_the_same_on_two_ranks_of_fsdp(tmp_path):
    one, two = (
        run_loop(tmp_path / str(n), *OPTIONS, "batch.epochs_per_batch=2", "strategy.name=fsdp", size=n) for n in (1, 2)
    )
    for a, b in zip(one.rl, two.rl, strict=True):
        for key in ("loss:sum", "grad_norm:mean", "entropy:mean", "reward:mean", "support:mean"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
