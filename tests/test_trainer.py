"""The loop: what reaches the engine and what is logged, recomputed by other means. Survival: tests/system."""

import math
from pathlib import Path

import numpy as np
import pytest
from gloo import run_ranks
from loop import loop_config, run_loop, train_here

from benchmarks.recompute_metrics import recompute_metrics
from skyrl.checkpoint.folder import read_checkpoint
from skyrl.config import validation
from skyrl.config.load import load_config
from skyrl.run import Run
from skyrl.run_dir import read_metrics, read_rollouts
from skyrl.tracking.base import without_wall_clock
from skyrl.types import UserError

PARTS = [  # advantage, loss, reduction, correction, further options
    ("grpo", "ppo", "token_mean", "none"),
    ("dr_grpo", "importance_sampling", "constant", "token_truncate"),
    ("rloo", "reinforce", "prompt_mean", "token_mask"),
    ("reinforce++", "cispo", "sequence_mean", "sequence_truncate"),
    ("gae", "gspo", "token_mean", "none"),
    ("grpo", "dro", "sequence_mean", "none"),
    ("grpo", "dppo_kl", "prompt_sequence_mean", "geometric_truncate"),
    ("rloo", "ppo", "token_mean", "geometric_mask"),
    ("dr_grpo", "ppo", "token_mean", "sequence_mask"),
]


def names_of(update):
    """{uid: sorted sample indices} of the rows of one update."""
    out = {}
    for name in update:
        uid, index, _ = name.rsplit("/", 2)
        out.setdefault(uid, []).append(int(index))
    return {uid: sorted(found) for uid, found in out.items()}


def finite(records):
    values = [(k, v) for r in records for k, v in r.items() if isinstance(v, float)]
    return all(math.isfinite(v) for _, v in values)


# ---- every part


@pytest.mark.parametrize("advantage, loss, reduction, correction", PARTS)
def test_every_registered_part_makes_a_real_step(advantage, loss, reduction, correction, tmp_path):
    seen = run_loop(
        tmp_path / "run",
        f"algorithm.advantage.name={advantage}",
        f"algorithm.loss.name={loss}",
        f"algorithm.loss.reduction={reduction}",
        f"algorithm.loss.correction={correction}",
        "batch.num_steps=1",
    )
    (record,) = seen.rl
    assert finite(seen.records) and record["grad_norm:mean"] > 0
    (call,) = [c for c in seen.ranks[0] if c.model == "policy"]
    assert call.spec.name == loss and call.spec.correction == correction
    assert ("correction:mean" in record) == (correction != "none")
    assert record["logprob_gap:max"] < 1e-5
    assert len(call.rows) == 16 and any(row.advantages.any() for row in call.rows)
    assert ("critic/value_error:mean" in record) == (advantage == "gae")


def test_every_name_is_in_the_list_above_or_in_a_recipe():
    """Each recipe runs in tests/algorithms/test_in_the_loop.py."""
    columns = [set(column) for column in zip(*PARTS, strict=True)]
    for path in (Path(__file__).parents[1] / "conf" / "algorithm").glob("*.yaml"):
        part = load_config([f"algorithm={path.stem}"]).algorithm
        names = (part.advantage.name, part.loss.name, part.loss.reduction, part.loss.correction)
        for column, name in zip(columns, names, strict=True):
            column.add(name)
    assert columns == [
        set(validation.REGISTERED["algorithm.advantage.name"]()),
        set(validation.REGISTERED["algorithm.loss.name"]()),
        set(validation.REGISTERED["algorithm.loss.reduction"]()),
        set(validation.REGISTERED["algorithm.loss.correction"]()),
    ]


# ---- the batch


REFILL = [
    "algorithm.filters.zero_variance=true",
    "algorithm.filters.refill=true",
    "batch.optim_steps_per_batch=2",
    "batch.samples_per_prompt=3",
    "batch.num_steps=3",
]


@pytest.mark.ranks
def test_refill_and_minibatches_do_not_depend_on_the_number_of_ranks(tmp_path):
    runs = [run_loop(tmp_path / str(size), *REFILL, size=size, env={"levels": 2}) for size in (1, 2, 3)]
    alone = runs[0]
    drawn = [record["filters/groups:sum"] for record in alone.rl]
    assert max(drawn) > 4, "no step was refilled: the test shows less than it says"
    assert len(alone.updates()) == 6
    seen = []
    for update in alone.updates():
        groups = names_of(update)
        assert len(groups) == 2 and all(found == [0, 1, 2] for found in groups.values()), "a group was split"
        assert sum(row.weights.sum() for row in update.values()) == pytest.approx(1.0, rel=1e-12)
        seen += groups
        for uid in groups:
            rows = [row for name, row in update.items() if name.startswith(f"{uid}/")]
            advantages = {float(row.advantages[row.weights != 0][0]) for row in rows}
            assert len(advantages) > 1, "a group without variance was kept"
    assert len(set(seen)) == len(seen) == 12
    for other in runs[1:]:
        assert len(other.updates()) == 6
        for ours, theirs in zip(alone.updates(), other.updates(), strict=True):
            assert ours.keys() == theirs.keys()
            for name, row in ours.items():
                for field in ("tokens", "targets", "advantages"):
                    np.testing.assert_array_equal(getattr(row, field), getattr(theirs[name], field))
                np.testing.assert_allclose(row.weights, theirs[name].weights, rtol=1e-12)
                np.testing.assert_allclose(row.sampling_logprobs, theirs[name].sampling_logprobs, atol=1e-5)
        for ours, theirs in zip(alone.records, other.records, strict=True):
            assert without_wall_clock(ours).keys() == without_wall_clock(theirs).keys()
            for key in ("reward:mean", "length:mean", "filters/groups:sum", "trained_tokens:sum", "sampled_tokens:sum"):
                assert ours.get(key) == theirs.get(key), key
            for key in {"loss:sum", "grad_norm:mean", "entropy:mean"} & ours.keys():
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2])
def test_a_batch_without_variance_is_no_step(size, tmp_path):
    more = [f"algorithm.filters.{option}" for option in ("zero_variance=true", "refill=true", "max_refill_rounds=2")]
    seen = run_loop(tmp_path / "run", *more, size=size, env={"levels": 1})
    assert [record["filters/groups:sum"] for record in seen.rl] == [8.0, 8.0]
    assert [record["filters/zero_variance_groups:sum"] for record in seen.rl] == [8.0, 8.0]
    assert not any("grad_norm:mean" in record for record in seen.rl)
    assert all(calls == [] for calls in seen.ranks)
    for record in seen.rl:  # what was dropped is still there to be looked at
        found = recompute_metrics(list(read_rollouts(tmp_path / "run" / "rollouts", f"{record['step']:06d}")))
        assert found["episodes:sum"] == 32 and {key: record[key] for key in found} == pytest.approx(found, rel=1e-12)


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("advantage", ["grpo", "gae"])
def test_an_update_without_rows_is_skipped_and_counted(advantage, size, tmp_path):
    """Fewer groups are left than updates: momentum and decay alone must not move the weights."""
    more = ["batch.optim_steps_per_batch=4", "batch.samples_per_prompt=2", "batch.epochs_per_batch=2"]
    more += ["algorithm.filters.zero_variance=true", "optim.weight_decay=0.1", f"algorithm.advantage.name={advantage}"]
    if advantage == "gae":
        more += ["algorithm.critic.warmup_steps=1", "batch.num_steps=3"]
    seen = run_loop(tmp_path / "run", *more, size=size, env={"levels": 2})
    learned = 0
    for record in seen.rl:
        left = int(record["filters/groups:sum"] - record["filters/zero_variance_groups:sum"])
        assert record.get("skipped_updates:sum", 0.0) == 2.0 * (4 - left)
        assert ("lr:mean" in record or "critic/lr:mean" in record) == (left > 0)
        learned += 2 * left
    assert 0 < learned < 8 * len(seen.rl), "nothing was skipped: the test shows less than it says"
    model = "policy" if advantage == "grpo" else "critic"
    assert len(seen.updates(model)) == learned and all(seen.updates(model))


def test_an_update_whose_every_token_is_masked_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "_stop_without_verifiers", lambda run: None)  # as if they had worked before
    more = ["env.on_error=mask", "optim.weight_decay=0.1", "batch.num_steps=1"]
    seen = run_loop(tmp_path / "run", *more, env={"broken": 1})
    (record,) = seen.rl
    assert record["invalid:sum"] == record["episodes:sum"] == 16
    assert record["skipped_updates:sum"] == 1.0 and "lr:mean" not in record
    assert seen.updates() == []


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "prompt_mean", "constant"])
def test_weights_sum_to_what_the_reduction_says(reduction, tmp_path):
    more = [f"algorithm.loss.reduction={reduction}", "algorithm.filters.overlong=mask", "batch.optim_steps_per_batch=2"]
    seen = run_loop(tmp_path / "run", *more, "sampler.max_new_tokens=30")
    cut = {
        f"{e['uid']}/{e['index']}/0"
        for step in (1, 2)
        for e in read_rollouts(tmp_path / "run" / "rollouts", f"{step:06d}")
        if e["stop"] == "length"
    }
    assert cut
    for update in seen.updates():
        assert all((row.weights != 0).any() == (name not in cut) for name, row in update.items())
        total = sum(row.weights.sum() for row in update.values())
        tokens = sum(int((row.weights != 0).sum()) for row in update.values())
        want = tokens / (len(update) * 30) if reduction == "constant" else 1.0
        assert total == pytest.approx(want, rel=1e-12)


def test_a_second_epoch_sees_the_same_rows_under_a_moved_policy(tmp_path):
    seen = run_loop(tmp_path / "run", "batch.epochs_per_batch=2", "optim.lr=1e-2")
    calls = seen.ranks[0]
    assert len(calls) == 4
    for first, second, record in zip(calls[::2], calls[1::2], seen.rl, strict=True):
        assert [row.name for row in first.rows] == [row.name for row in second.rows]
        for a, b in zip(first.rows, second.rows, strict=True):
            np.testing.assert_array_equal(a.sampling_logprobs, b.sampling_logprobs)
            np.testing.assert_array_equal(a.weights, b.weights)
        assert first.metrics["logprob_gap:max"] < 1e-5 < 1e-3 < second.metrics["logprob_gap:max"]
        assert record["logprob_gap:max"] == first.metrics["logprob_gap:max"]
        assert record["ratio:max"] == max(first.metrics["ratio:max"], second.metrics["ratio:max"]) > 1.01


# ---- the best


@pytest.mark.parametrize("metric, mode", [("eval/reward:mean", "max"), ("eval/length:mean", "min")])
def test_the_best_evaluated_step_is_saved_and_stays(metric, mode, tmp_path):
    """Evaluations at 2, 4, 6 and 7, a checkpoint at 5 and at the end of each of two starts: 3 and 7."""
    more = ["eval.every_steps=2", "checkpoint.every_steps=5", "checkpoint.keep_last=1", "optim.lr=1e-2"]
    more += [f"checkpoint.best_metric={metric}", f"checkpoint.best_mode={mode}"]
    folder = tmp_path / "run" / "checkpoints"
    for steps in (3, 7):
        seen = run_loop(tmp_path / "run", *more, f"batch.num_steps={steps}")
        found = {record["step"]: record[metric] for record in seen.rl if metric in record}
        sign = 1 if mode == "max" else -1
        best = max(found, key=lambda step: (sign * found[step], -step))
        assert len(found) > 1 and {path.name for path in folder.iterdir()} == {f"{best:06d}", f"{steps:06d}"}
        assert read_checkpoint(folder / f"{best:06d}").score == found[best]


def test_a_metric_that_evaluations_do_not_have_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match="checkpoint.best_metric=eval/luck:mean: .* it has: .*eval/accuracy:mean"):
        run_loop(tmp_path / "run", "eval.every_steps=1", "checkpoint.best_metric=eval/luck:mean")


# ---- metrics


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2])
def test_what_is_logged_can_be_recomputed_from_the_rollouts(size, tmp_path):
    more = ["env.on_error=mask", "eval.every_steps=1", "algorithm.loss.reduction=token_mean"]
    seen = run_loop(tmp_path / "run", *more, size=size, env={"broken": 5}, turns=2)
    rollouts = tmp_path / "run" / "rollouts"
    for record in seen.rl:
        episodes = list(read_rollouts(rollouts, f"{record['step']:06d}"))
        found = recompute_metrics(episodes)
        assert len(episodes) == 16 and set(found) > {"reward:mean", "length:mean"}
        for key, value in found.items():
            assert record[key] == pytest.approx(value, rel=1e-12), key
        scored = [e for e in episodes if not e["invalid"]]
        drawn = sum(len(turn["tokens"]) for e in scored for turn in e["turns"])
        assert record["trained_tokens:sum"] == drawn
        rows = [len(e["turns"][-1]["context"]) + len(e["turns"][-1]["tokens"]) - 1 for e in episodes]
        assert record["tokens:sum"] == sum(rows)
        assert record["loss:sum"] == pytest.approx(on_policy_loss(scored, drawn), abs=2e-6)
        held_out = recompute_metrics(list(read_rollouts(rollouts, f"eval-{record['step']:06d}")))
        for key in ("reward:mean", "accuracy:mean", "length:mean", "length:max", "episodes:sum", "invalid:sum"):
            assert record[f"eval/{key}"] == pytest.approx(held_out[key], rel=1e-12), key
        assert record["eval/episodes:sum"] == 4
    assert sum(record["invalid:sum"] for record in seen.rl) > 0, "no episode failed: the test shows less than it says"


def on_policy_loss(episodes, tokens):
    """-mean over tokens of the group's normalised rewards: the ratio is 1 in the first update."""
    total = 0.0
    for uid in {e["uid"] for e in episodes}:
        group = [e for e in episodes if e["uid"] == uid]
        rewards = np.array([e["reward"] for e in group])
        if np.ptp(rewards) > 0:
            advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
            lengths = [sum(len(turn["tokens"]) for turn in e["turns"]) for e in group]
            total += float((advantages * lengths).sum())
    return -total / tokens


# ---- KL


def test_the_adaptive_coefficient_is_the_one_that_is_used_and_logged(tmp_path):
    more = ["algorithm.kl.coef=0.3", "algorithm.kl.target=0.01", "algorithm.kl.horizon=50", "algorithm.kl.estimator=k2"]
    seen = run_loop(tmp_path / "run", *more, "batch.num_steps=4", "optim.lr=1e-2")
    logged = [record["kl/coef:mean"] for record in seen.rl]
    assert [call.spec.kl_coef for call in seen.ranks[0]] == logged
    assert logged[0] == 0.3
    for record, coef, after in zip(seen.rl, logged, logged[1:], strict=False):
        error = min(max(record["kl/behaviour_reference:mean"] / 0.01 - 1, -0.2), 0.2)
        assert after == pytest.approx(coef * (1 + error * 16 / 50), rel=1e-12)
    assert len(set(logged)) == 4
    for call, record in zip(seen.ranks[0], seen.rl, strict=True):  # the distance is what the rows say
        kl = np.concatenate([(row.sampling_logprobs - row.reference)[row.weights != 0] for row in call.rows])
        assert record["kl/behaviour_reference:mean"] == pytest.approx(kl.mean(), abs=1e-7)
    assert abs(seen.rl[0]["kl/behaviour_reference:mean"]) < 1e-6 < seen.rl[3]["kl_reference:mean"]


def test_kl_in_the_reward_is_in_the_advantages(tmp_path):
    more = ["algorithm.advantage.name=reinforce++", "algorithm.kl.coef=0.5", "algorithm.kl.placement=reward"]
    seen = run_loop(tmp_path / "run", *more, "optim.lr=2e-2", "algorithm.advantage.params.gamma=0.9")
    rewards = {
        f"{e['uid']}/{e['index']}/0": e["reward"] for e in read_rollouts(tmp_path / "run" / "rollouts", "000002")
    }
    update = seen.updates()[1]
    returns = {}
    for name, row in update.items():
        mask = row.weights != 0
        reward = -0.5 * (row.sampling_logprobs - row.reference)[mask].astype(np.float64)
        reward[-1] += rewards[name]
        for t in range(len(reward) - 2, -1, -1):
            reward[t] += 0.9 * reward[t + 1]
        returns[name] = reward
    every = np.concatenate(list(returns.values()))
    for name, row in update.items():
        want = (returns[name] - every.mean()) / (every.std() + 1e-6)
        np.testing.assert_allclose(row.advantages[row.weights != 0], want, atol=1e-4)
    assert seen.ranks[0][1].spec.kl_coef == 0.0, "the loss must not have the term a second time"
    moved = np.concatenate([np.abs(row.sampling_logprobs - row.reference)[row.weights != 0] for row in update.values()])
    assert moved.mean() > 1e-3


# ---- critic, warm-up


def test_the_critic_warms_up_alone(tmp_path):
    more = ["algorithm.advantage.name=gae", "algorithm.advantage.params.lam=0.9", "algorithm.critic.warmup_steps=2"]
    seen = run_loop(tmp_path / "run", *more, "batch.num_steps=4", "algorithm.critic.lr=1e-2")
    assert [call.model for call in seen.ranks[0]] == ["critic", "critic", "policy", "critic", "policy", "critic"]
    assert ["grad_norm:mean" in record for record in seen.rl] == [False, False, True, True]
    for call in seen.ranks[0]:
        assert all(row.values is not None and row.returns is not None for row in call.rows)
    errors = [record["critic/value_error:mean"] for record in seen.rl]
    assert errors[-1] < 0.7 * errors[0]


@pytest.mark.ranks
def test_warm_up_learns_the_solutions_on_any_number_of_ranks(tmp_path):
    more = ["warmup.num_steps=12", "warmup.rows_per_step=7", "warmup.lr=2e-2", "sampler.max_new_tokens=4"]
    runs = [run_loop(tmp_path / str(size), *more, size=size, mode="sft") for size in (1, 2)]
    losses = [[r["nll:mean"] for r in run.records if r["phase"] == "sft"] for run in runs]
    assert losses[0][:4] == pytest.approx(losses[1][:4], rel=1e-4)  # Adam at this rate amplifies rounding later on
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0][-1] < 0.5 * losses[0][0]
    for update in runs[1].updates():
        assert len(update) == 7
        assert sum(row.weights.sum() for row in update.values()) == pytest.approx(1.0, rel=1e-12)
        assert all((row.weights != 0).sum() == 4 for row in update.values()), "abc and the end token are trained"


# ---- learning


def learn(folder):
    cfg = loop_config(
        folder,
        "debug.deterministic=true",
        "batch.num_steps=25",
        "batch.prompts_per_step=8",
        "batch.samples_per_prompt=8",
        "optim.lr=1e-2",
        "eval.every_steps=10",
        "eval.num_prompts=20",
    )
    train_here(cfg)
    return read_metrics(folder / "metrics.jsonl")


@pytest.mark.ranks
def test_a_small_model_learns_and_repeats_its_curve(tmp_path):
    """From a quarter of the letters to nearly all of them, twice, bit for bit."""
    first, second = (run_ranks(1, learn, tmp_path / name)[0] for name in ("a", "b"))
    rewards = [record["reward:mean"] for record in first if record["phase"] == "rl" and record["step"] > 0]
    assert sum(rewards[:3]) / 3 < 0.45 and sum(rewards[-3:]) / 3 > 0.85, rewards
    evaluations = [record["eval/reward:mean"] for record in first if "eval/reward:mean" in record]
    assert evaluations[-1] > 0.9 > evaluations[0] + 0.4
    assert max(record.get("logprob_gap:max", 0.0) for record in first) < 1e-5
    assert [without_wall_clock(r) for r in first] == [without_wall_clock(r) for r in second]
