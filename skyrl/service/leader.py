"""Commands from rank 0 to all ranks: scatter the shares, run the same method everywhere, gather the answers.

Methods come from a fixed table (commands.COMMANDS), never from a name that a client sent. A command is sent only
after everything in it was checked: an exception on any rank while it runs ends that process, and with it the job,
because the other ranks cannot know how far it came.
"""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

from skyrl.distributed.init import World
from skyrl.service.commands import COMMANDS, Hands

STOP = "stop"


class Leader:
    """Rank 0's end of the control channel. Call from one thread only."""

    def __init__(self, world: World, hands: Hands, *, timeout_seconds: float) -> None:
        self.world, self.hands = world, hands
        self._last = time.monotonic()
        self._idle_after = timeout_seconds / 4

    def call(self, method: str, common: Any = None, parts: list[Any] | None = None) -> list[Any]:
        """Every rank's answer to `method`, in rank order. `common` goes to all, parts[r] to rank r."""
        run = COMMANDS[method]
        shares = parts if parts is not None else [None] * self.world.size
        if self.world.size == 1:
            return [run(self.hands, common, shares[0])]
        share: list[Any] = [None]
        dist.scatter_object_list(share, [(method, common, one) for one in shares], src=0, group=self.world.control)
        own = run(self.hands, common, shares[0])
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
        dist.gather_object(COMMANDS[method](hands, common, part), None, dst=0, group=world.control)
