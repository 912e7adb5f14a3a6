"""The dashboard as an application: which address is which page."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from skyrl.config.schema import DashboardConfig
from skyrl.dashboard import pages, rollouts, series
from skyrl.dashboard.board import Dashboard
from skyrl.dashboard.index import RunIndex
from skyrl.dashboard.render import HERE
from skyrl.types import UserError
from skyrl.web.http import HttpError


def create_app(settings: DashboardConfig, auth: Any, index: RunIndex) -> tuple[Starlette, Dashboard]:
    """(the application, what its `close` ends). `auth.middleware` stands before every route."""
    board = Dashboard(settings, auth, index)
    inner = [
        Route("/", pages.runs),
        Route("/compare", series.compare),
        Route("/compare/series", series.compare_series),
        Route("/events", board.events),
        Route("/runs/{run}", pages.run),
        Route("/runs/{run}/phases", pages.phases),
        Route("/runs/{run}/series", series.run_series),
        Route("/runs/{run}/events", board.events),
        Route("/runs/{run}/rollouts", rollouts.episodes),
        Route("/runs/{run}/rollouts/{dump}/{rank:int}/{start:int}", rollouts.episode),
        Route("/runs/{run}/pair", rollouts.pair),
        Route("/runs/{run}/checkpoints", pages.checkpoints),
        Route("/runs/{run}/config", pages.config),
        Route("/runs/{run}/logs", pages.logs),
        Route("/runs/{run}/logs/{file:path}", pages.log_file),
        *auth.routes,
        Mount("/static", StaticFiles(directory=HERE / "static"), name="static"),
    ]
    routes: list[Any] = [Mount(settings.path_prefix, routes=inner)] if settings.path_prefix else inner
    handlers: Any = dict.fromkeys((HttpError, UserError, HTTPException, OSError), board.refuse)
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.state.board = board
    app.add_middleware(auth.middleware)
    return app, board
