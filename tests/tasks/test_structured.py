"""JSON by a schema: stages, right values, hostile texts."""

import json

import pytest

from skyrl.tasks.structured import agreement, matches, schema_problem
from skyrl.types import UserError

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3}},
    "required": ["name"],
    "additionalProperties": False,
}
ROW = {"prompt": "JSON.", "schema": SCHEMA, "answer": {"name": "Ada", "tags": ["a", "b"]}}


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ('{"name": "Ada", "tags": ["a", "b"]}', 1.0),
        ('Here:\n```json\n{"tags": ["a", "b"],\n "name": "Ada"}\n```', 1.0),
        ('{"name": "Ada", "tags": ["a", "c"]}', round(0.3 + 0.7 * 2 / 3, 6)),
        ('{"name": "Ada"}', round(0.3 + 0.7 / 3, 6)),
        ('{"name": "Bob", "tags": ["b", "a"]}', 0.3),
        ('{"name": "Ada", "tags": ["a", "b"], "more": 1}', 0.1),
        ('{"name": "Ada", "tags": ["a", "b", "c", "d"]}', 0.1),
        ('{"name": 5}', 0.1),
        ("[]", 0.1),
        ('{"name": "Ada", "name": "Ada", "tags": ["a", "b"]}', 0.0),
        ('{"name": "Ada", "tags": ["a", "b"]} and more', 0.0),
        ('{"name": NaN}', 0.0),
        ("1e999", 0.0),
        ("9" * 5000, 0.0),
        ("[" * 100_000, 0.0),
        ("[" * 2000 + "]" * 2000, 0.0),
        ('"' + "a" * 200_000 + '"', 0.0),
        ("", 0.0),
    ],
)
def test_the_reward_does_what_it_says(rows, play, text, reward):
    result, _ = play(rows("structured", ROW)[0], text)
    assert (round(result.reward, 6), result.metrics["correct:mean"]) == (reward, float(reward == 1.0))


LEFT = {
    "anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}],
    "default": None,
}  # as pydantic writes a model that may be None
NODE = {"type": "object", "properties": {"v": {"type": "integer", "title": "V"}, "l": LEFT}, "required": ["v"]}
TREE = {"$defs": {"N": NODE}, "$ref": "#/$defs/N"}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "integer"}, [1, 1.0, -3], [1.5, True, "1", None]),
        ({"type": "number"}, [1, 1.5], [False, "1"]),
        ({"type": "boolean"}, [True], [1, "true"]),
        ({"type": ["string", "null"], "minLength": 2}, ["ab", None], ["a", 0]),
        ({"minimum": 2, "maximum": 3}, [2, 3.0, "x", True], [1, 3.5]),
        ({"enum": [1, "a", [1]]}, [1.0, "a", [1]], [True, "A", [1, 1], {}]),
        ({"type": "array", "items": {"type": "null"}, "minItems": 1}, [[None]], [[], [1], {}]),
        ({"required": []}, [{}, 5], []),
        ({"required": ["a"]}, [{"a": None}, [], 5], [{"b": 1}]),
        ({}, [None, {}, [], 1], []),
        ({"const": "a"}, ["a"], ["b", None]),
        ({"anyOf": [{"type": "string", "maxLength": 1}, {"type": "null"}]}, ["a", None], ["ab", 1]),
        ({"pattern": "^[a-z]+-\\d$"}, ["ab-1", 5], ["ab-", "1"]),
        ({"enum": [1, 2], "const": 2}, [2], [1, 3]),
        ({"$defs": {"N": {"type": "integer"}}, "$ref": "#/$defs/N", "minimum": 5}, [5], [4, "5"]),
        (TREE, [{"v": 1}, {"v": 1, "l": {"v": 2, "l": None}}], [{"v": 1, "l": {"v": "2"}}, {"v": 1, "l": 5}, {}]),
    ],
)
def test_schemas(schema, right, wrong):
    assert not schema_problem(schema)
    assert all(matches(value, schema) for value in right)
    assert not any(matches(value, schema) for value in wrong)


def test_no_answer_takes_longer_than_its_length():
    branch = {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/A"}}
    both = {"$defs": {"A": {"anyOf": [branch, {**branch, "maxItems": 9}]}}, "$ref": "#/$defs/A"}
    assert not matches(json.loads("[" * 50 + "]" * 50), both)  # 2^50 steps by each branch for itself
    assert matches("a" * 1000, {"pattern": "[a-z]"}) and not matches("a" * 90_000, {"pattern": "[a-z]+[0-9]|a"})


def test_values_that_look_alike_are_not_the_same():
    pairs = [([], "[]"), ({}, []), (True, 1), ("1", 1), (None, False), ([1, 2], [2, 1]), ({"0": 1}, [1])]
    assert all(agreement(one, other) == 0.0 for one, other in pairs)
    assert agreement({"a": 1, "b": []}, {"b": [], "a": 1.0}) == 1.0


def test_made_tasks_are_right_and_held_out(rows, play):
    train, test = rows("structured"), rows("structured", split="test")
    assert not {p.messages[0]["content"] for p in train} & {p.messages[0]["content"] for p in test}
    for prompt in test[:40]:
        assert matches(prompt.extra["answer"], prompt.extra["schema"])
        assert play(prompt, prompt.extra["solution"])[0].reward == 1.0


DEEP: dict = {"type": "null"}
for _ in range(900):
    DEEP = {"items": DEEP}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema": None}, "field 'schema' is None"),
        ({"schema": {"oneOf": []}}, "has 'oneOf'; understood are: type"),
        ({"schema": {"type": "text"}}, "has 'text' as 'type'; types are: object"),
        ({"schema": {"properties": {"a": {"items": {"format": "x"}}}}}, "has properties.a.items.'format'"),
        ({"schema": {"items": 5}}, "has '5' as 'items'"),
        ({"schema": {"items": {"$ref": "#/$defs/a"}}}, r"has '#/\$defs/a' as items.'\$ref'; wanted"),
        ({"schema": {"type": [["string"]]}}, r"as 'type'; types are: object"),
        ({"schema": {"type": []}}, r"has '\[\]' as 'type'; types are: object"),
        ({"schema": {"enum": []}}, r"has '\[\]' as 'enum', wanted a list that is not empty"),
        ({"schema": {"required": [1]}}, r"has '\[1\]' as 'required', wanted a list of texts"),
        ({"schema": {"minimum": True}}, "has 'True' as 'minimum', wanted a number"),
        ({"schema": {"$defs": {"A": {"$ref": "#/$defs/A"}}}}, r"has '\$defs' in which 'A' is itself"),
        ({"schema": {"$defs": {"A": {"anyOf": [{"$ref": "#/$defs/A"}]}}}}, r"has '\$defs' in which 'A' is itself"),
        ({"schema": DEEP}, "field 'schema' is nested too deep"),
        ({"schema": {"anyOf": [{"pattern": "("}]}}, r"has '\(' as anyOf\[0\].'pattern'"),
        ({"answer": {"name": 5}}, "does not allow the row's own answer"),
    ],
)
def test_a_row_that_cannot_be_judged_is_refused_by_its_line(rows, change, told):
    with pytest.raises(UserError, match=r"train\.jsonl:1: .*" + told):
        rows("structured", {**ROW, **change})


def test_without_an_answer_the_schema_decides(rows, play):
    prompt = rows("structured", {"prompt": "?", "schema": {"type": "integer"}})[0]
    assert [play(prompt, json.dumps(value))[0].reward for value in (5, "5")] == [1.0, 0.1]
