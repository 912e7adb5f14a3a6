"""Reading rows: every complaint names file:line."""

import pytest

from skyrl.config.schema import DataConfig
from skyrl.envs import jsonl
from skyrl.envs.jsonl import Row, data_file, read_jsonl, read_prompts
from skyrl.types import UserError


@pytest.fixture
def write(tmp_path):
    def write(content, name="rows.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def complaint(path, read=lambda path: list(read_jsonl(path))):
    with pytest.raises(UserError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_know_their_place(write):
    path = write('\ufeff{"a": "\u00e9"}\r\n{"a": "2"}\n{"a": 3}\n\n \n')
    assert list(read_jsonl(path)) == [
        Row(f"{path}:1", {"a": "\u00e9"}),
        Row(f"{path}:2", {"a": "2"}),
        Row(f"{path}:3", {"a": 3}),
    ]
    assert len(list(read_jsonl(path, 2))) == 2
    assert [row.text("a") for row in read_jsonl(path, 1)] == ["\u00e9"]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"a": 1}\n{"a": \n', ":2: no JSON ("),
        ('{"a": 1}\n\n{"a": 1}\n', ":2: blank line"),
        ("[1]\n", ":1: a list, wanted an object"),
        (b'{"a": 1}\n{"a": "\xff"}\n', ":2: no UTF-8 text"),
        ('{"a": ' + "[" * 100000, ":1: "),
    ],
)
def test_bad_lines(write, content, message):
    path = write(content)
    assert complaint(path).startswith(f"{path}{message}")


def test_bad_files(write, tmp_path, monkeypatch):
    assert "has no rows" in complaint(write("\n"))
    assert "does not exist" in complaint(tmp_path / "none.jsonl")
    assert "is a folder" in complaint(tmp_path)
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 2**20)
    path = write(b'{"a": 1}\n{"a": "' + b"x" * 2**20 + b'"}\n')
    assert complaint(path).startswith(f"{path}:2: longer than 1 MiB")


def test_missing_and_wrong_fields():
    row = Row("f.jsonl:7", {"question": "?", "answer": 3})
    assert complaint("anser", row.text) == "f.jsonl:7: field 'anser' is missing; fields of this row: answer, question"
    assert complaint("answer", row.text) == "f.jsonl:7: field 'answer' is int, wanted a string"


@pytest.mark.parametrize(
    "second, message",
    [
        ('{"text": "x"}', "field 'messages' or 'prompt' is missing; fields of this row: text"),
        ('{"prompt": 3}', "field 'prompt' is int"),
        ('{"prompt": "x", "messages": []}', "has both"),
        ('{"messages": []}', "field 'messages' must be a list with at least one message"),
        ('{"messages": [{"role": "user"}]}', "field 'messages' has no role and content in entry 0"),
        ('{"messages": [{"role": "bot", "content": ""}]}', "field 'messages' has role 'bot' in entry 0"),
        ('{"messages": [{"role": "user", "content": [1]}]}', "field 'messages' has a list as content of entry 0"),
    ],
)
def test_prompts_of_the_wrong_form(write, second, message):
    path = write('{"prompt": "ok"}\n' + second)
    assert complaint(path, lambda path: read_prompts(path, "e", "train")).startswith(f"{path}:2: {message}")


def test_which_file_a_split_is(write, tmp_path):
    train, test, other = (write("{}\n", name) for name in ("g_train.jsonl", "g_test.jsonl", "other.jsonl"))
    assert data_file(DataConfig(path=str(train)), "train") == train
    assert data_file(DataConfig(path=str(train)), "test") == test
    assert data_file(DataConfig(path=str(train), eval_path=str(other)), "test") == other
    test.unlink()
    assert "g_test.jsonl' does not exist" in complaint(train, lambda p: data_file(DataConfig(path=str(p)), "test"))
    for data, split, message in [
        (DataConfig(), "train", "data.path is empty"),
        (DataConfig(path=str(other)), "test", "data.eval_path is empty: "),
        (DataConfig(path=str(tmp_path / "no.jsonl")), "train", "data.path='"),
        (DataConfig(path=str(other), eval_path="no.jsonl"), "test", "data.eval_path='no.jsonl': no such file"),
        (DataConfig(path=str(tmp_path)), "train", "data.path='"),
    ]:
        assert complaint(data, lambda data, split=split: data_file(data, split)).startswith(message)
