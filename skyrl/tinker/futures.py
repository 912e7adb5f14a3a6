"""Results to come, and what they raise: the public SDK's names. Imports without torch."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitTimeout  # the builtin one only since Python 3.11
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class TinkerError(Exception):
    """Everything that the service refuses."""


class APIError(TinkerError):
    """As TinkerError, with its text as `message`."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class APIStatusError(APIError):
    """A call that was refused at once, with the status that HTTP would have."""

    def __init__(self, message: str, status_code: int) -> None:
        super().__init__(message)
        self.status_code = status_code


class BadRequestError(APIStatusError):
    """400: malformed."""


class NotFoundError(APIStatusError):
    """404: no such thing, or another's."""


class RateLimitError(APIStatusError):
    """429: too much work is waiting."""


class InternalServerError(APIStatusError):
    """500: a fault of the service."""


class RequestFailedError(TinkerError):
    """A request that was accepted and failed. category: user, server or unknown."""

    def __init__(self, message: str, *, request_id: str = "", category: str = "unknown") -> None:
        super().__init__(message)
        self.message, self.request_id, self.category = message, request_id, category


STATUS = {400: BadRequestError, 404: NotFoundError, 429: RateLimitError, 500: InternalServerError}


def status_error(status: int, message: str) -> APIStatusError:
    """The exception of a status."""
    return STATUS.get(status, APIStatusError)(message, status)


class APIFuture(Generic[T]):
    """A result to come: `result()`, `await future` or `await future.result_async()`, as often as wanted."""

    def __init__(self, future: Future[Any], *, cancel: Callable[[], None] | None = None) -> None:
        self._future, self._cancel = future, cancel

    def result(self, timeout: float | None = None) -> T:
        """Waits for it. Raises what it failed with; TimeoutError, and goes on, after so many seconds."""
        try:
            return self._future.result(timeout)
        except WaitTimeout:
            if self._future.done():
                raise
            raise TimeoutError(f"no result after {timeout} s; it may still come") from None

    async def result_async(self, timeout: float | None = None) -> T:
        """As `result`. Who stops waiting for samples (a cancelled task, a timeout) withdraws them; work of models
        goes on."""
        waiting = asyncio.wrap_future(self._future)
        try:
            return await asyncio.wait_for(asyncio.shield(waiting), timeout)
        except (asyncio.CancelledError, asyncio.TimeoutError):
            if self._cancel is not None and not self._future.done():
                self._cancel()
                # what it fails with now is what the caller asked for
                waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    def future(self) -> Future[T]:
        """The same as a concurrent.futures.Future."""
        return self._future

    def done(self) -> bool:
        """Whether it is there."""
        return self._future.done()


class ClientFuture(APIFuture[T]):
    """A client to come, which may be used as if it were there already: its methods wait for it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.result(), name)


def finished(value: T) -> APIFuture[T]:
    """A result that is there."""
    done: Future[T] = Future()
    done.set_result(value)
    return APIFuture(done)


def settle(target: Future[Any], make: Callable[[], Any]) -> None:
    """Gives `target` what `make` returns or raises."""
    try:
        value = make()
    except Exception as error:  # it belongs to who waits for it
        target.set_exception(error)
    else:
        target.set_result(value)


def then(future: APIFuture[T], make: Callable[[T], U]) -> APIFuture[U]:
    """What `make` makes of a result to come."""
    out: Future[U] = Future()

    def go_on(done: Future[T]) -> None:
        error = done.exception()  # handed on as it is: raising it again would only lengthen its traceback
        if error is not None:
            out.set_exception(error)
        else:
            settle(out, lambda: make(done.result()))

    future.future().add_done_callback(go_on)
    return APIFuture(out, cancel=future._cancel)


def gather(futures: list[APIFuture[T]]) -> APIFuture[list[T]]:
    """All results in order, or the first failure in order, once all have ended."""
    out: Future[list[T]] = Future()
    left = [len(futures)]
    lock = threading.Lock()

    def one_is_done(done: Future[T]) -> None:
        with lock:
            left[0] -= 1
            if left[0]:
                return
        error = next((e for e in (future.future().exception() for future in futures) if e is not None), None)
        if error is not None:
            out.set_exception(error)
        else:
            out.set_result([future.result() for future in futures])

    for future in futures:
        future.future().add_done_callback(one_is_done)
    return APIFuture(out)


def chain(future: APIFuture[T], make: Callable[[T], APIFuture[U]]) -> APIFuture[U]:
    """The result of a call that begins when the one before has ended well."""
    out: Future[U] = Future()

    def begin(made: Future[APIFuture[U]]) -> None:
        error = made.exception()
        if error is not None:
            out.set_exception(error)
        else:
            made.result().future().add_done_callback(hand_on)

    def hand_on(last: Future[U]) -> None:
        error = last.exception()
        if error is not None:
            out.set_exception(error)
        else:
            out.set_result(last.result())

    then(future, make).future().add_done_callback(begin)
    return APIFuture(out)


def with_async(*names: str, wait: bool) -> Callable[[type[T]], type[T]]:
    """Gives a class `<name>_async` for each of its methods: coroutines of the same arguments, which return the future,
    or (wait) its result."""

    def add(cls: type[T]) -> type[T]:
        for name in names:
            setattr(cls, f"{name}_async", _coroutine_of(getattr(cls, name), wait))
        return cls

    return add


def _coroutine_of(method: Callable[..., APIFuture[Any]], wait: bool) -> Callable[..., Any]:
    @functools.wraps(method)
    async def call(*args: Any, **kwargs: Any) -> Any:
        future = method(*args, **kwargs)
        return await future if wait and isinstance(future, APIFuture) else future

    call.__name__ += "_async"
    return call
