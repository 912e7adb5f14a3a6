"""What single rows bring to a loss: their own clip bounds, a mask for GSPO's mean, several targets per position."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from skyrl.algorithms.losses import LOSSES, compute_loss
from skyrl.models.packed import collate
from skyrl.types import Datum, ForwardOutput, LossSpec, UserError


def make_batch(seed, lengths=(4, 1, 6)):
    """Outputs and rows with ratios on both sides of the clips; about a third of the tokens is not trained."""
    rng = np.random.default_rng(seed)
    logprobs = -np.abs(rng.normal(size=sum(lengths))) - 0.1
    rows, start = [], 0
    for n in lengths:
        near = [logprobs[start : start + n] + 0.4 * rng.normal(size=n) for _ in range(3)]
        rows.append(
            Datum(
                np.zeros(n, int),
                np.zeros(n, int),
                rng.random(n) * (rng.random(n) < 0.7),
                sampling_logprobs=near[0],
                old_logprobs=near[1],
                reference=near[2],
                advantages=rng.normal(size=n),
            )
        )
        start += n
    return ForwardOutput(torch.from_numpy(logprobs).requires_grad_()), collate(rows, torch.float64, "cpu")


def run(outputs, rows, spec):
    """The loss of each token and the gradient of its weighted sum by the log-probabilities."""
    outputs.logprobs_T.grad = None
    loss_T, _ = compute_loss(outputs, rows, spec)
    (loss_T * rows.weights_T).sum().backward()
    return loss_T.detach(), outputs.logprobs_T.grad


@pytest.mark.parametrize("name", ["ppo", "cispo", "gspo"])
def test_bounds_of_the_rows_win_and_equal_the_parameters(name):
    outputs, rows = make_batch(1)
    tight, wide = {"clip_low": 0.1, "clip_high": 0.05}, {"clip_low": 0.5, "clip_high": 1.0}
    want, odd = (run(outputs, rows, LossSpec(name, p)) for p in (tight, wide))
    assert not torch.equal(want[0], odd[0])
    full = {f"{k}_T": torch.full_like(rows.weights_T, v) for k, v in tight.items()}
    got = run(outputs, replace(rows, **full), LossSpec(name, wide))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    # one row tight, the others wide; anything where nothing is trained
    mixed = {}
    for key, value in wide.items():
        one = torch.full_like(rows.weights_T, value)
        one[rows.row_T == 2] = tight[key]
        one[rows.weights_T == 0] = float("nan")
        mixed[f"{key}_T"] = one
    got = run(outputs, replace(rows, **mixed), LossSpec(name))
    assert torch.equal(got[0], torch.where(rows.row_T == 2, want[0], odd[0]))
    assert torch.equal(got[1], torch.where(rows.row_T == 2, want[1], odd[1]))


def test_rows_without_bounds_beside_rows_with_them_have_those_of_the_parameters():
    def row(n, **more):
        return Datum(np.arange(n), np.arange(n), np.array([0.0] + [1.0] * (n - 1)), **more)

    rows = [row(3, clip_low=np.full(3, 0.1), ratio_mask=np.array([1.0, 0.0, 1.0])), row(2)]
    mb = collate(rows, torch.float64, "cpu", fill={"clip_low": 0.3, "clip_high": 0.4, "beta": 1.0})
    assert mb.clip_low_T.tolist() == [0.1, 0.1, 0.1, 0.3, 0.3] and mb.clip_high_T is None
    assert mb.ratio_mask_T.tolist() == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert collate(rows[1:], torch.float64, "cpu").clip_low_T is None


@pytest.mark.parametrize("has_old", [False, True])
def test_gspo_takes_its_mean_over_the_mask(has_old):
    """Against a loop over rows; the mask leaves trained tokens out and has untrained ones in."""
    outputs, rows = make_batch(3)
    mask = (torch.arange(len(rows.weights_T)) % 3 != 1).double()
    trained = rows.weights_T != 0
    assert (mask.bool() & ~trained).any() and (~mask.bool() & trained).any()
    rows = replace(rows, ratio_mask_T=mask, old_logprobs_T=rows.old_logprobs_T if has_old else None)
    loss, grads = run(outputs, rows, LossSpec("gspo", {"clip_low": 0.05, "clip_high": 0.05}))
    base = rows.old_logprobs_T if has_old else rows.sampling_logprobs_T
    for row in range(3):
        inside = [t for t in range(len(mask)) if rows.row_T[t] == row and mask[t]]
        mean = sum(float(outputs.logprobs_T.detach()[t] - base[t]) for t in inside) / max(1, len(inside))
        ratio = float(np.exp(mean))
        for t in range(len(mask)):
            if rows.row_T[t] != row:
                continue
            a = float(rows.advantages_T[t])
            want = -min(ratio * a, min(max(ratio, 0.95), 1.05) * a) if trained[t] else 0.0
            clipped = a > 0 and ratio > 1.05 or a < 0 and ratio < 0.95
            slope = 0.0 if clipped or not trained[t] else -ratio * a * float(rows.weights_T[t])
            assert float(loss[t]) == pytest.approx(want, rel=1e-12)
            assert float(grads[t]) == pytest.approx(slope, rel=1e-12)


def test_a_mask_poisons_nothing_it_does_not_count():
    outputs, rows = make_batch(3, (6, 2, 9))
    mask = (torch.arange(len(rows.weights_T)) % 3 != 1).double()
    clean = run(outputs, replace(rows, ratio_mask_T=mask), LossSpec("gspo", kl_coef=0.1))
    out = (rows.weights_T == 0) & (mask == 0)
    inside = (rows.weights_T == 0) & (mask != 0)
    assert out.any() and inside.any()
    nan = float("nan")
    fields = {
        k: torch.where(out, nan, getattr(rows, k)) for k in ("sampling_logprobs_T", "old_logprobs_T", "advantages_T")
    }
    fields["reference_T"] = torch.where(out | inside, nan, rows.reference_T)  # never read where nothing is trained
    got = run(outputs, replace(rows, ratio_mask_T=mask, **fields), LossSpec("gspo", kl_coef=0.1))
    assert torch.equal(got[0], clean[0]) and torch.equal(got[1], clean[1])
    # losses that do not read the mask are deaf to it, also where it holds NaN
    poisoned = replace(rows, ratio_mask_T=torch.full_like(mask, nan), sampling_logprobs_T=fields["sampling_logprobs_T"])
    a, b = (run(outputs, r, LossSpec("ppo")) for r in (rows, poisoned))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def many(dtype=torch.float64):
    rng = np.random.default_rng(0)
    rows = [
        Datum(rng.integers(0, 9, 4), rng.integers(0, 9, (4, 3)), rng.normal(size=(4, 3)), name="a"),
        Datum(rng.integers(0, 9, 2), rng.integers(0, 9, 2), np.array([0.0, -2.0]), name="b"),
        Datum(rng.integers(0, 9, 3), rng.integers(0, 9, (3, 2)), rng.normal(size=(3, 2)), name="c"),
    ]
    rows[0].weights[1] = 0.0
    return rows, collate(rows, dtype, "cpu")


def test_rows_with_fewer_targets_are_padded_with_weight_0():
    rows, mb = many()
    assert mb.targets_T.shape == mb.weights_T.shape == (9, 3)
    assert (mb.weights_T[4:6, 1:] == 0).all() and (mb.weights_T[6:, 2] == 0).all()
    assert mb.targets_T[4:6, 0].tolist() == rows[1].targets.tolist()
    assert mb.weights_T[6:, :2].tolist() == rows[2].weights.tolist()


def test_cross_entropy_with_many_targets_is_the_sum_over_all():
    rows, mb = many()
    logprobs = torch.randn(9, 3, dtype=torch.float64).requires_grad_()
    with torch.no_grad():
        logprobs[1] = float("nan")  # untrained
    loss, metrics = compute_loss(ForwardOutput(logprobs), mb, LossSpec("cross_entropy"))
    total = (loss * mb.weights_T).sum()
    total.backward()
    used = mb.weights_T != 0
    assert float(total) == pytest.approx(-float((mb.weights_T * logprobs)[used].sum()), rel=1e-14)
    assert torch.equal(logprobs.grad, torch.where(used, -mb.weights_T, 0.0))
    assert metrics["nll:mean"].shape == (9, 3)


@pytest.mark.parametrize("name", sorted(set(LOSSES.names()) - {"cross_entropy"}))
def test_other_losses_refuse_many_targets(name):
    _, mb = many()
    outputs = ForwardOutput(torch.zeros(9, 3, dtype=torch.float64), None, torch.zeros(9, dtype=torch.float64))
    with pytest.raises(UserError, match=rf"loss {name}: the rows have targets \[L, 3\].*cross_entropy"):
        compute_loss(outputs, mb, LossSpec(name))
    with pytest.raises(UserError, match="cross_entropy with kl_coef"):
        compute_loss(outputs, mb, LossSpec("cross_entropy", kl_coef=0.1))


def test_shapes_of_a_row_are_checked():
    with pytest.raises(UserError, match=r"row x: targets have shape \[2, 3\] and weights \[2\]"):
        Datum(np.zeros(2, int), np.zeros((2, 3), int), np.zeros(2), name="x")
    with pytest.raises(UserError, match="row x: clip_low has 1 entries, tokens has 2"):
        Datum(np.zeros(2, int), np.zeros(2, int), np.zeros(2), name="x", clip_low=np.zeros(1))
