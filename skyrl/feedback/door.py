"""POST /feedback and GET /feedback: who may say what of which answer, and how often. Part of the Tinker server, of a
training run that serves, and of a small server of its own (`skyrl-tx feedback-server`)."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, StringConstraints, model_validator
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from skyrl.config.load import load_config
from skyrl.config.schema import FeedbackConfig
from skyrl.feedback.queue import FeedbackQueue, FeedbackRefused, KeptAnswer, Verdict
from skyrl.types import UserError
from skyrl.web.auth import Keys, Signer, find_owner, read_keys
from skyrl.web.http import (
    FAULT,
    BodyReader,
    HttpError,
    error_reply,
    in_thread,
    log,
    log_fault,
    read_json,
    reply,
    serve_in_thread,
)
from skyrl.web.message import INT32_MAX, JsonMessage, Name, Text, refused

MAX_BODY = 1 << 20
SENDERS = 4096  # whose rate is known; beyond it those who have been silent for a minute are forgotten


class FeedbackBody(JsonMessage, operation="feedback"):
    """What a client says of one answer: its response's id, which choice of it, and a reward, objectives or a thumb. A
    post with the same content is a repetition, and an idempotency_key names one answer alone."""

    id: Text
    choice: int = Field(0, ge=0, le=INT32_MAX)
    reward: float | None = None
    objectives: dict[Name, float] | None = Field(None, min_length=1, max_length=16)
    thumbs: Literal["up", "down"] | None = None
    comment: Annotated[str, StringConstraints(max_length=4096)] = ""
    idempotency_key: Annotated[str, StringConstraints(max_length=256)] = ""

    @model_validator(mode="after")
    def _says_one_thing(self) -> FeedbackBody:
        if (self.reward, self.objectives, self.thumbs).count(None) != 2:
            raise refused("says nothing, or several things; give one of: reward, objectives, thumbs")
        return self

    def verdict(self, options: FeedbackConfig) -> Verdict:
        """As it is queued. Raises UserError for what is out of range or has no such name."""
        limit = options.reward_limit
        plain = self.reward or 0.0 if self.thumbs is None else {"up": limit, "down": -limit}[self.thumbs]
        given = self.objectives or {"reward": plain}
        for name, value in given.items():
            if name not in ("reward", *options.objectives):
                known = ", ".join(options.objectives) or "none; feedback.objectives names some"
                raise UserError(f"feedback: objectives has {name!r}; allowed: {known}")
            if abs(value) > limit:
                raise UserError(f"feedback: {name}={value}; allowed: {-limit:g} to {limit:g} (feedback.reward_limit)")
        numbers = {name: float(value) for name, value in given.items()}
        return Verdict(self.id, self.choice, numbers, self.comment, self.idempotency_key)


class FeedbackDoor:
    """The endpoints over a queue. `weights`: what names the model that answers are of, "" = what clients asked for."""

    def __init__(self, queue: FeedbackQueue, keys: Keys, signer: Signer, *, weights: str = "") -> None:
        self.queue, self.keys, self.signer, self.weights = queue, keys, signer, weights
        self._bodies = BodyReader()
        self._allowance: dict[str, tuple[float, float]] = {}  # sender -> (posts that are left, when that was)

    def routes(self) -> list[Route]:
        """The endpoints, also below /v1, where OpenAI clients have their base address."""
        return [Route(f"{prefix}/feedback", self._answer, methods=["GET", "POST"]) for prefix in ("", "/v1")]

    def keep(self, owner: str, source: str, episode: str, first: int, request: Any, sequences: Sequence[Any]) -> None:
        """Stores the samples of a request, choices `first` and on, on their way to a client; `source` names the weights
        it asked for. On a full disk they are given all the same, and cannot be rated."""
        params, problem = request.sampling_params, ""
        if params.temperature == 0 or params.top_p < 1 or params.top_k > 0:
            problem = "at temperature 0, or with top_p or top_k, it is no draw of the policy's own distribution"
        weights, prompt = self.weights or source, np.asarray(request.prompt, np.int64)
        answers = []
        for choice, one in enumerate(sequences, first):
            tokens, logprobs = np.asarray(one.tokens, np.int64), np.asarray(one.logprobs, np.float32)
            drawn = (one.version, prompt, tokens, logprobs, one.stop_reason)
            answers.append(KeptAnswer(episode, choice, owner, weights, *drawn, problem))
        try:
            self.queue.add(answers)
        except UserError as error:
            self.queue.refused[owner, "disk"] += len(answers)
            log.warning("an answer is not kept, so nobody can rate it: %s", error)

    async def _answer(self, request: Request) -> Response:
        try:
            owner = find_owner(self.keys, self.signer, request)
            if request.method in ("GET", "HEAD"):
                return reply(await in_thread(self.queue.counts, owner))
            return await self._post(request, owner)
        except ClientDisconnect:
            return Response(status_code=499)
        except HttpError as error:
            return error_reply(error)
        except Exception as error:
            log_fault(request, error)
            return error_reply(HttpError(500, FAULT))

    async def _post(self, request: Request, owner: str) -> Response:
        sender = owner if self.keys.required or request.client is None else request.client.host

        def read(body: bytes) -> Verdict:
            return FeedbackBody.parse(read_json(body)).verdict(self.queue.options)

        try:
            self._check_rate(sender)
            said = await self._bodies.parse(request, sender, read, max_bytes=MAX_BODY, limit="in feedback")
            new, problem = await in_thread(self.queue.give, owner, said)
        except UserError as error:
            shut_out = error if isinstance(error, FeedbackRefused) else FeedbackRefused("invalid", 400, str(error))
            self.queue.refused[owner, shut_out.reason] += 1
            headers = {"retry-after": "1"} if shut_out.status in (429, 503) else {}
            raise HttpError(shut_out.status, str(error), headers) from error
        status = "accepted" if new else "repeated"
        return reply(
            {"id": said.episode, "choice": said.choice, "status": status, "learns": not problem, "why": problem}
        )

    def _check_rate(self, sender: str) -> None:
        """Lets feedback.rate_per_minute posts through in a minute, as many at once. Raises FeedbackRefused."""
        rate, now = self.queue.options.rate_per_minute, time.monotonic()
        if len(self._allowance) > SENDERS:
            self._allowance = {who: own for who, own in self._allowance.items() if own[1] > now - 60}
        left, at = self._allowance.get(sender, (float(rate), now))
        left = min(float(rate), left + (now - at) * rate / 60)
        self._allowance[sender] = (max(left - 1, 0.0) if left >= 1 else left, now)
        if left < 1:
            raise FeedbackRefused("limited", 429, f"feedback: more than {rate} in a minute (feedback.rate_per_minute)")


def serve_feedback(args: list[str]) -> None:
    """`skyrl-tx feedback-server FOLDER [option=value ...]`: POST /feedback alone, for the queue of a run or a server
    that lies in FOLDER; options are those of skyrl.serve. Until SIGINT or SIGTERM. Raises UserError."""
    if not args or "=" in args[0] or args[0].startswith("-"):
        raise UserError("feedback-server: give the folder of the queue first, as feedback.folder names it")
    cfg = load_config([f"feedback.folder={args[0]}", "feedback.enabled=true", *args[1:]], mode="serve")
    keys, queue = read_keys(cfg.service), FeedbackQueue(Path(cfg.feedback.folder), cfg.feedback)
    app = Starlette(routes=FeedbackDoor(queue, keys, Signer()).routes())
    server = serve_in_thread(app, cfg.service.host, cfg.service.port, close=lambda: None, options="service")
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    print(f"skyrl: POST {server.url}/feedback goes into {queue.folder}", file=sys.stderr, flush=True)
    while not stopped.wait(1.0):
        server.check()
    server.stop()
    queue.close()
