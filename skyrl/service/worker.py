"""Rank 0's main loop: takes work from the desk, checks it, turns it into commands, settles the futures.

Training and sampling alternate: after a training command sampling gets about as long a stretch, and the other way
round, so that neither starves. All refusals happen before a command is sent.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from skyrl.config.serve import ServeConfig
from skyrl.distributed.balance import spread
from skyrl.service.checkpoints import CheckpointService
from skyrl.service.commands import Train
from skyrl.service.leader import Leader
from skyrl.service.limits import check_width
from skyrl.service.messages import (
    CreateModel,
    LoadWeights,
    OptimStep,
    RequestFailed,
    SaveWeights,
    ServerInfo,
    TrainRequest,
    TrainResult,
    UnloadModel,
)
from skyrl.service.models import Tenant, Tenants
from skyrl.service.sampling import Sampling
from skyrl.service.scheduler import Job, RequestDesk
from skyrl.service.snapshots import Snapshots
from skyrl.service.validation import adam_params, alike, loss_spec, to_rows
from skyrl.types import Datum, UserError

log = logging.getLogger("skyrl.service")

IDLE_SECONDS = 1.0
TICK_SECONDS = 5.0
SILENT_SECONDS = 120.0  # clients beat every 10: after this a session gives way when there is no room for a new model
LONGEST_STRETCH = 2.0  # of sampling, after a training command that took long
TOKENS_PER_COMMAND = 65536  # training requests of several models join up to here


class Worker:
    """Drives the ranks for the desk. `run` returns after `stop`."""

    def __init__(
        self,
        cfg: ServeConfig,
        leader: Leader,
        desk: RequestDesk,
        checkpoints: CheckpointService,
        facts: ServerInfo,
        *,
        mix: bool,
    ) -> None:
        self.cfg, self.leader, self.desk, self.checkpoints, self.facts, self.mix = (
            cfg,
            leader,
            desk,
            checkpoints,
            facts,
            mix,
        )
        self.tenants = Tenants(cfg, leader, checkpoints, facts)
        self.sampling = Sampling(cfg, leader, desk, checkpoints, facts, Snapshots(leader, checkpoints, self.tenants))
        self._stopping = ""
        self._next_tick = 0.0
        self.check: Callable[[], None] = lambda: None  # raises when the server cannot go on; called now and then
        leader.hands.has_news = desk.has_news
        desk.explain_lost(checkpoints.explain_lost)
        desk.keep_record(checkpoints.futures)

    def stop(self, why: str) -> None:
        """Ends `run` after the work in hand; safe from a signal handler."""
        self._stopping = self._stopping or why

    def run(self) -> None:
        """Works until `stop`. Saves under way are finished; what waits is refused with the reason."""
        while not self._stopping:
            self.step()
        self.desk.close(self._stopping)
        self.sampling.abandon(self._stopping)
        self.checkpoints.wait()
        self.leader.stop()

    def step(self) -> None:
        """One turn: at most one training command, then a stretch of sampling."""
        started = time.monotonic()
        jobs = self.desk.take_training(alike, TOKENS_PER_COMMAND)
        if jobs:
            self._execute(jobs)
        took = time.monotonic() - started
        self.sampling.admit()
        if self.sampling.active:
            longest = self.cfg.service.slice_seconds
            self.sampling.draw(min(max(took, longest), LONGEST_STRETCH) if jobs else longest)
        elif not jobs:
            self.leader.idle()
            self.desk.wait(IDLE_SECONDS)
        if time.monotonic() >= self._next_tick:
            self._next_tick = time.monotonic() + TICK_SECONDS
            self._tick()

    def _tick(self) -> None:
        """What has to happen now and then: silent sessions, expired checkpoints."""
        self.check()
        try:
            self._close_ended(self.cfg.service.model_idle_seconds)
            self.checkpoints.expire()
        except UserError as error:  # a full disk; nobody asked for anything, and the next tick tries again
            log.warning("tidying up failed: %s", error)

    def _close_ended(self, idle_seconds: float) -> None:
        """Closes models and snapshots of sessions that were finished, or were silent for so long (0 = never)."""
        snapshots = self.sampling.snapshots
        sessions = self.tenants.sessions() | snapshots.sessions()
        ended = self.checkpoints.ended_sessions(sessions, idle_seconds)
        for tenant in self.tenants.of_sessions(ended):
            self._close(tenant.model, "its session has ended")
        for session in ended:
            snapshots.forget_session(session)

    # ---- requests of models ----------------------------------------------------------------------------------------

    def _execute(self, jobs: list[Job]) -> None:
        request = jobs[0].request
        if isinstance(request, TrainRequest):
            self._train(jobs)
            return
        actions: dict[type, Callable[[Job, Any], None]] = {
            CreateModel: self._create,
            LoadWeights: self._load,
            OptimStep: self._optim_step,
            SaveWeights: self._save,
            UnloadModel: self._unload,
        }
        self._guarded(jobs[0], lambda: actions[type(request)](jobs[0], request))

    def _guarded(self, job: Job, action: Callable[[], None]) -> bool:
        """Runs what may refuse; a refusal settles the future. Anything else ends the server: the ranks may differ."""
        try:
            action()
        except RequestFailed as refused:
            self.desk.failed(job, refused)
        except UserError as error:
            self.desk.failed(job, RequestFailed(str(error)))
        else:
            return True
        return False

    def _create(self, job: Job, request: CreateModel) -> None:
        if self.tenants.full():
            self._close_ended(SILENT_SECONDS)
        try:
            tenant = self.tenants.create(request, job.owner)
        except (RequestFailed, UserError) as error:
            self.desk.closed(request.model_id, f"{request.model_id} was never made: {error}", forget=True)
            raise
        self._opened(tenant)
        self.desk.done(job, {"model_id": tenant.model, "type": "create_model"})

    def _opened(self, tenant: Tenant) -> None:
        self.desk.opened(tenant.model, tenant.facts())

    def _unload(self, job: Job, request: UnloadModel) -> None:
        self.tenants.get(request.model_id)
        self._close(request.model_id, "it was unloaded")
        self.desk.done(job, {"model_id": request.model_id, "type": "unload_model"})

    def _close(self, model: str, why: str) -> None:
        self.tenants.drop(model)
        self.desk.closed(model, f"{model} is closed: {why}; create a model from its last checkpoint")

    def _train(self, jobs: list[Job]) -> None:
        """One engine call for the rows of all jobs whose content is right."""
        ready: list[tuple[Job, list[Datum]]] = []
        spec = None
        for job in jobs:
            request = job.request
            assert isinstance(request, TrainRequest)
            rows: list[Datum] = []

            def check(request: TrainRequest = request, rows: list[Datum] = rows) -> None:
                nonlocal spec
                self.tenants.get(request.model_id)
                if request.problem:
                    raise RequestFailed(request.problem)
                spec = loss_spec(request)
                check_width(request, max_tokens_per_microbatch=self.cfg.max_tokens_per_microbatch)
                rows += to_rows(request, self.facts, max_tokens=self.cfg.service.max_tokens_per_request)

            if self._guarded(job, check):
                ready.append((job, rows))
            elif not request.forward_only:
                self._spoil(request.model_id)
        if not ready:
            return
        assert spec is not None
        for job, _ in ready:
            self.tenants.use(job.lane)
        forward_only = ready[0][0].request.forward_only
        model = ready[0][0].lane if len(ready) == 1 else None
        try:
            results = self._call(ready, Train(spec, forward_only, self.mix, model))
        except UserError as error:
            for job, _ in ready:
                if not forward_only:
                    self._spoil(job.lane)
                self.desk.failed(job, RequestFailed(str(error)))
            return
        for (job, rows), (logprobs, losses) in zip(ready, results, strict=True):
            self._settle(job, rows, logprobs, losses)

    def _call(self, ready: list[tuple[Job, list[Datum]]], train: Train) -> list[tuple[list[np.ndarray], np.ndarray]]:
        """Rows to ranks and back. Each request is laid out over the ranks by itself, so that its numbers do not
        depend on its company."""
        size = self.leader.world.size
        parts: list[list[Datum]] = [[] for _ in range(size)]
        places: list[list[tuple[int, int]]] = [[(0, 0)] * len(rows) for _, rows in ready]
        for number, (_, rows) in enumerate(ready):
            lengths = [len(row.tokens) for row in rows]
            for rank, wanted in enumerate(spread([lengths] + [[]] * (size - 1))):
                for _, index in wanted:
                    places[number][index] = (rank, len(parts[rank]))
                    parts[rank].append(rows[index])
        answers = self.leader.call("train", train, parts)
        return [
            ([answers[r][0][i] for r, i in place], np.array([answers[r][1][i] for r, i in place], dtype=np.float64))
            for place in places
        ]

    def _settle(self, job: Job, rows: list[Datum], logprobs: list[np.ndarray], losses: np.ndarray) -> None:
        request = job.request
        assert isinstance(request, TrainRequest)
        if not np.isfinite(losses).all():
            first = int(np.flatnonzero(~np.isfinite(losses))[0])
            if not request.forward_only:
                self._spoil(request.model_id)
            self.desk.failed(job, RequestFailed(f"{request.loss_fn}: the loss of datum {first} is not finite"))
            return
        metrics = {
            "loss:sum": float(losses.sum()),
            "tokens:sum": float(sum(len(row.tokens) for row in rows)),
            "trained_tokens:sum": float(sum((row.weights != 0).sum() for row in rows)),
        }
        self.tenants.get(request.model_id).pending |= not request.forward_only
        self.desk.done(job, TrainResult([x.astype(np.float32, copy=False) for x in logprobs], metrics))

    def _spoil(self, model: str) -> None:
        """After a failed forward_backward nothing of that step may reach the weights."""
        tenant = self.tenants.find(model)
        if tenant is None:
            return
        if tenant.pending or self.mix:
            self.leader.call("clear", model)
        tenant.pending, tenant.spoiled = False, True

    def _optim_step(self, job: Job, request: OptimStep) -> None:
        tenant = self.tenants.get(request.model_id)
        adam = adam_params(request)
        if tenant.spoiled:
            tenant.spoiled = False
            if tenant.pending:
                self.leader.call("clear", tenant.model)
                tenant.pending = False
            raise RequestFailed(
                "a forward_backward before this optim_step failed: no step was made, and its whole gradient was dropped"
            )
        self.tenants.use(tenant.model)
        metrics, problem = self.leader.call("optim", (tenant.model, adam))[0]
        tenant.pending = False
        if problem:
            raise RequestFailed(problem)
        tenant.steps += 1
        self.desk.done(job, {"metrics": {key.rsplit(":", 1)[0]: float(value) for key, value in metrics.items()}})

    # ---- state -----------------------------------------------------------------------------------------------------

    def _save(self, job: Job, request: SaveWeights) -> None:
        tenant = self.tenants.get(request.model_id)
        if request.problem:
            raise RequestFailed(request.problem)
        self.tenants.use(tenant.model)
        if request.name is None and request.kind == "sampler_weights":
            self.desk.done(job, self._ephemeral(request, tenant))
            return
        path = self.checkpoints.check_save(request, tenant.owner)
        content = self.tenants.content(tenant, optimizer=request.kind == "weights")

        def settle(size: int, error: Exception | None) -> None:
            if error is None:
                self.desk.done(job, {"path": path.uri, "size_bytes": size})
            else:
                self.desk.failed(job, RequestFailed(str(error), "user" if isinstance(error, UserError) else "server"))

        self.checkpoints.save(request, path, tenant.owner, content, settle)

    def _ephemeral(self, request: SaveWeights, tenant: Tenant) -> dict[str, Any]:
        if request.sampling_session_seq_id is None:
            raise RequestFailed("save_weights_for_sampler: needs a path, or a sampling_session_seq_id for a snapshot")
        sampler_id = self.checkpoints.add_ephemeral_sampler(
            tenant.session, tenant.owner, request.sampling_session_seq_id, tenant.base_model, tenant.model
        )
        self.sampling.snapshots.publish(sampler_id, tenant)
        return {"path": None, "sampling_session_id": sampler_id}

    def _load(self, job: Job, request: LoadWeights) -> None:
        if request.model_id is not None:
            tenant = self.tenants.get(request.model_id)
            self.tenants.load_into(tenant, request)
            self.desk.done(job, {"path": request.path, "model_id": tenant.model, "type": "load_weights"})
            return
        model_id = f"{request.session_id}:train:{request.model_seq_id}"
        if self.tenants.full():
            self._close_ended(SILENT_SECONDS)
        try:
            tenant = self.tenants.create_from(request, model_id, job.owner)
        except (RequestFailed, UserError) as error:
            self.desk.closed(model_id, f"{model_id} was never made: {error}", forget=True)
            raise
        self._opened(tenant)
        self.desk.done(job, {"path": request.path, "model_id": model_id, "type": "load_weights"})
