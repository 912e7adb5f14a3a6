"""What each rank does for a command: the only place where the service touches the engine.

Every function here runs on all ranks with the same `common` and its own `part`, and returns something picklable. Those
that lead to a collective branch on `common` only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from skyrl.engine import Engine, ModelSpec
from skyrl.sampler.prompts import PromptQuery, PromptStats, score_prompts
from skyrl.types import AdamParams, Datum, LoraSpec, LossSpec, Metrics, RunError, Sample, SampleRequest, UserError

BASE = "base"


@dataclass
class Hands:
    """One rank's engine, and how long its sampling slices are interrupted by news (rank 0 only)."""

    engine: Engine
    score_tokens: int
    has_news: Callable[[], bool] = field(default=lambda: False)

    def open(self) -> None:
        """Makes the base model; collective."""
        self.engine.create(BASE, ModelSpec(trainable=False))


@dataclass(frozen=True)
class Create:
    """A tenant: LoRA on the base, or (lora None) a whole model of its own."""

    model: str
    lora: LoraSpec | None


@dataclass(frozen=True)
class Train:
    """One call of the engine for rows of one tenant (`model`) or of several (None: each row says whose it is)."""

    loss: LossSpec
    forward_only: bool
    mix: bool
    model: str | None


@dataclass(frozen=True)
class LoadAdapter:
    """Read-only weights to sample from: path -> (A, B)."""

    name: str
    lora: LoraSpec
    weights: dict[str, tuple[Tensor, Tensor]]


@dataclass
class Slice:
    """One rank's share of a slice of sampling."""

    requests: list[SampleRequest]
    cancelled: list[str]


@dataclass
class Drawn:
    """What a slice gave: finished samples, requests that cannot be run and why, and how many are left."""

    samples: list[Sample]
    refused: list[tuple[str, str]]
    unfinished: int


def nothing(hands: Hands, common: None, part: None) -> None:
    """Keeps the channel alive."""


def create(hands: Hands, common: Create, part: None) -> None:
    """Makes a tenant."""
    spec = ModelSpec(lora=common.lora, base=BASE) if common.lora is not None else ModelSpec()
    hands.engine.create(common.model, spec)


def drop(hands: Hands, common: str, part: None) -> None:
    """Forgets a tenant."""
    hands.engine.delete(common)


def train(hands: Hands, common: Train, part: list[Datum]) -> tuple[list[np.ndarray], list[float]]:
    """Log-probabilities and losses of this rank's rows, in their order."""
    run = hands.engine.forward if common.forward_only else hands.engine.forward_backward
    out = run(part, common.loss, model=common.model, mix=common.mix, strict=False)
    return out.logprobs, out.losses


def optim(hands: Hands, common: tuple[str, AdamParams], part: None) -> tuple[Metrics, str]:
    """Metrics of the step, or why it was not made (the same on every rank, and before any weight changed)."""
    model, adam = common
    try:
        return hands.engine.optim_step(model, adam), ""
    except RunError as error:
        hands.engine.clear_gradient(model)
        return {}, str(error)


def clear(hands: Hands, common: str, part: None) -> None:
    """Drops the pending gradient of a tenant."""
    hands.engine.clear_gradient(common)


def state(hands: Hands, common: tuple[str, bool], part: None) -> dict[str, Any] | None:
    """A tenant's tensors on the CPU, from rank 0."""
    model, optimizer = common
    out = hands.engine.tenant_state(model, optimizer=optimizer)
    return out if hands.engine.world.is_leader else None


def load(hands: Hands, common: tuple[str, dict[str, Any], bool], part: None) -> None:
    """Puts a saved state into a tenant."""
    model, tensors, optimizer = common
    hands.engine.load_tenant(model, tensors, optimizer=optimizer)


def publish(hands: Hands, common: tuple[str, str], part: None) -> None:
    """Makes a read-only copy of a tenant under a name."""
    name, model = common
    hands.engine.publish(name, model)


def load_adapter(hands: Hands, common: LoadAdapter, part: None) -> None:
    """Makes saved weights sampleable."""
    hands.engine.load_adapter(common.name, common.lora, BASE, common.weights)


def replace_base(hands: Hands, common: dict[str, Tensor], part: None) -> None:
    """Other whole weights to sample from."""
    hands.engine.replace_base(BASE, common)


def drop_adapter(hands: Hands, common: str, part: None) -> None:
    """Forgets a read-only adapter; nothing may be sampling from it."""
    hands.engine.drop_adapter(common)


def park(hands: Hands, common: str, part: None) -> None:
    """Moves an idle tenant to host memory."""
    hands.engine.park(common)


def sample(hands: Hands, common: float, part: Slice) -> Drawn:
    """Admits, then draws for about `common` seconds; returns early on rank 0 when there is news, or nothing is left.

    No collective is inside, so ranks may stop at different steps.
    """
    sampler = hands.engine.serving(BASE).sampler
    refused, samples = [], []
    for uid in part.cancelled:
        sampler.cancel(uid)
    for request in part.requests:
        try:
            sampler.add(request)
        except UserError as error:
            refused.append((request.uid, str(error)))
    end = time.monotonic() + common
    while sampler.unfinished():
        samples += sampler.step()
        if time.monotonic() >= end or hands.has_news():
            break
    return Drawn(samples, refused, sampler.unfinished())


def score(hands: Hands, common: None, part: list[PromptQuery]) -> list[PromptStats]:
    """What is asked about prompts, in their order."""
    engine = hands.engine
    return score_prompts(engine.serving(BASE).module, part, engine.adapters, max_tokens=hands.score_tokens)


COMMANDS: dict[str, Callable[[Hands, Any, Any], Any]] = {
    one.__name__: one
    for one in (
        nothing, create, drop, train, optim, clear, state, load,
        publish, load_adapter, drop_adapter, replace_base, park, sample, score,
    )
}  # fmt: skip
"""Every command there is; the leader and the followers look their methods up here."""
