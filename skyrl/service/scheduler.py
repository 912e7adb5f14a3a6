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
from typing import Any, Protocol

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
DEAD_LANES = 4096  # closed models of which the desk itself knows why; of older ones the record does
LARGE_SAMPLE = 64  # a request for more samples takes the place of so many: it is drawn in parts
JOB_BYTES, NAME_BYTES = 2048, 100  # of a future, and of the name of one sample, about


@dataclass(eq=False)
class Job:
    """A request with its future. `lane` is the model whose order it keeps, "" for samples."""

    request_id: str
    request: Request
    owner: str
    lane: str
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
    told: bool = False
    calls: list[Callable[[], None]] = field(default_factory=list)
    waits: int = 0  # bytes of the request
    size: int = 0  # bytes of the result, and of what else is kept of it
    grown: list[tuple[int, Ints]] = field(default_factory=list)  # tokens of a streamed sample, in the order drawn
    readers: list[Callable[[int, Ints], None]] = field(default_factory=list)


@dataclass(eq=False)
class Lane:
    """One model's requests. `turn` is the next seq_id to run; `held` those that came early."""

    owner: str
    turn: int = 1
    held: dict[int, Job] = field(default_factory=dict)
    ready: deque[Job] = field(default_factory=deque)
    served: int = 0  # when it last had a turn: the lane that waited longest comes first
    dead: str = ""  # why nothing runs here any more
    facts: dict[str, Any] | None = None  # of the created model


class Record(Protocol):
    """Where answers are kept that outlive the process (future_log.py)."""

    def new_id(self) -> str:
        """The id of a new request."""

    def touch(self, model_id: str) -> None:
        """A request for an open model was accepted."""

    def record(self, request_id: str, owner: str, request: Request, result: Result) -> None:
        """A request is done; nobody has been told yet."""

    def recall(self, request_id: str, owner: str) -> RequestOutcome:
        """What is known of a request that the desk does not have."""


class RequestDesk:
    """Where requests wait, thread-safe: the front doors' side, and the worker's."""

    def __init__(self, *, gap_seconds: float = 30.0, max_queued_samples: int = 4096) -> None:
        self.gap_seconds, self.max_queued_samples = gap_seconds, max_queued_samples
        self._lock = threading.Condition()
        self._jobs: dict[str, Job] = {}
        self._by_key: dict[Key, Job] = {}
        self._ended: dict[str, OrderedDict[str, Job]] = {}  # settled ones that are kept, by owner, oldest first
        self._ended_bytes: dict[str, int] = {}
        self._fetched: deque[Job] = deque()
        self._waiting_bytes: dict[str, int] = {}  # of owners that have requests waiting or running
        self._lanes: dict[str, Lane] = {}
        self._samples: dict[str, deque[Job]] = {}  # by owner
        self._sample_turn: deque[str] = deque()
        self._queued = 0  # samples that wait
        self._queued_of: dict[str, int] = {}
        self._cancelled: list[Job] = []
        self._clock = itertools.count(1)
        self._closed = ""
        self._lost: Callable[[str, str], str] = lambda model_id, owner: ""
        self._record: Record | None = None

    # ---- the front doors' side -------------------------------------------------------------------------------------

    def submit(self, request: Request, *, owner: str) -> Accepted:
        """Queues a request, or finds the earlier one of the same key (model and seq_id, session and seq_id): a
        repeated request is never run twice, and its answer is the first one's. Raises UserError for what is malformed
        or not the owner's, TooManyRequests."""
        with self._lock:
            if self._closed:
                raise TooManyRequests(self._closed)
            lane_id, key = _place(request)
            key = None if key is None else (owner, *key)
            known = self._by_key.get(key) if key is not None else None
            if known is not None:
                return known.accepted
            lane = self._lanes.get(lane_id) if lane_id else None
            if lane is not None and lane.owner != owner:
                raise UserError(f"{lane_id}: no such model")
            size = _request_bytes(request)
            self._check_bytes(request, owner, lane, size)
            if isinstance(request, SamplingRequest):
                self._check_room(request, owner)
            job = self._new_job(request, owner, lane_id, key)
            job.waits = size
            self._waiting_bytes[owner] = self._waiting_bytes.get(owner, 0) + size
            if isinstance(request, SamplingRequest):
                self._queue_sample(job)
            else:
                self._queue_for_model(job, lane)
            if self._record is not None and lane is not None:
                self._record.touch(lane_id)
            self._lock.notify_all()
        self._settled(job)
        return job.accepted

    def _new_job(self, request: Request, owner: str, lane_id: str, key: Key | None) -> Job:
        request_id = uuid.uuid4().hex if self._record is None else self._record.new_id()
        ids: tuple[str, ...] = ()
        if isinstance(request, SamplingRequest):
            most = min(request.num_samples, self.max_queued_samples)  # of more, the request will be refused
            ids = tuple(f"{request_id}:{i}" for i in range(most))
        accepted = Accepted(request_id, lane_id or None, ids)
        job = Job(request_id, request, owner, lane_id, key, accepted, time.monotonic())
        job.size = JOB_BYTES + NAME_BYTES * len(ids)
        self._jobs[request_id] = job
        if key is not None:
            self._by_key[key] = job
        self._prune()
        return job

    def _check_room(self, request: SamplingRequest, owner: str) -> None:
        """Owners that have samples waiting share the places; one who has none may always have some."""
        own = self._queued_of.get(owner, 0)
        most = self.max_queued_samples // len({*self._queued_of, owner})
        if own and own + request.num_samples > most:
            raise TooManyRequests(f"{own} samples are waiting, at most {most} may; try again in a moment")

    def _check_bytes(self, request: Request, owner: str, lane: Lane | None, size: int) -> None:
        """Memory for what waits. The request for which a model's later ones wait always has room."""
        if lane is not None:
            first = getattr(request, "seq_id", None) == lane.turn and not lane.ready
            if first and lane.held:
                return
            waiting = len(lane.ready) + len(lane.held)
            if waiting >= WAITING_REQUESTS and not first:
                raise TooManyRequests(f"{waiting} requests of this model are waiting; try again in a moment")
        own = self._waiting_bytes.get(owner, 0)
        most = WAITING_BYTES // len({*self._waiting_bytes, owner})
        if own and own + size > most:
            raise TooManyRequests(
                f"{own >> 20} MiB of requests are waiting, at most {most >> 20} may; try again in a moment"
            )

    def _queue_sample(self, job: Job) -> None:
        if job.owner not in self._samples:
            self._samples[job.owner] = deque()
            self._sample_turn.append(job.owner)
        self._samples[job.owner].append(job)
        self._count_samples(job, 1)

    def _count_samples(self, job: Job, sign: int) -> None:
        """CheckpointService samples that wait (+1) or wait no longer (-1)."""
        number = sign * job.request.num_samples
        self._queued += number
        self._queued_of[job.owner] = self._queued_of.get(job.owner, 0) + number
        if not self._queued_of[job.owner]:
            del self._queued_of[job.owner]

    def _queue_for_model(self, job: Job, lane: Lane | None) -> None:
        request = job.request
        creates = isinstance(request, CreateModel) or (isinstance(request, LoadWeights) and request.model_id is None)
        if creates:
            if lane is not None:  # its first future was thrown away long ago
                self._fail(job, f"{job.lane}: exists already; give another model_seq_id", "user")
                return
            lane = self._lanes[job.lane] = Lane(job.owner)
            lane.ready.append(job)
            return
        if lane is None or lane.dead:
            text = lane.dead if lane is not None else self._lost(job.lane, job.owner)
            self._fail(job, text or f"{job.lane}: no such model", "user" if not text else "server")
            return
        seq = getattr(request, "seq_id", None)
        if seq is None or isinstance(request, UnloadModel):
            lane.ready.append(job)
        elif seq < lane.turn:
            self._fail(job, f"seq_id {seq} of {job.lane} came after its turn was given up; start a new client", "user")
        else:
            lane.held[seq] = job
            _advance(lane)

    def outcome(self, request_id: str, *, owner: str) -> RequestOutcome:
        """What is known now."""
        with self._lock:
            job = self._jobs.get(request_id)
            if job is None and self._record is not None:
                return self._record.recall(request_id, owner)
            if job is None or job.owner != owner:
                return RequestOutcome("unknown")
            if job.state == "done":
                self._note_fetched(job)
                return RequestOutcome("done", result=job.result)
            if job.state == "failed":
                self._note_fetched(job)
                return RequestOutcome("failed", error=job.error, category=job.category)
            return RequestOutcome("pending", queue_state="active", reason=self._reason(job))

    def _reason(self, job: Job) -> str:
        if job.state == "running":
            return "running"
        if job.lane:
            lane = self._lanes.get(job.lane)
            if lane is not None and lane.held and min(lane.held) > lane.turn:
                return f"waiting for request {lane.turn} of this model, which has not arrived"
            ahead = sum(1 for other in self._lanes.values() if other.ready)
            return f"{ahead} models have work waiting"
        return f"{self._queued} samples are waiting"

    def when_done(self, request_id: str, call: Callable[[], None]) -> None:
        """Calls `call` once, from any thread, when the future is no longer pending (at once if it is not)."""
        with self._lock:
            job = self._jobs.get(request_id)
            if job is not None and job.state in ("waiting", "running"):
                job.calls.append(call)
                return
        call()

    def on_tokens(self, request_id: str, call: Callable[[int, Ints], None]) -> None:
        """Calls `call(sample, tokens)` with the tokens of a streamed request that were not told before, as they are
        drawn, and at once with those that are there already. From any thread; it must not wait. A result may hold
        more tokens than were told."""
        with self._lock:
            job = self._jobs.get(request_id)
            if job is not None and job.state in ("waiting", "running"):
                for number, tokens in job.grown:
                    call(number, tokens)
                job.readers.append(call)

    def cancel(self, request_id: str, *, owner: str) -> None:
        """Withdraws a sample that is not done; for anything else nothing happens. One that runs is taken out by the
        worker a moment later."""
        with self._lock:
            job = self._jobs.get(request_id)
            if job is None or job.owner != owner or not isinstance(job.request, SamplingRequest):
                return
            if job.state == "waiting":
                self._samples[owner].remove(job)
                self._count_samples(job, -1)
                self._fail(job, "cancelled by the client", "user")
            elif job.state == "running":
                job.cancelled = True
                self._cancelled.append(job)
                self._lock.notify_all()
        self._settled(job)

    def open_model(self, model_id: str, *, owner: str) -> dict[str, Any]:
        """Facts for get_info: {"base_model", "is_lora", "lora_rank", "train_mlp", "train_attn", "train_unembed"}.
        Raises UserError when there is no such model."""
        with self._lock:
            lane = self._lanes.get(model_id)
            if lane is None or lane.owner != owner or lane.facts is None:
                raise UserError(f"{model_id}: no such model, or it is not ready")
            return dict(lane.facts)

    # ---- the worker's side -----------------------------------------------------------------------------------------

    def keep_record(self, record: Record) -> None:
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

    def has_news(self) -> bool:
        """Whether something waits to be taken."""
        with self._lock:
            return self._has_work()

    def _has_work(self) -> bool:
        return bool(self._cancelled) or self._queued > 0 or any(lane.ready for lane in self._lanes.values())

    def _until_gap(self, seconds: float) -> float:
        return min(seconds, self.gap_seconds / 4) if any(lane.held for lane in self._lanes.values()) else seconds

    def take_training(self, alike: Callable[[TrainRequest], Any], max_tokens: int) -> list[Job]:
        """The next work of models: the request that waited longest for its turn and, when that is a TrainRequest, the
        first request of every other model with an equal `alike`, up to `max_tokens` tokens in all. [] when idle."""
        with self._lock:
            self._give_up_gaps()
            lanes = sorted((lane for lane in self._lanes.values() if lane.ready), key=lambda lane: lane.served)
            if not lanes:
                return []
            jobs = [self._pop(lanes[0])]
            first = jobs[0].request
            if isinstance(first, TrainRequest) and not first.problem:
                tokens, kind = _tokens(first), alike(first)
                for lane in lanes[1:]:
                    request = lane.ready[0].request
                    if not isinstance(request, TrainRequest) or request.problem or alike(request) != kind:
                        continue
                    if tokens + _tokens(request) > max_tokens:
                        continue
                    tokens += _tokens(request)
                    jobs.append(self._pop(lane))
            return jobs

    def _pop(self, lane: Lane) -> Job:
        lane.served = next(self._clock)
        job = lane.ready.popleft()
        job.state = "running"
        return job

    def _give_up_gaps(self) -> None:
        now = time.monotonic()
        for lane in self._lanes.values():
            if lane.held and lane.turn not in lane.held:
                first = min(lane.held)
                if now - lane.held[first].arrived >= self.gap_seconds:
                    lane.turn = first
                    _advance(lane)

    def take_samples(self, room: int, *, without: frozenset[str] = frozenset()) -> list[Job]:
        """Sample requests for about `room` more sequences, one owner after the other in turn, none of `without`."""
        taken: list[Job] = []
        with self._lock:
            while room > 0 and self._queued_of.keys() - without:
                owner = self._sample_turn[0]
                self._sample_turn.rotate(-1)
                if owner in without or not self._samples[owner]:
                    continue
                job = self._samples[owner].popleft()
                job.state = "running"
                self._count_samples(job, -1)
                room -= min(job.request.num_samples, LARGE_SAMPLE)
                taken.append(job)
        return taken

    def progress(self, job: Job, number: int, tokens: Ints) -> None:
        """Tells the readers of a streamed request more tokens of one of its samples."""
        with self._lock:  # also around the calls: nobody may hear them in another order
            if job.state == "running":
                job.grown.append((number, tokens))
                for call in job.readers:
                    call(number, tokens)

    def take_cancelled(self) -> list[Job]:
        """Running samples that their clients withdrew since the last call."""
        with self._lock:
            taken, self._cancelled = [job for job in self._cancelled if job.state == "running"], []
        return taken

    def done(self, job: Job, result: Result) -> None:
        """Settles a future with its result."""
        with self._lock:
            if job.state in ("done", "failed"):
                return
            job.state, job.result, job.finished = "done", result, time.monotonic()
            self._lock.notify_all()
        self._settled(job)

    def failed(self, job: Job, error: RequestFailed) -> None:
        """Settles a future with an error."""
        with self._lock:
            self._fail(job, error.message, error.category)
        self._settled(job)

    def _fail(self, job: Job, message: str, category: Category) -> None:
        if job.state in ("done", "failed"):
            return
        job.state, job.error, job.category, job.finished = "failed", message, category, time.monotonic()

    def opened(self, model_id: str, facts: dict[str, Any]) -> None:
        """A model exists now; `facts` are what open_model answers."""
        with self._lock:
            if model_id in self._lanes:
                self._lanes[model_id].facts = facts

    def closed(self, model_id: str, why: str, *, forget: bool = False) -> None:
        """A model is gone: what waits for it fails with `why`, and so does what comes later. forget: it never was,
        and its name does not belong to who asked for it."""
        with self._lock:
            lane = self._lanes.get(model_id)
            if lane is None:
                return
            lane.dead, lane.facts = why, None
            del self._lanes[model_id]
            if not forget:
                self._lanes[model_id] = lane  # to the end: the first dead ones are the oldest
                self._forget_dead()
            jobs = [*lane.ready, *lane.held.values()]
            lane.ready.clear()
            lane.held.clear()
            for job in jobs:
                self._fail(job, why, "user")
        for job in jobs:
            self._settled(job)

    def models(self) -> list[str]:
        """The open models."""
        with self._lock:
            return [name for name, lane in self._lanes.items() if not lane.dead]

    def close(self, why: str) -> None:
        """Accepts nothing more, and fails what waits."""
        with self._lock:
            self._closed = why
            jobs = [job for job in self._jobs.values() if job.state == "waiting"]
            for job in jobs:
                self._fail(job, why, "server")
            for lane in self._lanes.values():
                lane.ready.clear()
                lane.held.clear()
            self._samples.clear()
            self._sample_turn.clear()
            self._queued = 0
            self._queued_of.clear()
            self._lock.notify_all()
        for job in jobs:
            self._settled(job)

    def _settled(self, job: Job) -> None:
        """Calls who waits for a job, once, if it is settled; outside of the lock, because they may ask the desk."""
        with self._lock:
            if job.state not in ("done", "failed") or job.told:
                return
            job.told = True
            calls, job.calls = job.calls, []
            result = job.result
            self._keep(job)
        if self._record is not None and result is not None:
            self._record.record(job.request_id, job.owner, job.request, result)
        for call in calls:
            call()

    # ---- what is kept of settled ones ------------------------------------------------------------------------------

    def _keep(self, job: Job) -> None:
        """Lets go of what a request brought, and keeps its result as long as there is room."""
        job.request, job.grown, job.readers = _without_data(job.request), [], []
        self._waiting_bytes[job.owner] -= job.waits
        if not self._waiting_bytes[job.owner]:
            del self._waiting_bytes[job.owner]
        job.size += _result_bytes(job.result)
        self._ended.setdefault(job.owner, OrderedDict())[job.request_id] = job
        self._ended_bytes[job.owner] = self._ended_bytes.get(job.owner, 0) + job.size
        while sum(self._ended_bytes.values()) > RESULT_BYTES:
            others = {
                owner: size - (job.size if owner == job.owner else 0) for owner, size in self._ended_bytes.items()
            }
            most = max(others, key=lambda owner: others[owner])
            if not others[most]:
                return  # this one is all there is
            self._remove(next(iter(self._ended[most].values())))

    def _note_fetched(self, job: Job) -> None:
        if not job.fetched:
            job.fetched = time.monotonic()
            self._fetched.append(job)

    def _prune(self) -> None:
        """Forgets old futures: fetched ones after a while, others after an hour."""
        now = time.monotonic()
        while self._fetched and now - self._fetched[0].fetched >= FETCHED_SECONDS:
            self._remove(self._fetched.popleft())
        for jobs in list(self._ended.values()):
            while jobs and now - (oldest := next(iter(jobs.values()))).finished >= KEEP_SECONDS:
                self._remove(oldest)

    def _remove(self, job: Job) -> None:
        if self._jobs.pop(job.request_id, None) is None:
            return
        job.result = None  # lists may hold the job itself a little longer
        del self._ended[job.owner][job.request_id]
        self._ended_bytes[job.owner] -= job.size
        if not self._ended[job.owner]:
            del self._ended[job.owner], self._ended_bytes[job.owner]
        if job.key is not None and self._by_key.get(job.key) is job:
            del self._by_key[job.key]

    def _forget_dead(self) -> None:
        dead = [name for name, lane in self._lanes.items() if lane.dead]
        for name in dead[: max(0, len(dead) - DEAD_LANES)]:
            del self._lanes[name]


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
    """The lane of a request ("" = none) and the key that makes two posts the same request."""
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


def _advance(lane: Lane) -> None:
    """Moves the requests whose turn has come to the ready ones."""
    while lane.turn in lane.held:
        lane.ready.append(lane.held.pop(lane.turn))
        lane.turn += 1


def _tokens(request: TrainRequest) -> int:
    return sum(len(datum.tokens) for datum in request.data)
