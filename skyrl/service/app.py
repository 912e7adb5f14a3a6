"""What every endpoint shares: the state of the server, who asks, their message, and errors as answers. No torch."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import create_model
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from skyrl.config.schema import ServiceConfig
from skyrl.feedback.door import FeedbackDoor
from skyrl.service.messages import RequestFailed, RequestOutcome, ServerInfo, TooManyRequests
from skyrl.service.scheduler import RequestScheduler
from skyrl.service.storage.records import NotFound, StorageError
from skyrl.service.storage.store import Store
from skyrl.text.chat import Chat
from skyrl.types import UserError
from skyrl.web.auth import Keys, Signer, find_owner
from skyrl.web.http import FAULT, BodyReader, HttpError, error_reply, log, log_fault, read_body, read_json
from skyrl.web.message import JsonMessage, Text
from skyrl.web.tensors import SizeBudget

if TYPE_CHECKING:  # it needs torch, and most endpoints do not
    from skyrl.service.storage.checkpoints import CheckpointService

API = "/api/v1/"
RETRY_SECONDS = 1  # told to clients when there is too much work
LOADING = "the model is being loaded"
LOAD_SECONDS = 30.0  # that a request waits for the model before it is told to come again
AUDIT_ENTRIES = 10_000
SMALL_BODY = 4 << 20  # of requests that hold neither tokens nor arrays
REMEMBERED = 4096  # answers to posts that clients may repeat after a broken connection
KEY_LENGTH = 256  # of what says that a post is a repetition
M = TypeVar("M", bound=JsonMessage)
T = TypeVar("T")


@dataclass
class AppState:
    """What the endpoints work with. `waiting` are the polls that wait; `close` wakes them, for the server to stop.

    `audit` holds (time, owner, event, details) of what was done to checkpoints since the start, newest last; `answers`
    those of `once`, by owner, path and idempotency key.
    """

    scheduler: RequestScheduler
    checkpoints: CheckpointService
    info: ServerInfo
    settings: ServiceConfig
    keys: Keys
    signer: Signer = field(default_factory=Signer)
    bodies: BodyReader = field(default_factory=BodyReader)
    waiting: set[asyncio.Event] = field(default_factory=set)
    closed: bool = False
    answers: OrderedDict[tuple[str, str, str], asyncio.Future[Response]] = field(default_factory=OrderedDict)
    feedback: FeedbackDoor | None = None
    chat: Future[Chat] = field(default_factory=Future)  # set once the model is loaded
    audit: deque[tuple[datetime, str, str, dict[str, Any]]] = field(default_factory=lambda: deque(maxlen=AUDIT_ENTRIES))

    @property
    def store(self) -> Store:
        """Sessions, runs and rows of checkpoints."""
        return self.checkpoints.store

    @property
    def max_bytes(self) -> int:
        """Of one body, decompressed."""
        return self.settings.max_request_mib << 20

    def close(self) -> None:
        """Nobody waits any longer. To be called in the event loop."""
        self.closed = True
        for event in self.waiting:
            event.set()

    async def wait(self, when_done: Callable[[Callable[[], None]], Any], seconds: float) -> None:
        """Returns when `when_done` calls back (from any thread), when the server stops, or after so many seconds."""
        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # the loop has ended meanwhile; who settles futures must not notice
                log.debug("a future was settled after the server had stopped")

        when_done(wake)
        if self.closed:
            return
        self.waiting.add(event)
        timer = loop.call_later(seconds, event.set)
        try:
            await event.wait()
        finally:
            timer.cancel()
            self.waiting.discard(event)

    async def loaded(self) -> Chat:
        """The model's Chat, and `info` is complete. Waits while it is loaded. Raises HttpError 503."""
        if not self.chat.done():
            await self.wait(lambda wake: self.chat.add_done_callback(lambda _: wake()), LOAD_SECONDS)
        if not self.chat.done():
            raise HttpError(503, f"{LOADING}; ask again", {"retry-after": str(RETRY_SECONDS)})
        return self.chat.result()

    def add_audit(self, owner: str, event: str, **details: Any) -> None:
        """One line for the audit log."""
        self.audit.append((datetime.now(timezone.utc), owner, event, details))


@lru_cache(maxsize=64)
def _one_text(operation: str, field: str) -> type[JsonMessage]:
    fields: Any = {field: (Text, ...)}
    return create_model(
        "OneText", __base__=JsonMessage, __cls_kwargs__={"operation": operation, "lenient": True}, **fields
    )


@dataclass
class RequestContext:
    """One HTTP request with its owner. Path parameters are decoded, slashes and colons included."""

    state: AppState
    request: Request
    owner: str

    def path(self, name: str) -> str:
        """A parameter of the path."""
        return self.request.path_params[name]

    def query(self, name: str, default: str = "") -> str:
        """A parameter of the query."""
        return self.request.query_params.get(name, default)

    @property
    def sender(self) -> str:
        """Who shares the room for large things: the owner of a key, without keys an address."""
        client = self.request.client
        return self.owner if self.state.keys.required or client is None else client.host

    async def read(self, read: Callable[[bytes], T], *, kind: type[JsonMessage] | None = None, quick: bool = True) -> T:
        """What `read` makes of the body, in the event loop only where both are small and `read` is `quick`. Raises
        HttpError 413 before more than service.max_request_mib is in memory, or SMALL_BODY for a `kind` that is never
        large."""
        max_bytes, limit = self.state.max_bytes, "service.max_request_mib"
        if kind is not None and not kind.large and max_bytes > SMALL_BODY:
            max_bytes, limit = SMALL_BODY, f"in {kind.operation}"
        bodies = self.state.bodies
        return await bodies.parse(self.request, self.sender, read, max_bytes=max_bytes, limit=limit, quick=quick)

    async def search(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """The result of a search or a listing, which may read all records: one of each sender at a time, so that many
        leave threads to whoever asks for a thing by its name."""
        return await self.state.bodies.in_turn(self.sender, call, *args, **kwargs)

    async def message(self, kind: type[M]) -> M:
        """The body as a message. Raises UserError for bytes that are no JSON, and for what the message refuses."""
        budget = SizeBudget(self.state.max_bytes)
        return await self.read(lambda body: kind.parse(read_json(body), budget=budget), kind=kind)

    async def ignore_body(self) -> None:
        """Lets the body pass without keeping any of it. Raises HttpError 413."""
        await read_body(self.request, max_bytes=self.state.max_bytes, limit="service.max_request_mib", keep=False)

    async def text(self, operation: str, field: str) -> str:
        """The one field, a text, that matters of a small body. Raises UserError."""
        kind = _one_text(operation, field)
        return getattr(await self.message(kind), field)

    async def wait(self, request_id: str, seconds: float) -> RequestOutcome:
        """What is known of a future when it is settled, or after so many seconds, or when the server stops."""
        outcome = self.state.scheduler.outcome(request_id, owner=self.owner)
        if outcome.state != "pending" or seconds <= 0:
            return outcome
        await self.state.wait(partial(self.state.scheduler.when_done, request_id), seconds)
        return self.state.scheduler.outcome(request_id, owner=self.owner)


Handler = Callable[[RequestContext], Awaitable[Response]]


def once(handler: Handler) -> Handler:
    """Runs a post that a client repeats (the same X-Idempotency-Key) only one time, and answers all alike. For what
    has no number of its own by which the scheduler or the store would know it again. An error is not remembered."""

    async def run(context: RequestContext) -> Response:
        token = context.request.headers.get("x-idempotency-key", "")
        if not token:
            return await handler(context)
        if len(token) > KEY_LENGTH:
            raise UserError(f"X-Idempotency-Key: {len(token)} characters; allowed: at most {KEY_LENGTH}")
        answers, key = context.state.answers, (context.owner, context.request.url.path, token)
        if key in answers:
            return await asyncio.shield(answers[key])
        answers[key] = asyncio.get_running_loop().create_future()
        if len(answers) > REMEMBERED:
            answers.popitem(last=False)
        future = answers[key]
        try:
            future.set_result(await handler(context))
        except BaseException as error:
            answers.pop(key, None)
            future.set_exception(
                error if isinstance(error, Exception) else HttpError(503, "the request was broken off")
            )
            future.exception()  # looked at: nobody else may be waiting
            raise
        return future.result()

    return run


def http_error(request: Request, error: Exception) -> HttpError:
    """The answer to any error. What is neither the client's nor foreseen is a fault of ours, told in the log."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, NotFound):
        return HttpError(404, str(error))
    if isinstance(error, StorageError):
        return HttpError(503, str(error), {"retry-after": str(RETRY_SECONDS)})
    if isinstance(error, (UserError, RequestFailed)):
        return HttpError(400, str(error))
    if isinstance(error, TooManyRequests):
        return HttpError(429, str(error), {"retry-after": str(RETRY_SECONDS)})
    log_fault(request, error)
    return HttpError(500, FAULT)


def route(
    state: AppState,
    methods: str,
    path: str,
    handler: Handler,
    *,
    public: bool = False,
    write_error: Callable[[HttpError], Response] = error_reply,
) -> Route:
    """An endpoint, under /api/v1/ unless its path begins with a slash, its errors turned into answers. public: anyone
    may ask, without a key."""

    async def endpoint(request: Request) -> Response:
        try:
            owner = "" if public else find_owner(state.keys, state.signer, request)
            return await handler(RequestContext(state, request, owner))
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:
            return write_error(http_error(request, error))

    return Route(path if path.startswith("/") else API + path, endpoint, methods=methods.split("|"))
