"""Answers that outlive the process: what a client that asks again after a restart is told of a save or a new model.

Only requests with a lasting effect are recorded, and only once they are done: whoever reads a future of these after a
restart finds that it was run, and nobody runs it again. A sample, a forward_backward or an optim_step changes nothing
that a restart keeps, so none of them costs a write to the database.
"""

from __future__ import annotations

import logging

from skyrl.service.messages import CreateModel, LoadWeights, Request, Result, SaveWeights, UnloadModel
from skyrl.service.store import Store
from skyrl.types import UserError

log = logging.getLogger("skyrl.service")


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
        self._store = store

    def record(self, request_id: str, owner: str, request: Request, result: Result) -> None:
        """A request is done; to be called before anybody is told. Writes nothing unless its effect is lasting."""
        if not has_lasting_effect(request) or not isinstance(result, dict):
            return
        model = getattr(request, "model_id", None)
        try:
            self._store.record_future(request_id, owner, type(request).__name__, model, result)
        except UserError as error:  # a full disk must not end the service, and the work itself is done
            log.warning("a future is not on record: %s", error)

    def lookup(self, request_id: str, owner: str) -> Result | None:
        """The answer to a request of an earlier server, or one that the scheduler has forgotten; None: not known."""
        return self._store.find_future(request_id, owner)

    def touch(self, model_id: str) -> None:
        """A request for this model was accepted: the time of its last request. Nothing is written here."""
        self._store.touch_run(model_id)
