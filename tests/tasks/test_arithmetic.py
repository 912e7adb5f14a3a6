"""Arithmetic problems: right answers, disjoint splits, options."""

import asyncio
import re

import pytest

from skyrl.config.schema import DataConfig, EnvConfig
from skyrl.envs import ENVIRONMENTS, make_environment
from skyrl.envs.rewards.base import REWARDS, Reward
from skyrl.tasks.arithmetic import is_held_out
from skyrl.types import Prompt, UserError


def dataset(split="train", seed=1, **options):
    return ENVIRONMENTS.get("arithmetic").dataset(options, DataConfig(), split, seed)


def texts(prompts):
    return [prompt.messages[0]["content"] for prompt in prompts]


def operands(text):
    a, op, b = re.fullmatch(r"(\d+)([-+*])(\d+)=", text).groups()
    return a, op, b


@pytest.mark.parametrize("options", [{}, {"min_digits": 1, "max_digits": 4, "operations": "-*+", "pad": True}])
def test_answers_are_right(options):
    seen = set()
    for prompt in dataset(num_train=3000, **options):
        a, op, b = operands(prompt.messages[0]["content"])
        wanted = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op]
        assert prompt.extra == {"answer": str(wanted), "solution": str(wanted)} and wanted >= 0
        assert not options or len(a) == len(b) == 4
        seen.add(op)
    assert seen == set(options.get("operations", "+"))


def test_digits_reverse_and_padding():
    for prompt in dataset(num_train=500, min_digits=3, max_digits=3, second_digits=1, operations="*", reverse=True):
        a, _, b = operands(prompt.messages[0]["content"])
        assert len(a) == 3 and len(b) == 1 and prompt.extra["answer"][::-1] == str(int(a) * int(b))
    lengths = {"+": 4, "-": 3, "*": 6}
    for prompt in dataset(num_train=500, max_digits=3, operations="+-*", pad_answer=True, reverse=True):
        a, op, b = operands(prompt.messages[0]["content"])
        assert len(prompt.extra["answer"]) == lengths[op]
        value = int(prompt.extra["answer"][::-1])
        assert value == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op]
    assert re.fullmatch(r"What is \d+ plus \d+\?", texts(dataset(template="What is {a} plus {b}?{op}"))[0][:-1])
    big = dataset(num_train=20, min_digits=18, max_digits=18, operations="*")
    a, _, b = operands(texts(big)[3])
    assert big[3].extra["answer"] == str(int(a) * int(b))


def test_splits_are_disjoint_for_any_seed_and_either_order():
    options = {"min_digits": 1, "max_digits": 2, "operations": "+-*"}
    test = {operands(text) for text in texts(dataset("test", **options))}
    for seed in (1, 2):
        train = {operands(text) for text in texts(dataset("train", seed, **options))}
        assert not test & train
        assert not {(b, op, a) for a, op, b in test if op != "-"} & train
    assert len(test) == 512 and len(train) > 5000
    assert all(is_held_out(int(a), op, int(b)) for a, op, b in test)
    share = sum(is_held_out(a, "+", b) for a in range(100) for b in range(100)) / 10**4
    assert 0.08 < share < 0.12


def test_order_is_keyed_and_problems_are_different():
    first = texts(dataset(seed=1, num_train=2000))
    assert first == texts(dataset(seed=1, num_train=2000)) and first != texts(dataset(seed=2, num_train=2000))
    assert first[:500] == texts(dataset(seed=1, num_train=500))  # more problems do not move the others
    assert texts(dataset("test", 1)) == texts(dataset("test", 2))  # runs are compared on the same problems
    assert len(set(first)) == 2000


def test_small_spaces_end():
    both = [texts(dataset(split, min_digits=1, max_digits=1)) for split in ("train", "test")]
    assert len(both[0]) + len(both[1]) == 100 == len(set(both[0] + both[1]))


def test_access_is_that_of_a_list():
    prompts = dataset(num_train=50)
    assert prompts[-1].uid == "arithmetic/train/49" and len(prompts[10:20]) == 10 and prompts[10:12][1] == prompts[11]
    assert len({prompt.uid for prompt in prompts}) == 50
    with pytest.raises(IndexError):
        prompts[50]


def play(prompt, text, **options):
    env = make_environment(EnvConfig(options=options))
    env.reset(prompt)
    return env.step(text)


def test_a_reward_that_is_awaited_has_its_least_part_too(monkeypatch):
    async def late(text, prompt):
        return 0.0

    monkeypatch.setattr(REWARDS, "_things", {**REWARDS._things, "late": Reward("late", late)})
    prompt = Prompt("p/1", "arithmetic", [], {"answer": "42"})
    assert asyncio.run(play(prompt, "41", reward="late", partial=0.1)).reward == 0.1


def test_rewards():
    prompt = dataset()[0]
    answer = prompt.extra["answer"]
    wrong = str(int(answer) + 1)
    for text, correct in [(answer, 1.0), (f" {answer}\n", 1.0), (wrong, 0.0), ("", 0.0), (answer + "0", 0.0)]:
        result = play(prompt, text)
        assert (result.reward, result.done, result.metrics) == (correct, True, {"correct:mean": correct})
    partial = play(prompt, wrong, partial=0.1)
    assert (partial.reward, partial.metrics["correct:mean"]) == (0.1, 0.0)
    assert play(prompt, answer, partial=0.1).reward == 1.0 and play(prompt, "4x", partial=0.1).reward == 0.0
    words = play(prompt, f"The answer is {answer}.", reward="last_digits")
    assert (words.reward, words.metrics["correct:mean"]) == (1.0, 1.0)
    dense = play(prompt, answer[:-1] + "x", reward="characters")
    assert 0 < dense.reward < 1 and dense.metrics["correct:mean"] == 0.0


@pytest.mark.parametrize(
    "options",
    [
        {"max_digits": 0},
        {"max_digits": 19},
        {"min_digits": 4},
        {"operations": "/"},
        {"operations": ""},
        {"partial": 1.0},
        {"before": ["You add."]},
    ]
    + [{"operations": "++"}, {"num_train": 0}, {"num_test": -1}, {"template": "{a}+{b}"}, {"second_digits": -1}]
    + [{"reward": "exat"}],
)
def test_bad_options(options):
    with pytest.raises(UserError, match=f"^env.options.{next(iter(options))}"):
        make_environment(EnvConfig(options=options))


def test_data_path_is_refused():
    with pytest.raises(UserError, match="data.path='x.jsonl': environment 'arithmetic' makes its own prompts"):
        ENVIRONMENTS.get("arithmetic").dataset({}, DataConfig(path="x.jsonl"), "train", 0)


def test_messages_stand_before_the_question_where_they_are_given():
    assert [m["role"] for m in dataset()[0].messages] == ["user"]
    assert dataset(before=[{"role": "system", "content": ""}])[0].messages[0] == {"role": "system", "content": ""}
