"""Futures on record: what a client that asks again after a restart is told. Written by a thread, behind the work.

Only what acknowledges something on disk keeps its result (models made, saves, loads); the others' results live in
memory, and after a restart their futures say that they were lost. The last moments before a kill may be missing from
the record: then a future is unknown (HTTP 410), which clients handle the same way.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from skyrl.service.messages import CreateModel, LoadWeights, RequestOutcome, SaveWeights, UnloadModel
from skyrl.service.records import NotFound
from skyrl.service.scheduler import Job
from skyrl.service.store import Store
from skyrl.types import UserError

KEPT = (CreateModel, LoadWeights, SaveWeights, UnloadModel)
log = logging.getLogger("skyrl.service")


class FutureLog:
    """The desk's memory that outlives the process. Thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._writes: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="skyrl-future-log", daemon=True)
        self._thread.start()

    def added(self, job: Job) -> None:
        """A request was accepted."""
        kind = type(job.request).__name__
        model = job.lane or None
        self._writes.put(
            lambda: self._store.add_future(job.owner, kind, model_id=model, request_id=job.request_id),
        )

    def settled(self, job: Job) -> None:
        """A future is done or has failed."""
        kept = job.result if isinstance(job.request, KEPT) and isinstance(job.result, dict) else None
        failed = job.state == "failed"
        self._writes.put(
            lambda: self._store.finish_future(
                job.request_id, result=kept, error=job.error, category=job.category, failed=failed
            )
        )

    def recall(self, request_id: str, owner: str) -> RequestOutcome:
        """What is on record of a request that the desk does not know."""
        try:
            found = self._store.get_future(request_id, owner)
        except NotFound:
            return RequestOutcome("unknown")
        if found.state == "failed":
            return RequestOutcome("failed", error=found.error, category=found.category)
        if found.state == "done" and found.result is not None:
            return RequestOutcome("done", result=found.result)
        return RequestOutcome(
            "failed",
            error="this request was lost when the server restarted, or its result was thrown away because nobody "
            "fetched it; go on from the last saved state",
            category="server",
        )

    def close(self) -> None:
        """Writes what is left."""
        self._writes.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (write := self._writes.get()) is not None:
            try:
                write()
            except UserError as error:  # a full disk must not end the service: what it saves tells its own client
                log.warning("a future is not on record: %s", error)
