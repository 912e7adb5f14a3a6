"""Bodies of completions and chat/completions to sampling requests, and sampled sequences to the answers, whole or in
pieces while they are drawn. What is not done here is refused by name.
"""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, FailFast, Field, StringConstraints, model_validator

from skyrl.service.codec import NO_LOGPROB
from skyrl.service.messages import (
    MAX_SAMPLES,
    SampledSequence,
    SampleResult,
    SamplingRequest,
    SamplingSettings,
    Seed,
    ServerInfo,
    TopK,
)
from skyrl.text.chat import Chat
from skyrl.types import Ints, UserError
from skyrl.web.message import INT32_MAX, JsonMessage, Name, Text, not_allowed, refused, says_nothing

DEFAULT_MAX_TOKENS = 16  # of completions, as OpenAI has it; a chat goes on as far as the context allows
MAX_PROMPTS = 1024
MAX_TOP = 20
MAX_STOPS = 16
MAX_TURNS, MAX_PARTS, MAX_KWARGS = 4096, 1024, 64
MAX_TEXT = 1 << 24
BROKEN = "\ufffd"  # what a decoder writes for a character that is not whole yet
# What is not done here, with the values that ask for nothing, besides those that no field says anything with.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys("frequency_penalty presence_penalty logit_bias suffix tools functions store min_p".split(), ()),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "repetition_penalty": (1,),
    "parallel_tool_calls": (True,),
}
# Change nothing about what is drawn.
IGNORED = ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")


@dataclass(frozen=True)
class Ask:
    """A parsed body. `queries` has one sample request per prompt, the weights not filled in yet.

    top: how many alternatives per token are wanted, None = no log-probabilities at all. echo: the prompt is part of
    the answer; empty: and nothing is drawn (max_tokens 0).
    """

    model: str
    chat: bool
    queries: list[SamplingRequest]
    stops: tuple[str, ...]
    top: int | None
    stream: bool
    usage_event: bool
    echo: bool = False
    empty: bool = False


def _listed_stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise not_allowed(f"a text that is not empty, or a list of up to {MAX_STOPS}")
    return stops


class StreamOptions(JsonMessage, lenient=True):
    """Of a streamed answer."""

    include_usage: bool = False


class GenerateBody(JsonMessage, large=True):
    """What both kinds of completions have."""

    model: Text
    stop: Annotated[list[str], BeforeValidator(_listed_stops)] = []
    n: int = Field(1, ge=1, le=MAX_SAMPLES)
    best_of: int | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = Field(-1, ge=-1, le=INT32_MAX)
    seed: Seed | None = None

    @classmethod
    def prepare(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Leaves out what changes nothing, and refuses by name what would."""
        found = {key: item for key, item in super().prepare(value).items() if key not in IGNORED}
        for name, neutral in NEUTRAL.items():
            given = found.pop(name, None)
            if not says_nothing(given) and given not in neutral:
                raise refused(f"has {name}, which this server does not do; leave it out")
        return found

    @model_validator(mode="after")
    def _no_ranking(self) -> GenerateBody:
        if self.best_of not in (None, self.n):
            raise refused(f"has best_of={self.best_of}, but nothing is ranked here; leave it out")
        return self


class CompletionBody(GenerateBody, operation="completions"):
    """completions. Prompts are text or token ids, one or several."""

    prompt: Any
    max_tokens: int = Field(DEFAULT_MAX_TOKENS, ge=0, le=INT32_MAX)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)

    def ask(self, chat: Chat, info: ServerInfo) -> Ask:
        """What is to be drawn. Raises UserError for what cannot be."""
        if self.max_tokens == 0 and not self.echo:
            raise UserError("completions: max_tokens=0: nothing would be answered; give 1 or more, or echo=true")
        prompts = _prompts(self.prompt, chat)
        return _ask(self, prompts, info, limit=self.max_tokens, top=self.logprobs, echo=self.echo)


class TextPart(JsonMessage, lenient=True):
    """A part of a chat message."""

    type: Name
    text: Annotated[str, StringConstraints(max_length=MAX_TEXT)] = ""

    @model_validator(mode="after")
    def _is_text(self) -> TextPart:
        if self.type != "text":
            raise refused(f"has type={self.type!r}; allowed: text, the models here read nothing else")
        return self


def _as_parts(value: Any) -> Any:
    if not isinstance(value, (str, list)):
        raise not_allowed("text, or a list of text parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class ChatTurn(JsonMessage):
    """One message of a chat. Only role and content are used here."""

    role: Name
    content: Annotated[list[TextPart], FailFast(), BeforeValidator(_as_parts)] = Field([], max_length=MAX_PARTS)

    @classmethod
    def prepare(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Leaves out what says nothing, and refuses by name what would."""
        found = super().prepare(value)
        for name in ("name", "tool_calls", "tool_call_id", "function_call", "refusal", "audio"):
            if not says_nothing(found.pop(name, None)):
                raise refused(f"has {name}: only role and content are used here")
        return found


class ChatBody(GenerateBody, operation="chat/completions"):
    """chat/completions, with text messages. max_tokens is the older name of max_completion_tokens.

    As vLLM has them: chat_template_kwargs are variables of the template; with continue_final_message the answer goes on
    with the last message, an assistant's; add_generation_prompt false leaves out the opening of an answer.
    """

    messages: Annotated[list[ChatTurn], FailFast()] = Field(max_length=MAX_TURNS)
    max_completion_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    max_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    chat_template_kwargs: dict[Name, Any] = Field({}, max_length=MAX_KWARGS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False

    def ask(self, chat: Chat, info: ServerInfo) -> Ask:
        """What is to be drawn. Raises UserError, in the template's own words where that refuses something."""
        continued, last = self.continue_final_message, self.messages[-1].role if self.messages else ""
        for wrong, why in (
            (not self.messages, "messages is empty; give at least one"),
            (self.top_logprobs is not None and not self.logprobs, "top_logprobs needs logprobs=true"),
            (
                continued and (last != "assistant" or bool(self.add_generation_prompt)),
                "continue_final_message needs a last message of role assistant, and no add_generation_prompt",
            ),
            (
                last == "assistant" and not continued,
                "the last message is an assistant's; give continue_final_message=true to go on with it",
            ),
        ):
            if wrong:
                raise UserError(f"chat/completions: {why}")
        if not chat.has_template:
            raise UserError("this model's tokenizer has no chat template; use completions, or model.chat_template")
        known = inspect.signature(chat.tokenizer.apply_chat_template).parameters
        if taken := sorted(self.chat_template_kwargs.keys() & {*known, "answer_next", "continue_final"}):
            raise UserError(
                f"chat/completions: chat_template_kwargs has {taken[0]!r}, which is no variable of the template"
            )
        turns = [{"role": one.role, "content": "".join(part.text for part in one.content)} for one in self.messages]
        opened = {"answer_next": self.add_generation_prompt is not False, "continue_final": continued}
        try:
            prompt = chat.prompt(turns, **opened, **self.chat_template_kwargs)
        except UserError as error:
            raise UserError(f"chat/completions: {error}") from error
        limit, top = self.max_completion_tokens or self.max_tokens, (self.top_logprobs or 0) if self.logprobs else None
        return _ask(self, [prompt], info, limit=limit, top=top, echo=False)


def _prompts(value: Any, chat: Chat) -> list[Ints]:
    if isinstance(value, str):
        return [_prompt(value, chat)]
    if not isinstance(value, list) or not value or len(value) > MAX_PROMPTS and type(value[0]) is not int:
        raise UserError(f"completions: prompt; allowed: text or token ids, or a list of 1 to {MAX_PROMPTS} of them")
    return [_prompt(value, chat)] if type(value[0]) is int else [_prompt(one, chat) for one in value]


def _prompt(value: Any, chat: Chat) -> Ints:
    if isinstance(value, str) and len(value) <= MAX_TEXT:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError("completions: prompt; allowed: text that is valid Unicode") from None
        return chat.start(value)
    if not isinstance(value, list) or not all(type(one) is int and 0 <= one <= INT32_MAX for one in value):
        raise UserError("completions: prompt; allowed: text, or a list of token ids")
    return np.asarray(value, np.int64)


def _ask(
    body: GenerateBody, prompts: list[Ints], info: ServerInfo, *, limit: int | None, top: int | None, echo: bool
) -> Ask:
    empty = limit == 0
    for prompt in prompts:
        if not len(prompt):
            raise UserError(f"{body.operation}: prompt is empty: give at least one token")
        if len(prompt) >= info.max_context and not empty:
            raise UserError(
                f"{body.operation}: prompt: {len(prompt)} tokens leave no room for an answer in the context of "
                f"{info.max_context}; shorten it"
            )
    settings = SamplingSettings(
        max_tokens=1 if empty else limit,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k or -1,
        seed=body.seed,
        stop=tuple(body.stop) or None,
    )
    queries = [
        SamplingRequest.model_construct(  # checked already; the weights are filled in by the endpoint
            prompt=prompt,
            stream=body.stream and not empty,
            num_samples=body.n,
            sampling_params=settings,
            topk_sample_logprobs=0 if empty else top or 0,
            prompt_logprobs=echo and top is not None,
            topk_prompt_logprobs=(top or 0) if echo else 0,
        )
        for prompt in prompts
    ]
    chat, usage = isinstance(body, ChatBody), body.stream_options.include_usage
    return Ask(body.model, chat, queries, tuple(body.stop), top, body.stream, usage, echo, empty)


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

    def __init__(self, ask: Ask, chat: Chat, created: int) -> None:
        self.ask, self.chat = ask, chat
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
        before = self.chat.decode(self._prompt(index).tolist()) if self.ask.echo else ""
        choice["text"] = before + ("" if self.ask.empty else self._content(sequence))
        choice["logprobs"] = self._table(tokens) if self.ask.top is not None else None
        return choice

    def _prompt(self, index: int) -> np.ndarray:
        return self.ask.queries[index // self.ask.queries[0].num_samples].prompt

    def _finish(self, sequence: SampledSequence) -> str:
        return "length" if self.ask.empty else sequence.stop_reason

    def _content(self, sequence: SampledSequence) -> str:
        """The text as rewards read it, and before the stop string that ended it (asample keeps those)."""
        text = self.chat.read(sequence.tokens.tolist())
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
            text = self.chat.decode([token])
            value = float(logprobs[i])
            top: list[tuple[int, float]] = []
            if topk is not None and self.ask.top:
                cells = zip(topk.token_ids[i].tolist(), topk.logprobs[i].tolist(), strict=True)
                top = [(t, p) for t, p in cells if p != NO_LOGPROB][: self.ask.top]
            found.append(Token(token, text, None if np.isnan(value) else value, top, at))
            at += len(text)
        return found

    def _table(self, tokens: list[Token]) -> dict[str, Any]:
        tops = [{self.chat.decode([i]): p for i, p in t.top} if t.logprob is not None else None for t in tokens]
        return {
            "tokens": [t.text for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": tops if self.ask.top else None,
            "text_offset": [t.at for t in tokens],
        }

    def _chat_token(self, token: Token) -> dict[str, Any]:
        def one(text: str, logprob: float | None) -> dict[str, Any]:
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        top = [one(self.chat.decode([i]), p) for i, p in token.top]
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
            before = self.chat.decode(self._prompt(index).tolist()) if self.ask.echo else ""
            self._growing[index] = Growing(self.chat.decode, self.ask.stops, before)
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
