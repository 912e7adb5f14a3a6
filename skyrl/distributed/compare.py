"""What the nodes of a job must have in common: the files and code they read, and versions. Compared at the start.

Options, devices and the versions on which the process group depends were compared before (agreement.py).

Nothing makes nodes alike: a folder that was copied to each, an environment of its own on one, a file that changed
between two copies. Ranks would train on together, each on its own. So every rank says what it has read, and the ranks
that differ from most of the others are named, on all ranks, before the first step.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from skyrl.config.schema import RunConfig
from skyrl.distributed.agreement import NAMED, POLL_SECONDS, is_allowed, name_ranks, sides
from skyrl.distributed.collectives import agree, broadcast_object, gather_objects, on_leader
from skyrl.distributed.init import World
from skyrl.envs import clock
from skyrl.planner.fingerprint import read_facts
from skyrl.run_dir import collect_versions
from skyrl.types import Prompt, UserError

REMEDY = {
    "versions": "give all nodes the same environment",
    "code": "give all nodes the same code",
    "data": "copy the same data to all nodes",
    "model": "copy the same model to all nodes",
}
MISSING = "(nothing)"
SHARED_SECONDS = 30.0  # after which a client of NFS has looked at a folder again
LEFT_SECONDS = 3600.0  # after which a file of a start that was killed is nobody's


def compare_nodes(
    cfg: RunConfig, world: World, prompts: dict[str, Sequence[Prompt]]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """(host -> versions there, what has been read on this host as read_facts says it), once all ranks are found to have
    read the same, but for what run.allow_different names.

    `prompts`: those of each split. Collective. Raises UserError, the same on every rank, that names the odd hosts and
    what differs there.
    """
    versions = collect_versions()
    hosts = gather_objects(world, versions["host"])
    firsts = [hosts.index(host) for host in hosts]  # of each host, which reads the files for all ranks there
    own = agree(world, lambda: read_facts(cfg, versions, prompts, files=firsts[world.rank] == world.rank))
    told = gather_objects(world, (versions, own))
    facts = [told[first][1] | mine for first, (_, mine) in zip(firsts, told, strict=True)]
    allowed = broadcast_object(world, cfg.run.allow_different)  # one verdict, whatever each rank was given
    if found := differences(hosts, facts, allowed):
        more = f"; and {len(found) - NAMED} more differences" if len(found) > NAMED else ""
        names = list(dict.fromkeys(name.partition("/")[0] for name, _ in found))
        remedy = REMEDY.get(names[0].partition(".")[0], "start all ranks with the same command")
        raise UserError(
            f"the nodes are not alike: {'; '.join(text for _, text in found[:NAMED])}{more}; {remedy}, or say that it "
            f"is meant: run.allow_different=[{','.join(names)}]"
        )
    return {host: told[first][0] for host, first in zip(hosts, firsts, strict=True)}, facts[world.rank]


def check_shared(world: World, folder: Path, option: str) -> None:
    """Raises UserError, the same on every rank, when `folder`, or checkpoints in it, which may be a link, is not one
    and the same place on all hosts, or cannot be written on one. Rank 0 leaves a file in each, which the others look
    for, and they leave one each, which rank 0 looks for: for some seconds, since a file system over the network may
    show new names late. Collective. `option` names the folder."""
    start = f".same-{broadcast_object(world, secrets.token_hex(8))}-"
    places = [folder, folder / "checkpoints"]

    def leave() -> None:
        try:
            for place in places:
                place.mkdir(parents=True, exist_ok=True)
                own = place / f"{start}{world.rank}"
                own.touch()
                # Of starts that were killed; times are those of the file's server.
                for left in place.glob(".same-*") if world.is_leader else ():
                    if left.stat().st_mtime < own.stat().st_mtime - LEFT_SECONDS:
                        left.unlink(missing_ok=True)
        except OSError as problem:
            raise UserError(f"{option}={folder}: cannot be written ({problem.strerror}: {problem.filename})") from None

    def missing(ranks: Iterable[int]) -> list[tuple[int, str]]:
        """(rank, place) of those whose file does not show here in time."""
        until = clock.now() + SHARED_SECONDS
        left = [(rank, place) for place in places for rank in ranks]
        while True:
            shown = {place: _names(place) for place in places}
            left = [(rank, place) for rank, place in left if f"{start}{rank}" not in shown[place]]
            if not left or clock.now() > until:
                return [(rank, str(place)) for rank, place in left]
            time.sleep(POLL_SECONDS)

    hosts = gather_objects(world, socket.gethostname())
    try:
        on_leader(world, leave)
        without = [(rank, found[0][1]) for rank, found in enumerate(gather_objects(world, missing([0]))) if found]
        if not without:
            agree(world, leave)
            without = broadcast_object(world, missing(range(world.size)) if world.is_leader else [])
    finally:  # gone before any goes on
        on_leader(world, lambda: list(map(os.remove, (one for place in places for one in place.glob(f"{start}*")))))
    if without:
        ranks = sorted({rank for rank, _ in without})
        raise UserError(
            f"{option}={folder}: not one folder on all hosts: what rank 0 on {hosts[0]} writes to {without[0][1]} is "
            f"not there on {name_ranks(hosts, ranks)} within {SHARED_SECONDS:g} s, or the other way round; give a "
            "folder on a file system that all hosts share (data, models and caches may lie on disks of their own)"
        )


def _names(place: Path) -> set[str]:
    """Names there. The folder is listed, since a client of NFS looks at it again only then."""
    try:
        return set(os.listdir(place))
    except OSError:
        return set()


def differences(
    hosts: Sequence[str], facts: Sequence[dict[str, str]], allowed: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """(name, what differs in words) for each fact that is not the same on all ranks, but for those `allowed` by name or
    by the name of what they are part of. `hosts` and `facts` are by rank."""
    found = []
    for name in dict.fromkeys(name for one in facts for name in one):
        values = {rank: one.get(name, MISSING) for rank, one in enumerate(facts)}
        odd, usual = sides(values)
        if odd == usual or is_allowed(name, allowed):
            continue
        if name.startswith("code.") and "skyrl/" not in name and len({*values.values()} - {MISSING}) == 1:
            continue  # a module that not all ranks have imported so far
        told = [f"{values[ranks[0]]} on {name_ranks(hosts, ranks)}" for ranks in (odd, usual)]
        found.append((name, f"{name} is {told[0]}, and {told[1]}"))
    return found
