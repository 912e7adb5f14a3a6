"""Atari games: the chain of wrappers over real ones. Recordings and their place in the report."""

from types import SimpleNamespace

import numpy as np
import pytest

from skyrl.types import UserError

gymnasium = pytest.importorskip("gymnasium", reason="the extra control is not installed")
ale_py = pytest.importorskip("ale_py", reason="the extra atari is not installed")
pytest.importorskip("cv2", reason="the extra atari is not installed")

from skyrl.trainers.control.atari import wrap_atari  # noqa: E402


def game(name="Breakout", training=True, frame_size=42, **options):
    gymnasium.register_envs(ale_py)
    options = {"frameskip": 1, "repeat_action_probability": 0.0, **options}
    env = gymnasium.make(f"ALE/{name}-v5", **options)
    return wrap_atari(env, SimpleNamespace(frame_size=frame_size), training=training)


def play(env, action=0):
    """Steps of one episode with one action, its rewards, and the last info."""
    rewards, over = [], False
    while not over:
        _, reward, terminated, truncated, info = env.step(action)
        rewards.append(float(reward))
        over = terminated or truncated
    return rewards, info


def test_a_life_is_an_episode_in_training_and_fire_is_pressed():
    """Without an action nothing would ever happen in this game: it waits for FIRE at each ball."""
    env = game()
    ale = env.unwrapped.ale
    observation, _ = env.reset(seed=1)
    assert (
        observation.shape == (42, 42) and observation.dtype == np.uint8 and env.observation_space.contains(observation)
    )
    for life in (5, 4, 3, 2, 1):
        assert ale.lives() == life
        frames = ale.getEpisodeFrameNumber()
        rewards, info = play(env)
        assert 5 < len(rewards) < 300 and ("episode" in info) == (life == 1)
        assert ale.getEpisodeFrameNumber() > frames
        env.reset(seed=1)
        if life > 1:  # the same game goes on, whatever the seed
            assert ale.getEpisodeFrameNumber() > frames
    assert ale.lives() == 5 and ale.getEpisodeFrameNumber() < 200
    env.close()


def test_evaluation_plays_a_whole_game_for_its_own_rewards():
    env = game(training=False)
    env.reset(seed=0)
    rewards, info = play(env)
    assert env.unwrapped.ale.lives() == 0 and info["episode"]["r"] == sum(rewards) and len(rewards) > 100
    env.close()
    env = game("SpaceInvaders", training=False)
    env.reset(seed=3)
    assert any(env.step(1)[1] >= 5 for _ in range(200))  # the least that a hit gives
    env.close()


def test_rewards_are_signs_in_training_and_own_ones_in_the_info():
    """A hit in Space Invaders gives 5 to 30 points."""
    env = game("SpaceInvaders")
    env.reset(seed=3)
    seen, info = [], {}
    while "episode" not in info:
        rewards, info = play(env, 1)
        seen += rewards
        env.reset()
    assert set(seen) == {0.0, 1.0} and info["episode"]["r"] >= 5 * sum(seen)
    env.close()


def test_the_same_seed_is_the_same_game():
    env = game("SpaceInvaders", training=False)

    def frames(seed):
        return np.stack([env.reset(seed=seed)[0]] + [env.step(action)[0] for action in (2, 3, 2, 2)])

    first = frames(5)
    assert not np.array_equal(first, frames(6)) and np.array_equal(first, frames(5))
    env.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"frameskip": 4}, "ALE/Pong-v5 skips frames itself; set control.env_kwargs.frameskip=1"),
        ({"obs_type": "ram"}, "ALE/Pong-v5 gives no pictures; set control.env_kwargs.obs_type=grayscale"),
    ],
)
def test_games_that_do_not_fit(options, said):
    with pytest.raises(UserError, match=f"^control.preprocess=atari: {said}"):
        game("Pong", **options)


def test_what_is_no_game():
    with pytest.raises(UserError, match=r"^control.preprocess=atari: CartPole-v1 is no Atari game; .*ALE/Pong-v5$"):
        wrap_atari(gymnasium.make("CartPole-v1"), SimpleNamespace(frame_size=42))
