"""What any server of this project shares: a server in a thread of its own, bodies with limits, JSON, and errors that
are one line for a client. Nothing here knows the Tinker protocol.

The event loop never waits for the disk or for a long computation: those run in threads.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import math
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import anyio
import numpy as np
import uvicorn
import zstandard
from anyio import to_thread
from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from skyrl.types import RunError, UserError
from skyrl.web.message import short_repr

log = logging.getLogger("skyrl.web")

JSON = "application/json"
BODY_SECONDS, STALL_SECONDS = 120.0, 10.0  # a client that sends more slowly, or so long nothing, is cut off
SMALL_BYTES = 1 << 15  # a body is parsed where it is up to here, decompressed: a thread would cost more
LARGE_BODIES = 8  # of one owner in memory
PARSING_THREADS = 2
# Of one JSON body. A prompt of a million tokens with targets fits; two bytes make an empty list, which takes sixty, and
# a key takes ten times as long as a number. The time for a whole number goes with the square of its digits.
JSON_VALUES, JSON_CONTAINERS, JSON_KEYS, JSON_DEPTH, JSON_DIGITS = 1 << 21, 1 << 18, 1 << 18, 64, 1024
START_SECONDS = 30.0
# How long a thread that runs Python keeps the others waiting. torch gives the interpreter away at each operation: with
# Python's 5 ms a busy event loop makes a step of the model, and with it everybody's tokens, several times slower.
SWITCH_SECONDS = 5e-4
STOP_SECONDS = 1  # for what is being sent or received when the server stops; then it is cut off
# Above the pools of the clients, so that they close idle connections and never send into one that closes.
KEEP_ALIVE_SECONDS = 120
FAULT = "the server failed on this request; its log says why"
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
CLOSE = {"connection": "close"}  # the rest of the body is not read, so nothing may follow it
COUNTED_BYTES = 1 << 18  # of JSON, at a time: short enough for others to have their turn
_STEP = np.zeros(256, np.int8)  # in depth
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1
T = TypeVar("T")


class HttpError(Exception):
    """A refusal with a status of its own."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, dict(headers or {})


async def in_thread(
    call: Callable[..., T], *args: Any, limiter: anyio.CapacityLimiter | None = None, **kwargs: Any
) -> T:
    """The result of a call that waits for a disk or computes for long. limiter: of the threads that it may take."""
    try:
        return await to_thread.run_sync(partial(call, *args, **kwargs), limiter=limiter)
    except Exception as error:
        # An error and the future that brought it hold each other, and by its frames all that the call worked on: many
        # refused bodies would stay in memory until the next large garbage collection.
        error.__context__ = None
        traceback.clear_frames(error.__traceback__)
        raise


# ---- bodies


async def read_body(request: Request, *, max_bytes: int, limit: str, keep: bool = True) -> bytes:
    """The whole body, or b"" of one that is not to be kept. Raises HttpError 413 before more than `max_bytes` of it are
    in memory (`limit`: what sets that), 408 when it does not arrive."""

    def too_large(what: str) -> HttpError:
        return HttpError(413, f"body: {what}, at most {max_bytes >> 20} MiB may be ({limit})", CLOSE)

    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > max_bytes:
        raise too_large(f"{announced} bytes")
    body, size, seen, late = bytearray(), 0, 0, False
    task: Any = asyncio.current_task()
    loop = asyncio.get_running_loop()
    until = loop.time() + BODY_SECONDS
    timer: asyncio.TimerHandle

    def look() -> None:
        nonlocal seen, late, timer
        if size > seen and loop.time() < until:
            seen, timer = size, loop.call_later(STALL_SECONDS, look)
            return
        late = True
        task.cancel()

    timer = loop.call_later(STALL_SECONDS, look)  # a tenth of what a cancel scope of anyio costs
    try:
        async for part in request.stream():
            size += len(part)
            if size > max_bytes:
                raise too_large("more")
            if keep:
                body += part
    except asyncio.CancelledError:
        if not late:
            raise
        if hasattr(task, "uncancel"):  # Python 3.11
            task.uncancel()
        told = f"the body did not arrive within {BODY_SECONDS:.0f} s, or nothing of it came for {STALL_SECONDS:.0f}"
        raise HttpError(408, told, CLOSE) from None
    finally:
        timer.cancel()
    return bytes(body)


class _Sender:
    """What bounds the large bodies of one sender."""

    def __init__(self) -> None:
        self.room, self.turn = asyncio.Semaphore(LARGE_BODIES), asyncio.Lock()


class BodyReader:
    """Reads and parses the bodies of all requests, so that a large one, or a long search, holds up nobody else.

    A body that is small when it is decompressed is parsed in the event loop. Larger ones are decompressed and parsed in
    two threads of their own, one of each sender at a time, and at most eight of one sender are in memory.
    """

    def __init__(self) -> None:
        self._threads = anyio.CapacityLimiter(PARSING_THREADS)
        self._senders: WeakValueDictionary[str, _Sender] = WeakValueDictionary()  # those with a body under way

    async def parse(
        self,
        request: Request,
        sender: str,
        read: Callable[[bytes], T],
        *,
        max_bytes: int,
        limit: str,
        quick: bool = True,
    ) -> T:
        """What `read` makes of the body. `max_bytes` (`limit`: what sets it) bounds the body as it comes and as it is
        decompressed; `quick` False: a small one is not read in the event loop either. Raises HttpError 413, 408,
        UserError for what cannot be decompressed, and what `read` raises."""
        announced, encoding = request.headers.get("content-length", ""), request.headers.get("content-encoding", "")
        async with AsyncExitStack() as held:
            own = self._senders.setdefault(sender, _Sender())
            if not announced.isdigit() or int(announced) > SMALL_BYTES:
                await held.enter_async_context(own.room)
            body = await read_body(request, max_bytes=max_bytes, limit=limit)

            def parse() -> T:
                return read(decompressed(body, encoding, max_bytes=max_bytes))

            if size_of(body, encoding) <= SMALL_BYTES:
                return parse() if quick else await in_thread(parse)
            return await self.in_turn(sender, parse)

    async def in_turn(self, sender: str, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """The result of a call that takes long: one of each sender at a time, in the threads for large bodies."""
        own = self._senders.setdefault(sender, _Sender())
        async with own.turn:
            return await in_thread(call, *args, limiter=self._threads, **kwargs)


def size_of(body: bytes, encoding: str) -> float:
    """Bytes of a body as it came or decompressed, whichever are more; infinite where its zstd frame does not say."""
    if encoding.strip().lower() != "zstd":
        return len(body)
    try:
        size = zstandard.frame_content_size(body)
    except zstandard.ZstdError:  # damaged, which is told where it is decompressed
        return len(body)
    return math.inf if size < 0 else max(size, len(body))


def decompressed(body: bytes, encoding: str, *, max_bytes: int) -> bytes:
    """The body without its Content-Encoding (none, identity or zstd), at most `max_bytes` long: a frame that would
    give more is refused before or while it is expanded. Raises UserError, also for a cut-off or damaged frame."""
    encoding = (encoding or "identity").strip().lower()
    if encoding not in ("identity", "zstd"):
        raise UserError(f"Content-Encoding {short_repr(encoding)}; allowed: none, zstd")
    if encoding == "identity":
        return body
    try:
        size = zstandard.frame_content_size(body)  # -1 where the frame does not say
        if size > max_bytes:
            raise UserError(f"body: {size} bytes when decompressed, at most {max_bytes} may be; send smaller parts")
        # Where the frame does not say, the buffer is max_bytes long and a longer output an error.
        found = zstandard.ZstdDecompressor().decompress(body, max_output_size=max_bytes, allow_extra_data=False)
        if size < 0:  # and then bytes behind the frame go unnoticed: once more, now that its length is known to be fine
            again = zstandard.ZstdDecompressor().decompressobj()
            again.decompress(body)
            if again.unused_data:
                raise UserError(f"body: {len(again.unused_data)} bytes follow the zstd frame; allowed: one frame")
        return found
    except zstandard.ZstdError as error:
        raise UserError(f"body: not a zstd frame of at most {max_bytes} bytes: {short_repr(str(error))}") from None


def read_json(body: bytes) -> Any:
    """The JSON value of a body, {} of an empty one. NaN and Infinity are read, as old clients write them. Raises
    UserError for bytes that are no JSON, and for more values, or deeper ones, than JSON_VALUES and the like allow."""
    check_json(body)
    try:
        return json.loads(body.decode("utf-8", "surrogatepass")) if body else {}
    except RecursionError:
        raise UserError("body: JSON nested too deeply") from None
    except ValueError as error:  # also wrong UTF-8, and integers of more digits than Python reads
        raise UserError(f"body: not JSON: {short_repr(str(error))}") from None


def check_json(body: bytes) -> None:
    """Counts the values of JSON and its keys, how deep they are nested and how long its numbers are, before any is
    built: the parser keeps the whole process waiting, and two bytes can take sixty in memory. Raises UserError."""
    if len(body) <= SMALL_BYTES and body.count(b"[") + body.count(b"{") <= JSON_DEPTH:
        return
    commas = containers = keys = depth = 0
    in_text, left = False, b""
    for start in range(0, len(body), COUNTED_BYTES):
        part = left + body[start : start + COUNTED_BYTES]
        left = b"\\" * ((len(part) - len(part.rstrip(b"\\"))) % 2)  # half an escape
        part = part[: len(part) - len(left)].replace(b"\\\\", b"").replace(b'\\"', b"")
        letters = np.frombuffer(part, np.uint8)
        text = np.bitwise_xor.accumulate(letters == ord('"')) ^ in_text  # after a quote that begins a text
        steps = np.where(text, 0, _STEP[letters])
        depths = depth + np.cumsum(steps, dtype=np.int32)
        commas += int(((letters == ord(",")) & ~text).sum())
        containers += int((steps > 0).sum())
        keys += int(((letters == ord(":")) & ~text).sum())
        other = np.flatnonzero(text | (letters < ord("0")) | (letters > ord("9")))
        if np.diff(other, prepend=-1, append=len(letters)).max() > JSON_DIGITS + 1:
            raise UserError(f"body: JSON with a number of more than {JSON_DIGITS} digits; write it shorter")
        if len(depths):
            depth, in_text = int(depths[-1]), bool(text[-1])
            if depths.max() > JSON_DEPTH:
                raise UserError("body: JSON nested too deeply")
        for what, count, most in (
            ("values", commas + containers, JSON_VALUES),
            ("lists", containers, JSON_CONTAINERS),
            ("keys", keys, JSON_KEYS),
        ):
            if count > most:
                raise UserError(f"body: JSON of more than {most} {what}; send smaller parts")


def whole_number(request: Request, name: str, default: int) -> int:
    """A parameter of the query that is a whole number. Raises UserError."""
    text = request.query_params.get(name, str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise UserError(f"{name}={text[:60]!r}; allowed: a whole number, 0 or more")
    return int(text)


# ---- answers


def encode_json(value: Any) -> bytes:
    """UTF-8 JSON. Numbers that JSON cannot write become the strings "NaN", "Infinity" and "-Infinity", as protobuf's
    JSON does, and the clients' number fields read them as numbers; null would be refused there."""
    return to_json(value, inf_nan_mode="strings", fallback=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"no JSON for {type(value).__name__}")


def reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encode_json(value), status, headers=dict(headers or {}), media_type=JSON)


def error_reply(error: HttpError) -> Response:
    """An error: always with a body, since clients take an empty 400 for a broken proxy and retry."""
    return reply({"detail": error.detail}, error.status, error.headers)


def error_json(error: HttpError) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = KINDS.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.detail, "type": kind, "param": None, "code": None}}


def log_fault(request: Request, error: BaseException) -> None:
    """One line in the log for a fault of ours, with where it was raised."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        place, trace = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}", trace.tb_next
    what = " ".join(str(error).split())[:500]
    log.error("%s %s: %s: %s (%s)", request.method, request.url.path, type(error).__name__, what, place)


# ---- the server


@dataclass
class HttpServer:
    """A server in a thread of its own. `stop` ends it, and may be called again."""

    host: str
    port: int
    _server: uvicorn.Server
    _thread: threading.Thread
    _close: Callable[[], None]

    @property
    def url(self) -> str:
        """Where clients reach it; for an address that means all, through this machine's own."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def check(self) -> None:
        """Raises RunError when the thread that serves HTTP has ended: nobody could reach the server any more."""
        if not self._thread.is_alive():
            raise RunError("the HTTP thread has ended, so nobody can reach the server; the lines above say why")

    def stop(self) -> None:
        """Takes no new requests, wakes those that wait, and returns when all are answered, or after some seconds."""
        self._close()
        told = logging.getLogger("uvicorn.error")
        told.disabled = True  # it has a traceback for each request that is cut off
        self._server.should_exit = True
        self._thread.join(STOP_SECONDS + 5.0)
        told.disabled = False


def serve_in_thread(app: Starlette, host: str, port: int, *, close: Callable[[], None], options: str) -> HttpServer:
    """Serves `app` until `stop`, which calls `close` in the event loop first. Signals stay with the main thread. port
    0: any free one. `options`: the prefix of the options that set the address.

    Raises: UserError when the address cannot be had, before any thread is started.
    """
    listener = _listen(host, port, options)
    sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    server = uvicorn.Server(config)
    loops: list[asyncio.AbstractEventLoop] = []
    begun = threading.Event()

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        begun.set()
        await server.serve(sockets=[listener])

    thread = threading.Thread(target=lambda: _run_loop(main()), name="skyrl-http", daemon=True)
    thread.start()
    if not begun.wait(START_SECONDS):
        raise RuntimeError("the HTTP thread did not start")

    def close_in_loop() -> None:
        if thread.is_alive() and not loops[0].is_closed():
            try:
                loops[0].call_soon_threadsafe(close)
            except RuntimeError:  # it ended between the two lines
                return

    return HttpServer(host, listener.getsockname()[1], server, thread, close_in_loop)


def _run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Runs it in uvloop's event loop where that is installed: asyncio's own takes a system call for each part of an
    answer."""
    if importlib.util.find_spec("uvloop") is None:
        asyncio.run(main)
        return
    import uvloop

    uvloop.run(main)


def _listen(host: str, port: int, options: str) -> socket.socket:
    try:
        found: Sequence = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise UserError(
            f"{options}.host={host} {options}.port={port}: {error.strerror or error}; give another address or port (0 "
            "= any free one)"
        ) from error
    return listener
