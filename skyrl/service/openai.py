"""OpenAI-style endpoints for agents and evaluation tools: /v1/models, /v1/completions, /v1/chat/completions, and the
same under /oai/api/v1. The model is a name that is served here or a tinker:// path of weights.

A body becomes sampling requests, one per prompt; a Writer makes the answer of what is drawn, whole or in pieces, with
comments between them that keep the connection open. What is not done here is refused by name.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Annotated, Any, NamedTuple

import anyio
import numpy as np
from pydantic import BeforeValidator, FailFast, Field, StringConstraints, model_validator
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from skyrl.service.app import AppState, RequestContext, http_error, route
from skyrl.service.codec import topk_rows
from skyrl.service.messages import (
    MAX_SAMPLES,
    RequestFailed,
    SampledSequence,
    SampleResult,
    SamplingRequest,
    SamplingSettings,
    Seed,
    ServerInfo,
    read_stop,
)
from skyrl.service.pending import PendingRequest
from skyrl.service.routes_session import find_weights, unknown_model
from skyrl.text.chat import Chat
from skyrl.text.stream import GrowingText, before_stop
from skyrl.types import Ints, UserError
from skyrl.web.http import HttpError, error_json, in_thread, log, read_json, reply
from skyrl.web.message import INT32_MAX, JsonMessage, Name, Text, not_allowed, refused, says_nothing

PREFIXES = ("/v1/", "/oai/api/v1/")
LISTED = 1000  # checkpoints in /v1/models
COMMENT_SECONDS = 10.0
DEFAULT_MAX_TOKENS = 16  # of completions, as OpenAI has it; a chat goes on as far as the context allows
MAX_PROMPTS, MAX_TURNS, MAX_PARTS, MAX_STOPS, MAX_TOP, MAX_KWARGS = 1024, 4096, 1024, 16, 20, 64
MAX_TEXT = 1 << 24
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


# ---- bodies


def _listed_stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise not_allowed(f"a text that is not empty, or a list of up to {MAX_STOPS}")
    return list(read_stop(stops))


class Wishes(NamedTuple):
    """limit: the longest answer, None = as the context allows, 0 = nothing is drawn. top: how many alternatives of each
    token are wanted, None = no log-probabilities at all. echo: the prompt is part of the answer."""

    limit: int | None
    top: int | None
    echo: bool = False


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

    def wishes(self) -> Wishes:
        """What the two kinds write in different ways."""
        raise NotImplementedError

    def prompts(self, chat: Chat) -> list[Ints]:
        """Token ids of each prompt. Raises UserError."""
        raise NotImplementedError

    def queries(self, chat: Chat, info: ServerInfo) -> list[SamplingRequest]:
        """One sampling request per prompt, the weights not filled in yet. Raises UserError for what cannot be drawn."""
        prompts, (limit, top, echo) = self.prompts(chat), self.wishes()
        for prompt in prompts:
            if not len(prompt):
                raise UserError(f"{self.operation}: prompt is empty: give at least one token")
            if len(prompt) >= info.max_context and limit != 0:
                raise UserError(
                    f"{self.operation}: prompt: {len(prompt)} tokens leave no room for an answer in the context of "
                    f"{info.max_context}; shorten it"
                )
        settings = SamplingSettings(
            max_tokens=1 if limit == 0 else limit,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k or -1,
            seed=self.seed,
            stop=tuple(self.stop) or None,
        )
        return [
            SamplingRequest.model_construct(  # checked already; the weights are filled in by the endpoint
                prompt=prompt,
                stream=self.stream and limit != 0,
                num_samples=self.n,
                sampling_params=settings,
                topk_sample_logprobs=0 if limit == 0 else top or 0,
                prompt_logprobs=echo and top is not None,
                topk_prompt_logprobs=(top or 0) if echo else 0,
            )
            for prompt in prompts
        ]


class CompletionBody(GenerateBody, operation="completions"):
    """completions. Prompts are text or token ids, one or several."""

    prompt: Any
    max_tokens: int = Field(DEFAULT_MAX_TOKENS, ge=0, le=INT32_MAX)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)

    def wishes(self) -> Wishes:
        return Wishes(self.max_tokens, self.logprobs, self.echo)

    def prompts(self, chat: Chat) -> list[Ints]:
        """Token ids of each prompt. Raises UserError."""
        if self.max_tokens == 0 and not self.echo:
            raise UserError("completions: max_tokens=0: nothing would be answered; give 1 or more, or echo=true")
        given = self.prompt
        if isinstance(given, str):
            return [_prompt(given, chat)]
        if not isinstance(given, list) or not given or len(given) > MAX_PROMPTS and type(given[0]) is not int:
            raise UserError(f"completions: prompt; allowed: text or token ids, or a list of 1 to {MAX_PROMPTS} of them")
        return [_prompt(given, chat)] if type(given[0]) is int else [_prompt(one, chat) for one in given]


def _prompt(value: Any, chat: Chat) -> Ints:
    if isinstance(value, str) and len(value) <= MAX_TEXT:
        try:
            return chat.start(value)
        except UserError as error:
            raise UserError(f"completions: prompt: {error}") from error
    if not isinstance(value, list) or not all(type(one) is int and 0 <= one <= INT32_MAX for one in value):
        raise UserError("completions: prompt; allowed: text, or a list of token ids")
    return np.asarray(value, np.int64)


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

    def wishes(self) -> Wishes:
        return Wishes(
            self.max_completion_tokens or self.max_tokens, (self.top_logprobs or 0) if self.logprobs else None
        )

    def prompts(self, chat: Chat) -> list[Ints]:
        """The one prompt. Raises UserError, in the template's own words where that refuses something."""
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
        chat.check_variables(self.chat_template_kwargs, "chat/completions: chat_template_kwargs")
        turns = [{"role": one.role, "content": "".join(part.text for part in one.content)} for one in self.messages]
        opened = {"answer_next": self.add_generation_prompt is not False, "continue_final": continued}
        try:
            return [chat.prompt(turns, **opened, **self.chat_template_kwargs)]
        except UserError as error:
            raise UserError(f"chat/completions: {error}") from error


# ---- answers


class Token(NamedTuple):
    """One token of an answer as text, with the likeliest in its place. logprob None: not known (the first of a prompt).
    at: where its text begins."""

    text: str
    logprob: float | None
    top: list[tuple[str, float]]
    at: int


class Writer:
    """The answer to one body: `whole`, or `begin`, then for each prompt `grown` as often as there is news and `pieces`
    at last, then `end`. `keep` is told (id, number of the first choice, request, samples) before they are sent."""

    keep: Callable[[str, int, SamplingRequest, list[SampledSequence]], None] | None = None

    def __init__(self, body: GenerateBody, queries: list[SamplingRequest], chat: Chat, created: int) -> None:
        self.body, self.queries, self.chat = body, queries, chat
        self.limit, self.top, self.echo = body.wishes()
        self.is_chat = isinstance(body, ChatBody)
        self.head: dict[str, Any] = {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if self.is_chat else "text_completion",
            "created": created,
            "model": body.model,
        }
        self._drawn = self._cached = 0
        self._growing: dict[int, GrowingText] = {}

    def whole(self, results: list[SampleResult]) -> dict[str, Any]:
        """The answer in one."""
        choices = [choice for number, result in enumerate(results) for choice in self._choices(number, result)]
        return {**self.head, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens of all prompts (each once) and of all answers."""
        read = sum(len(query.prompt) for query in self.queries)
        total = {"prompt_tokens": read, "completion_tokens": self._drawn, "total_tokens": read + self._drawn}
        return {**total, "prompt_tokens_details": {"cached_tokens": self._cached}}

    def _choices(self, number: int, result: SampleResult) -> Iterator[dict[str, Any]]:
        """The answers to one prompt, counted."""
        self._cached += result.cache_hit_tokens
        if self.keep is not None and self.limit != 0:
            self.keep(self.head["id"], number * self.body.n, self.queries[number], result.sequences)
        for index, sequence in enumerate(result.sequences, number * self.body.n):
            self._drawn += 0 if self.limit == 0 else len(sequence.tokens)
            tokens = self._tokens(number, result, sequence) if self.top is not None else []
            reason = "length" if self.limit == 0 else sequence.stop_reason
            choice: dict[str, Any] = {"index": index, "finish_reason": reason}
            if self.is_chat:
                choice["message"] = {"role": "assistant", "content": self._content(number, sequence)}
                choice["logprobs"] = {"content": list(map(_chat_token, tokens))} if tokens else None
            else:
                choice["text"] = self._before(number) + ("" if self.limit == 0 else self._content(number, sequence))
                choice["logprobs"] = self._table(tokens) if self.top is not None else None
            yield choice

    def _before(self, number: int) -> str:
        return self.chat.decode(self.queries[number].prompt.tolist()) if self.echo else ""

    def _content(self, number: int, sequence: SampledSequence) -> str:
        """The text as rewards read it, and before the stop string that ended it (asample keeps those)."""
        text = self.chat.read(sequence.tokens.tolist(), int(self.queries[number].prompt[-1]))
        return before_stop(text, self.body.stop) if sequence.stop_reason == "stop" else text

    def _tokens(self, number: int, result: SampleResult, sequence: SampledSequence) -> list[Token]:
        parts = [] if self.limit == 0 else [(sequence.tokens, sequence.logprobs, sequence.topk)]
        if self.echo:
            assert result.prompt_logprobs is not None
            parts.insert(0, (self.queries[number].prompt, result.prompt_logprobs, result.topk_prompt))
        found: list[Token] = []
        at, before = 0, None if self.echo else int(self.queries[number].prompt[-1])
        for ids, logprobs, topk in parts:
            tops = [None] * len(ids) if topk is None else topk_rows(topk)
            for token, logprob, top in zip(ids.tolist(), logprobs.tolist(), tops, strict=True):
                likeliest = [(self.chat.decode([other], before), p) for other, p in (top or [])[: self.top]]
                text, before = self.chat.decode([token], before), token
                found.append(Token(text, None if math.isnan(logprob) else logprob, likeliest, at))
                at += len(text)
        return found

    def _table(self, tokens: list[Token]) -> dict[str, Any]:
        return {
            "tokens": [t.text for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [dict(t.top) if t.logprob is not None else None for t in tokens] if self.top else None,
            "text_offset": [t.at for t in tokens],
        }

    # ---- pieces

    def begin(self) -> Iterator[dict[str, Any]]:
        """The first events: who speaks, for each sample of a chat."""
        for number in range(len(self.queries)):
            before, last = self._before(number), int(self.queries[number].prompt[-1])
            for index in range(number * self.body.n, (number + 1) * self.body.n):
                self._growing[index] = GrowingText(partial(self.chat.read, after=last), self.body.stop, before)
        for index in range(self.body.n if self.is_chat else 0):
            yield self._event([{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])

    def grown(self, number: int, index: int, tokens: Ints) -> Iterator[dict[str, Any]]:
        """The event, if any, of more tokens of sample `index` of prompt `number`, which is still drawn."""
        at = number * self.body.n + index
        if text := self._growing[at].more(tokens.tolist()):
            yield self._event([self._part(at, text, None, None)])

    def pieces(self, number: int, result: SampleResult) -> Iterator[dict[str, Any]]:
        """The last events of one prompt, whose samples are done: what is missing of each text, why it ended, and all
        of its log-probabilities."""
        for choice in self._choices(number, result):
            whole = choice["message"]["content"] if self.is_chat else choice["text"]
            text = self._growing.pop(choice["index"]).rest(whole)
            yield self._event([self._part(choice["index"], text, choice["logprobs"], choice["finish_reason"])])

    def _part(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        content = {"delta": {"content": text} if text else {}} if self.is_chat else {"text": text}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": f"{self.head['object']}{'.chunk' * self.is_chat}", "choices": choices}

    def end(self) -> Iterator[dict[str, Any]]:
        """The last event, where it was asked for: what the answer took."""
        if self.body.stream_options.include_usage:
            yield {**self._event([]), "usage": self.usage()}


def _chat_token(token: Token) -> dict[str, Any]:
    def one(text: str, logprob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {**one(token.text, token.logprob), "top_logprobs": [one(*other) for other in token.top]}


# ---- endpoints


def openai_routes(state: AppState) -> list[Route]:
    """OpenAI-style endpoints, under both prefixes."""
    handlers = (
        ("GET", "models", models),
        ("GET", "models/{model:path}", model),
        ("POST", "completions", partial(complete, kind=CompletionBody)),
        ("POST", "chat/completions", partial(complete, kind=ChatBody)),
    )

    def write_error(error: HttpError) -> Response:
        return reply(error_json(error), error.status, error.headers)

    return [
        route(state, method, prefix + path, handler, write_error=write_error)
        for prefix in PREFIXES
        for method, path, handler in handlers
    ]


async def models(context: RequestContext) -> Response:
    """Names that are served, and the caller's checkpoints that can be sampled, newest first."""
    names = [_model(name, 0) for name in context.state.info.aliases]
    page = await context.search(context.state.store.list_checkpoints, context.owner, limit=LISTED)
    saved = [one for one in page.items if one.path.kind != "external_weights"]
    names += [_model(one.path.uri, int(one.created_at.timestamp())) for one in saved]
    return reply({"object": "list", "data": names})


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "skyrl"}


async def model(context: RequestContext) -> Response:
    """One of them. A server in between may have made one slash of the two of tinker://."""
    name = context.path("model")
    if name.startswith("tinker:/") and not name.startswith("tinker://"):
        name = "tinker://" + name[len("tinker:/") :]
    await find_model(context, name)
    return reply(_model(name, 0))


async def find_model(context: RequestContext, name: str) -> dict[str, str]:
    """The fields of a SamplingRequest that say which weights. Raises HttpError 404, UserError."""
    if name.startswith("tinker://"):
        await in_thread(find_weights, context.state, context.owner, name)
        return {"model_path": name}
    if name not in context.state.info.aliases:
        raise HttpError(404, unknown_model(context.state, name))
    return {"base_model": name}


async def complete(context: RequestContext, *, kind: type[CompletionBody] | type[ChatBody]) -> Response:
    """An answer to completions and chat/completions, whole or as a stream of events."""
    chat, info = await context.state.loaded(), context.state.info

    def read(content: bytes) -> tuple[GenerateBody, list[SamplingRequest]]:
        body = kind.parse(read_json(content))
        return body, body.queries(chat, info)

    body, queries = await context.read(read, kind=kind, quick=False)
    weights = await find_model(context, body.model)
    writer = Writer(body, queries, chat, int(time.time()))
    if context.state.feedback is not None:
        source = str(weights.get("model_path", info.model_path))
        writer.keep = partial(context.state.feedback.keep, context.owner, source)
    submitted: list[PendingRequest] = []
    try:
        for query in queries:
            submitted.append(context.state.scheduler.submit(query.model_copy(update=weights), owner=context.owner))
        if not body.stream:
            results = [await _result(context, one, watch=True) for one in submitted]
            return reply(await in_thread(writer.whole, results))
    except BaseException:  # one has failed, or the client has left: nobody waits for the others
        _cancel(context, submitted)
        raise
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(_events(context, submitted, writer), media_type="text/event-stream", headers=headers)


def _cancel(context: RequestContext, submitted: list[PendingRequest]) -> None:
    for one in submitted:
        context.state.scheduler.cancel(one.request_id, owner=context.owner)


async def _result(context: RequestContext, one: PendingRequest, *, watch: bool = False) -> SampleResult:
    """The result, however long it takes. watch: looks whether the client is still there. Raises RequestFailed,
    HttpError, ClientDisconnect."""
    while (outcome := await context.wait(one.request_id, COMMENT_SECONDS)).state == "pending":
        if context.state.closed:
            raise HttpError(503, "the server stops")
        if watch and await context.request.is_disconnected():
            raise ClientDisconnect()
    if outcome.state == "done":
        assert isinstance(outcome.result, SampleResult)
        return outcome.result
    if outcome.state == "failed" and outcome.category == "user":
        raise RequestFailed(outcome.error)
    raise HttpError(500, outcome.error or "the request was lost")


async def _events(context: RequestContext, submitted: list[PendingRequest], writer: Writer) -> AsyncIterator[bytes]:
    """The body of a streamed answer: one event per piece of text, as they are drawn."""
    loop = asyncio.get_running_loop()
    # (prompt, sample, tokens) from the threads that draw, (prompt, result), or the error that ends the stream.
    news: asyncio.Queue[Any] = asyncio.Queue()

    def hear(number: int, index: int, tokens: Ints) -> None:
        try:
            loop.call_soon_threadsafe(news.put_nowait, (number, index, tokens))
        except RuntimeError:  # the loop has ended meanwhile; who draws must not notice
            log.debug("tokens were drawn after the state had closed")

    async def follow(number: int, one: PendingRequest) -> None:
        try:
            news.put_nowait((number, await _result(context, one)))
        except Exception as error:
            news.put_nowait(error)

    for number, one in enumerate(submitted):
        context.state.scheduler.on_tokens(one.request_id, partial(hear, number))
    tasks = [asyncio.ensure_future(follow(number, one)) for number, one in enumerate(submitted)]
    left = len(tasks)
    try:
        for piece in writer.begin():
            yield _event(piece)
        while left:
            items = await _take(news)
            if not items:
                yield b": waiting\n\n"
                continue
            left -= sum(len(item) == 2 for item in items)
            for piece in await in_thread(_written, writer, items):
                yield _event(piece)
        for piece in writer.end():
            yield _event(piece)
        yield b"data: [DONE]\n\n"
    except Exception as error:  # the status is sent already: an error can only be an event
        yield _event(error_json(http_error(context.request, error)))
    finally:  # also when the client has left
        for task in tasks:
            task.cancel()
        _cancel(context, submitted)


async def _take(news: asyncio.Queue[Any]) -> list[Any]:
    """All there is, or [] after some seconds; tokens of one sample put together. Raises what came as an error."""
    items: list[Any] = []
    found: list[Any] = []
    with anyio.move_on_after(COMMENT_SECONDS):
        items.append(await news.get())
    while items and not news.empty():
        items.append(news.get_nowait())
    for item in items:
        if isinstance(item, Exception):
            raise item
        if len(item) == 3 and found and found[-1][:2] == item[:2]:
            item = (*item[:2], np.concatenate([found.pop()[2], item[2]]))
        found.append(item)
    return found


def _written(writer: Writer, items: list[Any]) -> list[dict[str, Any]]:
    return [piece for item in items for piece in (writer.grown if len(item) == 3 else writer.pieces)(*item)]


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
