"""Rewards that look at characters and form."""

import pytest

from skyrl.envs.rewards import REWARDS, register_reward
from skyrl.envs.rewards.text import is_digits
from skyrl.types import Prompt, UserError

PROMPT = Prompt("t/train/0", "t", [{"role": "user", "content": "?"}], {"answer": "123"})


def test_the_last_digits_of_a_text():
    digits = REWARDS.get("last_digits")
    assert digits("1 + 122 is 123.", PROMPT) == 1.0 and digits("123 or 4", PROMPT) == 0.0
    assert digits("= 193", PROMPT) == pytest.approx(1 / 3) and digits("none", PROMPT) == 0.0


def test_exact_and_characters():
    exact, characters = REWARDS.get("exact"), REWARDS.get("characters")
    assert [exact(text, PROMPT) for text in ("123", " 123\n", "0123", "12", "")] == [1, 1, 0, 0, 0]
    assert characters(" 123\n", PROMPT) == 1.0 and characters("", PROMPT) == 0.0
    assert characters("193", PROMPT) == pytest.approx(2 / 3)
    assert characters("123123", PROMPT) == 0.5  # too long is no way to a full reward


def test_format():
    form = REWARDS.get("format")
    assert form("steps\n#### 1,200", PROMPT) == form("#### -3.5\n", PROMPT) == 1.0
    for text in ("1", "####", "#### x", "#### 1\nmore", "#### 1\n#### 2", "#### 1 ####", "#### 9*2"):
        assert form(text, PROMPT) == 0.0, text


def test_is_digits():
    assert is_digits("042\n") and not any(map(is_digits, ("", " ", "4 2", "-4", "4.2", "\u00b2", "\u0663")))


def test_registering():
    @register_reward("test_only_length")
    def length(text, prompt):
        return float(len(text))

    assert REWARDS.get("test_only_length")("abc", PROMPT) == 3.0
    with pytest.raises(UserError, match="registered twice"):
        register_reward("exact")(length)
    with pytest.raises(UserError, match="env.options.reward: no reward called 'exat'; choose one of: .*exact"):
        REWARDS.get("exat", "env.options.reward")
