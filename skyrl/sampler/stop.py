"""When a sequence ends: stop strings in the text of its tokens."""

from __future__ import annotations

from skyrl.text.tokenizer import BROKEN, Decode

LIMIT = 64  # tokens without a whole character at their end; no stop string is waited for beyond that


class StringStop:
    """Finds stop strings in the text of a growing list of tokens, at the token that completes one.

    A string may begin inside a token and span several, bytes of one character too, but begins in a token that was
    drawn. `after`: the last token of the prompt, as a Decode takes it. Only the tokens since the last whole character
    are decoded, behind those before them: n tokens cost O(n). A run of bytes may read otherwise once it is whole, so
    what ends in half a character is not settled.
    """

    def __init__(self, strings: tuple[str, ...], decode: Decode, after: int | None = None) -> None:
        assert all(strings), "an empty stop string would end every sequence"
        self._strings, self._decode, self._after = strings, decode, after
        self._keep = max(len(string) for string in strings) - 1
        self._settled = ""  # the end of the text up to `_before`, as long as a string may reach back
        self._before: list[int] = []  # settled tokens that `_tokens` are decoded behind
        self._before_text = ""
        self._tokens: list[int] = []  # not settled

    def push(self, token: int) -> bool:
        """Adds a token; True when a stop string is now in the text."""
        self._tokens.append(token)
        text = self._decode([*self._before, *self._tokens], None if self._before else self._after)
        follows = text.startswith(self._before_text)
        # Where bytes make what stood before unreadable, all that is new is what the decoder gives now.
        text = self._settled + (text[len(self._before_text) :] if follows else text)
        if any(string in text for string in self._strings):
            return True
        if not text.endswith(BROKEN) or len(self._tokens) >= LIMIT:
            self._settled = text[len(text) - min(self._keep, len(text)) :]
            self._before, self._tokens = self._tokens[-LIMIT // 2 :], []
            self._before_text = self._decode(self._before)
        return False
