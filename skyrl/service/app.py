"""The HTTP door: every endpoint of the protocol in one application, and a server for it in a thread of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from skyrl.config.schema import ServiceConfig
from skyrl.service.checkpoints import CheckpointService
from skyrl.service.http import FAULT, Door, refusal, tell
from skyrl.service.messages import ServerInfo
from skyrl.service.openai import TextTools, openai_routes
from skyrl.service.routes_checkpoints import checkpoint_routes
from skyrl.service.routes_session import session_routes
from skyrl.service.routes_work import work_routes
from skyrl.service.scheduler import RequestScheduler
from skyrl.types import UserError
from skyrl.web.auth import Keys, read_keys

START_SECONDS = 30.0
STOP_SECONDS = 5.0
# Above the pools of the clients, so that they close idle connections and never send into one that closes.
KEEP_ALIVE_SECONDS = 120


def make_app(
    desk: RequestScheduler,
    checkpoints: CheckpointService,
    facts: ServerInfo,
    settings: ServiceConfig,
    *,
    text: TextTools | None = None,
    keys: Keys | None = None,
) -> Starlette:
    """The application. `keys`: read from `settings` if not given. `text`: for /v1/completions and the like; without
    it those are refused by name. `app.state.door` holds what the endpoints share.

    Raises: UserError for keys that cannot be used.
    """
    door = Door(desk, checkpoints, facts, settings, read_keys(settings) if keys is None else keys)
    # Routes are tried one after the other: what is asked most comes first.
    routes = [*work_routes(door), *session_routes(door), *checkpoint_routes(door), *openai_routes(door, text)]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _no_such, Exception: _fault})
    app.router.redirect_slashes = False
    app.state.door = door
    return app


async def _no_such(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return refusal(404, f"{request.method} {request.url.path[:200]}: no such endpoint")
    return refusal(error.status_code, str(error.detail), error.headers)


async def _fault(request: Request, error: Exception) -> Response:
    tell(request, error)
    return refusal(500, FAULT)


@dataclass
class Serving:
    """A server that runs. `stop` ends it, and may be called again."""

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

    @property
    def alive(self) -> bool:
        """Whether it still serves."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Takes no new requests, wakes those that wait, and returns when all are answered, or after some seconds."""
        self._close()
        self._server.should_exit = True
        self._thread.join(STOP_SECONDS + 5.0)


def serve_in_thread(app: Starlette, host: str, port: int) -> Serving:
    """Serves `app` until `stop`. Signals stay with the main thread. port 0: any free one.

    Raises: UserError when the address cannot be had, before any thread is started.
    """
    listener = _listen(host, port)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(STOP_SECONDS),
    )
    server = uvicorn.Server(config)
    loops: list[asyncio.AbstractEventLoop] = []
    begun = threading.Event()

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        begun.set()
        await server.serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="skyrl-http", daemon=True)
    thread.start()
    if not begun.wait(START_SECONDS):
        raise RuntimeError("the HTTP thread did not start")

    def close() -> None:
        if thread.is_alive() and not loops[0].is_closed():
            try:
                loops[0].call_soon_threadsafe(app.state.door.close)
            except RuntimeError:  # it ended between the two lines
                return

    return Serving(host, listener.getsockname()[1], server, thread, close)


def _listen(host: str, port: int) -> socket.socket:
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
            f"service.host={host} service.port={port}: {error.strerror or error}; give another address or port (0 = "
            "any free one)"
        ) from error
    return listener
