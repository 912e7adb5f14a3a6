"""Every loss and correction against scalar loops from its paper: values and gradients; then masks, NaN and refusals.

The gradient reference is a hand-derived number per token (d loss_t / d logprob_t), because finite differences see
through stop-gradients; losses without one are checked by finite differences besides.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from skyrl.algorithms.declare import LOSSES, Loss, Param, policy_losses
from skyrl.algorithms.kl import KL_ESTIMATORS
from skyrl.algorithms.losses import CORRECTIONS, check_spec, compute_loss
from skyrl.config.schema import AlgorithmConfig, CriticConfig, KLConfig, LossConfig
from skyrl.planner.plan import make_spec, make_value_spec
from skyrl.types import ForwardOutput, LossSpec, Microbatch, UserError

OPTIONAL = [
    f"{name}_T" for name in "sampling_logprobs advantages old_logprobs reference values returns selected".split()
]
POLICY = ["reinforce", "importance_sampling", "ppo", "cispo", "gspo", "dro"]  # further ones: test_formulas.py


def make_batch(seed: int = 0, lengths=(4, 1, 6), trained: float = 0.7, dtype=torch.float64):
    """Rows with every optional field, ratios on both sides of the clips, zero, positive and negative advantages."""
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def draw(scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(total, generator=g, dtype=torch.float64) * scale).to(dtype)

    logprobs = -draw().abs() - 0.1
    weights = torch.rand(total, generator=g).to(dtype) * (torch.rand(total, generator=g) < trained)
    advantages = draw()
    advantages[::5] = 0.0
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    values = draw()
    rows = Microbatch(
        tokens_T=torch.zeros(total, dtype=torch.int64),
        targets_T=torch.zeros(total, dtype=torch.int64),
        positions_T=torch.cat([torch.arange(n) for n in lengths]),
        row_T=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        starts_S1=starts,
        lengths=tuple(lengths),
        weights_T=weights,
        sampling_logprobs_T=logprobs + draw(0.4),
        advantages_T=advantages,
        old_logprobs_T=logprobs + draw(0.4),
        reference_T=logprobs + draw(0.4),
        values_T=values + draw(0.4),
        returns_T=draw(),
        selected_T=(draw() > 0).to(dtype),
    )
    outputs = ForwardOutput(logprobs.requires_grad_(), draw().abs().requires_grad_(), values.requires_grad_())
    return outputs, rows


def spec(name: str, **kwargs) -> LossSpec:
    return LossSpec(name=name, params=kwargs.pop("params", {}), **kwargs)


def run(outputs: ForwardOutput, rows: Microbatch, loss_spec: LossSpec):
    """loss_T, the weighted sum's gradients by logprobs, entropy and values, and the metrics."""
    for x in (outputs.logprobs_T, outputs.entropy_T, outputs.values_T):
        x.grad = None
    loss_T, metrics = compute_loss(outputs, rows, loss_spec)
    (loss_T * rows.weights_T).sum().backward()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (outputs.logprobs_T, outputs.entropy_T)]
    value_grad = outputs.values_T.grad if outputs.values_T.grad is not None else torch.zeros_like(outputs.values_T)
    return loss_T.detach(), (*grads, value_grad), metrics


def slow_policy(name: str, outputs: ForwardOutput, rows: Microbatch, base, low: float, high: float, beta: float):
    """Per token: (loss, d loss / d logprob), floats, from the papers' formulas."""
    out = []
    lp = outputs.logprobs_T.tolist()
    for t in range(len(lp)):
        if rows.weights_T[t] == 0:
            out.append((0.0, 0.0))
            continue
        a, b = float(rows.advantages_T[t]), float(base[t])
        r = math.exp(lp[t] - b)
        if name == "reinforce":
            out.append((-a * lp[t], -a))
        elif name == "importance_sampling":
            out.append((-r * a, -r * a))
        elif name == "ppo":
            unclipped, clipped = r * a, min(max(r, 1 - low), 1 + high) * a
            out.append((-min(unclipped, clipped), -r * a if unclipped <= clipped else 0.0))
        elif name == "cispo":
            weight = min(max(r, 1 - low), 1 + high)
            out.append((-weight * a * lp[t], -weight * a))
        elif name == "gspo":
            mine = [
                u for u in range(len(lp)) if rows.row_T[u] == rows.row_T[t] and rows.weights_T[u] != 0
            ]  # the row's trained tokens
            s = math.exp(sum(lp[u] - float(base[u]) for u in mine) / len(mine))
            unclipped, clipped = s * a, min(max(s, 1 - low), 1 + high) * a
            out.append((-min(unclipped, clipped), -s * a if unclipped <= clipped else 0.0))
        elif name == "dro":
            gap = lp[t] - b
            out.append((-(a * lp[t] - 0.5 * beta * gap**2), -(a - beta * gap)))
    return out


def slow_correction(name: str, rows: Microbatch, old, cap: float) -> list[float]:
    out = []
    for t in range(len(old)):
        gap = float(old[t] - rows.sampling_logprobs_T[t])
        if rows.weights_T[t] == 0:
            out.append(0.0)
        elif name == "token_truncate":
            out.append(min(math.exp(gap), cap))
        elif name == "token_mask":
            out.append(math.exp(gap) if 1 / cap <= math.exp(gap) <= cap else 0.0)
        elif name == "sequence_truncate":
            product = 1.0
            for u in range(len(old)):
                if rows.row_T[u] == rows.row_T[t] and rows.weights_T[u] != 0:
                    product *= math.exp(float(old[u] - rows.sampling_logprobs_T[u]))
            out.append(min(product, cap))
        else:
            out.append(1.0)
    return out


def params_of(name: str, low: float, high: float, beta: float) -> dict[str, float]:
    everything = {"clip_low": low, "clip_high": high, "beta": beta}
    return {key: value for key, value in everything.items() if key in LOSSES.get(name).params}


def close(got: torch.Tensor, want: list[float], rtol: float = 1e-12) -> None:
    torch.testing.assert_close(got, torch.tensor(want, dtype=got.dtype), rtol=rtol, atol=1e-13)


# ---- values and gradients


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("has_old", [True, False])
@pytest.mark.parametrize("name", POLICY)
def test_policy_losses_equal_the_slow_loop(name: str, has_old: bool, seed: int) -> None:
    outputs, rows = make_batch(seed)
    rows = rows if has_old else replace(rows, old_logprobs_T=None)
    base = rows.old_logprobs_T if has_old else rows.sampling_logprobs_T
    loss_T, grads, _ = run(outputs, rows, spec(name, params=params_of(name, 0.15, 0.3, 0.7)))
    want = slow_policy(name, outputs, rows, base, 0.15, 0.3, 0.7)
    close(loss_T, [w[0] for w in want])
    close(grads[0], [float(rows.weights_T[t]) * w[1] for t, w in enumerate(want)])
    assert not grads[1].any() and not grads[2].any()


def test_the_batches_above_reach_every_branch() -> None:
    """Both signs of the advantage on both sides of the clip, and rows of several trained tokens that gspo clips."""
    seen: dict[tuple[float, str], int] = {}
    gspo_clipped = 0
    for seed in range(3):
        outputs, rows = make_batch(seed)
        trained = rows.weights_T != 0
        assert not trained.all()
        ratio = torch.exp(outputs.logprobs_T.detach() - rows.old_logprobs_T)
        for t in torch.nonzero(trained)[:, 0].tolist():
            side = "above" if ratio[t] > 1.3 else "below" if ratio[t] < 0.85 else "inside"
            key = (float(torch.sign(rows.advantages_T[t])), side)
            seen[key] = seen.get(key, 0) + 1
        _, _, metrics = run(outputs, rows, spec("gspo", params={"clip_low": 0.15, "clip_high": 0.3}))
        gspo_clipped += int(metrics["clipped:mean"][trained].sum())
    assert {(sign, side) for sign in (1.0, -1.0) for side in ("above", "below", "inside")} <= set(seen)
    assert any(sign == 0.0 for sign, _ in seen) and gspo_clipped > 0


def finite_difference(f, x: torch.Tensor, h: float = 1e-6) -> torch.Tensor:
    out = torch.zeros_like(x)
    for t in range(len(x)):
        step = torch.zeros_like(x)
        step[t] = h
        out[t] = (f(x + step) - f(x - step)) / (2 * h)
    return out


@pytest.mark.parametrize("name", ["reinforce", "importance_sampling", "ppo", "dro", "cross_entropy"])
def test_gradients_equal_finite_differences(name: str) -> None:
    """The whole formula with KL and entropy; losses without a stop-gradient."""
    outputs, rows = make_batch(4)
    full = spec(name, kl_coef=0.3, kl_estimator="k3", entropy_coef=0.2)

    def total(lp: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        loss_T, _ = compute_loss(ForwardOutput(lp, entropy), rows, full)
        return (loss_T * rows.weights_T).sum().detach()

    _, grads, _ = run(outputs, rows, full)
    lp, entropy = outputs.logprobs_T.detach(), outputs.entropy_T.detach()
    torch.testing.assert_close(grads[0], finite_difference(lambda x: total(x, entropy), lp), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(grads[1], finite_difference(lambda x: total(lp, x), entropy), rtol=1e-6, atol=1e-8)


def test_gspo_with_sequence_mean_is_the_papers_sequence_objective() -> None:
    """Value and gradient of -1/S sum_s min(s A, clip(s) A), with s differentiated through the geometric mean."""
    outputs, rows = make_batch(2, lengths=(4, 3, 6, 2), trained=2.0)
    advantage_S = torch.tensor([1.0, -0.5, 2.0, -1.5], dtype=torch.float64)
    length_S = torch.bincount(rows.row_T)
    rows = replace(rows, advantages_T=advantage_S[rows.row_T], weights_T=1.0 / (4.0 * length_S[rows.row_T].double()))
    loss_T, grads, _ = run(outputs, rows, spec("gspo", params={"clip_low": 0.1, "clip_high": 0.1}))
    lp = outputs.logprobs_T.detach().clone().requires_grad_()
    objective = torch.zeros((), dtype=torch.float64)
    clipped = 0
    for s in range(4):
        mine = rows.row_T == s
        ratio = torch.exp((lp[mine] - rows.old_logprobs_T[mine]).mean())
        a = advantage_S[s]
        objective = objective - torch.min(ratio * a, ratio.clamp(0.9, 1.1) * a) / 4
        clipped += int(not 0.9 < float(ratio.detach()) < 1.1)
    objective.backward()
    assert 0 < clipped < 4
    assert float((loss_T * rows.weights_T).sum()) == pytest.approx(float(objective.detach()), rel=1e-12)
    torch.testing.assert_close(grads[0], lp.grad, rtol=1e-12, atol=1e-14)


def test_cross_entropy_takes_negative_weights() -> None:
    outputs, rows = make_batch(0)
    rows = replace(rows, weights_T=-rows.weights_T)
    loss_T, grads, metrics = run(outputs, rows, spec("cross_entropy"))
    trained = rows.weights_T != 0
    torch.testing.assert_close(loss_T, torch.where(trained, -outputs.logprobs_T.detach(), 0.0))
    torch.testing.assert_close(grads[0], -rows.weights_T)
    torch.testing.assert_close(metrics["nll:mean"], loss_T)


@pytest.mark.parametrize("clip", [0.2, 0.0])
def test_value_loss_equals_the_slow_loop(clip: float) -> None:
    outputs, rows = make_batch(3)
    loss_T, grads, _ = run(outputs, rows, spec("value", params={"clip": clip}))
    values, grad = [], []
    clipped = 0
    for t in range(len(loss_T)):
        v, old, target = (float(x[t].detach()) for x in (outputs.values_T, rows.values_T, rows.returns_T))
        w = float(rows.weights_T[t])
        plain = (v - target) ** 2
        held = min(max(v, old - clip), old + clip)
        limited = (held - target) ** 2
        use_limited = clip > 0 and limited > plain
        clipped += use_limited and w != 0
        values.append(0.5 * max(plain, limited if clip > 0 else plain) * (w != 0))
        slope = (1.0 if held == v else 0.0) if use_limited else 1.0
        grad.append(w * slope * ((held if use_limited else v) - target))
    assert clipped > 0 or clip == 0
    close(loss_T, values)
    close(grads[2], grad)
    assert not grads[0].any()


# ---- corrections


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("has_old", [True, False])
@pytest.mark.parametrize("correction", ["none", "token_truncate", "token_mask", "sequence_truncate"])
@pytest.mark.parametrize("name", ["reinforce", "ppo", "gspo"])
def test_corrections_weight_the_policy_term_only(name: str, correction: str, has_old: bool, seed: int) -> None:
    outputs, rows = make_batch(seed)
    rows = rows if has_old else replace(rows, old_logprobs_T=None)
    cap, kl, entropy = 1.4, 0.3, 0.2
    loss_T, grads, metrics = run(
        outputs,
        rows,
        spec(
            name,
            params=params_of(name, 0.15, 0.3, 0.0),
            correction=correction,
            correction_cap=cap,
            kl_coef=kl,
            kl_estimator="k2",
            entropy_coef=entropy,
        ),
    )
    current = outputs.logprobs_T.detach()
    if has_old:
        base = old = rows.old_logprobs_T
    elif correction == "none":
        base = old = rows.sampling_logprobs_T
    else:
        base = old = current  # the correction has the whole weight, the ratio is 1: nothing counts twice
    policy = slow_policy(name, outputs, rows, base, 0.15, 0.3, 0.0)
    weight = slow_correction(correction, rows, old, cap)
    want, want_grad = [], []
    for t, (value, grad) in enumerate(policy):
        on, w = float(rows.weights_T[t] != 0), float(rows.weights_T[t])
        gap = float(current[t] - rows.reference_T[t])
        want.append(value * weight[t] + on * (kl * 0.5 * gap**2 - entropy * float(outputs.entropy_T[t].detach())))
        want_grad.append(w * (grad * weight[t] + kl * gap))
    close(loss_T, want)
    close(grads[0], want_grad)
    torch.testing.assert_close(grads[1], -entropy * rows.weights_T)
    if correction != "none":
        trained = rows.weights_T != 0
        close(metrics["correction:mean"][trained], [w for t, w in enumerate(weight) if trained[t]])
        touched = [float(w >= cap or w == 0) for t, w in enumerate(weight) if trained[t]]
        assert metrics["correction_capped:mean"][trained].tolist() == touched


def test_corrections_reach_cap_mask_and_inside() -> None:
    outputs, rows = make_batch(0)
    for name in CORRECTIONS.names():
        weight = slow_correction(name, rows, rows.old_logprobs_T, 1.4)
        trained = [w for t, w in enumerate(weight) if rows.weights_T[t] != 0]
        if name == "token_mask":
            assert 0.0 in trained and any(0 < w < 1.4 for w in trained)
        elif name == "token_truncate":
            assert 1.4 in trained and any(w < 1.4 for w in trained)


def test_one_update_with_a_correction_and_no_old_logprobs_equals_recomputed_ones() -> None:
    """At the first update of a batch the old policy is the current one, so the extra forward may be saved."""
    outputs, rows = make_batch(5)
    for name in ("importance_sampling", "ppo", "cispo", "gspo"):
        with_old = replace(rows, old_logprobs_T=outputs.logprobs_T.detach().clone())
        without = replace(rows, old_logprobs_T=None)
        s = spec(name, correction="token_truncate", correction_cap=1.4)
        a, b = run(outputs, with_old, s), run(outputs, without, s)
        torch.testing.assert_close(a[0], b[0], rtol=0, atol=0)
        torch.testing.assert_close(a[1][0], b[1][0], rtol=0, atol=0)


# ---- masks


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", LOSSES.names())
def test_poison_at_untrained_tokens_changes_nothing(name: str, bad: float) -> None:
    kind = LOSSES.get(name).kind
    for correction in CORRECTIONS.names() if kind == "policy" else ["none"]:
        for estimator in KL_ESTIMATORS.names() if correction == "none" else ["k2"]:
            if kind != "policy" and estimator == "k3_ratio":
                continue  # these have no policy that sampled
            full = spec(name, correction=correction, kl_estimator=estimator)
            if kind != "critic":
                full = replace(full, kl_coef=0.3, entropy_coef=0.2)
            outputs, rows = make_batch(1)
            untrained = rows.weights_T == 0
            assert 0 < int(untrained.sum()) < len(untrained)
            want_loss, want_grads, want_metrics = run(outputs, rows, full)
            poison = {f: torch.where(untrained, bad, getattr(rows, f)) for f in OPTIONAL}
            dirty = ForwardOutput(
                *(
                    torch.where(untrained, bad, x.detach()).requires_grad_()
                    for x in (outputs.logprobs_T, outputs.entropy_T, outputs.values_T)
                )
            )
            loss_T, grads, metrics = run(dirty, replace(rows, **poison), full)
            assert torch.equal(loss_T, want_loss) and torch.isfinite(loss_T).all()
            for got, want in zip(grads, want_grads, strict=True):
                assert torch.equal(got, want) and torch.isfinite(got).all()
            assert metrics.keys() == want_metrics.keys()
            for key in metrics:
                assert torch.equal(metrics[key], want_metrics[key]) and not metrics[key].requires_grad
                assert torch.isfinite(metrics[key]).all()


def test_trained_nan_is_not_hidden() -> None:
    outputs, rows = make_batch(1)
    at = int(torch.nonzero(rows.weights_T)[0])
    rows.advantages_T[at] = float("nan")
    loss_T, _, _ = run(outputs, rows, spec("ppo"))
    assert torch.isnan(loss_T).sum() == 1


@pytest.mark.parametrize("name", LOSSES.names())
def test_padding_only_batches_have_a_zero_gradient_whatever_fields_they_lack(name: str) -> None:
    """Padding rows carry nothing, and a sharded backward must run all the same."""
    outputs, rows = make_batch(1)
    bare = replace(rows, weights_T=torch.zeros_like(rows.weights_T), **dict.fromkeys(OPTIONAL))
    full = spec(name)
    if LOSSES.get(name).kind != "critic":
        full = replace(full, kl_coef=0.1)
    loss_T, metrics = compute_loss(outputs, bare, full)
    assert loss_T.requires_grad
    loss_T.sum().backward()
    grad = outputs.values_T.grad if name == "value" else outputs.logprobs_T.grad
    assert not loss_T.any() and grad is not None and not grad.any()
    assert all(torch.isfinite(metric).all() for metric in metrics.values())


@pytest.mark.parametrize("name", LOSSES.names())
def test_one_token(name: str) -> None:
    outputs, rows = make_batch(1, lengths=(1,), trained=2.0)
    loss_T, grads, _ = run(outputs, rows, spec(name))
    assert loss_T.shape == (1,) and torch.isfinite(loss_T).all() and all(torch.isfinite(g).all() for g in grads)
    if name == "gspo":  # a sequence of one token is ppo
        want = run(outputs, rows, spec("ppo", params={"clip_low": 3e-4, "clip_high": 4e-4}))
        torch.testing.assert_close(loss_T, want[0])
        torch.testing.assert_close(grads[0], want[1][0])


@pytest.mark.parametrize("name", LOSSES.names())
def test_packing_does_not_matter(name: str) -> None:
    """Rows alone and packed together give the same losses and gradients, in another order too."""
    full = spec(name, correction="sequence_truncate" if LOSSES.get(name).kind == "policy" else "none")
    outputs, rows = make_batch(6, lengths=(4, 1, 6, 3))
    whole = run(outputs, rows, full)
    for s in range(4):
        mine = torch.nonzero(rows.row_T == s)[:, 0]
        fields = {f: getattr(rows, f)[mine] for f in [*OPTIONAL, "weights_T", "tokens_T", "targets_T", "positions_T"]}
        alone = replace(
            rows, row_T=torch.zeros(len(mine), dtype=torch.int64), starts_S1=torch.tensor([0, len(mine)]), **fields
        )
        out = ForwardOutput(
            *(x.detach()[mine].requires_grad_() for x in (outputs.logprobs_T, outputs.entropy_T, outputs.values_T))
        )
        got = run(out, alone, full)
        torch.testing.assert_close(got[0], whole[0][mine], rtol=1e-14, atol=0)
        for g, w in zip(got[1], whole[1], strict=True):
            torch.testing.assert_close(g, w[mine], rtol=1e-14, atol=0)


# ---- metrics


def test_metrics_equal_the_slow_loop() -> None:
    outputs, rows = make_batch(0)
    _, _, metrics = run(outputs, rows, spec("ppo", params={"clip_low": 0.15, "clip_high": 0.3}))
    for t in torch.nonzero(rows.weights_T)[:, 0].tolist():
        lp, old, behaviour, ref, a = (
            float(x[t].detach())
            for x in (
                outputs.logprobs_T,
                rows.old_logprobs_T,
                rows.sampling_logprobs_T,
                rows.reference_T,
                rows.advantages_T,
            )
        )
        r = math.exp(lp - old)
        want = {
            "ratio:mean": r,
            "ratio:max": r,
            "clipped:mean": float((a > 0 and r > 1.3) or (a < 0 and r < 0.85)),
            "approx_kl:mean": r - 1 - math.log(r),
            "kl_reference:mean": math.exp(ref - lp) - 1 - (ref - lp),
            "entropy:mean": float(outputs.entropy_T[t].detach()),
            "logprob_gap:mean": abs(lp - behaviour),
            "logprob_gap:max": abs(lp - behaviour),
            "logprob_gap_kl:mean": math.exp(lp - behaviour) - 1 - (lp - behaviour),
        }
        assert set(metrics) == set(want)
        for key, value in want.items():
            assert float(metrics[key][t]) == pytest.approx(value, rel=1e-10, abs=1e-14), key


def test_per_token_bounds_equal_one_number_each_and_may_be_poisoned_where_untrained() -> None:
    outputs, rows = make_batch(0)
    low, high = torch.full_like(rows.weights_T, 0.15), torch.full_like(rows.weights_T, 0.3)
    low[rows.weights_T == 0] = float("nan")
    for name in ("ppo", "cispo", "gspo"):
        want = run(outputs, rows, spec(name, params={"clip_low": 0.15, "clip_high": 0.3}))
        got = run(outputs, rows, spec(name, params={"clip_low": low, "clip_high": high}))
        assert torch.equal(got[0], want[0]) and torch.equal(got[1][0], want[1][0])


# ---- refusals and the way from the config


@pytest.mark.parametrize("name", LOSSES.names())
def test_a_missing_field_is_named(name: str) -> None:
    outputs, rows = make_batch(0)
    for need in LOSSES.get(name).needs:
        fields = {f"{need}_T": None} | ({"old_logprobs_T": None} if need == "sampling_logprobs" else {})
        with pytest.raises(UserError, match=need):
            compute_loss(outputs, replace(rows, **fields), spec(name))
    if LOSSES.get(name).kind == "policy":
        with pytest.raises(UserError, match="reference"):
            compute_loss(outputs, replace(rows, reference_T=None), spec(name, kl_coef=0.1))
        with pytest.raises(UserError, match="logprobs"):
            compute_loss(outputs, replace(rows, sampling_logprobs_T=None), spec(name, correction="token_mask"))


def test_the_ratio_needs_either_base() -> None:
    outputs, rows = make_batch(0)
    compute_loss(outputs, replace(rows, sampling_logprobs_T=None), spec("ppo"))
    compute_loss(outputs, replace(rows, old_logprobs_T=None), spec("ppo"))


def test_what_does_not_apply_is_refused() -> None:
    outputs, rows = make_batch(0)
    cases = [
        (spec("pp0"), "no loss called 'pp0'.*cispo"),
        (spec("ppo", params={"clip": 0.1}), "'clip'.*clip_high, clip_low, dual_clip"),
        (spec("reinforce", params={"clip_low": 0.1}), "'clip_low'.*none"),
        (spec("ppo", kl_estimator="k4"), "k1, k1+, k2, k3".replace("+", r"\+")),
        (spec("ppo", correction="tis"), "token_truncate"),
        (spec("value", correction="token_mask"), "policy losses"),
        (spec("cross_entropy", correction="token_mask"), "policy losses"),
        (spec("value", kl_coef=0.1), "kl_coef"),
        (spec("ppo", correction="token_mask", correction_cap=1.0), "correction_cap=1: token_mask"),
        (spec("ppo", correction="token_truncate", correction_cap=0.0), "correction_cap=0: below 1"),
    ]
    for bad, message in cases:
        with pytest.raises(UserError, match=message) as error:
            compute_loss(outputs, rows, bad)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="value head"):
        compute_loss(ForwardOutput(outputs.logprobs_T), rows, spec("value"))
    with pytest.raises(RuntimeError, match="entropy"):
        compute_loss(ForwardOutput(outputs.logprobs_T), rows, spec("ppo", entropy_coef=0.1))


def test_specs_of_the_config() -> None:
    params = {"clip_low": 0.1, "clip_high": 0.28}
    cfg = AlgorithmConfig(
        loss=LossConfig(name="ppo", params=params, correction="token_mask", correction_cap=3.0),
        kl=KLConfig(coef=0.05, estimator="k2"),
    )
    assert make_spec(cfg, 0.7) == LossSpec("ppo", params, 0.7, 0.05, "k2", 0.0, "token_mask", 3.0)
    in_reward = replace(cfg, loss=LossConfig(name="reinforce"), kl=KLConfig(coef=0.05, placement="reward"))
    assert make_spec(in_reward, 1.0) == LossSpec("reinforce", {}, kl_coef=0.0)
    assert set(POLICY) < set(policy_losses())
    for name in policy_losses():
        check_spec(make_spec(replace(cfg, loss=LossConfig(name=name)), 1.0))
    assert make_value_spec(CriticConfig(clip=0.3)) == LossSpec("value", {"clip": 0.3})
    check_spec(make_value_spec(CriticConfig()))


def test_a_plugin_declares_a_loss_and_mistakes_are_named() -> None:
    @Loss("half", needs=("advantages",), params={"scale": Param(0.5, "Times the loss")})
    def half(outputs, rows, *, scale):
        return -scale * rows.advantages_T * outputs.logprobs_T, {}

    try:
        outputs, rows = make_batch(0)
        reinforce = run(outputs, rows, spec("reinforce"))[0]
        torch.testing.assert_close(run(outputs, rows, spec("half"))[0], 0.5 * reinforce)
        torch.testing.assert_close(run(outputs, rows, spec("half", params={"scale": 3.0}))[0], 3 * reinforce)
        for kind in ("policy", "critic"):  # a loss that is not 0 at untrained tokens is made so
            Loss(f"one_{kind}", kind=kind)(lambda out, r: (out.logprobs_T * 0 + 1, {}))
            loss_T = run(outputs, rows, spec(f"one_{kind}"))[0]
            torch.testing.assert_close(loss_T, (rows.weights_T != 0).double())
        with pytest.raises(UserError, match="registered twice"):
            Loss("half")(lambda outputs, rows: None)
        said = ["entropy:mean", "logprob_gap:max", "loss:sum", "reward:mean"]  # names of the loop, of this call or not
        for name, keys in (("says", said), ("bare", ["ratio"])):
            Loss(name)(lambda out, r, keys=tuple(keys): (out.logprobs_T, {key: out.logprobs_T * 0 + 7 for key in keys}))
        metrics = run(outputs, rows, spec("says"))[2]
        assert {f"loss/{key}" for key in said} <= set(metrics) and "reward:mean" not in metrics
        assert not any((value == 7).any() for key, value in metrics.items() if not key.startswith("loss/"))
        with pytest.raises(UserError, match="loss 'bare': metric 'ratio' must end in :mean"):
            run(outputs, rows, spec("bare"))
    finally:
        for name in ("half", "one_policy", "one_critic", "says", "bare"):
            LOSSES._things.pop(name, None)
    with pytest.raises(UserError, match="reward"):
        Loss("other", needs=("reward",))
    with pytest.raises(UserError, match=r"declares the parameters \[\], its function takes \['scale'\]"):
        Loss("other")(lambda outputs, rows, *, scale: None)


def test_float32_stays_float32() -> None:
    outputs, rows = make_batch(0, dtype=torch.float32)
    for name in LOSSES.names():
        correction = "sequence_truncate" if LOSSES.get(name).kind == "policy" else "none"
        loss_T, _, metrics = run(outputs, rows, spec(name, correction=correction))
        assert loss_T.dtype == torch.float32 and {m.dtype for m in metrics.values()} == {torch.float32}
