"""The server on one rank: `serve` for the command line, `open_service` for whoever brings its own door.

Rank 0 has the doors, the scheduler, the checkpoint service and the worker; every other rank follows. One front door per
job: a training run and a server are two commands.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from skyrl.config.schema import RunConfig
from skyrl.distributed import failure
from skyrl.distributed.collectives import agree, on_leader
from skyrl.distributed.compare import compare_nodes
from skyrl.distributed.init import World, store_of_machines
from skyrl.engine import Engine, ModelSpec, meet
from skyrl.feedback.door import FeedbackDoor
from skyrl.feedback.queue import FeedbackQueue
from skyrl.files import write_folder_atomic
from skyrl.models.lora import adapted
from skyrl.planner.plan import Plan, describe_ranks, make_plan, max_row_tokens
from skyrl.service.app import AppState, http_error
from skyrl.service.commands import BASE, Leader, RankContext, serve_commands
from skyrl.service.messages import ServerInfo
from skyrl.service.openai import openai_routes
from skyrl.service.routes_checkpoints import checkpoint_routes
from skyrl.service.routes_session import session_routes
from skyrl.service.routes_work import work_routes
from skyrl.service.scheduler import RequestScheduler
from skyrl.service.storage.checkpoints import CheckpointService
from skyrl.service.storage.records import StorageError
from skyrl.service.worker import Worker
from skyrl.text.chat import Chat
from skyrl.types import LoraSpec, UserError
from skyrl.web.auth import Keys, read_keys
from skyrl.web.beside import dashboard_beside
from skyrl.web.http import HttpError, HttpServer, error_reply, serve_in_thread

log = logging.getLogger("skyrl.service")

HOLD_SECONDS = 0.2  # see RequestScheduler
CPU_TOKENS = 512  # of a micro-batch on a CPU: 2,048 are hardly faster, and others sample between two of them
TINY_NAMES = ("tiny", "skyrl/tiny")


@dataclass
class Service:
    """Rank 0's side of an open server. `worker.run()` works until `worker.stop(why)`."""

    cfg: RunConfig
    world: World
    engine: Engine
    scheduler: RequestScheduler
    checkpoints: CheckpointService
    worker: Worker
    info: ServerInfo
    ranks: str  # how many, on which device, with which strategy and dtype
    feedback: FeedbackQueue | None = None  # with feedback.enabled

    def close(self) -> None:
        """Waits for saves under way and lets go of the service folder, and of the queue of feedback."""
        self.checkpoints.close()
        if self.feedback is not None:
            self.feedback.close()


def open_service(cfg: RunConfig) -> Service | None:
    """Rank 0's Service, ready for doors; None on every other rank, after it has followed to the end.

    Everything that can be refused is refused here. Raises UserError, the same on every rank.
    """
    world, sizes = meet(cfg)
    if world.device.type == "cpu":
        tokens = min(cfg.batch.max_tokens_per_microbatch, CPU_TOKENS)
        cfg = replace(cfg, batch=replace(cfg.batch, max_tokens_per_microbatch=tokens))
    if world.size > 1:
        compare_nodes(cfg, world, {})

    def make() -> tuple[Plan, RankContext]:
        plan, longest = make_plan(cfg, world.size, device=world.choice), max_row_tokens(cfg, sizes)
        engine = Engine(cfg, world, dtype=plan.dtype, strategy=plan.strategy, max_row_tokens=longest)
        return plan, RankContext(engine, score_tokens=cfg.batch.max_tokens_per_microbatch)

    plan, context = agree(world, make)
    context.engine.create(BASE, ModelSpec(trainable=False))
    if not world.is_leader:
        on_leader(world, lambda: None)
        # The leader ends the job, after the work in hand.
        failure.leave_signals_to_leader(store_of_machines("signals"))
        context.engine.pause = partial(serve_commands, world, context)
        context.engine.pause()
        return None
    made: list[Service] = []
    on_leader(world, lambda: made.append(lead(cfg, context, describe_ranks(plan, world.choice.name))))
    context.engine.pause = made[0].worker.pause
    return made[0]


def lead(cfg: RunConfig, context: RankContext, ranks: str) -> Service:
    """Rank 0's Service over an engine that is open. `ranks` says what it runs on. Raises UserError for keys, a folder
    or a queue that cannot be used."""
    world, keys, feedback = context.engine.world, read_keys(cfg.service), cfg.feedback
    folder = Path(feedback.folder or f"{cfg.service.folder}/feedback")
    queue = FeedbackQueue(folder, feedback) if feedback.enabled else None
    checkpoints, info = _open_checkpoints(cfg, context)
    scheduler = RequestScheduler(
        gap_seconds=cfg.service.gap_seconds,
        max_queued_samples=cfg.service.max_queued_samples,
        by_session=not keys.required,
        hold_seconds=HOLD_SECONDS,
        futures=checkpoints.futures,
        explain_lost=checkpoints.explain_lost,
    )
    leader = Leader(world, context, timeout_seconds=cfg.run.collective_timeout_seconds)
    mix = cfg.service.mix_tenants == "always"
    worker = Worker(cfg, leader, scheduler, checkpoints, info, mix=mix)
    return Service(cfg, world, context.engine, scheduler, checkpoints, worker, info, ranks, queue)


def _open_checkpoints(cfg: RunConfig, context: RankContext) -> tuple[CheckpointService, ServerInfo]:
    engine = context.engine
    folder = Path(cfg.service.folder).absolute()
    checkpoints = CheckpointService(folder, session_timeout=cfg.service.model_idle_seconds)
    tokenizer_id = cfg.service.tokenizer_id
    aliases = dict.fromkeys(names(cfg), Path(cfg.model.path))
    if not tokenizer_id and cfg.model.path == "tiny":
        # Clients on this machine load the tokenizer from here, under this very name when they ask for nothing else.
        tokenizer_id = str(folder / "tokenizer")
        _write_tokenizer(engine, folder / "tokenizer")
        aliases[tokenizer_id] = Path(cfg.model.path)
    module = engine.models[context.model].whole.strategy.module
    info = ServerInfo(
        aliases=aliases,
        model_path=cfg.model.path,
        tokenizer_id=tokenizer_id or cfg.model.tokenizer or cfg.model.path,
        arch=str(module.config.model_type),
        max_context=engine.max_row_tokens,
        vocab_size=module.vocab_size,
        eos_token_ids=tuple(sorted(engine.chat.end_tokens)),
        adaptable=not cfg.service.full_parameters and bool(adapted(module, LoraSpec(rank=1, mlp=False))),
        full_parameters=cfg.service.full_parameters,
    )
    return checkpoints, info


def _write_tokenizer(engine: Engine, folder: Path) -> None:
    """Its files, whole. On a full disk those of an earlier start stay."""
    try:
        with write_folder_atomic(folder) as part:
            engine.tokenizer.save_pretrained(part)
    except Exception as error:  # the tokenizers package has no error of its own for the disk
        if not folder.is_dir():
            raise StorageError(f"{folder}: cannot be written ({error}); free space there") from error
        log.warning("%s: stays as it is: %s", folder, error)


def names(cfg: RunConfig) -> list[str]:
    """Every name that clients may ask for: the configured ones, and the path itself with its last two parts."""
    found = list(cfg.service.aliases)
    if cfg.model.path == "tiny":
        found += TINY_NAMES
    else:
        parts = Path(cfg.model.path).parts
        found += [cfg.model.path, parts[-1], "/".join(parts[-2:])]
    return list(dict.fromkeys(found))


def make_app(state: AppState, chat: Chat | None = None) -> Starlette:
    """Every endpoint of the protocol in one application; with feedback for a model that is trained here
    (`state.feedback.weights`) only those that sample it. `chat`: for /v1/completions and the like; without it those are
    refused by name."""
    # Routes are tried one after the other: what is asked most comes first.
    door = state.feedback
    routes = [*openai_routes(state, chat), *(door.routes() if door is not None else ())]
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


def start_http_server(service: Service, keys: Keys | None = None, *, weights: str = "") -> HttpServer:
    """Serves HTTP for `service` on service.host and service.port, in a thread of its own. `weights`: the name of the
    model that is trained here and sampled; "" = the Tinker server. Raises UserError for an address or keys that cannot
    be used."""
    settings = service.cfg.service
    keys = read_keys(settings) if keys is None else keys
    state = AppState(service.scheduler, service.checkpoints, service.info, settings, keys)
    if service.feedback is not None:
        state.feedback = FeedbackDoor(service.feedback, keys, state.signer, weights=weights)
    app = make_app(state, service.engine.chat)
    return serve_in_thread(app, settings.host, settings.port, close=state.close, options="service")


def serve(cfg: RunConfig) -> None:
    """Serves until SIGINT or SIGTERM; then finishes the work in hand and the saves, and returns."""
    service = open_service(cfg)
    if service is None:
        return
    try:
        keys = read_keys(cfg.service)
        server = start_http_server(service, keys)
    except UserError:
        service.worker.leader.stop()
        service.close()
        raise
    service.worker.check = server.check
    failure.signals_stop(lambda: service.worker.stop("the server stops"), store_of_machines("signals"))
    try:
        print(
            f"skyrl: serving {cfg.model.path} on {service.ranks} at {server.url}\n"
            f"skyrl: clients: TINKER_BASE_URL={server.url} TINKER_API_KEY=tml-"
            f"{'<your key>' if keys.required else 'any'}; models: {', '.join(service.info.aliases)}\n"
            f"skyrl: turns end with {service.engine.chat.describe_ends()}",
            *(f"skyrl: warning: {line}" for line in (*service.world.choice.notes, *service.engine.chat.warnings())),
            sep="\n",
            file=sys.stderr,
            flush=True,
        )
        with dashboard_beside(cfg.dashboard, Path("runs")):
            service.worker.run()
    finally:
        server.stop()
        service.close()
