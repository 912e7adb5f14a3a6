"""What every page of the dashboard shares: addresses, templates, errors, live events.

Handlers that are plain functions run in threads, so the event loop never waits for a disk. Nothing here writes into a
run, and no page has a script or a style of its own: the content policy refuses them.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote, urlencode

import anyio
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from skyrl.config.schema import DashboardConfig
from skyrl.dashboard.index import RunEntry, RunIndex
from skyrl.dashboard.render import make_templates
from skyrl.types import UserError
from skyrl.web.http import HttpError, error_reply

EVENT_SECONDS = 1.0
SILENT_SECONDS = 15.0  # after which a proxy may close a stream on which nothing comes
MAX_STREAMS = 256
WORDS = {404: "Not found", 400: "This cannot be shown", 403: "Not for you"}


class _Events(StreamingResponse):
    """A live page's events, which the dashboard counts until the page is left, also before the first of them."""

    def __init__(self, board: Dashboard, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self.board = board

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.board.streams -= 1


class Dashboard:
    """What the handlers share. `auth` lets in (skyrl.dashboard.auth); `index` is started and closed by the caller."""

    def __init__(self, settings: DashboardConfig, auth: Any, index: RunIndex) -> None:
        self.prefix, self.auth, self.index = settings.path_prefix, auth, index
        self.closing, self.streams = False, 0
        self._templates = make_templates(self.prefix)
        self._templates.globals["url"] = self.url

    def url(self, *parts: Any, **query: Any) -> str:
        """An address of this dashboard; what is None or "" is left out of the query."""
        path = "/".join(quote(str(part), safe="", errors="surrogateescape") for part in parts)
        kept = {key: value for key, value in query.items() if value not in (None, "")}
        return f"{self.prefix}/{path}" + (f"?{urlencode(kept, doseq=True, errors='replace')}" if kept else "")

    def page(self, request: Request, template: str, status: int = 200, **values: Any) -> Response:
        """A template as an answer."""
        viewer = request.state.viewer
        csrf = self.auth.csrf_token(request) if viewer is not None else ""
        text = self._templates.get_template(template).render(
            viewer=viewer, csrf=csrf, unread=self.index.unread, **values
        )
        return Response(text.encode("utf-8", "replace"), status, media_type="text/html")  # half a pair of UTF-16 too

    def entry(self, request: Request) -> RunEntry:
        """The run of the request's path. Raises HttpError."""
        return self.named(request, request.path_params["run"])

    def named(self, request: Request, name: str) -> RunEntry:
        """A run by its name, if this viewer may see it. Raises HttpError."""
        viewer = request.state.viewer
        if viewer.run not in (None, name):
            raise HttpError(403, f"you came by a link to the run {viewer.run}, which shows no other")
        if (entry := self.index.get(name)) is None:
            raise HttpError(404, f"there is no run {name[:200]!r} in this folder; it may have been moved or deleted")
        return entry

    async def refuse(self, request: Request, error: Exception) -> Response:
        """An error as a page for a person and as JSON for a program."""
        if isinstance(error, HTTPException):
            error = HttpError(error.status_code, "there is no such page" if error.status_code == 404 else error.detail)
        elif isinstance(error, UserError):
            error = HttpError(400, str(error))
        elif isinstance(error, OSError):
            error = HttpError(404, f"its files are not there any more, or cannot be read ({error.strerror})")
        assert isinstance(error, HttpError)
        if request.state.viewer is None:
            return self.auth.refuse(request, error)
        if "text/html" not in request.headers.get("accept", ""):
            return error_reply(error)
        title = WORDS.get(error.status, "Refused")
        return self.page(request, "error.html", error.status, title=title, reason=error.detail)

    async def events(self, request: Request) -> Response:
        """Server-sent events: one whenever the run of the path, or without one any run, has changed."""
        name = request.path_params.get("run")
        if name is not None:
            await anyio.to_thread.run_sync(self.entry, request)
        if self.streams >= MAX_STREAMS:
            raise HttpError(503, f"{MAX_STREAMS} pages are live already; this one can be loaded again by hand")

        self.streams += 1  # here, before anything is waited for: many may ask at once

        async def stream() -> AsyncIterator[str]:
            told, at = self.index.mark(name), time.monotonic()
            yield "retry: 5000\n\n"
            while not self.closing and await anyio.to_thread.run_sync(self.auth.is_logged_in, request):
                await anyio.sleep(EVENT_SECONDS)
                if (new := self.index.mark(name)) != told:
                    told, at = new, time.monotonic()
                    yield "event: changed\ndata: {}\n\n"
                elif time.monotonic() - at > SILENT_SECONDS:
                    at = time.monotonic()
                    yield ": still here\n\n"

        return _Events(self, stream())

    def close(self) -> None:
        """Ends the live pages, so that the server can."""
        self.closing = True
