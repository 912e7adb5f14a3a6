"""What every endpoint shares: who asks, the body and its limits, answers, and errors that are one line for a client.

The event loop never waits for the disk or for a long computation: those run in threads. Nothing here imports torch.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import anyio
from anyio import to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from skyrl.config.schema import ServiceConfig
from skyrl.service.messages import RequestFailed, RequestOutcome, ServerInfo, TooManyRequests
from skyrl.service.records import NotFound
from skyrl.service.scheduler import RequestScheduler
from skyrl.service.store import Store
from skyrl.service.wire import JSON, encode_json, read_json
from skyrl.types import UserError
from skyrl.web.auth import LOCAL_OWNER, Keys, Signer

if TYPE_CHECKING:  # it needs torch, and most of the door does not
    from skyrl.service.archive import Archive
    from skyrl.service.checkpoints import CheckpointService

log = logging.getLogger("skyrl.service")

API = "/api/v1/"
BODY_SECONDS = 120.0  # a client that sends more slowly is cut off
SMALL_BYTES = 1 << 16  # smaller bodies are parsed where they are: a thread would cost more
BUSY_RETRY_SECONDS = 1
AUDIT_ENTRIES = 10_000
REMEMBERED = 4096  # answers to posts that clients may repeat after a broken connection
T = TypeVar("T")


class HttpError(Exception):
    """A refusal with a status of its own."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, dict(headers or {})


@dataclass
class Door:
    """What the endpoints work with. `waiting` are the polls that wait; `close` wakes them, for the server to stop.

    `audit` holds (time, owner, event, details) of what was done to checkpoints since the start, newest last; `answers`
    those of `once`, by owner, path and idempotency key.
    """

    desk: RequestScheduler
    checkpoints: CheckpointService
    facts: ServerInfo
    settings: ServiceConfig
    keys: Keys
    signer: Signer = field(default_factory=Signer)
    waiting: set[asyncio.Event] = field(default_factory=set)
    closed: bool = False
    answers: OrderedDict[tuple[str, str, str], asyncio.Future[Response]] = field(default_factory=OrderedDict)
    audit: deque[tuple[datetime, str, str, dict[str, Any]]] = field(default_factory=lambda: deque(maxlen=AUDIT_ENTRIES))

    @property
    def store(self) -> Store:
        """Sessions, runs and rows of checkpoints."""
        return self.checkpoints.store

    @property
    def archive(self) -> Archive:
        """Files of checkpoints."""
        return self.checkpoints.archive

    @property
    def max_bytes(self) -> int:
        """Of one body, decompressed."""
        return self.settings.max_request_mib << 20

    def close(self) -> None:
        """Nobody waits any longer. To be called in the event loop."""
        self.closed = True
        for event in self.waiting:
            event.set()

    async def wait(self, when_done: Callable[[Callable[[], None]], None], seconds: float) -> None:
        """Returns when `when_done` calls back (from any thread), when the server stops, or after so many seconds."""
        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # the loop has ended meanwhile; who settles futures must not notice
                log.debug("a future was settled after the door had closed")

        when_done(wake)
        if self.closed:
            return
        self.waiting.add(event)
        try:
            with anyio.move_on_after(seconds):
                await event.wait()
        finally:
            self.waiting.discard(event)

    def note(self, owner: str, event: str, **details: Any) -> None:
        """One line for the audit log."""
        self.audit.append((datetime.now(timezone.utc), owner, event, details))


@dataclass
class Call:
    """One request with its owner. Path parameters are decoded, slashes and colons included."""

    door: Door
    request: Request
    owner: str

    def path(self, name: str) -> str:
        """A parameter of the path."""
        return self.request.path_params[name]

    def query(self, name: str, default: str = "") -> str:
        """A parameter of the query."""
        return self.request.query_params.get(name, default)

    def whole_number(self, name: str, default: int) -> int:
        """A parameter of the query that is a whole number. Raises UserError."""
        text = self.query(name, str(default))
        if not text.isascii() or not text.isdigit() or len(text) > 18:
            raise UserError(f"{name}={text[:60]!r}; allowed: a whole number, 0 or more")
        return int(text)

    async def body(self) -> bytes:
        """The whole body. Raises HttpError 413 before more than service.max_request_mib of it is in memory."""
        limit = self.door.max_bytes
        announced = self.request.headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > limit:
            raise self._too_large(f"{announced} bytes")
        parts, size = [], 0
        try:
            with anyio.fail_after(BODY_SECONDS):
                async for part in self.request.stream():
                    size += len(part)
                    if size > limit:
                        raise self._too_large("more")
                    parts.append(part)
        except TimeoutError:
            raise HttpError(408, f"the body did not arrive within {BODY_SECONDS:.0f} s", _CLOSE) from None
        return b"".join(parts)

    def _too_large(self, what: str) -> HttpError:
        most = self.door.settings.max_request_mib
        return HttpError(413, f"body: {what}, at most {most} MiB may be (service.max_request_mib)", _CLOSE)

    async def json(self) -> Any:
        """The body as JSON; an empty one is {}. Raises UserError for bytes that are no JSON."""
        body = await self.body()
        if not body:
            return {}
        return await self.parse(body, partial(read_json, body, max_bytes=self.door.max_bytes))

    async def json_as(self, read: Callable[[Any], T]) -> T:
        """read(the body as JSON), both in a thread if the body is large. Raises UserError."""
        body = await self.body()
        return await self.parse(body, lambda: read(read_json(body, max_bytes=self.door.max_bytes) if body else {}))

    async def parse(self, body: bytes, read: Callable[[], T]) -> T:
        """read(), in a thread if the body is large."""
        return read() if len(body) <= SMALL_BYTES else await in_thread(read)

    async def wait(self, request_id: str, seconds: float) -> RequestOutcome:
        """What is known of a future when it is settled, or after so many seconds, or when the server stops."""
        outcome = self.door.desk.outcome(request_id, owner=self.owner)
        if outcome.state != "pending" or seconds <= 0:
            return outcome
        await self.door.wait(partial(self.door.desk.when_done, request_id), seconds)
        return self.door.desk.outcome(request_id, owner=self.owner)


_CLOSE = {"connection": "close"}  # the rest of the body is not read, so nothing may follow it
Handler = Callable[[Call], Awaitable[Response]]


def once(handler: Handler) -> Handler:
    """Runs a post that a client repeats (the same X-Idempotency-Key) only one time, and answers all alike. For what
    has no number of its own by which the desk or the store would know it again. An error is not remembered."""

    async def run(call: Call) -> Response:
        token = call.request.headers.get("x-idempotency-key", "")
        if not token:
            return await handler(call)
        answers, key = call.door.answers, (call.owner, call.request.url.path, token)
        if key in answers:
            return await asyncio.shield(answers[key])
        answers[key] = asyncio.get_running_loop().create_future()
        if len(answers) > REMEMBERED:
            answers.popitem(last=False)
        future = answers[key]
        try:
            future.set_result(await handler(call))
        except BaseException as error:
            answers.pop(key, None)
            future.set_exception(
                error if isinstance(error, Exception) else HttpError(503, "the request was broken off")
            )
            future.exception()  # looked at: nobody else may be waiting
            raise
        return future.result()

    return run


async def in_thread(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """The result of a call that waits for a disk or computes for long."""
    return await to_thread.run_sync(partial(call, *args, **kwargs))


def reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(encode_json(value), status, headers=dict(headers or {}), media_type=JSON)


def refusal(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error: always with a body, since clients take an empty 400 for a broken proxy and retry."""
    return reply({"detail": detail}, status, headers)


def find_owner(door: Door, request: Request) -> str:
    """Whose key the request carries, in X-API-Key or as a bearer. Raises HttpError 401, 403."""
    if not door.keys.required:
        _refuse_browsers(request)
        return LOCAL_OWNER
    given = request.headers.get("x-api-key")
    if given is None:
        scheme, _, rest = request.headers.get("authorization", "").partition(" ")
        given = rest.strip() if scheme.lower() == "bearer" else None
    if given is not None and given.startswith("eyJ"):
        owner = door.signer.token_owner(given)
        if owner is None:
            told = {"www-authenticate": 'Bearer error="invalid_token"'}
            raise HttpError(401, "this token is not ours or has expired; ask auth/token for another", told)
        return owner
    owner = door.keys.owner(given)
    if owner is None:
        raise HttpError(401, "no valid API key; set TINKER_API_KEY to one that this server knows")
    return owner


def _refuse_browsers(request: Request) -> None:
    """Without keys a web page that the user has open could post here; browsers say where a page is from."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host", ""):
        raise HttpError(403, f"requests of web pages ({origin[:200]}) need a key; start the server with keys")


def problem_of(error: Exception) -> HttpError | None:
    """The answer to an error that is the client's or was foreseen; None for a fault of ours."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, NotFound):
        return HttpError(404, str(error))
    if isinstance(error, (UserError, RequestFailed)):
        return HttpError(400, str(error))
    if isinstance(error, TooManyRequests):
        return HttpError(429, str(error), {"retry-after": str(BUSY_RETRY_SECONDS)})
    return None


def tell(request: Request, error: BaseException) -> None:
    """One line in the log for a fault of ours, with where it was raised."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        place, trace = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}", trace.tb_next
    what = " ".join(str(error).split())[:500]
    log.error("%s %s: %s: %s (%s)", request.method, request.url.path, type(error).__name__, what, place)


FAULT = "the server failed on this request; its log says why"


def route(door: Door, methods: str, path: str, handler: Handler, *, public: bool = False) -> Route:
    """An endpoint under /api/v1/, its errors turned into answers. public: anyone may ask, without a key."""

    async def endpoint(request: Request) -> Response:
        try:
            owner = "" if public else find_owner(door, request)
            return await handler(Call(door, request, owner))
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:
            known = problem_of(error)
            if known is None:
                tell(request, error)
                known = HttpError(500, FAULT)
            return refusal(known.status, known.detail, known.headers)

    return Route(path if path.startswith("/") else API + path, endpoint, methods=methods.split("|"))


def unix_time(seconds: float) -> datetime:
    """A time as the answers write it."""
    return datetime.fromtimestamp(seconds, timezone.utc)
