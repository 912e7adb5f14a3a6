"""Whole runs on a game of pixels: the policies in the box learn it, and recordings, memory and lives reach the run."""

import numpy as np
import pytest

from skyrl.config.load import load_config
from skyrl.run_dir import RunReader
from skyrl.types import UserError

gymnasium = pytest.importorskip("gymnasium", reason="the extra control is not installed")

import catch  # noqa: E402

from skyrl.trainers.control import control, load_policy  # noqa: E402

QUICK = [
    "checkpoint.every_steps=0", "checkpoint.export=false", "checkpoint.async_save=false", "tracking.console=off",
    "tracking.system=false", "run.threads=1", "env=Catch-v0", "optim.lr=5e-3", "control.epochs=6",
    "control.minibatch_size=224", "eval.every_steps=0", "control.eval_episodes=24",
]  # fmt: skip


def played(folder, *options):
    """The run of these options, and its records."""
    control(load_config([*QUICK, f"run.dir={folder}", *options], mode="control"))
    return RunReader(folder), RunReader(folder).metrics()[0]


def test_pixels_are_learned_recorded_and_played_on(tmp_path):
    """From a third of the balls to nearly all: 9,856 steps."""
    reader, records = played(
        tmp_path, "control.policy=cnn", "control.policy_options={features: 64, channels: 16}", "control.n_envs=16",
        "control.n_steps=56", "control.total_steps=9_856", "control.record_every=1", "checkpoint.export=true",
    )  # fmt: skip
    assert records[0]["eval/reward:mean"] < 0 and records[-1]["eval/reward:mean"] > 0.7
    assert [path.stem for path in reader.recordings()] == ["000000", "000011"]
    act, env = load_policy(tmp_path / "export"), gymnasium.make("Catch-v0")
    caught = []
    for seed in range(20):
        observation, over = env.reset(seed=seed)[0], False
        while not over:
            observation, reward, over, _, _ = env.step(act(observation))
        caught.append(reward)
    assert np.mean(caught) > 0.7


@pytest.mark.slow  # a quarter of a minute
def test_what_has_to_be_remembered_is_learned_with_a_state(tmp_path):
    """The ball is seen once, seven steps before it lands in one of eight columns: who forgets it catches one of eight,
    for a mean of -0.75."""
    _, records = played(
        tmp_path, "control.policy=recurrent", "control.policy_options.hidden=64", "control.n_envs=32",
        "control.n_steps=28", "control.total_steps=20_000", "control.env_kwargs.hidden=true",
    )  # fmt: skip
    assert records[-1]["eval/reward:mean"] > 0.7


def test_a_restart_in_the_middle_of_an_episode_remembers(tmp_path):
    """A recurrent policy ends with the same numbers with and without a stop in between."""
    options = [
        "control.policy=recurrent", "control.policy_options.hidden=8", "control.n_envs=4", "control.n_steps=10",
        "control.minibatch_size=20", "control.epochs=2", "control.env_kwargs.hidden=true",
    ]  # fmt: skip
    _, whole = played(tmp_path / "whole", *options, "control.total_steps=120")
    played(tmp_path / "parts", *options, "control.total_steps=80")
    _, parts = played(tmp_path / "parts", *options, "control.total_steps=120")
    kept = ("grad_norm:mean", "entropy:mean", "critic/loss:sum", "eval/reward:mean")
    assert {key: whole[-1].get(key) for key in kept} == {key: parts[-1].get(key) for key in kept}
    assert whole[-1]["grad_norm:mean"] > 0


class Blind(catch.Catch):
    """Cannot be drawn."""

    def render(self):
        raise RuntimeError("no screen")


def test_whole_sequences_are_asked_for_and_frames_that_cannot_be_drawn(tmp_path):
    with pytest.raises(UserError, match="learns from whole sequences; give a multiple of control.n_steps=64"):
        played(
            tmp_path / "a",
            "control.policy=recurrent",
            "control.n_envs=7",
            "control.n_steps=64",
            "control.total_steps=448",
        )
    said = (
        "^control.record_every=1: Blind-v0 cannot be recorded: drawing it raised RuntimeError: no screen; leave it at 0"
    )
    gymnasium.register("Blind-v0", Blind)
    with pytest.raises(UserError, match=said):
        played(tmp_path / "b", "env=Blind-v0", "control.n_envs=7", "control.n_steps=32", "control.record_every=1")


def test_a_life_is_no_episode_of_the_metrics(tmp_path):
    """reward:mean is of whole games with their own points, although training sees lives and signs."""
    pytest.importorskip("ale_py", reason="the extra atari is not installed")
    pytest.importorskip("cv2", reason="the extra atari is not installed")
    _, records = played(
        tmp_path, "experiment=breakout", "env=ALE/Breakout-v5", "control.total_steps=1024", "control.eval_episodes=1",
        "control.n_steps=128", "control.n_envs=4", "control.minibatch_size=256", "control.epochs=1", "optim.lr=1e-4",
    )  # fmt: skip
    found = [record for record in records if "reward:mean" in record]
    games = sum(record["episodes:sum"] for record in found)
    assert 1 <= games <= 12 and all(record["length:mean"] > 400 for record in found)  # frames; a life has about 150
