"""Answer extraction and comparison."""

import random
from fractions import Fraction

import pytest

from skyrl.envs.rewards import REWARDS
from skyrl.envs.rewards.math import answers_equal, extract_answer, last_number, parse_number
from skyrl.types import Prompt, UserError


def prompt(answer):
    return Prompt("m/train/0", "m", [{"role": "user", "content": "?"}], {} if answer is None else {"answer": answer})


@pytest.mark.parametrize(
    "text, value",
    [("18", 18), ("-3", -3), ("+3", 3), ("1,234", 1234), ("$5.50", "5.5"), ("-$5", -5), ("$-5", -5), (".5", "0.5")]
    + [("3.", 3), ("18.00", 18), ("50%", 50), (r"50\%", 50), (r"\$7", 7), ("\u22124", -4), (" 7 ", 7), ("007", 7)],
)
def test_numbers(text, value):
    assert parse_number(text) == Fraction(value)


@pytest.mark.parametrize(
    "text", ["", "-", ".", "$", "1,23", "12,34,567", "1.2.3", "9*2", "1/2", "1 2", "1e3", "x", "--3", "-$-3", "\u0663"]
)
def test_what_is_no_number(text):
    assert parse_number(text) is None


def test_numbers_survive_writing():
    rng = random.Random(0)
    for _ in range(500):
        value = Fraction(rng.randrange(-(10**9), 10**9), 10 ** rng.randrange(4))
        assert parse_number(f"{float(value):,.4f}") == value


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so\n#### 18", "18"),
        ("#### 1\nno\n####   2 apples \nmore", "2 apples"),
        (r"thus \boxed{\frac{1}{2}} holds", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"so $\boxed 7$.", "7"),
        (r"\boxed{1}, no: \boxed 2.5, done", "2.5"),
        (r"\boxed B", "B"),
        (r"the \boxed environment", None),
        ("#### 3 and \\boxed{4}", "4"),
        (r"\boxed{5} then #### 6", "6"),
        ("#### 5\nno, \\boxed{6}", "6"),
        ("#### $7$", "7"),
        ("#### **7**", "7"),
        ("**#### 7**", "7"),
        (r"#### \boxed{7}", "7"),
        ("#### `7`", "7"),
        ("#### The answer is $7$.", "7"),
        (r"#### $\frac12$", r"\frac12"),
        ("#### 18 ####", "18"),
        ("#### 3 #### 4", "4"),
        ("##### 5", None),
        ("### 5", None),
        ("#### Final Answer\n18", None),
        ("#### Step 1\nadd\n#### 18", "18"),
        ("#### 18\n#### Verification\nit holds", "18"),
        ("\\boxed{7}\n#### Explanation\nit holds", "7"),
        ("#### Answer\n\\boxed{3}", "3"),
        ("#### 1. Set up\nadd", None),
        ("#### 2 Solve for x\nadd", None),
        ("#### 18\n\nQuestion: and now?", "18"),
        ("#### 7 dollars per day\nand so on", "7 dollars per day"),
        ("#### x=5 or x=6\nand so on", "x=5 or x=6"),
        ("#### Paris", "Paris"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\fbox{\text{(B)}}", r"\text{(B)}"),
        ("the answer is 18", None),
        ("####", None),
        ("####\n18", None),
        (r"\boxed{1", None),
        ("", None),
    ],
)
def test_extraction(text, answer):
    assert extract_answer(text) == answer


def test_last_number():
    assert last_number("between 3 and 1,200.50 $") == "1,200.50"
    assert last_number("it is -4.") == "-4"
    assert last_number("none") is None


@pytest.mark.parametrize(
    "given, wanted",
    [("18", "18"), ("18.0", "18"), ("$18", "18"), ("1,800", "1800"), ("18 eggs", "18"), ("18 dollars.", "18")]
    + [("18%", "18"), ("0.5", "1/2"), ("2/4", "1/2"), (r"\frac{1}{2}", "0.5"), ("-.5", "-1/2"), ("blue", "blue")]
    + [("sqrt(2)/2", "1/sqrt(2)"), (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"), ("x^2+2x+1", "(x+1)^2")]
    + [
        (r"2\pi", "pi*2"),
        ("x*y+x", "x(y+1)"),
        ("sqrt(8)", "2sqrt(2)"),
        ("(x^2-1)/(x-1)", "x+1"),
        ("2^(1/2)", "sqrt(2)"),
    ]
    + [("sqrt(3+2sqrt(2))", "1+sqrt(2)")],
)
def test_equal(given, wanted):
    assert answers_equal(given, wanted)


@pytest.mark.parametrize(
    "given, wanted",
    [("17", "18"), ("", ""), ("", "0"), ("18 or 19", "18"), ("9*2", "18"), ("36/2", "18"), ("9+9", "18"), ("1.8", "18")]
    + [
        ("180", "18"),
        ("-18", "18"),
        ("18 19", "18"),
        ("0.333", "1/3"),
        ("1/0", "1/2"),
        ("x+1", "x"),
        ("sqrt(2)", "1.5"),
    ]
    + [("1.41421356", "sqrt(2)"), ("eggs", "gegs"), ("x^2", "x^3"), ("2pi", "pi"), ("x", "y"), ("red", "blue")]
    + [("1/(x-x)", "x"), ("__import__('os')", "x"), ("1.4142135623730951", "sqrt(2)")],
)
def test_not_equal(given, wanted):
    assert not answers_equal(given, wanted)


def test_rewards():
    math, lenient, number = REWARDS.get("math"), REWARDS.get("math_last_number"), REWARDS.get("number")
    assert math("so #### 18", prompt("18")) == 1.0 and math("so 18", prompt("18")) == 0.0
    assert lenient("so 18", prompt("18")) == 1.0 and lenient("18, or #### 19", prompt("18")) == 0.0
    assert number(" .50\n", prompt("0.5")) == 1.0
    assert number("1/2", prompt("0.5")) == number("0.5 0.5", prompt("0.5")) == number("", prompt("0.5")) == 0.0
    with pytest.raises(UserError, match="prompt m/train/0: field 'answer' is missing"):
        math("#### 1", prompt(None))
