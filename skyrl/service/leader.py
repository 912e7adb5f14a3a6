"""Commands from rank 0 to all ranks: scatter the shares, run the same method everywhere, gather the answers.

Methods come from a fixed table (commands.COMMANDS), never from a name that a client sent. A command is sent only
after everything in it was checked. A UserError that it raises all the same, before anything has changed, is a refusal
if all ranks have it. Any other exception ends its process, and with it the job, because the other ranks cannot know
how far it came.
"""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

from skyrl.distributed.init import World
from skyrl.service.commands import Hands, Problem, execute, made
from skyrl.types import RunError, UserError

STOP = "stop"


class Leader:
    """Rank 0's end of the control channel. Call from one thread only."""

    def __init__(self, world: World, hands: Hands, *, timeout_seconds: float) -> None:
        self.world, self.hands = world, hands
        self._last = time.monotonic()
        self._idle_after = timeout_seconds / 4

    def call(self, method: str, common: Any = None, parts: list[Any] | None = None) -> list[Any]:
        """Every rank's answer to `method`, in rank order. `common` goes to all, parts[r] to rank r. Raises UserError
        for what all ranks refused, or what could be taken back where it was done; RunError when they disagree."""
        answers = self._ask(method, common, parts if parts is not None else [None] * self.world.size)
        problems = [answer.text for answer in answers if isinstance(answer, Problem)]
        if not problems:
            return answers
        if len(problems) < len(answers):
            if not made(method, common):
                raise RunError(f"the ranks disagree about {method!r}, so their states may differ: {problems[0]}")
            self._ask("undo", made(method, common), [None] * self.world.size)
        raise UserError(problems[0])

    def _ask(self, method: str, common: Any, shares: list[Any]) -> list[Any]:
        if self.world.size == 1:
            return [execute(self.hands, method, common, shares[0])]
        share: list[Any] = [None]
        dist.scatter_object_list(share, [(method, common, one) for one in shares], src=0, group=self.world.control)
        own = execute(self.hands, method, common, shares[0])
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


def follow(world: World, hands: Hands) -> None:
    """What every other rank does, until the leader says stop."""
    while True:
        share: list[Any] = [None]
        dist.scatter_object_list(share, None, src=0, group=world.control)
        method, common, part = share[0]
        if method == STOP:
            return
        dist.gather_object(execute(hands, method, common, part), None, dst=0, group=world.control)
