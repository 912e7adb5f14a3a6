"""The contract of a sampler. It runs on one rank and calls no collective: ranks may finish at different times."""

from __future__ import annotations

from typing import Protocol

from skyrl.types import Metrics, Sample, SampleRequest


class Sampler(Protocol):
    """Draws sequences in continuous batches from the weights it was built over."""

    def add(self, request: SampleRequest) -> None:
        """Queues a request. Raises UserError when it can never fit (longer than the cache or the model allows)."""

    def step(self) -> list[Sample]:
        """One iteration (admit and prefill, or decode one token of every running sequence); returns what finished,
        in a fixed order. [] while nothing finished; does nothing when nothing is queued. Stop reason "aborted": the
        request's adapter gives logits that are not finite."""

    def unfinished(self) -> int:
        """Requests queued or running."""

    def cancel(self, uid: str) -> bool:
        """Takes a request out, queued or running; False when none of that uid is unfinished."""

    def forget_adapter(self, name: str) -> None:
        """Drops what is kept for an adapter. Raises RuntimeError while requests of it run."""

    def refresh(self, version: int) -> None:
        """The weights changed to `version`: forgets cached prefixes. Only while nothing is unfinished."""

    def metrics(self) -> Metrics:
        """Since the last call: tokens drawn, prefill tokens, tokens reused, preemptions, peak use of the cache."""
