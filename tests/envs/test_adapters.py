"""Environments of other libraries: classes of the shapes that these have, played unchanged."""

from types import SimpleNamespace

import pytest

from skyrl.envs.adapters import as_environment
from skyrl.types import Prompt, UserError


class Gym:
    def reset(self, *, seed=None, options=None):
        self.left = seed % 3 + 1
        return f"{self.left} left", {}

    def step(self, action):
        self.left -= 1
        return f"{self.left} left", float(action == "go"), self.left == 0, False, {}


class SkyGym:
    def __init__(self, env_config=None, extras={}):  # noqa: B006
        self.answer = extras["reward_spec"]["ground_truth"]

    def init(self, prompt):
        return prompt, {}

    def step(self, action):
        return {"observations": [], "reward": float(action == self.answer), "done": True, "metadata": {}}


class Arena:
    def reset(self, num_players, seed=None):
        assert num_players == 1
        self.turns = 0

    def get_observation(self):
        return 0, f"turn {self.turns}"

    def step(self, action):
        self.turns += 1
        return self.turns == 2, {}

    def close(self):
        return {0: 1.0}, {}


class Problem:
    """The cookbook's ProblemEnv in short: its steps are tokens, by a renderer."""

    def __init__(self):
        self.renderer = "Qwen's"

    async def initial_observation(self):
        prompt = self.renderer.build_generation_prompt([{"role": "user", "content": "1+1?"}])
        return prompt, self.renderer.get_stop_sequences()

    async def step(self, action, *, extra=None):
        message, ended = self.renderer.parse_response(action)
        reward = float(ended.is_stop_sequence and message["content"] == "2")
        return SimpleNamespace(
            reward=reward, episode_done=True, next_observation=[], metrics={"correct": reward}, next_stop_condition=[]
        )


class Talk:
    """The cookbook's MessageEnv."""

    async def initial_observation(self):
        self.messages = [{"role": "user", "content": "hello"}]
        return list(self.messages)

    async def step(self, message):
        self.messages += [message, {"role": "user", "content": "more"}]
        done = len(self.messages) > 4
        return SimpleNamespace(reward=0.5, episode_done=done, next_messages=list(self.messages), metrics={})


class Builder:
    async def make_envs(self):
        return [Problem(), Problem()]


def play(thing, *texts, prompt=None):
    cls = as_environment(thing, "foreign")
    env = cls()
    prompt = prompt or cls.dataset({}, None, "train", 1)[1]
    seen = [env.reset(prompt)]
    results = []
    for text in texts:
        results.append(env.step(text))
        seen.append(results[-1].observation)
    env.close()
    return [[one["content"] for one in part] for part in seen], results


def test_gymnasium():
    seen, results = play(Gym, "go", "stay")
    assert seen == [["2 left"], ["1 left"], []] and [one.reward for one in results] == [1.0, 0.0] and results[-1].done
    assert play(lambda: Gym(), "go")[0][0] == ["2 left"]


def test_skyrl_gym():
    row = Prompt("x", "foreign", [{"role": "user", "content": "2*2?"}], {"reward_spec": {"ground_truth": "4"}})
    seen, (result,) = play(SkyGym, "4", prompt=row)
    assert seen[0] == ["2*2?"] and result.reward == 1.0 and result.done


def test_textarena():
    seen, results = play(Arena, "a", "b")
    assert seen == [["turn 0"], ["turn 1"], []] and [one.reward for one in results] == [0.0, 1.0]


@pytest.mark.parametrize("thing", [Problem, Builder, Builder()])
def test_the_cookbooks_environments_that_speak_tokens(thing):
    seen, (result,) = play(thing, "2")
    assert seen[0] == ["1+1?"] and result.reward == 1.0 and result.metrics == {"correct:mean": 1.0}


def test_the_cookbooks_environments_that_speak_messages():
    wrapped = lambda: SimpleNamespace(message_env=Talk(), initial_observation=None, step=None)  # noqa: E731
    for thing in (Talk, wrapped):
        seen, results = play(thing, "a", "b")
        assert seen == [["hello"], ["more"], []] and results[1].done


def test_held_out_beginnings_are_others():
    cls = as_environment(Gym, "foreign")
    train, test = ({p.extra["seed"] for p in cls.dataset({}, None, split, 1)} for split in ("train", "test"))
    assert not train & test


def test_what_cannot_be_played_is_one_line():
    with pytest.raises(UserError, match="it makes a dict, wanted"):
        as_environment(dict, "foreign")
    pixels = type("Pixels", (Gym,), {"reset": lambda self, *, seed=None: ([0, 1], {})})
    with pytest.raises(TypeError, match="its observation is a list; only texts"):
        play(pixels, "a")
