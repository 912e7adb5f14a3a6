"""Scores of prompts against a plain transformers forward of each query alone."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from skyrl.models.forward import CausalLM
from skyrl.sampler import prompts as module
from skyrl.sampler.prompts import EMPTY, PromptLogprobsRequest, score_prompts
from tests.families import make_net
from tests.sampler.tools import TOLERANCE, VOCAB, adapter, merged, plain_logits, prompts, qwen3


@torch.no_grad()
def plain(model: CausalLM, tokens, temperature: float = 1.0) -> np.ndarray:
    """log softmax(logits / temperature) [L, V]; row i is about position i (row 0: nothing)."""
    logits = plain_logits(model, tokens).double()
    logprobs = torch.log_softmax(logits / temperature, -1).numpy()
    return np.concatenate([np.full((1, logprobs.shape[1]), np.nan), logprobs[:-1]])


@pytest.fixture(scope="module")
def setting():
    model = qwen3()
    adapters = {"a": adapter(model, "a"), "b": adapter(model, "b", rank=9, attn=False, mlp=False)}
    return model, adapters, {"": model} | {name: merged(model, each) for name, each in adapters.items()}


def questions(count=12, seed=0, vocab=VOCAB) -> list[PromptLogprobsRequest]:
    """All kinds in turns, over the base and both adapters."""
    rng = np.random.default_rng(seed)
    asked = []
    for i, tokens in enumerate(prompts(count, seed)):
        targets = rng.integers(-1, vocab, (len(tokens) - 1, 3))
        targets[rng.random(len(tokens) - 1) < 0.3] = -1
        asked.append(
            PromptLogprobsRequest(
                f"q{i}", tokens % vocab, ["", "a", "b"][i % 3], start=int(rng.integers(0, len(tokens) + 1)) * (i % 2),
                logprobs=i % 4 != 1, topk=[0, 5, 200][i % 3] if i != 3 else 2, temperature=[1.0, 0.7][i // 6],
                targets=targets if i % 5 != 2 else None, alternatives=i % 3, seed=i,
            )
        )  # fmt: skip
    return asked


def check(query: PromptLogprobsRequest, stats, model: CausalLM, tolerance=TOLERANCE) -> None:
    """Every cell against the plain forward."""
    length, first = len(query.tokens), max(query.start, 1)
    hot, cold = plain(model, query.tokens, query.temperature), plain(model, query.tokens)
    at, vocab = np.arange(first, length), hot.shape[1]
    assert stats.uid == query.uid
    assert (stats.logprobs is not None) == query.logprobs and (stats.topk_ids is not None) == (query.topk > 0)
    if query.logprobs:
        assert stats.logprobs.shape == (length,) and stats.logprobs.dtype == np.float32
        assert np.isnan(stats.logprobs[:first]).all()
        np.testing.assert_allclose(stats.logprobs[first:], hot[at, query.tokens[first:]], atol=tolerance, rtol=0)
    if query.topk:
        ids, values, count = stats.topk_ids, stats.topk_logprobs, min(query.topk, vocab)
        assert ids.shape == values.shape == (length, query.topk) and ids.dtype == np.int32
        assert (ids[:first] == 0).all() and (values[:first] == EMPTY).all()
        assert (ids[:, count:] == 0).all() and (values[:, count:] == EMPTY).all()
        best = -np.sort(-hot[at], axis=1)[:, :count]
        np.testing.assert_allclose(values[first:, :count], best, atol=tolerance, rtol=0)
        theirs = np.take_along_axis(hot[at], ids[first:, :count].astype(np.int64), 1)
        np.testing.assert_allclose(values[first:, :count], theirs, atol=tolerance, rtol=0)
        assert all(len(set(row)) == count for row in ids[first:, :count].tolist())
    if query.targets is not None:
        assert stats.targets.shape == query.targets.shape and stats.targets.dtype == np.float32
        expected = np.take_along_axis(cold[1:], query.targets.clip(0), 1)
        asked = query.targets >= 0
        assert (stats.targets[~asked] == 0).all()
        np.testing.assert_allclose(stats.targets[asked], expected[asked], atol=tolerance, rtol=0)
    if query.alternatives:
        tokens, values = stats.alt_tokens, stats.alt_logprobs
        assert tokens.shape == values.shape == (length - 1, query.alternatives) and tokens.dtype == np.int64
        assert (tokens[: first - 1] == 0).all() and (values[: first - 1] == EMPTY).all()
        expected = np.take_along_axis(cold[at], tokens[first - 1 :], 1)
        np.testing.assert_allclose(values[first - 1 :], expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("max_tokens, rows", [(10_000, 10_000), (60, 7), (1, 1)])
def test_equals_a_plain_forward(setting, max_tokens, rows, monkeypatch):
    model, adapters, exact = setting
    monkeypatch.setattr(module, "LOGITS_BYTES", rows * VOCAB * 4)
    asked = questions()
    answers = score_prompts(model, asked, adapters, max_tokens=max_tokens)
    assert len(answers) == len(asked)
    for query, stats in zip(asked, answers, strict=True):
        check(query, stats, exact[query.model])


@pytest.mark.parametrize("family", ["gemma2", "granite", "mistral"])
def test_families_with_windows_caps_and_scales(family):
    model = CausalLM(make_net(family))
    adapters = {name: adapter(model, name, size=0.05) for name in "ab"}
    asked = questions(6, vocab=96)
    for query, stats in zip(asked, score_prompts(model, asked, adapters, max_tokens=100), strict=True):
        check(query, stats, merged(model, adapters[query.model]) if query.model else model, 5e-5)


def test_draws_depend_on_seed_position_and_number_only(setting):
    model, adapters, _ = setting
    tokens = prompts(1, low=30, high=31)[0]
    more = questions()

    def ask(others=(), **changes):
        query = PromptLogprobsRequest("x", tokens, **{"alternatives": 3, "seed": 8, **changes})
        return score_prompts(model, [*others, query], adapters, max_tokens=400)[-1].alt_tokens

    base = ask()
    assert (base == ask(more)).all() and (base[:, :2] == ask(alternatives=2)).all()
    assert (base[9:] == ask(start=10)[9:]).all() and (ask(start=10)[:9] == 0).all()
    assert (base != ask(seed=9)).mean() > 0.3 and (base[:, 0] != base[:, 1]).mean() > 0.3


def test_draws_follow_the_distribution(setting):
    model, adapters, _ = setting
    tokens = np.array([4, 9, 2])
    drawn = score_prompts(
        model, [PromptLogprobsRequest("x", tokens, alternatives=20_000, seed=3)], adapters, max_tokens=9
    )[0].alt_tokens  # fmt: skip
    expected = np.exp(plain(model, tokens))
    for position in (1, 2):
        share = np.bincount(drawn[position - 1], minlength=VOCAB) / 20_000
        bound = 5 * np.sqrt(expected[position] * (1 - expected[position]) / 20_000) + 1e-4
        assert (np.abs(share - expected[position]) < bound).all()


def test_alone_in_their_packs_queries_get_the_same_bits(setting):
    model, adapters, _ = setting
    asked = questions()
    together = score_prompts(model, asked, adapters, max_tokens=1)
    for query, stats in zip(asked, together, strict=True):
        alone = vars(score_prompts(model, [query], adapters, max_tokens=1)[0])
        for name, value in vars(stats).items():
            assert np.asarray(value).tobytes() == np.asarray(alone[name]).tobytes() or value is alone[name] is None


class _Largest(TorchDispatchMode):
    """Notes the size of the largest tensor with V columns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (VOCAB,) and tensor.is_contiguous():
                self.bytes = max(self.bytes, tensor.nbytes)
        return out


def test_few_logits_exist_at_a_time(setting, monkeypatch):
    model, adapters, _ = setting
    monkeypatch.setattr(module, "LOGITS_BYTES", 16 * VOCAB * 4)
    with _Largest() as largest:
        score_prompts(model, questions(), adapters, max_tokens=10_000)
    assert 0 < largest.bytes <= 2 * 16 * VOCAB * 4  # twice for sums in float64
    assert 2 * LIMIT <= 64 << 20


LIMIT = module.LOGITS_BYTES


def test_one_token_has_nothing_to_say(setting):
    model, adapters, _ = setting
    query = PromptLogprobsRequest(
        "x", np.array([5]), "a", logprobs=True, topk=2, targets=np.zeros((0, 2), np.int64), alternatives=1
    )
    stats = score_prompts(model, [query], adapters, max_tokens=10)[0]
    assert np.isnan(stats.logprobs).all() and (stats.topk_logprobs == EMPTY).all()
    assert stats.targets.shape == (0, 2) and stats.alt_tokens.shape == (0, 1)
    assert score_prompts(model, [], adapters, max_tokens=10) == []


@pytest.mark.parametrize(
    "change",
    [
        dict(model="c"),
        dict(tokens=np.array([VOCAB])),
        dict(tokens=np.array([], dtype=np.int64)),
        dict(tokens=np.ones(600, np.int64)),
        dict(temperature=0.0),
        dict(topk=-1),
        dict(targets=np.zeros((2, 1), np.int64)),
        dict(targets=np.array([[VOCAB]])),
        dict(targets=np.array([[-2]])),
    ],
)
def test_what_a_caller_must_not_ask_is_noticed(setting, change):
    """service/validation.py refuses all of these to a client, by name."""
    model, adapters, _ = setting
    query = PromptLogprobsRequest(**{"uid": "x", "tokens": np.array([1, 2]), **change})
    with pytest.raises(AssertionError):
        score_prompts(model, [query], adapters, max_tokens=10)
