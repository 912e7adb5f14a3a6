"""Where requests wait: order by seq_id, one run per request however often it is posted, fairness, futures.

Pure bookkeeping under one lock, without torch, HTTP or disk. The front doors submit and ask for outcomes from their
threads; the worker takes work and settles futures from its own.

A model's requests run by seq_id, not by arrival, because the client posts the chunks of one call in parallel. What is
shared is shared between clients: owners of keys, or without keys (`by_session`) sessions.
"""

from __future__ import annotations

import itertools
import threading
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from skyrl.envs import clock
from skyrl.service.messages import (
    Category,
    CreateModel,
    LoadWeights,
    Request,
    RequestOutcome,
    Result,
    SamplingRequest,
    TooManyRequests,
    TrainRequest,
    UnloadModel,
)
from skyrl.service.pending import NAME_BYTES, ClientUsage, Key, ModelQueue, PendingRequest, PendingSample
from skyrl.service.storage.database import FutureLog
from skyrl.service.storage.records import ModelInfo
from skyrl.tracking.trace import RequestLog
from skyrl.types import Ints, UserError

KEEP_SECONDS = 3600.0  # a result stays fetchable this long after it was made
FETCHED_SECONDS = 120.0  # a result that was fetched is kept for repeated polls this long
RESULT_BYTES = 2 << 30  # results that wait to be fetched; beyond it the oldest of who has most are thrown away
WAITING_BYTES = 2 << 30  # of requests that wait or run, shared by the owners that have some
WAITING_REQUESTS = 4096  # of one model
CLOSED_MODELS = 4096  # closed models of which the scheduler itself knows why; of older ones the record does
RECENT_SECONDS = 5.0  # a client that asked for something so lately shares the ranks with the others
LARGE_SAMPLE = 64  # a request for more samples takes the place of so many: it is drawn in parts
CHUNK_ROWS, CHUNK_BYTES = 1024, 5_000_000  # clients cut a forward_backward into requests of at most so much
SCALARS = (str, int, float, bool, type(None))
CANCELLED = "cancelled by the client"
ENDED = "its session has ended; go on with a new service client"


class RequestScheduler:
    """Where requests wait, thread-safe: the front doors' side, and the worker's."""

    def __init__(
        self,
        *,
        gap_seconds: float = 30.0,
        max_queued_samples: int = 4096,
        by_session: bool = False,
        hold_seconds: float = 0.0,
        futures: FutureLog | None = None,
        explain_lost: Callable[[str, str], str] = lambda model_id, owner: "",
    ) -> None:
        """futures: records answers, knows those of earlier servers, and which sessions live. explain_lost(model_id,
        owner): why a model that is not open is gone, "" when it never was.

        hold_seconds: no failure of a forward_backward is told earlier than so long after it came. The client's library
        fetches it at once, on its own, while the program's next request is on its way: that one counts as queued."""
        self.gap_seconds, self.max_queued_samples = gap_seconds, max_queued_samples
        self._by_session, self._hold_seconds = by_session, hold_seconds
        self._lock = threading.Condition()
        self._requests: dict[str, PendingRequest] = {}
        self._by_key: dict[Key, PendingRequest] = {}
        self._clients: dict[str, ClientUsage] = {}  # that have anything
        self._turns: OrderedDict[str, ClientUsage] = OrderedDict()  # those whose samples wait, the next one first
        self._posting: set[str] = set()  # those with requests that wait or run
        self._seen: dict[str, float] = {}  # when each client asked for something, unless that is long ago
        self._waiting_samples, self._request_bytes, self._kept_bytes = 0, 0, 0  # of all clients together
        self._queues: dict[str, ModelQueue] = {}  # of models that are open, or being made
        self._ready: dict[str, ModelQueue] = {}  # those with work to take
        self._gaps: dict[str, ModelQueue] = {}  # those that wait for a number
        self._gone: OrderedDict[str, tuple[str, str]] = OrderedDict()  # closed model -> (owner, why)
        self._settled: deque[PendingRequest] = deque()  # oldest first
        self._fetched: deque[PendingRequest] = deque()
        self._held: deque[tuple[float, PendingRequest, str, Category]] = deque()  # failures to tell, and when
        self._cancelled: list[PendingSample] = []
        self._due: deque[Callable[[], None]] = deque()
        self._clock = itertools.count(1)
        self.log = RequestLog(clock.now())
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
        model_id, session, key = _place(request)
        key = None if key is None else (owner, *key)
        lost = ""
        if model_id and not (model_id in self._queues or model_id in self._gone or makes_model(request)):
            lost = self._explain_lost(model_id, owner)  # it reads the disk, for which nobody else should wait
        with self._locked():
            if self._closed:
                raise TooManyRequests(self._closed)
            ended = False
            if self._futures is not None and session:  # its client lives, whatever becomes of the request
                ended = not self._futures.touch(model_id or session, owner)
            if key is not None and key in self._by_key:
                return self._by_key[key]
            queue = self._queues.get(model_id)
            if owner != (queue.owner if queue is not None else self._gone.get(model_id, (owner,))[0]):
                raise UserError(f"{model_id}: no such model")
            client = session if self._by_session and session else owner
            size, usage = 1024 + _array_bytes(request), self._clients.get(client) or ClientUsage()
            self._check_bytes(request, client, usage, queue, size)
            request_id = uuid.uuid4().hex if self._futures is None else self._futures.new_id()
            pending = PendingRequest(request_id, request, owner, client, session, model_id, key)
            if isinstance(request, SamplingRequest):
                own, most = usage.num_samples, self.max_queued_samples // len({*self._turns, client})
                if own and own + request.num_samples > most:  # who has none waiting may always have some
                    raise TooManyRequests(f"{own} samples are waiting, at most {most} may; try again in a moment")
                number = min(request.num_samples, self.max_queued_samples)
                pending = PendingSample(request_id, request, owner, client, session, model_id, key, num_samples=number)
                pending.kept_bytes += NAME_BYTES * number
            self._prune()
            pending.request_bytes = size
            usage = self._clients.setdefault(client, usage)
            usage.request_bytes += size
            self._request_bytes += size
            self._posting.add(client)
            self._seen[client] = pending.arrived
            self._requests[request_id] = pending
            if key is not None:
                self._by_key[key] = pending
            if ended and queue is not None:  # of samples the worker says so
                self._fail(pending, f"{model_id}: {ENDED}")
            elif isinstance(pending, PendingSample) and isinstance(request, SamplingRequest):
                usage.samples.append(pending)
                usage.num_samples += request.num_samples
                self._waiting_samples += request.num_samples
                self._turns.setdefault(client, usage)
            else:
                self._queue_for_model(pending, queue, lost)
            self._lock.notify_all()
        return pending

    def _check_bytes(
        self, request: Request, client: str, usage: ClientUsage, queue: ModelQueue | None, size: int
    ) -> None:
        """Memory for what waits. The request for which a model's later ones wait always has room."""
        if queue is not None:
            first = getattr(request, "seq_id", None) == queue.next_seq_id and not queue.ready
            if first and queue.out_of_order:
                return
            waiting = len(queue.ready) + len(queue.out_of_order)
            if waiting >= WAITING_REQUESTS and not first:
                raise TooManyRequests(f"{waiting} requests of this model are waiting; try again in a moment")
        own = usage.request_bytes
        most = WAITING_BYTES // len({*self._posting, client})
        if own and own + size > most:
            raise TooManyRequests(
                f"{own >> 20} MiB of requests are waiting, at most {most >> 20} may; try again in a moment"
            )
        if self._request_bytes + size > 2 * WAITING_BYTES:  # of very many clients
            raise TooManyRequests(f"{self._request_bytes >> 20} MiB of requests are waiting; try again in a moment")

    def _queue_for_model(self, pending: PendingRequest, queue: ModelQueue | None, lost: str) -> None:
        """`lost`: why a model is gone of which only the record knows."""
        request, model_id = pending.request, pending.model_id
        seq_id = getattr(request, "seq_id", None)
        if makes_model(request):
            if queue is not None or model_id in self._gone:  # its first future was thrown away long ago
                self._fail(pending, f"{model_id}: exists already; give another model_seq_id")
                return
            queue = self._queues[model_id] = ModelQueue(pending.owner, ready=deque([pending]))
        elif queue is None:
            _, why = self._gone.get(model_id, ("", lost))
            self._fail(pending, why or f"{model_id}: no such model", "server" if why else "user")
            return
        elif seq_id is None:
            queue.ready.append(pending)
        elif seq_id < queue.next_seq_id:
            why = f"seq_id {seq_id} of {model_id} came after its turn was given up; start a new client"
            self._fail(pending, why)
            return
        else:
            queue.out_of_order[seq_id] = pending
            queue.advance()
        failure = queue.failure
        if failure is not None and failure.fetched and not _may_be_one_call(queue, pending.request_bytes):
            pending.known_failure = failure
        self._note(model_id, queue)

    def _note(self, model_id: str, queue: ModelQueue) -> None:
        """Keeps the lists of queues with work, and of those that wait for a number."""
        for lists, belongs in ((self._ready, bool(queue.ready)), (self._gaps, queue.gap)):
            if belongs:
                lists[model_id] = queue
            else:
                lists.pop(model_id, None)

    def outcome(self, request_id: str, *, owner: str) -> RequestOutcome:
        """What is known now."""
        with self._lock:
            pending = self._requests.get(request_id)
            if pending is not None and pending.owner == owner:
                if not pending.settled:
                    return RequestOutcome("pending", reason=self._reason(pending))
                if not pending.fetched:
                    pending.fetched = clock.now()
                    self._fetched.append(pending)
                return pending.outcome
        if pending is None and self._futures is not None:  # on the disk, so nobody's work waits for it
            return self._futures.recall(request_id, owner)
        return RequestOutcome("unknown")

    def _reason(self, pending: PendingRequest) -> str:
        if pending.started:
            return "running"
        if isinstance(pending, PendingSample):
            return f"{self._waiting_samples} samples are waiting"
        queue = self._queues.get(pending.model_id)
        if queue is not None and queue.gap:
            return f"waiting for request {queue.next_seq_id} of this model, which has not arrived"
        return f"{len(self._ready)} models have work waiting"

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
            if isinstance(pending, PendingSample) and pending.owner == owner:
                self._withdraw(pending, CANCELLED)

    def _withdraw(self, pending: PendingSample, why: str) -> None:
        if pending.settled or pending.cancelled:
            return
        if pending.started:
            pending.cancelled = why
            self._cancelled.append(pending)
            self._lock.notify_all()
            return
        self._clients[pending.client].samples.remove(pending)
        self._leave(pending)
        self._fail(pending, why)

    def _leave(self, pending: PendingSample) -> None:
        """A sample does not wait any longer."""
        usage = self._clients[pending.client]
        usage.num_samples -= pending.request.num_samples
        self._waiting_samples -= pending.request.num_samples
        if not usage.samples:
            del self._turns[pending.client]

    def open_model(self, model_id: str, *, owner: str) -> ModelInfo:
        """What an open model is. Raises UserError when there is no such model."""
        with self._lock:
            queue = self._queues.get(model_id)
            if queue is None or queue.owner != owner or queue.info is None:
                raise UserError(f"{model_id}: no such model, or it is not ready")
            return queue.info

    # ---- the worker's side -----------------------------------------------------------------------------------------

    def wait(self, seconds: float) -> None:
        """Returns when there may be work, or after so many seconds."""
        with self._lock:
            if not self.has_pending_work():
                seconds = min(seconds, self.gap_seconds / 4) if self._gaps else seconds
                self._lock.wait(min(seconds, self._hold_seconds / 4) if self._held else seconds)

    def has_pending_work(self, *, training: bool = True) -> bool:
        """Whether something waits; `training` False: of samples alone. No lock: each step of the sampler asks."""
        return bool(self._cancelled or self._turns or training and self._ready)

    def take_training(self, batch_key: Callable[[TrainRequest], Any], max_tokens: int) -> list[PendingRequest]:
        """The next work of models: the request that waited longest for its turn and, when that is a TrainRequest, the
        first request of every other model with an equal `batch_key`, up to `max_tokens` tokens in all; while several
        clients are there, one of each. Clients have their turns, and each one's models in theirs. [] when idle."""
        with self._locked():
            now = clock.now()
            self._tell_failures(now)
            self._give_up_gaps()
            self._seen = {one: at for one, at in self._seen.items() if now - at < RECENT_SECONDS}
            alone = len(self._seen.keys() | self._posting) < 2
            usage = {model_id: self._clients[queue.ready[0].client] for model_id, queue in self._ready.items()}
            queues = sorted(self._ready.items(), key=lambda pair: (usage[pair[0]].served, pair[1].served))
            batch: list[PendingRequest] = []
            tokens = 0
            for model_id, queue in queues:
                request = queue.ready[0].request
                joins = isinstance(request, TrainRequest) and not request.problem
                size = sum(len(datum.tokens) for datum in request.data) if joins else 0
                if batch:
                    if not joins or batch_key(request) != batch_key(batch[0].request) or tokens + size > max_tokens:
                        continue
                    if not alone and queue.ready[0].client in {one.client for one in batch}:
                        continue
                usage[model_id].served = queue.served = next(self._clock)
                batch.append(queue.ready.popleft())
                batch[-1].started = clock.now()
                self._note(model_id, queue)
                tokens += size
                if not joins:
                    break
            return batch

    def _give_up_gaps(self) -> None:
        for model_id, queue in list(self._gaps.items()):
            first = min(queue.out_of_order)
            if clock.now() - queue.out_of_order[first].arrived >= self.gap_seconds:
                queue.next_seq_id = first
                queue.advance()
                self._note(model_id, queue)

    def take_samples(self, room: int, *, without: frozenset[str] = frozenset()) -> list[PendingSample]:
        """Sample requests for about `room` more sequences, one client after the other in turn, none of `without`."""
        taken: list[PendingSample] = []
        with self._lock:
            while room > 0:
                client = next((client for client in self._turns if client not in without), None)
                if client is None:
                    break
                self._turns.move_to_end(client)
                pending = self._turns[client].samples.popleft()
                pending.started = clock.now()
                self._leave(pending)
                room -= min(pending.request.num_samples, LARGE_SAMPLE)
                taken.append(pending)
        return taken

    def withdraw(self, which: Callable[[PendingSample], bool], why: str) -> None:
        """Withdraws all samples of that kind that wait, with the reason."""
        with self._locked():
            for usage in list(self._turns.values()):
                for pending in [one for one in usage.samples if which(one)]:
                    self._withdraw(pending, why)

    def sampling_sessions(self) -> set[str]:
        """Sessions whose samples wait."""
        with self._lock:
            return {one.session for usage in self._turns.values() for one in usage.samples} - {""}

    def progress(self, pending: PendingSample, number: int, tokens: Ints) -> None:
        """Tells the readers of a streamed request more tokens of one of its samples."""
        with self._lock:  # also around the calls: nobody may hear them in another order
            if not pending.settled:
                pending.streamed.append((number, tokens))
                for call in pending.readers:
                    call(number, tokens)

    def take_cancelled(self) -> list[PendingSample]:
        """Running samples that were withdrawn since the last call; `cancelled` says why."""
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
        request, until = pending.request, pending.arrived + self._hold_seconds
        with self._locked():
            if isinstance(request, TrainRequest) and not request.forward_only and pending.model_id in self._queues:
                queue = self._queues[pending.model_id]
                queue.failure, queue.failed_rows = pending, len(request.data)
                if clock.now() < until:
                    self._held.append((until, pending, str(error), category))
                    return
            self._fail(pending, str(error), category)

    def _tell_failures(self, now: float) -> None:
        """Settles those forward_backwards that failed and came long enough before `now`."""
        if due := [held for held in self._held if held[0] <= now]:
            self._held = deque(held for held in self._held if held[0] > now)
        for _, pending, why, category in due:
            self._fail(pending, why, category)

    def knew_of_failure(self, pending: PendingRequest) -> bool:
        """Whether the client had fetched the failure of its model's last failed forward_backward before it posted this
        request, which then cannot be a part of the step that the failure ended."""
        with self._lock:
            queue = self._queues.get(pending.model_id)
            return queue is not None and queue.failure is not None and pending.known_failure is queue.failure

    def _fail(self, pending: PendingRequest, why: str, category: Category = "user") -> None:
        self._settle(pending, RequestOutcome("failed", error=why, category=category))

    def opened(self, model_id: str, info: ModelInfo) -> None:
        """A model exists now; `info` is what open_model answers."""
        with self._lock:
            if model_id in self._queues:
                self._queues[model_id].info = info

    def closed(self, model_id: str, why: str, *, forget: bool = False) -> None:
        """A model is gone: what waits for it fails with `why`, and so does what comes later. forget: it never was,
        and its name does not belong to who asked for it."""
        with self._locked():
            if (queue := self._queues.pop(model_id, None)) is None:
                return
            self._ready.pop(model_id, None)
            self._gaps.pop(model_id, None)
            if not forget:
                self._gone[model_id] = (queue.owner, why)
                if len(self._gone) > CLOSED_MODELS:
                    self._gone.popitem(last=False)
            for pending in [*queue.ready, *queue.out_of_order.values()]:
                self._fail(pending, why)

    def values(self) -> dict[str, float]:
        """For Prometheus: what waits and is open now, and counts since the start."""
        sizes = {"samples_waiting": self._waiting_samples, "request_bytes": self._request_bytes}
        return {**self.log.values(), **sizes, "models_open": len(self._queues), "result_bytes": self._kept_bytes}

    def why_gone(self, model_id: str) -> str:
        """Why a model is closed; "" when it is not, or was long ago."""
        with self._lock:
            return self._gone.get(model_id, ("", ""))[1]

    def close(self, why: str) -> None:
        """Accepts nothing more, and fails what waits."""
        with self._locked():
            self._closed = why
            self._tell_failures(float("inf"))
            for lists in (self._queues, self._ready, self._gaps, self._turns):
                lists.clear()
            for pending in [one for one in self._requests.values() if not (one.started or one.settled)]:
                self._fail(pending, why, "server")
            self._lock.notify_all()

    # ---- what is kept of settled ones ------------------------------------------------------------------------------

    def _settle(self, pending: PendingRequest, outcome: RequestOutcome) -> None:
        """Lets go of what a request brought, and keeps its outcome as long as there is room."""
        if pending.settled:
            return
        pending.outcome, pending.finished = outcome, clock.now()
        self._due += pending.callbacks
        self.log.add(pending)
        pending.request, pending.callbacks = None, []
        if isinstance(pending, PendingSample):
            pending.streamed, pending.readers, pending.answer = [], [], None
        pending.kept_bytes += _array_bytes(outcome.result)
        usage = self._clients[pending.client]
        usage.request_bytes -= pending.request_bytes
        self._request_bytes -= pending.request_bytes
        if not usage.request_bytes:
            self._posting.discard(pending.client)
        self._settled.append(pending)
        usage.settled[pending.request_id] = pending
        usage.kept_bytes += pending.kept_bytes
        self._kept_bytes += pending.kept_bytes
        while self._kept_bytes > RESULT_BYTES:
            most = max(self._clients.values(), key=lambda one: one.kept_bytes - pending.kept_bytes * (one is usage))
            oldest = next(iter(most.settled.values()), pending)
            if oldest is pending:
                return  # this one is all there is
            self._remove(oldest)

    def _prune(self) -> None:
        """Forgets old futures: fetched ones after a while, others after an hour."""
        now = clock.now()
        while self._fetched and now - self._fetched[0].fetched >= FETCHED_SECONDS:
            self._remove(self._fetched.popleft())
        while self._settled and now - self._settled[0].finished >= KEEP_SECONDS:
            self._remove(self._settled.popleft())

    def _remove(self, pending: PendingRequest) -> None:
        if self._requests.pop(pending.request_id, None) is None:
            return
        pending.outcome = RequestOutcome("unknown")  # lists may hold the request itself a little longer
        usage = self._clients[pending.client]
        del usage.settled[pending.request_id]
        usage.kept_bytes -= pending.kept_bytes
        self._kept_bytes -= pending.kept_bytes
        if not (usage.settled or usage.samples or usage.request_bytes):
            del self._clients[pending.client]
        if pending.key is not None and self._by_key.get(pending.key) is pending:
            del self._by_key[pending.key]


def _array_bytes(thing: Any) -> int:
    """Memory of the arrays that a request or a result holds, wherever they are in it."""
    if isinstance(thing, np.ndarray):
        return 128 + thing.nbytes
    parts = thing if isinstance(thing, (list, tuple)) else thing.values() if isinstance(thing, dict) else ()
    return sum(_array_bytes(x) for x in parts or getattr(thing, "__dict__", {}).values() if type(x) not in SCALARS)


def makes_model(request: Request) -> bool:
    """Whether the model of this request does not exist before it."""
    return isinstance(request, CreateModel) or (isinstance(request, LoadWeights) and request.model_id is None)


def _may_be_one_call(queue: ModelQueue, size: int) -> bool:
    """Whether a request of so many bytes may be the next part of the call whose last part failed. Clients cut a call
    only where it would exceed these limits."""
    assert queue.failure is not None
    return queue.failed_rows >= CHUNK_ROWS or queue.failure.request_bytes + size > CHUNK_BYTES


def _place(request: Request) -> tuple[str, str, Key | None]:
    """The model whose queue a request joins ("" = none), its session ("" = none), and the key that makes two posts the
    same request."""
    if isinstance(request, SamplingRequest):
        sampler = request.sampling_session_id
        if sampler is None:
            return "", "", None
        return "", sampler.partition(":")[0], ("sample", sampler, request.seq_id)
    if isinstance(request, (CreateModel, LoadWeights)) and makes_model(request):
        model_id = f"{request.session_id}:train:{request.model_seq_id}"
        return model_id, str(request.session_id), ("create", model_id)
    known: Any = request
    model_id = str(known.model_id)
    session = model_id.partition(":")[0]
    if isinstance(request, UnloadModel):
        return model_id, session, ("unload", model_id)
    return model_id, session, None if known.seq_id is None else ("model", model_id, known.seq_id)
