"""Where requests wait: order by seq_id, one run per request however often it is posted, fairness, futures.

Pure bookkeeping under one lock, without torch, HTTP or disk. The front doors submit and ask for outcomes from their
threads; the worker takes work and settles futures from its own.

Rules (shared/tinker protocol, sections 4 and 6): a model's requests run by seq_id, not by arrival, because the client
posts the chunks of one call in parallel. A number that never arrives is given up after `gap_seconds`. A repeated
number finds the first request's future.
"""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from skyrl.service.future_log import FutureLog
from skyrl.service.messages import (
    Accepted,
    Category,
    CreateModel,
    LoadWeights,
    OptimStep,
    Request,
    RequestFailed,
    RequestOutcome,
    Result,
    SampleResult,
    SamplingRequest,
    SaveWeights,
    TooManyRequests,
    TrainRequest,
    TrainResult,
    UnloadModel,
)
from skyrl.types import Ints, UserError

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
    """A request with its future. `model_id` is the model whose order it keeps, "" for samples."""

    request_id: str
    request: Request
    owner: str
    model_id: str
    key: Key | None
    accepted: Accepted
    arrived: float
    state: str = "waiting"  # waiting, running, done, failed
    result: Result | None = None
    error: str = ""
    category: Category = "unknown"
    finished: float = 0.0
    fetched: float = 0.0
    cancelled: bool = False
    notified: bool = False
    callbacks: list[Callable[[], None]] = field(default_factory=list)
    request_bytes: int = 0  # bytes of the request
    size: int = 0  # bytes of the result, and of what else is kept of it
    streamed: list[tuple[int, Ints]] = field(default_factory=list)  # tokens of a streamed sample, in the order drawn
    readers: list[Callable[[int, Ints], None]] = field(default_factory=list)


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


class RequestScheduler:
    """Where requests wait, thread-safe: the front doors' side, and the worker's."""

    def __init__(self, *, gap_seconds: float = 30.0, max_queued_samples: int = 4096) -> None:
        self.gap_seconds, self.max_queued_samples = gap_seconds, max_queued_samples
        self._lock = threading.Condition()
        self._requests: dict[str, PendingRequest] = {}
        self._by_key: dict[Key, PendingRequest] = {}
        # settled ones that are kept, by owner, oldest first
        self._ended: dict[str, OrderedDict[str, PendingRequest]] = {}
        self._ended_bytes: dict[str, int] = {}
        self._fetched: deque[PendingRequest] = deque()
        self._waiting_bytes: dict[str, int] = {}  # of owners that have requests waiting or running
        self._queues: dict[str, ModelQueue] = {}
        self._samples: dict[str, deque[PendingRequest]] = {}  # by owner
        self._sample_order: deque[str] = deque()
        self._queued = 0  # samples that wait
        self._queued_of: dict[str, int] = {}
        self._cancelled: list[PendingRequest] = []
        self._clock = itertools.count(1)
        self._closed = ""
        self._lost: Callable[[str, str], str] = lambda model_id, owner: ""
        self._record: FutureLog | None = None

    # ---- the front doors' side -------------------------------------------------------------------------------------

    def submit(self, request: Request, *, owner: str) -> Accepted:
        """Queues a request, or finds the earlier one of the same key (model and seq_id, session and seq_id): a
        repeated request is never run twice, and its answer is the first one's. Raises UserError for what is malformed
        or not the owner's, TooManyRequests."""
        with self._lock:
            if self._closed:
                raise TooManyRequests(self._closed)
            model_id, key = _place(request)
            key = None if key is None else (owner, *key)
            known = self._by_key.get(key) if key is not None else None
            if known is not None:
                return known.accepted
            queue = self._queues.get(model_id) if model_id else None
            if queue is not None and queue.owner != owner:
                raise UserError(f"{model_id}: no such model")
            size = _request_bytes(request)
            self._check_bytes(request, owner, queue, size)
            if isinstance(request, SamplingRequest):
                self._check_room(request, owner)
            pending = self._new_request(request, owner, model_id, key)
            pending.request_bytes = size
            self._waiting_bytes[owner] = self._waiting_bytes.get(owner, 0) + size
            if isinstance(request, SamplingRequest):
                self._queue_sample(pending)
            else:
                self._queue_for_model(pending, queue)
            if self._record is not None and queue is not None:
                self._record.touch(model_id)
            self._lock.notify_all()
        self._settled(pending)
        return pending.accepted

    def _new_request(self, request: Request, owner: str, model_id: str, key: Key | None) -> PendingRequest:
        request_id = uuid.uuid4().hex if self._record is None else self._record.new_id()
        ids: tuple[str, ...] = ()
        if isinstance(request, SamplingRequest):
            most = min(request.num_samples, self.max_queued_samples)  # of more, the request will be refused
            ids = tuple(f"{request_id}:{i}" for i in range(most))
        accepted = Accepted(request_id, model_id or None, ids)
        pending = PendingRequest(request_id, request, owner, model_id, key, accepted, time.monotonic())
        pending.size = FUTURE_BYTES + NAME_BYTES * len(ids)
        self._requests[request_id] = pending
        if key is not None:
            self._by_key[key] = pending
        self._prune()
        return pending

    def _check_room(self, request: SamplingRequest, owner: str) -> None:
        """Owners that have samples waiting share the places; one who has none may always have some."""
        own = self._queued_of.get(owner, 0)
        most = self.max_queued_samples // len({*self._queued_of, owner})
        if own and own + request.num_samples > most:
            raise TooManyRequests(f"{own} samples are waiting, at most {most} may; try again in a moment")

    def _check_bytes(self, request: Request, owner: str, queue: ModelQueue | None, size: int) -> None:
        """Memory for what waits. The request for which a model's later ones wait always has room."""
        if queue is not None:
            first = getattr(request, "seq_id", None) == queue.next_seq_id and not queue.ready
            if first and queue.out_of_order:
                return
            waiting = len(queue.ready) + len(queue.out_of_order)
            if waiting >= WAITING_REQUESTS and not first:
                raise TooManyRequests(f"{waiting} requests of this model are waiting; try again in a moment")
        own = self._waiting_bytes.get(owner, 0)
        most = WAITING_BYTES // len({*self._waiting_bytes, owner})
        if own and own + size > most:
            raise TooManyRequests(
                f"{own >> 20} MiB of requests are waiting, at most {most >> 20} may; try again in a moment"
            )

    def _queue_sample(self, pending: PendingRequest) -> None:
        if pending.owner not in self._samples:
            self._samples[pending.owner] = deque()
            self._sample_order.append(pending.owner)
        self._samples[pending.owner].append(pending)
        self._count_samples(pending, 1)

    def _count_samples(self, pending: PendingRequest, sign: int) -> None:
        """CheckpointService samples that wait (+1) or wait no longer (-1)."""
        number = sign * pending.request.num_samples
        self._queued += number
        self._queued_of[pending.owner] = self._queued_of.get(pending.owner, 0) + number
        if not self._queued_of[pending.owner]:
            del self._queued_of[pending.owner]

    def _queue_for_model(self, pending: PendingRequest, queue: ModelQueue | None) -> None:
        request = pending.request
        creates = isinstance(request, CreateModel) or (isinstance(request, LoadWeights) and request.model_id is None)
        if creates:
            if queue is not None:  # its first future was thrown away long ago
                self._fail(pending, f"{pending.model_id}: exists already; give another model_seq_id", "user")
                return
            queue = self._queues[pending.model_id] = ModelQueue(pending.owner)
            queue.ready.append(pending)
            return
        if queue is None or queue.closed:
            text = queue.closed if queue is not None else self._lost(pending.model_id, pending.owner)
            self._fail(pending, text or f"{pending.model_id}: no such model", "user" if not text else "server")
            return
        seq = getattr(request, "seq_id", None)
        if seq is None or isinstance(request, UnloadModel):
            queue.ready.append(pending)
        elif seq < queue.next_seq_id:
            self._fail(
                pending,
                f"seq_id {seq} of {pending.model_id} came after its turn was given up; start a new client",
                "user",
            )
        else:
            queue.out_of_order[seq] = pending
            _advance(queue)

    def outcome(self, request_id: str, *, owner: str) -> RequestOutcome:
        """What is known now."""
        with self._lock:
            pending = self._requests.get(request_id)
            if pending is None and self._record is not None:
                return self._record.recall(request_id, owner)
            if pending is None or pending.owner != owner:
                return RequestOutcome("unknown")
            if pending.state == "done":
                self._note_fetched(pending)
                return RequestOutcome("done", result=pending.result)
            if pending.state == "failed":
                self._note_fetched(pending)
                return RequestOutcome("failed", error=pending.error, category=pending.category)
            return RequestOutcome("pending", queue_state="active", reason=self._reason(pending))

    def _reason(self, pending: PendingRequest) -> str:
        if pending.state == "running":
            return "running"
        if pending.model_id:
            queue = self._queues.get(pending.model_id)
            if queue is not None and queue.out_of_order and min(queue.out_of_order) > queue.next_seq_id:
                return f"waiting for request {queue.next_seq_id} of this model, which has not arrived"
            ahead = sum(1 for other in self._queues.values() if other.ready)
            return f"{ahead} models have work waiting"
        return f"{self._queued} samples are waiting"

    def when_done(self, request_id: str, call: Callable[[], None]) -> None:
        """Calls `call` once, from any thread, when the future is no longer pending (at once if it is not)."""
        with self._lock:
            pending = self._requests.get(request_id)
            if pending is not None and pending.state in ("waiting", "running"):
                pending.callbacks.append(call)
                return
        call()

    def on_tokens(self, request_id: str, call: Callable[[int, Ints], None]) -> None:
        """Calls `call(sample, tokens)` with the tokens of a streamed request that were not told before, as they are
        drawn, and at once with those that are there already. From any thread; it must not wait. A result may hold
        more tokens than were told."""
        with self._lock:
            pending = self._requests.get(request_id)
            if pending is not None and pending.state in ("waiting", "running"):
                for number, tokens in pending.streamed:
                    call(number, tokens)
                pending.readers.append(call)

    def cancel(self, request_id: str, *, owner: str) -> None:
        """Withdraws a sample that is not done; for anything else nothing happens. One that runs is taken out by the
        worker a moment later."""
        with self._lock:
            pending = self._requests.get(request_id)
            if pending is None or pending.owner != owner or not isinstance(pending.request, SamplingRequest):
                return
            if pending.state == "waiting":
                self._samples[owner].remove(pending)
                self._count_samples(pending, -1)
                self._fail(pending, "cancelled by the client", "user")
            elif pending.state == "running":
                pending.cancelled = True
                self._cancelled.append(pending)
                self._lock.notify_all()
        self._settled(pending)

    def open_model(self, model_id: str, *, owner: str) -> dict[str, Any]:
        """Facts for get_info: {"base_model", "is_lora", "lora_rank", "train_mlp", "train_attn", "train_unembed"}.
        Raises UserError when there is no such model."""
        with self._lock:
            queue = self._queues.get(model_id)
            if queue is None or queue.owner != owner or queue.info is None:
                raise UserError(f"{model_id}: no such model, or it is not ready")
            return dict(queue.info)

    # ---- the worker's side -----------------------------------------------------------------------------------------

    def keep_record(self, record: FutureLog) -> None:
        """From now on tells `record` of every future, and asks it for those of earlier servers."""
        self._record = record

    def explain_lost(self, call: Callable[[str, str], str]) -> None:
        """`call(model_id, owner)` says why a model that is not open is gone, or "" when it never was."""
        self._lost = call

    def wait(self, seconds: float) -> None:
        """Returns when there may be work, or after so many seconds."""
        with self._lock:
            if not self._has_work():
                self._lock.wait(self._until_gap(seconds))

    def has_pending_work(self) -> bool:
        """Whether something waits to be taken."""
        with self._lock:
            return self._has_work()

    def _has_work(self) -> bool:
        return bool(self._cancelled) or self._queued > 0 or any(queue.ready for queue in self._queues.values())

    def _until_gap(self, seconds: float) -> float:
        return (
            min(seconds, self.gap_seconds / 4)
            if any(queue.out_of_order for queue in self._queues.values())
            else seconds
        )

    def take_training(self, batch_key: Callable[[TrainRequest], Any], max_tokens: int) -> list[PendingRequest]:
        """The next work of models: the request that waited longest for its turn and, when that is a TrainRequest, the
        first request of every other model with an equal `batch_key`, up to `max_tokens` tokens in all. [] when idle."""
        with self._lock:
            self._give_up_gaps()
            queues = sorted((queue for queue in self._queues.values() if queue.ready), key=lambda queue: queue.served)
            if not queues:
                return []
            batch = [self._pop(queues[0])]
            first = batch[0].request
            if isinstance(first, TrainRequest) and not first.problem:
                tokens, kind = _tokens(first), batch_key(first)
                for queue in queues[1:]:
                    request = queue.ready[0].request
                    if not isinstance(request, TrainRequest) or request.problem or batch_key(request) != kind:
                        continue
                    if tokens + _tokens(request) > max_tokens:
                        continue
                    tokens += _tokens(request)
                    batch.append(self._pop(queue))
            return batch

    def _pop(self, queue: ModelQueue) -> PendingRequest:
        queue.served = next(self._clock)
        pending = queue.ready.popleft()
        pending.state = "running"
        return pending

    def _give_up_gaps(self) -> None:
        now = time.monotonic()
        for queue in self._queues.values():
            if queue.out_of_order and queue.next_seq_id not in queue.out_of_order:
                first = min(queue.out_of_order)
                if now - queue.out_of_order[first].arrived >= self.gap_seconds:
                    queue.next_seq_id = first
                    _advance(queue)

    def take_samples(self, room: int, *, without: frozenset[str] = frozenset()) -> list[PendingRequest]:
        """Sample requests for about `room` more sequences, one owner after the other in turn, none of `without`."""
        taken: list[PendingRequest] = []
        with self._lock:
            while room > 0 and self._queued_of.keys() - without:
                owner = self._sample_order[0]
                self._sample_order.rotate(-1)
                if owner in without or not self._samples[owner]:
                    continue
                pending = self._samples[owner].popleft()
                pending.state = "running"
                self._count_samples(pending, -1)
                room -= min(pending.request.num_samples, LARGE_SAMPLE)
                taken.append(pending)
        return taken

    def progress(self, pending: PendingRequest, number: int, tokens: Ints) -> None:
        """Tells the readers of a streamed request more tokens of one of its samples."""
        with self._lock:  # also around the calls: nobody may hear them in another order
            if pending.state == "running":
                pending.streamed.append((number, tokens))
                for call in pending.readers:
                    call(number, tokens)

    def take_cancelled(self) -> list[PendingRequest]:
        """Running samples that their clients withdrew since the last call."""
        with self._lock:
            taken, self._cancelled = [pending for pending in self._cancelled if pending.state == "running"], []
        return taken

    def done(self, pending: PendingRequest, result: Result) -> None:
        """Settles a future with its result."""
        with self._lock:
            if pending.state in ("done", "failed"):
                return
            pending.state, pending.result, pending.finished = "done", result, time.monotonic()
            self._lock.notify_all()
        self._settled(pending)

    def failed(self, pending: PendingRequest, error: RequestFailed) -> None:
        """Settles a future with an error."""
        with self._lock:
            self._fail(pending, error.message, error.category)
        self._settled(pending)

    def _fail(self, pending: PendingRequest, message: str, category: Category) -> None:
        if pending.state in ("done", "failed"):
            return
        pending.state, pending.error, pending.category, pending.finished = "failed", message, category, time.monotonic()

    def opened(self, model_id: str, info: dict[str, Any]) -> None:
        """A model exists now; `info` is what open_model answers."""
        with self._lock:
            if model_id in self._queues:
                self._queues[model_id].info = info

    def closed(self, model_id: str, why: str, *, forget: bool = False) -> None:
        """A model is gone: what waits for it fails with `why`, and so does what comes later. forget: it never was,
        and its name does not belong to who asked for it."""
        with self._lock:
            queue = self._queues.get(model_id)
            if queue is None:
                return
            queue.closed, queue.info = why, None
            del self._queues[model_id]
            if not forget:
                self._queues[model_id] = queue  # to the end: the first closed ones are the oldest
                self._forget_closed()
            batch = [*queue.ready, *queue.out_of_order.values()]
            queue.ready.clear()
            queue.out_of_order.clear()
            for pending in batch:
                self._fail(pending, why, "user")
        for pending in batch:
            self._settled(pending)

    def models(self) -> list[str]:
        """The open models."""
        with self._lock:
            return [name for name, queue in self._queues.items() if not queue.closed]

    def close(self, why: str) -> None:
        """Accepts nothing more, and fails what waits."""
        with self._lock:
            self._closed = why
            batch = [pending for pending in self._requests.values() if pending.state == "waiting"]
            for pending in batch:
                self._fail(pending, why, "server")
            for queue in self._queues.values():
                queue.ready.clear()
                queue.out_of_order.clear()
            self._samples.clear()
            self._sample_order.clear()
            self._queued = 0
            self._queued_of.clear()
            self._lock.notify_all()
        for pending in batch:
            self._settled(pending)

    def _settled(self, pending: PendingRequest) -> None:
        """Calls who waits for a settled request, once; outside of the lock, because they may ask the scheduler."""
        with self._lock:
            if pending.state not in ("done", "failed") or pending.notified:
                return
            pending.notified = True
            calls, pending.callbacks = pending.callbacks, []
            result = pending.result
            self._keep(pending)
        if self._record is not None and result is not None:
            self._record.record(pending.request_id, pending.owner, pending.request, result)
        for call in calls:
            call()

    # ---- what is kept of settled ones ------------------------------------------------------------------------------

    def _keep(self, pending: PendingRequest) -> None:
        """Lets go of what a request brought, and keeps its result as long as there is room."""
        pending.request, pending.streamed, pending.readers = _without_data(pending.request), [], []
        self._waiting_bytes[pending.owner] -= pending.request_bytes
        if not self._waiting_bytes[pending.owner]:
            del self._waiting_bytes[pending.owner]
        pending.size += _result_bytes(pending.result)
        self._ended.setdefault(pending.owner, OrderedDict())[pending.request_id] = pending
        self._ended_bytes[pending.owner] = self._ended_bytes.get(pending.owner, 0) + pending.size
        while sum(self._ended_bytes.values()) > RESULT_BYTES:
            others = {
                owner: size - (pending.size if owner == pending.owner else 0)
                for owner, size in self._ended_bytes.items()
            }
            most = max(others, key=lambda owner: others[owner])
            if not others[most]:
                return  # this one is all there is
            self._remove(next(iter(self._ended[most].values())))

    def _note_fetched(self, pending: PendingRequest) -> None:
        if not pending.fetched:
            pending.fetched = time.monotonic()
            self._fetched.append(pending)

    def _prune(self) -> None:
        """Forgets old futures: fetched ones after a while, others after an hour."""
        now = time.monotonic()
        while self._fetched and now - self._fetched[0].fetched >= FETCHED_SECONDS:
            self._remove(self._fetched.popleft())
        for batch in list(self._ended.values()):
            while batch and now - (oldest := next(iter(batch.values()))).finished >= KEEP_SECONDS:
                self._remove(oldest)

    def _remove(self, pending: PendingRequest) -> None:
        if self._requests.pop(pending.request_id, None) is None:
            return
        pending.result = None  # lists may hold the request itself a little longer
        del self._ended[pending.owner][pending.request_id]
        self._ended_bytes[pending.owner] -= pending.size
        if not self._ended[pending.owner]:
            del self._ended[pending.owner], self._ended_bytes[pending.owner]
        if pending.key is not None and self._by_key.get(pending.key) is pending:
            del self._by_key[pending.key]

    def _forget_closed(self) -> None:
        dead = [name for name, queue in self._queues.items() if queue.closed]
        for name in dead[: max(0, len(dead) - CLOSED_MODELS)]:
            del self._queues[name]


def _request_bytes(request: Request) -> int:
    """Memory of the arrays that a request holds, and some for itself."""
    if isinstance(request, TrainRequest):
        arrays = [array for datum in request.data for array in (datum.tokens, *datum.inputs.values())]
        return 1024 + sum(256 + array.nbytes for array in arrays)
    if isinstance(request, SamplingRequest):
        csr = 0 if request.targets_csr is None else sum(part.nbytes for part in request.targets_csr)
        return 1024 + request.prompt.nbytes + (0 if request.targets is None else request.targets.nbytes) + csr
    return 1024


def _result_bytes(result: Result | None) -> int:
    if isinstance(result, TrainResult):
        return sum(256 + array.nbytes for array in result.logprobs)
    if not isinstance(result, SampleResult):
        return 0
    tables = [one.topk for one in result.sequences] + [result.topk_prompt]
    arrays = [array for one in result.sequences for array in (one.tokens, one.logprobs)]
    arrays += [array for table in tables if table is not None for array in (table.token_ids, table.logprobs)]
    arrays += [result.prompt_logprobs, result.targets, result.alt_tokens, result.alt_logprobs]
    return sum(128 + array.nbytes for array in arrays if array is not None)


def _without_data(request: Request) -> Request:
    """What is left of a request when nobody computes with it any more."""
    if isinstance(request, TrainRequest):
        return replace(request, data=[])
    if isinstance(request, SamplingRequest):
        return replace(request, prompt=request.prompt[:0].copy(), targets=None, targets_csr=None)
    return request


def _place(request: Request) -> tuple[str, Key | None]:
    """The model whose queue a request joins ("" = none) and the key that makes two posts the same request."""
    if isinstance(request, SamplingRequest):
        session = request.sampling_session_id
        return "", None if session is None else ("sample", session, request.seq_id)
    if isinstance(request, CreateModel):
        return request.model_id, ("create", request.model_id)
    if isinstance(request, LoadWeights) and request.model_id is None:
        model_id = f"{request.session_id}:train:{request.model_seq_id}"
        return model_id, ("create", model_id)
    if isinstance(request, UnloadModel):
        return request.model_id, ("unload", request.model_id)
    assert isinstance(request, (TrainRequest, OptimStep, SaveWeights, LoadWeights))
    key = None if request.seq_id is None else ("model", request.model_id, request.seq_id)
    return str(request.model_id), key


def _advance(queue: ModelQueue) -> None:
    """Moves the requests whose turn has come to the ready ones."""
    while queue.next_seq_id in queue.out_of_order:
        queue.ready.append(queue.out_of_order.pop(queue.next_seq_id))
        queue.next_seq_id += 1


def _tokens(request: TrainRequest) -> int:
    return sum(len(datum.tokens) for datum in request.data)
