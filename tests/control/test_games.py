"""Whole runs on a game of pixels: the policies in the box learn it, and recordings, memory and lives reach the run."""

import numpy as np
import pytest

from skyrl.config.load import load_config
from skyrl.run_dir import RunReader
from skyrl.types import UserError

gymnasium = pytest.importorskip("gymnasium", reason="the extra control is not installed")

import catch  # noqa: E402
from walk import engine_of  # noqa: E402

from skyrl.run import Step  # noqa: E402
from skyrl.trainers.control import control, load_policy  # noqa: E402
from skyrl.trainers.control.rollout import collect  # noqa: E402

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
        tmp_path, "control.policy=cnn", "control.policy_options={features: 64, channels: 16}", "control.n_envs=64",
        "control.n_steps=14", "control.total_steps=9_856", "control.record_every=2", "checkpoint.export=true",
        "eval.every_steps=4",
    )  # fmt: skip
    assert records[0]["eval/reward:mean"] < 0 and records[-1]["eval/reward:mean"] > 0.7
    assert [path.stem for path in reader.recordings()] == ["000000", "000008", "000011"]  # the last one in any case
    assert (tmp_path / "curves.png").stat().st_size > 1000
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


def test_a_life_is_no_episode_of_the_metrics():
    """reward:mean is of whole games with their own points, although training sees lives and signs."""
    pytest.importorskip("ale_py", reason="the extra atari is not installed")
    pytest.importorskip("cv2", reason="the extra atari is not installed")
    options = ["experiment=breakout", "control.n_steps=320", "control.n_envs=2", "control.minibatch_size=320"]
    engine = engine_of(*options)
    step = Step(None, 0)
    batch = collect(engine, step)
    lives, found = int(batch.done.sum()), step.sums.result(engine.world)
    assert 1 <= found["episodes:sum"] <= 8 and lives > 3 * found["episodes:sum"]
    assert found["length:mean"] > 400  # frames; a life has about 150
