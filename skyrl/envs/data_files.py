"""Rows and prompts out of .jsonl and parquet files; every complaint names file:line. Also decides which file a split
is."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from skyrl.config.schema import DataConfig
from skyrl.registry import import_extra
from skyrl.types import Message, Prompt, UserError

MAX_LINE_BYTES = 16 * 2**20  # one row; a longer line is a file of another kind, not a prompt
WANTED = "one JSON object a line (.jsonl, also as .gz, .bz2, .xz or .zst), or a .parquet file"
ENDINGS = (".jsonl", ".json", ".ndjson", ".parquet")
PACKED_ENDINGS = (".gz", ".bz2", ".xz", ".zst")
# First bytes of a file -> what reads it; of formats that are not read -> what such a file is and what to do.
PACKED = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ\0": lzma}
OTHER_FORMATS = {
    b"PK\x03\x04": f"a zip archive (or an Excel sheet); unpack it, wanted {WANTED}",
    b"ARROW1": "an Arrow file; write its table as parquet (pyarrow.parquet.write_table)",
    b"\xff\xff\xff\xff": "an Arrow stream, as save_to_disk writes it; write it with the data set's to_parquet",
    b"SQLite f": f"a database; wanted {WANTED}",
}
NARROW = {"float": np.float32, "halffloat": np.float16}
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Example:
    """One JSON object of a file, and where it stood: "<file>:<line>"."""

    source: str
    fields: dict[str, Any]

    def text(self, field: str) -> str:
        """The string in `field`. Raises UserError with file:line when it is missing or no string."""
        if field not in self.fields:
            known = ", ".join(sorted(self.fields)) or "none"
            raise UserError(f"{self.source}: field {field!r} is missing; fields of this row: {known}")
        value = self.fields[field]
        if not isinstance(value, str):
            raise UserError(f"{self.source}: field {field!r} is {type(value).__name__}, wanted a string")
        return value


def read_examples(path: str | Path, max_rows: int = 0) -> Iterator[Example]:
    """Rows of a file, at most max_rows of them (0 = all): UTF-8 with one JSON object a line, plain or packed by gzip,
    bzip2, xz or zstd, or a parquet file. What a file is, its first bytes say, not its name.

    Blank lines at the end are skipped, elsewhere refused: they usually mean a broken file. Raises UserError with
    file:line (of parquet file:row) for anything that is no JSON object, a line above 16 MiB, a damaged file, one that
    is missing or has no rows, and a package that is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"data file {str(path)!r}: {'is a folder' if path.is_dir() else 'does not exist'}")
    with path.open("rb") as file:
        head = file.read(8)
    for magic, advice in OTHER_FORMATS.items():
        if head.startswith(magic):
            raise UserError(f"data file {str(path)!r}: is {advice}")
    count = 0
    try:
        for row in _parquet(path) if head.startswith(b"PAR1") else _lines(path, head):
            if max_rows and count == max_rows:
                break
            yield row
            count += 1
    except DAMAGED as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read after row {count} ({what}); copy or write it again") from error
    if count == 0:
        raise UserError(f"data file {str(path)!r}: has no rows")


def _parquet(path: Path) -> Iterator[Example]:
    import_extra("pyarrow", f"data file {str(path)!r}, which is parquet", "data", "write the rows as .jsonl")
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(1024):
                for fields in batch.to_pylist():
                    number += 1
                    row = {field.name: _as_meant(fields[field.name], field.type) for field in batch.schema}
                    yield Example(f"{path}:{number}", {name: value for name, value in row.items() if value is not None})
    except ArrowException as error:
        raise OSError(str(error)) from error


def _as_meant(value: Any, kind: Any) -> Any:
    """A value of arrow type `kind`. A field that this row does not have is null there. Of the numbers that round to
    what a type of 32 or 16 bits holds, wherever it stands, the shortest is meant: 0.1, and not 0.10000000149011612."""
    kind = getattr(kind, "storage_type", kind)  # of an extension
    if isinstance(value, dict):
        return {key: _as_meant(part, kind.field(key).type) for key, part in value.items() if part is not None}
    if isinstance(value, list) and hasattr(kind, "key_type"):
        return [(_as_meant(key, kind.key_type), _as_meant(part, kind.item_type)) for key, part in value]
    if isinstance(value, list):
        return [_as_meant(part, kind.value_type) for part in value]
    make = NARROW.get(str(getattr(kind, "value_type", kind))) if isinstance(value, (float, np.floating)) else None
    return shortest(make(value), float(value)) if make is not None else value


def shortest(value: Any, plain: float) -> float:
    """`plain`, what is inside a number of numpy, torch or another, with as few digits as that type needs."""
    if not math.isfinite(plain):
        return plain
    try:
        if isinstance(value, np.floating):
            return float(str(value))
        make = value.new_tensor if hasattr(value, "new_tensor") else value.dtype.type
        return next(short for digits in range(1, 18) if make(short := float(f"{plain:.{digits}g}")) == value)
    except Exception:  # another kind of number
        return plain


def _lines(path: Path, head: bytes) -> Iterator[Example]:
    number, blank = 0, 0
    with _opened(path, head) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            source = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise UserError(f"{source}: longer than {MAX_LINE_BYTES // 2**20} MiB; is this a .jsonl file?")
            if not line.strip():
                blank = blank or number
                continue
            if blank:
                raise UserError(f"{path}:{blank}: blank line; only allowed at the end, remove it")
            yield Example(source, _parse(line, source))


def _opened(path: Path, head: bytes) -> BinaryIO:
    for magic, module in PACKED.items():
        if head.startswith(magic):
            return cast(BinaryIO, module.open(path, "rb"))
    if not head.startswith(b"\x28\xb5\x2f\xfd"):
        return path.open("rb")
    import_extra("zstandard", f"data file {str(path)!r}, which is zstd", "data", "unpack it with zstd -d")
    return cast(BinaryIO, io.BufferedReader(_ZstdFile(path)))


class _ZstdFile(io.RawIOBase):
    """A zstd file unpacked. The reader of zstandard takes one that was cut off for a shorter one."""

    def __init__(self, path: Path) -> None:
        self.file, self.left = path.open("rb"), b""
        self.unpacked = self._pieces()

    def _pieces(self) -> Iterator[bytes]:
        import zstandard

        frame, packed = None, b""
        while packed or (packed := self.file.read(4096)):
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(packed)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            packed = frame.unused_data
            frame = None if frame.eof else frame
        if frame is not None:
            raise EOFError("zstd data ended before its end-of-frame marker")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.left:
            piece = next(self.unpacked, None)
            if piece is None:
                return 0
            self.left = piece
        count = min(len(buffer), len(self.left))
        buffer[:count], self.left = self.left[:count], self.left[count:]
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def _parse(line: bytes, source: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig" if source.endswith(":1") else "utf-8")
        value = json.loads(text, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        utf16 = line.startswith((b"\xff\xfe", b"\xfe\xff"))
        advice = "; it is UTF-16: iconv -f UTF-16 -t UTF-8" if utf16 else "; write it as UTF-8"
        raise UserError(f"{source}: no UTF-8 text ({error.reason} at byte {error.start}){advice}") from error
    except json.JSONDecodeError as error:
        hint = f"; wanted {WANTED}" if source.endswith(":1") else ""
        raise UserError(f"{source}: no JSON ({error.msg} at column {error.colno}){hint}") from error
    except RecursionError as error:
        raise UserError(f"{source}: JSON nested too deeply") from error
    except ValueError as error:
        what = " ".join(str(error).split()).split(";")[0]
        raise UserError(f"{source}: a number that cannot be read ({what}); write it as a string, or null") from error
    if not isinstance(value, dict):
        hint = f" (jq -c '.[]' {source[:-2]} makes one a line)" if isinstance(value, list) else ""
        raise UserError(f"{source}: a {type(value).__name__}, wanted an object such as {{...}}{hint}")
    return value


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def read_prompts(path: Path, env: str, split: str, max_rows: int = 0) -> list[Prompt]:
    """Prompts of a file whose rows have "messages" (a list of role and content) or "prompt" (the same, or a text).

    All other fields go to `extra`, with the row's place as extra["source"]. A plain list: about 0.8 kB a row beside
    the text itself, meant for up to a million rows. Raises UserError with file:line.
    """
    prompts = []
    for index, row in enumerate(read_examples(path, max_rows)):
        extra = {key: value for key, value in row.fields.items() if key not in ("messages", "prompt")}
        extra["source"] = row.source
        prompts.append(Prompt(f"{env}/{split}/{index}", env, _messages(row), extra))
    return prompts


def _messages(row: Example) -> list[Message]:
    given = [name for name in ("messages", "prompt") if row.fields.get(name) is not None]
    if not given:
        known = ", ".join(sorted(row.fields)) or "none"
        raise UserError(f"{row.source}: field 'messages' or 'prompt' is missing; fields of this row: {known}")
    if len(given) > 1:
        raise UserError(f"{row.source}: has both 'messages' and 'prompt'; keep one")
    for media in ("images", "videos", "audios"):  # as data sets of models for images hold them: {bytes, path} each
        files = row.fields.get(media)
        if isinstance(files, list) and files and isinstance(files[0], dict):
            raise UserError(
                f"{row.source}: field {media!r} holds what models here do not read: they read text alone; give rows of "
                "text, or take the field out"
            )
    name, value = given[0], row.fields[given[0]]
    if name == "prompt" and isinstance(value, str):
        return [{"role": "user", "content": value}]
    if name == "prompt" and not isinstance(value, list):
        raise UserError(
            f"{row.source}: field 'prompt' is {type(value).__name__}, wanted a string or a list of messages"
        )
    problem = messages_problem(value)
    if problem:
        raise UserError(f"{row.source}: field {name!r} {problem}")
    return value


def messages_problem(value: object) -> str:
    """What keeps `value` from being a non-empty list of messages; "" when nothing does."""
    if not isinstance(value, list) or not value:
        return "must be a list with at least one message"
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return f"has no role and content in entry {index}"
        if message["role"] not in ROLES:
            return f"has role {message['role']!r} in entry {index}; allowed: {', '.join(ROLES)}"
        if isinstance(message["content"], list):
            kinds = [part.get("type", "") for part in message["content"] if isinstance(part, dict)]
            other = next((kind for kind in kinds if kind != "text"), "")
            said = f"a part of type {other!r}" if other else "a list of parts"
            return f"has {said} as content of entry {index}, wanted a string: models here read text alone"
        if not isinstance(message["content"], str):
            return f"has a {type(message['content']).__name__} as content of entry {index}, wanted a string"
    return ""


def is_file_path(path: str) -> bool:
    """Whether data.path means a file (by its ending, or because it exists as one), not a data set id."""
    name = path.lower()
    for ending in PACKED_ENDINGS:
        name = name.removesuffix(ending)
    return name.endswith(ENDINGS) or path.startswith(("/", "./", "../")) or Path(path).exists()


class NoHeldOut(UserError):
    """There are no held-out rows: skyrl.data.make_splits takes some of the training rows. `looked`: why."""

    def __init__(self, looked: str, remedy: str = "give a .jsonl or .parquet file with held-out rows") -> None:
        super().__init__(f"{looked}: {remedy}")
        self.looked = looked


def data_file(data: DataConfig, split: str) -> Path:
    """The file of a split: data.path for train; for test data.eval_path, else the test file beside a train file.

    Only the word "train" in the file's name is replaced, so "gsm8k_train.jsonl" finds "gsm8k_test.jsonl".
    Raises UserError naming data.path or data.eval_path when there is none.
    """
    if split == "test" and data.eval_path:
        return _existing(Path(data.eval_path), "data.eval_path")
    if not data.path:
        raise UserError("data.path is empty: this environment brings no prompts; give a .jsonl or .parquet file")
    path = _existing(Path(data.path), "data.path")
    if split == "train":
        return path
    beside = path.with_name(path.name.replace("train", "test"))
    if beside == path or not beside.is_file():
        looked = f" and {str(beside)!r} does not exist" if beside != path else ""
        raise NoHeldOut(f"data.eval_path is empty{looked}")
    return beside


def _existing(path: Path, where: str) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{where}={str(path)!r}: no such file; give a .jsonl or .parquet file")
    inside = sorted(file.name for file in path.iterdir() if file.is_file() and is_file_path(file.name))
    seen = f"one of its files, such as {inside[0]}" if inside else "a .jsonl or .parquet file"
    raise UserError(f"{where}={str(path)!r}: is a folder; give {seen}")
