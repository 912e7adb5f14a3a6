"""Rank 0's main loop: takes work from the scheduler, checks it, turns it into commands, settles the futures.

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
from skyrl.service.commands import Leader, Train
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
from skyrl.service.models import OpenModels, TrainableModel
from skyrl.service.sampling import Sampling
from skyrl.service.scheduler import PendingRequest, RequestScheduler
from skyrl.service.snapshots import Snapshots
from skyrl.service.validation import adam_params, batch_key, loss_spec, to_rows
from skyrl.types import Datum, UserError

log = logging.getLogger("skyrl.service")

IDLE_SECONDS = 1.0
TICK_SECONDS = 5.0
SILENT_SECONDS = 120.0  # clients beat every 10: after this a session gives way when there is no room for a new model
LONGEST_STRETCH = 2.0  # of sampling, after a training command that took long
TOKENS_PER_COMMAND = 65536  # training requests of several models join up to here


class Worker:
    """Drives the ranks for the scheduler. `run` returns after `stop`."""

    def __init__(
        self,
        cfg: ServeConfig,
        leader: Leader,
        scheduler: RequestScheduler,
        checkpoints: CheckpointService,
        facts: ServerInfo,
        *,
        mix: bool,
    ) -> None:
        self.cfg, self.leader, self.scheduler, self.checkpoints, self.facts, self.mix = (
            cfg,
            leader,
            scheduler,
            checkpoints,
            facts,
            mix,
        )
        self.models = OpenModels(cfg, leader, checkpoints, facts)
        self.sampling = Sampling(
            cfg, leader, scheduler, checkpoints, facts, Snapshots(leader, checkpoints, self.models)
        )
        self._stopping = ""
        self._next_tick = 0.0
        self.check: Callable[[], None] = lambda: None  # raises when the server cannot go on; called now and then
        leader.context.has_pending_work = scheduler.has_pending_work
        scheduler.explain_lost(checkpoints.explain_lost)
        scheduler.keep_record(checkpoints.futures)

    def stop(self, why: str) -> None:
        """Ends `run` after the work in hand; safe from a signal handler."""
        self._stopping = self._stopping or why

    def run(self) -> None:
        """Works until `stop`. Saves under way are finished; what waits is refused with the reason."""
        while not self._stopping:
            self.step()
        self.scheduler.close(self._stopping)
        self.sampling.abandon(self._stopping)
        self.checkpoints.wait()
        self.leader.stop()

    def step(self) -> None:
        """One turn: at most one training command, then a stretch of sampling."""
        started = time.monotonic()
        batch = self.scheduler.take_training(batch_key, TOKENS_PER_COMMAND)
        if batch:
            self._execute(batch)
        took = time.monotonic() - started
        self.sampling.admit()
        if self.sampling.active:
            longest = self.cfg.service.slice_seconds
            self.sampling.draw(min(max(took, longest), LONGEST_STRETCH) if batch else longest)
        elif not batch:
            self.leader.idle()
            self.scheduler.wait(IDLE_SECONDS)
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
        sessions = self.models.sessions() | snapshots.sessions()
        ended = self.checkpoints.ended_sessions(sessions, idle_seconds)
        for model in self.models.of_sessions(ended):
            self._close(model.model_id, "its session has ended")
        for session in ended:
            snapshots.forget_session(session)

    # ---- requests of models ----------------------------------------------------------------------------------------

    def _execute(self, batch: list[PendingRequest]) -> None:
        request = batch[0].request
        if isinstance(request, TrainRequest):
            self._train(batch)
            return
        actions: dict[type, Callable[[PendingRequest, Any], None]] = {
            CreateModel: self._create,
            LoadWeights: self._load,
            OptimStep: self._optim_step,
            SaveWeights: self._save,
            UnloadModel: self._unload,
        }
        self._guarded(batch[0], lambda: actions[type(request)](batch[0], request))

    def _guarded(self, pending: PendingRequest, action: Callable[[], None]) -> bool:
        """Runs what may refuse; a refusal settles the future. Anything else ends the server: the ranks may differ."""
        try:
            action()
        except RequestFailed as refused:
            self.scheduler.failed(pending, refused)
        except UserError as error:
            self.scheduler.failed(pending, RequestFailed(str(error)))
        else:
            return True
        return False

    def _create(self, pending: PendingRequest, request: CreateModel) -> None:
        if self.models.full():
            self._close_ended(SILENT_SECONDS)
        try:
            model = self.models.create(request, pending.owner)
        except (RequestFailed, UserError) as error:
            self.scheduler.closed(request.model_id, f"{request.model_id} was never made: {error}", forget=True)
            raise
        self._opened(model)
        self.scheduler.done(pending, {"model_id": model.model_id, "type": "create_model"})

    def _opened(self, model: TrainableModel) -> None:
        self.scheduler.opened(model.model_id, model.facts())

    def _unload(self, pending: PendingRequest, request: UnloadModel) -> None:
        self.models.get(request.model_id)
        self._close(request.model_id, "it was unloaded")
        self.scheduler.done(pending, {"model_id": request.model_id, "type": "unload_model"})

    def _close(self, model_id: str, why: str) -> None:
        self.models.drop(model_id)
        self.scheduler.closed(model_id, f"{model_id} is closed: {why}; create a model from its last checkpoint")

    def _train(self, batch: list[PendingRequest]) -> None:
        """One engine call for the rows of all jobs whose content is right."""
        ready: list[tuple[PendingRequest, list[Datum]]] = []
        spec = None
        for pending in batch:
            request = pending.request
            assert isinstance(request, TrainRequest)
            rows: list[Datum] = []

            def check(request: TrainRequest = request, rows: list[Datum] = rows) -> None:
                nonlocal spec
                self.models.get(request.model_id)
                if request.problem:
                    raise RequestFailed(request.problem)
                spec = loss_spec(request)
                check_width(request, max_tokens_per_microbatch=self.cfg.max_tokens_per_microbatch)
                rows += to_rows(request, self.facts, max_tokens=self.cfg.service.max_tokens_per_request)

            if self._guarded(pending, check):
                ready.append((pending, rows))
            elif not request.forward_only:
                self._drop_gradient(request.model_id)
        if not ready:
            return
        assert spec is not None
        for pending, _ in ready:
            self.models.use(pending.model_id)
        forward_only = ready[0][0].request.forward_only
        model_id = ready[0][0].model_id if len(ready) == 1 else None
        try:
            results = self._call(ready, Train(spec, forward_only, self.mix, model_id))
        except UserError as error:
            for pending, _ in ready:
                if not forward_only:
                    self._drop_gradient(pending.model_id)
                self.scheduler.failed(pending, RequestFailed(str(error)))
            return
        for (pending, rows), (logprobs, losses) in zip(ready, results, strict=True):
            self._settle(pending, rows, logprobs, losses)

    def _call(
        self, ready: list[tuple[PendingRequest, list[Datum]]], train: Train
    ) -> list[tuple[list[np.ndarray], np.ndarray]]:
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

    def _settle(
        self, pending: PendingRequest, rows: list[Datum], logprobs: list[np.ndarray], losses: np.ndarray
    ) -> None:
        request = pending.request
        assert isinstance(request, TrainRequest)
        if not np.isfinite(losses).all():
            first = int(np.flatnonzero(~np.isfinite(losses))[0])
            if not request.forward_only:
                self._drop_gradient(request.model_id)
            self.scheduler.failed(pending, RequestFailed(f"{request.loss_fn}: the loss of datum {first} is not finite"))
            return
        metrics = {
            "loss:sum": float(losses.sum()),
            "tokens:sum": float(sum(len(row.tokens) for row in rows)),
            "trained_tokens:sum": float(sum((row.weights != 0).sum() for row in rows)),
        }
        self.models.get(request.model_id).has_gradient |= not request.forward_only
        self.scheduler.done(pending, TrainResult([x.astype(np.float32, copy=False) for x in logprobs], metrics))

    def _drop_gradient(self, model_id: str) -> None:
        """After a failed forward_backward nothing of that step may reach the weights."""
        model = self.models.find(model_id)
        if model is None:
            return
        if model.has_gradient or self.mix:
            self.leader.call("clear", model_id)
        model.has_gradient, model.gradient_failed = False, True

    def _optim_step(self, pending: PendingRequest, request: OptimStep) -> None:
        model = self.models.get(request.model_id)
        adam = adam_params(request)
        if model.gradient_failed:
            model.gradient_failed = False
            if model.has_gradient:
                self.leader.call("clear", model.model_id)
                model.has_gradient = False
            raise RequestFailed(
                "a forward_backward before this optim_step failed: no step was made, and its whole gradient was dropped"
            )
        self.models.use(model.model_id)
        metrics, problem = self.leader.call("optim", (model.model_id, adam))[0]
        model.has_gradient = False
        if problem:
            raise RequestFailed(problem)
        model.steps += 1
        self.scheduler.done(
            pending, {"metrics": {key.rsplit(":", 1)[0]: float(value) for key, value in metrics.items()}}
        )

    # ---- state -----------------------------------------------------------------------------------------------------

    def _save(self, pending: PendingRequest, request: SaveWeights) -> None:
        model = self.models.get(request.model_id)
        if request.problem:
            raise RequestFailed(request.problem)
        self.models.use(model.model_id)
        if request.name is None and request.kind == "sampler_weights":
            self.scheduler.done(pending, self._ephemeral(request, model))
            return
        path = self.checkpoints.check_save(request, model.owner)
        content = self.models.content(model, optimizer=request.kind == "weights")

        def settle(size: int, error: Exception | None) -> None:
            if error is None:
                self.scheduler.done(pending, {"path": path.uri, "size_bytes": size})
            else:
                self.scheduler.failed(
                    pending, RequestFailed(str(error), "user" if isinstance(error, UserError) else "server")
                )

        self.checkpoints.save(request, path, model.owner, content, settle)

    def _ephemeral(self, request: SaveWeights, model: TrainableModel) -> dict[str, Any]:
        if request.sampling_session_seq_id is None:
            raise RequestFailed("save_weights_for_sampler: needs a path, or a sampling_session_seq_id for a snapshot")
        sampler_id = self.checkpoints.add_ephemeral_sampler(
            model.session, model.owner, request.sampling_session_seq_id, model.base_model, model.model_id
        )
        self.sampling.snapshots.publish(sampler_id, model)
        return {"path": None, "sampling_session_id": sampler_id}

    def _load(self, pending: PendingRequest, request: LoadWeights) -> None:
        if request.model_id is not None:
            model = self.models.get(request.model_id)
            self.models.load_into(model, request)
            self.scheduler.done(pending, {"path": request.path, "model_id": model.model_id, "type": "load_weights"})
            return
        model_id = f"{request.session_id}:train:{request.model_seq_id}"
        if self.models.full():
            self._close_ended(SILENT_SECONDS)
        try:
            model = self.models.create_from(request, model_id, pending.owner)
        except (RequestFailed, UserError) as error:
            self.scheduler.closed(model_id, f"{model_id} was never made: {error}", forget=True)
            raise
        self._opened(model)
        self.scheduler.done(pending, {"path": request.path, "model_id": model_id, "type": "load_weights"})
