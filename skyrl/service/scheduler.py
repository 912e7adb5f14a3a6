"""Where requests wait: order by seq_id, one run per request however often it is posted, fairness, futures.

Pure bookkeeping under one lock, without torch, HTTP or disk. The front doors submit and ask for outcomes from their
threads; the worker takes work and settles futures from its own.

A model's requests run by seq_id, not by arrival, because the client posts the chunks of one call in parallel. A number
that never arrives is given up after `gap_seconds`. A repeated number finds the first request's future.
"""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skyrl.service.database import FutureLog
from skyrl.service.messages import (
    Category,
    CreateModel,
    LoadWeights,
    Request,
    RequestOutcome,
    Result,
    SampleResult,
    SamplingRequest,
    TooManyRequests,
    TrainRequest,
    UnloadModel,
)
from skyrl.types import Ints, SampleRequest, UserError

Key = tuple[Any, ...]
KEEP_SECONDS = 3600.0  # a result stays fetchable this long after it was made
FETCHED_SECONDS = 120.0  # a result that was fetched is kept for repeated polls this long
RESULT_BYTES = 2 << 30  # results that wait to be fetched; beyond it the oldest of who has most are thrown away
WAITING_BYTES = 2 << 30  # of requests that wait or run, shared by the owners that have some
WAITING_REQUESTS = 4096  # of one model
CLOSED_MODELS = 4096  # closed models of which the scheduler itself knows why; of older ones the record does
LARGE_SAMPLE = 64  # a request for more samples takes the place of so many: it is drawn in parts
FUTURE_BYTES, NAME_BYTES = 2048, 100  # of a future, and of the name of one sample, about


@dataclass(eq=False)
class PendingRequest:
    """A request with its future. `request` is None once that is settled, for it may hold much memory. `model_id` is the
    model whose order it keeps, "" for samples; `key` makes two posts the same request."""

    request_id: str
    request: Any  # a Request, or None
    owner: str
    model_id: str
    key: Key | None
    arrived: float = field(default_factory=time.monotonic)
    running: bool = False
    outcome: RequestOutcome = RequestOutcome("pending")
    finished: float = 0.0
    fetched: float = 0.0
    callbacks: list[Callable[[], None]] = field(default_factory=list)
    request_bytes: int = 0
    kept_bytes: int = FUTURE_BYTES  # of the future and its result

    @property
    def settled(self) -> bool:
        """Whether it is done, or has failed."""
        return self.outcome.state != "pending"

    @property
    def sequence_ids(self) -> tuple[str, ...]:
        """A name for each sample to come."""
        return ()


@dataclass(eq=False)
class PendingSample(PendingRequest):
    """A sampling request from its submission to its answer. What is below `readers` is the worker's (sampling.py)."""

    num_samples: int = 1  # at most as many as may wait at all: a request for more will be refused
    cancelled: bool = False
    streamed: list[tuple[int, Ints]] = field(default_factory=list)  # (sample, tokens) in the order drawn
    readers: list[Callable[[int, Ints], None]] = field(default_factory=list)
    adapter: str = ""  # that it is drawn from, "" = the base
    answer: SampleResult | None = None  # filled in as it comes
    answer_bytes: int = 0  # at most
    unsent: deque[SampleRequest] = field(default_factory=deque)  # no rank has them yet
    ranks: dict[str, int] = field(default_factory=dict)  # those that a rank has
    known: dict[str, int] = field(default_factory=dict)  # tokens of each that its reader has
    unanswered: int = 0  # samples, and questions about the prompt, that are not complete

    @property
    def sequence_ids(self) -> tuple[str, ...]:
        """A name for each sample to come."""
        return tuple(f"{self.request_id}:{index}" for index in range(self.num_samples))


@dataclass(eq=False)
class ModelQueue:
    """One model's requests. `next_seq_id` runs next; `out_of_order` came early."""

    owner: str
    next_seq_id: int = 1
    out_of_order: dict[int, PendingRequest] = field(default_factory=dict)
    ready: deque[PendingRequest] = field(default_factory=deque)
    served: int = 0  # when it last had a turn: the queue that waited longest comes first
    closed: str = ""  # why nothing runs here any more
    info: dict[str, Any] | None = None  # of the created model

    @property
    def gap(self) -> bool:
        """Whether the next request has not arrived, but later ones have."""
        return bool(self.out_of_order) and self.next_seq_id not in self.out_of_order

    def advance(self) -> None:
        """Makes those ready whose turn has come."""
        while self.next_seq_id in self.out_of_order:
            self.ready.append(self.out_of_order.pop(self.next_seq_id))
            self.next_seq_id += 1

    def clear(self) -> list[PendingRequest]:
        """Takes out all that waits."""
        waiting = [*self.ready, *self.out_of_order.values()]
        self.ready.clear()
        self.out_of_order.clear()
        return waiting


@dataclass(eq=False)
class OwnerUsage:
    """What one owner has of what all share."""

    samples: deque[PendingSample] = field(default_factory=deque)  # that wait
    num_samples: int = 0  # in them
    request_bytes: int = 0  # of requests that wait or run
    settled: OrderedDict[str, PendingRequest] = field(default_factory=OrderedDict)  # that are kept, oldest first
    kept_bytes: int = 0  # of these


class RequestScheduler:
    """Where requests wait, thread-safe: the front doors' side, and the worker's."""

    def __init__(
        self,
        *,
        gap_seconds: float = 30.0,
        max_queued_samples: int = 4096,
        futures: FutureLog | None = None,
        explain_lost: Callable[[str, str], str] = lambda model_id, owner: "",
    ) -> None:
        """futures: records answers, and knows those of earlier servers. explain_lost(model_id, owner): why a model that
        is not open is gone, "" when it never was."""
        self.gap_seconds, self.max_queued_samples = gap_seconds, max_queued_samples
        self._lock = threading.Condition()
        self._requests: dict[str, PendingRequest] = {}
        self._by_key: dict[Key, PendingRequest] = {}
        self._owners: OrderedDict[str, OwnerUsage] = OrderedDict()  # whose samples wait longest for a turn comes first
        self._queues: dict[str, ModelQueue] = {}
        self._fetched: deque[PendingRequest] = deque()
        self._cancelled: list[PendingSample] = []
        self._due: deque[Callable[[], None]] = deque()
        self._clock = itertools.count(1)
        self._closed = ""
        self._futures, self._explain_lost = futures, explain_lost

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock. Who waits for what was settled meanwhile is called after it, for they may ask again."""
        with self._lock:
            yield
            due = [self._due.popleft() for _ in range(len(self._due))]
        for call in due:
            call()

    # ---- the front doors' side -------------------------------------------------------------------------------------

    def submit(self, request: Request, *, owner: str) -> PendingRequest:
        """Queues a request, or finds the earlier one of the same key (model and seq_id, session and seq_id): a
        repeated request is never run twice, and its answer is the first one's. Raises UserError for what is malformed
        or not the owner's, TooManyRequests."""
        with self._locked():
            if self._closed:
                raise TooManyRequests(self._closed)
            model_id, key = _place(request)
            key = None if key is None else (owner, *key)
            if key is not None and key in self._by_key:
                return self._by_key[key]
            queue = self._queues.get(model_id) if model_id else None
            if queue is not None and queue.owner != owner:
                raise UserError(f"{model_id}: no such model")
            size, usage = 1024 + _array_bytes(request), self._owners.setdefault(owner, OwnerUsage())
            self._check_bytes(request, usage, queue, size)
            request_id = uuid.uuid4().hex if self._futures is None else self._futures.new_id()
            if isinstance(request, SamplingRequest):
                self._check_samples(request, usage)
                number = min(request.num_samples, self.max_queued_samples)
                pending = PendingSample(request_id, request, owner, model_id, key, num_samples=number)
                pending.kept_bytes += NAME_BYTES * number
                usage.samples.append(pending)
                usage.num_samples += request.num_samples
            else:
                pending = PendingRequest(request_id, request, owner, model_id, key)
            pending.request_bytes = size
            usage.request_bytes += size
            self._prune()
            self._requests[request_id] = pending
            if key is not None:
                self._by_key[key] = pending
            if model_id:
                self._queue_for_model(pending, queue)
            if self._futures is not None and queue is not None:
                self._futures.touch(model_id)
            self._lock.notify_all()
        return pending

    def _check_samples(self, request: SamplingRequest, usage: OwnerUsage) -> None:
        """Owners that have samples waiting share the places; one who has none may always have some."""
        own = usage.num_samples
        most = self.max_queued_samples // sum(1 for one in self._owners.values() if one.num_samples or one is usage)
        if own and own + request.num_samples > most:
            raise TooManyRequests(f"{own} samples are waiting, at most {most} may; try again in a moment")

    def _check_bytes(self, request: Request, usage: OwnerUsage, queue: ModelQueue | None, size: int) -> None:
        """Memory for what waits. The request for which a model's later ones wait always has room."""
        if queue is not None:
            first = getattr(request, "seq_id", None) == queue.next_seq_id and not queue.ready
            if first and queue.out_of_order:
                return
            waiting = len(queue.ready) + len(queue.out_of_order)
            if waiting >= WAITING_REQUESTS and not first:
                raise TooManyRequests(f"{waiting} requests of this model are waiting; try again in a moment")
        own = usage.request_bytes
        most = WAITING_BYTES // sum(1 for one in self._owners.values() if one.request_bytes or one is usage)
        if own and own + size > most:
            raise TooManyRequests(
                f"{own >> 20} MiB of requests are waiting, at most {most >> 20} may; try again in a moment"
            )

    def _queue_for_model(self, pending: PendingRequest, queue: ModelQueue | None) -> None:
        request, model_id = pending.request, pending.model_id
        seq_id = getattr(request, "seq_id", None)
        if _makes_model(request):
            if queue is not None:  # its first future was thrown away long ago
                self._fail(pending, f"{model_id}: exists already; give another model_seq_id")
                return
            self._queues[model_id] = ModelQueue(pending.owner, ready=deque([pending]))
        elif queue is None or queue.closed:
            why = queue.closed if queue is not None else self._explain_lost(model_id, pending.owner)
            self._fail(pending, why or f"{model_id}: no such model", "server" if why else "user")
        elif seq_id is None:
            queue.ready.append(pending)
        elif seq_id < queue.next_seq_id:
            why = f"seq_id {seq_id} of {model_id} came after its turn was given up; start a new client"
            self._fail(pending, why)
        else:
            queue.out_of_order[seq_id] = pending
            queue.advance()

    def outcome(self, request_id: str, *, owner: str) -> RequestOutcome:
        """What is known now."""
        with self._lock:
            pending = self._requests.get(request_id)
            if pending is None and self._futures is not None:
                return self._futures.recall(request_id, owner)
            if pending is None or pending.owner != owner:
                return RequestOutcome("unknown")
            if not pending.settled:
                return RequestOutcome("pending", reason=self._reason(pending))
            if not pending.fetched:
                pending.fetched = time.monotonic()
                self._fetched.append(pending)
            return pending.outcome

    def _reason(self, pending: PendingRequest) -> str:
        if pending.running:
            return "running"
        if isinstance(pending, PendingSample):
            return f"{sum(usage.num_samples for usage in self._owners.values())} samples are waiting"
        queue = self._queues.get(pending.model_id)
        if queue is not None and queue.gap:
            return f"waiting for request {queue.next_seq_id} of this model, which has not arrived"
        return f"{sum(1 for other in self._queues.values() if other.ready)} models have work waiting"

    def when_done(self, request_id: str, call: Callable[[], None]) -> None:
        """Calls `call` once, from any thread, when the future is no longer pending (at once if it is not)."""
        with self._locked():
            pending = self._requests.get(request_id)
            calls = self._due if pending is None or pending.settled else pending.callbacks
            calls.append(call)

    def on_tokens(self, request_id: str, call: Callable[[int, Ints], None]) -> None:
        """Calls `call(sample, tokens)` with the tokens of a streamed request that were not told before, as they are
        drawn, and at once with those that are there already. From any thread; it must not wait. A result may hold
        more tokens than were told."""
        with self._lock:
            pending = self._requests.get(request_id)
            if isinstance(pending, PendingSample) and not pending.settled:
                for number, tokens in pending.streamed:
                    call(number, tokens)
                pending.readers.append(call)

    def cancel(self, request_id: str, *, owner: str) -> None:
        """Withdraws a sample that is not done; for anything else nothing happens. One that runs is taken out by the
        worker a moment later."""
        with self._locked():
            pending = self._requests.get(request_id)
            if not isinstance(pending, PendingSample) or pending.owner != owner or pending.settled:
                return
            if pending.running:
                pending.cancelled = True
                self._cancelled.append(pending)
                self._lock.notify_all()
            else:
                usage = self._owners[owner]
                usage.samples.remove(pending)
                usage.num_samples -= pending.request.num_samples
                self._fail(pending, "cancelled by the client")

    def open_model(self, model_id: str, *, owner: str) -> dict[str, Any]:
        """Facts for get_info: {"base_model", "is_lora", "lora_rank", "train_mlp", "train_attn", "train_unembed"}.
        Raises UserError when there is no such model."""
        with self._lock:
            queue = self._queues.get(model_id)
            if queue is None or queue.owner != owner or queue.info is None:
                raise UserError(f"{model_id}: no such model, or it is not ready")
            return dict(queue.info)

    # ---- the worker's side -----------------------------------------------------------------------------------------

    def wait(self, seconds: float) -> None:
        """Returns when there may be work, or after so many seconds."""
        with self._lock:
            if not self.has_pending_work():
                gaps = any(queue.out_of_order for queue in self._queues.values())
                self._lock.wait(min(seconds, self.gap_seconds / 4) if gaps else seconds)

    def has_pending_work(self) -> bool:
        """Whether something waits to be taken."""
        with self._lock:
            samples = any(usage.samples for usage in self._owners.values())
            return bool(self._cancelled) or samples or any(queue.ready for queue in self._queues.values())

    def take_training(self, batch_key: Callable[[TrainRequest], Any], max_tokens: int) -> list[PendingRequest]:
        """The next work of models: the request that waited longest for its turn and, when that is a TrainRequest, the
        first request of every other model with an equal `batch_key`, up to `max_tokens` tokens in all. [] when
        idle."""
        with self._lock:
            self._give_up_gaps()
            queues = sorted((queue for queue in self._queues.values() if queue.ready), key=lambda queue: queue.served)
            batch: list[PendingRequest] = []
            tokens = 0
            for queue in queues:
                request = queue.ready[0].request
                joins = isinstance(request, TrainRequest) and not request.problem
                size = sum(len(datum.tokens) for datum in request.data) if joins else 0
                if batch:
                    if not joins or batch_key(request) != batch_key(batch[0].request) or tokens + size > max_tokens:
                        continue
                queue.served = next(self._clock)
                batch.append(queue.ready.popleft())
                batch[-1].running = True
                tokens += size
                if not joins:
                    break
            return batch

    def _give_up_gaps(self) -> None:
        for queue in self._queues.values():
            if queue.gap:
                first = min(queue.out_of_order)
                if time.monotonic() - queue.out_of_order[first].arrived >= self.gap_seconds:
                    queue.next_seq_id = first
                    queue.advance()

    def take_samples(self, room: int, *, without: frozenset[str] = frozenset()) -> list[PendingSample]:
        """Sample requests for about `room` more sequences, one owner after the other in turn, none of `without`."""
        taken: list[PendingSample] = []
        with self._lock:
            while room > 0:
                waiting = (owner for owner, usage in self._owners.items() if usage.samples and owner not in without)
                owner = next(waiting, None)
                if owner is None:
                    break
                self._owners.move_to_end(owner)
                pending = self._owners[owner].samples.popleft()
                pending.running = True
                self._owners[owner].num_samples -= pending.request.num_samples
                room -= min(pending.request.num_samples, LARGE_SAMPLE)
                taken.append(pending)
        return taken

    def progress(self, pending: PendingSample, number: int, tokens: Ints) -> None:
        """Tells the readers of a streamed request more tokens of one of its samples."""
        with self._lock:  # also around the calls: nobody may hear them in another order
            if not pending.settled:
                pending.streamed.append((number, tokens))
                for call in pending.readers:
                    call(number, tokens)

    def take_cancelled(self) -> list[PendingSample]:
        """Running samples that their clients withdrew since the last call."""
        with self._lock:
            taken, self._cancelled = [pending for pending in self._cancelled if not pending.settled], []
        return taken

    def done(self, pending: PendingRequest, result: Result) -> None:
        """Settles a future with its result, which is on record before anybody is told."""
        if self._futures is not None and not pending.settled:
            self._futures.record(pending.request_id, pending.owner, pending.request, result)
        with self._locked():
            self._settle(pending, RequestOutcome("done", result=result))

    def failed(self, pending: PendingRequest, error: Exception) -> None:
        """Settles a future with an error; one that nobody foresaw is called the server's."""
        category: Category = getattr(error, "category", "user" if isinstance(error, UserError) else "server")
        with self._locked():
            self._fail(pending, str(error), category)

    def _fail(self, pending: PendingRequest, why: str, category: Category = "user") -> None:
        self._settle(pending, RequestOutcome("failed", error=why, category=category))

    def opened(self, model_id: str, info: dict[str, Any]) -> None:
        """A model exists now; `info` is what open_model answers."""
        with self._lock:
            if model_id in self._queues:
                self._queues[model_id].info = info

    def closed(self, model_id: str, why: str, *, forget: bool = False) -> None:
        """A model is gone: what waits for it fails with `why`, and so does what comes later. forget: it never was,
        and its name does not belong to who asked for it."""
        with self._locked():
            queue = self._queues.pop(model_id, None)
            if queue is None:
                return
            queue.closed, queue.info = why, None
            if not forget:
                self._queues[model_id] = queue  # to the end: the first closed ones are the oldest
                closed = [name for name, one in self._queues.items() if one.closed]
                for name in closed[: max(0, len(closed) - CLOSED_MODELS)]:
                    del self._queues[name]
            for pending in queue.clear():
                self._fail(pending, why)

    def models(self) -> list[str]:
        """The open models."""
        with self._lock:
            return [name for name, queue in self._queues.items() if not queue.closed]

    def close(self, why: str) -> None:
        """Accepts nothing more, and fails what waits."""
        with self._locked():
            self._closed = why
            for queue in self._queues.values():
                queue.clear()
            for usage in self._owners.values():
                usage.samples.clear()
                usage.num_samples = 0
            for pending in [one for one in self._requests.values() if not (one.running or one.settled)]:
                self._fail(pending, why, "server")
            self._lock.notify_all()

    # ---- what is kept of settled ones ------------------------------------------------------------------------------

    def _settle(self, pending: PendingRequest, outcome: RequestOutcome) -> None:
        """Lets go of what a request brought, and keeps its outcome as long as there is room."""
        if pending.settled:
            return
        pending.outcome, pending.finished = outcome, time.monotonic()
        self._due += pending.callbacks
        pending.request, pending.callbacks = None, []
        if isinstance(pending, PendingSample):
            pending.streamed, pending.readers, pending.answer = [], [], None
        pending.kept_bytes += _array_bytes(outcome.result)
        usage = self._owners[pending.owner]
        usage.request_bytes -= pending.request_bytes
        usage.settled[pending.request_id] = pending
        usage.kept_bytes += pending.kept_bytes
        while sum(one.kept_bytes for one in self._owners.values()) > RESULT_BYTES:
            most = max(self._owners.values(), key=lambda one: one.kept_bytes - pending.kept_bytes * (one is usage))
            oldest = next(iter(most.settled.values()), pending)
            if oldest is pending:
                return  # this one is all there is
            self._remove(oldest)

    def _prune(self) -> None:
        """Forgets old futures: fetched ones after a while, others after an hour."""
        now = time.monotonic()
        while self._fetched and now - self._fetched[0].fetched >= FETCHED_SECONDS:
            self._remove(self._fetched.popleft())
        for usage in self._owners.values():
            while usage.settled and now - (oldest := next(iter(usage.settled.values()))).finished >= KEEP_SECONDS:
                self._remove(oldest)

    def _remove(self, pending: PendingRequest) -> None:
        if self._requests.pop(pending.request_id, None) is None:
            return
        pending.outcome = RequestOutcome("unknown")  # lists may hold the request itself a little longer
        usage = self._owners[pending.owner]
        del usage.settled[pending.request_id]
        usage.kept_bytes -= pending.kept_bytes
        if pending.key is not None and self._by_key.get(pending.key) is pending:
            del self._by_key[pending.key]


def _array_bytes(thing: Any) -> int:
    """Memory of the arrays that a request or a result holds, wherever they are in it."""
    if isinstance(thing, np.ndarray):
        return 128 + thing.nbytes
    parts = thing if isinstance(thing, (list, tuple)) else thing.values() if isinstance(thing, dict) else ()
    return sum(map(_array_bytes, parts or getattr(thing, "__dict__", {}).values()))


def _makes_model(request: Request) -> bool:
    return isinstance(request, CreateModel) or (isinstance(request, LoadWeights) and request.model_id is None)


def _place(request: Request) -> tuple[str, Key | None]:
    """The model whose queue a request joins ("" = none) and the key that makes two posts the same request."""
    if isinstance(request, SamplingRequest):
        session = request.sampling_session_id
        return "", None if session is None else ("sample", session, request.seq_id)
    if isinstance(request, (CreateModel, LoadWeights)) and _makes_model(request):
        model_id = f"{request.session_id}:train:{request.model_seq_id}"
        return model_id, ("create", model_id)
    assert request.model_id is not None
    if isinstance(request, UnloadModel):
        return request.model_id, ("unload", request.model_id)
    return request.model_id, None if request.seq_id is None else ("model", request.model_id, request.seq_id)
