"""The server on one rank: `serve` for the command line, `open_service` for whoever brings its own door.

Rank 0 has the frontend and the worker, every other rank follows. One front door per job: a training run and a server
are two commands.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from skyrl.config.schema import RunConfig
from skyrl.distributed import failure
from skyrl.distributed.collectives import agree, on_leader
from skyrl.distributed.compare import compare_nodes
from skyrl.distributed.init import World, store_of_machines
from skyrl.engine import Engine, ModelSpec, meet
from skyrl.files import write_folder_atomic
from skyrl.models.lora import adapted
from skyrl.planner.plan import Plan, describe_ranks, make_plan, max_row_tokens
from skyrl.service.commands import BASE, Leader, RankContext, serve_commands
from skyrl.service.frontend import Door, Frontend, open_frontend
from skyrl.service.storage.records import StorageError
from skyrl.service.worker import Worker
from skyrl.types import LoraSpec
from skyrl.web.beside import dashboard_beside

log = logging.getLogger("skyrl.service")

CPU_TOKENS = 512  # of a micro-batch on a CPU: 2,048 are hardly faster, and others sample between two of them


@dataclass(kw_only=True)
class Service(Frontend):
    """Rank 0's frontend with its model. `worker.run()` works until `worker.stop(why)`."""

    world: World
    engine: Engine
    worker: Worker
    ranks: str  # how many, on which device, with which strategy and dtype


def open_service(cfg: RunConfig, frontend: Callable[[], Frontend] | None = None) -> Service | None:
    """Rank 0's Service over `frontend()`, by default a new one; None on every other rank, after it has followed to the
    end.

    Everything that can be refused is refused here. Raises UserError, the same on every rank.
    """
    world, sizes = meet(cfg)
    if world.device.type == "cpu":
        tokens = min(cfg.batch.max_tokens_per_microbatch, CPU_TOKENS)
        cfg = replace(cfg, batch=replace(cfg.batch, max_tokens_per_microbatch=tokens))
    if world.size > 1:
        compare_nodes(cfg, world, {})
    opened = list[Frontend]()
    if frontend is not None:  # an address or a folder in use is told before any weights are loaded
        on_leader(world, lambda: opened.append(frontend()))

    def make() -> tuple[Plan, RankContext]:
        plan, longest = make_plan(cfg, world.size, device=world.choice), max_row_tokens(cfg, sizes)
        engine = Engine(cfg, world, dtype=plan.dtype, strategy=plan.strategy, max_row_tokens=longest)
        return plan, RankContext(engine, score_tokens=cfg.batch.max_tokens_per_microbatch)

    plan, context = agree(world, make)
    context.engine.create(BASE, ModelSpec(trainable=False))
    if not world.is_leader:
        # The leader ends the job, after the work in hand. Heard before it says that it serves: a stop may come at once.
        failure.leave_signals_to_leader(store_of_machines("signals"))
        on_leader(world, lambda: None)
        context.engine.pause = partial(serve_commands, world, context)
        context.engine.pause()
        return None
    made: list[Service] = []

    def make_service() -> None:
        base = opened[0] if opened else open_frontend(cfg)
        made.append(lead(replace(base, cfg=cfg), context, describe_ranks(plan, world.choice.name)))

    on_leader(world, make_service)
    context.engine.pause = made[0].worker.pause
    return made[0]


def lead(frontend: Frontend, context: RankContext, ranks: str) -> Service:
    """Rank 0's Service over an engine that is open. `ranks` says what it runs on. Raises UserError when the tokenizer
    of the tiny model cannot be written."""
    engine, cfg, info = context.engine, frontend.cfg, frontend.info
    module = engine.models[context.model].whole.strategy.module
    tokenizer = Path(cfg.service.folder).absolute() / "tokenizer"
    if str(tokenizer) in info.aliases:
        _write_tokenizer(engine, tokenizer)
    info.arch = str(module.config.model_type)
    info.max_context, info.vocab_size = engine.max_row_tokens, module.vocab_size
    info.eos_token_ids = tuple(sorted(engine.chat.end_tokens))
    info.adaptable = not info.full_parameters and bool(adapted(module, LoraSpec(rank=1, mlp=False)))
    leader = Leader(engine.world, context, timeout_seconds=cfg.run.collective_timeout_seconds)
    mix = cfg.service.mix_tenants == "always"
    worker = Worker(cfg, leader, frontend.scheduler, frontend.checkpoints, info, mix=mix)
    frontend.chat.set_result(engine.chat)
    return Service(**vars(frontend), world=engine.world, engine=engine, worker=worker, ranks=ranks)


def _write_tokenizer(engine: Engine, folder: Path) -> None:
    """Its files, whole. On a full disk those of an earlier start stay."""
    try:
        with write_folder_atomic(folder) as part:
            engine.tokenizer.save_pretrained(part)
    except Exception as error:  # the tokenizers package has no error of its own for the disk
        if not folder.is_dir():
            raise StorageError(f"{folder}: cannot be written ({error}); free space there") from error
        log.warning("%s: stays as it is: %s", folder, error)


def serve(cfg: RunConfig, door: Future[Door]) -> None:
    """Serves behind rank 0's open door until SIGINT or SIGTERM; then finishes the work in hand and the saves, and
    returns."""
    try:
        if (service := open_service(cfg, lambda: door.result().frontend)) is None:
            return
        server = door.result().server
        service.worker.check = server.check
        failure.signals_stop(lambda: service.worker.stop("the server stops"), store_of_machines("signals"))
        print(
            f"skyrl: serving {cfg.model.path} on {service.ranks} at {server.url}\n"
            f"skyrl: clients: TINKER_BASE_URL={server.url} TINKER_API_KEY=tml-"
            f"{'<your key>' if service.keys.required else 'any'}; models: {', '.join(service.info.aliases)}\n"
            f"skyrl: turns end with {service.engine.chat.describe_ends()}",
            *(f"skyrl: warning: {line}" for line in (*service.world.choice.notes, *service.engine.chat.warnings())),
            sep="\n",
            file=sys.stderr,
            flush=True,
        )
        with dashboard_beside(cfg.dashboard, Path("runs")):
            service.worker.run()
    finally:
        if door.done() and door.exception() is None:
            door.result().close()
