"""The part of the server that needs no model, on rank 0: HTTP, where requests wait, and what is on record.

Imports without torch, and opens first. So after a restart sessions, heartbeats, results on record and checkpoints are
answered within a second or two, however long the weights take to load; requests for the model wait in the scheduler.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from skyrl.config.schema import RunConfig
from skyrl.distributed.env import rank, world_size
from skyrl.feedback.door import FeedbackDoor
from skyrl.feedback.queue import FeedbackQueue
from skyrl.service.app import AppState, http_error
from skyrl.service.messages import ServerInfo
from skyrl.service.openai import openai_routes
from skyrl.service.routes_checkpoints import checkpoint_routes
from skyrl.service.routes_session import session_routes
from skyrl.service.routes_work import work_routes
from skyrl.service.scheduler import RequestScheduler
from skyrl.service.storage.checkpoints import CheckpointService
from skyrl.text.chat import Chat
from skyrl.web.auth import Keys, read_keys
from skyrl.web.http import HttpError, HttpServer, error_reply, serve_in_thread

HOLD_SECONDS = 0.2  # see RequestScheduler
TINY_NAMES = ("tiny", "skyrl/tiny")


@dataclass(kw_only=True)
class Frontend:
    """What answers clients. `chat` is set once the model is loaded, and `info` is complete then."""

    cfg: RunConfig
    keys: Keys
    info: ServerInfo
    scheduler: RequestScheduler
    checkpoints: CheckpointService
    feedback: FeedbackQueue | None  # with feedback.enabled
    chat: Future[Chat] = field(default_factory=Future)

    def close(self) -> None:
        """Waits for saves under way and lets go of the service folder, and of the queue of feedback."""
        self.checkpoints.close()
        if self.feedback is not None:
            self.feedback.close()


class Door(NamedTuple):
    """A frontend that clients can reach."""

    frontend: Frontend
    server: HttpServer

    def close(self) -> None:
        self.server.stop()
        self.frontend.close()


def open_frontend(cfg: RunConfig) -> Frontend:
    """A frontend without a door. Raises UserError for keys, a folder or a queue that cannot be used."""
    keys, feedback, folder = read_keys(cfg.service), cfg.feedback, Path(cfg.service.folder)
    queue_folder = Path(feedback.folder or f"{cfg.service.folder}/feedback")
    queue = FeedbackQueue(queue_folder, feedback) if feedback.enabled else None
    checkpoints = CheckpointService(folder.absolute(), session_timeout=cfg.service.model_idle_seconds)
    scheduler = RequestScheduler(
        gap_seconds=cfg.service.gap_seconds,
        max_queued_samples=cfg.service.max_queued_samples,
        by_session=not keys.required,
        hold_seconds=HOLD_SECONDS,
        futures=checkpoints.futures,
        explain_lost=checkpoints.explain_lost,
    )
    aliases, tokenizer_id = dict.fromkeys(names(cfg), Path(cfg.model.path)), cfg.service.tokenizer_id
    if not tokenizer_id and cfg.model.path == "tiny":
        # Clients on this machine load the tokenizer from here, under this very name when they ask for nothing else.
        tokenizer_id = str(folder.absolute() / "tokenizer")
        aliases[tokenizer_id] = Path(cfg.model.path)
    info = ServerInfo(
        aliases=aliases,
        model_path=cfg.model.path,
        tokenizer_id=tokenizer_id or cfg.model.tokenizer or cfg.model.path,
        full_parameters=cfg.service.full_parameters,
    )
    return Frontend(cfg=cfg, keys=keys, info=info, scheduler=scheduler, checkpoints=checkpoints, feedback=queue)


def names(cfg: RunConfig) -> list[str]:
    """Every name that clients may ask for: the configured ones, and the path itself with its last two parts."""
    found = list(cfg.service.aliases)
    if cfg.model.path == "tiny":
        found += TINY_NAMES
    else:
        parts = Path(cfg.model.path).parts
        found += [cfg.model.path, parts[-1], "/".join(parts[-2:])]
    return list(dict.fromkeys(found))


def open_door(cfg: RunConfig) -> Future[Door]:
    """Rank 0's door, open before torch is imported; on other ranks a future that nobody sets.

    Raises UserError when it cannot be opened and there is one rank; with several the future holds the error, for all of
    them to raise it together.
    """
    door: Future[Door] = Future()
    if rank() != 0:
        return door
    try:
        frontend = open_frontend(cfg)
        try:
            door.set_result(Door(frontend, start_http_server(frontend)))
        except BaseException:
            frontend.close()
            raise
    except Exception as error:
        if world_size() == 1:
            raise
        door.set_exception(error)
    return door


def start_http_server(frontend: Frontend, keys: Keys | None = None, *, weights: str = "") -> HttpServer:
    """Serves HTTP for `frontend` on service.host and service.port, in a thread of its own. `weights`: the name of the
    model that is trained here and sampled; "" = the Tinker server. Raises UserError for an address that cannot be
    used."""
    settings, keys = frontend.cfg.service, keys or frontend.keys
    state = AppState(frontend.scheduler, frontend.checkpoints, frontend.info, settings, keys, chat=frontend.chat)
    if frontend.feedback is not None:
        state.feedback = FeedbackDoor(frontend.feedback, keys, state.signer, weights=weights)
    return serve_in_thread(make_app(state), settings.host, settings.port, close=state.close, options="service")


def make_app(state: AppState) -> Starlette:
    """Every endpoint of the protocol in one application; with feedback for a model that is trained here
    (`state.feedback.weights`) only those that sample it."""
    # Routes are tried one after the other: what is asked most comes first.
    door = state.feedback
    routes = [*openai_routes(state), *(door.routes() if door is not None else ())]
    if door is None or not door.weights:
        routes = [*work_routes(state), *session_routes(state), *checkpoint_routes(state), *routes]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _error, Exception: _error})
    app.router.redirect_slashes = False
    return app


async def _error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        told = f"{request.method} {request.url.path[:200]}: no such endpoint"
        error = HttpError(error.status_code, told if error.status_code == 404 else str(error.detail), error.headers)
    return error_reply(http_error(request, error))
