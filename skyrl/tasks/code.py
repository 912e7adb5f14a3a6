"""Write a function: a reward in stages for a program that hidden tests judge in a sandbox."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import keyword
from typing import Any

from skyrl.envs.base import RetryableError, StepResult, register_environment
from skyrl.envs.single_turn import require
from skyrl.sandbox import Level, Limits, SandboxError, default_sandbox, to_text
from skyrl.tasks.base import Task, Tasks, last_block, require_weights, staged, wrong_field
from skyrl.types import Prompt, UserError

STAGES = ("parses", "compiles", "within_limits", "passes")
CACHED = 4096  # verdicts: a model that has learned writes the same program again and again


@register_environment("code")
class Code(Task):
    """Write a function that passes hidden tests.

    Rows of data.path have "prompt" or "messages", "entry_point" and "tests": a list of {"args": [...], "kwargs": {...},
    "expected": ...}, or Python text with asserts or a check(candidate), which may use what the row's "context" (Python
    text) defines. Without data.path: small tasks made here, such as "x times 3 plus 4".

    parses, compiles, within_limits, passes: what each stage adds to the reward; a stage counts when those before it do.
    parses: it is Python; compiles: running it defines the function; within_limits: no limit ended it; passes: all tests
    do, with `partial` the part of them that does (of a list; asserts are one test). complete: the answer goes on where
    the prompt's last message ends. level: of the sandbox; "" = the best that the machine allows. num_train, num_test:
    made tasks. cpu_seconds, wall_seconds, memory_mb and the other limits: of all tests of one answer together.
    """

    more_options = Limits

    def __init__(
        self,
        *,
        parses: float = 0.05,
        compiles: float = 0.05,
        within_limits: float = 0.0,
        passes: float = 0.9,
        partial: bool = True,
        complete: bool = False,
        level: str = "",
        num_train: int = 2000,
        num_test: int = 200,
        **limits: Any,
    ) -> None:
        self.weights = require_weights(parses=parses, compiles=compiles, within_limits=within_limits, passes=passes)
        require(0 < num_train <= LARGEST_SPLIT, "num_train", num_train, f"1 to {LARGEST_SPLIT}")
        require(0 < num_test <= LARGEST_SPLIT, "num_test", num_test, f"1 to {LARGEST_SPLIT}")
        self.partial, self.complete, self.level = partial, complete, level or None
        self.limits = Limits(**limits)
        self.num_prompts = {"train": num_train, "test": num_test}

    def prepare(self) -> None:
        """Tries the sandbox of `level`."""
        default_sandbox(self.level).level  # noqa: B018

    def made(self) -> Tasks:
        """Tasks whose solution is one line."""
        return _made(self.complete)

    def check(self, prompt: Prompt) -> None:
        """There is a function to write, and tests of it."""
        name, tests = prompt.extra.get("entry_point"), prompt.extra.get("tests")
        if not (isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)):
            raise wrong_field(prompt, "entry_point", "the name of the function to write")
        if not isinstance(prompt.extra.get("context", ""), (str, type(None))):
            raise wrong_field(prompt, "context", "Python text")
        if isinstance(tests, str) and tests.strip():
            try:
                parsed = ast.parse(tests), ast.parse(prompt.extra.get("context") or "")
            except (SyntaxError, ValueError, RecursionError) as error:
                raise UserError(f"{prompt.place}: field 'tests' or 'context' is no Python ({error})") from error
            named = {getattr(node, "id", getattr(node, "name", "")) for tree in parsed for node in ast.walk(tree)}
            if not {name, "check"} & named:  # anything would pass
                raise UserError(f"{prompt.place}: field 'tests' neither names {name!r} nor defines check(candidate)")
        elif not isinstance(tests, list) or not tests:
            such = '{"args": [1, 2], "expected": 3}, or Python text with asserts'
            raise wrong_field(prompt, "tests", f"a list of cases that is not empty, such as {such}")
        else:
            for number, case in enumerate(tests):
                kinds = {"args": list, "kwargs": dict}
                right = isinstance(case, dict) and "expected" in case and case.keys() <= {*kinds, "expected"}
                if not right or any(not isinstance(case.get(key, kind()), kind) for key, kind in kinds.items()):
                    raise UserError(
                        f"{prompt.place}: field 'tests': case {number} is {str(case)[:80]!r}, wanted an object with "
                        '"expected" and, if it takes any, "args" (a list) and "kwargs" (an object)'
                    )

    def step(self, text: str) -> StepResult:
        """Runs the answer's program with the tests; always the last step."""
        extra = self.prompt.extra
        source = program_of(text, str(self.prompt.messages[-1]["content"]) if self.complete else "")
        tests = json.dumps(extra["tests"])
        context = extra.get("context") or ""
        try:
            reached, passed = judge(source, extra["entry_point"], tests, context, self.limits, self.level)
        except SandboxError as error:  # says nothing about the answer: made again, then masked, never scored 0
            raise RetryableError(str(error)) from error
        stages = {name: float(number < reached) for number, name in enumerate(STAGES)}
        stages["passes"] = stages["within_limits"] * (passed if self.partial else float(passed == 1.0))
        reward, metrics = staged(self.weights, stages, stages["within_limits"] * passed == 1.0)
        return StepResult(reward, True, metrics=metrics)


def program_of(text: str, beginning: str = "") -> str:
    """The program in an answer: its last fenced block of Python, else all of it, behind `beginning`."""
    return beginning + last_block(text, "python|py")


@functools.lru_cache(CACHED)
def judge(
    source: str,
    entry_point: str,
    tests: str,
    context: str = "",
    limits: Limits | None = None,
    level: Level | None = None,
) -> tuple[int, float]:
    """How many of STAGES a program reaches (0 to 4; the last when a test passes), and the part of its tests that pass.

    tests: JSON of what the rows have: a list of cases, or Python text. What is expected never enters the program's
    sandbox: results come out as text and are compared here, or by asserts that run in another one. Raises SandboxError.
    """
    sandbox = default_sandbox(level)
    cases = json.loads(tests)
    if isinstance(cases, list):
        calls = [(case.get("args", []), case.get("kwargs", {})) for case in cases]
        result, texts = sandbox.call(source, entry_point, calls, limits=limits)
        right = [got == to_text(case["expected"]) for got, case in zip(texts, cases, strict=True)]
        passed, in_time = sum(right) / len(right), result.status in ("ok", "error", "killed")
    else:
        result, judged = sandbox.test(source, entry_point, cases, context=context, limits=limits)
        passed = float(["passed"] in judged.events and judged.status == "ok")
        in_time = {result.status, judged.status} <= {"ok", "error", "killed"}
    told = [event[0] for event in result.events]
    stages = ("parses" in told, "defines" in told, in_time, passed > 0)
    return (stages.index(False) if False in stages else len(stages)), passed


FACTORS, SUMMANDS = range(2, 10), range(1, 100)
FORMS = (  # question; what is right of it
    ("x times {a} plus {b}", "x*{a}+{b}", lambda x, a, b: x * a + b),
    ("x times {a} minus {b}", "x*{a}-{b}", lambda x, a, b: x * a - b),
    ("x plus {b}, times {a}", "(x+{b})*{a}", lambda x, a, b: (x + b) * a),
    ("the rest of x plus {b} by {a}", "(x+{b})%{a}", lambda x, a, b: (x + b) % a),
)
HEAD = "def f(x): return "
INPUTS = (0, 1, 2, 7, 10, -3, 123)
LARGEST_SPLIT = len(FORMS) * len(FACTORS) * len(SUMMANDS)


@functools.cache
def _made(complete: bool) -> list[tuple[str, dict[str, Any]]]:
    tasks = []
    for (question, solution, function), a, b in itertools.product(FORMS, FACTORS, SUMMANDS):
        task, body = f"# f(x): {question.format(a=a, b=b)}\n", solution.format(a=a, b=b)
        tests = [{"args": [x], "expected": function(x, a, b)} for x in INPUTS]
        text, answer = (task + HEAD, body) if complete else (task, HEAD + body)
        tasks.append((text, {"entry_point": "f", "tests": tests, "solution": answer}))
    return tasks
