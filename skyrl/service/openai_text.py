"""Sampled sequences, to the answers of completions and chat/completions, whole or in pieces while they are drawn."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from skyrl.service.messages import SampledSequence, SampleResult, ServerInfo, TopK
from skyrl.service.openai_params import Ask, TextTools

NO_LOGPROB = -99999.0
BROKEN = "\ufffd"  # what a decoder writes for a character that is not whole yet


@dataclass(frozen=True)
class Token:
    """One token of an answer. logprob None: not known (the first of a prompt). at: where its text begins."""

    id: int
    text: str
    logprob: float | None
    top: list[tuple[int, float]]
    at: int


class Growing:
    """The text of one sample while it is drawn. Gives out only what no later token can change: no half character, no
    beginning of a stop string, no space at the end (some tokenizers join what follows it).

    `before`: text that comes first, the prompt where it is echoed. A stop string in it ends nothing.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: tuple[str, ...], before: str = "") -> None:
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


def _certain(text: str, stops: tuple[str, ...]) -> str:
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    if found:
        return text[: min(found)]
    text = text.rstrip(BROKEN)
    held = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), held, -1):
            if text.endswith(stop[:size]):
                held = size
                break
    return text[: len(text) - held].rstrip(BROKEN).rstrip()


class Writer:
    """The answer to one body: `whole`, or `begin`, then for each prompt `grown` as often as there is news and `pieces`
    at last, then `end`."""

    def __init__(self, ask: Ask, text: TextTools, facts: ServerInfo, created: int) -> None:
        self.ask, self.text, self.facts = ask, text, facts
        self.head = {
            "id": f"{'chatcmpl' if ask.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": ("chat.completion" if ask.chat else "text_completion"),
            "created": created,
            "model": ask.model,
        }
        self._drawn = self._cached = 0
        self._growing: dict[int, Growing] = {}

    def whole(self, results: list[SampleResult]) -> dict[str, Any]:
        """The answer in one."""
        choices = []
        for number, result in enumerate(results):
            self._count(result)
            for index, sequence in enumerate(result.sequences):
                choices.append(self._choice(self._index(number, index), result, sequence))
        return {**self.head, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens of all prompts (each once) and of all answers."""
        read = sum(len(query.prompt) for query in self.ask.queries)
        details = {"cached_tokens": self._cached}
        total = {"prompt_tokens": read, "completion_tokens": self._drawn, "total_tokens": read + self._drawn}
        return {**total, "prompt_tokens_details": details}

    def _count(self, result: SampleResult) -> None:
        if not self.ask.empty:
            self._drawn += sum(len(sequence.tokens) for sequence in result.sequences)
        self._cached += result.cache_hit_tokens

    def _index(self, number: int, index: int) -> int:
        return number * self.ask.queries[0].num_samples + index

    def _choice(self, index: int, result: SampleResult, sequence: SampledSequence) -> dict[str, Any]:
        prompt, answer = self._texts(result, sequence, index)
        choice: dict[str, Any] = {"index": index, "finish_reason": self._finish(sequence)}
        tokens = [*prompt, *answer] if self.ask.top is not None else []
        if self.ask.chat:
            choice["message"] = {"role": "assistant", "content": self._content(sequence)}
            choice["logprobs"] = {"content": [self._chat_token(t) for t in tokens]} if tokens else None
            return choice
        before = self.text.decode(self._prompt(index).tolist()) if self.ask.echo else ""
        choice["text"] = before + ("" if self.ask.empty else self._content(sequence))
        choice["logprobs"] = self._table(tokens) if self.ask.top is not None else None
        return choice

    def _prompt(self, index: int) -> np.ndarray:
        return self.ask.queries[index // self.ask.queries[0].num_samples].prompt

    def _finish(self, sequence: SampledSequence) -> str:
        return "length" if self.ask.empty else sequence.stop_reason

    def _kept(self, sequence: SampledSequence) -> list[int]:
        """The tokens without an end-of-sequence token at their end: it is no text."""
        ids = sequence.tokens.tolist()
        return ids[:-1] if ids and ids[-1] in self.facts.eos_token_ids and sequence.stop_reason == "stop" else ids

    def _content(self, sequence: SampledSequence) -> str:
        """The text before the stop that ended it, as these endpoints have it (asample keeps stops)."""
        text = self.text.decode(self._kept(sequence))
        if sequence.stop_reason == "stop":
            text = text[: min((at for at in (text.find(stop) for stop in self.ask.stops) if at >= 0), default=None)]
        return text

    # ---- log-probabilities

    def _texts(self, result: SampleResult, sequence: SampledSequence, index: int) -> tuple[list[Token], list[Token]]:
        if self.ask.top is None:
            return [], []
        prompt: list[Token] = []
        if self.ask.echo:
            assert result.prompt_logprobs is not None
            prompt = self._tokens(self._prompt(index).tolist(), result.prompt_logprobs, result.topk_prompt, 0)
        start = prompt[-1].at + len(prompt[-1].text) if prompt else 0
        if self.ask.empty:
            return prompt, []
        return prompt, self._tokens(sequence.tokens.tolist(), sequence.logprobs, sequence.topk, start)

    def _tokens(self, ids: list[int], logprobs: np.ndarray, topk: TopK | None, at: int) -> list[Token]:
        found = []
        for i, token in enumerate(ids):
            text = self.text.decode([token])
            value = float(logprobs[i])
            top: list[tuple[int, float]] = []
            if topk is not None and self.ask.top:
                cells = zip(topk.token_ids[i].tolist(), topk.logprobs[i].tolist(), strict=True)
                top = [(t, p) for t, p in cells if p != NO_LOGPROB][: self.ask.top]
            found.append(Token(token, text, None if np.isnan(value) else value, top, at))
            at += len(text)
        return found

    def _table(self, tokens: list[Token]) -> dict[str, Any]:
        tops = [{self.text.decode([i]): p for i, p in t.top} if t.logprob is not None else None for t in tokens]
        return {
            "tokens": [t.text for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": tops if self.ask.top else None,
            "text_offset": [t.at for t in tokens],
        }

    def _chat_token(self, token: Token) -> dict[str, Any]:
        def one(text: str, logprob: float | None) -> dict[str, Any]:
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        top = [one(self.text.decode([i]), p) for i, p in token.top]
        return {**one(token.text, token.logprob), "top_logprobs": top}

    # ---- pieces

    def begin(self) -> Iterator[dict[str, Any]]:
        """The first events: who speaks, for each sample of a chat."""
        if self.ask.chat:
            for index in range(self.ask.queries[0].num_samples):
                yield self._event([{"index": index, "delta": {"role": "assistant", "content": ""}}])

    def grown(self, number: int, index: int, tokens: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The event, if any, of more tokens of sample `index` of prompt `number`, which is still drawn."""
        at = self._index(number, index)
        text = self._grower(at).more(tokens)
        if text:
            yield self._event([self._part(at, text, None, None)])

    def _grower(self, index: int) -> Growing:
        if index not in self._growing:
            before = self.text.decode(self._prompt(index).tolist()) if self.ask.echo else ""
            self._growing[index] = Growing(self.text.decode, self.ask.stops, before)
        return self._growing[index]

    def pieces(self, number: int, result: SampleResult) -> Iterator[dict[str, Any]]:
        """The last events of one prompt, whose samples are done: what is missing of each text, why it ended, and all
        of its log-probabilities."""
        self._count(result)
        for i, sequence in enumerate(result.sequences):
            choice = self._choice(self._index(number, i), result, sequence)
            whole = choice["message"]["content"] if self.ask.chat else choice["text"]
            text = self._grower(choice["index"]).rest(whole)
            del self._growing[choice["index"]]
            yield self._event([self._part(choice["index"], text, choice["logprobs"], choice["finish_reason"])])

    def _part(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        content = {"delta": {"content": text} if text else {}} if self.ask.chat else {"text": text}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.ask.chat else "text_completion"
        for choice in choices:
            choice.setdefault("finish_reason", None)
        return {**self.head, "object": kind, "choices": choices}

    def end(self) -> Iterator[dict[str, Any]]:
        """The last event, where it was asked for: what the answer took."""
        if self.ask.usage_event:
            yield {**self._event([]), "usage": self.usage()}
