"""Commands from rank 0 to all ranks, and what each rank does for one. Only here the service touches the engine.

Commands come from fixed tables, never from a name that a client sent, and one is sent only after everything in it was
checked. A UserError that it raises all the same, before anything has changed, is a refusal if all ranks have it. Any
other exception ends its process, and with it the job, because the other ranks cannot know how far it came.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch

from skyrl.distributed.collectives import gather_to_leader, scatter_objects
from skyrl.distributed.init import World
from skyrl.distributed.phases import waiting
from skyrl.engine import Engine
from skyrl.envs import clock
from skyrl.sampler.prompts import PromptLogprobsRequest, PromptLogprobsResult, score_prompts
from skyrl.types import AdamParams, Datum, LossSpec, Metrics, RunError, Sample, SampleRequest, UserError

BASE = "base"
NOT_FINITE = "the model of this request gives log-probabilities that are not finite"
STOP = "stop"
SOON = 1 / 8  # of a stretch, after which it ends for who has waited: not each step, which would cost all others
R = TypeVar("R", SampleRequest, PromptLogprobsRequest)


@dataclass
class RankContext:
    """One rank's engine, which of its models requests are drawn from that name no other, and what interrupts sampling
    when work is pending (rank 0 only)."""

    engine: Engine
    score_tokens: int
    model: str = BASE
    has_pending_work: Callable[[], bool] = field(default=lambda: False)

    def own(self, requests: list[R]) -> list[R]:
        """The requests; those that name no adapter are drawn through `model`, where that is one."""
        if self.engine.models[self.model].base is None:
            return requests
        return [replace(one, model=one.model or self.model) for one in requests]


@dataclass
class SamplingBatch:
    """One rank's share of a stretch of sampling: new requests, and withdrawn ones. `watched`: how many tokens of a
    sequence are known already, for those that somebody reads while they grow. `awaited`: sequences of clients with few,
    beside others: the stretch ends soon after one of them does."""

    requests: list[SampleRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    watched: dict[str, int] = field(default_factory=dict)
    awaited: set[str] = field(default_factory=set)


@dataclass
class SamplingOutput:
    """What a stretch of sampling gave: finished samples, requests that cannot be run and why, the new tokens of watched
    ones, and the seconds of one step (0: none was made)."""

    samples: list[Sample]
    refused: list[tuple[str, str]]
    new_tokens: dict[str, np.ndarray]
    step_seconds: float = 0.0


@dataclass(frozen=True)
class Problem:
    """Why a rank did not do a command, or answer a question. Nothing has changed on it."""

    text: str


# ---- what each rank does --------------------------------------------------------------------------------------------

# Methods of the engine that are commands as they are: their arguments, equal on every rank, are all there is to say.
ENGINE_METHODS = (
    "create", "delete", "clear_gradient", "offload", "freeze_adapter", "load_adapter", "delete_adapter", "replace_base",
)  # fmt: skip


def nothing(context: RankContext, part: None) -> None:
    """Keeps the channel alive."""


def train(
    context: RankContext, part: list[Datum], loss: LossSpec, forward_only: bool, mix: bool, model: str | None
) -> tuple[list[np.ndarray], list[float]]:
    """Log-probabilities and losses of this rank's rows, in their order. The rows are one model's, or (None) of
    several, and each says whose it is."""
    run = context.engine.forward if forward_only else context.engine.forward_backward
    out = run(part, loss, model=model, mix=mix, strict=False)
    return out.logprobs, out.losses


def optim_step(context: RankContext, part: None, model: str, adam: AdamParams) -> Metrics | Problem:
    """Metrics of the step, or why it was not made (the same on every rank, and before any weight changed)."""
    try:
        return context.engine.optim_step(model, adam)
    except RunError as error:
        context.engine.clear_gradient(model)
        return Problem(str(error))


def model_state(context: RankContext, part: None, model: str, optimizer: bool) -> dict[str, Any] | None:
    """A model's tensors on the CPU, from rank 0."""
    out = context.engine.model_state(model, optimizer=optimizer)
    return out if context.engine.world.is_leader else None


def load_model_state(context: RankContext, part: None, model: str, tensors: dict[str, Any], optimizer: bool) -> None:
    """Puts a saved state into a model."""
    context.engine.load_model_state(model, tensors, optimizer=optimizer)


def undo(context: RankContext, part: None, name: str) -> None:
    """Forgets what was made under a name, on the ranks where it was made."""
    engine = context.engine
    if name in engine.models:
        engine.delete(name)
    if name in engine.adapters:
        engine.delete_adapter(name)


def sample(context: RankContext, part: SamplingBatch, seconds: float) -> SamplingOutput:
    """Admits, then draws for about so many seconds; returns early on rank 0 when work is pending, or nothing is left.

    No collective is inside, so ranks may stop at different steps. When the base itself gives logits that are not
    finite (whole weights of a training that went wrong), all requests of this rank are refused: they share it.
    """
    sampler = context.engine.open_sampler(context.model).sampler
    refused, samples = [], []
    for uid in part.cancelled:
        sampler.cancel(uid)
    for request in context.own(part.requests):
        try:
            sampler.add(request)
        except UserError as error:
            refused.append((request.uid, str(error)))
    start, steps = time.monotonic(), 0
    try:
        while sampler.unfinished():
            samples += sampler.step()
            steps += 1
            told = any(one.uid in part.awaited for one in samples)
            if time.monotonic() - start >= seconds * (SOON if told else 1) or context.has_pending_work():
                break
    except RunError:
        refused += [(uid, NOT_FINITE) for uid in sampler.abandon()]
    new_tokens = {uid: new for uid, known in part.watched.items() if len(new := sampler.partial(uid)[known:])}
    return SamplingOutput(samples, refused, new_tokens, (time.monotonic() - start) / steps if steps else 0.0)


def score(context: RankContext, part: list[PromptLogprobsRequest]) -> list[PromptLogprobsResult | Problem]:
    """What is asked about prompts, in their order. Keeps nothing, so one that cannot be answered harms no other: when
    they cannot be answered together, each is asked alone."""
    opened, own = context.engine.open_sampler(context.model), context.own(part)
    try:
        return list(score_prompts(opened.module, own, opened.adapters, max_tokens=context.score_tokens))
    except torch.OutOfMemoryError:
        if len(part) > 1:
            return [score(context, [request])[0] for request in part]
        return [Problem(f"{len(part[0].tokens)} tokens and what is asked about them do not fit into memory")]


FUNCTIONS: dict[str, Callable[..., Any]] = {
    one.__name__: one for one in (nothing, train, optim_step, model_state, load_model_state, undo, sample, score)
}
"""Commands that are more than a method of the engine."""

# These make something under the name that is their first argument. Of it one rank may have room and another not, for
# nothing in them waits for another rank; then `undo` takes it back. Whole models (no LoRA) are made together.
MAKERS = ("create", "freeze_adapter", "load_adapter")
# These raise UserError before they change anything. Any other error, of any command, ends the job.
REFUSABLE = (*MAKERS, "load_model_state", "replace_base", "train")


def execute(context: RankContext, method: str, args: tuple[Any, ...], part: Any) -> Any:
    """This rank's answer to a command, or the Problem that it refuses it for."""
    try:
        with waiting(method):  # a GPU waits for other ranks outside of any call of torch.distributed
            if method in ENGINE_METHODS:
                return getattr(context.engine, method)(*args)
            return FUNCTIONS[method](context, part, *args)
    except UserError as error:
        if method not in REFUSABLE:
            raise
        return Problem(str(error))
    except torch.OutOfMemoryError:
        if method not in MAKERS or (method == "create" and args[1].lora is None):
            raise
        return Problem("there is no memory for one more model; unload some, or ask for a smaller rank")


# ---- from rank 0 to all ---------------------------------------------------------------------------------------------


class Leader:
    """Rank 0's end of the control channel. Call from one thread only."""

    def __init__(self, world: World, context: RankContext, *, timeout_seconds: float) -> None:
        self.world, self.context = world, context
        self._last = clock.now()
        self._idle_after = timeout_seconds / 4

    def call(self, method: str, *args: Any, parts: list[Any] | None = None) -> list[Any]:
        """Every rank's answer to `method`, in rank order. `args` go to all, parts[r] to rank r. Raises UserError for
        what all ranks refused, or what could be taken back where it was done; RunError when they disagree."""
        answers = self._broadcast_command(method, args, parts)
        problems = [answer.text for answer in answers if isinstance(answer, Problem)]
        if not problems:
            return answers
        if len(problems) < len(answers):
            if method not in MAKERS:
                raise RunError(f"the ranks disagree about {method!r}, so their states may differ: {problems[0]}")
            self._broadcast_command("undo", args[:1], None)
        raise UserError(problems[0])

    def _broadcast_command(self, method: str, args: tuple[Any, ...], parts: list[Any] | None) -> list[Any]:
        parts = parts if parts is not None else [None] * self.world.size
        _, _, part = scatter_objects(self.world, [(method, args, one) for one in parts])
        answers = gather_to_leader(self.world, execute(self.context, method, args, part))
        self._last = clock.now()
        return answers

    def idle(self) -> None:
        """Keeps the followers' wait within their timeout; cheap, and does nothing most of the time."""
        if clock.now() - self._last > self._idle_after:
            self.call("nothing")

    def stop(self) -> None:
        """Lets the followers leave."""
        scatter_objects(self.world, [(STOP, (), None)] * self.world.size)


def serve_commands(world: World, context: RankContext) -> None:
    """What every other rank does, until the leader says stop."""
    while True:
        command: tuple[str, tuple[Any, ...], Any] = scatter_objects(world, None)
        method, args, part = command
        if method == STOP:
            return
        gather_to_leader(world, execute(context, method, args, part))
