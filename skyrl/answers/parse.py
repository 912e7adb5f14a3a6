"""A small parser for arithmetic and algebra as people and models write it. Nothing is ever handed to eval().

Grammar (implicit products such as 2x or 3(4+1) are understood; two numbers in a row are not):
    sum      = product (("+" | "-") product)*
    product  = sign (("*" | "/") sign | factor)*
    sign     = ("-" | "+") sign | power
    power    = atom ("%" | "!")* ("^" sign)?
    atom     = number fraction? | letter | "pi" | "(" sum ")" | "{" sum "}" | "|" sum "|" | function | root | fraction
    function = ("sin" | "ln" | ...) ("_" argument)? ("^" argument)? (group | factor+)
    root     = "sqrt" ("[" sum "]")? argument;  fraction = ("frac" | "binom") argument argument
    argument = group | one digit, letter or command (LaTeX without braces: \\frac12)
"""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from fractions import Fraction
from hashlib import blake2b
from typing import Any, NamedTuple

MAX_CHARACTERS = 256
MAX_DEPTH = 40
MAX_TERMS = 64  # factors of a binomial coefficient
MAX_FACTORIAL = 200
MAX_BITS = 4096  # of a numerator or denominator, before a power is computed
BITS, MAX_MAGNITUDE, ZERO = 2048, 256, -1280  # binary digits; of the largest value; of what counts as rounding


class ExpressionError(ValueError):
    """The text is no expression of this grammar, or has no finite value of bearable size."""


class Node(NamedTuple):
    """op: "number" (value), "name" (value), "neg", "abs", "!" (one argument), "+", "-", "*", "/", "^", "mixed" (whole
    part and fraction; two), "root" (radicand, degree), "call" (value: the function; argument, and a base for log)."""

    op: str
    value: Fraction | str | None = None
    args: tuple[Node, ...] = ()


FUNCTIONS = frozenset("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln lg log exp".split())
_ROUNDING = {"\u230a": "\u230b", "\u2308": "\u2309"}  # floor and ceiling
NAMES = frozenset("alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi omega infty pi".split())
_WORDS = FUNCTIONS | NAMES | {"sqrt", "frac", "binom"}
_TOKEN = re.compile(
    rf"\s*(?:(?P<name>(?:[A-Za-z]|\d+|\\(?:{'|'.join(sorted(NAMES))}))_(?:\{{\w+\}}|\d+|[A-Za-z]))|"
    r"(?P<number>(?:\d+\.?\d*|\.\d+)[eE][-+]?\d{1,3}(?!\w)|\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])|\d+\.?\d*|\.\d+)|"
    r"\\?(?P<word>[A-Za-z]+)|(?P<sign>\*\*|.))",
    re.S | re.A,
)
# Typographic and LaTeX forms of the same thing: characters, commands, and what needs a pattern.
_CHARACTERS = str.maketrans(
    {"\u2212": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-", "\u00d7": "*", "\u22c5": "*", "\u00b7": "*"}
    | {"\u00f7": "/", "\u03c0": r"\pi ", "\u03b8": r"\theta ", "\u03b1": r"\alpha ", "\u03b2": r"\beta ", "~": " "}
    | {"\u221a": r"\sqrt ", "\u221e": r"\infty ", "\u2205": "\u2983\u2984", "\u2a7d": "\u2264", "\u2a7e": "\u2265"}
    | {"\u00bc": r"\frac14", "\u00bd": r"\frac12", "\u00be": r"\frac34"}
)
_COMMANDS = {
    command: text.replace("_", " ")
    for text, commands in {
        "*": "cdot times ast", "/": "div", r"\frac": "dfrac tfrac cfrac", r"\binom": "dbinom tbinom",
        "|": "vert lvert rvert",
        "_": "left right big Big bigl bigr displaystyle quad qquad", "(": "langle", ")": "rangle",
        "\u2983": "lbrace", "\u2984": "rbrace", "\u2983\u2984": "emptyset varnothing", "\u2264": "le leq leqslant",
        "\u2265": "ge geq geqslant", "\u2260": "ne neq", "<": "lt", ">": "gt", "\u2208": "in", "\u2248": "approx",
        "\u222a": "cup", "\u230a": "lfloor", "\u230b": "rfloor", "\u2308": "lceil", "\u2309": "rceil",
        "\u2026": "dots ldots cdots dotsc", "\u00b1": "pm", "\u2213": "mp", "\u00b0": "degree circ",
    }.items()
    for command in commands.split()
}  # fmt: skip
_SPELLINGS: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(r"\\([A-Za-z]+)"), lambda m: _COMMANDS.get(m[1], m[0])),
    (re.compile(r"\\[,;:! ]|\\?\$"), " "),
    (re.compile(r"\^\s?\{\s?\u00b0\s?\}|\^\s?\u00b0"), "\u00b0"),
    (re.compile(r"(?<=\d)\s*x\s*(?=10\s*\^)"), "*"),
    (
        re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+"),
        lambda m: f"^{{{unicodedata.normalize('NFKC', m[0])}}}",
    ),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\binfinity\b"), r"\\infty "),
]


def spell(text: str) -> str:
    """The text with one spelling for each operator, relation, bracket and space."""
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return text.translate(_CHARACTERS)


def parse(text: str) -> Node:
    """The tree of `text`. Raises ExpressionError when it is no expression, or above 256 characters or 40 levels."""
    if len(text) > MAX_CHARACTERS:
        raise ExpressionError(f"longer than {MAX_CHARACTERS} characters")
    return _Parser(spell(text)).whole()


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, str]] = []
        for match in _TOKEN.finditer(text.rstrip()):
            kind, token = match.lastgroup or "", match[match.lastgroup or 0]
            if kind == "word" and token not in _WORDS:
                if len(token) > 3 or "\\" in match[0]:
                    raise ExpressionError(f"unknown word {token!r}")
                self.tokens += [("name", letter) for letter in token]
            else:
                token = re.sub(r"[\\{}]", "", token) if kind == "name" else "^" if token == "**" else token
                self.tokens.append((kind, token))
        self.position = 0
        self.depth = 0
        self.bars = 0

    def whole(self) -> Node:
        node = self.sum()
        if self.position < len(self.tokens):
            raise ExpressionError(f"unexpected {self.tokens[self.position][1]!r}")
        return node

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.position] if self.position < len(self.tokens) else ("", "")

    def take(self, *signs: str) -> str:
        """The next token if it is one of these signs, which is then used up; else ""."""
        kind, token = self.peek()
        if kind == "sign" and token in signs:
            self.position += 1
            return token
        return ""

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ExpressionError(f"nested deeper than {MAX_DEPTH}")

    def sum(self) -> Node:
        self.deeper()
        node = self.product()
        while sign := self.take("+", "-"):
            node = Node(sign, None, (node, self.product()))
        self.depth -= 1
        return node

    def product(self) -> Node:
        node = self.sign()
        while True:
            if sign := self.take("*", "/"):
                node = Node(sign, None, (node, self.sign()))
            elif self.begins_factor():
                node = Node("*", None, (node, self.power()))
            else:
                return node

    def begins_factor(self) -> bool:
        kind, token = self.peek()
        return kind in ("word", "name") or token in ("(", "{", *_ROUNDING) or (token == "|" and not self.bars)

    def sign(self) -> Node:
        negative = False
        while sign := self.take("+", "-"):
            negative ^= sign == "-"
        node = self.power()
        return Node("neg", None, (node,)) if negative else node

    def power(self) -> Node:
        node = self.atom()
        while sign := self.take("%", "!"):
            node = Node("!", None, (node,)) if sign == "!" else Node("/", None, (node, Node("number", Fraction(100))))
        if self.take("^"):
            self.deeper()  # a tower of powers recurses here without passing through sum()
            node = Node("^", None, (node, self.sign()))
            self.depth -= 1
        return node

    def group(self) -> Node:
        for opening, closing in (("(", ")"), ("{", "}"), ("[", "]"), ("|", "|"), *_ROUNDING.items()):
            if self.take(opening):
                bars, self.bars = self.bars, int(opening == "|")
                node = self.sum()
                self.bars = bars
                if not self.take(closing):
                    raise ExpressionError(f"{opening!r} is not closed")
                if opening in _ROUNDING:
                    return Node("call", opening, (node,))
                return Node("abs", None, (node,)) if opening == "|" else node
        raise ExpressionError("expected a bracket")

    def argument(self) -> Node:
        """What LaTeX takes without braces: of a number its first digit alone."""
        kind, token = self.peek()
        if kind == "number" and token.isdigit() and len(token) > 1:
            self.tokens[self.position] = (kind, token[1:])
            return Node("number", Fraction(token[0]))
        self.deeper()
        node = self.atom()
        self.depth -= 1
        return node

    def atom(self) -> Node:
        kind, token = self.peek()
        if kind == "":
            raise ExpressionError("ends too early")
        if kind == "sign":
            if token == "[":
                raise ExpressionError("unexpected '['")
            return self.group()
        self.position += 1
        if kind == "number":
            return self.mixed(Node("number", Fraction(token.replace(",", ""))))
        if token == "sqrt":
            degree = self.group() if self.peek() == ("sign", "[") else Node("number", Fraction(2))
            return Node("root", None, (self.argument(), degree))
        if token == "frac":
            return Node("/", None, (self.argument(), self.argument()))
        if token == "binom":
            return Node("call", token, (self.argument(), self.argument()))
        return self.call(token) if token in FUNCTIONS else Node("name", token)

    def mixed(self, number: Node) -> Node:
        """3\\frac{1}{2} is three and a half. Raises ExpressionError where the second part is no proper fraction."""
        if self.peek() != ("word", "frac") or number.value != int(number.value or 0):
            return number
        fraction = self.atom()
        above, below = (part.value if part.op == "number" else None for part in fraction.args)
        if not (isinstance(above, Fraction) and isinstance(below, Fraction)):
            return Node("*", None, (number, fraction))
        if not 0 < above < below:
            raise ExpressionError("a number before a fraction that is not below 1")
        return Node("mixed", None, (number, fraction))

    def call(self, function: str) -> Node:
        base = (self.argument(),) if self.take("_") else ()
        exponent = self.argument() if self.take("^") else None
        if function == "lg":
            function, base = "log", (Node("number", Fraction(10)),)
        if exponent == Node("neg", None, (Node("number", Fraction(1)),)) and function in ("sin", "cos", "tan"):
            function, exponent = f"arc{function}", None
        self.deeper()
        node = self.power()
        while self.begins_factor() and self.peek()[1] not in FUNCTIONS and self.tokens[self.position - 1][1] != ")":
            node = Node("*", None, (node, self.power()))
        self.depth -= 1
        node = Node("call", function, (node, *base))
        return node if exponent is None else Node("^", None, (node, exponent))


def names_of(node: Node) -> set[str]:
    """The variables in a tree."""
    own = {str(node.value)} if node.op == "name" and node.value not in ("pi", "e", "i") else set()
    return own.union(*map(names_of, node.args))


def evaluate(node: Node, point: int | None = None) -> Any:
    """The value of a tree: a Fraction, exactly. With a `point` names have odd values, another set for each point, and
    roots and functions have values of mpmath with 2048 bits; without one they are refused.

    Raises ExpressionError for what is refused, division by zero, and values that are huge or tiny.
    """
    if isinstance(node.value, Fraction):
        return node.value
    if point is None and node.op in ("name", "root", "call"):
        raise ExpressionError(f"no rational number: {node.value or node.op}")
    arguments = [evaluate(argument, point) for argument in node.args]
    if not all(isinstance(argument, Fraction) for argument in arguments):
        arguments = [mp().convert(argument) for argument in arguments]
    a, b = (arguments[0], arguments[-1]) if arguments else (None, None)
    if b == 0 and node.op in ("/", "root"):
        raise ExpressionError("division by zero")
    if node.op == "!" and (not isinstance(a, Fraction) or a.denominator != 1 or not 0 <= a <= MAX_FACTORIAL):
        raise ExpressionError(f"factorial of {a}")
    value = _OPERATIONS[node.op](a, b) if node.op in _OPERATIONS else _named_value(node, arguments, point or 0)
    if isinstance(value, Fraction):
        return value
    size = mp().mag(value) if value else 0
    if point is None or ZERO <= size < -MAX_MAGNITUDE or not size <= MAX_MAGNITUDE:  # NaN too
        raise ExpressionError("no rational number" if point is None else "too large or too small to compare")
    return value if size >= ZERO else Fraction(0)


def _power(base: Any, exponent: Any) -> Any:
    whole = isinstance(base, Fraction) and exponent.denominator == 1
    if base == 0 and not (whole and exponent >= 0):
        if not exponent.real > 0:
            raise ExpressionError("division by zero")
        return base
    if whole:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent)
        if bits > MAX_BITS:
            raise ExpressionError("power too large")
        return base ** int(exponent)
    logarithm = mp().log(mp().convert(base)) * mp().convert(exponent)
    if abs(logarithm) > MAX_MAGNITUDE:
        raise ExpressionError("power too large")
    return mp().exp(logarithm)


def _binomial(above: Any, below: Any) -> Any:
    """above (above - 1) ... / below!, for any `above`."""
    if isinstance(above, Fraction) and above.denominator == 1 and 0 <= below <= above:
        below = min(below, above - below)
    if not (isinstance(below, Fraction) and below.denominator == 1 and 0 <= below <= MAX_TERMS):
        raise ExpressionError(f"binomial coefficient with {below}")
    return math.prod((above - k for k in range(int(below))), start=Fraction(1)) / math.factorial(int(below))


def _rounded(name: str, argument: Node, value: Any) -> Fraction:
    """Floor or ceiling of a real number, where the nearest whole one counts as met; of no variable, since what two
    expressions come to at a few points says nothing then."""
    if names_of(argument) or value.imag:
        raise ExpressionError("rounding of what is no real number")
    near = int(mp().nint(mp().convert(value).real))
    if agree(value, near):
        return Fraction(near)
    return Fraction(int((mp().floor if name == "\u230a" else mp().ceil)(mp().convert(value).real)))


def _root(radicand: Any, degree: Any) -> Any:
    odd = mp().isint(degree) and int(degree.real) % 2 == 1
    negative = odd and radicand.imag == 0 and radicand.real < 0
    return -_power(-radicand, 1 / degree) if negative else _power(radicand, 1 / degree)


_OPERATIONS: dict[str, Any] = {
    "neg": lambda a, b: -a, "abs": lambda a, b: abs(a), "+": lambda a, b: a + b, "mixed": lambda a, b: a + b,
    "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b, "^": _power, "root": _root,
    "!": lambda a, b: Fraction(math.factorial(int(a))),
}  # fmt: skip


def _named_value(node: Node, arguments: list[Any], point: int) -> Any:
    """Of a name or a function. The base of a bare "log" is a name as well: nobody says which it is."""
    name = str(node.value)
    if name == "binom":
        return _binomial(*arguments)
    if name in _ROUNDING:
        return _rounded(name, node.args[0], arguments[0])
    if node.op == "call":
        a = mp().convert(arguments[0])
        if abs(a) > MAX_MAGNITUDE and name not in ("ln", "log"):
            raise ExpressionError("argument too large")
        if name != "log":
            return getattr(mp(), name.replace("arc", "a"))(a)
        return mp().log(a) / mp().log(arguments[1] if len(arguments) > 1 else _named_value(Node("name", "log"), [], 0))
    constant = {"pi": mp().pi, "e": mp().e, "i": mp().j}.get(name)
    if constant is not None:
        return +constant
    digest = int.from_bytes(blake2b(f"{name}/{point}".encode(), digest_size=16).digest(), "little")
    return Fraction(digest, 2**128) * (-1 if point == 1 or (point == 2 and digest & 1) else 1) + Fraction(point == 0, 2)


def agree(a: Any, b: Any) -> bool:
    """Whether two values are the same up to rounding."""
    return a == b or mp().mag(mp().convert(a) - mp().convert(b)) <= ZERO


@functools.cache
def mp() -> Any:
    """mpmath's context of our own precision."""
    import mpmath  # a tenth of a second, and most runs never need it

    context = mpmath.mp.clone()
    context.prec = BITS
    return context
