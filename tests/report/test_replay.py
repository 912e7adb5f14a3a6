"""skyrl-tx replay: the logged numbers again, from the rollouts that a real run has left."""

import dataclasses
import json

import lowercase  # noqa: F401
import numpy as np
import pytest
from gloo import run_ranks
from loop import loop_config, run_loop, train_here

from skyrl.dashboard.episodes import add_trained
from skyrl.envs.base import register_environment
from skyrl.report.replay import replay, replay_step
from skyrl.run_dir.reader import RunReader
from skyrl.tracking.base import without_wall_clock
from skyrl.types import UserError

OTHERS = ("eval/", "sampler/", "workers/")  # of a step's metrics those that no phase makes
CRITIC = ["algorithm.advantage.name=gae", "algorithm.kl.coef=0.1", "algorithm.kl.placement=reward"]
ADAPTIVE = ["algorithm.kl.coef=0.3", "algorithm.kl.target=0.01", "algorithm.kl.horizon=50", "algorithm.kl.estimator=k2"]
TWO_UPDATES = ["batch.optim_steps_per_batch=2", "batch.epochs_per_batch=2", "warmup.num_steps=2"]
KEPT = ["checkpoint.every_steps=2", "checkpoint.keep_last=0", "batch.num_steps=3"]


@register_environment("short_and_lower")
class ShortAndLower(lowercase.Lowercase):
    in_process = True

    def step(self, text):
        result = super().step(text)
        result.reward = {"lower": result.reward, "few": -len(text) / 10}
        return result


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of three steps with its folder; nobody may write into it."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    run_loop(folder, *KEPT, "env.on_error=mask", env={"broken": 5}, turns=2)
    return RunReader(folder)


def files(reader):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in reader.path.rglob("*")}


def logged(reader, step):
    record = next(r for r in reader.metrics()[0] if r["step"] == step and r["phase"] == "rl")
    return {k: v for k, v in without_wall_clock(record).items() if not k.startswith((*OTHERS, "step", "phase"))}


@pytest.mark.parametrize("step", [1, 2, 3])
def test_every_logged_number_of_a_step_comes_again_bit_for_bit(plain, step):
    before = files(plain)
    found = replay_step(plain, step, "loss")
    assert {k: found["replayed"].get(k) for k in logged(plain, step)} == logged(plain, step)
    assert found["from"] == ("checkpoint 000002" if step == 3 else "the initial weights")
    assert files(plain) == before


SLOW = [pytest.param(more, marks=pytest.mark.slow) for more in (ADAPTIVE, TWO_UPDATES)]


@pytest.mark.parametrize("more", [CRITIC, *SLOW])
def test_critic_reference_coefficients_and_several_updates_come_again(more, tmp_path):
    run_loop(tmp_path / "run", *KEPT, *more)
    reader = RunReader(tmp_path / "run")
    step = 3 + 2 * (more is TWO_UPDATES)
    expected, found = logged(reader, step), replay_step(reader, step, "loss")["replayed"]
    assert {k: found.get(k) for k in expected} == expected


def test_multipliers_of_the_step_are_in_its_rewards(tmp_path):
    bound = "algorithm.objectives.constraints={few: {min: -0.1, step: 0.5}}"
    cfg = loop_config(tmp_path / "run", *KEPT, bound)
    train_here(dataclasses.replace(cfg, env=dataclasses.replace(cfg.env, name="short_and_lower", options={})))
    reader = RunReader(tmp_path / "run")
    assert logged(reader, 3)["multiplier/few:mean"] > 0
    for phase in ("reward", "loss"):
        found = replay_step(reader, 3, phase)
        assert set(found["compared"].values()) == {"equal"} and found["episodes"] == []
    assert found["replayed"]["multiplier/few:mean"] == logged(reader, 3)["multiplier/few:mean"]


def test_rewards_are_the_environments_as_it_is_now(plain):
    assert replay_step(plain, 2, "reward")["episodes"] == []
    found = replay_step(plain, 2, "reward", ["env.options={broken: 5, turns: 2, levels: 2}"])
    assert found["replayed"]["reward:mean"] != found["overridden"]["reward:mean"]
    assert found["overridden"]["invalid:sum"] == found["logged"]["invalid:sum"] > 0
    assert "reward 0." in found["episodes"][0] and ", now 0" in found["episodes"][0]
    with pytest.raises(UserError, match=r"episode \d+/\d/2 .*the environment goes on for longer than in the run"):
        replay_step(plain, 2, "reward", ["env.options={broken: 5, turns: 3}", "env.max_turns=3"])


def test_another_algorithm_on_the_same_rollouts(plain, capsys):
    found = replay_step(plain, 3, "loss", ["algorithm=dr_grpo", "optim.lr=0.5"])
    over, same = found["overridden"], found["replayed"]
    assert over["lr:mean"] == 0.5 and over["entropy:mean"] == same["entropy:mean"]
    assert over["advantage:max"] != same["advantage:max"] and over["grad_norm:mean"] != same["grad_norm:mean"]
    # the same options under another name are the same
    again = replay_step(plain, 3, "loss", ["algorithm.advantage.name=grpo"])
    assert again["overridden"] == same
    assert replay([str(plain.path), "--step", "3", "algorithm.advantage.name=rloo"]) == 0
    out = capsys.readouterr().out
    assert "advantage:max" in out and "0 differ" in out and "overridden: algorithm.advantage.name=rloo" in out
    assert replay([str(plain.path), "--step", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compared"]["reward:mean"] == "equal"


def test_a_number_that_was_changed_is_told(plain, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "rollouts").symlink_to(plain.path / "rollouts")
    (copy / "config.yaml").write_text((plain.path / "config.yaml").read_text())
    lines = (plain.path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[-1])
    lines[-1] = json.dumps(record | {"reward:mean": record["reward:mean"] + 0.01})
    (copy / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert replay([str(copy), "--step", "3"]) == 1
    assert "differs" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("reward:mean"))


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--step", "9"], r"--step=9: .* has rollouts of steps 1, 2, 3 alone"),
        (["--step", "2", "model.path=x"], "model.path: does not act on rollouts that are there; give options of algo"),
        (["--step", "2", "algorithm.advantage.nam=x"], "algorithm.advantage.nam: no such option"),
        (["--step", "2", "algorithm.advantage.name=gae"], "need a model's scores; replay --phase loss"),
        (["--step", "3", "--phase", "loss", "algorithm.kl.coef=0.1"], "need a reference model, which this run did not"),
        (["--step", "two"], "invalid int value: 'two'"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(plain, args, problem):
    with pytest.raises(UserError, match=problem) as caught:
        replay([str(plain.path), *args])
    assert "\n" not in str(caught.value)


def test_a_step_without_the_weights_before_it_says_which_can_be(plain, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("metrics.jsonl", "config.yaml", "checkpoints"):
        (copy / name).symlink_to(plain.path / name)
    (copy / "rollouts").mkdir()
    (copy / "rollouts" / "000003-r0.jsonl").symlink_to(plain.path / "rollouts" / "000003-r0.jsonl")
    (copy / "rollouts" / "000002-r0.jsonl").write_text('{"uid": "x"}\n')
    with pytest.raises(UserError, match="--step=2 --phase loss: the weights before it .* can be replayed: 3 "):
        replay_step(RunReader(copy), 2, "loss")
    with pytest.raises(UserError, match="000002-r.*: damaged, or of an earlier release"):
        replay_step(RunReader(copy), 2, "advantage")


@pytest.mark.slow
def test_a_run_of_two_ranks_is_replayed_by_one(tmp_path):
    run_ranks(2, train_here, loop_config(tmp_path / "run", *KEPT, "algorithm.filters.zero_variance=true"), "train")
    found = replay_step(RunReader(tmp_path / "run"), 3, "loss")
    assert {k for k, how in found["compared"].items() if how == "differs"} <= {"microbatches:max"}
    assert len(found["compared"]) > 20


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_a_step_has_trained_on_lies_beside_its_episodes(ranks, plain, tmp_path):
    """By both ways the same numbers: the logged means, and those over the tokens that pages colour."""
    reader = plain
    if ranks == 2:
        run_ranks(2, run_loop, tmp_path / "run", *KEPT)
        reader = RunReader(tmp_path / "run")
    for step in (1, 2, 3):
        rows, gaps, advantages = reader.trained(f"{step:06d}"), [], []
        for one in reader.rollouts(f"{step:06d}"):
            add_trained(one, rows)
            for turn in one["turns"]:
                assert len(turn["trained"]) == len(turn["advantages"]) == len(turn["tokens"])
                gaps += [abs(a - b) for a, b in zip(turn["logprobs"], turn["trained"], strict=True) if b is not None]
                advantages += [abs(one) for one in turn["advantages"] if one is not None]
        told = logged(reader, step)
        assert np.mean(gaps) == pytest.approx(told["logprob_gap:mean"], rel=1e-4, abs=1e-7)
        assert np.mean(advantages) == pytest.approx(told["advantage_abs:mean"], rel=1e-6) and len(gaps) > 20
