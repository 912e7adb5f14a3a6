"""Rows as MATH, MATH-500 and GSM8K have them, and math-verify behind our own check."""

import sys

import pytest

from skyrl.envs.base import ENVIRONMENTS
from skyrl.tasks import math
from skyrl.types import UserError

ROWS = (
    {"problem": "2+2?", "solution": "It is 4: $\\boxed{4}$.", "level": "Level 1"},
    {"problem": "Half?", "answer": "\\frac{1}{2}", "solution": "So \\boxed{\\frac12}."},
    {"question": "3+4?", "answer": "3+4=<<3+4=7>>7\n#### 7"},
    {"prompt": "Which?", "answer": 5},
)


def test_rows_of_all_kinds(rows, play):
    prompts = rows("math", *ROWS, options={"system": "Be brief."})
    assert [p.extra["answer"] for p in prompts] == ["4", "\\frac{1}{2}", "7", "5"]
    wanted = ["It is 4: $\\boxed{4}$.", "So \\boxed{\\frac12}.", "3+4=7\n#### 7", "\\boxed{5}"]
    assert [p.extra["solution"] for p in prompts] == wanted
    assert [m["role"] for m in prompts[0].messages] == ["system", "user"]
    assert prompts[0].messages[1]["content"] == f"2+2?\n{math.INSTRUCTION}"
    for prompt in prompts:
        assert play(prompt, prompt.extra["solution"])[0].reward == 1.0


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("\\boxed{0.5}", 1.0), ("#### 1/2", 1.0), ("\\boxed{1} no, \\boxed{\\frac{2}{4}}", 1.0), ("0.5", 0.0),
        ("\\boxed{0.5} or \\boxed{0.6}", 0.0), ("\\boxed{0.5, 0.6}", 0.0), ("\\boxed{}", 0.0), ("", 0.0),
        ("\\boxed{9^{9^{9^9}}}", 0.0), ("\\boxed{" * 5000, 0.0),
    ],
)  # fmt: skip
def test_the_reward_does_what_it_says(rows, play, answer, reward):
    result, _ = play(rows("math", ROWS[1])[0], answer)
    assert (result.reward, result.metrics["correct:mean"]) == (reward, reward)


def test_math_verify_is_asked_after_our_own_check(rows, play, monkeypatch):
    pytest.importorskip("math_verify", reason="math-verify is not installed (extra dev)")
    prompt = rows("math", {"problem": "Solve.", "answer": "x \\in \\{1, 2\\}"}, options={"reward": "math_verify"})[0]
    results = [
        play(prompt, f"\\boxed{{{a}}}", reward="math_verify")[0] for a in ("\\{2, 1\\}", "\\{1, 3\\}", "1" * 999)
    ]
    assert [(r.reward, r.metrics["correct:mean"]) for r in results] == [(1.0, 1.0), (0.0, 0.0), (0.0, 0.0)]
    monkeypatch.setattr(math, "_verifier", lambda: pytest.fail("asked for what our own check knows"))
    assert play(prompt, "\\boxed{\\{1,2\\}}", reward="math_verify")[0].reward == 1.0
    assert play(prompt, "no box", reward="math_verify")[0].reward == 0.0


def test_math_verify_plays_in_a_worker_and_is_named_where_it_is_missing(rows, monkeypatch):
    env = ENVIRONMENTS.get("math")
    assert env.plays_in_process({}) and not env.plays_in_process({"reward": "math_verify"})
    math._verifier.cache_clear()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    for name in ("math", "single_turn", "arithmetic"):
        (check,) = ENVIRONMENTS.get(name).row_checks({"reward": "math_verify"})
        with pytest.raises(UserError, match=r"'math-verify' is not installed; run pip install 'skyrl-spmd\[math\]'"):
            check(rows("math", *ROWS)[0])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"problem": "?"}, "field 'answer' is missing"),
        ({"answer": "5"}, "field 'problem' is missing"),
        ({"problem": "?", "solution": "It is 5."}, "field 'solution' does not hold an answer marked by"),
        ({"problem": "?", "answer": " "}, "field 'answer' does not hold"),
        ({"problem": 5, "answer": "5"}, "field 'problem' is int"),
        ({"problem": "?", "answer": ["5"]}, "field 'answer' is list"),
    ],
)
def test_a_row_that_cannot_be_judged_is_refused_by_its_line(rows, row, told):
    with pytest.raises(UserError, match=r"train\.jsonl:1: " + told):
        rows("math", row)
