"""What the loop does for single pieces: values beyond a cut, tokens of the whole step, weights that are normalised, and
that every recipe runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
from loop import run_loop
from small import make_engine, small_config

from skyrl.model import ModelSpec
from skyrl.rollout import Row
from skyrl.trainers.experience import _values as critic_values
from skyrl.trainers.experience import apply_reduction, correction_scale, select_tokens
from skyrl.types import Datum

RECIPES = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "algorithm").glob("*.yaml"))


def make_rows(seed: int = 0, count: int = 6) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        n = int(rng.integers(3, 9))
        mask = rng.random(n) < 0.7
        mask[-1] = True
        sampled = -rng.random(n)
        rows.append(
            Row(
                f"row{i}", rng.integers(0, 50, n), rng.integers(0, 50, n), mask, np.zeros(n), sampled, i // 2, i,
                "length" if i % 2 else "stop", True, advantages=rng.normal(size=n), trained=mask,
                old_logprobs=sampled + 0.5 * rng.normal(size=n),
            )
        )  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def engine():
    return make_engine()


def run_of(engine, *overrides: str):
    return SimpleNamespace(
        cfg=small_config("algorithm.loss.reduction=token_mean", *overrides), world=engine.world, engine=engine
    )


STEP = SimpleNamespace(number=3)


@pytest.mark.parametrize("rejected", ["counted", "dropped"])
def test_a_fifth_of_the_tokens_by_entropy(engine, rejected: str) -> None:
    run = run_of(engine, "algorithm.loss.top_entropy=0.2", f"algorithm.loss.rejected={rejected}")
    rows = make_rows()
    entropies = engine.score([row.datum(np.ones(len(row.mask))) for row in rows], 1.0, entropy=True).logprobs
    everyone = np.concatenate([h[row.mask] for h, row in zip(entropies, rows, strict=True)])
    assert everyone.min() > 0 and np.ptp(everyone) > 0
    threshold = np.quantile(everyone.astype(np.float64), 0.8)
    got = select_tokens(run, STEP, list(rows), 0)
    kept = 0
    for before, after, entropy in zip(rows, got, entropies, strict=True):
        want = before.mask & (entropy >= threshold)
        kept += int(want.sum())
        if rejected == "dropped":
            assert (after.trained == want).all() and (after.advantages == before.advantages).all()
        else:
            assert (after.trained == before.mask).all()
            assert (after.advantages == np.where(want, before.advantages, 0.0)).all()
    assert 0.1 < kept / len(everyone) < 0.35


@pytest.mark.parametrize("name", ["token_mask", "sequence_mask"])
def test_rejected_tokens_leave_the_denominator(engine, name: str) -> None:
    options = [f"algorithm.loss.correction={name}", "algorithm.loss.correction_cap=1.5"]
    options += ["algorithm.loss.recompute_old_logprobs=true", "algorithm.loss.rejected=dropped"]
    run, rows = run_of(engine, *options), make_rows(1)
    got = apply_reduction(run, select_tokens(run, STEP, list(rows), 0))
    flat = {
        "weights": np.concatenate([row.mask for row in rows]).tolist(),
        "row": [i for i, row in enumerate(rows) for _ in row.mask],
        "old": np.concatenate([row.old_logprobs for row in rows]).tolist(),
        "behaviour": np.concatenate([row.sampling_logprobs for row in rows]).tolist(),
        "advantages": np.concatenate([row.advantages for row in rows]).tolist(),
    }
    want = np.array(reference.correction(name, flat, 1.5, 0.0)) > 0
    assert 0 < want.sum() < sum(flat["weights"])
    np.testing.assert_allclose(np.concatenate([d.weights for d in got]), want / want.sum(), rtol=1e-12)


def test_normalised_weights_have_a_mean_of_1(engine) -> None:
    options = ["algorithm.loss.correction=token_truncate", "algorithm.loss.correction_cap=1.3"]
    options += ["algorithm.loss.recompute_old_logprobs=true", "algorithm.loss.correction_normalise=true"]
    run, rows = run_of(engine, *options), make_rows(2)
    data = apply_reduction(run, rows)
    weight = [np.minimum(np.exp(row.old_logprobs - row.sampling_logprobs), 1.3) for row in rows]
    mean = np.concatenate([w[row.mask] for w, row in zip(weight, rows, strict=True)]).mean()
    assert abs(mean - 1) > 0.01
    assert correction_scale(run, data) == pytest.approx(1 / mean, rel=1e-12)
    assert correction_scale(run_of(engine), data) == 1.0


def test_values_beyond_a_cut(engine) -> None:
    engine.create("critic", ModelSpec(head="value"))
    rows = make_rows(3)
    values, beyond = critic_values(run_of(engine), rows, bootstrap=True)
    for row, value, last in zip(rows, values, beyond, strict=True):
        tokens = np.append(row.tokens, row.targets[-1])
        whole = engine.score([Datum(tokens, tokens, np.ones(len(tokens)))], 1.0, model="critic").values[0]
        np.testing.assert_allclose(value, whole[:-1], rtol=1e-5, atol=1e-6)
        assert last == (pytest.approx(whole[-1], rel=1e-5, abs=1e-6) if row.stop == "length" else 0.0)
    assert (critic_values(run_of(engine), rows, bootstrap=False)[1] == 0).all()


@pytest.mark.slow
def test_recipes_that_ask_for_more_run_and_learn(tmp_path) -> None:
    """Two updates a batch of kl_cov and of icepop, and a critic with truncated weights and values beyond the cut."""
    for name, *more in (
        (
            "kl_cov",
            "batch.optim_steps_per_batch=2",
            "algorithm.loss.params.fraction=0.1",
            "algorithm.loss.top_entropy=0.5",
        ),
        (
            "icepop",
            "batch.epochs_per_batch=2",
            "algorithm.loss.correction_normalise=true",
            "algorithm.loss.rejected=dropped",
        ),
        ("vtrace", "algorithm.advantage.params.bootstrap=1"),
    ):
        seen = run_loop(tmp_path / name, f"algorithm={name}", *more)
        assert len(seen.rl) == 2 and all(record["grad_norm:mean"] > 0 for record in seen.rl)
        rows = [row for update in seen.updates() for row in update.values()]
        if name == "kl_cov":
            share = sum(int(row.selected.sum()) for row in rows) / sum(int((row.weights != 0).sum()) for row in rows)
            assert 0.05 < share < 0.2
            assert 0.3 < np.mean([(row.advantages[row.weights != 0] == 0).mean() for row in rows]) < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs(tmp_path, name: str) -> None:
    more = ["algorithm.advantage.params.k=2"] if name == "pass_at_k" else []
    more += ["algorithm.filters.overlong=keep"] if name == "dapo" else []  # all answers are cut here
    more += ["algorithm.critic.warmup_steps=0"] if name == "vapo" else []
    seen = run_loop(tmp_path, f"algorithm={name}", *more, turns=2 if name == "mt_grpo" else 1)
    assert len(seen.rl) == 2 and all(np.isfinite(record["loss:sum"]) for record in seen.rl)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("name", ["clip_cov", "kl_cov", "high_entropy", "lite_ppo", "vapo"])
def test_two_ranks_learn_from_the_same_tokens_as_one(tmp_path, name: str) -> None:
    options = [f"algorithm={name}", "batch.num_steps=1", "algorithm.filters.refill=false", "model.dtype=float64"]
    if name.endswith("cov"):
        options.append("algorithm.loss.params.fraction=0.1")
    if name == "vapo":
        options.append("algorithm.critic.warmup_steps=0")
    if name == "clip_cov":
        options.append("algorithm.loss.params.cov_low=0.0")
    one, two = (run_loop(tmp_path / str(size), *options, size=size).updates() for size in (1, 2))
    assert len(one) == len(two) == 1 and one[0].keys() == two[0].keys()
    for key, row in one[0].items():
        other = two[0][key]
        np.testing.assert_allclose(row.advantages, other.advantages, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(row.weights, other.weights, rtol=1e-12)
        assert (row.selected is None) == (other.selected is None)
        if row.selected is not None:
            np.testing.assert_array_equal(row.selected, other.selected)
