"""Order and checks of prompts."""

import collections
import dataclasses
import json

import pytest

from skyrl.config.schema import DataConfig, EnvConfig, EvalConfig, RunConfig
from skyrl.data import PromptStream, make_prompts, make_splits
from skyrl.envs.base import ENVIRONMENTS, Environment, register_environment
from skyrl.envs.data_files import read_examples
from skyrl.types import Prompt, UserError

GOLDEN = [3, 5, 2, 9, 7, 0, 8, 6, 1, 4, 0, 6, 5, 3, 4, 9, 7, 8, 2, 1]


def prompts(n):
    return [Prompt(f"e/train/{i}", "e", [{"role": "user", "content": str(i)}]) for i in range(n)]


def uids(stream, positions):
    return [stream.at(i).uid for i in positions]


def test_each_epoch_is_a_new_permutation():
    stream = PromptStream(prompts(50), seed=3, shuffle=True)
    epochs = [uids(stream, range(e * 50, e * 50 + 50)) for e in range(20)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 50 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20
    assert len(stream) == 50


def test_position_alone_decides():
    """Any rank, any order of asking, any restart: the same prompt at the same position."""
    reference = uids(PromptStream(prompts(13), 7, True), range(100))
    scattered = PromptStream(prompts(13), 7, True)
    order = [(i * 37) % 100 for i in range(100)]
    assert dict(zip(order, uids(scattered, order), strict=True)) == dict(enumerate(reference))
    for world_size in (1, 2, 4):
        ranks = [PromptStream(prompts(13), 7, True) for _ in range(world_size)]
        assert [ranks[i % world_size].at(i).uid for i in range(100)] == reference
    assert uids(PromptStream(prompts(13), 7, True), range(61, 100)) == reference[61:]
    assert uids(PromptStream(prompts(13), 8, True), range(100)) != reference


def test_order_does_not_change_between_versions():
    stream = PromptStream(prompts(10), seed=1, shuffle=True)
    assert [stream.index(i) for i in range(20)] == GOLDEN


def test_permutations_are_even():
    stream = PromptStream(prompts(4), seed=0, shuffle=True)
    first = collections.Counter(tuple(stream.index(e * 4 + i) for i in range(4)) for e in range(2400))
    assert len(first) == 24 and all(50 < count < 160 for count in first.values())  # 100 each, 5 sigma


def test_without_shuffle_and_at_the_edges():
    stream = PromptStream(prompts(3), seed=1, shuffle=False)
    assert [stream.index(i) for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert PromptStream(prompts(1), 1, True).at(10**12).uid == "e/train/0"
    assert PromptStream(prompts(3), -1, True).at(0).uid.startswith("e/")
    orders = {tuple(map(PromptStream(prompts(30), s, True).index, range(30))) for s in (-1, -2, 2**63, 2**63 + 1, 0)}
    assert len(orders) == 5  # no seed is rounded to another
    with pytest.raises(IndexError):
        stream.at(-1)
    with pytest.raises(UserError, match="no prompts"):
        PromptStream([], 1, True)


def test_make_prompts_of_a_file(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}", "answer": "{i}"}}\n' for i in range(5)))
    env = EnvConfig(name="single_turn", options={"reward": "exact"})
    cfg = RunConfig(env=env, data=DataConfig(path=str(path), eval_path=str(path), max_prompts=3))
    assert [p.extra["source"] for p in make_prompts(cfg, "train")] == [f"{path}:{i}" for i in (1, 2, 3)]
    assert len(make_prompts(cfg, "test")) == 5  # max_prompts is about training
    path.write_text('{"prompt": "1"}\n{"text": "2"}\n')
    with pytest.raises(UserError, match=r"train.jsonl:2: field 'messages' or 'prompt' is missing"):
        make_prompts(RunConfig(env=env, data=DataConfig(path=str(path))), "train")
    assert len(list(read_examples(path))) == 2


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("null", "is missing, and this reward needs it"), ('" "', "is ' ', wanted a text or a number"),
        ("[1]", "is '[1]'"), ('{"a": 1}', "is \"{'a': 1}\""), ("1", ""), ("0", ""), ("false", ""), ('"x"', ""),
    ],
)  # fmt: skip
def test_a_row_without_an_answer_is_refused_before_it_is_played(tmp_path, answer, said):
    path = tmp_path / "train.jsonl"
    path.write_text(f'{{"prompt": "1", "answer": 2}}\n{{"prompt": "1", "answer": {answer}}}\n')
    for reward in ("exact", "characters", "number", "math", "math_last_number"):
        env = EnvConfig(name="single_turn", options={"reward": reward})
        cfg = RunConfig(env=env, data=DataConfig(path=str(path)))
        if said:
            with pytest.raises(UserError) as error:
                make_prompts(cfg, "train")
            assert str(error.value).startswith(f"{path}:2: field 'answer' {said}")
        else:
            assert len(make_prompts(cfg, "train")) == 2
    free = EnvConfig(name="single_turn", options={"reward": "format"})
    assert len(make_prompts(RunConfig(env=free, data=DataConfig(path=str(path))), "train")) == 2


def test_make_prompts_of_an_environment():
    cfg = RunConfig(env=EnvConfig(options={"num_train": 40}), data=DataConfig(max_prompts=7), seed=5)
    assert len(make_prompts(cfg, "train")) == 7 and len(make_prompts(cfg, "test")) == 512
    assert list(make_prompts(cfg, "train")) == list(make_prompts(cfg, "train"))
    with pytest.raises(UserError, match="env.options.digits: environment 'arithmetic' has no such option"):
        make_prompts(RunConfig(env=EnvConfig(options={"digits": 3})), "train")
    with pytest.raises(UserError, match="data.max_prompts=-1"):
        make_prompts(RunConfig(data=DataConfig(max_prompts=-1)), "train")


@register_environment("test_given")
class Given(Environment):
    given: list = []

    @classmethod
    def dataset(cls, options, data, split, seed):
        return cls.given


def test_prompts_of_a_users_environment_are_checked():
    messages = [{"role": "user", "content": "?"}]
    good = Prompt("a", "test_given", messages)
    for given, complaint in [
        ([], "dataset() has no train prompts"),
        ([good, "x"], "train prompt 1 of its dataset() is a str"),
        ([good, good], "train prompt 1 of its dataset() has uid 'a', which another one has"),
        ([Prompt("a", "other", messages)], "has env 'other', wanted 'test_given'"),
        ([Prompt("a", "test_given", [])], "messages must be a list with at least one message"),
        ([Prompt("a", "test_given", [{"role": "user"}])], "messages has no role and content"),
    ]:
        ENVIRONMENTS.get("test_given").given = given
        with pytest.raises(UserError) as caught:
            make_prompts(RunConfig(env=EnvConfig(name="test_given")), "train")
        assert complaint in str(caught.value) and str(caught.value).startswith("env.name=test_given: ")


def rows_file(folder, count=40):
    path = folder / "own.jsonl"
    lines = [json.dumps({"prompt": f"{i % 35}+1=", "answer": str(i % 35 + 1)}) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_without_a_held_out_file_rows_are_held_out_by_hash(tmp_path):
    data = DataConfig(path=str(rows_file(tmp_path)))
    cfg = RunConfig(env=EnvConfig(name="single_turn", options={"reward": "exact"}), data=data)
    parts, line = make_splits(cfg)
    texts = {split: {prompt.messages[0]["content"] for prompt in part} for split, part in parts.items()}
    assert not texts["train"] & texts["test"] and len(texts["train"] | texts["test"]) == 35  # equal rows stay together
    assert 4 <= len(parts["test"]) <= 8 and line.startswith(f"held out by hash: {len(parts['test'])} of the 40 rows of")
    assert make_splits(cfg)[0]["test"] == parts["test"]
    beside = tmp_path / "own_train.jsonl"
    beside.write_bytes((tmp_path / "own.jsonl").read_bytes())
    (tmp_path / "own_test.jsonl").write_text('{"prompt": "x", "answer": "y"}\n')
    own, none = make_splits(dataclasses.replace(cfg, data=DataConfig(path=str(beside))))
    assert len(own["train"]) == 40 and len(own["test"]) == 1 and none == ""
    never = make_splits(dataclasses.replace(cfg, eval=EvalConfig(every_steps=0)))
    assert len(never[0]["train"]) == 40 and never[0]["test"] == [] and "nothing is evaluated" in never[1]


def test_one_made_task_is_not_trained_on_and_held_out():
    game = EnvConfig(name="tic_tac_toe", options={"opening": 0}, max_turns=6)
    with pytest.raises(
        UserError, match="env.name=tic_tac_toe makes one task, 'You are X.*trained on and held out: set ev"
    ):
        make_splits(RunConfig(env=game))
    parts, line = make_splits(RunConfig(env=game, eval=EvalConfig(every_steps=0)))
    assert len(parts["train"]) == 1 and parts["test"] == [] and "nothing is evaluated" in line
    assert len(make_splits(RunConfig(env=dataclasses.replace(game, options={})))[0]["test"]) > 1
    assert len(make_prompts(RunConfig(env=game), "test")) == 1, "another model may be evaluated on it"


def test_a_dataset_that_fails_is_one_line_with_its_place(monkeypatch):
    cfg = RunConfig(env=EnvConfig(name="test_given"))
    for give, said in ((lambda: 1 / 0, "raised ZeroDivisionError: division by zero at "), (lambda: None, "a NoneType")):
        monkeypatch.setattr(
            ENVIRONMENTS.get("test_given", ""), "dataset", classmethod(lambda cls, *_, give=give: give())
        )
        with pytest.raises(UserError, match="env.name=test_given: its dataset") as wrong:
            make_prompts(cfg, "train")
        assert said in str(wrong.value)
