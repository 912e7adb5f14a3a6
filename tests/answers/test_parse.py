"""The evaluator against Python's own parser and Fraction arithmetic, on random expressions."""

import ast
import operator
import random
from fractions import Fraction

import pytest

from skyrl.answers.parse import MAX_CHARACTERS, ExpressionError, evaluate, parse

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def by_python(text):
    """The value by Python's grammar and Fractions (numbers read as written, not as floats)."""

    def value(node):
        if isinstance(node, ast.Expression):
            return value(node.body)
        if isinstance(node, ast.Constant):
            return Fraction(ast.get_source_segment(text, node))
        if isinstance(node, ast.UnaryOp):
            inner = value(node.operand)
            return -inner if isinstance(node.op, ast.USub) else inner
        if isinstance(node.op, ast.Pow):
            return value(node.left) ** int(value(node.right))
        return OPERATORS[type(node.op)](value(node.left), value(node.right))

    return value(ast.parse(text, mode="eval"))


def random_expression(rng, depth):
    kind = rng.random()
    if depth == 0 or kind < 0.25:
        return rng.choice(
            [str(rng.randrange(1000)), f"{rng.randrange(99)}.{rng.randrange(99):02}", f".{rng.randrange(9)}"]
        )
    if kind < 0.35:
        return f"-{random_expression(rng, depth - 1)}"
    if kind < 0.45:
        return f"({random_expression(rng, depth - 1)})**{rng.choice(['0', '1', '2', '3', '-1', '-2'])}"
    if kind < 0.6:
        return f"({random_expression(rng, depth - 1)})"
    sign = rng.choice(["+", "-", "*", "/", " + ", " - "])
    return random_expression(rng, depth - 1) + sign + random_expression(rng, depth - 1)


def test_random_expressions_have_pythons_value():
    rng = random.Random(0)
    values, zero_divisions = 0, 0
    while values < 3000:
        text = random_expression(rng, rng.randrange(1, 5))
        if len(text) > MAX_CHARACTERS:
            continue
        try:
            wanted = by_python(text)
        except ZeroDivisionError:
            zero_divisions += 1
            with pytest.raises(ExpressionError, match="division by zero|too large"):
                evaluate(parse(text))
            continue
        try:
            assert evaluate(parse(text)) == wanted, text
        except ExpressionError as error:
            assert "too large" in str(error), text
        values += 1
    assert zero_divisions > 10


@pytest.mark.parametrize(
    "text, value",
    [
        ("-2^2", -4),
        ("(-2)^2", 4),
        ("2^3^2", 512),
        ("2**-1", "1/2"),
        ("1,234,567.5+0.5", 1234568),
        ("$5*20%", 1),
        ("3(4+1)", 15),
        ("(1+2)(3)", 9),
        (r"\frac{1}{2}+\dfrac{3}{4}", "5/4"),
        (r"2\cdot 3\times4\div 8", 3),
        (r"\left(1+2\right)", 3),
        ("6\u00f73\u00d72\u22121", 3),
        ("--3", 3),
        ("2-+3", -1),
        (" 7 ", 7),
        ("5.", 5),
    ],
)
def test_spellings(text, value):
    assert evaluate(parse(text)) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    ["", " ", "1 2", "1+", "*3", "(1", "1)", "(1}", "()", "1//2", "1,23", "1,2345", "1.2.3", "eggs", "__import__('os')"]
    + ["1/0", "1/(2-2)", "0^-1", "2^2049", "2^0.5", "9^64^2", "x", "sqrt(2)", "sqrt 2", "((10^64)^64)^64", "\u0663"]
    + ["(" * 41 + "1" + ")" * 41, "2^" * 41 + "1", "1+" * 128 + "1", "-" * 300 + "1"],
)
def test_everything_else_is_refused(text):
    with pytest.raises(ExpressionError):
        evaluate(parse(text))


def test_random_rubbish_never_raises_anything_else():
    rng = random.Random(1)
    alphabet = "0123456789.,+-*/^()%{}$ xyp\\fracsqrt\n\x00\u00e9="
    for _ in range(5000):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(40)))
        try:
            evaluate(parse(text))
        except ExpressionError:
            pass
