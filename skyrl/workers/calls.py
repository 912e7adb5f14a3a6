"""The environments of episodes that are being played, and the calls to them: what a rank and its workers share.

`LocalCalls` makes each call where it is asked for, in the rank's own process; `WorkerPool` (pool.py) has the same
methods and makes them in processes of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from skyrl.config.schema import EnvConfig
from skyrl.envs.base import Environment, StepResult, group_rewards_of, takes_seed
from skyrl.envs.guard import Guard, Outcome, blame, method_of
from skyrl.envs.rewards.base import GroupCall
from skyrl.envs.wrappers import classes_of, make_environment
from skyrl.types import Message, Metrics, Prompt

RETRIES = 2  # after a RetryableError, for classes that do not say how often
BACKOFF_SECONDS = 0.25  # before the first repetition; doubled before each further one
FORKED_STATUS = 71
_STEP = tuple(field.name for field in dataclasses.fields(StepResult))  # a subclass may have more, for its own use
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """One call of an episode's environment.

    opening: the prompt and the seed of reset, where there is no environment of this episode yet: it is made and reset
    first. texts: of "score", which calls the rewards of a whole group and has no environment.
    past: the texts of turns that are played again before the call, and for reset and each of them the digest of
    what came back the first time ("" = not known).
    """

    key: int
    method: Literal["reset", "step", "close", "score"]
    text: str = ""
    opening: tuple[Prompt, int] | None = None
    past: tuple[tuple[str, str], ...] = ()
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What became of a call of episode `key`. counts: what had to be done for it beside the call, as metrics."""

    key: int
    outcome: Outcome
    counts: Metrics = dataclasses.field(default_factory=dict)


def encode(value: Any) -> bytes:
    """What a reset or a step returned, as JSON. Raises TypeError or ValueError for what JSON has no word for."""
    fields = {name: getattr(value, name) for name in _STEP} if isinstance(value, StepResult) else value
    return json.dumps(fields, allow_nan=False, separators=(",", ":")).encode()


def decode(method: str, data: bytes) -> list[Message] | StepResult | list[dict[str, float]] | None:
    """The value that `encode` wrote for this method."""
    value = json.loads(data)
    return StepResult(**value) if method == "step" else value


def digest(value: Any) -> str:
    """A short fingerprint of what a call returned."""
    return hashlib.blake2b(encode(value), digest_size=8).hexdigest()


def attempts_of(cls: type[Environment]) -> int:
    """How often a call of this class is made at most when what it raises may pass."""
    return 1 + (cls.retries or RETRIES)


def given_up(problem: str, attempts: int) -> Outcome:
    """A failure that is nobody's fault, after so many attempts."""
    return Outcome(None, f"{problem}, in each of {attempts} attempts", "infrastructure")


class Player:
    """Holds the environment of each episode that is played in this process, and makes the calls under a guard.

    An environment is closed and dropped when it is done, is told to close or fails; after an error that may pass it
    stays as it is, so that the call can be made again.
    """

    def __init__(self, cfg: EnvConfig, beat: Callable[[], object] = lambda: None) -> None:
        self._cfg, self.beat = cfg, beat  # beat: called when a call begins
        self._guard = Guard(cfg)
        self._environments: dict[int, tuple[Environment, Prompt]] = {}
        self._cwd, self._pid = os.getcwd(), os.getpid()
        self._said_cwd = False

    def holds(self, key: int) -> bool:
        """Whether there is an environment of episode `key`."""
        return key in self._environments

    def refused(self, call: Call, problem: str) -> Outcome:
        """The outcome of a call that returned something that `problem` is said of."""
        env, prompt = self._environments.get(call.key, (None, None))
        who = (
            blame(method_of(env, call.method), prompt)
            if env and prompt
            else f"environment {self._cfg.name}.{call.method}"
        )
        return Outcome(None, f"{who}: returned {problem}", "error")

    def keys(self) -> list[int]:
        """The episodes that there are environments of."""
        return list(self._environments)

    def make(self, call: Call) -> Outcome:
        """Makes one call and waits for it."""
        steps = self._steps(call)
        outcome = None
        try:
            while True:
                method, arguments, prompt, what = steps.send(outcome)
                self.beat()
                outcome = self._guard.call(method, *arguments, prompt=prompt, what=what)
                self._look_around(method, prompt)
        except StopIteration as end:
            return end.value

    async def make_async(self, call: Call) -> Outcome:
        """The same beside other calls, in an event loop."""
        steps = self._steps(call)
        outcome = None
        try:
            while True:
                method, arguments, prompt, what = steps.send(outcome)
                outcome = await self._guard.call_async(method, *arguments, prompt=prompt, what=what)
        except StopIteration as end:
            return end.value

    def _steps(self, call: Call) -> Generator[tuple[Callable, tuple, Prompt, str], Any, Outcome]:
        """What is to be called, one after the other; takes each outcome, and returns that of the whole call."""
        outcome, done = Outcome[Any](), False
        if call.method == "score":
            return (yield from self._score(call))
        if call.opening is not None:
            prompt, seed = call.opening
            what = f"environment {self._cfg.name}.__init__"
            made = yield make_environment, (self._cfg,), prompt, what
            if made.value is None:
                return made
            env = made.value
            self._environments[call.key] = env, prompt
            seeded = {"seed": seed} if takes_seed(type(env).reset) else {}
            resetting, step = method_of(env, "reset", **seeded), method_of(env, "step")
            played = [(resetting, (prompt,))] + [(step, (text,)) for text, _ in call.past[1:]]
            for number, (method, arguments) in enumerate(played):
                outcome = yield method, arguments, prompt, ""
                known = call.past[number][1] if call.past else ""
                if not outcome.invalid and known and digest(outcome.value) != known:
                    where = f"turn {number}" if number else "reset"
                    outcome = Outcome(
                        None,
                        f"environment {self._cfg.name}, prompt {prompt.uid}: its worker process was lost, and playing "
                        f"the episode again gave something else at {where}; use the seed that reset is given",
                        "infrastructure",
                    )
                if outcome.invalid:
                    yield from self._close(call.key)
                    return outcome
        if call.method == "step":
            env, prompt = self._environments[call.key]
            outcome = yield method_of(env, "step"), (call.text,), prompt, ""
            done = isinstance(outcome.value, StepResult) and outcome.value.done
            if outcome.kind == "retryable":
                return outcome
        if call.method == "close" or outcome.invalid or done:
            yield from self._close(call.key)
        return outcome

    def _score(self, call: Call) -> Generator[tuple[Callable, tuple, Prompt, str], Any, Outcome]:
        assert call.opening is not None
        prompt, scores = call.opening[0], [dict[str, float]() for _ in call.texts]
        for reward, params in group_rewards_of(self._cfg):
            outcome = yield GroupCall(reward, params, call.texts), (prompt,), prompt, f"group reward {reward.name}"
            if outcome.invalid:
                return outcome
            for score, more in zip(scores, outcome.value, strict=True):
                score.update(more)
        return Outcome(scores)

    def _close(self, key: int) -> Generator[tuple[Callable, tuple, Prompt, str], Any, None]:
        env, prompt = self._environments.pop(key)
        yield method_of(env, "close"), (), prompt, ""

    def _look_around(self, method: Callable, prompt: Prompt) -> None:
        """Puts right what a call has done to this process."""
        if os.getpid() != self._pid:
            os._exit(FORKED_STATUS)  # a child that user code has forked and let go on here
        if _cwd() != self._cwd:
            os.chdir(self._cwd)
            if not self._said_cwd:
                self._said_cwd = True
                log.warning(
                    f"{blame(method, prompt)}: changed the working directory; it is {self._cwd} again after each call: "
                    "use absolute paths, or cwd= of a child process"
                )


def _cwd() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return ""


class LocalCalls:
    """Calls made in this process, each before the method returns; one hangs, all wait."""

    def __init__(self, cfg: EnvConfig) -> None:
        self._player = Player(cfg)
        self._attempts = attempts_of(classes_of(cfg)[0])
        self._answers: list[Answer] = []

    def open(self, key: int, prompt: Prompt, seed: int) -> None:
        """Makes the environment of an episode and resets it; the answer is its first messages."""
        self._make(Call(key, "reset", opening=(prompt, seed)))

    def step(self, key: int, text: str) -> None:
        """Gives a turn of the model to the environment; the answer is its StepResult."""
        self._make(Call(key, "step", text))

    def score(self, key: int, prompt: Prompt, texts: Sequence[str]) -> None:
        """Calls the environment's rewards of a group; the answer is a dict of objectives for each of the texts."""
        self._make(Call(key, "score", opening=(prompt, 0), texts=tuple(texts)))

    def close(self, key: int) -> None:
        """Frees the environment of an episode that has ended, if there still is one. Without an answer."""
        if self._player.holds(key):
            self._player.make(Call(key, "close"))

    def poll(self, wait: bool) -> list[Answer]:
        """What was answered since the last time. With `wait`, a moment may be spent on waiting for something."""
        del wait
        answers, self._answers = self._answers, []
        return answers

    @property
    def waiting(self) -> int:
        """Calls whose answers `poll` has not given yet."""
        return len(self._answers)

    def drop(self) -> None:
        """Takes everything back that is under way."""
        for key in self._player.keys():
            self.close(key)

    def __enter__(self) -> LocalCalls:
        return self

    def __exit__(self, *error: object) -> None:
        Guard.rest()

    def _make(self, call: Call) -> None:
        for attempt in range(1, self._attempts + 1):
            outcome = self._player.make(call)
            if outcome.kind != "retryable":
                break
            if attempt < self._attempts:
                time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1))
        counts = {"workers/retries:sum": float(attempt - 1)} if attempt > 1 else {}
        if outcome.kind in ("retryable", "memory"):
            outcome = given_up(outcome.invalid, attempt)
        self._answers.append(Answer(call.key, outcome, counts))
