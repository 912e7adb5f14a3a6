"""Reading rows: every complaint names file:line."""

import bz2
import gzip
import lzma
import sys
from decimal import Decimal

import numpy as np
import pytest
import zstandard

from skyrl.config.schema import DataConfig
from skyrl.envs import data_files
from skyrl.envs.data_files import Example, data_file, is_file_path, read_examples, read_prompts
from skyrl.types import UserError


@pytest.fixture
def write(tmp_path):
    def write(content, name="rows.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def complaint(path, read=lambda path: list(read_examples(path))):
    with pytest.raises(UserError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_know_their_place(write):
    path = write('\ufeff{"a": "\u00e9"}\r\n{"a": "2"}\n{"a": 3}\n\n \n')
    assert list(read_examples(path)) == [
        Example(f"{path}:1", {"a": "\u00e9"}),
        Example(f"{path}:2", {"a": "2"}),
        Example(f"{path}:3", {"a": 3}),
    ]
    assert len(list(read_examples(path, 2))) == 2
    assert [row.text("a") for row in read_examples(path, 1)] == ["\u00e9"]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"a": 1}\n{"a": \n', ":2: no JSON ("),
        ('{"a": 1}\n\n{"a": 1}\n', ":2: blank line"),
        ("[1]\n", ":1: a list, wanted an object such as {...} (jq -c '.[]' "),
        ("a,b\n1,2\n", ":1: no JSON (Expecting value at column 1); wanted one JSON object a line (.jsonl, also as .gz"),
        (b'{"a": 1}\n{"a": "\xff"}\n', ":2: no UTF-8 text"),
        ('{"a": ' + "[" * 100000, ":1: "),
        ('{"a": 1}\n{"a": NaN}\n', ":2: a number that cannot be read (NaN is no number of JSON); write it as a string"),
        ('{"a": [-Infinity]}\n', ":1: a number that cannot be read (-Infinity is no number of JSON)"),
        ('{"a": ' + "9" * 5000 + "}\n", ":1: a number that cannot be read (Exceeds the limit (4300"),
        ('{"a": 1}\n'.encode("utf-16"), ":1: no UTF-8 text (invalid start byte at byte 0); it is UTF-16: iconv"),
    ],
)
def test_bad_lines(write, content, message):
    path = write(content)
    assert complaint(path).startswith(f"{path}{message}")


def test_bad_files(write, tmp_path, monkeypatch):
    assert "has no rows" in complaint(write("\n"))
    assert "does not exist" in complaint(tmp_path / "none.jsonl")
    assert "is a folder" in complaint(tmp_path)
    monkeypatch.setattr(data_files, "MAX_LINE_BYTES", 2**20)
    path = write(b'{"a": 1}\n{"a": "' + b"x" * 2**20 + b'"}\n')
    assert complaint(path).startswith(f"{path}:2: longer than 1 MiB")


def test_missing_and_wrong_fields():
    row = Example("f.jsonl:7", {"question": "?", "answer": 3})
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
        (
            '{"messages": [{"role": "user", "content": [1]}]}',
            "field 'messages' has a list of parts as content of entry 0",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text"}, {"type": "image"}]}]}',
            "field 'messages' has a part of type 'image'",
        ),
        ('{"prompt": "<image> what?", "images": [{"path": "a.png"}]}', "field 'images' holds what models here do not"),
    ],
)
def test_prompts_of_the_wrong_form(write, second, message):
    path = write('{"prompt": "ok"}\n' + second)
    assert complaint(path, lambda path: read_prompts(path, "e", "train")).startswith(f"{path}:2: {message}")


TEXT = b'{"prompt": [{"role": "user", "content": "2+2"}], "answer": "4"}\n{"prompt": "\xc3\xa9"}\n'


@pytest.mark.parametrize(
    "pack", [gzip.compress, bz2.compress, lzma.compress, zstandard.ZstdCompressor().compress, lambda text: text]
)
def test_packed_files_are_read_whatever_they_are_called(write, pack):
    path = write(pack(TEXT), "rows")
    one, two = read_prompts(path, "e", "train")
    assert one.messages == [{"role": "user", "content": "2+2"}] and one.extra == {"answer": "4", "source": f"{path}:1"}
    assert two.messages == [{"role": "user", "content": "\u00e9"}] and two.extra["source"] == f"{path}:2"
    twice = write(pack(TEXT) + pack(TEXT), "twice")  # pieces end to end are one file
    assert len(list(read_examples(twice))) == 4 and len(list(read_examples(twice, 3))) == 3
    if pack(TEXT) != TEXT:
        cut = complaint(write(pack(TEXT * 999)[:-30], "cut"))
        assert "cannot be read after row" in cut or cut.endswith("copy or write it again")
        assert "cannot be read after row 0" in complaint(write(pack(TEXT)[:10] + b"\0" * 30, "damaged"))


def test_formats_that_are_not_read_say_what_to_do(write):
    assert "is a zip archive" in complaint(write(b"PK\x03\x04 and more", "rows.jsonl"))
    assert "write its table as parquet" in complaint(write(b"ARROW1\0\0", "rows.arrow"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "zstandard", None)
        assert "the package 'zstandard' is not installed; run pip install 'skyrl-spmd[data]'" in complaint(
            write(zstandard.ZstdCompressor().compress(TEXT))
        )
        patch.setitem(sys.modules, "pyarrow", None)
        assert "run pip install 'skyrl-spmd[data]', or write the rows as .jsonl" in complaint(write(b"PAR1...PAR1"))


def test_parquet(tmp_path):
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").Table
    path = tmp_path / "rows.parquet"
    tool = {"role": "tool", "content": "4", "tool_call_id": "7"}
    rows = [
        {"prompt": [{"role": "user", "content": "2+2"}, tool], "answer": "4", "messages": None},
        {"prompt": None, "answer": None, "messages": [{"role": "user", "content": "x"}]},
    ]
    parquet.write_table(table.from_pylist(rows), path)
    one, two = read_prompts(path, "e", "train")
    assert one.messages == [{"role": "user", "content": "2+2"}, tool] and one.extra["source"] == f"{path}:1"
    assert two.messages == [{"role": "user", "content": "x"}] and two.extra == {"source": f"{path}:2"}
    import pyarrow

    for kind, wanted in (
        (pyarrow.float16(), 0.1),
        (pyarrow.float32(), 0.1),
        (pyarrow.float64(), 0.1),
        (pyarrow.decimal128(4, 2), Decimal("0.1")),
    ):
        values = pyarrow.array(
            [wanted if "float" not in str(kind) else np.array(wanted, kind.to_pandas_dtype())[()], None], kind
        )
        parquet.write_table(table.from_pydict({"prompt": ["x", "y"], "answer": values}), path)
        one, two = read_prompts(path, "e", "train")
        assert one.extra["answer"] == wanted and "answer" not in two.extra


def test_numbers_of_narrow_types_are_what_was_meant_wherever_they_stand(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, short = tmp_path / "rows.parquet", pa.float32()
    struct = pa.struct(
        [("a", short), ("b", pa.list_(pa.struct([("c", short), ("d", pa.float64())]))), ("e", pa.string())]
    )
    for kind, value in (
        (pa.list_(short), [0.1, None, 10.1]),
        (pa.large_list(pa.list_(short)), [[0.1], [], [0.7, 1e-5]]),
        (pa.list_(short, 2), [0.1, 0.2]),
        (struct, {"a": 0.1, "b": [{"c": 0.3, "d": 0.1}], "e": "x"}),
        (pa.map_(pa.string(), short), [("k", 0.1)]),
        (pa.dictionary(pa.int32(), short), 0.1),
        (short, float("inf")),
    ):
        values = (
            pa.array([value, None], kind)
            if not pa.types.is_dictionary(kind)
            else pa.array([value, None], short).dictionary_encode()
        )
        parquet.write_table(pa.table({"prompt": ["x", "y"], "answer": values}), path)
        one, two = read_prompts(path, "e", "train")
        assert one.extra["answer"] == value and "answer" not in two.extra, kind
    path.write_bytes(path.read_bytes()[:-20] + b"PAR1")
    assert "cannot be read after row 0" in complaint(path)


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
        (
            DataConfig(path=str(tmp_path)),
            "train",
            f"data.path='{tmp_path}': is a folder; give one of its files, such as g_train.jsonl",
        ),
    ]:
        assert complaint(data, lambda data, split=split: data_file(data, split)).startswith(message)


def test_what_is_taken_for_a_file(tmp_path):
    files = ("x.jsonl", "X.JSONL.GZ", "a/x.parquet", "x.json.zst", "./x", "/x", "../x", str(tmp_path))
    assert all(map(is_file_path, files)) and not any(map(is_file_path, ("openai/gsm8k", "org/x:main", "gz")))
