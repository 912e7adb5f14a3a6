"""Whole GSM8K problems: from files, from a folder through the datasets package, and their check."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from skyrl.config.schema import DataConfig, EnvConfig
from skyrl.envs import ENVIRONMENTS, make_environment
from skyrl.types import UserError

REPO = Path(__file__).parents[2]
ROW = {"question": "How much is 48/2? ", "answer": "It is 48/2=<<48/2=24>>24.\n#### 24"}


@pytest.fixture
def files(tmp_path):
    for name, rows in (("train", [ROW, {**ROW, "answer": "#### 1,000"}]), ("test", [ROW])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def dataset(path, split="train", eval_path="", max_prompts=0, **options):
    data = DataConfig(path=str(path), eval_path=str(eval_path), max_prompts=max_prompts)
    return ENVIRONMENTS.get("gsm8k").dataset(options, data, split, 0)


def step(prompt, text, **options):
    env = make_environment(EnvConfig(name="gsm8k", options=options))
    env.reset(prompt)
    result = env.step(text)
    assert result.done
    return result.reward, result.metrics["correct:mean"]


def test_prompts(files):
    first, second = dataset(files / "train.jsonl")
    assert first.messages[0]["content"].startswith("How much is 48/2?\nThink step by step.")
    assert first.extra == {
        "answer": "24",
        "solution": "It is 48/2=24.\n#### 24",
        "source": f"{files / 'train.jsonl'}:1",
    }
    assert (first.uid, second.uid, second.extra["answer"]) == ("gsm8k/train/0", "gsm8k/train/1", "1,000")
    assert [p.uid for p in dataset(files / "train.jsonl", "test")] == ["gsm8k/test/0"]
    assert len(dataset(files / "train.jsonl", max_prompts=1)) == 1
    plain = dataset(files / "train.jsonl", instruction="", system="Be brief.")[0]
    assert [m["role"] for m in plain.messages] == ["system", "user"]
    assert plain.messages[1]["content"] == "How much is 48/2?"


def test_check(files):
    prompt, thousand = dataset(files / "train.jsonl")
    assert step(prompt, "so\n#### 24") == (1.0, 1.0) and step(prompt, "so\n#### 25") == (0.0, 0.0)
    assert step(prompt, "24") == (0.0, 0.0) and step(prompt, "24", reward="math_last_number") == (1.0, 0.0)
    assert step(thousand, "#### $1000.00") == (1.0, 1.0)
    assert step(prompt, "#### 7", reward="format") == (1.0, 0.0)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "?"}, ":2: field 'answer' is missing; fields of this row: question"),
        ({"question": 3, "answer": "#### 1"}, ":2: field 'question' is int"),
        ({"question": "?", "answer": "24"}, ":2: field 'answer' does not end with '#### <number>'"),
    ],
)
def test_bad_rows(tmp_path, row, message):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError) as caught:
        dataset(path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_without_data():
    with pytest.raises(UserError, match="data.path is empty"):
        dataset("")
    with pytest.raises(UserError, match="data.path='nowhere.jsonl': no such file"):
        dataset("nowhere.jsonl")


def test_real_problems(gsm8k):
    for split, count in (("train", 7473), ("test", 1319)):
        prompts = dataset(gsm8k / "train.jsonl", split)
        assert len(prompts) == count and not any("<<" in p.extra["solution"] for p in prompts)
        for prompt in prompts:
            assert step(prompt, prompt.extra["solution"]) == (1.0, 1.0), prompt
            assert step(prompt, f"#### {prompt.extra['answer']}1") == (0.0, 0.0), prompt


def test_a_folder_is_refused_with_the_name_of_a_file_in_it(files):
    with pytest.raises(UserError, match="is a folder; give one of its files, such as test.jsonl"):
        dataset(files)


def test_data_set_id_without_the_package():
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "import skyrl.tasks; from skyrl.config.schema import DataConfig; from skyrl.envs import ENVIRONMENTS\n"
        "from skyrl.types import UserError\n"
        "try: ENVIRONMENTS.get('gsm8k').dataset({}, DataConfig(path='openai/gsm8k'), 'train', 0)\n"
        "except UserError as error: print(error)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("data.path='openai/gsm8k' is a data set id: the package 'datasets' is not"), done
    assert "pip install 'skyrl-spmd[data]'" in done.stdout
