"""Rows and prompts out of .jsonl files; every complaint names file:line. Also decides which file a split is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrl.config.schema import DataConfig
from skyrl.types import Message, Prompt, UserError

MAX_LINE_BYTES = 16 * 2**20  # one row; a longer line is a file of another kind, not a prompt
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Row:
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


def read_jsonl(path: str | Path, max_rows: int = 0) -> Iterator[Row]:
    """Rows of a UTF-8 file with one JSON object a line, at most max_rows of them (0 = all).

    Blank lines at the end are skipped, elsewhere refused: they usually mean a broken file. Raises UserError with
    file:line for anything that is no JSON object, a line above 16 MiB, or a file that is missing or has no rows.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"data file {str(path)!r}: {'is a folder' if path.is_dir() else 'does not exist'}")
    count, blank = 0, 0
    with path.open("rb") as file:
        number = 0
        while max_rows == 0 or count < max_rows:
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                break
            number += 1
            source = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise UserError(f"{source}: longer than {MAX_LINE_BYTES // 2**20} MiB; is this a .jsonl file?")
            if not line.strip():
                blank = blank or number
                continue
            if blank:
                raise UserError(f"{path}:{blank}: blank line; only allowed at the end, remove it")
            yield Row(source, _parse(line, source))
            count += 1
    if count == 0:
        raise UserError(f"data file {str(path)!r}: has no rows")


def _parse(line: bytes, source: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig" if source.endswith(":1") else "utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: no UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{source}: no JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise UserError(f"{source}: JSON nested too deeply") from error
    if not isinstance(value, dict):
        raise UserError(f"{source}: a {type(value).__name__}, wanted an object such as {{...}}")
    return value


def read_prompts(path: Path, env: str, split: str, max_rows: int = 0) -> list[Prompt]:
    """Prompts of a file whose rows have "messages" (a list of role and content) or "prompt" (a user's text).

    All other fields go to `extra`, with the row's place as extra["source"]. A plain list: about 0.8 kB a row beside
    the text itself, meant for up to a million rows. Raises UserError with file:line.
    """
    prompts = []
    for index, row in enumerate(read_jsonl(path, max_rows)):
        extra = {key: value for key, value in row.fields.items() if key not in ("messages", "prompt")}
        extra["source"] = row.source
        prompts.append(Prompt(f"{env}/{split}/{index}", env, _messages(row), extra))
    return prompts


def _messages(row: Row) -> list[Message]:
    if "messages" not in row.fields:
        if "prompt" not in row.fields:
            known = ", ".join(sorted(row.fields)) or "none"
            raise UserError(f"{row.source}: field 'messages' or 'prompt' is missing; fields of this row: {known}")
        return [{"role": "user", "content": row.text("prompt")}]
    if "prompt" in row.fields:
        raise UserError(f"{row.source}: has both 'messages' and 'prompt'; keep one")
    problem = messages_problem(row.fields["messages"])
    if problem:
        raise UserError(f"{row.source}: field 'messages' {problem}")
    return row.fields["messages"]


def messages_problem(value: object) -> str:
    """What keeps `value` from being a non-empty list of messages; "" when nothing does."""
    if not isinstance(value, list) or not value:
        return "must be a list with at least one message"
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return f"has no role and content in entry {index}"
        if message["role"] not in ROLES:
            return f"has role {message['role']!r} in entry {index}; allowed: {', '.join(ROLES)}"
        if not isinstance(message["content"], str):
            return f"has a {type(message['content']).__name__} as content of entry {index}, wanted a string"
    return ""


def is_file_path(path: str) -> bool:
    """Whether data.path means a file (ends in .jsonl, or exists as one), not a data set id."""
    return path.endswith(".jsonl") or Path(path).is_file()


def data_file(data: DataConfig, split: str) -> Path:
    """The file of a split: data.path for train; for test data.eval_path, else the test file beside a train file.

    Only the word "train" in the file's name is replaced, so "gsm8k_train.jsonl" finds "gsm8k_test.jsonl".
    Raises UserError naming data.path or data.eval_path when there is none.
    """
    if split == "test" and data.eval_path:
        return _existing(Path(data.eval_path), "data.eval_path")
    if not data.path:
        raise UserError("data.path is empty: this environment brings no prompts; give a .jsonl file")
    path = _existing(Path(data.path), "data.path")
    if split == "train":
        return path
    beside = path.with_name(path.name.replace("train", "test"))
    if beside == path or not beside.is_file():
        looked = f" and {str(beside)!r} does not exist" if beside != path else ""
        raise UserError(f"data.eval_path is empty{looked}: give a .jsonl file with held-out rows")
    return beside


def _existing(path: Path, where: str) -> Path:
    if not path.is_file():
        raise UserError(
            f"{where}={str(path)!r}: {'is a folder' if path.is_dir() else 'no such file'}; give a .jsonl file"
        )
    return path
