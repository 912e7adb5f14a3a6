"""Stop strings across borders of tokens, in windows, with half characters; against a search of the whole text."""

import random

import pytest

from skyrl.sampler.stop import StringStop


def letters(tokens, after=None):
    return "".join("ab<|>\u00e9"[t] for t in tokens)


def utf8(tokens, after=None):
    """A byte-level decoder: half characters come out as replacement characters."""
    return bytes(tokens).decode("utf-8", errors="replace")


def spaced(tokens, after=None):
    """Drops the leading space of a window, as sentencepiece does."""
    return "".join(" w"[t] for t in tokens).removeprefix(" ")


def first_hit(strings, decode, tokens):
    rule = StringStop(strings, decode)
    return next((i for i, token in enumerate(tokens) if rule.push(token)), None)


def test_string_over_several_tokens():
    assert first_hit(("<|>",), letters, [0, 2, 3, 1, 2, 3, 4, 0]) == 6
    assert first_hit(("ab", "<|>"), letters, [2, 3, 0, 1]) == 3


def test_string_inside_one_token():
    assert (
        first_hit(("END",), lambda tokens, after=None: "".join({0: "x", 1: "..END.."}[t] for t in tokens), [0, 0, 1, 0])
        == 2
    )


def test_half_characters():
    data = list("ab\u00e9\u4e16END".encode())
    assert first_hit(("\u4e16",), utf8, data) == 6
    assert first_hit(("END",), utf8, data) == len(data) - 1


def test_dropped_leading_space_is_no_match():
    assert first_hit(("ww",), spaced, [1, 0] * 90) is None


def test_empty_string_is_refused():
    with pytest.raises(AssertionError, match="empty stop string"):
        StringStop(("a", ""), letters)


@pytest.mark.parametrize("decode, size", [(letters, 6), (utf8, 128)])
def test_same_as_searching_the_whole_text(decode, size):
    rng = random.Random(3)
    hits = 0
    for _ in range(150):
        tokens = [rng.randrange(size) for _ in range(400)]
        text = decode(tokens)
        start = rng.randrange(1, len(text) - 6)
        strings = (text[start : start + rng.randrange(2, 6)],)
        expected = next(i for i in range(400) if any(s in decode(tokens[: i + 1]) for s in strings))
        hits += expected > 60  # long enough for the window to move
        assert first_hit(strings, decode, tokens) == expected
    assert hits > 20


def test_cost_does_not_grow_with_length():
    lengths = []

    def decode(tokens, after=None):
        lengths.append(len(tokens))
        return "x" * len(tokens)

    assert first_hit(("yy",), decode, range(5000)) is None
    assert max(lengths) < 100 and len(lengths) < 20_000
