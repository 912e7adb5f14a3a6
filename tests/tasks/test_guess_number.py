"""The guessing game, played by a perfect and by a hopeless player."""

import pytest

from skyrl.config.schema import DataConfig, EnvConfig
from skyrl.envs import ENVIRONMENTS, Guard, make_environment
from skyrl.types import UserError


def dataset(split, **options):
    return ENVIRONMENTS.get("guess_number").dataset(options, DataConfig(), split, 0)


def play(prompt, player, max_turns=7, **options):
    cfg = EnvConfig(name="guess_number", options=options, max_turns=max_turns)
    env, guard = make_environment(cfg), Guard(cfg)
    heard = guard.call(env.reset, prompt, prompt=prompt).value
    results = []
    while not results or not results[-1].done:
        results.append(guard.call(env.step, player(heard), prompt=prompt).value)
        heard = heard + results[-1].observation
    return results


class Bisect:
    def __init__(self, low=1, high=100):
        self.low, self.high = low, high

    def __call__(self, heard):
        if heard[-1]["content"] == "higher":
            self.low = self.guess + 1
        elif heard[-1]["content"] == "lower":
            self.high = self.guess - 1
        self.guess = (self.low + self.high) // 2
        return f"I guess {self.guess}."


def test_bisection_always_wins():
    turns = set()
    for split in ("train", "test"):
        for prompt in dataset(split):
            results = play(prompt, Bisect())
            last = results[-1]
            assert last.reward == 1.0 and [r.reward for r in results[:-1]] == [0.0] * (len(results) - 1)
            assert last.metrics == {"correct:mean": 1.0}
            assert last.observation == [] and all(r.metrics == {} for r in results[:-1])
            turns.add(len(results))
    assert turns == set(range(1, 8))


def test_losing_and_nonsense():
    prompt = next(p for p in dataset("train") if p.extra["secret"] not in (1, 2))
    results = play(prompt, lambda heard: "1", max_turns=3)
    assert [r.done for r in results] == [False, False, True] and results[-1].metrics["correct:mean"] == 0.0
    assert results[0].observation == [{"role": "user", "content": "higher"}] and results[-1].reward == 0.0
    results = play(prompt, lambda heard: "no idea, 1.5?", max_turns=2)
    assert results[0].observation[0]["content"] == "not a number"


def test_last_number_counts_and_discount():
    prompt = dataset("train")[0]
    secret = prompt.extra["secret"]
    answers = iter(["0", "0", f"not 5 but {secret}."])
    results = play(prompt, lambda heard: next(answers), discount=0.5)
    assert results[-1].reward == 0.25 and results[-1].metrics["correct:mean"] == 1.0
    negative = dataset("test", low=-20, high=-10)[0]
    assert play(negative, lambda heard: str(negative.extra["secret"]))[0].reward == 1.0


def test_secrets_are_split():
    train, test = ({p.extra["secret"] for p in dataset(split)} for split in ("train", "test"))
    assert not train & test and train | test == set(range(1, 101)) and len(test) == 20
    assert [p.extra for p in dataset("train")] == [p.extra for p in dataset("train")]
    assert len(dataset("train", high=2)) == len(dataset("test", high=2)) == 1


def test_bad_options():
    for options in ({"high": 1}, {"high": 10**7}, {"discount": 0.0}):
        with pytest.raises(UserError, match=f"env.options.{next(iter(options))}"):
            make_environment(EnvConfig(name="guess_number", options=options))
    with pytest.raises(UserError, match="env.max_turns=0"):
        make_environment(EnvConfig(name="guess_number", max_turns=0))
    with pytest.raises(UserError, match="set env.max_turns instead"):
        make_environment(EnvConfig(name="guess_number", options={"max_turns": 3}))
