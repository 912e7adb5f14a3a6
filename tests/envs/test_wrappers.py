"""Wrappers around any environment, in this process and in workers."""

from dataclasses import replace

import pytest

from skyrl.config.schema import EnvConfig
from skyrl.envs import make_environment
from skyrl.envs.base import ENVIRONMENTS, Environment, StepResult, register_environment
from skyrl.envs.wrappers import WRAPPERS, Wrapper, register_wrapper
from skyrl.types import Prompt, UserError
from skyrl.workers.calls import LocalCalls
from skyrl.workers.pool import open_calls, shut_pool

PROMPT = Prompt("x/train/0", "x", [{"role": "user", "content": "say"}])


class Echo(Environment):
    def __init__(self, *, times: int = 1) -> None:
        self.times = times

    def reset(self, prompt, seed):
        self.prompt = prompt
        return [{"role": "user", "content": f"seed {seed}"}]

    def step(self, text):
        return StepResult(float(len(text)), False, [{"role": "user", "content": text * self.times}])


class Late(Echo):
    async def reset(self, prompt, seed):
        return Echo.reset(self, prompt, seed)

    async def step(self, text):
        return Echo.step(self, text)


class Loud(Wrapper):
    def __init__(self, env: Environment, *, sign: str = "!") -> None:
        super().__init__(env)
        self.sign = sign

    def action(self, text):
        return text.upper()

    def observation(self, messages):
        return [{**messages[-1], "content": messages[-1]["content"] + self.sign}]


class Half(Wrapper):
    def result(self, result):
        return replace(result, reward=result.reward / 2, done=True, metrics={"halved:sum": 1})


@pytest.fixture(autouse=True)
def registered():
    before = [(registry, dict(registry._things)) for registry in (ENVIRONMENTS, WRAPPERS)]
    register_environment("echo")(Echo)
    register_environment("late")(Late)
    register_wrapper("loud")(Loud)
    register_wrapper("half")(Half)
    yield
    shut_pool()
    for registry, things in before:
        registry._things = things
    Echo.name = Late.name = ""


def played(calls):
    calls.open(7, PROMPT, seed=5)
    (first,) = wait(calls)
    calls.step(7, "ab")
    (second,) = wait(calls)
    return first.outcome.value, second.outcome.value


def wait(calls):
    found = []
    while not found:
        found = calls.poll(wait=True)
    return found


@pytest.mark.parametrize("name", ["echo", "late"])
@pytest.mark.parametrize("workers", [0, 1])
def test_each_wrapper_sees_what_the_one_inside_it_gives(name, workers):
    cfg = EnvConfig(name=name, workers=workers, wrappers=[{"name": "loud", "sign": "?"}, "half"], options={"times": 2})
    with open_calls(cfg) as calls:
        assert isinstance(calls, LocalCalls) == (workers == 0)
        first, second = played(calls)
    assert first == [{"role": "user", "content": "seed 5?"}]
    assert second == StepResult(1.0, True, [{"role": "user", "content": "ABAB?"}], {"halved:sum": 1.0})


@pytest.mark.parametrize(
    "wrappers, says",
    [
        (["lowd"], r"env.wrappers\[0\]: no wrapper called 'lowd'; choose one of: half, loud"),
        (["half", 3], r"env.wrappers\[1\]=3: give the name of a wrapper, or \{name: ..., option: ...\}"),
        ([{"sign": "?"}], r"env.wrappers\[0\]=.*: give the name"),
        ([{"name": "loud", "sine": "?"}], r"env.wrappers\[0\].sine: wrapper 'loud' has no such option; it has: sign"),
        ([{"name": "loud", "sign": 3}], r"env.wrappers\[0\].sign=3: wrapper 'loud' wants str here"),
    ],
)
def test_a_mistake_in_wrappers_is_named(wrappers, says):
    with pytest.raises(UserError, match=says):
        make_environment(EnvConfig(name="echo", wrappers=wrappers))


def test_what_is_no_wrapper_is_refused():
    with pytest.raises(UserError, match=r"register_wrapper\('echo'\): .*Echo.* is no subclass of skyrl.Wrapper"):
        register_wrapper("echo")(Echo)

    class Own(Wrapper):
        def __init__(self, env):
            pass

    register_wrapper("own")(Own)
    with pytest.raises(UserError, match=r"the constructor of Own has to call super\(\).__init__\(env\)"):
        make_environment(EnvConfig(name="echo", wrappers=["own"]))


def test_an_error_in_a_wrapped_environment_names_both(monkeypatch):
    monkeypatch.setattr(Half, "result", lambda self, result: 1 / 0)
    with open_calls(EnvConfig(name="echo", workers=0, wrappers=["half"], on_error="stop")) as calls:
        calls.open(7, PROMPT, seed=5)
        with pytest.raises(UserError, match=r"environment echo in Half.step, prompt x/train/0: raised ZeroDivision"):
            calls.step(7, "ab")
            wait(calls)
