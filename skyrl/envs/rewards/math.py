"""Final answers of mathematical text: finding them and deciding whether two of them are the same.

Untrusted text never reaches eval() or sympy's own parser: parse.py builds a tree, and sympy (imported on first need)
gets only trees that are small enough to be decided in well below a second.
"""

from __future__ import annotations

import cmath
import functools
import re
from fractions import Fraction

from skyrl.envs.rewards.base import reference, register_reward
from skyrl.envs.rewards.parse import ExpressionError, Node, evaluate, parse
from skyrl.types import Prompt

MAX_NODES = 40
MAX_NAMES = 3
MAX_DEGREE = 10
MAX_WRAPPERS = 8
MAX_HEADINGS = 50

_NUMBER = re.compile(
    r"(?P<sign>[-+\u2212]?)\s?\\?[$\u20ac\u00a3]?\s?(?P<again>[-\u2212]?)"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)\s?\\?%?\.?"
)
_UNIT = re.compile(r"(?:\s+[^\W\d_]+){1,3}\.?")
_ANYWHERE = re.compile(
    r"(?<![\w.])[-\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])[-\u2212]?\.\d+", re.A
)
_FRACTION = re.compile(r"([-\u2212]?)(?:\\[dt]?frac\{(\d{1,30})\}\{(\d{1,30})\}|(\d{1,30})\s?/\s?(\d{1,30}))", re.A)
_WRAPPERS = [
    re.compile(pattern + r"[.,;:]?", re.S)
    for pattern in (r"\$\$(?P<x>[^$]+)\$\$", r"\$(?P<x>[^$]+)\$", r"\\\((?P<x>.+)\\\)", r"\\\[(?P<x>.+)\\\]")
    + (r"\*\*(?P<x>[^*]+)\*\*", r"__(?P<x>[^_]+)__", r"\*(?P<x>[^*]+)\*", r"`+(?P<x>[^`]+)`+", r'"(?P<x>[^"]+)"')
]
_LABEL = re.compile(r"(?:the\s+)?(?:final\s+)?answer\s*(?:is\b|[:=])\s*(?=\S)", re.I)

BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_MARKED = re.compile(r"(?<!#)####(?!#)([^\n]*)")
_PROSE = re.compile(r"(?<![\\A-Za-z])(?!(?:and|or)\b)[A-Za-z]{2,}")
_WITH_UNIT = re.compile(r"[^\sA-Za-z]*\d(?:\s+[a-z][\w/]*){1,4}\.?")


def parse_number(text: str) -> Fraction | None:
    """The value of one written number, or None when `text` is anything else, a calculation for example.

    Understood: a sign, decimals (".5", "3."), thousands commas, a currency sign, a final full stop; a per cent sign is
    a unit ("50%" is 50, as in GSM8K's answers). ASCII digits, at most 64 characters.
    """
    text = text.strip()
    match = _NUMBER.fullmatch(text) if len(text) <= 64 and not (set(text) - _PLAIN) else None
    if match is None or (match["sign"] and match["again"]):
        return None
    value = Fraction(match["digits"].replace(",", ""))
    return -value if match["sign"] in ("-", "\u2212") or match["again"] else value


_PLAIN = set("0123456789+-,.$%\\ \u2212\u20ac\u00a3")


def unwrap(text: str) -> str:
    """The text without what only sets it off: dollar signs of LaTeX, \\boxed{}, bold, quotes, "The answer is"."""
    for _ in range(MAX_WRAPPERS):
        before = text = text.strip()
        match = next((m for pattern in _WRAPPERS if (m := pattern.fullmatch(text))), None)
        if match is not None:
            text = match["x"]
        elif (box := BOX.match(text)) and closing(text, box.end()) == len(text.rstrip(".")) - 1:
            text = text.rstrip(".")[box.end() + 1 : -1]
        elif mark := next((m for m in ("\\$", "$", "**", "`") if text.endswith(m) and text.count(m) == 1), ""):
            text = text.removesuffix(mark)
        else:
            text = text[label.end() :] if (label := _LABEL.match(text)) else text
        if text == before:
            break
    return text


def closing(text: str, start: int, pairs: str = "{}") -> int:
    """The place of what closes the bracket at `start`, escaped ones left aside; -1 when nothing does."""
    depth = 0
    for match in re.compile(r"\\[{}]|[" + re.escape(pairs) + "]").finditer(text, start):
        depth += 0 if len(match[0]) > 1 else 1 if match[0] in pairs[::2] else -1
        if depth == 0:
            return match.start()
    return -1


def extract_answer(text: str) -> str | None:
    """What the text gives as its final answer, unwrapped, or None: the content of the last \\boxed{}, or what the last
    line with "####" after it has. Numbers elsewhere do not count; last_number finds those.

    A heading of markdown is no answer: "####" before words, when more text follows or a box came before.
    """
    boxes = [*BOX.finditer(text)]
    start = boxes[-1].end() if boxes else -1
    end = closing(text, start) if boxes else -1
    boxed = unwrap(text[start + 1 : end]) if end >= 0 else ""
    for match in [*_MARKED.finditer(text, max(end, 0))][: -MAX_HEADINGS - 1 : -1]:
        line = next((part for part in reversed(re.split("#{4,}", match[1])) if part.strip()), "")
        answer = unwrap(line)
        prose = _PROSE.search(re.sub(r"\\[a-z]+\{[^{}]*\}", "", answer)) and not _WITH_UNIT.fullmatch(answer)
        if answer and not (prose and (boxed or text[match.end() :].strip())):
            return answer
    return boxed or None


def last_number(text: str) -> str | None:
    """The last number written anywhere in the text, or None. Lenient: a text that stops early still has one."""
    found = _ANYWHERE.findall(text)
    return found[-1] if found else None


def answers_equal(given: str, wanted: str) -> bool:
    """Whether two final answers are the same: same characters, else same exact number, else same expression.

    Where `wanted` is a number, `given` must be one too ("18", "$18.00", "18 eggs"; a fraction only where `wanted` is
    not whole), so that an unfinished calculation such as "9*2" is no answer. Otherwise both are compared as
    expressions, symbolically (1/sqrt(2) and sqrt(2)/2; x^2+2x+1 and (x+1)^2), if they are small: at most 40 nodes,
    3 variables, degree 10. What is larger is equal only when its characters are.
    """
    given, wanted = given.strip(), wanted.strip()
    if given == wanted:
        return given != ""
    target = _value(wanted)
    if target is None:
        return _same_expression(given, wanted)
    value = parse_number(given)
    if value is None and target.denominator != 1:
        value = _simple_fraction(given)
    if value is None:
        value = _number_with_unit(given)
    return value == target


def _value(text: str) -> Fraction | None:
    number = parse_number(text)
    return _simple_fraction(text) if number is None else number


def _simple_fraction(text: str) -> Fraction | None:
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    above, below = int(match[2] or match[4]), int(match[3] or match[5])
    if below == 0:
        return None
    return Fraction(-above if match[1] else above, below)


def _number_with_unit(text: str) -> Fraction | None:
    unit = _UNIT.search(text)
    if unit is None or unit.end() != len(text):
        return None
    return parse_number(text[: unit.start()])


@functools.lru_cache(maxsize=4096)
def _same_expression(given: str, wanted: str) -> bool:
    """Symbolic equality of two small expressions; False for anything that is none."""
    try:
        trees = parse(given), parse(wanted)
        for tree in trees:
            _check_size(tree)
        points = [_at(tree, shift) for shift in (0.0, 0.37) for tree in trees]
    except (ExpressionError, ZeroDivisionError, OverflowError):
        return False
    for a, b in zip(points[::2], points[1::2], strict=True):  # cheap: most wrong answers end here
        if not cmath.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9):
            return False
    import sympy  # half a second to import, and most runs never need it

    difference = _to_sympy(trees[0]) - _to_sympy(trees[1])
    return sympy.expand(difference) == 0 or sympy.simplify(difference) == 0


def _check_size(tree: Node) -> None:
    nodes, names, stack = 0, set(), [tree]
    while stack:
        node = stack.pop()
        nodes += 1
        if node.op == "name" and node.value != "pi":
            names.add(node.value)
        stack.extend(node.args)
    if nodes > MAX_NODES or len(names) > MAX_NAMES or _degree(tree) > MAX_DEGREE:
        raise ExpressionError("too large to compare symbolically")


def _degree(node: Node) -> Fraction:
    """An upper bound of the degree, counting denominators as factors; the size of what expand() can make of it."""
    if node.op in ("number", "name"):
        return Fraction(node.op == "name" and node.value != "pi")
    degrees = [_degree(argument) for argument in node.args]
    if node.op in ("*", "/"):
        return sum(degrees, Fraction(0))
    if node.op != "^":
        return max(degrees)
    exponent = evaluate(node.args[1])  # a name in an exponent is refused: ExpressionError
    base = node.args[0]
    whole = exponent.denominator == 1 and abs(exponent) <= MAX_DEGREE
    if not whole and (exponent.denominator > 6 or abs(exponent) > MAX_DEGREE):
        raise ExpressionError(f"exponent {exponent}")
    # A sum without variables, such as (1 + sqrt(2))^n, expands as well.
    return max(degrees[0], Fraction(base.op != "number")) * abs(exponent)


def _at(node: Node, shift: float) -> complex:
    """The value of a tree in floating point, its variables at fixed odd places."""
    if isinstance(node.value, Fraction):
        return complex(node.value)
    if isinstance(node.value, str):
        return complex(cmath.pi) if node.value == "pi" else complex(0.6 + shift + ord(node.value) % 53 * 0.0817)
    arguments = [_at(argument, shift) for argument in node.args]
    if node.op == "neg":
        return -arguments[0]
    if node.op == "sqrt":
        return cmath.sqrt(arguments[0])
    a, b = arguments
    if node.op in ("+", "-"):
        return a + b if node.op == "+" else a - b
    return a * b if node.op == "*" else a / b if node.op == "/" else a**b


def _to_sympy(node: Node):
    import sympy

    if isinstance(node.value, Fraction):
        return sympy.Rational(node.value.numerator, node.value.denominator)
    if node.op == "name":
        return sympy.pi if node.value == "pi" else sympy.Symbol(node.value)
    arguments = [_to_sympy(argument) for argument in node.args]
    if node.op == "neg":
        return -arguments[0]
    if node.op == "sqrt":
        return sympy.sqrt(arguments[0])
    a, b = arguments
    if node.op in ("+", "-"):
        return a + b if node.op == "+" else a - b
    return a * b if node.op == "*" else a / b if node.op == "/" else a**b


@register_reward("math")
def math_reward(text: str, prompt: Prompt) -> float:
    """1.0 when the final answer ("#### x" or \\boxed{x}) equals the prompt's; else 0.0."""
    answer = extract_answer(text)
    return float(answer is not None and answers_equal(answer, reference(prompt)))


@register_reward("math_last_number")
def math_last_number(text: str, prompt: Prompt) -> float:
    """Like "math", but a text without a marked answer is judged by the last number in it."""
    answer = extract_answer(text) or last_number(text)
    return float(answer is not None and answers_equal(answer, reference(prompt)))


@register_reward("number")
def number(text: str, prompt: Prompt) -> float:
    """1.0 when the whole text is one number with the answer's exact value (".50" for "0.5"); else 0.0."""
    value = parse_number(text)
    return float(value is not None and value == parse_number(reference(prompt)))
