"""The service inside this very program: opened once on all ranks, worked by a thread of rank 0, ended together.

A script under torchrun runs on every rank. On rank 0 `open_job` returns; on every other rank it works for rank 0 until
the job is closed, and then leaves the process (SystemExit 0). What fails on any rank ends all of them.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import re
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlencode

from skyrl.config.load import load_config
from skyrl.config.schema import RunConfig
from skyrl.distributed.env import rank
from skyrl.main import end_now
from skyrl.service.messages import Request, RequestOutcome, SamplingRequest, TooManyRequests
from skyrl.tinker.futures import APIFuture, RequestFailedError, status_error
from skyrl.types import UserError
from skyrl.web.auth import LOCAL_OWNER, Keys

if TYPE_CHECKING:  # it needs torch, which only an open job does
    from skyrl.service.server import Service

OPTIONS_ENVIRONMENT = "SKYRL_SERVE_OPTIONS"
BUSY_SECONDS = 0.2
API = "/api/v1/"
CLOSED = "the ServiceClient is closed"


def serve_config(options: Mapping[str, Any]) -> RunConfig:
    """The server's options: those of SKYRL_SERVE_OPTIONS, written as on the command line, then `options`, nested
    (model={"path": "x"}) or by path ({"model.path": "x"}). Raises UserError."""
    overrides = [*shlex.split(os.environ.get(OPTIONS_ENVIRONMENT, "")), *_overrides(options)]
    cfg = load_config(overrides, mode="serve")
    # The client is in this process: its silence means that it computes, not that it is gone.
    return replace(cfg, service=replace(cfg.service, model_idle_seconds=0.0))


def _overrides(options: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in options.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and path != "service.aliases":
            found += _overrides(value, f"{path}.")
        else:
            found.append(f"{path}={_text(value)}")
    return found


def _text(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_text(k)}:{_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(map(_text, value)) + "]"
    text = str(value)
    if isinstance(value, (int, float)) or re.fullmatch(r"[A-Za-z0-9_./-]+", text):
        return text
    return "'" + text.replace("'", "\\'") + "'"


class Job:
    """Rank 0's side of the open service. `users`: clients that are not closed yet."""

    def __init__(self, service: Service) -> None:
        from skyrl.service.app import make_app

        self.service = service
        self.owner = LOCAL_OWNER
        self.users = 0
        self._app = make_app(
            service.scheduler,
            service.checkpoints,
            service.facts,
            service.cfg.service,
            keys=Keys({}),
        )
        self._loop = asyncio.new_event_loop()
        self._open: set[Future[Any]] = set()
        self._closing = False
        self._worker = threading.Thread(target=self._work, name="skyrl-worker", daemon=True)
        self._calls = threading.Thread(target=self._loop.run_forever, name="skyrl-tinker", daemon=True)
        self._worker.start()
        self._calls.start()

    def _work(self) -> None:
        try:
            device = self.service.world.device
            if device.type == "cuda":  # each thread has a current device of its own
                import torch

                torch.cuda.set_device(device)
            self.service.worker.run()
        except BaseException as error:  # the main thread may wait for a result that never comes
            end_now(error, "serve")

    # ---- work of models, and samples: straight to the desk ---------------------------------------------------------

    def submit(self, request: Request, convert: Callable[[Any, tuple[str, ...]], Any]) -> APIFuture[Any]:
        """The future of a request; `convert(result, sequence_ids)` makes what it holds. Samples for which there is no
        room now are offered again until there is."""
        out: Future[Any] = Future()
        out.set_running_or_notify_cancel()  # nobody cancels it under the worker's hands
        self._open.add(out)
        out.add_done_callback(self._open.discard)
        accepted: list[str] = []
        self._offer(request, out, convert, accepted)
        if not isinstance(request, SamplingRequest):
            return APIFuture(out)
        return APIFuture(out, cancel=lambda: self._cancel(accepted))

    def _offer(self, request: Request, out: Future[Any], convert: Callable[..., Any], accepted: list[str]) -> None:
        desk = self.service.scheduler
        try:
            got = desk.submit(request, owner=self.owner)
        except TooManyRequests:
            if self._closing:
                out.set_exception(RuntimeError(CLOSED))
                return
            again = (BUSY_SECONDS, self._offer, request, out, convert, accepted)
            self._loop.call_soon_threadsafe(self._loop.call_later, *again)
            return
        except UserError as error:
            out.set_exception(status_error(400, str(error)))
            return
        accepted.append(got.request_id)

        def settled() -> None:
            try:
                out.set_result(
                    convert(_result(desk.outcome(got.request_id, owner=self.owner), got.request_id), got.sequence_ids)
                )
            except Exception as error:  # it belongs to who waits, and not to the worker's thread, which calls this
                out.set_exception(error)

        desk.when_done(got.request_id, settled)

    def _cancel(self, accepted: list[str]) -> None:
        for request_id in accepted:
            self.service.scheduler.cancel(request_id, owner=self.owner)

    # ---- everything about records: the door's own endpoints, called without a connection ---------------------------

    def call(self, method: str, path: str, body: Any = None, **query: Any) -> APIFuture[Any]:
        """The JSON answer of an endpoint, such as ("GET", "training_runs"). Raises APIStatusError through the
        future. Parts of `path` that clients choose have to go through `part`."""
        if self._closing:
            raise RuntimeError(CLOSED)
        return APIFuture(asyncio.run_coroutine_threadsafe(self._answer(method, path, body, query), self._loop))

    async def _answer(self, method: str, path: str, body: Any, query: Mapping[str, Any]) -> Any:
        content = b"" if body is None else json.dumps(body).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": method,
            "path": unquote(API + path),
            "raw_path": (API + path).encode(),
            "root_path": "",
            "query_string": urlencode({key: value for key, value in query.items() if value is not None}).encode(),
            "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())],
            "client": None,
            "server": ("localhost", 80),
        }
        parts: list[bytes] = []
        status = [500]

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": content, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            else:
                parts.append(message.get("body", b""))

        try:
            await self._app(scope, receive, send)
        except Exception as error:  # the application has answered 500 and told the traceback
            raise status_error(500, f"{type(error).__name__}: {error}") from error
        answer = json.loads(b"".join(parts) or b"null")
        if status[0] >= 400:
            raise status_error(status[0], str(answer.get("detail", answer)))
        return answer

    # ---- the end ---------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Waits for everything that was submitted."""
        while self._open:
            for one in list(self._open):
                one.exception()

    def close(self) -> None:
        """Ends the service on all ranks, after the work in hand and all saves."""
        self._closing = True
        self.service.worker.stop(CLOSED)
        self.service.scheduler.close(CLOSED)  # wakes the worker
        self._worker.join()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._calls.join()
        self._loop.close()
        self.service.close()
        _leave_group()


def part(text: str) -> str:
    """A part of a path, whatever it is made of."""
    return quote(text, safe="")


def _result(outcome: RequestOutcome, request_id: str) -> Any:
    if outcome.state == "done":
        return outcome.result
    raise RequestFailedError(outcome.error or "thrown away", request_id=request_id, category=outcome.category)


_job: Job | None = None
_lock = threading.Lock()
_ended = False  # on several ranks: the others are gone


def open_job(options: Mapping[str, Any]) -> Job:
    """The job of this process, opened if it is not; one more user. On ranks but 0 it never returns.

    Raises UserError: for options that cannot be, for options of a job that is open already, for a second job on
    several ranks, and outside of the main thread on several ranks.
    """
    global _job
    with _lock:
        if _job is not None and options:
            raise UserError(
                "ServiceClient: the service of this process is open, and options come too late; give them to the first "
                "client"
            )
        if _job is None:
            _job = _open(serve_config(options))
        _job.users += 1
        return _job


def current_job() -> Job:
    """The open job. Raises UserError when there is none."""
    if _job is None:
        raise UserError("no service is open in this process; make a skyrl.tinker.ServiceClient first, and keep it")
    return _job


def release_job(job: Job) -> None:
    """One user less; the last one ends the service on all ranks."""
    global _job, _ended
    with _lock:
        job.users -= 1
        if job.users or job is not _job:
            return
        _job, _ended = None, job.service.world.size > 1
        job.close()


def _open(cfg: RunConfig) -> Job:
    from skyrl.service.server import open_service

    if cfg.dry_run:
        raise UserError("dry_run=true: for the command line, python -m skyrl.serve")
    if _ended:
        raise UserError("ServiceClient: the other ranks left when the first service was closed; keep one client open")
    try:
        service = open_service(cfg)
    except BaseException as error:
        if rank() != 0:
            end_now(error, "serve")
        _leave_group(failed=True)
        raise
    if service is None:
        _leave_group()
        raise SystemExit(0)
    atexit.register(_at_exit)
    return Job(service)


def _leave_group(*, failed: bool = False) -> None:
    from skyrl.distributed.init import shutdown

    shutdown(failed=failed)


def _at_exit() -> None:
    """A script that ends, well or not, without closing its clients: the other ranks must not wait for it."""
    global _job
    job, _job = _job, None
    if job is not None:
        job.close()
