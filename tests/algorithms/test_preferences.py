"""Losses on preferences and divergences, against autograd of the formulas as they stand in the papers, in float64; and
against TRL where it is installed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from skyrl.algorithms.preferences import Pairs, divergence, kto_losses, pair_losses, reward_losses

RNG = np.random.default_rng(3)
TOKENS = np.array([1.0, 5.0, 9.0, 40.0, 3.0, 7.0])
# alike, far apart either way, one token, hardly possible, nearly certain
CHOSEN = np.array([-2.0, -300.0, -3.0, -90.0, -1e-7, -600.0])
REJECTED = np.array([-2.0, -2.0, -400.0, -80.0, -5.0, -0.5])
REFERENCES = RNG.normal(-20, 10, (2, 6))
PAIRS = Pairs(CHOSEN, REJECTED, *REFERENCES, TOKENS, TOKENS[::-1].copy())


def expected(name, chosen, rejected, beta, smoothing, gamma):
    """The loss of each pair in torch, of sums of log-probabilities that have a gradient."""
    c_ref, r_ref, c_n, r_n = map(torch.as_tensor, (*REFERENCES, PAIRS.chosen_tokens, PAIRS.rejected_tokens))
    if name == "dpo":
        h = (chosen - c_ref) - (rejected - r_ref)
        return -(1 - smoothing) * F.logsigmoid(beta * h) - smoothing * F.logsigmoid(-beta * h)
    if name == "ipo":
        return ((chosen - c_ref) / c_n - (rejected - r_ref) / r_n - 1 / (2 * beta)) ** 2
    chosen, rejected = chosen / c_n, rejected / r_n
    if name == "simpo":
        m = beta * (chosen - rejected) - gamma
        return -(1 - smoothing) * F.logsigmoid(m) - smoothing * F.logsigmoid(-m)
    odds = [x - torch.log(-torch.expm1(x)) for x in (chosen, rejected)]  # log p / (1 - p)
    return -chosen - beta * F.logsigmoid(odds[0] - odds[1])


@pytest.mark.parametrize("beta", [0.1, 2.5])
@pytest.mark.parametrize(("name", "smoothing"), [("dpo", 0), ("dpo", 0.2), ("ipo", 0), ("simpo", 0.1), ("orpo", 0)])
def test_a_pairs_loss_and_its_derivatives(name, smoothing, beta):
    with_reference = name in ("dpo", "ipo")
    pairs = PAIRS if with_reference else Pairs(CHOSEN, REJECTED, *np.zeros((2, 6)), *(TOKENS, TOKENS[::-1].copy()))
    ours = pair_losses(name, pairs, beta=beta, label_smoothing=smoothing, gamma=0.5)
    given = [torch.tensor(x, requires_grad=True) for x in (CHOSEN, REJECTED)]
    loss = expected(name, *given, beta, smoothing, 0.5)
    loss.sum().backward()
    losses, slopes, _ = ours
    np.testing.assert_allclose(losses, loss.detach(), rtol=1e-10, atol=1e-12)
    for found, x in zip(slopes.T, given, strict=True):
        np.testing.assert_allclose(found, x.grad, rtol=1e-10, atol=1e-12)


def test_kto():
    ratios, liked, kl = np.array([0.3, -2.0, 500.0, -700.0, 0.0]), np.array([True, False, True, True, False]), 0.2
    ours, slopes = kto_losses(ratios, liked, kl, beta=0.5, weights=(1.5, 0.7))
    x = torch.tensor(ratios, requires_grad=True)
    # 1 - sigmoid(z) is sigmoid(-z), which has all its digits where the first has none
    loss = torch.where(torch.tensor(liked), 1.5 * torch.sigmoid(0.5 * (kl - x)), 0.7 * torch.sigmoid(0.5 * (x - kl)))
    loss.sum().backward()
    np.testing.assert_allclose(ours, loss.detach(), rtol=1e-10)
    np.testing.assert_allclose(slopes, x.grad, rtol=1e-10, atol=1e-20)  # torch's own derivative is s (1 - s)
    assert slopes[2] == pytest.approx(-0.75 * np.exp(-0.5 * 499.8), rel=1e-10)


def test_rewards():
    chosen, rejected, margin = RNG.normal(0, 20, (3, 8))
    ours, slopes = reward_losses(np.stack([chosen, rejected], 1), margin=margin, center_coef=0.03)
    c, r = (torch.tensor(x, requires_grad=True) for x in (chosen, rejected))
    loss = -F.logsigmoid(c - r - torch.tensor(margin)) + 0.03 * (c + r) ** 2
    loss.sum().backward()
    np.testing.assert_allclose(ours, loss.detach(), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(slopes.T, np.stack([c.grad, r.grad]), rtol=1e-10, atol=1e-12)


def divergence_of(p, q, beta):
    """Of log-probabilities [L, K], in torch."""
    kl = lambda a, b: (a.exp() * (a - b)).sum(1)  # noqa: E731
    if beta in (0.0, 1.0):
        return kl(p, q) if beta else kl(q, p)
    m = torch.log(beta * q.exp() + (1 - beta) * p.exp())
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("top_k", [1, 3, 11])
def test_a_divergence_and_the_gradient_of_the_logits(beta, top_k):
    """The reference is the divergence of the distributions over the likeliest tokens and all others together."""
    logits = torch.tensor(RNG.normal(0, 2, (5, 11)), requires_grad=True)
    teacher = torch.log_softmax(torch.tensor(RNG.normal(0, 2, (5, 11))), 1)
    student = torch.log_softmax(logits, 1)
    ids = teacher.topk(top_k).indices
    kept = [x.gather(1, ids) for x in (student, teacher)]
    value, weights = divergence(kept[0].detach().numpy(), kept[1].numpy(), beta, whole=top_k == 11)
    rest = [torch.log1p(-x.exp().sum(1, keepdim=True)) for x in kept]
    both = kept if top_k == 11 else [torch.cat(one, 1) for one in zip(kept, rest, strict=True)]
    wanted = divergence_of(*both, beta)
    (gradient,) = torch.autograd.grad(wanted.sum(), logits, retain_graph=True)
    np.testing.assert_allclose(value, wanted.detach(), rtol=1e-10, atol=1e-12)
    (found,) = torch.autograd.grad((torch.tensor(weights) * kept[0]).sum(), logits)
    np.testing.assert_allclose(found, gradient, rtol=1e-10, atol=1e-12)


def test_a_part_of_the_vocabulary_never_says_more_than_all_of_it():
    student, teacher = (torch.log_softmax(torch.tensor(RNG.normal(0, 3, (50, 20))), 1).numpy() for _ in range(2))
    order = np.argsort(-teacher, 1)
    values = []
    for k in (1, 2, 5, 19, 20):
        part = [np.take_along_axis(x, order[:, :k], 1) for x in (student, teacher)]
        values.append(divergence(*part, 0.5, whole=k == 20)[0])
    assert all((fewer <= more + 1e-9).all() for fewer, more in zip(values, values[1:], strict=False))
    assert (values[0] > 0).all() and np.abs(divergence(teacher, teacher, 1.0, whole=True)[0]).max() < 1e-12


def test_the_same_as_trl():
    """With TRL 0.24, whose losses are functions of log-probabilities; it is not among the extras."""
    pytest.importorskip("trl.trainer.orpo_trainer", reason="TRL 0.24 is not installed", exc_type=ImportError)
    from trl.trainer.cpo_trainer import CPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.gkd_trainer import GKDTrainer
    from trl.trainer.kto_trainer import KTOTrainer
    from trl.trainer.orpo_trainer import ORPOTrainer

    policy = [torch.tensor(x) for x in (CHOSEN, REJECTED)]
    means = [torch.tensor(x) for x in (CHOSEN / PAIRS.chosen_tokens, REJECTED / PAIRS.rejected_tokens)]
    references = [torch.tensor(x) for x in REFERENCES]
    of_means = [torch.tensor(x) for x in (REFERENCES[0] / PAIRS.chosen_tokens, REFERENCES[1] / PAIRS.rejected_tokens)]
    free = Pairs(CHOSEN, REJECTED, *np.zeros((2, 6)), PAIRS.chosen_tokens, PAIRS.rejected_tokens)
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)
    me = SimpleNamespace(
        beta=0.3, label_smoothing=0.1, simpo_gamma=0.5, reference_free=False, f_divergence_type="reverse_kl",
        f_divergence_params=None, accelerator=accelerator, use_weighting=False, calculate_KL=True,
        desirable_weight=1.5, undesirable_weight=0.7, loss_type="kto", alpha=0.0, cpo_alpha=0.0,
    )  # fmt: skip
    for name, theirs, given in (
        ("dpo", DPOTrainer.dpo_loss(me, *policy, *references, loss_type="sigmoid"), PAIRS),
        ("ipo", DPOTrainer.dpo_loss(me, *means, *of_means, loss_type="ipo"), PAIRS),
    ):
        ours = pair_losses(name, given, beta=0.3, label_smoothing=0.1)
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(ours[2].T, np.stack(theirs[1:3]), rtol=1e-10)
    me.loss_type = "simpo"
    theirs = CPOTrainer.cpo_loss(me, *means)
    ours = pair_losses("simpo", free, beta=0.3, label_smoothing=0.1, gamma=0.5)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-10)
    odds = ORPOTrainer.odds_ratio_loss(me, *means)[0]
    np.testing.assert_allclose(pair_losses("orpo", free, beta=0.3)[0], -means[0] - odds, rtol=1e-6)
    me.loss_type = "kto"
    theirs = KTOTrainer.kto_loss(me, policy[0], policy[1], torch.tensor([1.0, 2.0]), *references, torch.zeros(2))
    liked, ratios = np.repeat([True, False], 6), np.concatenate([CHOSEN - REFERENCES[0], REJECTED - REFERENCES[1]])
    ours, _ = kto_losses(ratios, liked, 1.5, beta=0.3, weights=(1.5, 0.7))
    np.testing.assert_allclose(ours, theirs[0], rtol=1e-10, atol=1e-14)
    student, teacher = (torch.tensor(RNG.normal(0, 2, (1, 4, 7))) for _ in range(2))
    for beta in (0, 0.4, 1):
        wanted = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="none").sum(-1)[0]
        given = [torch.log_softmax(x, -1)[0].numpy() for x in (student, teacher)]
        np.testing.assert_allclose(divergence(*given, float(beta), whole=True)[0], wanted, rtol=1e-10)
