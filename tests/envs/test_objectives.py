"""Named objectives: what is checked of them, rewards of a whole group, and the pieces that are in the box."""

import json

import numpy as np
import pytest

from skyrl.api import Environment, Prompt, StepResult, UserError, register_environment, register_reward
from skyrl.config.schema import DataConfig, EnvConfig, RunConfig
from skyrl.data import make_prompts
from skyrl.envs import ENVIRONMENTS, Guard, make_environment
from skyrl.envs.base import chosen_rewards, group_rewards_of
from skyrl.envs.rewards import REWARDS
from skyrl.workers.calls import LocalCalls
from skyrl.workers.pool import WorkerPool

PROMPT = Prompt(
    "play/train/7", "play", [{"role": "user", "content": "2+2="}], {"answer": "4", "source": "rows.jsonl:8"}
)


@pytest.fixture(autouse=True)
def own_names():
    """What a test registers is gone after it."""
    before = [(registry, dict(registry._things)) for registry in (ENVIRONMENTS, REWARDS)]
    yield
    for registry, things in before:
        registry._things = things


def single(reward, **more):
    return EnvConfig(name="single_turn", options={"reward": reward}, on_error="mask", **more)


def step(cfg, text="4"):
    env = make_environment(cfg)
    env.reset(PROMPT)
    return Guard(cfg).call(env.step, text, prompt=PROMPT)


def test_several_rewards_are_named_objectives_and_one_is_a_number():
    @register_reward("both")
    def both(text, prompt):
        return {"accuracy": True, "brevity": np.float32(0.1)}

    assert step(single("exact")).value.reward == 1.0
    assert step(single(["exact"])).value.reward == {"exact": 1.0}
    assert step(single("both")).value.reward == {"accuracy": 1.0, "brevity": 0.1}
    result = step(single(["exact", "both", {"name": "length", "target": 2}]), "4444").value
    assert result.reward == {"exact": 0.0, "accuracy": 1.0, "brevity": 0.1, "length": -1.0}
    assert result.metrics == {"correct:mean": 0.0, "off_target:mean": 1.0}  # right: by the first one


@pytest.mark.parametrize(
    "value, line",
    [
        ({"a": float("nan")}, "nan as reward['a'], wanted a finite number"),
        ({"a": None}, "None as reward['a'], wanted a number"),
        ({"a": "1"}, "'1' as reward['a'], wanted a number"),
        ({"a": [1.0]}, "[1.0] as reward['a'], wanted a number"),
        ({"a": 1e31}, "wanted a number of at most 1e+30"),
        ({"a": {"b": 1.0}}, "{'b': 1.0} as reward['a']"),
        ({1: 1.0}, "an objective called 1, wanted a name"),
        ({"a:mean": 1.0}, "an objective called 'a:mean', wanted a name"),
        ({"": 1.0}, "an objective called ''"),
        ([1.0, 2.0], "[1.0, 2.0] as reward, wanted a number"),
    ],
)
def test_an_objective_that_is_no_number_is_named_with_plugin_and_place(value, line):
    @register_reward("bad")
    def bad(text, prompt):
        return value

    invalid = step(single("bad")).invalid
    assert line in invalid and "reward bad" in invalid and "prompt play/train/7 (rows.jsonl:8)" in invalid


def test_what_is_wrong_with_one_of_several_rewards_names_that_one():
    @register_reward("raises")
    def raises(text, prompt):
        return 1 / 0

    @register_reward("again")
    def again(text, prompt):
        return {"exact": 0.5}

    assert "(reward raises), prompt" in step(single(["exact", "raises"])).invalid
    assert "None as reward['none']" in step(single(["exact", _registered("none", lambda text, prompt: None)])).invalid
    invalid = step(single(["exact", "again"])).invalid
    assert "objective 'exact' is given twice; let reward 'again' return another name" in invalid


@pytest.mark.parametrize("reward", ["empty", ["empty"], ["exact", "empty"]])
def test_a_reward_without_an_objective_is_refused(reward):
    _registered("empty", lambda text, prompt: {})
    assert "(rows.jsonl:8): raised ValueError: reward 'empty' gives no objective" in step(single(reward)).invalid


def _registered(name, function, **more):
    register_reward(name, **more)(function)
    return name


@pytest.mark.parametrize(
    "reward, line",
    [
        ([{"length": 0.5}], r"env.options.reward.0.={'length': 0.5}: give the name of a reward, or {name: ..., option"),
        ({"name": "length"}, "env.options.reward.target: reward 'length' needs it"),
        ([{"name": "length", "target": 3, "n": 1}], r"reward.0..n: reward 'length' .*; it has: target, tolerance$"),
        (["exact", {"name": "math", "n": 1}], r"reward.1..n: reward 'math' has no such option; it has: none$"),
        ({"name": "length", "target": "3"}, "reward.target='3': reward 'length' wants int here"),
        (3, "env.options.reward=3: environment 'single_turn' wants str . dict.str, Any. . list"),
        (["exact", "exact"], "wanted the name of a reward, or a list of different ones"),
        ([], "wanted the name of a reward"),
        (["exat"], "no reward called 'exat'; choose one of: .*exact"),
        ("length", "env.options.reward.target: reward 'length' needs it"),
    ],
)
def test_options_of_rewards_are_checked_before_anything_is_played(reward, line):
    with pytest.raises(UserError, match=line):
        make_environment(single(reward))


def test_names_are_known_where_rewards_say_them():
    @register_reward("declared", objectives=["a", "b"])
    def declared(text, prompt):
        return {"a": 1.0, "b": 0.0}

    @register_reward("unknown")
    def unknown(text, prompt):
        return 1.0

    names = ENVIRONMENTS.get("single_turn").objective_names
    assert names({"reward": ["exact", "declared", "diversity"]}) == ["exact", "a", "b", "diversity"]
    assert names({"reward": "declared"}) == ["a", "b"] and names({"reward": ["exact", "unknown"]}) == []
    assert not names({"reward": "exact"})


def test_a_row_without_an_answer_is_refused_for_one_of_several_rewards(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2="}\n')

    def rows(*rewards):
        cfg = RunConfig(env=EnvConfig("single_turn", {"reward": [*rewards]}), data=DataConfig(path=str(path)))
        return make_prompts(cfg, "train")

    with pytest.raises(UserError, match="rows.jsonl:2: field 'answer' is missing"):
        rows("tags", "exact")
    assert len(rows("tags", "repetition")) == 2


# ---- rewards of a whole group


@register_environment("game_of_groups")
class Game(Environment):
    """Two turns, with rewards of a group beside its own."""

    def step(self, text):
        return StepResult(float(len(text)), True)

    @classmethod
    def group_rewards(cls, options):
        return ["diversity", "first_letter"]


@register_reward("first_letter", group=True)
async def first_letter(texts, prompt, *, letter="a"):
    return [{"starts": text.startswith(letter), "number": len(texts)} for text in texts]


def score(cfg, texts, workers=False):
    with WorkerPool(cfg, ()) if workers else LocalCalls(cfg) as calls:
        try:
            calls.score(3, PROMPT, texts)
            while True:
                for answer in calls.poll(wait=True):
                    assert answer.key == 3
                    return answer.outcome
        finally:
            if workers:
                calls.shut()


@pytest.mark.parametrize("workers", [False, True])
def test_a_group_is_scored_at_once_by_several_rewards(workers):
    register_environment("game_of_groups")(Game) if "game_of_groups" not in ENVIRONMENTS else None
    outcome = score(EnvConfig(name="game_of_groups"), ["a b", "a c", "b"], workers)
    assert [one["starts"] for one in outcome.value] == [1.0, 1.0, 0.0] and outcome.value[0]["number"] == 3.0
    np.testing.assert_allclose([one["diversity"] for one in outcome.value], [7 / 12, 5 / 6, 3 / 4])
    bad = EnvConfig(name="single_turn", options={"reward": [_registered("short", lambda t, p: [1.0], group=True)]})
    with pytest.raises(
        UserError, match="group reward short, prompt play/train/7 .*: returned 1 scores for 2 texts, wan"
    ):
        score(bad, ["a", "b"], workers)


@pytest.mark.parametrize(
    "value, line",
    [
        ([1.0, 2.0, 3.0], "3 scores for 2 texts, wanted one for each"),
        (1.0, "1.0, wanted a list with a number, or named objectives, for each text"),
        (None, "None, wanted a list"),
        ({"a": [1.0, 2.0]}, "wanted a list"),
        ([1.0, float("nan")], "nan as the score of text 1, wanted a finite number"),
        ([{"a": 1.0}, {"a": float("inf")}], "inf as the score of text 1['a'], wanted a finite number"),
        ([{"a": 1.0}, {"b": 1.0}], "['b'] for text 1 and ['a'] for text 0; give all the same"),
        ([{"a": 1.0}, 1.0], "['group'] for text 1 and ['a'] for text 0"),
        ([{"a": 1.0}, {"a": 1.0, "b": 1.0}], "['a', 'b'] for text 1 and ['a'] for text 0"),
        (np.zeros((2, 1)), "wanted a list"),
        (["x", "y"], "'x' as the score of text 0, wanted a number"),
    ],
)
def test_scores_of_a_group_that_are_none_are_named(value, line):
    outcome = score(single([_registered("group", lambda texts, prompt: value, group=True)]), ["a", "b"])
    assert line in outcome.invalid and outcome.invalid.startswith("group reward group, prompt play/train/7 (rows.jsonl")


def test_scores_of_a_group_may_be_an_array():
    cfg = single(["exact", _registered("group", lambda texts, prompt: np.float32([0.1, 2.0]), group=True)])
    assert [one["group"] for one in score(cfg, ["a", "b"]).value] == pytest.approx([0.1, 2.0])
    assert step(cfg).value.reward == {"exact": 1.0}  # the group's part comes when all have ended


def test_a_group_reward_must_be_one():
    @register_environment("no_group")
    class NoGroup(Game):
        @classmethod
        def group_rewards(cls, options):
            return ["exact"]

    with pytest.raises(UserError, match="env.name=no_group: .* reward 'exact' is not of a group"):
        group_rewards_of(EnvConfig(name="no_group"))
    assert not group_rewards_of(EnvConfig(name="guess_number"))


# ---- in the box


def value(name, text, extra=None, **params):
    prompt = Prompt("p", "e", [], extra or {})
    ((reward, checked),) = chosen_rewards({**params, "name": name})
    return reward(text, prompt, **checked)


def test_lengths():
    assert [value("length", "x" * n, target=4, tolerance=1) for n in (4, 5, 3, 7, 0, 40)] == [0, 0, 0, -0.5, -0.75, -1]
    assert [value("overlong", "x" * n, limit=10, margin=4) for n in (0, 6, 8, 10, 99)] == [0, 0, -0.5, -1, -1]
    assert [value("overlong", "x" * n, limit=10) for n in (10, 11)] == [0, -1]


def test_repetition():
    assert value("repetition", "a b c d e", n=2) == 0.0 == value("repetition", "", n=2) == value("repetition", "a")
    assert value("repetition", "a b a b a b", n=2) == pytest.approx(-3 / 5)
    assert value("repetition", "1111", n=1) == 0.0 and value("repetition", "1111", n=1, characters=True) == -0.75


def test_tags():
    right = "<think>a\nb</think>\n<answer>4</answer>"
    assert value("tags", right) == value("tags", f" {right}\n") == 1.0
    for wrong in (right + "x", "<answer>4</answer><think></think>", right + right, "<think>a<answer>4</answer>", ""):
        assert value("tags", wrong) == 0.0, wrong
    assert value("tags", "<a.b>x</a.b>", names=["a.b"]) == 1.0 and value("tags", "<a-b>x</a-b>", names=["a.b"]) == 0.0
    assert value("tags", "12", pattern=r"\d+") == 1.0 and value("tags", "12.", pattern=r"\d+") == 0.0


def test_tool_calls():
    def call(name="add", **arguments):
        return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"

    schema = {"properties": {"a": {}, "b": {}}, "required": ["a"]}
    tools = {"tools": [{"type": "function", "function": {"name": "add", "parameters": schema}}]}
    for text in ("no call", call(a=1), "so:" + call(a=1, b=2) + call(a=3)):
        assert value("tool_calls", text, tools) == 0.0, text
    for text in (
        call("sub", a=1),
        call(b=2),
        call(a=1, c=3),
        "<tool_call>{}</tool_call>",
        "<tool_call>add(1)</tool_call>",
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": 1}}',
        "</tool_call>",
        "<tool_call>" + "[" * 100000,
    ):
        assert value("tool_calls", text, tools) == -1.0, text
    assert value("tool_calls", call(a=1) + "<tool_call>" + call(a=2), tools) == pytest.approx(-1 / 3)
    assert value("tool_calls", call("anything", z=1)) == 0.0


def test_diversity_counts_what_samples_share():
    assert value("diversity", ["a b", "a b"]) == [0.0, 0.0] and value("diversity", ["a", "b"]) == [1.0, 1.0]
    assert value("diversity", ["a"]) == [1.0] and value("diversity", ["", ""]) == [0.0, 0.0]
    assert value("diversity", ["12", "23"], characters=True) == pytest.approx([2 / 3, 2 / 3])
