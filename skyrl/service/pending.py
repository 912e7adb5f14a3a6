"""A request that waits, runs, or is kept with its answer; a model's queue; and what one client has of them. The lists
of scheduler.py hold these, under its lock."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from skyrl.envs import clock
from skyrl.service.messages import RequestOutcome, SampleResult
from skyrl.service.storage.records import ModelInfo
from skyrl.types import Ints, SampleRequest

Key = tuple[Any, ...]
FUTURE_BYTES, NAME_BYTES = 2048, 100  # of a future, and of the name of one sample, about


@dataclass(eq=False)
class PendingRequest:
    """A request with its future. `request` is None once that is settled, for it may hold much memory. `model_id` is the
    model whose order it keeps, "" for samples; `key` makes two posts the same request."""

    request_id: str
    request: Any  # a Request, or None
    owner: str
    client: str  # with whom it shares what all share
    session: str  # "" where old releases sample without one
    model_id: str
    key: Key | None
    arrived: float = field(default_factory=clock.now)
    started: float = 0.0  # when it began to run; 0 = it has not
    outcome: RequestOutcome = RequestOutcome("pending")
    finished: float = 0.0
    fetched: float = 0.0
    callbacks: list[Callable[[], None]] = field(default_factory=list)
    request_bytes: int = 0
    kept_bytes: int = FUTURE_BYTES  # of the future and its result
    known_failure: PendingRequest | None = None  # of this model's last failed forward_backward, if its client knew

    @property
    def settled(self) -> bool:
        """Whether it is done, or has failed."""
        return self.outcome.state != "pending"


@dataclass(eq=False)
class PendingSample(PendingRequest):
    """A sampling request from its submission to its answer. What is below `readers` is the worker's (sampling.py)."""

    num_samples: int = 1  # at most as many as may wait at all: a request for more will be refused
    cancelled: str = ""  # why it was withdrawn while it ran
    streamed: list[tuple[int, Ints]] = field(default_factory=list)  # (sample, tokens) in the order drawn
    readers: list[Callable[[int, Ints], None]] = field(default_factory=list)
    adapter: str = ""  # that it is drawn from, "" = the base
    drawn_from: str = ""  # the model of which that is a snapshot without a name
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
    info: ModelInfo | None = None  # of the created model
    failure: PendingRequest | None = None  # its last failed forward_backward
    failed_rows: int = 0  # in that

    @property
    def gap(self) -> bool:
        """Whether the next request has not arrived, but later ones have."""
        return bool(self.out_of_order) and self.next_seq_id not in self.out_of_order

    def advance(self) -> None:
        """Makes those ready whose turn has come."""
        while self.next_seq_id in self.out_of_order:
            self.ready.append(self.out_of_order.pop(self.next_seq_id))
            self.next_seq_id += 1


@dataclass(eq=False)
class ClientUsage:
    """What one client has of what all share."""

    samples: deque[PendingSample] = field(default_factory=deque)  # that wait
    num_samples: int = 0  # in them
    served: int = 0  # when a request of one of its models last had its turn
    request_bytes: int = 0  # of requests that wait or run
    settled: OrderedDict[str, PendingRequest] = field(default_factory=OrderedDict)  # that are kept, oldest first
    kept_bytes: int = 0  # of these
