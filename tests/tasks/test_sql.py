"""Text to SQL: equal rows, and nothing but reading, whatever the answer says."""

import pytest

from skyrl.tasks.sql import QueryError, is_ordered, run_query
from skyrl.types import UserError

ONE = "CREATE TABLE t(id INTEGER, s TEXT, x REAL); INSERT INTO t VALUES (1,'a',1.5),(2,'b',2),(3,'b',2);"
TWO = ONE + "INSERT INTO t VALUES (4,'c',7);"
ROW = {"prompt": "ids of b?", "database": [ONE, TWO], "query": "SELECT id FROM t WHERE s = 'b'"}
RECURSIVE = "WITH RECURSIVE c(x, s) AS (SELECT 1, 'aaaaaaaaaa' UNION ALL SELECT x + 1, s||s FROM c LIMIT {}) SELECT "
DOUBLED = [f"c{i} AS (SELECT 1 FROM c{i - 1}, c{i - 1} x)" for i in range(1, 30)]
BOMB = f"WITH c0 AS (SELECT 1), {', '.join(DOUBLED)} SELECT * FROM c29"


@pytest.mark.parametrize(
    ("query", "answer", "reward"),
    [
        (ROW["query"], "SELECT id FROM t WHERE s='b' ORDER BY id DESC", 1.0),  # no order was asked for
        (ROW["query"], "So:\n```sql\n-- those\nSELECT t.id AS number FROM t WHERE s LIKE 'B';\n```\nDone.", 1.0),
        (ROW["query"], "SELECT 2 UNION ALL SELECT 3.0", 1.0),  # a constant that is right on both databases
        (ROW["query"], "SELECT DISTINCT s FROM t WHERE s = 'b'", 0.1),
        (ROW["query"], "SELECT id, s FROM t WHERE s='b'", 0.1),
        (ROW["query"], "SELECT '2' UNION ALL SELECT '3'", 0.1),
        (ROW["query"], "the ids are 2 and 3", 0.0),
        (ROW["query"], "", 0.0),
        (ROW["query"], "EXPLAIN SELECT 1", 0.0),
        ("SELECT count(*) FROM t", "SELECT 3", 0.1),  # right on the first database alone
        ("SELECT id FROM t ORDER BY id DESC", "SELECT id FROM t ORDER BY -id", 1.0),
        ("SELECT id FROM t ORDER BY id DESC", "SELECT id FROM t", 0.1),
        ("SELECT s FROM t", "SELECT s FROM t GROUP BY s", 0.1),  # rows count as often as they come
        ("SELECT 0.1 + 0.2 + 0.7", "SELECT 0.7 + 0.2 + 0.1", 1.0),  # 1.0, and 0.9999999999999999
        ("SELECT 3 * id FROM t", "SELECT id / 0.1 * 0.3 FROM t", 1.0),
        ("SELECT id FROM t", "SELECT id + 0.00001 FROM t", 0.1),
        ("SELECT 0", "SELECT 0.0000001", 0.1),
        ("SELECT 0", "SELECT 9e999", 0.1),
        ("SELECT 9e999", "SELECT -9e999", 0.1),
        ("SELECT 9e999", "SELECT 9e998 * 10", 1.0),
        ("SELECT avg(x)/3 FROM t", "SELECT sum(x)/count(*)/3.0 FROM t", 1.0),
    ],
)
def test_the_reward_does_what_it_says(rows, play, query, answer, reward):
    prompt = rows("sql", {**ROW, "query": query})[0]
    result, _ = play(prompt, answer)
    assert (round(result.reward, 6), result.metrics["correct:mean"]) == (reward, float(reward == 1.0))
    assert result.metrics["runs:mean"] == float(reward > 0)


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM t", "DROP TABLE t", "INSERT INTO t VALUES (1,1,1)", "UPDATE t SET id=1", "BEGIN", "VACUUM",
        "ATTACH '/tmp/x.db' AS y", "PRAGMA query_only=0", "CREATE TEMP TABLE z(a)", "SELECT 1; DELETE FROM t",
        "WITH c AS (SELECT 1) DELETE FROM t", "SELECT load_extension('x')", "SELECT * FROM pragma_table_info('t')",
        "SELECT sql FROM sqlite_stmt", "SELECT * FROM dbstat", "SELECT * FROM json_each('[1]')",
        "SELECT zeroblob(1000000000)", "SELECT randomblob(9)", "SELECT printf('%1000000000d', 1)", "SELECT random()",
        "SELECT hex(s) FROM t", "SELECT 'a' MATCH 'a'", "SELECT ?", "SELECT '\x00'", "SELECT '\ud800'",
        "SELECT " + "(" * 990 + "1" + ")" * 990, "SELECT 1 " + " " * 5000,
        "SELECT 1 FROM " + ", ".join(["t"] * 60),
        RECURSIVE.format(-1) + "count(*) FROM c", RECURSIVE.format(30) + "max(s) FROM c",
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c) SELECT count(*) FROM c",
        BOMB,
    ],
)  # fmt: skip
def test_a_hostile_query_fails_soon_and_changes_nothing(query):
    with pytest.raises(QueryError):
        run_query(ONE, query, 200_000, 1000)
    assert run_query(ONE, "SELECT count(*) FROM t", 200_001, 1000) == [(3,)]


@pytest.mark.parametrize(
    "slow",
    [
        "instr(s, s||'b')", "s LIKE '%'||s||'b%'", "s LIKE '%'||s||'b%' ESCAPE '!'", "s GLOB '*'||s||'b*'",
        "replace(s, 'a', s)", "trim(s, s||'b')", "ltrim(s, 'b'||s)", "rtrim(s, 'b'||s)",
    ],
)  # fmt: skip
def test_no_instruction_of_a_query_takes_long(slow):
    """SQLite's own functions would take minutes to hours, or all memory, for texts of 650,000 letters."""
    with pytest.raises(QueryError, match="user-defined function raised exception"):
        run_query(ONE, RECURSIVE.format(17) + f"count(*) FROM c WHERE length({slow}) > 0", 10**6, 9)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("'Abc' LIKE 'a%C'", 1), ("'10% x' LIKE '10!%%' ESCAPE '!'", 1), ("'100' LIKE '10!%' ESCAPE '!'", 0),
        ("NULL LIKE 'a'", None), ("50 LIKE '5%'", 1), ("'a' NOT LIKE '_'", 0), ("'Ab' GLOB 'A*'", 1),
        ("instr('abc', 'c')", 3), ("replace('aba', 'a', 'xy')", "xybxy"), ("trim(' a ')", "a"),
        ("trim('xax', 'x')", "a"), ("ltrim('xax', 'x')", "ax"), ("rtrim('xax', 'x')", "xa"),
        ("replace('a', '', 'b')", "a"),
    ],
)  # fmt: skip
def test_functions_are_sqlite_s(expression, value):
    assert run_query(ONE, f"SELECT {expression}", 10**6, 9) == [(value,)]


def test_what_is_ordered():
    assert is_ordered("SELECT a FROM t ORDER  BY a") and is_ordered("SELECT a FROM (SELECT 1) order by a -- x")
    assert not is_ordered("SELECT a FROM (SELECT a FROM t ORDER BY a)")
    assert not is_ordered("SELECT 'x order by y', row_number() OVER (ORDER BY (a)) FROM t /* order by */")


def test_a_database_may_be_a_file_that_is_only_read(rows, play, tmp_path):
    path = tmp_path / "a?b.sqlite"
    import sqlite3

    with sqlite3.connect(path) as made:
        made.executescript(ONE)
    before = path.read_bytes()
    prompt = rows("sql", {**ROW, "database": path.name})[0]
    assert play(prompt, ROW["query"] + "; -- so")[0].reward == 1.0
    for text in ("DELETE FROM t", "ATTACH 'new.db' AS y", "VACUUM"):
        assert play(prompt, text)[0].reward == 0.0
    assert path.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["a?b.sqlite", "train.jsonl"]


def test_made_tasks_are_right_held_out_and_have_no_constant(rows, play):
    train, test = rows("sql"), rows("sql", split="test")
    assert not {p.messages[0]["content"] for p in train} & {p.messages[0]["content"] for p in test}
    assert [p.extra for p in train] != [p.extra for p in rows("sql", seed=1)]
    assert [p.extra for p in test] == [p.extra for p in rows("sql", split="test", seed=1)]
    for prompt in test:
        assert play(prompt, prompt.extra["solution"])[0].reward == 1.0
        first, second = (run_query(script, prompt.extra["query"], 10**6, 99) for script in prompt.extra["database"])
        assert first and second and first != second


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"query": ""}, "field 'query' is ''"),
        ({"query": "SELECT missing FROM t"}, "the right query fails on 'database': no such column"),
        ({"query": "DELETE FROM t"}, "the right query fails"),
        ({"ordered": "no"}, "field 'ordered' is 'no', wanted true or false"),
        ({"database": []}, "field 'database'"),
        ({"database": [ONE, 5]}, "field 'database'"),
        ({"database": "CREATE TABLE"}, "cannot be made"),
        ({"database": "none.sqlite"}, "cannot be made: unable to open"),
    ],
)
def test_a_row_that_cannot_be_judged_is_refused_by_its_line(rows, change, told):
    with pytest.raises(UserError, match=r"train\.jsonl:1: .*" + told):
        rows("sql", {**ROW, **change})
