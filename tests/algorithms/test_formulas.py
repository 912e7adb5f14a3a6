"""Every registered piece against tests/algorithms/reference.py, values and gradients, to 1e-10: masked tokens, rows of
one token and without one, all equal, ratios out of all bounds."""

from __future__ import annotations

import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, localcontext

import numpy as np
import pytest
import reference
import torch

from skyrl.algorithms import selection
from skyrl.algorithms.advantages import ADVANTAGES, RewardRows
from skyrl.algorithms.declare import LOSSES, policy_losses
from skyrl.algorithms.filters import overlong_penalty
from skyrl.algorithms.kl import KL_ESTIMATORS, NEEDS_BASE
from skyrl.algorithms.losses import CORRECTIONS, compute_loss
from skyrl.models.packed import collate
from skyrl.types import Datum, ForwardOutput, LossSpec, UserError

POLICY = policy_losses()
CASES = {  # lengths, spread of the log-ratios, part of the tokens that is trained, all advantages equal
    "masked": ((4, 1, 6, 3), 0.4, 0.7, False),
    "one_token": ((1,), 0.4, 1.0, False),
    "all_equal": ((3, 5), 0.0, 1.0, True),
    "huge_ratio": ((4, 5, 2), 30.0, 0.8, False),
    "empty_row": ((3, 2, 4), 0.4, 0.6, False),
}
OTHER = {  # parameters that are not the defaults, so that each of them is read
    "clip_low": 0.15, "clip_high": 0.3, "dual_clip": 1.6, "max_log_ratio": 0.35, "beta": 0.7, "tau_pos": 1.3,
    "tau_neg": 0.8, "log_clip_low": 0.2, "log_clip_high": 0.3, "delta": 0.03, "penalty": 0.6, "k_pos": 1.2,
    "lambda_pos": 0.9, "k_neg": 0.7, "lambda_neg": 1.4, "gamma": 0.9, "lam": 0.8, "alpha": 0.4, "lam_critic": 0.95,
    "eps": 1e-3, "ddof": 0.0, "bootstrap": 1.0, "rho_max": 1.2, "c_max": 0.9, "k": 2.0, "outcome_coef": 0.5,
}  # fmt: skip


def params_of(declared, other: bool) -> dict[str, float]:
    return {name: OTHER.get(name, param.default) if other else param.default for name, param in declared.params.items()}


def make_batch(case: str, seed: int):
    """(log-probabilities, data, the same as the reference has them)."""
    lengths, spread, part, equal = CASES[case]
    rng = np.random.default_rng(seed)
    lp = -np.abs(rng.normal(size=sum(lengths))) - 0.1
    data, start = [], 0
    for s, n in enumerate(lengths):
        trained = (rng.random(n) < part) if part < 1 else np.ones(n, bool)
        if case == "empty_row" and s == 1:
            trained[:] = False
        near = lp[start : start + n]
        sampled, old = (np.minimum(near + spread * rng.normal(size=n), -1e-3) for _ in range(2))
        advantages = np.full(n, 0.5) if equal else np.where(rng.random(n) < 0.15, 0.0, rng.normal(size=n))
        data.append(
            Datum(
                np.zeros(n, int), np.zeros(n, int), rng.random(n) * trained,
                sampling_logprobs=sampled, old_logprobs=old, advantages=advantages, reference=near + spread * 0.7,
                selected=(rng.random(n) < 0.4).astype(float),
            )
        )  # fmt: skip
        start += n

    def joined(name):
        return np.concatenate([getattr(d, name) for d in data]).tolist()

    rows = {name: joined(name) for name in ("weights", "advantages", "selected", "reference")}
    rows |= {"old": joined("old_logprobs"), "behaviour": joined("sampling_logprobs"), "base": joined("old_logprobs")}
    rows["row"] = [s for s, n in enumerate(lengths) for _ in range(n)]
    return lp, data, rows


def computed(lp, data, spec):
    """Our losses and the gradient of their weighted sum, as arrays."""
    x, mb = torch.tensor(lp, requires_grad=True), collate(data, torch.float64, "cpu")
    loss_T, _ = compute_loss(ForwardOutput(x), mb, spec)
    (loss_T * mb.weights_T).sum().backward()
    return loss_T.detach().numpy(), x.grad.numpy()


def close(got, want) -> None:
    np.testing.assert_allclose(got, np.array(want), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", POLICY)
def test_policy_losses(name: str, case: str) -> None:
    for seed in range(3):
        for other in (False, True):
            lp, data, rows = make_batch(case, seed)
            params = params_of(LOSSES.get(name), other)
            got = computed(lp, data, LossSpec(name, params))
            want = reference.value_and_gradient(
                lambda x, rows=rows, params=params: reference.policy_losses(name, x, rows, params), lp, rows["weights"]
            )
            assert np.isfinite(got[0]).all() and np.isfinite(got[1]).all()
            scale = max(1.0, np.abs(want[0]).max())  # ratios of e^60 leave 1e-10 of their own size
            close(got[0] / scale, np.array(want[0]) / scale)
            close(got[1] / scale, np.array(want[1]) / scale)


def test_the_cases_above_reach_every_branch() -> None:
    """Each loss clips, masks or bounds some tokens and not all, in the case that is made for it."""
    for name in POLICY:
        if name in ("reinforce", "importance_sampling", "dro", "dro_sequence", "sapo", "vespo"):
            continue
        seen = set()
        for seed in range(3):
            lp, data, _ = make_batch("masked", seed)
            mb = collate(data, torch.float64, "cpu")
            _, metrics = compute_loss(
                ForwardOutput(torch.tensor(lp)), mb, LossSpec(name, params_of(LOSSES.get(name), True))
            )
            seen |= set(metrics["clipped:mean"][mb.weights_T != 0].tolist())
        assert seen == {0.0, 1.0}, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["ppo", "gspo", "sapo", "dppo_tv", "dppo_kl", "clip_cov", "cispo", "vespo"])
def test_a_ratio_beyond_all_numbers_has_the_gradient_that_the_formula_gives(name: str, dtype: torch.dtype) -> None:
    """Clipped, masked or closed by the gate: 0 at that token, and what it is elsewhere; no 0 times infinity."""
    far = -200.0 if dtype == torch.float32 else -2000.0
    advantages = {"sapo": [1.0, -1.0], "ppo": [1.0, -1.0]}.get(name, [1.0])  # ppo's dual clip bounds the other side
    for a in advantages:
        params = {"dual_clip": 3.0} if name == "ppo" else {}
        one = Datum(
            np.zeros(2, int), np.zeros(2, int), np.ones(2), sampling_logprobs=np.array([far, -1.0]),
            advantages=np.full(2, a), selected=np.zeros(2),
        )  # fmt: skip
        x = torch.tensor([-0.1, -1.0], dtype=dtype, requires_grad=True)
        loss_T, _ = compute_loss(ForwardOutput(x), collate([one], dtype, "cpu"), LossSpec(name, params))
        loss_T.sum().backward()
        row = name in ("gspo", "vespo")  # the ratio is the whole row's
        assert torch.isfinite(loss_T).all()
        wanted = [-4.0 * a if name == "cispo" else 0.0, 0.0 if row else -a]
        torch.testing.assert_close(x.grad, torch.tensor(wanted, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dppo_kl_of_a_token_that_was_certain(dtype: torch.dtype) -> None:
    """KL of (1, 0) and (p, 1 - p) is -log p: a token of base 1 is held back at p = 1/e, and not at 0.99."""
    for now, gradient in ((-1.0, 0.0), (math.log(0.99), 0.99)):
        one = Datum(
            np.zeros(1, int), np.zeros(1, int), np.ones(1), sampling_logprobs=np.zeros(1), advantages=-np.ones(1)
        )
        x = torch.tensor([now], dtype=dtype, requires_grad=True)
        compute_loss(ForwardOutput(x), collate([one], dtype, "cpu"), LossSpec("dppo_kl"))[0].sum().backward()
        assert x.grad.item() == pytest.approx(gradient, rel=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", CORRECTIONS.names())
def test_corrections(name: str, case: str) -> None:
    for seed in range(3):
        for cap, low in ((1.4, 0.0), (1.2, 0.9)):
            lp, data, rows = make_batch(case, seed)
            mb = collate(data, torch.float64, "cpu")
            log_ratio_T = (mb.old_logprobs_T - mb.sampling_logprobs_T).where(mb.weights_T != 0, 0.0)
            got = CORRECTIONS.get(name)(log_ratio_T, mb, cap, low).where(mb.weights_T != 0, 0.0)
            want = reference.correction(name, rows, cap, low)
            close(got, want)
            loss = computed(lp, data, LossSpec("reinforce", correction=name, correction_cap=cap, correction_low=low))
            plain = computed(lp, data, LossSpec("reinforce"))
            close(loss[0], plain[0] * np.array(want))
            close(loss[1], plain[1] * np.array(want))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", KL_ESTIMATORS.names())
def test_kl_estimators(name: str, case: str) -> None:
    lp, data, rows = make_batch(case, 0)
    got = computed(lp, data, LossSpec("reinforce", kl_coef=0.3, kl_estimator=name))
    plain = computed(lp, data, LossSpec("reinforce"))

    def estimates(x):
        given = zip(x, rows["reference"], rows["base"], rows["weights"], strict=True)
        return [0.3 * reference.kl(name, *one) if w else 0j for *one, w in given]

    value, gradient = reference.value_and_gradient(estimates, lp, rows["weights"])
    scale = max(1.0, np.abs(value).max())
    close((got[0] - plain[0]) / scale, np.array(value) / scale)
    close((got[1] - plain[1]) / scale, np.array(gradient) / scale)


@pytest.mark.parametrize(("dtype", "places"), [(torch.float32, 2e-5), (torch.float64, 1e-10)])
def test_k3_with_a_ratio_keeps_its_digits_far_from_the_reference(dtype: torch.dtype, places: float) -> None:
    """ref / base - (pi / base) (1 + log ref / pi), and its derivative -(pi / base) log(ref / pi): with 60 digits."""
    points = [0.0, -0.5, -0.5001, -17.0, -40.0, *([-150.0] if dtype == torch.float32 else [-600.0, -800.0])]
    largest = torch.finfo(dtype).max / 10
    for now, ref, base in itertools.product(points, repeat=3):
        x = torch.tensor([now], dtype=dtype, requires_grad=True)
        value = KL_ESTIMATORS.get("k3_ratio")(x, *(torch.tensor([y], dtype=dtype) for y in (ref, base)))
        value.sum().backward()
        p, q, b = (Decimal(torch.tensor(y, dtype=dtype).item()) for y in (now, ref, base))
        with localcontext() as digits:
            digits.prec = 60
            wanted = (q - b).exp() - (p - b).exp() * (1 + q - p), -(p - b).exp() * (q - p)
        size = max(1.0, *(abs(float(one)) for one in wanted))  # the value is a sum of which the derivative is a part
        for got, want in zip((value, x.grad), map(float, wanted), strict=True):
            if size < largest:
                assert got.item() == pytest.approx(want, rel=places, abs=places * size), (now, ref, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", POLICY)
def test_a_token_without_an_advantage_does_nothing_whatever_its_ratio_is(name: str, dtype: torch.dtype) -> None:
    """A group of equal scores: 0 times infinity would be NaN. dro and dro_sequence pull it to the base instead."""
    for far in (-2000.0, 2000.0):
        one = Datum(
            np.zeros(2, int), np.zeros(2, int), np.ones(2), sampling_logprobs=np.array([min(far, 0.0), -1.0]),
            advantages=np.zeros(2), selected=np.zeros(2),
        )  # fmt: skip
        x = torch.tensor([min(-far, 0.0), -1.0], dtype=dtype, requires_grad=True)
        loss_T, _ = compute_loss(ForwardOutput(x), collate([one], dtype, "cpu"), LossSpec(name))
        loss_T.sum().backward()
        assert torch.isfinite(loss_T).all() and torch.isfinite(x.grad).all()
        assert name.startswith("dro") or not (loss_T.any() or x.grad.any())


@pytest.mark.parametrize("seed", range(3))
def test_expected_gradients_of_the_straight_through_forms_and_of_k3_with_a_ratio(seed: int) -> None:
    """By enumeration of 6 outcomes: that of KL(pi || ref), for k3_ratio also when another policy sampled."""
    g = torch.Generator().manual_seed(seed)
    logits, ref, behaviour = (torch.randn(6, generator=g, dtype=torch.float64) for _ in range(3))
    ref, behaviour = ref.log_softmax(0), behaviour.log_softmax(0)
    logits.requires_grad_()
    lp = logits.log_softmax(0)
    (want,) = torch.autograd.grad((lp.exp() * (lp - ref)).sum(), logits)
    for name in ("k1+", "k3+", "abs+", "k3_ratio"):
        lp = logits.log_softmax(0)
        weighed, base = (behaviour, (behaviour,)) if name in NEEDS_BASE else (lp.detach(), ())
        loss = (weighed.exp() * KL_ESTIMATORS.get(name)(lp, ref, *base)).sum()
        (got,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


# ---- advantages


def make_rewards(seed: int, kind: str = "mixed") -> RewardRows:
    """Groups of 1 to 5 episodes of 1 to 3 rows, some without a score; rewards on the last token of each turn."""
    rng = np.random.default_rng(seed)
    group, episode, rewards, masks, valid, values, ratios = [], [], [], [], [], [], []
    for g, size in enumerate([4, 1, 5, 2, 3]):
        for e in range(size):
            is_valid = rng.random() > 0.15
            for _ in range(int(rng.integers(1, 4))):
                length = 1 if kind == "one_token" else int(rng.integers(2, 9))
                mask = rng.random(length) < (0.0 if kind == "empty_row" and rng.random() < 0.4 else 0.7)
                if kind != "empty_row":
                    mask[rng.integers(length)] = True
                reward = np.zeros(length)
                ends = [t for t in range(length) if mask[t] and (t + 1 == length or not mask[t + 1])]
                reward[ends] = 0.25 if kind == "all_equal" else rng.integers(0, 3, len(ends)) / 2 + 0.1 * g
                group.append(g)
                episode.append(e)
                rewards.append(np.where(mask, reward, 0.0) if is_valid else np.full(length, np.nan))
                masks.append(mask)
                valid.append(is_valid)
                values.append(np.where(mask, rng.normal(size=length), np.nan))
                ratios.append(np.where(mask, (8.0 if kind == "huge_ratio" else 0.4) * rng.normal(size=length), np.nan))
    baseline = np.where(rng.random(5) < 0.2, np.nan, rng.integers(0, 3, 5) / 2)[group]
    bootstrap = rng.normal(size=(5, 5))[group, episode]
    return RewardRows(
        np.array(group), np.array(episode), rewards, masks, np.array(valid), values,
        bootstrap_D=bootstrap, baseline_D=baseline, log_ratios=ratios,
    )  # fmt: skip


def tokens_of(arrays, rows) -> np.ndarray:
    return np.concatenate(
        [a[m] for a, m, v in zip(arrays, rows.masks, rows.valid_D, strict=True) if v] or [np.zeros(0)]
    )


@pytest.mark.parametrize("kind", ["mixed", "one_token", "all_equal", "huge_ratio", "empty_row"])
@pytest.mark.parametrize("name", ADVANTAGES.names())
def test_advantages(name: str, kind: str) -> None:
    for seed in range(3):
        for other in (False, True):
            rows = make_rewards(seed, kind)
            params = params_of(ADVANTAGES.get(name), other)
            got = ADVANTAGES.get(name).compute(rows, lambda x: x, params=params)
            advantage, target = reference.advantages(name, rows, params)
            order = [(d, t) for d in range(len(rows.masks)) for t in np.flatnonzero(rows.masks[d]) if rows.valid_D[d]]
            close(tokens_of(got.advantages, rows), [advantage[at] for at in order])
            assert all((a[~m] == 0).all() for a, m in zip(got.advantages, rows.masks, strict=True))
            assert all((a == 0).all() for a, v in zip(got.advantages, rows.valid_D, strict=True) if not v)
            assert (got.returns is None) == (target is None)
            if target is not None:
                close(tokens_of(got.returns, rows), [target[at] for at in order])


def test_pass_at_k_of_right_and_wrong_answers_is_the_papers_closed_form() -> None:
    n, right, k = 8, 3, 4
    scores = [1.0] * right + [0.0] * (n - right)
    rows = RewardRows(
        np.zeros(n, int), np.arange(n), [np.array([s]) for s in scores], [np.ones(1, bool)] * n, np.ones(n, bool)
    )
    got = ADVANTAGES.get("pass_at_k").compute(rows, lambda x: x, params={"k": k, "eps": 0.0}).advantages
    wrong = n - right
    mean = 1 - math.comb(wrong, k) / math.comb(n, k)
    sigma = math.sqrt(mean * (1 - mean))
    close(got[0], [(1 - mean) / sigma])
    close(got[-1], [(1 - mean - math.comb(wrong - 1, k - 1) / math.comb(n - 1, k - 1)) / sigma])


def test_maxrl_refuses_rewards_below_0_and_vtrace_on_policy_is_the_lambda_return() -> None:
    rows = make_rewards(0)
    rows.rewards = [np.where(m, r - 5.0, 0.0) for r, m in zip(rows.rewards, rows.masks, strict=True)]
    with pytest.raises(UserError, match="maxrl: a score is -.*0 or more"):
        ADVANTAGES.get("maxrl").compute(rows, lambda x: x, params={})
    rows = make_rewards(1)
    rows.log_ratios = [np.zeros(len(m)) for m in rows.masks]
    params = {"gamma": 0.9, "lam": 0.8}
    got = ADVANTAGES.get("vtrace").compute(rows, lambda x: x, params=params)
    want = ADVANTAGES.get("gae").compute(rows, lambda x: x, params=params)
    close(tokens_of(got.returns, rows), tokens_of(want.returns, rows))


# ---- tokens of a batch, and length


@pytest.mark.parametrize("name", ["top_entropy", "clip_cov", "kl_cov"])
def test_selections_equal_the_slow_loop_and_do_not_depend_on_ranks(name: str) -> None:
    rng = np.random.default_rng(0)
    lengths = [3, 7, 1, 5, 9, 4]
    masks = [rng.random(n) < 0.8 for n in lengths]
    masks[2][:] = False
    lp, adv, draws = ([rng.normal(size=n) * 2 for n in lengths] for _ in range(3))
    lp[0][~masks[0]] = np.nan
    params = {"fraction": 0.2, "cov_low": 0.1, "cov_high": 6.0}
    at = [(d, t) for d in range(6) for t in range(lengths[d]) if masks[d][t]]
    means = [reference.mean([float(x[d][t]) for d, t in at]) for x in (lp, adv)]
    cov = {(d, t): (lp[d][t] - means[0]) * (adv[d][t] - means[1]) for d, t in at}
    count = max(1, int(0.2 * len(at)))
    if name == "top_entropy":
        want = set(sorted(at, key=lambda i: -lp[i[0]][i[1]])[: int(0.2 * (len(at) - 1)) + 1])
    elif name == "kl_cov":
        want = set(sorted(at, key=lambda i: -cov[i])[:count])
    else:
        inside = [i for i in at if 0.1 < cov[i] < 6.0]
        want = set(sorted(inside, key=lambda i: draws[i[0]][i[1]])[:count])
    assert 0 < len(want) < len(at)

    def select(keep, gather):
        m, x, a, u = ([y[d] for d in keep] for y in (masks, lp, adv, draws))
        if name == "top_entropy":
            return selection.top_entropy(x, m, gather, 0.2)
        return selection.SELECTIONS[name](selection.covariances(x, a, m, gather), u, gather, params)

    for parts in ([[0, 1, 2, 3, 4, 5]], [[3, 1], [], [0, 2, 5, 4]]):
        got = spmd(parts, select)
        found = {
            (d, int(t))
            for part, out in zip(parts, got, strict=True)
            for d, m in zip(part, out, strict=True)
            for t in np.flatnonzero(m)
        }
        assert found == want


def spmd(parts, work):
    """`work(part, gather)` of each rank in a thread; gather meets at a barrier, as a collective would."""
    barrier, shared = threading.Barrier(len(parts), timeout=10), [np.zeros(0)] * len(parts)

    def run(rank):
        def gather(mine):
            shared[rank] = mine
            barrier.wait()
            whole = np.concatenate(shared)
            barrier.wait()
            return whole

        return work(parts[rank], gather)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(run, range(len(parts))))


def test_overlong_penalty_equals_the_papers_three_cases() -> None:
    masks = [np.ones(n, bool) for n in (4, 8, 9, 10)] + [np.array([1, 1, 0, 1] + [1] * 8, bool)]
    got = overlong_penalty([np.zeros(len(m)) for m in masks], masks, limit=10, buffer=0.2)
    assert [float(r.sum()) for r in got[:4]] == pytest.approx([0.0, 0.0, -0.5, -1.0])
    assert got[4].tolist() == pytest.approx([0.0] * 11 + [-0.5])  # turns of 2 and of 9 tokens
