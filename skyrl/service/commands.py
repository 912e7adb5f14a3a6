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
import torch
from torch import Tensor

from skyrl.engine import Engine, ModelSpec
from skyrl.sampler.prompts import PromptLogprobsRequest, PromptLogprobsResult, score_prompts
from skyrl.types import AdamParams, Datum, LoraSpec, LossSpec, Metrics, RunError, Sample, SampleRequest, UserError

BASE = "base"
NOT_FINITE = "the model of this request gives log-probabilities that are not finite"


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
    """One rank's share of a slice of sampling. `watched`: how many tokens of a sequence are known already, for those
    that somebody reads while they grow."""

    requests: list[SampleRequest]
    cancelled: list[str]
    watched: dict[str, int] = field(default_factory=dict)


@dataclass
class Drawn:
    """What a slice gave: finished samples, requests that cannot be run and why, how many are left, and the new tokens
    of watched ones."""

    samples: list[Sample]
    refused: list[tuple[str, str]]
    unfinished: int
    news: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """A query; `tail`: of its tables only the rows from query.start on are wanted."""

    query: PromptLogprobsRequest
    tail: bool = False


@dataclass(frozen=True)
class Problem:
    """Why a rank did not do a command, or answer a question. Nothing has changed on it."""

    text: str


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
    out = hands.engine.model_state(model, optimizer=optimizer)
    return out if hands.engine.world.is_leader else None


def load(hands: Hands, common: tuple[str, dict[str, Any], bool], part: None) -> None:
    """Puts a saved state into a tenant."""
    model, tensors, optimizer = common
    hands.engine.load_model_state(model, tensors, optimizer=optimizer)


def publish(hands: Hands, common: tuple[str, str], part: None) -> None:
    """Makes a read-only copy of a tenant under a name."""
    name, model = common
    hands.engine.freeze_adapter(name, model)


def load_adapter(hands: Hands, common: LoadAdapter, part: None) -> None:
    """Makes saved weights sampleable."""
    hands.engine.load_adapter(common.name, common.lora, BASE, common.weights)


def replace_base(hands: Hands, common: dict[str, Tensor], part: None) -> None:
    """Other whole weights to sample from."""
    hands.engine.replace_base(BASE, common)


def drop_adapter(hands: Hands, common: str, part: None) -> None:
    """Forgets a read-only adapter; nothing may be sampling from it."""
    hands.engine.delete_adapter(common)


def park(hands: Hands, common: str, part: None) -> None:
    """Moves an idle tenant to host memory."""
    hands.engine.offload(common)


def undo(hands: Hands, common: str, part: None) -> None:
    """Forgets what was made under a name, on the ranks where it was made."""
    engine = hands.engine
    if common in engine.models:
        engine.delete(common)
    if common in engine.adapters:
        engine.delete_adapter(common)


def sample(hands: Hands, common: float, part: Slice) -> Drawn:
    """Admits, then draws for about `common` seconds; returns early on rank 0 when there is news, or nothing is left.

    No collective is inside, so ranks may stop at different steps. When the base itself gives logits that are not
    finite (whole weights of a training that went wrong), all requests of this rank are refused: they share it.
    """
    sampler = hands.engine.open_sampler(BASE).sampler
    refused, samples = [], []
    for uid in part.cancelled:
        sampler.cancel(uid)
    for request in part.requests:
        try:
            sampler.add(request)
        except UserError as error:
            refused.append((request.uid, str(error)))
    end = time.monotonic() + common
    try:
        while sampler.unfinished():
            samples += sampler.step()
            if time.monotonic() >= end or hands.has_news():
                break
    except RunError:
        refused += [(uid, NOT_FINITE) for uid in sampler.abandon()]
    news = {uid: new for uid, known in part.watched.items() if len(new := sampler.partial(uid)[known:])}
    return Drawn(samples, refused, sampler.unfinished(), news)


def score(hands: Hands, common: None, part: list[Question]) -> list[PromptLogprobsResult | Problem]:
    """What is asked about prompts, in their order. Keeps nothing, so one that cannot be answered harms no other."""
    try:
        return _scored(hands, part)
    except (UserError, torch.OutOfMemoryError):
        return [_scored_alone(hands, question) for question in part]


def _scored_alone(hands: Hands, question: Question) -> PromptLogprobsResult | Problem:
    try:
        return _scored(hands, [question])[0]
    except UserError as error:
        return Problem(str(error))
    except torch.OutOfMemoryError:
        return Problem(f"{len(question.query.tokens)} tokens and what is asked about them do not fit into memory")


def _scored(hands: Hands, part: list[Question]) -> list[PromptLogprobsResult]:
    engine = hands.engine
    queries = [question.query for question in part]
    found = score_prompts(engine.open_sampler(BASE).module, queries, engine.adapters, max_tokens=hands.score_tokens)
    for question, stats in zip(part, found, strict=True):
        if question.tail and stats.topk_ids is not None and stats.topk_logprobs is not None:
            start = question.query.start
            stats.topk_ids, stats.topk_logprobs = stats.topk_ids[start:].copy(), stats.topk_logprobs[start:].copy()
    return found


COMMANDS: dict[str, Callable[[Hands, Any, Any], Any]] = {
    one.__name__: one
    for one in (
        nothing, create, drop, train, optim, clear, state, load,
        publish, load_adapter, drop_adapter, replace_base, park, undo, sample, score,
    )
}  # fmt: skip
"""Every command there is; the leader and the followers look their methods up here."""

# These raise UserError before they change anything. Any other error, of any command, ends the job.
REFUSABLE = ("create", "load", "train", "publish", "load_adapter", "replace_base")
# Of these one rank may have made what another had no memory for: nothing in them waits for another rank.
LOCAL = ("publish", "load_adapter")


def execute(hands: Hands, method: str, common: Any, part: Any) -> Any:
    """This rank's answer to a command, or the Problem that it refuses it for."""
    local = method in LOCAL or (method == "create" and common.lora is not None)
    try:
        return COMMANDS[method](hands, common, part)
    except UserError as error:
        if method not in REFUSABLE:
            raise
        return Problem(str(error))
    except torch.OutOfMemoryError:
        if not local:
            raise
        return Problem("there is no memory for one more model; unload some, or ask for a smaller rank")


def made(method: str, common: Any) -> str:
    """The name of what a command makes, "" for commands that make nothing."""
    if method == "publish":
        return common[0]
    return common.model if method == "create" else common.name if method == "load_adapter" else ""
