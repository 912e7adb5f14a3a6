"""GSM8K's annotated calculations: normalised, checked, different, and split by the files."""

import json
import re
from fractions import Fraction

import pytest

from skyrl.config.schema import DataConfig, EnvConfig
from skyrl.envs import ENVIRONMENTS, make_environment
from skyrl.envs.data_files import read_examples
from skyrl.tasks.expressions import Expressions, collect_expressions, decimal, normalise
from skyrl.types import UserError


def dataset(path, split="train", **options):
    max_prompts = options.pop("max_prompts", 0)
    data = DataConfig(path=str(path), max_prompts=max_prompts)
    return ENVIRONMENTS.get("gsm8k_expressions").dataset(options, data, split, 0)


def write(path, *annotations):
    path.write_text("".join(json.dumps({"question": "?", "answer": f"a <<{a}>> b"}) + "\n" for a in annotations))


def test_normalising():
    assert normalise("$1,200 * .50 + 007.10") == "1200*0.5+7.1"
    assert normalise("0.0 - 10 + 5.") == "0-10+5"
    assert decimal(Fraction(-1, 4)) == "-0.25" and decimal(Fraction(24)) == "24" and decimal(Fraction(1, 3)) is None
    assert decimal(Fraction(1, 1000000)) == "0.000001" and decimal(Fraction(1, 10000000)) is None


def test_what_is_taken_and_what_is_counted():
    found = Expressions()
    for annotation in [
        "48/2=24",
        "48 / 2 = $24",
        "0.5*8=4",
        ".5*8=4.00",
        "$1,000+1=1,001",
        "20%*50=10",
        "3x4=12",
        "2-5=-3",
        "3/4=3/4",
    ] + ["1/3=.33", "1/3=1/3", "2+2=5", "7=7", "-7=-7", "1+", "1+1", "a+b=c", "1//2=0", "1/0=1", "=3", ""]:
        found.add(annotation, "f:1")
    assert {text: answer for text, (answer, _) in found.answers.items()} == {
        "48/2": "24",
        "0.5*8": "4",
        "1000+1": "1001",
        "20%*50": "10",
        "3*4": "12",
        "2-5": "-3",
        "3/4": "0.75",
    }
    assert (found.annotations, found.repeated, found.malformed) == (21, 2, 7)
    assert (found.wrong, found.endless, found.trivial) == (2, 1, 2)
    assert str(found).startswith("7 expressions of 21 annotations (2 repeated, 7 malformed")


def test_held_out_is_what_training_lacks(tmp_path):
    write(tmp_path / "train.jsonl", "1+1=2", ".5*2=1")
    write(tmp_path / "test.jsonl", "0.50*2=1", "1+2=3", "1 + 1=2", "10+20+30=60")
    prompts = dataset(tmp_path / "train.jsonl", "test")
    assert [(p.messages[0]["content"], p.extra["solution"]) for p in prompts] == [("1+2=", "3"), ("10+20+30=", "60")]
    assert prompts[0].extra["source"] == f"{tmp_path / 'test.jsonl'}:2"
    assert prompts[0].extra["counts"].endswith("2 of them not in the training file")
    assert dataset(tmp_path / "train.jsonl", "test", max_prompts=1) == prompts  # held out from the whole file
    assert len(dataset(tmp_path / "train.jsonl", "test", max_characters=5)) == 1
    write(tmp_path / "test.jsonl", "1+1=2")
    with pytest.raises(UserError, match="no test expression left of 1 expressions of 1 annotations"):
        dataset(tmp_path / "train.jsonl", "test")


def test_check(tmp_path):
    write(tmp_path / "train.jsonl", "2-2.5=-.5")
    prompt = dataset(tmp_path / "train.jsonl")[0]
    env = make_environment(EnvConfig(name="gsm8k_expressions"))
    assert env.reset(prompt) == [{"role": "user", "content": "2-2.5="}]
    for text, correct in [("-0.5", 1), ("-.50\n", 1), ("0.5", 0), ("2-2.5", 0), ("-1/2", 0), ("-0.5 -0.5", 0), ("", 0)]:
        result = env.step(text)
        assert (result.reward, result.metrics["correct:mean"]) == (correct, correct), text


def test_real_data(gsm8k):
    train, test = dataset(gsm8k / "train.jsonl"), dataset(gsm8k / "train.jsonl", "test")
    questions = [{p.messages[0]["content"] for p in prompts} for prompts in (train, test)]
    assert len(questions[0]) == len(train) == 10506 and len(questions[1]) == len(test) == 1321
    assert not questions[0] & questions[1]
    for prompt in [*train, *test]:  # once more, with Python's own parser
        expression = re.sub(r"\d+\.?\d*", lambda m: f"Fraction('{m[0]}')", prompt.messages[0]["content"][:-1])
        assert eval(expression, {"Fraction": Fraction}) == Fraction(prompt.extra["answer"]), prompt
    found = collect_expressions(read_examples(gsm8k / "train.jsonl"))
    parts = (found.repeated, found.malformed, found.wrong, found.endless, found.trivial)
    assert found.annotations == 23716 == len(train) + sum(parts)
