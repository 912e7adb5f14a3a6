"""Calls to code that users write: bounded in time, checked, and never turned into a score when they fail.

In a worker process (skyrl/workers) net 1 is enough, since the rank ends a worker whose call is beyond its deadline.
Calls in the rank itself have three nets, because no single one catches everything:

1. SIGPROF interrupts Python code, sleeping, waiting, and regular expressions. Main thread only. It is sent by the
   thread of net 2 when the time is over, and by ITIMER_PROF, which counts CPU time and needs no interpreter: a regular
   expression keeps every other thread from running. Neither depends on SIGALRM, so a verifier that sets and clears an
   alarm of its own cannot disarm it.
2. A daemon thread ends the process (exit status 70, one line) when a call is 5 s beyond its deadline: C code that
   ignores signals, code that swallows the interrupt, or a call off the main thread, where no signal arrives.
3. C code that never lets go of the interpreter stops that thread as well. Then ITIMER_VIRTUAL, which counts CPU time
   and needs no interpreter either, ends the process (SIGVTALRM) 30 s beyond the deadline, with faulthandler's dump that
   shows the guilty line. C code that waits there without computing counts as late once it returns; one that waits
   there for ever is left to the watchers of the other ranks.

Time is that of envs/clock.py, and CPU time: a process that was stopped for a while is not taken for a call that hangs.
Uses ITIMER_PROF and ITIMER_VIRTUAL while calls come in; another user of them in the same process loses its setting.
An alarm (ITIMER_REAL) that was running before a call goes on after it, with its handler.
"""

from __future__ import annotations

import asyncio
import faulthandler
import inspect
import logging
import math
import numbers
import os
import re
import signal
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from types import FrameType
from typing import Any, Generic, TypeVar

from skyrl.config.schema import EnvConfig
from skyrl.envs import clock
from skyrl.envs.base import Environment, RetryableError, StepResult
from skyrl.envs.data_files import messages_problem, shortest
from skyrl.envs.rewards.base import GroupCall, add_objectives
from skyrl.types import Message, Prompt, UserError

EXIT_STATUS = 70  # EX_SOFTWARE
GRACE_SECONDS = 5.0
LAST_RESORT_SECONDS = 30.0
POLL_SECONDS = 0.25
REPEAT_SECONDS = 1.0  # until the next interrupt, for one that falls into a __del__ or a callback is dropped by Python

LARGEST = 1e30  # of rewards and metrics: squares and sums of them stay numbers, and a loss's float32 holds them
_FAR_SECONDS = 1e6  # an alarm that never goes off: what is left of it tells whether the call has set one of its own
_REDUCTIONS = (":mean", ":sum", ":max", ":min")
_LIBRARIES = tuple(sysconfig.get_paths()[key] for key in ("stdlib", "purelib")) + ("<frozen",)
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a call returned, or in one line why it failed, and of which `kind` that is. A failure is not a score.

    kind: "error" and "late" are the environment's own fault, which env.on_error is about. "infrastructure" (its worker
    died, an error that may pass did not) is nobody's: masked and counted, whatever env.on_error says. "retryable" and
    "memory" are what the caller does again.
    """

    value: T | None = None
    invalid: str = ""
    kind: str = ""


class _Interrupt(BaseException):
    """Raised into user code at the deadline. No Exception, so that `except Exception` there does not swallow it."""


class Guard:
    """Calls environments under env.timeout_seconds and env.on_error. One per thread that plays episodes.

    On the main thread an overlong call is interrupted. On any other thread it can only be waited for: it fails when it
    returns late, and the whole process ends 5 s after the deadline if it does not return. KeyboardInterrupt passes.
    `rest` after a batch of calls ends the third net with the batch instead of a quarter of a second later.
    """

    def __init__(self, cfg: EnvConfig) -> None:
        self.timeout_seconds, self.on_error = cfg.timeout_seconds, cfg.on_error

    @staticmethod
    def rest() -> None:
        """Disarms the third net, unless another thread's call is running."""
        _WATCHDOG.rest()

    def call(self, method: Callable[..., T], *arguments: Any, prompt: Prompt, what: str = "") -> Outcome[T]:
        """method(*arguments), timed and checked. `method` is the reset, step or close of an environment, as in
        guard.call(env.step, text, prompt=prompt); anything else callable is timed only. What is `async def` is awaited.

        A reset must give at least one message; a step a StepResult whose reward and metrics are finite numbers (they
        become floats) and which is done or has a message to answer. A failure is Outcome(invalid=<one line>) under
        on_error=mask. Under on_error=stop it raises UserError, one line: environment, reward function, prompt and its
        file:line, what happened and where, what to do. `what` names the call there; "" = environment and method.
        """
        who = (method, prompt, what, self.timeout_seconds)
        try:
            result, seconds = self._timed(method, arguments, who)
        except (Exception, SystemExit, _Interrupt) as error:  # whatever it raises; sys.exit() must not end the run
            return self._failed(error, isinstance(error, _Interrupt), who)
        return self._returned(result, seconds, who)

    async def call_async(self, method: Callable[..., Any], *arguments: Any, prompt: Prompt, what: str = "") -> Outcome:
        """The same within an event loop, beside other calls: an overlong one is cancelled where it waits. Code that
        neither waits nor returns can only be ended with its process."""
        who, start, cut = (method, prompt, what, self.timeout_seconds), clock.now(), False

        task = asyncio.current_task()
        assert task is not None

        def cancel(task: asyncio.Task = task) -> None:
            nonlocal cut
            cut = True
            task.cancel()

        alarm = asyncio.get_running_loop().call_later(self.timeout_seconds, cancel)
        try:
            result = method(*arguments)
            if inspect.isawaitable(result):
                result = await result
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            # Who is cancelled at the deadline may say that this is nobody's fault.
            return self._failed(error, cut and not isinstance(error, RetryableError), who)
        finally:
            alarm.cancel()
        return self._returned(result, clock.now() - start, who)

    def _returned(self, result: Any, seconds: float, who: tuple) -> Outcome:
        if seconds > self.timeout_seconds:
            return self._refuse(self._overlong(f", {seconds:.1f} s"), "late", who)
        try:
            return Outcome(_checked(who[0], result))
        except BadResult as error:
            return self._refuse(f"returned {error}", "error", who)

    def _failed(self, error: BaseException, late: bool, who: tuple) -> Outcome:
        if late:
            return self._refuse(self._overlong(_place(error)), "late", who)
        flaky = isinstance(error, RetryableError) or (
            isinstance(error, Exception) and getattr(getattr(who[0], "__self__", None), "retries", 0) > 0
        )
        kind = "retryable" if flaky else "memory" if isinstance(error, MemoryError) else "error"
        return self._refuse(f"raised {describe_error(error)}", kind, who, error)

    def _refuse(self, problem: str, kind: str, who: tuple, cause: BaseException | None = None) -> Outcome:
        method, prompt, what, _ = who
        outcome: Outcome = Outcome(None, f"{blame(method, prompt, what)}: {problem}", kind)
        if self.on_error == "stop":
            raise_stop(outcome, cause)
        return outcome

    def _overlong(self, detail: str) -> str:
        return f"took longer than env.timeout_seconds={self.timeout_seconds:g}{detail}"

    def _timed(self, call: Callable[..., T], arguments: tuple, who: tuple) -> tuple[T, float]:
        """The result and how many seconds it took, with the nets above around the call."""
        me = threading.get_ident()
        start = clock.now()
        outer = _WATCHDOG.begin(me, start + self.timeout_seconds + GRACE_SECONDS, who)
        try:
            if me != threading.main_thread().ident:
                return _awaited(call(*arguments)), clock.now() - start
            return _interruptible(call, arguments, start, who), clock.now() - start
        finally:
            _WATCHDOG.end(me, outer)


def raise_stop(outcome: Outcome, cause: BaseException | None = None) -> None:
    """Raises the UserError of a failed call under env.on_error=stop, if it is one that this option is about."""
    if outcome.kind in ("error", "late"):
        advice = "fix it" if outcome.kind == "error" else "make it faster, raise that limit"
        line = f"{outcome.invalid}; {advice}, or set env.on_error=mask to leave such episodes out of training"
        raise UserError(line) from cause


_LOOP: list[asyncio.AbstractEventLoop] = []  # of this process, for methods that are `async def`


def _awaited(result: Any) -> Any:
    """`result`, or what it comes to where it is to be awaited. One loop for all calls: clients are bound to theirs."""
    if not inspect.isawaitable(result):
        return result
    if not _LOOP or _LOOP[0].is_running():  # interrupted in the middle of it
        _LOOP[:] = [asyncio.new_event_loop()]
    return _LOOP[0].run_until_complete(result)


def _interruptible(call: Callable[..., T], arguments: tuple, start: float, who: tuple) -> T:
    if signal.getsignal(signal.SIGPROF) is not _interrupt:
        # For good: one that is under way when a call ends would end the process if it found no handler.
        signal.signal(signal.SIGPROF, _interrupt)
    handler, before, begun = signal.getsignal(signal.SIGALRM), _WATCHDOG.due, time.monotonic()
    alarm, repeat = signal.setitimer(signal.ITIMER_REAL, _FAR_SECONDS)
    try:
        try:
            _WATCHDOG.due = start + who[3]
            signal.setitimer(signal.ITIMER_PROF, POLL_SECONDS, POLL_SECONDS)
            return _awaited(call(*arguments))
        finally:
            _WATCHDOG.due = before  # the interrupt may still come right before this line; never after it
    finally:
        _WATCHDOG.due = before
        if before == math.inf:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
        took = time.monotonic() - begun  # alarms go on while the process is stopped
        left, _ = signal.setitimer(signal.ITIMER_REAL, max(alarm - took, 1e-6) if alarm else 0.0, repeat)
        replaced = signal.getsignal(signal.SIGALRM) is not handler
        if replaced:
            # None: a handler that was not installed from Python; signal() cannot put it back.
            signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        forked = threading.get_ident() not in _WATCHDOG.calls  # a child of user code, which has no timers
        if replaced or not forked and not _FAR_SECONDS - took - 2.0 < left <= _FAR_SECONDS + 2.0:
            _say_alarm(who, running=0.0 < left < _FAR_SECONDS / 2)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """The handler of SIGPROF: raises into the call on the main thread if its time is over."""
    now = clock.now()
    if now >= _WATCHDOG.due:
        _WATCHDOG.due = now + REPEAT_SECONDS
        raise _Interrupt


_SAID: set[str] = set()


def say_once(text: str, who: str) -> None:
    """Warns of what code of the user does, once for each who it is: "<who>: <text>". On rank 0."""
    if who not in _SAID:
        _SAID.add(who)
        log.log(logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.DEBUG, f"{who}: {text}")


def _say_alarm(who: tuple, running: bool) -> None:
    method, prompt, what, timeout_seconds = who
    text = f"sets an alarm (SIGALRM) of its own; env.timeout_seconds={timeout_seconds:g} holds beside it"
    text += ", and the alarm that it left running is cleared after each call" if running else ""
    say_once(text, blame(method, prompt, what).partition(", prompt ")[0])


def method_of(env: Environment, name: str, **more: Any) -> Callable:
    """reset, step or close of `env` for `Guard.call`: known by this name, whatever stands in its place, so checked."""

    def call(self: Environment, *arguments: Any) -> Any:
        return getattr(self, name)(*arguments, **more)

    call.__name__ = name
    return call.__get__(env)


class BadResult(ValueError):
    """What an environment returned is not what it promised; the message goes on after the word "returned"."""


def _checked(method: Callable, value: Any) -> Any:
    if isinstance(method, GroupCall):
        return check_scores(method, value)
    if not isinstance(getattr(method, "__self__", None), Environment):
        return value
    if method.__name__ == "step":
        return check_step(value)
    return check_messages(value) if method.__name__ == "reset" else value


def check_messages(value: Any) -> list[Message]:
    """`value`, when it is a list of at least one message. Raises BadResult."""
    problem = messages_problem(value)
    if problem:
        raise BadResult(f"{_short(value)} as messages: it {problem}")
    return value


def check_step(value: object) -> StepResult:
    """`value`, when it is a sound StepResult; reward and metrics become floats. Raises BadResult."""
    if not isinstance(value, StepResult):
        raise BadResult(f"{_short(value)}, wanted a StepResult")
    value.reward = _reward(value.reward, "reward")
    value.done = _plain(value.done)
    if not isinstance(value.done, bool):
        raise BadResult(f"{_short(value.done)} as done, wanted True or False")
    if value.observation or not value.done:
        problem = messages_problem(value.observation)
        if problem:
            raise BadResult(f"{_short(value.observation)} as observation: it {problem}")
    if not isinstance(value.metrics, dict):
        raise BadResult(f"{_short(value.metrics)} as metrics, wanted a dict")
    for key, number in value.metrics.items():
        if not (isinstance(key, str) and key.endswith(_REDUCTIONS) and key not in _REDUCTIONS):
            raise BadResult(f"metric {key!r}: it must be a name that ends in one of {', '.join(_REDUCTIONS)}")
        value.metrics[key] = _finite(number, f"metric {key!r}")
    return value


def check_scores(call: GroupCall, value: Any) -> list[dict[str, float]]:
    """What a reward of a group returned, when that is a number or objectives for each text, as objectives of each.
    Raises BadResult."""
    given = value.tolist() if getattr(value, "ndim", None) == 1 else value
    if not isinstance(given, (list, tuple)):
        raise BadResult(f"{_short(value)}, wanted a list with a number, or named objectives, for each text")
    if len(given) != len(call.texts):
        raise BadResult(f"{len(given)} scores for {len(call.texts)} texts, wanted one for each")
    scores: list[dict[str, float]] = [{} for _ in given]
    for number, (score, one) in enumerate(zip(scores, given, strict=True)):
        checked = _reward(one, f"the score of text {number}")
        add_objectives(score, call.reward, checked)
        if score.keys() != scores[0].keys():
            raise BadResult(f"{sorted(score)} for text {number} and {sorted(scores[0])} for text 0; give all the same")
    return scores


def _reward(value: Any, what: str) -> float | dict[str, float]:
    """A number, or each of the named objectives, as floats. Raises BadResult that names the objective."""
    if not isinstance(value, Mapping):
        return _finite(value, what)
    for name in value:
        if not (isinstance(name, str) and re.fullmatch(r"[\w.-]+", name)):
            raise BadResult(f"an objective called {_short(name)}, wanted a name of letters, digits and _ . -")
    return {name: _finite(number, f"{what}[{name!r}]") for name, number in value.items()}


def _finite(value: Any, what: str) -> float:
    """A number of Python, numpy or torch as a finite float; True is 1.0. One of a narrower type becomes the shortest
    decimal that rounds to it, as it prints (float32's 10.1 is 10.1): turns of 10.1 and 0.2 are as much as one of
    10.3 in any type. Raises BadResult for anything else, and for what no sum of squares can hold."""
    if type(value) is float and abs(value) <= LARGEST:
        return value
    plain = _plain(value)
    if type(plain) is float and type(value) is not float:
        plain = shortest(value, plain)
    if not isinstance(plain, (numbers.Real, Decimal)):
        raise BadResult(f"{_short(value)} as {what}, wanted a number")
    try:
        number = float(plain)
    except (OverflowError, ValueError):  # an int beyond floats; a signalling NaN of Decimal
        number = math.inf
    if not math.isfinite(number):
        raise BadResult(f"{_short(value)} as {what}, wanted a finite number")
    if abs(number) > LARGEST:
        raise BadResult(f"{_short(value)} as {what}, wanted a number of at most {LARGEST:g}")
    return number


def _plain(value: Any) -> Any:
    """What is inside a scalar or an array without dimensions, of numpy, torch or another; all else as it is."""
    try:
        return value.item() if getattr(value, "ndim", None) == 0 else value
    except Exception:  # a tensor without data
        return value


def blame(method: Callable, prompt: Prompt, what: str = "") -> str:
    """Who was called for what: environment and method (or `what`), reward function, prompt and its file:line."""
    env = getattr(method, "__self__", None)
    called = getattr(method, "__name__", "call")
    name = getattr(env, "name", "") or type(env).__name__
    what = what or (f"environment {name}.{called}" if isinstance(env, Environment) else called)
    return place_of_call(what, getattr(env, "reward_name", ""), prompt)


def place_of_call(what: str, reward: str, prompt: Prompt) -> str:
    """A call in words: what is called, its reward function, the prompt and its file:line."""
    source = prompt.extra.get("source")
    return what + f" (reward {reward})" * bool(reward) + f", prompt {prompt.uid}" + f" ({source})" * bool(source)


def describe_error(error: BaseException) -> str:
    """Type, message and place of an exception, in one line."""
    return f"{type(error).__name__}: {_one_line(str(error))}{_place(error)}"


def _place(error: BaseException) -> str:
    """ " at file:line" of the innermost code that is neither this file nor an installed library; "" without one."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    return place_in([(frame.filename, frame.lineno or 0) for frame in frames])


def place_in(frames: list[tuple[str, int]]) -> str:
    """ " at file:line" of the last frame that is no installed library's, else of the last; "" without frames."""
    own = [frame for frame in frames if not frame[0].startswith(_LIBRARIES)] or frames
    return f" at {own[-1][0]}:{own[-1][1]}" if own else ""


def _short(value: object) -> str:
    try:
        return _one_line(repr(value), 60)
    except Exception:  # a repr of the user's own that raises
        return f"a {type(value).__name__}"


def _one_line(text: str, limit: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


class _Watchdog:
    """One thread for the process; sees every call that is running and ends the process when one is far too late.

    faulthandler is armed before user code starts and again at every poll while calls come in, so it only goes off
    when this thread could not run for the whole time, that is, when something kept the interpreter to itself.
    """

    def __init__(self) -> None:
        self.calls: dict[int, tuple[float, tuple]] = {}  # thread -> when to end the process, who
        self._thread: threading.Thread | None = None
        self._recent = False
        self._armed = False
        self._longest = 0.0
        self.due = math.inf  # when the call on the main thread is to be interrupted
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """In a forked child, which has none of the threads and timers, and may have a copy of a locked lock."""
        self.calls, self._thread, self._armed, self._lock = {}, None, False, threading.Lock()
        self.due = math.inf

    def begin(self, thread: int, deadline: float, who: tuple) -> tuple[float, tuple] | None:
        """Watches a call; returns the one around it, which the end of this call takes up again."""
        outer = self.calls.get(thread)
        self._longest = max(self._longest, who[3])
        self.calls[thread] = (deadline, who)  # before looking at _armed: the thread disarms in the other order
        self._recent = True
        if not self._armed:
            self._start()
        return outer

    def end(self, thread: int, outer: tuple[float, tuple] | None) -> None:
        if outer is None:
            self.calls.pop(thread, None)
        else:
            self.calls[thread] = outer

    def rest(self) -> None:
        """Disarms the last resort, unless another thread's call is running."""
        with self._lock:
            self._disarm()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="skyrl-env-watchdog", daemon=True)
                self._thread.start()
            self._arm()

    def _arm(self) -> None:
        faulthandler.register(signal.SIGVTALRM, file=2, chain=True)  # chain: what the signal does without a handler
        # The timer adds up the threads of a call, so that one which computes on several gets the time of each.
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        signal.setitimer(signal.ITIMER_VIRTUAL, threads * (self._longest + LAST_RESORT_SECONDS))
        self._armed = True

    def _disarm(self) -> None:
        if self._armed and not self.calls:
            self._armed = self._recent = False
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
            if self.calls:  # a call that began in between and saw it armed
                self._arm()

    def _run(self) -> None:
        while True:
            time.sleep(min(POLL_SECONDS, max(self.due - clock.now(), 0.02)))
            now = clock.now()
            if now >= self.due:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGPROF)
            calls = list(self.calls.values())
            for deadline, who in calls:
                if now > deadline:
                    self._end_process(*who)
            with self._lock:
                if calls or self._recent:
                    self._recent = False
                    self._arm()
                else:
                    self._disarm()

    def _end_process(self, method: Callable, prompt: Prompt, what: str, timeout_seconds: float) -> None:
        line = (
            f"error: {blame(method, prompt, what)}: hangs, {GRACE_SECONDS:g} s beyond env.timeout_seconds="
            f"{timeout_seconds:g}, in code that cannot be interrupted; ending this process. "
            "Bound the time inside it, or run it in a child process.\n"
        )
        try:
            os.write(2, line.encode())  # not sys.stderr: the call that hangs may hold its lock
        finally:
            os._exit(EXIT_STATUS)


_WATCHDOG = _Watchdog()
