"""Structured output: the answer is one JSON value that a schema allows and whose parts are right."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

from skyrl.envs.base import StepResult, register_environment
from skyrl.tasks.base import Task, Tasks, field_of, last_block, require_weights, staged
from skyrl.types import Prompt, UserError

MAX_CHARACTERS = 100_000
MAX_SEARCHED = 1000  # characters of a text with a pattern: searching takes the square of their number, or worse
NUMBER = (int, float)
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "null": (type(None),),
    "integer": NUMBER, "number": NUMBER,
}  # fmt: skip
LIMITS = {
    int: ("minimum", "maximum"),
    float: ("minimum", "maximum"),
    str: ("minLength", "maxLength"),
    list: ("minItems", "maxItems"),
}
# Keywords of JSON Schema that are understood -> what their value must be; those that only describe are passed over.
KEYWORDS: dict[str, type | tuple[type, ...]] = {
    "type": (str, list), "enum": list, "const": object, "anyOf": list, "properties": dict, "required": list,
    "additionalProperties": bool, "items": dict, "pattern": str, "$ref": str, "$defs": dict,
    **{name: NUMBER for names in LIMITS.values() for name in names},
}  # fmt: skip
WANTED = {list: "a list that is not empty", dict: "an object", str: "a text", bool: "true or false", NUMBER: "a number"}
REFERENCE = "#/$defs/"
Known = dict[tuple[int, int], bool]  # a value and a schema, by identity -> whether it allows it
DESCRIBE = frozenset("$schema $id $comment title description default examples".split())


@register_environment("structured")
class Structured(Task):
    """Answer with JSON.

    Rows of data.path have "prompt" or "messages", "schema" (a JSON Schema of the keywords above) and, where there are
    right values, "answer" (the right JSON value). Without data.path: small made tasks.

    valid, matches, right: what each stage adds to the reward; a stage counts when those before it do. valid: the last
    fenced block, or the whole text, is one JSON value, without repeated keys or NaN; matches: the schema allows it;
    right: the part of its values that are the answer's, of all that the two have.
    """

    in_process = True

    def __init__(self, *, valid: float = 0.1, matches: float = 0.2, right: float = 0.7) -> None:
        self.weights = require_weights(valid=valid, matches=matches, right=right)

    def made(self) -> Tasks:
        """Sentences whose facts are asked for as JSON."""
        return _made()

    def check(self, prompt: Prompt) -> None:
        """The schema is understood here, and allows the row's own answer."""
        schema, extra = field_of(prompt, "schema", dict, "a JSON Schema"), prompt.extra
        try:
            problem = schema_problem(schema)
        except RecursionError:
            problem = "is nested too deep"
        if not problem and "answer" in extra and not matches(extra["answer"], schema):
            problem = f"does not allow the row's own answer {json.dumps(extra['answer'])[:80]}"
        if problem:
            raise UserError(f"{prompt.place}: field 'schema' {problem}")

    def step(self, text: str) -> StepResult:
        """Scores the answer; always the last step."""
        extra, stages = self.prompt.extra, dict.fromkeys(self.weights, 0.0)
        try:
            value = read_json(last_block(text, "json"))
            stages["valid"] = 1.0
            if matches(value, extra["schema"]):
                stages["matches"] = 1.0
                stages["right"] = agreement(value, extra["answer"]) if "answer" in extra else 1.0
        except (ValueError, RecursionError):
            pass
        reward, metrics = staged(self.weights, stages, stages["right"] == 1.0)
        return StepResult(reward, True, metrics=metrics)


def read_json(text: str) -> Any:
    """The one JSON value of a text. Raises ValueError for anything else: repeated keys, NaN, infinity, too long; and
    RecursionError for one that is too deep."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key that is there twice")
        return found

    def finite(number: str) -> float:
        if abs(value := float(number)) < float("inf"):
            return value
        raise ValueError(f"{number} is no number")

    if len(text) > MAX_CHARACTERS:
        raise ValueError("too long")
    return json.loads(text, object_pairs_hook=unique, parse_constant=lambda name: finite("inf"), parse_float=finite)


def schema_problem(schema: Any, place: str = "", root: Any = None) -> str:
    """What is wrong with a schema, or not understood here; "" for nothing. `root`: the one that it is a part of."""
    whole, root = root is None, schema if root is None else root
    if not isinstance(schema, dict):
        return f"has {str(schema)[:40]!r} at {place}, wanted an object"
    for key, value in schema.items():
        if key not in KEYWORDS and key not in DESCRIBE:
            return f"has {place}{key!r}; understood are: {', '.join(KEYWORDS)}"
        names = [value] if isinstance(value, str) else value
        told = f"has {str(value)[:40]!r} as {place}{key!r}"
        if key == "type" and not (isinstance(names, list) and names and all(name in [*TYPES] for name in names)):
            return f"{told}; types are: {', '.join(TYPES)}"
        kind: Any = KEYWORDS.get(key, object)
        if key == "required" and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            return f"{told}, wanted a list of texts"
        empty = key in ("enum", "anyOf") and value == []
        if not isinstance(value, kind) or (kind is NUMBER and isinstance(value, bool)) or empty:
            return f"{told}, wanted {WANTED[kind]}"
    if "$ref" in schema and schema["$ref"].removeprefix(REFERENCE) not in root.get("$defs", {}):
        return f"has {schema['$ref']!r} as {place}'$ref'; wanted {REFERENCE}<one of its $defs>"
    try:
        re.compile(schema.get("pattern", ""))
    except re.error as error:
        return f"has {schema['pattern']!r} as {place}'pattern': {error}"
    inner = {f"{key}.{name}": one for key in ("properties", "$defs") for name, one in schema.get(key, {}).items()}
    inner |= {f"anyOf[{number}]": one for number, one in enumerate(schema.get("anyOf", []))}
    inner |= {"items": schema["items"]} if "items" in schema else {}
    problem = next(filter(None, (schema_problem(one, f"{place}{name}.", root) for name, one in inner.items())), "")
    endless = not problem and whole and next((n for n in schema.get("$defs", {}) if _is_endless(schema, n)), None)
    return f"has '$defs' in which {endless!r} is itself, by $ref and anyOf alone" if endless else problem


def _is_endless(root: dict[str, Any], name: str, above: tuple[str, ...] = ()) -> bool:
    """Whether one of the $defs says of a value only what it says itself."""
    found, schemas = [], [root["$defs"][name]]
    for schema in schemas:
        schemas += schema.get("anyOf", [])
        found += [schema["$ref"].removeprefix(REFERENCE)] if "$ref" in schema else []
    return name in above or any(_is_endless(root, one, (*above, name)) for one in found)


def matches(value: Any, schema: dict[str, Any], root: Any = None, known: Known | None = None) -> bool:
    """Whether a schema allows a JSON value. `root`: the schema that it is a part of, which has the $defs. `known`: what
    was found there, since each branch of an anyOf that refers to the whole would else look at all below it anew."""
    place, known = (id(value), id(schema)), {} if known is None else known
    if place not in known:
        known[place] = _allows(value, schema, root or schema, known)
    return known[place]


def _allows(value: Any, schema: dict[str, Any], root: dict[str, Any], known: Known) -> bool:
    if "$ref" in schema and not matches(value, root["$defs"][schema["$ref"].removeprefix(REFERENCE)], root, known):
        return False
    if "anyOf" in schema and not any(matches(value, one, root, known) for one in schema["anyOf"]):
        return False
    names = schema.get("type", list(TYPES))
    if not any(_is(value, name) for name in ([names] if isinstance(names, str) else names)):
        return False
    for wanted in ([schema[key]] if key == "const" else schema[key] for key in ("enum", "const") if key in schema):
        if not any(agreement(value, one) == 1.0 for one in wanted):
            return False
    searched = isinstance(value, str) and "pattern" in schema
    if searched and (len(value) > MAX_SEARCHED or not re.search(schema["pattern"], value)):
        return False
    if type(value) in LIMITS:
        size = value if type(value) in NUMBER else len(value)
        least, most = (schema.get(name, size) for name in LIMITS[type(value)])
        if not least <= size <= most:
            return False
    if isinstance(value, list) and "items" in schema:
        return all(matches(one, schema["items"], root, known) for one in value)
    if isinstance(value, dict):
        parts = schema.get("properties", {})
        allowed = schema.get("additionalProperties", True) or value.keys() <= parts.keys()
        whole = all(name in value for name in schema.get("required", []))
        return allowed and whole and all(matches(value[n], parts[n], root, known) for n in value if n in parts)
    return True


def _is(value: Any, name: str) -> bool:
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def _leaves(value: Any, place: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], tuple[str, Any]]:
    """Path -> kind and value of everything that has no parts; a truth value is no number, 1 is 1.0."""
    if isinstance(value, (dict, list)) and value:
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, one in parts for path, leaf in _leaves(one, (*place, key)).items()}
    return {place: (type(value).__name__ if isinstance(value, (bool, dict, list)) else "", value)}


def agreement(value: Any, answer: Any) -> float:
    """The part of the values in both that is the same in each, at the same place."""
    given, wanted = _leaves(value), _leaves(answer)
    return sum(wanted.get(path) == leaf for path, leaf in given.items()) / len(given.keys() | wanted.keys())


NAMES, CITIES, GOODS = "Ada Bob Cleo Dan Eve Fay Gil".split(), "Rome Oslo Bern Lima".split(), "pens cups hats".split()


def _made() -> list[tuple[str, dict[str, Any]]]:
    facts: list[tuple[str, dict[str, Any]]] = []
    for name, age, city in itertools.product(NAMES, range(10, 60), CITIES):
        facts.append((f"{name}, {age}, lives in {city}.", {"name": name, "age": age, "city": city}))
    for name, count, goods, paid in itertools.product(NAMES, range(10, 40), GOODS, (True, False)):
        answer = {"name": name, "count": count, "goods": goods, "paid": paid}
        facts.append((f"{name} gets {count} {goods}, {'' if paid else 'not '}paid.", answer))
    kinds = {str: "string", int: "integer", bool: "boolean"}
    tasks = []
    for said, answer in facts:
        properties = {name: {"type": kinds[type(value)]} for name, value in answer.items()}
        schema = {"type": "object", "properties": properties, "required": [*answer], "additionalProperties": False}
        extra = {"schema": schema, "answer": answer, "solution": json.dumps(answer, separators=(",", ":"))}
        tasks.append((f"{said}\nJSON of {','.join(answer)}:\n", extra))
    return tasks
