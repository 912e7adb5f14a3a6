"""Commands from rank 0 to all ranks, and what each rank does for one. Only here the service touches the engine.

The leader scatters the shares, all ranks run the same function, the leader gathers the answers. A command is sent only
after everything in it was checked. A UserError that it raises all the same, before anything has changed, is a refusal
if all ranks have it. Any other exception ends its process, and with it the job, because the other ranks cannot know
how far it came.

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
import torch.distributed as dist
from torch import Tensor

from skyrl.distributed.init import World
from skyrl.engine import Engine, ModelSpec
from skyrl.sampler.prompts import PromptLogprobsRequest, PromptLogprobsResult, score_prompts
from skyrl.types import AdamParams, Datum, LoraSpec, LossSpec, Metrics, RunError, Sample, SampleRequest, UserError

BASE = "base"
NOT_FINITE = "the model of this request gives log-probabilities that are not finite"


@dataclass
class RankContext:
    """One rank's engine, and how long its sampling is interrupted when work is pending (rank 0 only)."""

    engine: Engine
    score_tokens: int
    has_pending_work: Callable[[], bool] = field(default=lambda: False)

    def open(self) -> None:
        """Makes the base model; collective."""
        self.engine.create(BASE, ModelSpec(trainable=False))


@dataclass(frozen=True)
class Create:
    """A model: LoRA on the base, or (lora None) a whole model of its own."""

    model: str
    lora: LoraSpec | None


@dataclass(frozen=True)
class Train:
    """One call of the engine for rows of one model (`model`) or of several (None: each row says whose it is)."""

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
class SamplingBatch:
    """One rank's share of a stretch of sampling. `watched`: how many tokens of a sequence are known already, for those
    that somebody reads while they grow."""

    requests: list[SampleRequest]
    cancelled: list[str]
    watched: dict[str, int] = field(default_factory=dict)


@dataclass
class SamplingOutput:
    """What a stretch of sampling gave: finished samples, requests that cannot be run and why, how many are left, and
    the new tokens of watched ones."""

    samples: list[Sample]
    refused: list[tuple[str, str]]
    unfinished: int
    new_tokens: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """A query; `tail`: of its tables only the rows from query.start on are wanted."""

    query: PromptLogprobsRequest
    tail: bool = False


@dataclass(frozen=True)
class Problem:
    """Why a rank did not do a command, or answer a question. Nothing has changed on it."""

    text: str


def nothing(context: RankContext, common: None, part: None) -> None:
    """Keeps the channel alive."""


def create(context: RankContext, common: Create, part: None) -> None:
    """Makes a model."""
    spec = ModelSpec(lora=common.lora, base=BASE) if common.lora is not None else ModelSpec()
    context.engine.create(common.model, spec)


def drop(context: RankContext, common: str, part: None) -> None:
    """Forgets a model."""
    context.engine.delete(common)


def train(context: RankContext, common: Train, part: list[Datum]) -> tuple[list[np.ndarray], list[float]]:
    """Log-probabilities and losses of this rank's rows, in their order."""
    run = context.engine.forward if common.forward_only else context.engine.forward_backward
    out = run(part, common.loss, model=common.model, mix=common.mix, strict=False)
    return out.logprobs, out.losses


def optim(context: RankContext, common: tuple[str, AdamParams], part: None) -> tuple[Metrics, str]:
    """Metrics of the step, or why it was not made (the same on every rank, and before any weight changed)."""
    model, adam = common
    try:
        return context.engine.optim_step(model, adam), ""
    except RunError as error:
        context.engine.clear_gradient(model)
        return {}, str(error)


def clear(context: RankContext, common: str, part: None) -> None:
    """Drops the pending gradient of a model."""
    context.engine.clear_gradient(common)


def state(context: RankContext, common: tuple[str, bool], part: None) -> dict[str, Any] | None:
    """A model's tensors on the CPU, from rank 0."""
    model, optimizer = common
    out = context.engine.model_state(model, optimizer=optimizer)
    return out if context.engine.world.is_leader else None


def load(context: RankContext, common: tuple[str, dict[str, Any], bool], part: None) -> None:
    """Puts a saved state into a model."""
    model, tensors, optimizer = common
    context.engine.load_model_state(model, tensors, optimizer=optimizer)


def publish(context: RankContext, common: tuple[str, str], part: None) -> None:
    """Makes a read-only copy of a model under a name."""
    name, model = common
    context.engine.freeze_adapter(name, model)


def load_adapter(context: RankContext, common: LoadAdapter, part: None) -> None:
    """Makes saved weights sampleable."""
    context.engine.load_adapter(common.name, common.lora, BASE, common.weights)


def replace_base(context: RankContext, common: dict[str, Tensor], part: None) -> None:
    """Other whole weights to sample from."""
    context.engine.replace_base(BASE, common)


def drop_adapter(context: RankContext, common: str, part: None) -> None:
    """Forgets a read-only adapter; nothing may be sampling from it."""
    context.engine.delete_adapter(common)


def park(context: RankContext, common: str, part: None) -> None:
    """Moves an idle tenant to host memory."""
    context.engine.offload(common)


def undo(context: RankContext, common: str, part: None) -> None:
    """Forgets what was made under a name, on the ranks where it was made."""
    engine = context.engine
    if common in engine.models:
        engine.delete(common)
    if common in engine.adapters:
        engine.delete_adapter(common)


def sample(context: RankContext, common: float, part: SamplingBatch) -> SamplingOutput:
    """Admits, then draws for about `common` seconds; returns early on rank 0 when work is pending, or nothing is left.

    No collective is inside, so ranks may stop at different steps. When the base itself gives logits that are not
    finite (whole weights of a training that went wrong), all requests of this rank are refused: they share it.
    """
    sampler = context.engine.open_sampler(BASE).sampler
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
            if time.monotonic() >= end or context.has_pending_work():
                break
    except RunError:
        refused += [(uid, NOT_FINITE) for uid in sampler.abandon()]
    new_tokens = {uid: new for uid, known in part.watched.items() if len(new := sampler.partial(uid)[known:])}
    return SamplingOutput(samples, refused, sampler.unfinished(), new_tokens)


def score(context: RankContext, common: None, part: list[Question]) -> list[PromptLogprobsResult | Problem]:
    """What is asked about prompts, in their order. Keeps nothing, so one that cannot be answered harms no other."""
    try:
        return _scored(context, part)
    except (UserError, torch.OutOfMemoryError):
        return [_scored_alone(context, question) for question in part]


def _scored_alone(context: RankContext, question: Question) -> PromptLogprobsResult | Problem:
    try:
        return _scored(context, [question])[0]
    except UserError as error:
        return Problem(str(error))
    except torch.OutOfMemoryError:
        return Problem(f"{len(question.query.tokens)} tokens and what is asked about them do not fit into memory")


def _scored(context: RankContext, part: list[Question]) -> list[PromptLogprobsResult]:
    engine = context.engine
    queries = [question.query for question in part]
    found = score_prompts(engine.open_sampler(BASE).module, queries, engine.adapters, max_tokens=context.score_tokens)
    for question, stats in zip(part, found, strict=True):
        if question.tail and stats.topk_ids is not None and stats.topk_logprobs is not None:
            start = question.query.start
            stats.topk_ids, stats.topk_logprobs = stats.topk_ids[start:].copy(), stats.topk_logprobs[start:].copy()
    return found


COMMANDS: dict[str, Callable[[RankContext, Any, Any], Any]] = {
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


def execute(context: RankContext, method: str, common: Any, part: Any) -> Any:
    """This rank's answer to a command, or the Problem that it refuses it for."""
    local = method in LOCAL or (method == "create" and common.lora is not None)
    try:
        return COMMANDS[method](context, common, part)
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


# ---- from rank 0 to all ----------------------------------------------------------------------------------------------

STOP = "stop"


class Leader:
    """Rank 0's end of the control channel. Call from one thread only."""

    def __init__(self, world: World, context: RankContext, *, timeout_seconds: float) -> None:
        self.world, self.context = world, context
        self._last = time.monotonic()
        self._idle_after = timeout_seconds / 4

    def call(self, method: str, common: Any = None, parts: list[Any] | None = None) -> list[Any]:
        """Every rank's answer to `method`, in rank order. `common` goes to all, parts[r] to rank r. Raises UserError
        for what all ranks refused, or what could be taken back where it was done; RunError when they disagree."""
        answers = self._broadcast_command(method, common, parts if parts is not None else [None] * self.world.size)
        problems = [answer.text for answer in answers if isinstance(answer, Problem)]
        if not problems:
            return answers
        if len(problems) < len(answers):
            if not made(method, common):
                raise RunError(f"the ranks disagree about {method!r}, so their states may differ: {problems[0]}")
            self._broadcast_command("undo", made(method, common), [None] * self.world.size)
        raise UserError(problems[0])

    def _broadcast_command(self, method: str, common: Any, shares: list[Any]) -> list[Any]:
        if self.world.size == 1:
            return [execute(self.context, method, common, shares[0])]
        share: list[Any] = [None]
        dist.scatter_object_list(share, [(method, common, one) for one in shares], src=0, group=self.world.control)
        own = execute(self.context, method, common, shares[0])
        answers: list[Any] = [None] * self.world.size
        dist.gather_object(own, answers, dst=0, group=self.world.control)
        self._last = time.monotonic()
        return answers

    def idle(self) -> None:
        """Keeps the followers' wait within their timeout; cheap, and does nothing most of the time."""
        if self.world.size > 1 and time.monotonic() - self._last > self._idle_after:
            self.call("nothing")

    def stop(self) -> None:
        """Lets the followers leave."""
        if self.world.size > 1:
            share: list[Any] = [None]
            dist.scatter_object_list(share, [(STOP, None, None)] * self.world.size, src=0, group=self.world.control)


def serve_commands(world: World, context: RankContext) -> None:
    """What every other rank does, until the leader says stop."""
    while True:
        share: list[Any] = [None]
        dist.scatter_object_list(share, None, src=0, group=world.control)
        method, common, part = share[0]
        if method == STOP:
            return
        dist.gather_object(execute(context, method, common, part), None, dst=0, group=world.control)
