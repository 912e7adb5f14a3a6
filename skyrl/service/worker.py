"""Rank 0's main loop: takes work from the scheduler, checks it, turns it into commands, settles the futures.

Training and sampling alternate: after a training command sampling gets about as long a stretch, and the other way
round, so that neither starves. All refusals happen before a command is sent.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from skyrl.config.schema import RunConfig
from skyrl.distributed.balance import deal_by_length
from skyrl.service.checkpoints import CheckpointService, Snapshots
from skyrl.service.commands import Leader
from skyrl.service.messages import (
    CreateModel,
    LoadWeights,
    OptimStep,
    RequestFailed,
    Result,
    SaveWeights,
    ServerInfo,
    TrainRequest,
    TrainResult,
    UnloadModel,
)
from skyrl.service.models import OpenModels, TrainableModel
from skyrl.service.sampling import Sampling
from skyrl.service.scheduler import PendingRequest, RequestScheduler
from skyrl.service.validation import adam_params, batch_key, check_width, loss_spec, to_rows
from skyrl.types import Datum, Floats, LossSpec, UserError

log = logging.getLogger("skyrl.service")

IDLE_SECONDS = 0.25  # so long a signal to stop may go unseen
TICK_SECONDS = 5.0
SILENT_SECONDS = 120.0  # clients beat every 10: after this a session gives way when there is no room for a new model
LONGEST_STRETCH = 2.0  # of sampling, after a training command that took long
TOKENS_PER_COMMAND = 65536  # training requests of several models join up to here


class Worker:
    """Drives the ranks for the scheduler. `run` returns after `stop`."""

    def __init__(
        self,
        cfg: RunConfig,
        leader: Leader,
        scheduler: RequestScheduler,
        checkpoints: CheckpointService,
        facts: ServerInfo,
        *,
        mix: bool,
    ) -> None:
        self.cfg, self.leader, self.scheduler = cfg, leader, scheduler
        self.checkpoints, self.facts, self.mix = checkpoints, facts, mix
        self.models = OpenModels(cfg, leader, checkpoints, facts)
        self.sampling = Sampling(
            cfg, leader, scheduler, checkpoints, facts, Snapshots(leader, checkpoints, self.models.base_content)
        )
        self._stopping = ""
        self._next_tick = 0.0
        self.check: Callable[[], None] = lambda: None  # raises when the server cannot go on; called now and then
        leader.context.has_pending_work = lambda: bool(self._stopping) or scheduler.has_pending_work()

    def stop(self, why: str) -> None:
        """Ends `run` after the work in hand; safe from a signal handler."""
        self._stopping = self._stopping or why

    def run(self) -> None:
        """Works until `stop`. Saves under way are finished; what waits is refused with the reason."""
        if self.leader.world.device.type == "cuda":  # each thread has a current device of its own
            torch.cuda.set_device(self.leader.world.device)
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
            self.checkpoints.tidy()
        except UserError as error:  # a full disk; nobody asked for anything, and the next tick tries again
            log.warning("tidying up failed: %s", error)

    def _close_ended(self, idle_seconds: float) -> None:
        """Closes models and snapshots of sessions that were finished, or were silent for so long (0 = never)."""
        snapshots = self.sampling.snapshots
        sessions = self.models.sessions() | snapshots.sessions()
        ended = self.checkpoints.store.live.ended(sessions, idle_seconds)
        for model in self.models.of_sessions(ended):
            self._close(model.model_id, "its session has ended")
        for session in ended:
            snapshots.forget_session(session)

    # ---- requests of models ----------------------------------------------------------------------------------------

    def _execute(self, batch: list[PendingRequest]) -> None:
        if isinstance(batch[0].request, TrainRequest):
            self._train(batch)
            return
        actions: dict[type, Callable[[PendingRequest, Any], Result | None]] = {
            CreateModel: self._create,
            LoadWeights: self._load,
            OptimStep: self._optim_step,
            SaveWeights: self._save,
            UnloadModel: self._unload,
        }
        (pending,) = batch
        with self._refusing(pending):
            action = next(action for kind, action in actions.items() if isinstance(pending.request, kind))
            result = action(pending, pending.request)
            if result is not None:  # a save is settled when it is on the disk
                self.scheduler.done(pending, result)

    @contextmanager
    def _refusing(self, pending: PendingRequest) -> Iterator[None]:
        """For what may refuse; a refusal settles the future. Anything else ends the server: the ranks may differ."""
        try:
            yield
        except (RequestFailed, UserError) as error:
            self.scheduler.failed(pending, error)

    def _create(self, pending: PendingRequest, request: CreateModel | LoadWeights) -> Result:
        if self.models.full():
            self._close_ended(SILENT_SECONDS)
        try:
            if isinstance(request, CreateModel):
                model = self.models.create(request, pending.owner)
            else:
                model = self.models.create_from(request, pending.model_id, pending.owner)
        except (RequestFailed, UserError) as error:
            self.scheduler.closed(pending.model_id, f"{pending.model_id} was never made: {error}", forget=True)
            raise
        self.scheduler.opened(model.model_id, model.facts())
        return {"model_id": model.model_id, "type": "create_model"}

    def _load(self, pending: PendingRequest, request: LoadWeights) -> Result:
        if request.model_id is None:
            self._create(pending, request)
        else:
            self.models.load_into(self.models.get(request.model_id), request)
        return {"path": request.path, "model_id": pending.model_id, "type": "load_weights"}

    def _unload(self, pending: PendingRequest, request: UnloadModel) -> Result:
        self.models.get(request.model_id)
        self._close(request.model_id, "it was unloaded")
        return {"model_id": request.model_id, "type": "unload_model"}

    def _close(self, model_id: str, why: str) -> None:
        self.models.drop(model_id)
        self.scheduler.closed(model_id, f"{model_id} is closed: {why}; create a model from its last checkpoint")

    def _train(self, batch: list[PendingRequest]) -> None:
        """One engine call for the rows of all requests whose content is right."""
        ready: list[tuple[PendingRequest, list[Datum]]] = []
        spec, forward_only = None, batch[0].request.forward_only
        for pending in batch:
            request = pending.request
            with self._refusing(pending):
                self.models.get(request.model_id)
                if request.problem:
                    raise RequestFailed(request.problem)
                spec = loss_spec(request)
                check_width(request, max_tokens_per_microbatch=self.cfg.batch.max_tokens_per_microbatch)
                rows = to_rows(request, self.facts, max_tokens=self.cfg.service.max_tokens_per_request)
                ready.append((pending, rows))
        try:
            if ready:
                self._train_together(ready, spec, forward_only)
        except UserError as error:
            for pending, _ in ready:
                self.scheduler.failed(pending, error)
        for pending in batch:
            if pending.outcome.state == "failed" and not forward_only:
                self._drop_gradient(pending.model_id)

    def _train_together(
        self, ready: list[tuple[PendingRequest, list[Datum]]], spec: LossSpec, forward_only: bool
    ) -> None:
        for pending, _ in ready:
            self.models.use(pending.model_id)
        model_id = ready[0][0].model_id if len(ready) == 1 else None
        outputs = self._compute(ready, spec, forward_only, self.mix, model_id)
        for (pending, rows), found in zip(ready, outputs, strict=True):
            losses = np.array([loss for _, loss in found], dtype=np.float64)
            if not np.isfinite(losses).all():
                first = int(np.flatnonzero(~np.isfinite(losses))[0])
                why = f"{pending.request.loss_fn}: the loss of datum {first} is not finite"
                self.scheduler.failed(pending, RequestFailed(why))
                continue
            metrics = {
                "loss:sum": float(losses.sum()),
                "tokens:sum": float(sum(len(row.tokens) for row in rows)),
                "trained_tokens:sum": float(sum((row.weights != 0).sum() for row in rows)),
            }
            self.models.get(pending.model_id).has_gradient |= not forward_only
            logprobs = [one.astype(np.float32, copy=False) for one, _ in found]
            self.scheduler.done(pending, TrainResult(logprobs, metrics))

    def _compute(self, ready: list[tuple[PendingRequest, list[Datum]]], *args: Any) -> list[list[tuple[Floats, float]]]:
        """Rows to ranks and back: (log-probabilities, loss) of each row. Each request is laid out over the ranks by
        itself, so that its numbers do not depend on its company."""
        world = self.leader.world
        dealt: list[list[tuple[int, int]]] = [[] for _ in range(world.dp_size)]  # (number of the request, of its row)
        for number, (_, rows) in enumerate(ready):
            for part, indices in zip(dealt, deal_by_length(world, [len(row.tokens) for row in rows]), strict=True):
                part += [(number, index) for index in indices]
        parts = [[ready[number][1][index] for number, index in part] for part in dealt]
        found: dict[tuple[int, int], tuple[Floats, float]] = {}
        for part, (logprobs, losses) in zip(dealt, self.leader.call("train", *args, parts=parts), strict=True):
            found.update(zip(part, zip(logprobs, losses, strict=True), strict=True))
        return [[found[number, index] for index in range(len(rows))] for number, (_, rows) in enumerate(ready)]

    def _drop_gradient(self, model_id: str) -> None:
        """After a failed forward_backward nothing of that step may reach the weights."""
        model = self.models.find(model_id)
        if model is None:
            return
        if model.has_gradient or self.mix:
            self.leader.call("clear_gradient", model_id)
        model.has_gradient, model.gradient_failed = False, True

    def _optim_step(self, pending: PendingRequest, request: OptimStep) -> Result:
        model = self.models.get(request.model_id)
        adam = adam_params(request)
        if model.gradient_failed:
            model.gradient_failed = False
            if model.has_gradient:
                self.leader.call("clear_gradient", model.model_id)
                model.has_gradient = False
            raise RequestFailed(
                "a forward_backward before this optim_step failed: no step was made, and its whole gradient was dropped"
            )
        self.models.use(model.model_id)
        model.has_gradient = False  # also when the step is refused: the ranks have dropped it then
        metrics = self.leader.call("optim_step", model.model_id, adam)[0]
        model.steps += 1
        return {"metrics": {key.rsplit(":", 1)[0]: float(value) for key, value in metrics.items()}}

    # ---- state -----------------------------------------------------------------------------------------------------

    def _save(self, pending: PendingRequest, request: SaveWeights) -> Result | None:
        model = self.models.get(request.model_id)
        if request.problem:
            raise RequestFailed(request.problem)
        self.models.use(model.model_id)
        if request.name is None and request.kind == "sampler_weights":
            return self._save_ephemeral(request, model)
        path = self.checkpoints.check_save(request, model.owner)
        content = self.models.content(model, optimizer=request.kind == "weights")

        def settle(size: int, error: Exception | None) -> None:
            if error is None:
                self.scheduler.done(pending, {"path": path.uri, "size_bytes": size})
            else:
                self.scheduler.failed(pending, error)

        self.checkpoints.save_later(request, path, model.owner, content, settle)
        return None

    def _save_ephemeral(self, request: SaveWeights, model: TrainableModel) -> Result:
        if request.sampling_session_seq_id is None:
            raise RequestFailed("save_weights_for_sampler: needs a path, or a sampling_session_seq_id for a snapshot")
        sampler_id = self.checkpoints.store.create_sampler(
            model.session, model.owner, request.sampling_session_seq_id, model.base_model, ephemeral_run=model.model_id
        ).sampler_id
        self.sampling.snapshots.publish(sampler_id, self.models.content(model, optimizer=False), model.model_id)
        return {"path": None, "sampling_session_id": sampler_id}
