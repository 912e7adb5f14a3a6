"""An agent with tools: a calculator, and Python in the sandbox. What it says without a call is its answer."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from skyrl.answers.parse import ExpressionError, evaluate, parse
from skyrl.envs.base import RetryableError, register_environment
from skyrl.envs.rewards.base import RewardOption
from skyrl.envs.single_turn import SingleTurn, require
from skyrl.sandbox import Limits, SandboxError, default_sandbox
from skyrl.tasks.base import Tasks, TurnedTask, require_counts, require_weights
from skyrl.types import Message, Metrics, Prompt

ARGUMENTS = {"calculator": "expression", "python": "code"}  # of each tool, the one that it takes
ABOUT = {
    "calculator": "Computes an arithmetic expression such as 2*(3+4)/5.",
    "python": "Runs a Python program and returns what it prints.",
}
MAX_CALLS = 8  # of one turn
TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
LINES = re.compile(
    r"^[ \t]*(?P<name>calculator|python)[ \t]*:[ \t]*"
    r"(?:\n?[ \t]*```(?:python|py)?[ \t]*\n(?P<block>.*?)(?:^[ \t]*```[ \t]*$|\Z)|(?P<line>[^\n]*))",
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)


@register_environment("tools")
class ToolAgent(TurnedTask, SingleTurn):
    """Questions for an agent that calls tools and reads what they return; a turn without a call is its answer.

    Rows of data.path have "prompt" or "messages" and "answer". Without it: made sums and products of long numbers.

    tools: "calculator" (exact arithmetic), "python" (a program in the sandbox; what it prints). format: how a call is
    written. "lines": a line "calculator: 2+3", or "python:" and a fenced block below. "tags", as the chat templates of
    Qwen, Hermes and others ask: <tool_call>{"name": "calculator", "arguments": {"expression": "2+3"}}</tool_call>,
    or the JSON object alone as Llama writes it ("parameters" will do). instruct: adds how to call to the last message;
    false where the template is given the tools (chat.template_kwargs.tools). role: whose words results are, "user", or
    "tool" for templates that know it. reward: scores the answer, as for single_turn. malformed: what each
    call that cannot be read costs, of several objectives one of its own.
    level, cpu_seconds, wall_seconds and other limits: of the sandbox. max_output: characters of a result.
    """

    more_options = Limits

    def __init__(
        self,
        *,
        tools: list[str] | None = None,
        format: Literal["lines", "tags"] = "lines",
        instruct: bool = True,
        role: Literal["user", "tool"] = "user",
        reward: RewardOption = "math_last_number",
        malformed: float = 0.0,
        level: str = "",
        max_output: int = 1000,
        max_turns: int = 4,
        **limits: Any,
    ) -> None:
        TurnedTask.__init__(self, max_turns)
        SingleTurn.__init__(self, reward=reward)
        self.tools = list(ARGUMENTS) if tools is None else tools
        known = bool(self.tools) and set(self.tools) <= ARGUMENTS.keys()
        require(known, "tools", tools, f"some of: {', '.join(ARGUMENTS)}")
        require_weights(malformed=malformed)
        require_counts(max_output=max_output)
        self.format, self.instruct, self.role, self.malformed = format, instruct, role, malformed
        self.limits = Limits(**limits)
        self.level, self.max_output = level or None, max_output

    @classmethod
    def objective_names(cls, options: dict[str, Any]) -> Sequence[str]:
        """Those of its rewards, and what calls cost."""
        names = super().objective_names(options)
        return [*names, "malformed_calls"] if names else names

    def prepare(self) -> None:
        """Tries the sandbox where Python is a tool."""
        if "python" in self.tools:
            default_sandbox(self.level).level  # noqa: B018

    def made(self) -> Tasks:
        """Sums and products that are long for a head."""
        return _made(self.format)

    def reset(self, prompt: Prompt) -> list[Message]:
        """Starts with the prompt, and how to call."""
        self.calls = self.bad_calls = 0
        self.answer = ""  # what is scored when the turns are used up before
        *before, last = super().reset(prompt)
        return [*before, {**last, "content": f"{last['content']}\n{self.how()}"}] if self.instruct else [*before, last]

    def how(self) -> str:
        """How a call is written, in words for the model."""
        if self.format == "tags":
            schemas = "\n".join(json.dumps(tool_schema(name)) for name in self.tools)
            call = '<tool_call>{"name": <name>, "arguments": <object>}</tool_call>'
            return f"You may call these tools:\n{schemas}\nWrite a call as {call}, and the answer without one.\n"
        forms = {"calculator": "a line calculator: <expression>", "python": "python: and a ``` block below"}
        return f"To call a tool write {' or '.join(forms[name] for name in self.tools)}; else answer.\n"

    def turn(self, text: str) -> str | None:
        """Makes the calls of a turn, or takes its answer."""
        calls, problems = read_calls(text, self.format, self.tools)
        if not calls and not problems:
            self.answer = text
            return None
        results = [f"{self._call(name, argument)}\n" for name, argument in calls]
        results += [f"no call: {problem}\n" for problem in [*dict.fromkeys(problems)][:MAX_CALLS]]
        if self.format == "tags" and self.role == "user":
            results = [f"<tool_response>\n{result}</tool_response>\n" for result in results]
        self.calls += len(calls)
        self.bad_calls += len(problems)
        return "".join(results)

    def _call(self, name: str, argument: str) -> str:
        if name == "calculator":
            return calculate(argument)[: self.max_output]
        try:
            result = default_sandbox(self.level).run(argument, limits=self.limits)
        except SandboxError as error:  # says nothing about the program: made again, then masked
            raise RetryableError(str(error)) from error
        ended = result.stderr.strip().rpartition("\n")[2] if result.status == "error" else result.status
        failed = "" if result.status == "ok" else f"\n{ended}"
        return (result.stdout.strip()[: self.max_output] + failed[: self.max_output]).strip() or "nothing was printed"

    def score(self) -> tuple[float | dict[str, float], Metrics]:
        """Reward, and how many calls could and could not be read."""
        result = SingleTurn.step(self, self.answer)
        metrics = {"tool_calls:mean": float(self.calls), "malformed_calls:mean": float(self.bad_calls)}
        penalty, reward = -self.malformed * self.bad_calls, result.reward
        reward = {**reward, "malformed_calls": penalty} if isinstance(reward, dict) else reward + penalty
        return reward, {**metrics, **result.metrics}


def tool_schema(name: str) -> dict[str, Any]:
    """A tool as chat templates read it, in the form of OpenAI's functions."""
    properties = {ARGUMENTS[name]: {"type": "string"}}
    parameters = {"type": "object", "properties": properties, "required": [ARGUMENTS[name]]}
    return {"type": "function", "function": {"name": name, "description": ABOUT[name], "parameters": parameters}}


def read_calls(text: str, format: str, tools: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """The calls of a turn as (tool, argument), and what is wrong with those that cannot be read."""
    calls: list[tuple[str, str]] = []
    problems: list[str] = []
    if format == "lines":
        found = [(match["name"].lower(), match["block"] or match["line"] or "") for match in LINES.finditer(text)]
    else:
        found = []
        whole = re.match(r'\s*\{\s*"(?:name|type|parameters|arguments)"', text) is not None
        for raw in [text] if whole else TAGGED.findall(text):
            try:
                call = json.loads(raw)
                arguments = call.get("arguments", call.get("parameters"))
                arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
                name, ((key, argument),) = str(call["name"]), arguments.items()
                if not isinstance(argument, str) or key != ARGUMENTS.get(name, key):
                    raise ValueError
                found.append((name, argument))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                problems.append('wanted {"name": ..., "arguments": {...}} with the one argument of a tool, a text')
    for name, argument in found:
        if name not in tools:
            problems.append(f"there is no tool {name[:40]!r}; there are: {', '.join(tools)}")
        elif not argument.strip():
            problems.append(f"{name} was given nothing")
        elif len(calls) == MAX_CALLS:
            problems.append(f"more than {MAX_CALLS} calls in a turn")
        else:
            calls.append((name, argument))
    return calls, problems


def calculate(expression: str) -> str:
    """The value of an arithmetic expression: exact where it is a decimal of 30 digits or less, else rounded; or what is
    wrong with it, in words."""
    try:
        value = evaluate(parse(expression.strip().removesuffix("=")))
    except ExpressionError as error:
        return f"error: {error}"
    digits = next((n for n in range(31) if (value * 10**n).denominator == 1), None)
    try:
        if digits is None:
            return f"{float(value):.15g}"
        if digits == 0:
            return str(value.numerator)
    except (OverflowError, ValueError):  # beyond 64 bits; more digits than Python writes
        return "error: too large"
    sign, scaled = "-" if value < 0 else "", str(abs(int(value * 10**digits))).zfill(digits + 1)
    return f"{sign}{scaled[:-digits]}.{scaled[-digits:]}"


@functools.cache
def _made(format: str) -> list[tuple[str, dict[str, Any]]]:
    tasks = []  # the solution, for a warm-up, is the first call
    for index, (a, b) in enumerate(itertools.product(range(1013, 9999, 211), range(117, 999, 16))):
        expression = (f"{a}*{b}", f"{a}*{b}+{a % 97}", f"{a}+{b}*{a % 89 + 2}")[index % 3]
        call = f"calculator: {expression}"
        if format == "tags":
            body = {"name": "calculator", "arguments": {"expression": expression}}
            call = f"<tool_call>\n{json.dumps(body)}\n</tool_call>"
        tasks.append((f"What is {expression}?", {"answer": calculate(expression), "solution": call}))
    return tasks
