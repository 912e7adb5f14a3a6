"""Rank 0's main loop: takes work from the scheduler, checks it, turns it into commands, settles the futures."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from skyrl.config.schema import RunConfig
from skyrl.distributed.balance import deal_by_length
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
from skyrl.service.pending import PendingRequest
from skyrl.service.sampling import LONGEST_STRETCH, Sampling
from skyrl.service.scheduler import ENDED, RequestScheduler, makes_model
from skyrl.service.storage.checkpoints import CheckpointService
from skyrl.service.storage.snapshots import Snapshots
from skyrl.service.validation import adam_params, batch_key, check_width, loss_spec, substituted, to_rows
from skyrl.types import Datum, Floats, Metrics, UserError

log = logging.getLogger("skyrl.service")

IDLE_SECONDS = 0.25  # so long a signal to stop may go unseen
LOOK_SECONDS = 0.5  # between looks, in memory, at which sessions have ended
TICK_SECONDS = 5.0
SILENT_SECONDS = 120.0  # clients beat every 10: after this a session gives way when there is no room for a new model
TOKENS_PER_COMMAND = 65536  # training requests of several models join up to here, and to about LONGEST_STRETCH


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
        self._stopping, self._told = "", ""
        self._next_look, self._next_tick = 0.0, 0.0
        self.check: Callable[[], None] = lambda: None  # raises when the server cannot go on; called now and then
        self._token_seconds = 0.0  # that a token of a training command took last
        self._trained_since = 0.0  # when the micro-batch that is computed, or was last, began
        self._sampling_until = 0.0  # until then what is to be trained waits
        leader.context.has_pending_work = lambda: (
            bool(self._stopping) or scheduler.has_pending_work(training=time.monotonic() >= self._sampling_until)
        )

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

    def work(self, seconds: float, enough: Callable[[], bool]) -> None:
        """Works for so many seconds, or until there is `enough` and what the ranks have begun to draw is finished (the
        rest waits for the next time, and its weights); then lets the followers leave."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.sampling.held:
            self.step()
            self.sampling.held = enough()
        while self.sampling.held and self.sampling.drawing:
            self.step()
        self.sampling.held = False
        self.leader.stop()

    def step(self) -> None:
        """One turn: at most one training command and one that answers questions about tokens, then draws for as long as
        these took; without any, for a slice."""
        self._trained_since = time.monotonic()
        most = LONGEST_STRETCH / max(self._token_seconds, LONGEST_STRETCH / TOKENS_PER_COMMAND)
        batch = self.scheduler.take_training(batch_key, int(most))
        if batch:
            self._execute(batch)
        self._sample(self.sampling.slice_seconds)
        if not (batch or self.sampling.active):
            self.leader.idle()
            self.scheduler.wait(IDLE_SECONDS)
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self._close_ended()
        if now >= self._next_tick:
            self._next_tick = now + TICK_SECONDS
            self.check()
            self.checkpoints.tidy()
            self.sampling.recordings.expire()

    def _sample(self, stretch: Callable[[], float]) -> None:
        """Answers questions, then draws, in stretches, for as long as these and the training before them took."""
        self.sampling.admit()
        self.sampling.score()
        now = time.monotonic()
        self._sampling_until = now + min(now - self._trained_since, LONGEST_STRETCH)
        while self.sampling.draw(stretch()):
            if time.monotonic() >= self._sampling_until or self._stopping:
                break
            self.sampling.admit()

    def pause(self) -> None:
        """Between two micro-batches of a training command (the other ranks follow until `stop`): samples have as much
        time as the last one took. So nobody waits for longer than that, and training takes twice its time at most."""
        self._sample(lambda: min(self.sampling.slice_seconds(), self._sampling_until - time.monotonic()))
        self.leader.stop()
        self._trained_since = time.monotonic()

    def _close_ended(self, silent_seconds: float = 0) -> None:
        """Withdraws the samples of sessions that have ended, or were silent for so long (0 = however long), and closes
        their models and snapshots."""
        sessions = self.models.sessions() | self.sampling.sessions()
        if not (ended := self.checkpoints.store.live.ended(sessions, silent_seconds)):
            return
        self.sampling.withdraw(lambda one: one.session in ended, ENDED)
        for model in self.models.of_sessions(ended):
            try:
                self._close(model.model_id, "its session has ended")
            except UserError as error:  # a full disk: it is open as before, and the next look tries again
                before, self._told = self._told, f"{model.model_id} stays open: {error}"
                if self._told != before:
                    log.warning(self._told)
        for session in ended:
            self.sampling.snapshots.forget_session(session)
            self.sampling.recordings.forget_session(session)

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
            if pending.request.problem:
                raise RequestFailed(pending.request.problem)
            action = next(action for kind, action in actions.items() if isinstance(pending.request, kind))
            result = action(pending, pending.request)
            if result is not None:  # a save is settled when it is on the disk
                self.scheduler.done(pending, result)

    @contextmanager
    def _refusing(self, pending: PendingRequest) -> Iterator[None]:
        """For what may refuse; a refusal settles the future, and a model that was to be made never was. Anything else
        ends the server: the ranks may differ."""
        makes = makes_model(pending.request)
        try:
            yield
        except (RequestFailed, UserError) as error:
            if makes:
                self.scheduler.closed(pending.model_id, f"{pending.model_id} was never made: {error}", forget=True)
            self.scheduler.failed(pending, error)

    def _create(self, pending: PendingRequest, request: CreateModel | LoadWeights) -> Result:
        if self.models.full():
            self._close_ended(SILENT_SECONDS)
        model = self.models.create(request, pending.model_id, pending.owner)
        self.scheduler.opened(model.model_id, model.info)
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
        self.sampling.withdraw(lambda one: one.drawn_from == request.model_id, f"{request.model_id} was unloaded")
        return {"model_id": request.model_id, "type": "unload_model"}

    def _close(self, model_id: str, why: str) -> None:
        self.models.drop(model_id)  # on record before anything is gone
        self.scheduler.closed(model_id, f"{model_id} is closed: {why}; create a model from its last checkpoint")

    def _train(self, batch: list[PendingRequest]) -> None:
        """One engine call for the rows of all requests whose content is right."""
        ready: list[tuple[PendingRequest, list[Datum], Metrics]] = []
        spec, forward_only = None, batch[0].request.forward_only
        for pending in batch:
            request = pending.request
            with self._refusing_part(pending, forward_only):
                model = self.models.get(request.model_id)
                if not forward_only and not model.has_gradient and self.scheduler.knew_of_failure(pending):
                    model.gradient_failed = False  # the client knows that the step before came to nothing: a new one
                if request.problem:
                    raise RequestFailed(request.problem)
                check_width(request, max_tokens_per_microbatch=self.cfg.batch.max_tokens_per_microbatch)
                request, more = self._substitute(model, request)
                spec = loss_spec(request)
                rows = to_rows(request, self.facts, max_tokens=self.cfg.service.max_tokens_per_request)
                ready.append((pending, rows, more))
        if not ready:
            return
        assert spec is not None
        for pending, *_ in ready:
            self.models.use(pending.model_id)
        model_id = ready[0][0].model_id if len(ready) == 1 else None
        try:
            outputs = self._compute([rows for _, rows, _ in ready], spec, forward_only, self.mix, model_id)
        except UserError as error:
            for pending, *_ in ready:
                with self._refusing_part(pending, forward_only):
                    raise error
            return
        for (pending, rows, more), found in zip(ready, outputs, strict=True):
            with self._refusing_part(pending, forward_only):
                result = _train_result(pending.request.loss_fn, rows, found)
                result.metrics.update(more)
                self.models.get(pending.model_id).has_gradient |= not forward_only
                self.scheduler.done(pending, result)

    def _substitute(self, model: TrainableModel, request: TrainRequest) -> tuple[TrainRequest, Metrics]:
        """The request with the loss that service.loss_substitutes names for its own, and metrics that say so: which
        loss it is, and of how many weights (snapshots, checkpoints) the sequences are. As it is when none is named."""
        loss, other = request.loss_fn, self.cfg.service.loss_substitutes.get(request.loss_fn)
        if other is None:
            return request, {}
        found, weights = substituted(request, other, partial(self.sampling.recordings.find, model.session))
        if not model.told:
            model.told = True
            log.warning("%s: %s is computed as %s (service.loss_substitutes)", model.model_id, loss, other)
        return found, {f"{loss}_computed_as_{other}:max": 1.0, "sampled_weights:max": float(len(weights))}

    @contextmanager
    def _refusing_part(self, pending: PendingRequest, forward_only: bool) -> Iterator[None]:
        """As `_refusing`, for a part of a step: when it fails, nothing of that step may reach the weights, so what is
        pending for its model is dropped, and its client is told that."""
        try:
            yield
        except (RequestFailed, UserError) as error:
            model = None if forward_only else self.models.find(pending.model_id)
            if model is not None:
                if model.has_gradient:
                    more = f"{error}; the gradient of the forward_backward requests before it is dropped as well"
                    error = RequestFailed(more, getattr(error, "category", "user"))
                self.leader.call("clear_gradient", model.model_id)
                model.has_gradient, model.gradient_failed = False, True
            self.scheduler.failed(pending, error)

    def _compute(self, requests: list[list[Datum]], *args: Any) -> list[list[tuple[Floats, float]]]:
        """Rows to ranks and back: (log-probabilities, loss) of each row. Each request is laid out over the ranks by
        itself, so that its numbers do not depend on its company."""
        world = self.leader.world
        dealt: list[list[tuple[int, int]]] = [[] for _ in range(world.dp_size)]  # (number of the request, of its row)
        for number, rows in enumerate(requests):
            for part, indices in zip(dealt, deal_by_length(world, [len(row.tokens) for row in rows]), strict=True):
                part += [(number, index) for index in indices]
        parts = [[requests[number][index] for number, index in part] for part in dealt]
        found: dict[tuple[int, int], tuple[Floats, float]] = {}
        begun = time.monotonic()
        answers = self.leader.call("train", *args, parts=parts)
        self._token_seconds = (time.monotonic() - begun) / sum(len(row.tokens) for rows in requests for row in rows)
        for part, (logprobs, losses) in zip(dealt, answers, strict=True):
            found.update(zip(part, zip(logprobs, losses, strict=True), strict=True))
        return [[found[number, index] for index in range(len(rows))] for number, rows in enumerate(requests)]

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
        return {"metrics": {key.rsplit(":", 1)[0]: float(value) for key, value in metrics.items()}}

    # ---- state -----------------------------------------------------------------------------------------------------

    def _save(self, pending: PendingRequest, request: SaveWeights) -> Result | None:
        model = self.models.get(request.model_id)
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


def _train_result(loss: str, rows: list[Datum], found: list[tuple[Floats, float]]) -> TrainResult:
    """The answer about rows, from (log-probabilities, loss) of each. Raises RequestFailed for what is not finite."""
    logprobs = [one.astype(np.float32, copy=False) for one, _ in found]
    for number, (own, (_, value)) in enumerate(zip(logprobs, found, strict=True)):
        if not np.isfinite(value):
            raise RequestFailed(f"{loss}: the loss of datum {number} is not finite")
        if not np.isfinite(own).all():
            first = int(np.flatnonzero(~np.isfinite(own).reshape(len(own), -1).all(1))[0])
            raise RequestFailed(
                f"{loss}: datum {number}: the log-probability of token {first} is not finite: the model's weights went "
                "astray; go on from a checkpoint before"
            )
    metrics = {
        "loss:sum": float(sum(value for _, value in found)),
        "tokens:sum": float(sum(len(row.tokens) for row in rows)),
        "trained_tokens:sum": float(sum((row.weights != 0).sum() for row in rows)),
    }
    return TrainResult(logprobs, metrics)
