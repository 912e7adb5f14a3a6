"""Environments that do what they are told, for tests of worker processes. A plugin: imports no torch."""

import asyncio
import ctypes
import os
import random
import signal
import sys
import time

from skyrl.api import Environment, RetryableError, StepResult, register_environment, register_reward

LEAK = []


def trouble(text, prompt):
    """Does the thing that a text names; a number is given back as the reward."""
    if text == "hang":  # as C code that looks at no signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
        time.sleep(60)
    elif text == "sleep":
        time.sleep(60)
    elif text == "segfault":
        ctypes.string_at(0)
    elif text == "exit":
        os._exit(3)
    elif text == "memory":
        return len(bytearray(64 << 30))
    elif text == "leak":
        LEAK.append(b"x" * (80 << 20))
    elif text == "raise":
        raise ValueError("not mine")
    elif text == "busy":
        raise RetryableError("the server is busy")
    elif text == "stdin":
        return len(input())
    elif text == "sysexit":
        sys.exit(0)
    elif text == "print":
        print("x" * 100_000, file=open(os.devnull, "w"))
        os.write(1, b"")
    elif text == "cwd":
        os.chdir("/")
    elif text == "fork" and os.fork() == 0:
        return 7.0  # the child goes on as if it were the worker
    elif text == "pid":
        return os.getpid()
    elif text == "torch":
        return "torch" in sys.modules
    elif text == "closed":
        os.closerange(3, 1024)
    elif text == "none":
        return None
    elif text == "nan":
        return float("nan")
    return float(text) if text.replace(".", "", 1).isdigit() else 1.0


@register_environment("troubled")
class Troubled(Environment):
    """Every text is one turn; "done" is the last. The observation counts turns, so a replay can be told."""

    def reset(self, prompt, seed):
        self.turn, self.seed, self.tries = 0, seed, 0
        return [{"role": "user", "content": f"seed {seed}"}]

    def step(self, text):
        if text == "twice":  # an error that passes
            self.tries += 1
            if self.tries < 3:
                raise RetryableError("try again")
        if text == "other":
            return StepResult(1.0, False, [{"role": "user", "content": random.random()}])
        if text == "object":
            return StepResult(1.0, False, [{"role": "user", "content": "x", "tool": object()}])
        if text == "random":
            return StepResult(1.0, False, [{"role": "user", "content": str(random.SystemRandom().random())}])
        if text == "metric":
            return StepResult(1.0, True, metrics={"a": 1.0})
        reward = trouble(text, self.prompt if hasattr(self, "prompt") else None)
        self.turn += 1
        return StepResult(reward, text == "done", [{"role": "user", "content": f"turn {self.turn}"}])


@register_environment("flaky")
class Flaky(Environment):
    """Every error of it may pass."""

    retries = 1

    def step(self, text):
        self.tries = getattr(self, "tries", 0) + 1
        if self.tries % 2:
            raise OSError("connection reset")
        return StepResult(1.0, True)


@register_reward("troubled")
def troubled(text, prompt):
    """As the environment, for one turn."""
    return trouble(text, prompt)


WAITING = []
TOGETHER = asyncio.Event()


@register_environment("waits")
class Waits(Environment):
    """Each first turn waits until `wanted` of them do; its reward is how many waited at the most."""

    def __init__(self, *, wanted: int = 1, most: int = 0):
        self.wanted, self.most = wanted, most

    async def reset(self, prompt):
        await asyncio.sleep(0)
        return list(prompt.messages)

    async def step(self, text):
        if text == "forever":
            await asyncio.Event().wait()
        elif text == "block":
            time.sleep(60)
        elif text == "raise":
            raise SystemExit(3)
        elif text == "quick":
            return StepResult(1.0, False, [{"role": "user", "content": "go on"}])
        WAITING.append(text)
        most = len(WAITING)
        if most >= self.wanted:
            TOGETHER.set()
        await TOGETHER.wait()
        await asyncio.sleep(0.01)
        WAITING.pop()
        return StepResult(float(most), text == "done", [{"role": "user", "content": "go on"}])

    async def close(self):
        await asyncio.sleep(0)


@register_environment("letters_slowly")
class LettersSlowly(Environment):
    """Three turns with delays that differ from run to run; what it says does not."""

    def __init__(self, *, delay: float = 0.0):
        self.delay = delay

    def reset(self, prompt, seed):
        self.turn, self.seed = 0, seed
        time.sleep(self.delay * random.SystemRandom().random())
        return [{"role": "user", "content": f"{prompt.messages[0]['content']}{seed % 10}"}]

    def step(self, text):
        self.turn += 1
        time.sleep(self.delay * random.SystemRandom().random())
        share = sum("a" <= c <= "z" for c in text) / max(1, len(text))
        return StepResult(share, self.turn == 3, [{"role": "user", "content": f"({self.turn})"}], {"share:mean": share})
