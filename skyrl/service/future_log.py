"""Answers that outlive the process: what a client that asks again after a restart is told of a save or a new model.

Only requests with a lasting effect are recorded, and only once they are done: whoever reads a future of these after a
restart finds that it was run, and nobody runs it again. A sample, a forward_backward or an optim_step changes nothing
that a restart keeps, so none of them costs a write to the database.
"""

from __future__ import annotations

import logging
import re
import uuid

from skyrl.service.messages import CreateModel, LoadWeights, Request, RequestOutcome, Result, SaveWeights, UnloadModel
from skyrl.service.store import Store
from skyrl.types import UserError

log = logging.getLogger("skyrl.service")

REQUEST_ID = re.compile("[0-9a-f]{32}")
EPOCH = 8  # characters of a request id that are the same for all requests of one server process
LOST = "this request was lost when the server restarted; go on from the last saved state"


def has_lasting_effect(request: Request) -> bool:
    """Whether something of this request is still there after a restart: a run, or a checkpoint. Weights loaded into
    an open model and snapshots without a name end with the process."""
    if isinstance(request, SaveWeights):
        return request.name is not None or request.kind != "sampler_weights"
    if isinstance(request, LoadWeights):
        return request.model_id is None
    return isinstance(request, (CreateModel, UnloadModel))


class FutureLog:
    """The scheduler's memory that outlives the process. Thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store, self._epoch = store, uuid.uuid4().hex[:EPOCH]

    def new_id(self) -> str:
        """The id of a new request."""
        return self._epoch + uuid.uuid4().hex[EPOCH:]

    def record(self, request_id: str, owner: str, request: Request, result: Result) -> None:
        """A request is done; to be called before anybody is told. Writes nothing unless its effect is lasting."""
        if not has_lasting_effect(request) or not isinstance(result, dict):
            return
        model = getattr(request, "model_id", None)
        try:
            self._store.record_future(request_id, owner, type(request).__name__, model, result)
        except UserError as error:  # a full disk must not end the service, and the work itself is done
            log.warning("a future is not on record: %s", error)

    def recall(self, request_id: str, owner: str) -> RequestOutcome:
        """What is known of a request that the scheduler does not have: a recorded answer, or (by its id, which tells
        the process that gave it out) that it ended with an earlier server."""
        result = self._store.find_future(request_id, owner)
        if result is not None:
            return RequestOutcome("done", result=result)
        if REQUEST_ID.fullmatch(request_id) and not request_id.startswith(self._epoch):
            return RequestOutcome("failed", error=LOST, category="server")
        return RequestOutcome("unknown")

    def touch(self, model_id: str) -> None:
        """A request for this model was accepted: the time of its last request. Nothing is written here."""
        self._store.touch_run(model_id)
