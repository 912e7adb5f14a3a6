"""The environment that judges functions: stages, rows of both kinds, hostile answers."""

import json
from dataclasses import fields
from unittest.mock import Mock

import pytest

from skyrl.config.schema import DataConfig, EnvConfig
from skyrl.envs import make_environment
from skyrl.envs.base import ENVIRONMENTS, RetryableError, check_options, options_of
from skyrl.sandbox import Limits, Sandbox, SandboxError
from skyrl.tasks import code
from skyrl.tasks.code import INPUTS, judge, program_of
from skyrl.types import UserError

CASES = [{"args": [1], "kwargs": {"y": 2}, "expected": 3}, {"args": [5, 5], "expected": 10}]
ROW = {"prompt": "Add.", "entry_point": "add", "tests": CASES}
ASSERTS = {**ROW, "tests": "def check(candidate):\n    assert candidate(1, 2) == three", "context": "three = 3"}
RIGHT = "Here it is:\n```python\ndef add(x, y):\n    return x + y\n```\nDone."


@pytest.fixture(autouse=True, scope="module")
def sandbox():
    try:
        Sandbox().level  # noqa: B018  # tries it
    except UserError as error:
        pytest.skip(str(error))


def rows(tmp_path, *rows, **options):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ENVIRONMENTS.get("code").dataset(options, DataConfig(path=str(path)), "train", 0)


def played(prompt, text, **options):
    env = make_environment(EnvConfig(name="code", options=options))
    env.reset(prompt)
    result = env.step(text)
    assert result.done
    metrics = result.metrics
    stages = [metrics[f"{name}:mean"] for name in ("parses", "compiles", "within_limits", "passes")]
    return round(result.reward, 6), stages, metrics["correct:mean"]


def test_all_limits_of_the_sandbox_are_options():
    for name in ("code", "tools"):
        assert {one.name for one in fields(Limits)} <= options_of(ENVIRONMENTS.get(name)).keys()
        assert options_of(ENVIRONMENTS.get(name))["wall_seconds"] == "10.0"
        made = make_environment(EnvConfig(name=name, options={"disk_mb": 4, "cpu_seconds": 1}))
        assert made.limits == Limits(disk_mb=4, cpu_seconds=1)
        with pytest.raises(UserError, match=r"env.options.files='x': .* wants int here"):
            make_environment(EnvConfig(name=name, options={"files": "x"}))
        with pytest.raises(UserError, match=r"env.options.cpu_second: .* no such option; it has: .*cpu_seconds"):
            make_environment(EnvConfig(name=name, options={"cpu_second": 1}))
    own = type("Own", (code.Code,), {"__init__": lambda self, **more: None})
    assert check_options(own, {"any": 1}, "env.options", "own", ()) == {"any": 1}, "a subclass has a ** of its own"


@pytest.mark.parametrize(
    ("text", "reward", "stages"),
    [
        (RIGHT, 1.0, [1, 1, 1, 1]),
        ("def add(x, y): return x * y + 1", 0.55, [1, 1, 1, 0.5]),  # 3 and 26
        ("def add(x, y): return str(x + y)", 0.1, [1, 1, 1, 0]),
        ("def add(x, y): return float(x + y)", 0.1, [1, 1, 1, 0]),
        ("def add(x, y): return (x + y) / 0", 0.1, [1, 1, 1, 0]),
        ("def add(x, y):\n  while True: pass", 0.1, [1, 1, 0, 0]),
        ("def add(x, y): return bytearray(10**10)", 0.1, [1, 1, 1, 0]),  # its own exception, within limits
        ("def other(x, y): return x + y", 0.05, [1, 0, 0, 0]),
        ("import nothing\ndef add(x, y): return x + y", 0.05, [1, 0, 0, 0]),
        ("while True: pass", 0.05, [1, 0, 0, 0]),
        ("def add(x, y) return x + y", 0.0, [0, 0, 0, 0]),
        ("", 0.05, [1, 0, 0, 0]),
        ("import os; os._exit(0)", 0.05, [1, 0, 0, 0]),
        ("class E:\n  def __eq__(s, o): return True\ndef add(x, y): return E()", 0.1, [1, 1, 1, 0]),
        ("(" * 5000, 0.0, [0, 0, 0, 0]),
    ],
)
def test_the_reward_does_what_it_says(tmp_path, text, reward, stages):
    prompt = rows(tmp_path, ROW)[0]
    assert played(prompt, text, cpu_seconds=0.4) == (reward, stages, float(reward == 1.0))


def test_options_of_the_reward(tmp_path):
    prompt = rows(tmp_path, ROW)[0]
    half = "def add(x, y): return x * y + 1"
    assert played(prompt, half, partial=False)[0] == 0.1
    assert played(prompt, half, parses=0.0, compiles=0.0, within_limits=0.5, passes=2.0)[0] == 1.5
    with pytest.raises(UserError, match=r"env\.options\.passes=-1\.0: wanted 0 or more"):
        make_environment(EnvConfig(name="code", options={"passes": -1.0}))


def test_asserts_in_text(tmp_path):
    prompt = rows(tmp_path, ASSERTS)[0]
    assert played(prompt, RIGHT) == (1.0, [1, 1, 1, 1], 1.0)
    for wrong in ("return 4", "return 3.0", "raise SystemExit", "return three"):
        assert played(prompt, f"def add(x, y): {wrong}")[0] == 0.1


def test_an_answer_that_goes_on_where_the_prompt_ends(tmp_path):
    prompt = rows(tmp_path, {**ROW, "prompt": "def add(x, y):\n    return "}, complete=True)[0]
    assert played(prompt, "x + y", complete=True)[0] == 1.0
    assert program_of("```python\na\n```\nthen\n```py\nb\n```") == "b\n" and program_of("```\nc") == "c"


def test_made_tasks_have_right_solutions_and_are_held_out():
    made = {
        split: ENVIRONMENTS.get("code").dataset({"num_test": 5, "complete": True}, DataConfig(), split, 1)
        for split in ("train", "test")
    }
    texts = {split: {prompt.messages[0]["content"] for prompt in prompts} for split, prompts in made.items()}
    assert not texts["train"] & texts["test"] and len(texts["test"]) == 5 and len(texts["train"]) == 2000
    for prompt in made["test"]:
        assert len(prompt.extra["tests"]) == len(INPUTS)
        assert played(prompt, prompt.extra["solution"], complete=True)[0] == 1.0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"entry_point": "a b"}, "field 'entry_point' is 'a b'"),
        ({"tests": []}, "wanted a list of cases that is not empty"),
        ({"tests": 5}, "field 'tests' is 5, wanted a list"),
        ({"tests": [{"args": 1, "expected": 2}]}, "case 0 is"),
        ({"tests": [{"input": [1], "expected": 2}]}, "case 0 is"),
        ({"tests": [{"args": [1]}]}, "case 0 is"),
        ({"tests": "assert ("}, "is no Python"),
        ({"tests": "assert True"}, "neither names 'add' nor defines check"),
        ({"entry_point": "class"}, "field 'entry_point' is 'class'"),
        ({"context": ["import os"]}, "wanted Python text"),
    ],
)
def test_a_row_that_cannot_be_judged_is_refused_by_its_line(tmp_path, change, told):
    with pytest.raises(UserError, match=r"train\.jsonl:1: .*" + told):
        rows(tmp_path, {**ROW, **change})


def test_a_sandbox_that_fails_gives_no_score(tmp_path, monkeypatch):
    monkeypatch.setattr(code, "judge", Mock(side_effect=SandboxError("no memory")))
    with pytest.raises(RetryableError, match="no memory"):
        played(rows(tmp_path, ROW)[0], RIGHT)


def test_verdicts_are_kept():
    before = judge.cache_info().hits
    for _ in range(3):
        judge("def f(): return 1", "f", '[{"expected": 1}]')
    assert judge.cache_info().hits == before + 2
