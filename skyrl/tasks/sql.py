"""Text to SQL on SQLite: the answer's query runs on small databases in memory, and its rows are compared."""

from __future__ import annotations

import functools
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from skyrl.envs.base import RetryableError, StepResult, register_environment
from skyrl.tasks.base import Task, Tasks, field_of, last_block, require_counts, require_weights, staged, wrong_field
from skyrl.types import Prompt, UserError

if TYPE_CHECKING:
    import sqlite3  # at run time where it is needed: some Pythons are built without

STEPS_BETWEEN_LOOKS = 1000  # instructions of SQLite's machine
MAX_SECONDS = 5.0  # of CPU, a net: what decides is the number of instructions, which is the same everywhere
MAX_CHARACTERS, MAX_BYTES = 4000, 1 << 20  # of a query; of all values that it returns
HEAP_BYTES = 128 << 20  # of all of SQLite in this process, the databases that are kept included
# Functions that could take hours within one instruction, where nothing stops them, and their numbers of arguments.
BOUNDED = (("like", 2), ("like", 3), ("glob", 2), ("instr", 2), ("replace", 3), ("trim", 2), ("ltrim", 2), ("rtrim", 2))
MAX_PRODUCT = 10**7  # of the lengths of their arguments
# Not here: what makes huge values, takes more time than its arguments are long, or reaches beyond the tables.
FUNCTIONS = frozenset(
    "abs avg ceil ceiling coalesce count cume_dist date datetime dense_rank first_value floor glob group_concat "
    "ifnull iif instr julianday lag last_value lead length like lower ltrim max min mod nth_value ntile nullif "
    "percent_rank pow power rank replace round row_number rtrim sign sqrt strftime string_agg substr substring "
    "sum time total trim typeof unixepoch upper".split()
)
COMMENTS_AND_TEXTS = re.compile(r"'[^']*'|\"[^\"]*\"|--[^\n]*|/\*.*?\*/", re.DOTALL)
FILES = (".sqlite", ".sqlite3", ".db")
DATABASES = f"SQL text that makes and fills tables, a file ({', '.join(FILES)}), or a list of these"


class QueryError(ValueError):
    """A query that is refused, fails, or is beyond its limits; says why."""


@register_environment("sql")
class Sql(Task):
    """Write a query that gives the right rows.

    Rows of data.path have "prompt" or "messages", "query", the right one, and "database": SQL text that makes and fills
    tables, a file of SQLite (beside the rows' own), or a list of these (an answer must be right on each, so that a
    constant is not). "ordered": whether
    rows are compared in order; left out, where the right query ends in ORDER BY. Without data.path: small made tasks.

    runs, right: what each adds to the reward. An answer is one query that reads, the last fenced block or the whole
    text. right: its rows are the right query's, numbers to 9 digits, columns in order whatever their names. max_steps:
    instructions of SQLite's machine; max_rows: of a result; beyond, it fails.
    """

    def __init__(
        self, *, runs: float = 0.1, right: float = 0.9, max_steps: int = 2_000_000, max_rows: int = 10_000
    ) -> None:
        self.weights = require_weights(runs=runs, right=right)
        require_counts(max_steps=max_steps, max_rows=max_rows)
        self.limits = max_steps, max_rows

    def made(self) -> Tasks:
        """Questions about one of three tables, each with two databases on which no constant is right."""
        return _made()

    def check(self, prompt: Prompt) -> None:
        """Runs the row's own query."""
        query = field_of(prompt, "query", str, "the right query")
        if not isinstance(prompt.extra.get("ordered"), (bool, type(None))):
            raise wrong_field(prompt, "ordered", "true or false")
        for script in databases_of(prompt):
            try:
                run_query(script, query, *self.limits)
            except QueryError as error:
                raise UserError(f"{prompt.place}: the right query fails on 'database': {error}") from error

    def step(self, text: str) -> StepResult:
        """Runs the answer's query beside the right one; always the last step."""
        query = last_block(text, "sql|sqlite").strip()
        ordered = self.prompt.extra.get("ordered")
        ordered = is_ordered(self.prompt.extra["query"]) if ordered is None else ordered
        right = True
        try:
            for script in databases_of(self.prompt):
                expected = self._expected(script)
                rows = run_query(script, query, *self.limits)
                right &= rows == expected if ordered else Counter(rows) == Counter(expected)
            stages = {"runs": 1.0, "right": float(right)}
        except QueryError:
            stages = {"runs": 0.0, "right": 0.0}
        reward, metrics = staged(self.weights, stages, stages["right"] == 1.0)
        return StepResult(reward, True, metrics=metrics)

    def _expected(self, script: str) -> list[tuple[Any, ...]]:
        try:
            return run_query(script, self.prompt.extra["query"], *self.limits)
        except QueryError as error:  # it worked at the start: says nothing about the answer
            raise RetryableError(f"the right query fails: {error}") from error


def databases_of(prompt: Prompt) -> list[str]:
    """The texts of a row that make its databases. Raises UserError with file:line."""
    value = field_of(prompt, "database", (str, list), DATABASES)
    scripts = [value] if isinstance(value, str) else value
    if not all(isinstance(script, str) and script.strip() for script in scripts):
        raise wrong_field(prompt, "database", DATABASES)
    beside = Path(str(prompt.extra.get("source", "")).rpartition(":")[0]).parent
    return [str(beside / script) if script.endswith(FILES) else script for script in scripts]


def is_ordered(query: str) -> bool:
    """Whether the outermost part of a query has an ORDER BY."""
    bare = COMMENTS_AND_TEXTS.sub(" ", query)
    while (inner := re.sub(r"\([^()]*\)", " ", bare)) != bare:
        bare = inner
    return re.search(r"\border\s+by\b", bare, re.IGNORECASE) is not None


@functools.lru_cache(4096)
def run_query(script: str, query: str, max_steps: int, max_rows: int) -> list[tuple[Any, ...]]:
    """The rows of one query that only reads, on the database that `script` makes; values as they are compared.

    Raises QueryError for what is refused (anything but one SELECT over the tables, with the known functions), fails, or
    is beyond its limits.
    """
    import sqlite3

    if len(query) > MAX_CHARACTERS:
        raise QueryError(f"longer than {MAX_CHARACTERS} characters")
    if not re.match(r"\s*(?:select|with|values)\b", COMMENTS_AND_TEXTS.sub(" ", query), re.IGNORECASE):
        raise QueryError("no SELECT")
    database, end, left, size = _database(script), time.thread_time() + MAX_SECONDS, max_steps, 0

    def is_over() -> bool:
        nonlocal left
        left -= STEPS_BETWEEN_LOOKS
        return left < 0 or time.thread_time() > end

    database.set_progress_handler(is_over, STEPS_BETWEEN_LOOKS)
    rows: list[tuple[Any, ...]] = []
    try:
        for row in database.execute(query):
            rows.append(tuple(map(_compared, row)))
            size += sum(len(value) if isinstance(value, (str, bytes)) else 8 for value in row)
            if len(rows) > max_rows or size > MAX_BYTES:
                raise QueryError(f"more than {max_rows} rows or {MAX_BYTES} bytes")
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
        raise QueryError(" ".join(str(error).split()) or type(error).__name__) from error
    finally:
        database.set_progress_handler(None, 0)
    return rows


def _compared(value: Any) -> Any:
    """Numbers that 9 digits do not tell apart are equal, whole ones whatever their type: a sum of fractions may come
    to 0.9999999999999999 in one order and to 1.0 in another."""
    if isinstance(value, float):
        whole = abs(value) < 2**53 and abs(value - round(value)) <= 5e-10 * abs(value)  # not of infinity
        return round(value) if whole else ("number", f"{value:.9g}")
    return value


@functools.lru_cache(8)
def _database(script: str) -> sqlite3.Connection:
    """A database, a file or made in memory, that only answers queries. Raises QueryError when it cannot be had."""
    import sqlite3

    is_file = script.endswith(FILES)
    place = f"file:{quote(script)}?mode=ro" if is_file else ":memory:"
    try:
        database = sqlite3.connect(place, uri=is_file, check_same_thread=False, isolation_level=None)
        database.executescript("SELECT name FROM sqlite_master" if is_file else script)
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        raise QueryError(f"cannot be made: {' '.join(str(error).split())}") from error
    # The sorter's files would go to the disk; a value that grows without end would fill the memory.
    for pragma in ("temp_store=2", f"hard_heap_limit={HEAP_BYTES}", "query_only=1"):
        database.execute(f"PRAGMA {pragma}").fetchall()
    for name, count in BOUNDED:
        database.create_function(name, count, _bounded(name, count), deterministic=True)
    reads = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}

    def authorize(action: int, first: str | None, second: str | None, *_: Any) -> int:
        known = action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FUNCTIONS
        return sqlite3.SQLITE_OK if known or action in reads else sqlite3.SQLITE_DENY

    database.set_authorizer(authorize)
    return database


def _bounded(name: str, count: int) -> Callable[..., Any]:
    """SQLite's own function, which takes time by the product of its arguments' lengths, for short ones."""
    import sqlite3

    database = sqlite3.connect(":memory:", check_same_thread=False)

    def call(*values: Any) -> Any:
        if math.prod(max(1, len(str(value))) for value in values) > MAX_PRODUCT:
            raise ValueError("arguments are too long")
        return database.execute(f"SELECT {name}({', '.join('?' * count)})", values).fetchone()[0]

    return call


# Tables of the made tasks: a name, a number and a group each, with the values that these have.
TABLES = (
    ("staff", "name", "age", "city", "Ann Bo Cy Dee Eva Finn Gus Hal Ida Jo", "Rome Oslo Bern"),
    ("books", "title", "pages", "genre", "Ash Birch Cedar Elm Fir Larch Oak Pine Rowan Yew", "crime drama verse"),
    ("pets", "name", "weight", "kind", "Bella Coco Duke Fido Kira Luna Max Nero Rex Zoe", "cat dog bird"),
)
NUMBERS = range(10, 90)
FORMS = {  # question -> right query. {k}: a number, {v}: a group
    "{name} with {number} above {k}": "SELECT {name} FROM {table} WHERE {number} > {k}",
    "{name} with {number} below {k}, by {number}": "SELECT {name} FROM {table} WHERE {number} < {k} ORDER BY {number}",
    "count by {group} above {k}": "SELECT {group}, count(*) FROM {table} WHERE {number} > {k} GROUP BY {group}",
    "total {number} of {v} above {k}": "SELECT sum({number}) FROM {table} WHERE {group} = '{v}' AND {number} > {k}",
    "{name} above {k}, mark 1": "SELECT {name} FROM {table} JOIN marks USING (id) WHERE {number} > {k} AND mark = 1",
}


@functools.cache
def _made() -> list[tuple[str, dict[str, Any]]]:
    tasks = []
    for table, name, number, group, names, groups in TABLES:
        scripts = [_script(table, name, number, group, names.split(), groups.split(), key) for key in (1, 2)]
        columns = f"{table}(id,{name},{number},{group}) marks(id,mark)"
        for question, query in FORMS.items():
            for k in NUMBERS[10:-15]:
                for v in groups.split() if "{v}" in question else ("",):
                    words = {"table": table, "name": name, "number": number, "group": group, "k": k, "v": v}
                    right = query.format(**words)
                    first, second = (run_query(script, right, 10**6, 1000) for script in scripts)
                    if first and second and first != second:
                        extra = {"database": scripts, "query": right, "solution": right}
                        tasks.append((f"{columns}\n{question.format(**words)}\n", extra))
    return tasks


def _script(table: str, name: str, number: str, group: str, names: list[str], groups: list[str], key: int) -> str:
    rng = random.Random(f"skyrl.sql/{table}/{key}")
    chosen = zip(rng.sample(names, len(names)), rng.sample(NUMBERS, len(names)), strict=True)
    rows = ", ".join(str((index, *pair, rng.choice(groups))) for index, pair in enumerate(chosen))
    marks = ", ".join(str((index, index * key % 3)) for index in range(len(names)))
    return (
        f"CREATE TABLE {table}(id INTEGER, {name} TEXT, {number} INTEGER, {group} TEXT);CREATE TABLE marks(id INTEGER, "
        f"mark INTEGER);INSERT INTO {table} VALUES {rows};INSERT INTO marks VALUES {marks};"
    )
