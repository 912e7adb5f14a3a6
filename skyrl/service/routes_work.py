"""Endpoints that hand work to the scheduler, and those that fetch what became of it."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any, Literal

from pydantic import Field
from starlette.responses import Response
from starlette.routing import Route

from skyrl.service.app import LOADING, AppState, RequestContext, once, route
from skyrl.service.codec import REQUESTS, encode_result, parse_train
from skyrl.service.messages import (
    CreateModel,
    Id,
    LoadWeights,
    RequestOutcome,
    Result,
    SampleResult,
    SamplingRequest,
    TrainResult,
)
from skyrl.service.pending import PendingRequest, PendingSample
from skyrl.service.routes_session import find_weights
from skyrl.types import UserError
from skyrl.web.http import FAULT, HttpError, error_reply, in_thread, reply
from skyrl.web.message import INT64_MAX, JsonMessage, Text

POLL_SECONDS = 30.0  # clients give up after 45
SMALL_ANSWER = 4096  # answers of fewer numbers are written where they are: a thread would cost more
CLONE = 10**9  # sequence numbers of a clone begin at its number times this
FEED_IDS, ALL_FEED_IDS = 65536, 1 << 20  # samples of one sampling session, and of all, whose end a feed can tell


class FeedTarget(JsonMessage, lenient=True):
    """Whose samples a client wants to hear of."""

    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: Text
    cloned_sampler_id: int = Field(0, ge=0, le=INT64_MAX)


class RetrieveFutures(JsonMessage, operation="retrieve_futures", lenient=True):
    target: FeedTarget
    prev_cursor: int = Field(0, ge=0, le=INT64_MAX)
    timeout: float = POLL_SECONDS
    retrieved_request_ids: list[Id] = Field([], max_length=FEED_IDS)


def work_routes(state: AppState) -> list[Route]:
    """Endpoints about work: its submission, and what became of it."""
    feeds = Feeds()
    submits = [
        route(state, "POST", name, partial(submit, kind=kind)) for name, kind in REQUESTS.items() if name != "asample"
    ]
    return [  # in the order of how often they are asked, in which they are tried
        route(state, "POST", "retrieve_future", partial(retrieve_future, feeds=feeds), write_error=_never_500),
        # Repetitions are known by their number; old releases sample without a session, and without one.
        route(state, "POST", "asample", once(partial(sample, feeds=feeds))),
        route(state, "POST", "forward_backward", partial(train, forward_only=False)),
        route(state, "POST", "forward", partial(train, forward_only=True)),
        *submits,
        route(state, "POST", "create_custom_loss", create_custom_loss),
        route(state, "POST", "retrieve_futures", partial(retrieve_futures, feeds=feeds)),
        route(state, "POST", "cancel_future", cancel_future),
    ]


async def submit(context: RequestContext, *, kind: type[JsonMessage]) -> Response:
    """Any request in JSON: to the scheduler, and the number of its future back."""
    request: Any = await context.message(kind)
    session_id = getattr(request, "session_id", None)
    if isinstance(request, (CreateModel, LoadWeights)) and session_id is not None:
        # Before the scheduler: a model's name begins with its session, which has to be the caller's.
        await in_thread(context.state.store.get_session, session_id, context.owner)
    return accepted(context.state.scheduler.submit(request, owner=context.owner))


async def train(context: RequestContext, *, forward_only: bool) -> Response:
    """forward_backward and forward, protobuf or JSON, compressed or not."""
    kind, most = context.request.headers.get("content-type", ""), context.state.max_bytes
    read = partial(parse_train, content_type=kind, forward_only=forward_only, max_bytes=most)
    return accepted(context.state.scheduler.submit(await context.read(read), owner=context.owner))


async def sample(context: RequestContext, *, feeds: Feeds) -> Response:
    """asample. The answer names every sequence to come."""
    request = await context.message(SamplingRequest)
    if request.model_path is not None and request.sampling_session_id is None:
        await in_thread(find_weights, context.state, context.owner, request.model_path)
    done = context.state.scheduler.submit(request, owner=context.owner)
    if request.sampling_session_id is not None:
        feeds.add(context.owner, request.sampling_session_id, request.seq_id // CLONE, done.request_id)
    return accepted(done)


def accepted(done: PendingRequest) -> Response:
    """The acknowledgement of a submission."""
    answer: dict[str, Any] = {"request_id": done.request_id}
    if done.model_id:
        answer["model_id"] = done.model_id
    if isinstance(done, PendingSample):
        answer["sample_sequence_ids"] = list(done.sequence_ids)
    return reply(answer)


async def create_custom_loss(context: RequestContext) -> Response:
    """Refused: see client_config. Clients are told not to ask, and then compute such losses themselves."""
    await context.ignore_body()
    raise UserError("create_custom_loss is refused: this server runs no code of its clients; use "
                    "forward_backward_custom with a function, which the client differentiates itself")  # fmt: skip


# ---- futures


def _never_500(error: HttpError) -> Response:
    """Clients would ask again at once, for ever. A fault is told as the failure of the request."""
    return reply({"error": FAULT, "category": "server"}) if error.status == 500 else error_reply(error)


async def retrieve_future(context: RequestContext, *, feeds: Feeds) -> Response:
    """The result of a request as its client reads it, after a long poll; 408 with the reason while it is not done."""
    request_id = await context.text("retrieve_future", "request_id")
    outcome = await context.wait(request_id, POLL_SECONDS)
    if outcome.state in ("done", "failed"):
        feeds.fetched(request_id)
    return await answer(context, request_id, outcome)


async def answer(context: RequestContext, request_id: str, outcome: RequestOutcome) -> Response:
    """An outcome as an answer of retrieve_future."""
    if outcome.state == "unknown":
        raise HttpError(410, f"request {request_id[:100]}: unknown, or thrown away long after it was done")
    if outcome.state == "pending":
        reason = outcome.reason if context.state.chat.done() else LOADING
        text = {"queue_state": "active", "queue_state_reason": reason}
        return reply({**text, "type": "try_again", "request_id": request_id}, 408)
    if outcome.state == "failed":
        return reply({"error": outcome.error, "category": outcome.category})
    accept = context.request.headers.get("accept", "")
    assert outcome.result is not None
    if _size(outcome.result) <= SMALL_ANSWER:
        body, kind = encode_result(outcome.result, accept)
    else:
        body, kind = await in_thread(encode_result, outcome.result, accept)
    return Response(body, media_type=kind)


def _size(result: Result) -> int:
    """Numbers that an answer holds, about."""
    if isinstance(result, TrainResult):
        return sum(one.size for one in result.logprobs)
    if not isinstance(result, SampleResult):
        return 0
    tables = [result.topk_prompt, *(one.topk for one in result.sequences)]
    arrays = [result.prompt_logprobs, result.targets, result.alt_tokens, *(one.tokens for one in result.sequences)]
    arrays += [table.token_ids for table in tables if table is not None]
    return sum(array.size for array in arrays if array is not None)


async def cancel_future(context: RequestContext) -> Response:
    """Withdraws a sample; nothing else can be withdrawn, and nothing is said about it."""
    request_id = await context.text("cancel_future", "request_id")
    context.state.scheduler.cancel(request_id, owner=context.owner)
    return Response(status_code=204)


class Feeds:
    """Samples on their way, by (owner, sampling session, clone), for those clients that ask for ends in batches.

    Each sample that is done gets a number, its cursor. Only the event loop comes here.
    """

    def __init__(self) -> None:
        self._open: dict[tuple[str, str, int], OrderedDict[str, None]] = {}
        self._done: dict[tuple[str, str, int], OrderedDict[str, tuple[int, str]]] = {}
        self._key_of: dict[str, tuple[str, str, int]] = {}
        self._cursor = 0

    def add(self, owner: str, session: str, clone: int, request_id: str) -> None:
        """A sample was submitted (or again)."""
        if request_id in self._key_of:
            return
        key = (owner, session, clone)
        waiting = self._open.setdefault(key, OrderedDict())
        waiting[request_id] = None
        self._key_of[request_id] = key
        if len(waiting) > FEED_IDS:
            self.fetched(next(iter(waiting)))
        if len(self._key_of) > ALL_FEED_IDS:  # of clients that left without asking
            self.fetched(next(iter(self._key_of)))

    def fetched(self, request_id: str) -> None:
        """A result was handed out: nobody has to be told of it any more."""
        if (key := self._key_of.pop(request_id, None)) is None:
            return
        for table in (self._open, self._done):
            if key in table:
                table[key].pop(request_id, None)
                if not table[key]:
                    del table[key]

    def waiting(self, key: tuple[str, str, int]) -> list[str]:
        """Samples of which no end is known yet."""
        return list(self._open.get(key, ()))

    def ended(self, key: tuple[str, str, int], request_id: str, state: str) -> None:
        """A sample has ended."""
        self._open[key].pop(request_id)
        self._cursor += 1
        self._done.setdefault(key, OrderedDict())[request_id] = (self._cursor, state)

    def news(self, key: tuple[str, str, int], cursor: int) -> tuple[int, list[dict[str, str]]]:
        """(cursor, ends) after `cursor`."""
        found = [(at, name, state) for name, (at, state) in self._done.get(key, {}).items() if at > cursor]
        ends = [{"state": state, "request_id": name} for _, name, state in found]
        return max([cursor, *(at for at, _, _ in found)]), ends


async def retrieve_futures(context: RequestContext, *, feeds: Feeds) -> Response:
    """Which samples of a sampling session have ended since the client's cursor, after a long poll while none has."""
    body = await context.message(RetrieveFutures)
    key = (context.owner, body.target.sampling_session_id, body.target.cloned_sampler_id)
    cursor, seconds = body.prev_cursor, min(POLL_SECONDS, max(0.0, body.timeout))
    for request_id in body.retrieved_request_ids:
        feeds.fetched(request_id)
    found = _look(context, feeds, key, cursor)
    if not found[1] and seconds > 0:
        waiting, when_done = feeds.waiting(key), context.state.scheduler.when_done
        await context.state.wait(lambda wake: [when_done(one, wake) for one in waiting], seconds)
        found = _look(context, feeds, key, cursor)
    return reply({"cursor": found[0], "completions": found[1]})


def _look(
    context: RequestContext, feeds: Feeds, key: tuple[str, str, int], cursor: int
) -> tuple[int, list[dict[str, str]]]:
    for request_id in feeds.waiting(key):
        state = context.state.scheduler.outcome(request_id, owner=context.owner).state
        if state != "pending":
            # An unknown one is called failed: asking for it says the rest.
            feeds.ended(key, request_id, "finished" if state == "done" else "failed")
    return feeds.news(key, cursor)
