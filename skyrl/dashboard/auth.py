"""Who may see the dashboard: whatever comes in passes `Auth.middleware` first, and what is not let in ends there.

By default a link with a token logs in, once. With `dashboard.oidc_issuer` people sign in at their provider. Either
begins a session on this side, which a signed cookie names; logout forgets it, so a copied cookie is worth nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import os
import re
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from skyrl.config.access import dashboard_problems, is_loopback
from skyrl.config.schema_server import DashboardConfig
from skyrl.dashboard.oidc import SIGN_IN_SECONDS, OidcProvider, SignIn, SignInRefused
from skyrl.dashboard.render import make_templates
from skyrl.dashboard.shares import ShareLinks
from skyrl.files import disk_reason, user_folder
from skyrl.run_dir.reader import find_run
from skyrl.types import UserError
from skyrl.web.auth import Signer
from skyrl.web.http import FAULT, HttpError, error_reply, in_thread, log, log_fault, read_body

FORM_BYTES = 1 << 16
MOST = 10_000  # sessions, and sign-ins that have begun: strangers can begin them
AUDIT_BYTES = 64 << 20  # then the file becomes audit.jsonl.1, in the place of an older one
PRINT_SECONDS = 10.0  # between two links that somebody asks for
PUBLIC = ("/login", "/login/oidc", "/callback", "/share")  # their queries hold tokens, so no log has them
HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Not no-referrer: with it browsers send `Origin: null` with our own forms too, which are then as good as others'.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
T = TypeVar("T")


@dataclass(frozen=True)
class Viewer:
    """Who looks, as viewer or admin. `run`: the only run that a share link shows; None = all."""

    name: str
    role: str
    run: str | None = None


@dataclass(frozen=True)
class _Session:
    viewer: Viewer
    expires: float
    link: str = ""  # the share link that opened it


class Auth:
    """Lets in, turns away, and writes down who looked. `routes` belong below the prefix; `middleware` wraps the app."""

    def __init__(self, settings: DashboardConfig) -> None:
        """Raises UserError for what would let others in unasked, and for a state folder that cannot be written."""
        for problem in dashboard_problems(settings):
            raise UserError(problem)
        self._settings, self._prefix = settings, settings.path_prefix
        self.state = _state_folder(settings.runs)
        self._signer = Signer(_key(self.state))
        self.links = ShareLinks(self.state, self._signer)
        self._provider = OidcProvider(settings) if settings.oidc_issuer else None
        self._sessions: dict[str, _Session] = {}
        self._sign_ins: dict[str, SignIn] = {}
        self._token, self._url, self._into_log, self._printed = "", "", False, float("-inf")
        self._lock = threading.Lock()
        self._public = urlsplit(settings.public_url.lower())
        own = [] if is_loopback(settings.host) else [settings.host, socket.gethostname(), socket.getfqdn()]
        self._names = {name.lower() for name in own}
        # Browsers send a cookie to every port of a host: dashboards side by side must not overwrite each other's.
        name = hashlib.sha256(f"{self.state}\n{settings.port}".encode()).hexdigest()[:8]
        self._cookie, self._sign_in_cookie = f"skyrl_{name}", f"skyrl_login_{name}"
        self._templates = make_templates(self._prefix)
        self.routes = [
            Route("/login", self._login, methods=["GET", "POST"]),
            Route("/login/oidc", self._begin),
            Route("/callback", self._callback),
            Route("/logout", self._logout, methods=["POST"]),
            Route("/share", self._open_link),
            Route("/links", self._manage_links, methods=["GET", "POST"]),
        ]

    # ---- for the app

    def announce(self, url: str, *, into_log: bool = False) -> str:
        """The line that says where the dashboard is, with a link that logs in. `url`: where the server listens, without
        the prefix. `into_log`: others may read the line, so the link goes to a file that it names."""
        self._url, self._into_log = url, into_log
        home = (self._settings.public_url or url + self._prefix).rstrip("/")
        if self._provider is not None:
            return f"dashboard: {home}"
        with self._lock:
            self._token = self._token or secrets.token_urlsafe(32)
            link = f"{home}/login?token={self._token}"
        if not into_log:
            return f"dashboard: {link} (logs in once; {home}/login prints another here)"
        (path := self.state / "login-link").unlink(missing_ok=True)
        _write_private(path, os.O_EXCL, link + "\n")
        return f"dashboard: {home} (the link that logs in is in {path}, which you alone can read)"

    def csrf_token(self, request: Request) -> str:
        """What the hidden field `csrf` of every form that is posted must hold; "" without a session."""
        name = request.state.session
        return self._signer.token(f"csrf:{name}", seconds=int(self._settings.session_hours * 3600)) if name else ""

    def is_logged_in(self, request: Request) -> bool:
        """Whether the session of a request still lasts: a live page must not outlive it."""
        return self._session_of(request)[1] is not None

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """`app` behind the login. It finds request.state.viewer, and what a POST has brought in request.state.form."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                assert scope["type"] == "lifespan", "there are no websockets here"
                return await app(scope, receive, send)
            request, begun = Request(scope, receive), False

            async def answer(message: Message) -> None:
                nonlocal begun
                if message["type"] == "http.response.start":
                    begun = True
                    path = request.scope["path"].removeprefix(self._prefix)
                    _add_headers(message, static := path.startswith("/static/"))
                    if not static:
                        await self._audit(request, path, message["status"])
                await send(message)

            try:
                refusal = await self._check(request)
                await (refusal or app)(scope, receive, answer)
            except Exception as error:
                if begun:
                    raise
                if not isinstance(error, HttpError):
                    log_fault(request, error)
                    error = HttpError(500, FAULT)
                await self.refuse(request, error)(scope, receive, answer)

        return guarded

    def refuse(self, request: Request, error: HttpError) -> Response:
        """An error as a page for a person, as JSON for a program."""
        if "text/html" not in request.headers.get("accept", ""):
            return error_reply(error)
        return self._page(request, "refused.html", status=error.status, reason=error.detail)

    # ---- what is let in

    async def _check(self, request: Request) -> Response | None:
        """The answer to what is not let in, else None. Raises HttpError."""
        request.state.viewer, request.state.session, request.state.note = None, "", {}
        if not self._is_our_name(request.headers.get("host", "")):
            raise HttpError(400, "the dashboard is not known under that name; open it by the address that it printed")
        path = request.scope["path"].removeprefix(self._prefix) or "/"
        if ".." in path.split("/") or "\0" in path:
            raise HttpError(404, "there is no such page")
        name, session = await in_thread(self._session_of, request)
        viewer = request.state.viewer = session.viewer if session else None
        request.state.session = name
        public = path in PUBLIC or path.startswith("/static/")
        if viewer is None and not public:
            if request.method != "GET" or "text/html" not in request.headers.get("accept", ""):
                raise HttpError(401, "log in first: open the dashboard in a browser")
            target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            return RedirectResponse(f"{self._prefix}/login?{urlencode({'next': target})}", 303)
        if viewer is not None and viewer.run is not None and not public and path != "/logout":
            if not f"{path}/".startswith(f"/runs/{viewer.run}/"):
                raise HttpError(403, f"the link that you came by shows the run {viewer.run} alone")
        if request.method not in ("GET", "HEAD"):
            await self._read_form(request, needs_csrf=path != "/login")
        return None

    async def _read_form(self, request: Request, *, needs_csrf: bool) -> None:
        """Reads what is posted into request.state.form, and refuses what another site's page sent."""
        headers = request.headers
        origin = headers.get("origin", "").lower().partition("://")[2]
        ours = "origin" not in headers or origin and origin in (headers["host"].lower(), self._public.netloc)
        if not ours or headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise HttpError(403, "this was sent by a page of another site")
        body = await read_body(request, max_bytes=FORM_BYTES, limit="forms are small")
        try:
            given = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=100)
        except ValueError:
            raise HttpError(400, "these are more fields than any form here has") from None
        form = request.state.form = {name: values[-1] for name, values in given.items()}
        token = headers.get("x-csrf-token") or form.get("csrf", "")
        if needs_csrf and self._signer.token_owner(token) != f"csrf:{request.state.session}":
            raise HttpError(403, "this form is of an earlier session; go back, load the page again and repeat")

    def _is_our_name(self, header: str) -> bool:
        """Whether a Host header is ours. The page of a site whose name was made to point here (DNS rebinding) sends
        that name; and an address in digits cannot be made to point elsewhere."""
        match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:[0-9]{1,5})?", header.lower())
        host = match[1].strip("[]") if match else ""
        if host and (host == self._public.hostname or is_loopback(host)):
            return True
        try:
            return bool(self._names and ipaddress.ip_address(host))
        except ValueError:
            return host in self._names

    def _session_of(self, request: Request) -> tuple[str, _Session | None]:
        name = self._signed(request, self._cookie, "session")
        found = self._sessions.get(name)
        if found and (found.expires < time.time() or found.link and self.links.get(found.link) is None):
            self._sessions.pop(name, None)
            found = None
        return (name, found) if found else ("", None)

    def _signed(self, request: Request, cookie: str, kind: str) -> str:
        """What a cookie names, if its signature and kind are right; else ""."""
        found, _, name = (self._signer.token_owner(request.cookies.get(cookie, "")) or "").partition(":")
        return name if found == kind else ""

    def _begin_session(
        self, request: Request, viewer: Viewer, target: str, *, link: str = "", until: float = 1e12
    ) -> Any:
        """Goes on to `target` in a new session; the one before ends, so none that somebody set up can be used."""
        self._sessions.pop(request.state.session, None)
        end = min(time.time() + self._settings.session_hours * 3600, until)
        name, request.state.viewer = _keep(self._sessions, _Session(viewer, end, link)), viewer
        return self._with_cookie(RedirectResponse(target, 303), self._cookie, f"session:{name}", int(end - time.time()))

    def _with_cookie(self, answer: Response, name: str, value: str, seconds: int) -> Response:
        # Not samesite=strict: the provider's answer comes from another site, and a link in a chat is to work.
        answer.set_cookie(
            name,
            self._signer.token(value, seconds=seconds) if seconds else "",
            max_age=seconds,
            path=self._prefix or "/",
            secure=self._public.scheme == "https",
            httponly=True,
            samesite="lax",
        )
        return answer

    # ---- pages

    async def _login(self, request: Request) -> Response:
        target, form = self._target(request), getattr(request.state, "form", {})
        given = form.get("token", request.query_params.get("token"))
        if self._provider is None and form.get("print"):
            if time.monotonic() - self._printed < PRINT_SECONDS:
                raise HttpError(429, f"it was printed less than {PRINT_SECONDS:.0f} s ago; look there, or wait")
            self._printed, request.state.note = time.monotonic(), {"event": "login link printed"}
            print(await in_thread(self.announce, self._url, into_log=self._into_log), flush=True)
            return self._page(request, "login.html", said="A link was printed where the dashboard runs.", target=target)
        if self._provider is not None or given is None:
            return self._page(request, "login.html", target=target)
        if not self._spend(given.strip()):
            request.state.note = {"event": "login refused", "reason": "token"}
            said = "This link is wrong or was used: each logs in once."
            return self._page(request, "login.html", status=403, said=said, target=target)
        request.state.note = {"event": "login"}
        return self._begin_session(request, Viewer("local", "admin"), target)

    def _spend(self, given: str) -> bool:
        """Whether this is the token, which then is none any longer."""
        with self._lock:
            right = bool(self._token) and hmac.compare_digest(given.encode("utf-8", "replace"), self._token.encode())
            if right:
                self._token = ""
        return right

    def _target(self, request: Request) -> str:
        """The page to go to after the login: `next` if that is an address of this dashboard and no other."""
        given = request.query_params.get("next", "")
        inside = given.startswith(self._prefix + "/") and not given.startswith("//")
        return given if inside and not re.search(r"[\x00-\x20\\\x7f]", given) else self._prefix + "/"

    async def _begin(self, request: Request) -> Response:
        if self._provider is None:
            raise HttpError(404, "there is no such page")
        try:
            url, begun = await in_thread(self._provider.begin, self._target(request))
        except SignInRefused as error:
            return self._sign_in_refused(request, error)
        value = f"login:{_keep(self._sign_ins, begun)}"
        return self._with_cookie(RedirectResponse(url, 303), self._sign_in_cookie, value, SIGN_IN_SECONDS)

    async def _callback(self, request: Request) -> Response:
        # Forgotten whatever comes of it: an answer counts once, in the browser that asked.
        begun = self._sign_ins.pop(self._signed(request, self._sign_in_cookie, "login"), None)
        try:
            if begun is None or self._provider is None:
                raise SignInRefused(400, "This sign-in was not begun in this browser, or was used. Please begin again.")
            name, role, subject = await in_thread(self._provider.finish, dict(request.query_params), begun)
        except SignInRefused as error:
            return self._sign_in_refused(request, error)
        request.state.note = {"event": "login", "subject": subject}
        answer = self._begin_session(request, Viewer(name, role), begun.target)
        return self._with_cookie(answer, self._sign_in_cookie, "", 0)

    def _sign_in_refused(self, request: Request, error: SignInRefused) -> Response:
        request.state.note = {"event": "login refused", "reason": error.reason}
        return self._page(request, "login.html", status=error.status, said=error.reason)

    async def _logout(self, request: Request) -> Response:
        self._sessions.pop(request.state.session, None)
        request.state.note = {"event": "logout"}
        return self._with_cookie(RedirectResponse(f"{self._prefix}/login", 303), self._cookie, "", 0)

    async def _open_link(self, request: Request) -> Response:
        link = await in_thread(self.links.open, request.query_params.get("link", ""))
        if link is None:
            request.state.note = {"event": "share link refused"}
            raise HttpError(403, "this link was taken back or its time is over; ask whoever gave it to you for another")
        request.state.note, target = {"event": "share link", "link": link.id}, f"{self._prefix}/runs/{quote(link.run)}"
        if request.state.viewer is not None and request.state.viewer.run is None:
            return RedirectResponse(target, 303)  # who sees all runs keeps that
        viewer = Viewer(f"link {link.id}", "viewer", run=link.run)
        return self._begin_session(request, viewer, target, link=link.id, until=link.expires)

    async def _manage_links(self, request: Request) -> Response:
        if request.state.viewer.role != "admin":
            raise HttpError(403, "only an admin makes links")
        form, said, url, status = getattr(request.state, "form", {}), "", "", 200
        if name := form.get("revoke"):
            found = await in_thread(self.links.revoke, name)
            said = "The link opens nothing any longer." if found else "There is no such link."
            request.state.note = {"event": "share link revoked", "link": name[:32]}
        elif request.method == "POST":
            try:
                url = await in_thread(self._make_link, request, form.get("run", ""), form.get("hours", ""))
            except (ValueError, UserError) as error:
                said, status = f"{error}.", 400
        links = [
            (link, datetime.fromtimestamp(link.expires, timezone.utc)) for link in await in_thread(self.links.active)
        ]
        run = request.query_params.get("run", form.get("run", ""))
        return self._page(request, "links.html", status=status, said=said, url=url, links=links, run=run)

    def _make_link(self, request: Request, run: str, hours: str) -> str:
        if not re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,3})?", hours):
            raise ValueError("hours: give a number")
        if run != Path(run).name or run in ("", ".."):
            raise ValueError("run: give the name of a run of this dashboard")
        find_run(Path(self._settings.runs or "runs").absolute() / run, "links")
        link, token = self.links.make(run, float(hours), request.state.viewer.name)
        request.state.note = {"event": "share link made", "link": link.id, "run": run, "expires": link.expires}
        home = self._settings.public_url or f"{request.url.scheme}://{request.headers['host']}{self._prefix}"
        return f"{home.rstrip('/')}/share?link={token}"

    def _page(self, request: Request, template: str, *, status: int = 200, **values: Any) -> Response:
        always = {"csrf": self.csrf_token(request), "issuer": urlsplit(self._settings.oidc_issuer).netloc}
        values = {"said": "", "target": "", "status": status, **always, **values}
        text = self._templates.get_template(template).render(**values)
        return Response(text, status, media_type="text/html")

    # ---- the audit log

    async def _audit(self, request: Request, path: str, status: int) -> None:
        """One line of audit.jsonl before any answer goes out."""
        viewer = request.state.viewer
        line = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "viewer": viewer.name if viewer else None,
            "role": viewer.role if viewer else None,
            "address": request.client.host if request.client else None,
            "method": request.method,
            "path": path[:1000],
            "query": "" if path in PUBLIC else request.url.query[:1000],
            "status": status,
            **request.state.note,
        }
        try:
            await in_thread(self._append, json.dumps(line) + "\n")
        except OSError as error:
            log.error(
                "dashboard: %s: %s; a view is not in the audit log", self.state / "audit.jsonl", disk_reason(error)
            )

    def _append(self, line: str) -> None:
        path = self.state / "audit.jsonl"
        with self._lock:
            if path.exists() and path.stat().st_size > AUDIT_BYTES:
                os.replace(path, path.with_name("audit.jsonl.1"))
            _write_private(path, os.O_APPEND, line)


def _add_headers(message: Message, static: bool) -> None:
    """Strict headers, in place of the app's own. What is shown is kept nowhere; of `static` files the addresses change
    with their content, so browsers may keep them."""
    kept = [(name, value) for name, value in message["headers"] if name.decode().lower() not in HEADERS]
    kept.append((b"cache-control", b"private, max-age=86400" if static else b"no-store"))
    message["headers"] = kept + [(name.encode(), value.encode()) for name, value in HEADERS.items()]


def _keep(into: dict[str, T], value: T) -> str:
    """Keeps `value` under a new random name, which is returned; beyond MOST the oldest is dropped."""
    into[name := secrets.token_urlsafe(24)] = value
    while len(into) > MOST:
        into.pop(next(iter(into)), None)
    return name


def _state_folder(runs: str) -> Path:
    """Where the dashboard of one folder of runs keeps its own things, for its owner's eyes alone. Raises UserError."""
    digest = hashlib.sha256(os.path.realpath(runs or "runs").encode()).hexdigest()[:16]
    folder = user_folder("XDG_STATE_HOME", "~/.local/state") / "dashboard" / digest
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise UserError(
            f"dashboard: its state cannot be kept: {disk_reason(error)}; set XDG_STATE_HOME to a folder of yours"
        ) from None
    return folder


def _key(folder: Path) -> bytes:
    """The key of all signatures: made once, so that share links outlive a restart."""
    path = folder / "key"
    try:
        if not path.exists():
            _write_private(path, os.O_EXCL, secrets.token_hex(32))
        key = bytes.fromhex(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; delete it, which ends all share links") from None
    return key


def _write_private(path: Path, flag: int, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | flag, 0o600), "w", encoding="utf-8") as stream:
        stream.write(text)
