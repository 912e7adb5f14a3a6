"""What all ranks must have in common, told through the store before any group is made.

A rank whose GPU does not start would otherwise leave the others in NCCL's start, where nothing watches yet. Each rank
leaves its facts, or its error; rank 0 reads them all and leaves one verdict, which every rank raises.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from skyrl.config.load import flat, to_dict
from skyrl.config.options import all_options
from skyrl.config.schema import RunConfig
from skyrl.distributed.env import report_to_launcher
from skyrl.distributed.faults import STARTING, classify, remedy_of
from skyrl.distributed.network import MAX_SKEW
from skyrl.envs import clock
from skyrl.planner.device import first_line
from skyrl.planner.fingerprint import place_of
from skyrl.types import RunError, UserError, few

POLL_SECONDS = 0.1
MARGIN_SECONDS = 30  # by which the others wait longer than rank 0, whose words are better
READ_SECONDS = 10.0  # after an error, while rank 0, which may hold the store, waits until all have read it
AFTER_RANK_0_SECONDS = 3.0  # the others end later than rank 0, whose line is the one to read
NETWORK_REMEDY = "NCCL_DEBUG=INFO says more, and skyrl-tx doctor tries the network"
OF_ONE_NODE = ("run.", "tracking.", "service.")  # options that may differ between nodes, as any path may
NAMED = 4  # ranks, hosts or differences that one line names


def agree_on_start(store: Any, rank: int, size: int, facts: dict[str, Any], seconds: int) -> None:
    """Returns when all ranks have left facts that fit together. Raises UserError, the same on every rank, that names
    who does not fit, and RunError for ranks that do not answer within `seconds`.

    `facts`: `host`; `error`, in words, or "" ; `device`, its name for a person; `uuid` of a GPU, or ""; `same`, a dict
    of what must be equal on all ranks; `options`, likewise. Also reads here/<rank>, the host of each rank.
    """
    with bounded(seconds, MARGIN_SECONDS + READ_SECONDS):
        store.set(f"facts/{rank}", json.dumps(facts))
        if rank == 0:
            verdict = _judge_all(store, size, seconds)
            store.set("verdict", json.dumps([verdict, facts["host"], time.time()]))
        else:
            try:
                if missing_after(store, ["verdict"], clock.now() + seconds + MARGIN_SECONDS):
                    raise dist.DistError(f"no word within {seconds + MARGIN_SECONDS} s")
                verdict, host, shown = json.loads(store.get("verdict"))
            except dist.DistError as error:
                what = str(error).split("\n")[0][:120]
                raise RunError(f"rank 0 is gone or stands still before the group of ranks was made ({what})") from None
        if rank != 0 and (told := clock_problem(facts["host"], time.time(), host, shown)):
            print(f"skyrl: warning: {told}", file=sys.stderr, flush=True)
        if not verdict:
            return
        store.add("verdict-read", 1)
        until = clock.now() + READ_SECONDS
        while rank == 0 and store.add("verdict-read", 0) < size and clock.now() < until:
            time.sleep(POLL_SECONDS)
    kind, text = verdict
    raise (UserError if kind == "user" else RunError)(text)


@contextmanager
def bounded(seconds: int, more: float, ask: Callable[[], str] | None = None) -> Iterator[None]:
    """Around calls to the store before anything else watches: of one that stands still none returns. When the block
    takes longer than `seconds` (run.join_seconds) and `more` the process ends with a line: that of `ask`, which may ask
    the store, or one about a store that does not answer."""

    def watch() -> None:
        while clock.now() < until:
            if done.wait(POLL_SECONDS):
                return
        where = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
        lines = [
            f"the store at {where}, in which the ranks meet, does not answer within run.join_seconds={seconds}: rank 0 "
            "or the launcher that keeps it is stopped, or its node is gone; start all ranks again"
        ]
        if ask is not None:
            asking = threading.Thread(target=lambda: lines.append(ask()), daemon=True)
            asking.start()
            asking.join(READ_SECONDS)
        os.write(2, f"skyrl: error: {lines[-1]}\n".encode())
        report_to_launcher(lines[-1])
        os._exit(1)

    done, until = threading.Event(), clock.now() + seconds + more
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


@contextmanager
def group_start(store: Any, rank: int, size: int, seconds: int) -> Iterator[None]:
    """Around the making of groups, where nothing watches yet: what fails in it becomes a RunError in one line, and when
    it takes longer than `seconds` the process ends with a line that names the ranks that are still in it."""
    try:
        more = AFTER_RANK_0_SECONDS if rank else 0.0
        # Asked over a connection of its own: the main thread may be waiting in the other.
        with bounded(seconds, more, lambda: still_starting(store.clone(), rank, size, seconds)):
            yield
            store.set(f"made/{rank}", "1")
    except (RuntimeError, ValueError) as error:
        fault = classify(error)
        what = fault.what if fault is not None else first_line(error)
        remedy = (remedy_of(fault, STARTING) if fault is not None else "") or NETWORK_REMEDY
        raise RunError(
            f"rank {rank} on {socket.gethostname()}: the group of ranks could not be made ({what}); {remedy}"
        ) from None


def still_starting(store: Any, rank: int, size: int, seconds: int) -> str:
    """One line about the ranks that have not made their groups."""
    late = missing_after(store, [f"made/{other}" for other in range(size)], 0.0)
    who = name_ranks({other: store.get(f"here/{other}").decode() for other in late}, late) if late else f"rank {rank}"
    return f"the group of ranks was not made within run.join_seconds={seconds}: {who} not ready; {NETWORK_REMEDY}"


def clock_problem(host: str, now: float, other: str, then: float) -> str:
    """Words about a clock that is off: `now` is shown on `host` just after `then` on `other`; "" when they agree."""
    if abs(now - then) <= MAX_SKEW or host == other:
        return ""
    way = "ahead of" if now > then else "behind"
    return (
        f"the clock of {host} is {abs(now - then):.0f} s {way} that of {other}: deadlines and times of files will not "
        "fit; mend time service there"
    )


def options_of_all(cfg: RunConfig) -> dict[str, Any]:
    """The options that must be equal on all ranks: all but places, and what a run's folder or its display is.

    A place is what an option of paths says that is no name in the working folder or on a hub; below env.options, whose
    meaning nobody knows, a path that is there on this host."""
    places = {option.path for option in all_options() if option.type == "path"}

    def is_place(path: str, value: Any) -> bool:
        if path.startswith("env.options."):
            return "/" in str(value) and place_of(value) is not None
        return path in places and str(value).startswith(("/", "~", "."))

    return {
        path: value
        for path, value in flat(to_dict(cfg)).items()
        if not path.startswith(OF_ONE_NODE)
        and not is_place(path, value)
        and not is_allowed(path, cfg.run.allow_different)
    }


def is_allowed(name: str, allowed: Sequence[str]) -> bool:
    """Whether run.allow_different names this, or what it is part of."""
    return any(name == one or name.startswith((f"{one}.", f"{one}/")) for one in allowed)


def missing_after(store: Any, keys: Sequence[str], until: float) -> list[int]:
    """Indices of the keys that nobody has set by `until` (of the clock); [] as soon as all are there."""
    left = list(range(len(keys)))
    while True:
        left = [index for index in left if not store.check([keys[index]])]
        if not left or clock.now() > until:
            return left
        time.sleep(POLL_SECONDS)


def _judge_all(store: Any, size: int, seconds: int) -> tuple[str, str] | None:
    late = missing_after(store, [f"facts/{rank}" for rank in range(size)], clock.now() + seconds)
    found = {rank: json.loads(store.get(f"facts/{rank}")) for rank in range(size) if rank not in late}
    if (verdict := judge(found)) is not None:
        return "user", verdict  # an error that is known says more than who is late
    if not late:
        return None
    who = name_ranks({rank: store.get(f"here/{rank}").decode() for rank in late}, late)
    return "run", (
        f"{who} came, and did not say within run.join_seconds={seconds} which device it has: killed, "
        "or its driver does not answer (see nvidia-smi or rocm-smi there); leave that node out"
    )


def judge(found: dict[int, dict[str, Any]]) -> str | None:
    """What is wrong with facts by rank (see agree_on_start), in one line for a person; None when they fit together."""

    def who(ranks: list[int]) -> str:
        device = found[ranks[0]].get("device", "") if len(ranks) == 1 else ""
        return name_ranks({r: facts["host"] for r, facts in found.items()}, ranks) + (f" ({device})" if device else "")

    broken = [rank for rank, facts in found.items() if facts["error"]]
    if broken:
        first = found[broken[0]]["error"]
        return f"{who([rank for rank in broken if found[rank]['error'] == first])}: {first}"
    ranks = sorted(found)
    for part in ("same", "options"):
        for name in dict.fromkeys(name for rank in ranks for name in found[rank][part]):
            values = {rank: found[rank][part].get(name) for rank in ranks}
            odd, usual = sides(values)
            if odd != usual:
                return (
                    f"the ranks differ in {name}: {values[odd[0]]} on {who(odd)}, {values[usual[0]]} on {who(usual)}; "
                    f"{_remedy(name, part)}"
                )
    owners: dict[tuple[str, str], int] = {}
    for rank in ranks:
        facts = found[rank]
        owner = owners.setdefault((facts["host"], facts["uuid"]), rank) if facts["uuid"] else rank
        if owner != rank:
            return (
                f"ranks {owner} and {rank} on {facts['host']} have the same GPU ({facts['device']}, {facts['uuid']}); "
                "start one process for each GPU, with torchrun, or give each its own {CUDA,HIP}_VISIBLE_DEVICES"
            )
    return None


def sides(values: Mapping[int, Any]) -> tuple[list[int], list[int]]:
    """(ranks with the rarest value, ranks with the most frequent one), the same ranks when all have one value; of
    equally frequent ones the first rank's is the usual one."""
    texts = {rank: json.dumps(value) for rank, value in values.items()}
    counts, first = Counter(texts.values()), texts[min(texts)]
    usual = max(counts, key=lambda text: (counts[text], text == first))
    odd = min(counts, key=lambda text: (counts[text], text == usual))
    return [rank for rank in texts if texts[rank] == odd], [rank for rank in texts if texts[rank] == usual]


def _remedy(name: str, part: str) -> str:
    if name == "device":
        return "mend that node or leave it out, or give strategy.device=cpu"
    if name == "dtype":
        return "give model.dtype=float32, which all can do, or leave the older GPUs out"
    if part == "options":
        return f"start all ranks with the same options, or say that it is meant: run.allow_different=[{name}]"
    return f"give all nodes the same environment, or say that it is meant: run.allow_different=[versions.{name}]"


def name_ranks(host_of: Mapping[int, str] | Sequence[str], ranks: Sequence[int]) -> str:
    """ "rank 8 on node3", or "ranks 8, 9, 10, 11 and 6 more on node3, node4"."""
    hosts = list(dict.fromkeys(host_of[rank] for rank in ranks))
    return f"rank{'s' * (len(ranks) > 1)} {few(ranks, NAMED)} on {few(hosts, NAMED)}"
