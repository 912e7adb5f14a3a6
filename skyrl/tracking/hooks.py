"""A user's own functions that a run calls as it goes, and that cannot hold up its ranks: errors and slow calls are told
by name, and torch.distributed is closed to them."""

from __future__ import annotations

import difflib
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from skyrl.envs.guard import describe_error
from skyrl.types import UserError

# Event -> what its hooks are called with.
EVENTS = {
    "on_step": ("step", "metrics"),
    "on_rollouts": ("step", "groups"),
    "on_evaluate": ("step", "metrics"),
    "on_checkpoint": ("step", "folder"),
}
SLOW_SECONDS = 10.0  # a call that takes longer is told, since all ranks wait for it
COMMUNICATING = frozenset(
    "init_process_group destroy_process_group new_group split_group barrier monitored_barrier broadcast "
    "broadcast_object_list reduce all_reduce all_reduce_coalesced gather gather_object all_gather all_gather_object "
    "all_gather_coalesced all_gather_into_tensor scatter scatter_object_list reduce_scatter reduce_scatter_tensor "
    "all_to_all all_to_all_single send recv isend irecv batch_isend_irecv send_object_list recv_object_list".split()
)


class Hook:
    """Follows a run. Subclasses write those of these methods that they need; so may any other object with such methods.

    every_rank: called on every rank instead of on rank 0 alone. on_error: after an exception the run "stop"s, on all
    ranks together, or goes on ("say"). All ranks wait while a hook runs; it may call nothing of torch.distributed.
    """

    every_rank = False
    on_error = "stop"

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """After each step, with its record in metrics.jsonl."""

    def on_rollouts(self, step: int, groups: list[list[Any]]) -> None:
        """After the episodes of a step were played, before it learns from them: this rank's groups of Episode."""

    def on_evaluate(self, step: int, metrics: dict[str, float]) -> None:
        """After each evaluation, with its metrics ("eval/...")."""

    def on_checkpoint(self, step: int, folder: Any) -> None:
        """After each checkpoint, when all of it is on disk."""


class Hooks:
    """The hooks of one rank. A plain function is called as on_step."""

    def __init__(self, hooks: Sequence[Any], rank: int) -> None:
        self.calls: dict[str, list[tuple[str, Any, Callable[..., Any]]]] = {event: [] for event in EVENTS}
        self.slow: list[str] = []
        for hook in hooks:
            for event, name, method in _methods(hook):
                if rank == 0 or getattr(hook, "every_rank", False):
                    self.calls[event].append((name, hook, method))

    def call(self, event: str, *args: Any) -> tuple[list[str], str]:
        """Calls what there is for `event`: lines worth telling, and why the run has to stop ("" if it need not)."""
        lines, problem = [], ""
        for name, hook, method in self.calls[event]:
            start = time.monotonic()
            try:
                with no_collectives():
                    method(*args)
            except (Exception, SystemExit) as error:
                line = f"hook {name}, step {args[0]}: raised {describe_error(error)}"
                if getattr(hook, "on_error", "stop") == "say":
                    lines.append(line)
                else:
                    problem = problem or f"{line}; mend it, or set its on_error = 'say' to go on without it"
            if (seconds := time.monotonic() - start) > SLOW_SECONDS:
                lines.append(f"hook {name}, step {args[0]}: took {seconds:.0f} s, and all ranks waited for it")
        return lines, problem


def check_hooks(hooks: Any) -> None:
    """Raises UserError for what is no list of hooks, or a hook that would never be called, or not as it is written."""
    if not isinstance(hooks, (list, tuple)):
        raise UserError(f"hooks={hooks!r}: give a list of functions or objects with {', '.join(EVENTS)}")
    for hook in hooks:
        if not list(_methods(hook)):
            raise UserError(f"hooks: {hook!r} has none of {', '.join(EVENTS)} and is no function")
        known = {*EVENTS, "on_error"}
        for wrong in (name for name in dir(hook) if name.startswith("on_") and name not in known):
            close = difflib.get_close_matches(wrong, EVENTS, n=1)
            raise UserError(
                f"hooks: {_name(hook)}.{wrong}: no such event; " + f"did you mean {(close or [*EVENTS])[0]}?"
            )
        if getattr(hook, "on_error", "stop") not in ("stop", "say"):
            raise UserError(f"hooks: {_name(hook)}.on_error={hook.on_error!r}: choose stop or say")
        for event, name, method in _methods(hook):
            if inspect.iscoroutinefunction(method):
                raise UserError(f"hooks: {name} is async, and nobody would await it; make it a plain function")
            try:
                inspect.signature(method).bind(*EVENTS[event])
            except TypeError as error:
                raise UserError(f"hooks: {name} is called with ({', '.join(EVENTS[event])}): {error}") from None
            except ValueError:  # written in C
                pass


def _methods(hook: Any) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """(event, its name for people, what to call) for each event that a hook hears of."""
    found = False
    for event in EVENTS:
        method = getattr(hook, event, None)
        if callable(method) and getattr(type(hook), event, None) is not getattr(Hook, event):
            found = True
            yield event, f"{_name(hook)}.{event}", method
    if not found and callable(hook) and not isinstance(hook, type):
        yield "on_step", _name(hook), hook


def _name(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__qualname__)


@contextmanager
def no_collectives() -> Iterator[None]:
    """Refuses, on this thread, all of torch.distributed that waits for other ranks, which are not there to answer.
    Raises UserError there."""
    if "torch.distributed" not in sys.modules:
        yield
        return

    def look(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_name in COMMUNICATING and "/torch/distributed/" in code.co_filename:
            raise UserError(
                f"it calls torch.distributed.{code.co_name}, and the other ranks do not: they would wait for ever"
            )

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)
