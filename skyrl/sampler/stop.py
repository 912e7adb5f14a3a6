"""When a sequence ends: token ids, strings, lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_MARGIN = 8  # characters; the first ones of a window may differ: half a UTF-8 character, a dropped leading space


class StringStop:
    """Finds stop strings in the text of a growing list of tokens, also across borders of tokens.

    Decodes a window at the end of the tokens, not the whole text, so that n tokens cost O(n). A string may begin in
    any token that was drawn, never in the prompt.
    """

    def __init__(self, strings: tuple[str, ...], decode: Decode) -> None:
        if not all(strings):
            raise ValueError("an empty stop string would end every sequence")
        self._strings, self._decode = strings, decode
        self._longest = max(len(string) for string in strings)
        self._tokens: list[int] = []
        self._seen = 0  # characters of the window that were searched before

    def push(self, token: int) -> bool:
        """Adds a token; True when a stop string is now in the text."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        tail = text[max(0, self._seen - self._longest - _MARGIN) :]
        if any(string in tail for string in self._strings):
            return True
        self._seen = len(text)
        if len(self._tokens) > 2 * (self._longest + _MARGIN) + 32:
            self._shorten()
        return False

    def _shorten(self) -> None:
        """Keeps a window that still holds the longest string and the margin twice."""
        keep = self._longest + 2 * _MARGIN
        start = len(self._tokens) - 1
        while start > 0 and len(self._decode(self._tokens[start:])) < keep:
            start -= 1
        self._tokens = self._tokens[start:]
        self._seen = len(self._decode(self._tokens))
