"""OpenAI-style endpoints for agents and evaluation tools: /v1/models, /v1/completions, /v1/chat/completions, and the
same under /oai/api/v1. The model is a name that is served here or a tinker:// path of weights.

With stream=true text is sent while it is drawn, some pieces a second (after each slice of sampling, at most
service.slice_seconds long): never half a character, never a part of a stop string. Log-probabilities, where asked for,
come with the last piece of each sample. While nothing is drawn, comments keep the connection open.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import anyio
import numpy as np
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from skyrl.service.app import AppState, RequestContext, http_error, route
from skyrl.service.messages import RequestFailed, SampleResult, SamplingRequest
from skyrl.service.openai_text import ChatBody, CompletionBody, Writer
from skyrl.service.routes_session import find_weights, unknown_model
from skyrl.service.scheduler import PendingRequest
from skyrl.text.chat import Chat
from skyrl.types import Ints, UserError
from skyrl.web.http import HttpError, in_thread, log, read_json, reply

PREFIXES = ("/v1/", "/oai/api/v1/")
LISTED = 1000  # checkpoints in /v1/models
COMMENT_SECONDS = 10.0
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def openai_routes(state: AppState, chat: Chat | None) -> list[Route]:
    """OpenAI-style endpoints, under both prefixes."""
    handlers = (
        ("GET", "models", models),
        ("GET", "models/{model:path}", model),
        ("POST", "completions", partial(complete, chat=chat, kind=CompletionBody)),
        ("POST", "chat/completions", partial(complete, chat=chat, kind=ChatBody)),
    )
    return [
        route(state, method, prefix + path, handler, write_error=_error_reply)
        for prefix in PREFIXES
        for method, path, handler in handlers
    ]


def _error_reply(error: HttpError) -> Response:
    return reply(error_json(error), error.status, error.headers)


def error_json(error: HttpError) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = KINDS.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.detail, "type": kind, "param": None, "code": None}}


async def models(context: RequestContext) -> Response:
    """Names that are served, and the caller's checkpoints that can be sampled, newest first."""
    names = [_model(name, 0) for name in context.state.info.aliases]
    page = await in_thread(context.state.store.list_checkpoints, context.owner, limit=LISTED)
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


async def complete(
    context: RequestContext, *, chat: Chat | None, kind: type[CompletionBody] | type[ChatBody]
) -> Response:
    """An answer to completions and chat/completions, whole or as a stream of events."""
    if chat is None:
        raise UserError("this server was started without a tokenizer; use asample with token ids")
    info = context.state.info
    ask = await context.read(lambda body: kind.parse(read_json(body)).ask(chat, info), kind=kind, quick=False)
    weights = await find_model(context, ask.model)
    queries = [query.model_copy(update=weights) for query in ask.queries]
    submitted: list[PendingRequest] = []
    try:
        for query in queries:
            submitted.append(context.state.scheduler.submit(query, owner=context.owner))
    except BaseException:
        _cancel(context, submitted)
        raise
    writer = Writer(ask, chat, int(time.time()))
    if ask.stream:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(_events(context, submitted, writer), media_type="text/event-stream", headers=headers)
    results = await _gather(context, submitted, queries)
    return reply(await in_thread(writer.whole, results))


def _cancel(context: RequestContext, submitted: list[PendingRequest]) -> None:
    for one in submitted:
        context.state.scheduler.cancel(one.request_id, owner=context.owner)


async def _gather(
    context: RequestContext, submitted: list[PendingRequest], queries: list[SamplingRequest]
) -> list[SampleResult]:
    """All results in order. When one fails or the client leaves, the others are withdrawn."""
    results: list[SampleResult] = []
    try:
        for one in submitted:
            while (result := await _result(context, one, COMMENT_SECONDS)) is None:
                if await context.request.is_disconnected():
                    raise ClientDisconnect()
            results.append(result)
    except BaseException:
        _cancel(context, submitted)
        raise
    assert len(results) == len(queries)
    return results


async def _result(context: RequestContext, one: PendingRequest, seconds: float) -> SampleResult | None:
    """The result, or None when it is not there after so many seconds. Raises RequestFailed, HttpError."""
    outcome = await context.wait(one.request_id, seconds)
    if outcome.state == "pending":
        if context.state.closed:
            raise HttpError(503, "the server stops")
        return None
    if outcome.state == "done":
        assert isinstance(outcome.result, SampleResult)
        return outcome.result
    if outcome.state == "failed" and outcome.category == "user":
        raise RequestFailed(outcome.error)
    raise HttpError(500, outcome.error or "the request was lost")


class _News:
    """What happened to the samples of one stream, from the threads that draw to the event loop that sends. An item is
    (prompt, sample, tokens), (prompt, result), or the error that ends the stream."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[Any, ...] | Exception] = asyncio.Queue()

    def hear(self, number: int, index: int, tokens: Ints) -> None:
        """More tokens, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (number, index, tokens))
        except RuntimeError:  # the loop has ended meanwhile; who draws must not notice
            log.debug("tokens were drawn after the state had closed")

    async def follow(self, context: RequestContext, number: int, one: PendingRequest) -> None:
        """Waits for the result of one prompt."""
        try:
            while (result := await _result(context, one, COMMENT_SECONDS)) is None:
                continue
            self._queue.put_nowait((number, result))
        except Exception as error:
            self._queue.put_nowait(error)

    async def take(self, seconds: float) -> list[tuple[Any, ...]]:
        """All there is, or [] after so many seconds; tokens of one sample put together. Raises what came as error."""
        items: list[Any] = []
        with anyio.move_on_after(seconds):
            items.append(await self._queue.get())
        while items and not self._queue.empty():
            items.append(self._queue.get_nowait())
        found: list[tuple[Any, ...]] = []
        for item in items:
            if isinstance(item, Exception):
                raise item
            if len(item) == 3 and found and found[-1][:2] == item[:2]:
                item = (*item[:2], np.concatenate([found.pop()[2], item[2]]))
            found.append(item)
        return found


async def _events(context: RequestContext, submitted: list[PendingRequest], writer: Writer) -> AsyncIterator[bytes]:
    """The body of a streamed answer: one event per piece of text, as they are drawn."""
    news, left = _News(), len(submitted)
    for number, one in enumerate(submitted):
        context.state.scheduler.on_tokens(one.request_id, partial(news.hear, number))
    tasks = [asyncio.ensure_future(news.follow(context, number, one)) for number, one in enumerate(submitted)]
    try:
        for piece in writer.begin():
            yield _event(piece)
        while left:
            items = await news.take(COMMENT_SECONDS)
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


def _written(writer: Writer, items: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """The events of some news."""
    found: list[dict[str, Any]] = []
    for item in items:
        found += writer.grown(item[0], item[1], item[2].tolist()) if len(item) == 3 else writer.pieces(*item)
    return found


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
