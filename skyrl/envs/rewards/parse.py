"""A small parser for arithmetic and algebra as people and models write it. Nothing is ever handed to eval().

Grammar (implicit products such as 2x or 3(4+1) are understood; two numbers in a row are not):
    sum     = product (("+" | "-") product)*
    product = sign (("*" | "/") sign | sign)*
    sign    = ("-" | "+") sign | power
    power   = percent ("^" sign)?
    percent = atom "%"*
    atom    = number | letter | "pi" | "(" sum ")" | "sqrt" group | "frac" group group
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, NamedTuple

MAX_CHARACTERS = 256
MAX_DEPTH = 40
MAX_EXPONENT = 64
MAX_BITS = 4096  # of a numerator or denominator, before a power is computed


class ExpressionError(ValueError):
    """The text is no expression of this grammar, or has no finite value of bearable size."""


class Node(NamedTuple):
    """op: "number" (value), "name" (value), "neg", "sqrt" (one argument), "+", "-", "*", "/", "^" (two)."""

    op: str
    value: Fraction | str | None = None
    args: tuple[Node, ...] = ()


_TOKEN = re.compile(
    r"\s*(?:(\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])|\d+\.?\d*|\.\d+)|(sqrt|frac|pi|[A-Za-z]+)|(\*\*|.))", re.S | re.A
)
_SPELLINGS: list[tuple[re.Pattern[str], Any]] = [  # typographic and LaTeX forms of the same thing
    (re.compile("[\u2212\u2013\ufe63\uff0d]"), "-"),
    (re.compile(r"\u00d7|\u22c5|\u00b7|\\cdot(?![A-Za-z])|\\times(?![A-Za-z])"), "*"),
    (re.compile(r"\u00f7|\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[,;:! ]|\\?\$|~"), " "),
    (re.compile(r"\\[dt]?frac(?![A-Za-z])"), " frac"),
    (
        re.compile(r"\\(sqrt|pi)(?![A-Za-z])|\u03c0|\u221a"),
        lambda m: {"\u03c0": " pi ", "\u221a": " sqrt"}.get(m[0], f" {m[1]} "),
    ),
    (re.compile(r"\\%"), "%"),
]


def parse(text: str) -> Node:
    """The tree of `text`. Raises ExpressionError when it is no expression, or above 256 characters or 40 levels."""
    if len(text) > MAX_CHARACTERS:
        raise ExpressionError(f"longer than {MAX_CHARACTERS} characters")
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return _Parser(text).whole()


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, str]] = []
        for number, word, sign in _TOKEN.findall(text.rstrip()):
            kind = "number" if number else "word" if word else "sign"
            self.tokens.append((kind, number or word or ("^" if sign == "**" else sign)))
        self.position = 0
        self.depth = 0

    def whole(self) -> Node:
        node = self.sum()
        if self.position < len(self.tokens):
            raise ExpressionError(f"unexpected {self.tokens[self.position][1]!r}")
        return node

    def take(self, *signs: str) -> str:
        """The next token if it is one of these signs, which is then used up; else ""."""
        if self.position < len(self.tokens) and self.tokens[self.position] in [("sign", sign) for sign in signs]:
            self.position += 1
            return self.tokens[self.position - 1][1]
        return ""

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ExpressionError(f"nested deeper than {MAX_DEPTH}")
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
            elif self.position < len(self.tokens) and (
                self.tokens[self.position][0] == "word" or self.tokens[self.position][1] in "({"
            ):
                node = Node("*", None, (node, self.power()))
            else:
                return node

    def sign(self) -> Node:
        negative = False
        while sign := self.take("+", "-"):
            negative ^= sign == "-"
        node = self.power()
        return Node("neg", None, (node,)) if negative else node

    def power(self) -> Node:
        node = self.atom()
        while self.take("%"):
            node = Node("/", None, (node, Node("number", Fraction(100))))
        if self.take("^"):
            self.depth += 1  # a tower of powers recurses here without passing through sum()
            if self.depth > MAX_DEPTH:
                raise ExpressionError(f"nested deeper than {MAX_DEPTH}")
            node = Node("^", None, (node, self.sign()))
            self.depth -= 1
        return node

    def group(self) -> Node:
        for opening, closing in (("(", ")"), ("{", "}")):
            if self.take(opening):
                node = self.sum()
                if not self.take(closing):
                    raise ExpressionError(f"{opening!r} is not closed")
                return node
        raise ExpressionError("expected a bracket")

    def atom(self) -> Node:
        if self.position >= len(self.tokens):
            raise ExpressionError("ends too early")
        kind, token = self.tokens[self.position]
        if kind == "sign":
            return self.group()
        self.position += 1
        if kind == "number":
            return Node("number", Fraction(token.replace(",", "")))
        if token == "sqrt":
            return Node("sqrt", None, (self.group(),))
        if token == "frac":
            return Node("/", None, (self.group(), self.group()))
        if len(token) > 1 and token != "pi":
            raise ExpressionError(f"unknown word {token!r}")
        return Node("name", token)


def evaluate(node: Node) -> Fraction:
    """The exact value of a tree. Raises ExpressionError for names, roots, division by zero and huge powers."""
    if isinstance(node.value, Fraction):
        return node.value
    if node.op in ("name", "sqrt"):
        raise ExpressionError(f"no rational number: {node.value or node.op}")
    arguments = [evaluate(argument) for argument in node.args]
    if node.op == "neg":
        return -arguments[0]
    a, b = arguments
    if node.op == "+":
        return a + b
    if node.op == "-":
        return a - b
    if node.op == "*":
        return a * b
    if b == 0 and node.op == "/":
        raise ExpressionError("division by zero")
    return a / b if node.op == "/" else _power(a, b)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) > MAX_EXPONENT:
        raise ExpressionError(f"exponent {exponent} is no whole number up to {MAX_EXPONENT}")
    if base == 0 and exponent < 0:
        raise ExpressionError("division by zero")
    if max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent) > MAX_BITS:
        raise ExpressionError("power too large")
    return base ** int(exponent)
