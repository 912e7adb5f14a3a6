"""The text of an answer while it is drawn: what is certain of it already."""

from __future__ import annotations

from collections.abc import Sequence

from skyrl.text.tokenizer import BROKEN, Decode


class GrowingText:
    """The text of one sample while it is drawn. Gives out only what no later token can change: no half character, no
    beginning of a stop string, no space at the end (some tokenizers join what follows it).

    `before`: text that comes first, the prompt where it is echoed. A stop string in it ends nothing.
    """

    def __init__(self, decode: Decode, stops: Sequence[str], before: str = "") -> None:
        self._decode, self._stops, self._before = decode, stops, before
        self._ids: list[int] = []
        self._sent = ""

    def more(self, tokens: Sequence[int]) -> str:
        """What is certain now and was not given out."""
        self._ids += tokens
        text = self._before + _certain(self._decode(self._ids), self._stops)
        return self._give(text) if text.startswith(self._sent) else ""  # `rest` says that something is wrong

    def rest(self, whole: str) -> str:
        """What is missing of the whole text. Raises RuntimeError when other text was given out: a fault of ours or of
        the tokenizer."""
        if not whole.startswith(self._sent):
            raise RuntimeError(f"a text that was streamed has changed, after {len(self._sent)} characters")
        return self._give(whole)

    def _give(self, text: str) -> str:
        new, self._sent = text[len(self._sent) :], text
        return new


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string in it, all of it when there is none."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)]


def _certain(text: str, stops: Sequence[str]) -> str:
    found = before_stop(text, stops)
    if len(found) < len(text):
        return found
    text = text.rstrip(BROKEN)
    held = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return text[: len(text) - max(held, default=0)].rstrip(BROKEN).rstrip()
