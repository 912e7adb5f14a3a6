"""Worker processes of one rank: calls of environments and rewards that may hang, die or wait, beside the sampler.

    rank ── socket ── template (clean interpreter, imports the environment once)
      └──── sockets ──── workers, forked from it; each holds the environments of some episodes

An episode stays with one worker. When that worker is lost, because it died or because its call is beyond the deadline
and it was ended, its other episodes are played again in another one from the turns that are known, and whether the
same comes back is checked. Which worker plays what, and when it answers, changes no result.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import json
import os
import pickle
import re
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import cloudpickle

from skyrl.config.schema import EnvConfig
from skyrl.envs import clock
from skyrl.envs.base import Environment, group_rewards_of
from skyrl.envs.guard import Outcome, place_in, place_of_call, raise_stop, say_once
from skyrl.envs.rewards.base import REWARDS, reward_names
from skyrl.envs.wrappers import WRAPPERS, classes_of, is_async
from skyrl.types import Prompt, UserError
from skyrl.workers.calls import BACKOFF_SECONDS, Answer, Call, LocalCalls, attempts_of, decode, given_up
from skyrl.workers.worker import BEAT_BYTES, FORK, HEADER, REAP, SHOW_STACK, WorkerSetup, frame, read_frame

AHEAD = 4  # calls that a worker is given before it has answered the first, so that it never waits for the sampler
KILL_SECONDS = 2.0  # beyond the deadline, when a worker that could not be interrupted is ended
START_SECONDS = 300.0
POLL_SECONDS = 0.1
ATTEMPTS = 2  # of a call whose worker dies, the second one alone in its worker
NEARLY_FULL = 0.75  # of env.worker_memory_gib: a worker gets no new episodes, and is replaced when it has none
_FRAME = re.compile(r'File "(.+?)", line (\d+) in')


@dataclass(eq=False)
class _Played:
    """An episode as the rank knows it. `past`: see Call; `call`: what is asked for and not answered yet."""

    key: int
    prompt: Prompt
    seed: int
    call: Call | None = None
    worker: _Worker | None = None
    past: list[tuple[str, str]] = field(default_factory=list)
    attempts: int = 0  # of this call that raised what may pass
    deaths: int = 0  # of workers under this call
    not_before: float = 0.0
    counts: dict[str, float] = field(default_factory=dict)

    def count(self, name: str) -> None:
        key = f"workers/{name}:sum"
        self.counts[key] = self.counts.get(key, 0.0) + 1.0


@dataclass(eq=False)
class _Worker:
    """A process that plays episodes. `calls`: sent and not answered, by episode, with the time since when each runs."""

    template: _Template
    pid: int
    sock: socket.socket
    crash: int  # descriptor of what faulthandler writes
    calls: dict[int, float] = field(default_factory=dict)
    episodes: set[int] = field(default_factory=set)
    outbox: bytearray = field(default_factory=bytearray)
    inbox: bytearray = field(default_factory=bytearray)
    retiring: bool = False


class _Template:
    """The process that workers are forked from."""

    def __init__(self, setup: WorkerSetup, preload: bool) -> None:
        self._setup, self._preload, self._started, self.ready = setup, preload, clock.now(), False
        self.sock, theirs = socket.socketpair()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from skyrl.workers.worker import main; "
            f"main({theirs.fileno()}, {preload})"
        )
        env = {**os.environ, "OMP_NUM_THREADS": "1"}  # ranks and workers share the processors
        for name in ("MASTER_ADDR", "MASTER_PORT"):  # no worker is a rank
            env.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-c", code],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env=env,
            start_new_session=True,
        )
        theirs.close()
        self.sock.sendall(frame(pickle.dumps(setup)))

    def anew(self, preload: bool | None = None) -> _Template:
        """Another one in its place."""
        self.close()
        return _Template(self._setup, self._preload if preload is None else preload)

    def look(self, wait: bool) -> str:
        """Hears how it has started, if it has said so: "", "threads" (see worker.main) or, as UserError, why not."""
        env = self._setup.env
        if not select.select([self.sock], [], [], POLL_SECONDS if wait else 0.0)[0]:
            if clock.now() - self._started > START_SECONDS:
                raise UserError(f"environment {env.name}: its workers have not started in {START_SECONDS:g} s")
            return ""
        said = json.loads(read_frame(self.sock) or '{"problem": "its template process ended"}')
        problem = said["problem"]
        if problem in ("", "threads") and said["torch"]:
            whose = f"each of its {env.workers} workers" if problem else "the process that workers are forked from"
            cost = f"{said['seconds']:.1f} s at the start and {said['memory'] >> 20} MiB"
            remedy = "import it in the function that needs it, or keep the environment in a file that does without"
            say_once(
                f"imports torch, for which {whose} pays on every rank: {cost}; {remedy}", f"environment {env.name}"
            )
        if problem == "threads":
            return problem
        if not problem and env.worker_memory_gib * 2**30 * NEARLY_FULL < said["memory"] and env.worker_memory_gib:
            problem = (
                f"env.worker_memory_gib={env.worker_memory_gib:g}: {said['memory'] / 2**30:.2f} are used at the start"
            )
        if problem:
            raise UserError(f"{problem}; mend it, or let calls be made in the rank's process with env.workers=0")
        self.ready = True
        return ""

    def fork(self) -> _Worker:
        """A new worker. Raises OSError when the template is gone."""
        ours, theirs = socket.socketpair()
        crash = os.memfd_create("skyrl-worker")
        try:
            socket.send_fds(self.sock, [FORK], [theirs.fileno(), crash])
            pid = self._number()
        except OSError:
            ours.close()
            os.close(crash)
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        return _Worker(self, pid, ours, crash)

    def status(self, pid: int) -> int:
        """What waitpid says of a worker that has ended."""
        try:
            self.sock.sendall(REAP + str(pid).encode())
            return self._number()
        except OSError:  # it is gone, and its workers with it
            return signal.SIGKILL

    def _number(self) -> int:
        found = self.sock.recv(8, socket.MSG_WAITALL)
        if len(found) < 8:
            raise ConnectionResetError("the template is gone")
        return struct.unpack("<q", found)[0]

    def close(self) -> None:
        """Ends it, and with it its workers."""
        self.sock.close()
        self._process.kill()
        self._process.wait()


class WorkerPool:
    """Makes calls in worker processes; the methods are those of LocalCalls, and return at once.

    Raises UserError when the environment cannot be sent to another process.
    """

    def __init__(self, cfg: EnvConfig, plugins: tuple[str, ...]) -> None:
        classes = classes_of(cfg)
        self._cfg, self._attempts = cfg, attempts_of(classes[0])
        self._plain_reset = len(classes) == 1 and classes[0].reset is Environment.reset
        self._async = is_async(cfg)
        self._size = min(cfg.workers, cfg.max_concurrent)
        setup = WorkerSetup(replace(cfg, on_error="mask"), plugins, _things(cfg, classes))
        self._template = _Template(setup, preload=True)
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._played: dict[int, _Played] = {}
        self._queue: collections.deque[_Played] = collections.deque()
        self._answers: list[Answer] = []
        self._asked = 0  # calls without an answer, but for close

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            shut_pool()

    # ---- what is asked for

    def open(self, key: int, prompt: Prompt, seed: int) -> None:
        """Begins an episode; the answer is its first messages. A reset that only repeats the prompt's messages is made
        with the first step."""
        self._played[key] = played = _Played(key, prompt, seed)
        if self._plain_reset:
            self._answers.append(Answer(key, Outcome(list(prompt.messages))))
        else:
            self._ask(played, Call(key, "reset"))

    def step(self, key: int, text: str) -> None:
        """Gives a turn of the model to the environment; the answer is its StepResult."""
        self._ask(self._played[key], Call(key, "step", text))

    def score(self, key: int, prompt: Prompt, texts: Sequence[str]) -> None:
        """Calls the environment's rewards of a group; the answer is a dict of objectives for each of the texts."""
        self._played[key] = played = _Played(key, prompt, 0)
        self._ask(played, Call(key, "score", texts=tuple(texts)))

    def close(self, key: int) -> None:
        """Frees the environment of an episode that has ended, if there still is one. Without an answer."""
        played = self._played.get(key)
        if played is not None and played.worker is not None:
            self._ask(played, Call(key, "close"))
        elif played is not None:
            self._forget(played)

    def poll(self, wait: bool) -> list[Answer]:
        """What was answered since the last time. With `wait`, a moment may be spent on waiting for something.

        Raises UserError for a call that failed under env.on_error=stop.
        """
        if self._played and not self._template.ready and self._template.look(wait and not self._answers) == "threads":
            self._template = self._template.anew(preload=False)  # each worker imports for itself
        self._send()
        if self._workers:
            for event, mask in self._selector.select(POLL_SECONDS if wait and not self._answers else 0.0):
                worker = event.data
                if mask & selectors.EVENT_WRITE:
                    self._flush(worker)
                if mask & selectors.EVENT_READ:
                    self._receive(worker)
            self._end_late()
            self._send()
        answers, self._answers = self._answers, []
        return answers

    @property
    def waiting(self) -> int:
        """Calls whose answers `poll` has not given yet."""
        return self._asked + len(self._answers)

    def drop(self) -> None:
        """Takes everything back that is under way: workers with a call are ended, the others close their episodes."""
        self._answers.clear()
        self._queue.clear()
        self._asked = 0
        for worker in [worker for worker in self._workers if worker.calls]:
            self._end(worker)
        for played in list(self._played.values()):
            if played.worker not in self._workers:
                played.worker = None
            self.close(played.key)

    def shut(self) -> None:
        """Ends all its processes."""
        for worker in list(self._workers):
            self._end(worker)
        self._template.close()
        self._selector.close()

    # ---- workers

    def _ask(self, played: _Played, call: Call) -> None:
        played.call, played.attempts, played.deaths, played.not_before = call, 0, 0, 0.0
        self._asked += call.method != "close"
        self._queue.append(played)

    def _send(self) -> None:
        """Sends what is queued to the workers that have room for it."""
        if not self._queue or not self._template.ready:
            return
        now, left = clock.now(), collections.deque[_Played]()
        while self._queue:
            played = self._queue.popleft()
            if played.call is None:  # forgotten meanwhile
                continue
            worker = self._worker_for(played) if now >= played.not_before else None
            if worker is None:
                left.append(played)
                continue
            call = played.call
            if played.worker is None:
                call = replace(call, opening=(played.prompt, played.seed), past=tuple(played.past))
                played.worker = worker
                worker.episodes.add(played.key)
            worker.calls[played.key] = now if self._async or not worker.calls else 0.0
            worker.outbox += frame(_pickled(call, self._cfg.name))
            self._flush(worker)
        self._queue = left

    def _worker_for(self, played: _Played) -> _Worker | None:
        """The worker that is to make this call now, if there is one with room. A call under which a worker has died is
        made alone in its worker: then it is known whose fault it is."""

        def room(worker: _Worker) -> bool:
            if played.deaths:
                return not worker.calls
            alone = any(self._played[key].deaths for key in worker.calls)
            return not alone and (self._async or len(worker.calls) < AHEAD)

        if self._async and sum(len(worker.calls) for worker in self._workers) >= self._cfg.max_concurrent:
            return None
        if played.worker is not None:
            return played.worker if room(played.worker) else None
        free = [worker for worker in self._workers if not worker.retiring and room(worker)]
        best = min(free, key=lambda worker: (len(worker.calls), len(worker.episodes)), default=None)
        if (best is None or best.calls) and len(self._workers) < self._size:
            best = self._start()
        return best

    def _start(self) -> _Worker | None:
        try:
            worker = self._template.fork()
        except OSError:  # somebody has ended it, and all workers with it
            self._template = self._template.anew()
            return None
        self._selector.register(worker.sock, selectors.EVENT_READ, worker)
        self._workers.append(worker)
        return worker

    def _flush(self, worker: _Worker) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):  # a worker that died is found when it is read
            while worker.outbox:
                del worker.outbox[: worker.sock.send(worker.outbox)]
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.outbox else 0)
        if self._selector.get_key(worker.sock).events != wanted:
            self._selector.modify(worker.sock, wanted, worker)

    def _receive(self, worker: _Worker) -> None:
        """Takes what a worker has written."""
        try:
            part = worker.sock.recv(1 << 20)
        except BlockingIOError:
            return
        except ConnectionError:
            part = b""
        if not part:
            ending = self._end(worker)
            self._lost(worker, {key for key, since in worker.calls.items() if since}, f"its worker process {ending}")
            return
        worker.inbox += part
        while len(worker.inbox) >= HEADER.size:
            (size,) = HEADER.unpack_from(worker.inbox)
            if len(worker.inbox) < HEADER.size + size:
                break
            reply = json.loads(worker.inbox[HEADER.size : HEADER.size + size])
            del worker.inbox[: HEADER.size + size]
            self._answered(worker, reply)
            if worker not in self._workers:
                return

    def _answered(self, worker: _Worker, reply: dict[str, Any]) -> None:
        worker.calls.pop(reply["key"], None)
        for key in list(worker.calls)[:1]:  # in a worker without an event loop the next one runs from now on
            worker.calls[key] = worker.calls[key] or clock.now()
        played = self._played.get(reply["key"])
        if played is None or played.call is None:
            return
        if self._cfg.worker_memory_gib and reply["memory"] > NEARLY_FULL * self._cfg.worker_memory_gib * 2**30:
            worker.retiring = True
        if not reply["open"]:
            self._unbind(played)
        outcome: Outcome = Outcome(None, reply["invalid"], reply["kind"])
        if outcome.kind == "memory":
            self._end(worker)
            self._lost(worker, set(), "")
            self._again(
                played, f"{outcome.invalid}, with env.worker_memory_gib={self._cfg.worker_memory_gib:g}", "memory"
            )
            return
        if outcome.kind == "retryable" and played.attempts + 1 < self._attempts:
            played.count("retries")
            played.not_before = clock.now() + BACKOFF_SECONDS * 2**played.attempts
            played.attempts += 1
            self._queue.append(played)
        elif outcome.kind == "retryable":
            self._done(played, given_up(outcome.invalid, played.attempts + 1))
        elif outcome.invalid:
            self._done(played, outcome)
        else:
            if played.call.method != "close":
                if played.call.method == "step" and not played.past:
                    played.past.append(("", ""))
                played.past.append((played.call.text, reply["digest"]))
            self._done(played, Outcome(decode(played.call.method, reply["value"])))
        if worker.retiring and not worker.episodes and worker in self._workers:
            self._end(worker)

    def _done(self, played: _Played, outcome: Outcome) -> None:
        """The call of an episode has come to its end."""
        assert played.call is not None
        method, played.call = played.call.method, None
        self._asked -= method != "close"
        if outcome.kind == "infrastructure":
            played.count("masked")
        if method == "close":
            self._forget(played)
        else:
            self._answers.append(Answer(played.key, outcome, dict(played.counts)))
            played.counts.clear()
        if method == "score":  # nothing of it stays
            self._forget(played)
        if self._cfg.on_error == "stop":
            raise_stop(outcome)

    def _end_late(self) -> None:
        """Ends workers with a call that is beyond its deadline and could not be interrupted."""
        now = clock.now()
        seconds, allowed = self._cfg.timeout_seconds, self._cfg.timeout_seconds + KILL_SECONDS
        for worker in list(self._workers):
            late = {key for key, since in worker.calls.items() if since and now - since > allowed}
            if not late:
                continue
            (began,) = struct.unpack("<d", os.pread(worker.crash, BEAT_BYTES, 0))
            if time.monotonic() - began <= allowed:  # it goes on; late is what takes no notice of being cancelled
                many = {key: 4 + len(self._played[key].past) for key in late}  # calls that one request may be
                late = {key for key in late if self._async and now - worker.calls[key] > many[key] * allowed}
                if not late:
                    continue
            place = self._end(worker, show=True)
            line = f"took longer than env.timeout_seconds={seconds:g}{place}, in code that cannot be interrupted"
            if len(late) == 1:  # else each is made again alone, and then it is known which one it was
                played = self._played[late.pop()]
                del worker.calls[played.key]
                self._unbind(played)
                played.count("killed")
                self._done(played, Outcome(None, f"{self._blame(played)}: {line}", "late"))
            self._lost(worker, late, line)

    def _end(self, worker: _Worker, show: bool = False) -> str:
        """Ends a worker with its children; returns in words how it ended, or with `show` where it stood."""
        if show:
            os.kill(worker.pid, SHOW_STACK)
            _wait_for_text(worker.crash)
        with contextlib.suppress(OSError):
            os.kill(worker.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.killpg(worker.pid, signal.SIGKILL)
        status = worker.template.status(worker.pid)
        text = os.pread(worker.crash, 1 << 16, BEAT_BYTES).decode(errors="replace")
        place = place_in([(file, int(line)) for file, line in reversed(_FRAME.findall(text))])
        self._selector.unregister(worker.sock)
        worker.sock.close()
        os.close(worker.crash)
        self._workers.remove(worker)
        return place if show else _ending(status) + place

    def _lost(self, worker: _Worker, suspects: set[int], reason: str) -> None:
        """A worker is gone: what it had to do is done by another one, from the turns that are known."""
        for key in list(worker.episodes):
            played = self._played[key]
            played.worker = None
            if played.call is not None and played.call.method == "close":
                self._forget(played)
            elif key in suspects:
                self._again(played, f"{self._blame(played)}: {reason}", "died")
            else:
                played.count("replays")
                if key in worker.calls:
                    self._queue.append(played)

    def _again(self, played: _Played, line: str, what: str) -> None:
        """The call under which a worker was lost is made again, or given up."""
        played.deaths += 1
        played.count(what)
        if played.deaths < ATTEMPTS:
            self._queue.append(played)
        else:
            self._done(played, given_up(line, ATTEMPTS))

    def _blame(self, played: _Played) -> str:
        method = "step" if played.call is None else played.call.method
        reward = ", ".join(reward_names(self._cfg.options.get("reward")))
        return place_of_call(f"environment {self._cfg.name}.{method}", reward, played.prompt)

    def _unbind(self, played: _Played) -> None:
        if played.worker is not None:
            played.worker.episodes.discard(played.key)
            played.worker = None

    def _forget(self, played: _Played) -> None:
        self._unbind(played)
        played.call = None
        self._played.pop(played.key, None)


def _things(cfg: EnvConfig, classes: list[type[Environment]]) -> tuple[tuple[str, str, bytes], ...]:
    """The environment, its wrappers, and the rewards beside it, as another process can take them: by name from a module
    that can be imported there, else by value. Raises UserError for what holds something that cannot be sent."""
    rewards = {*reward_names(cfg.options.get("reward")), *(reward.name for reward, _ in group_rewards_of(cfg))}
    things: list[tuple[str, str, Any]] = [("environment", cfg.name, classes[0])]
    things += [("wrapper", name, cls) for name, cls in WRAPPERS.items() if cls in classes]
    ours = {"__main__", *(cls.__module__ for cls in classes)}
    for name in REWARDS.names():
        reward = REWARDS.get(name)
        if name in rewards or getattr(reward, "__module__", "") in ours:
            things.append(("reward", name, reward))
    found = []
    for kind, name, thing in things:
        try:
            found.append((kind, name, cloudpickle.dumps(thing)))
        except Exception as error:  # whatever a user's object does when it is pickled
            raise UserError(
                f"{kind} {name}: cannot be sent to a worker process ({type(error).__name__}: {error}); make what it "
                "holds at its first use, put it into a module of its own (plugins=[...]), or set env.workers=0"
            ) from error
    return tuple(found)


def _pickled(call: Call, name: str) -> bytes:
    try:
        return cloudpickle.dumps(call) if call.opening else pickle.dumps(call)
    except Exception as error:
        place = call.opening[0].place if call.opening else ""
        raise UserError(
            f"{place}: what environment {name} keeps in Prompt.extra cannot be sent to a worker process "
            f"({type(error).__name__}: {error}); keep plain values there, or set env.workers=0"
        ) from error


def _wait_for_text(descriptor: int) -> None:
    """Until faulthandler has written where the process stands, for half a second at most."""
    for _ in range(50):
        time.sleep(0.01)
        if os.fstat(descriptor).st_size > BEAT_BYTES:
            return


def _ending(status: int) -> str:
    """How a process ended, in words."""
    if not os.WIFSIGNALED(status):
        return f"ended itself with exit status {os.WEXITSTATUS(status)}"
    number = os.WTERMSIG(status)
    return f"was ended by {signal.Signals(number).name}" + " (no memory left?)" * (number == signal.SIGKILL)


_POOL: list[tuple[Any, WorkerPool]] = []  # the one of this process, with what it was made for


def open_calls(cfg: EnvConfig, plugins: Sequence[str] = ()) -> LocalCalls | WorkerPool:
    """What makes the calls of `cfg`: this process, or its workers, which are kept for the next rollout. A context.

    Raises UserError for an environment that cannot be sent to a worker."""
    classes = classes_of(cfg)
    if cfg.workers == 0 or all(cls.plays_in_process(cfg.options) for cls in classes):
        return LocalCalls(cfg)
    made_for = (cfg, tuple(plugins), classes)
    if _POOL and _POOL[0][0] != made_for:
        shut_pool()
    if not _POOL:
        _POOL.append((made_for, WorkerPool(cfg, tuple(plugins))))
    return _POOL[0][1]


def shut_pool() -> None:
    """Ends the workers of this process, if there are any."""
    while _POOL:
        _POOL.pop()[1].shut()


atexit.register(shut_pool)
os.register_at_fork(after_in_child=_POOL.clear)
