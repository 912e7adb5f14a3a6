"""What the nodes of a job must have in common: the files and code they read, and versions. Compared at the start.

Options, devices and the versions on which the process group depends were compared before (agreement.py).

Nothing makes nodes alike: a folder that was copied to each, an environment of its own on one, a file that changed
between two copies. Ranks would train on together, each on its own. So every rank says what it has read, and the ranks
that differ from most of the others are named, on all ranks, before the first step.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import struct
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import skyrl
from skyrl.config.load import flat
from skyrl.config.schema import RunConfig
from skyrl.data import prompts_digest
from skyrl.distributed.agreement import NAMED, POLL_SECONDS, is_allowed, name_ranks, place_of, sides
from skyrl.distributed.collectives import agree, broadcast_object, gather_objects, on_leader
from skyrl.distributed.init import World
from skyrl.envs import clock
from skyrl.files import sha256
from skyrl.hub.locate import locate
from skyrl.run_dir import collect_versions
from skyrl.types import Prompt, UserError

WHOLE_BYTES = 64 << 20  # of a larger file its size and its first part count: reading terabytes delays every start
FIRST_BYTES = 1 << 20
FOLDER_FILES = 200  # of a folder that an option of an environment names; and as many folders
MODEL = (".json", ".jinja", ".model", ".py", ".safetensors", ".bin", ".spm", ".tiktoken", ".txt")
CODE = (".py", ".cpp", ".cu", ".h", ".yaml", ".so")
LIBRARIES = tuple({f"{sysconfig.get_paths()[key]}/" for key in ("stdlib", "platstdlib", "purelib", "platlib")})
REMEDY = {
    "versions": "give all nodes the same environment",
    "code": "give all nodes the same code",
    "data": "copy the same data to all nodes",
    "model": "copy the same model to all nodes",
}
NO_VERSION = ("started", "platform", "host", "commit", "uncommitted_changes")  # the files themselves are compared
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
    found = differences(hosts, facts, allowed)
    if found:
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
    and the same place on all hosts. Rank 0 leaves a file in each, which the others look for: for some seconds, since a
    file system over the network may show new names late. Collective. `option` names the folder."""
    name = f".same-{broadcast_object(world, secrets.token_hex(8))}"
    places = [folder, folder / "checkpoints"]

    def leave() -> None:
        try:
            for place in places:
                place.mkdir(parents=True, exist_ok=True)
                (place / name).touch()
                for left in place.glob(".same-*"):  # of starts that were killed; times are those of the file's server
                    if left.stat().st_mtime < (place / name).stat().st_mtime - LEFT_SECONDS:
                        left.unlink(missing_ok=True)
        except OSError as problem:
            raise UserError(f"{option}={folder}: cannot be written ({problem.strerror}: {problem.filename})") from None

    on_leader(world, leave)
    until = clock.now() + SHARED_SECONDS
    missing = list(places)
    while (missing := [place for place in missing if not _shows(place, name)]) and clock.now() < until:
        time.sleep(POLL_SECONDS)
    told = gather_objects(world, (socket.gethostname(), str(missing[0]) if missing else ""))
    on_leader(world, lambda: list(map(os.remove, [place / name for place in places])))  # gone before any goes on
    without = [rank for rank, (_, place) in enumerate(told) if place]
    if without:
        hosts = [host for host, _ in told]
        raise UserError(
            f"{option}={folder}: not one folder on all hosts: what rank 0 on {hosts[0]} writes to "
            f"{told[without[0]][1]} is not there on {name_ranks(hosts, without)} within {SHARED_SECONDS:g} s; give a "
            "folder on a file system that all hosts share (data, models and caches may lie on disks of their own)"
        )


def _shows(place: Path, name: str) -> bool:
    """Whether the file is there. The folder is listed, since a client of NFS looks at it again only then."""
    try:
        return name in os.listdir(place)
    except OSError:
        return False


def read_facts(
    cfg: RunConfig, versions: dict[str, Any], prompts: dict[str, Sequence[Prompt]], *, files: bool = True
) -> dict[str, str]:
    """name -> a digest or value in a few characters, of all that this process has read and computes with; without
    `files` only what is in this process's own memory."""
    facts = {f"versions.{name}": str(known) for name, known in versions.items() if name not in NO_VERSION}
    facts |= {f"data.{split}": f"{len(part)} prompts, {prompts_digest(part)}" for split, part in prompts.items()}
    if not files:
        return facts
    facts |= {f"code.{name}": file_digest(path) for name, path in _code(cfg.plugins)}
    for name in ("path", "tokenizer", "chat_template"):
        facts |= dict(_files(f"model.{name}", getattr(cfg.model, name), cfg))
    for name, value in flat(cfg.env.options).items():  # an environment's own files
        for place in filter(None, map(place_of, value if isinstance(value, list) else [value])):
            for path in _below(place, Path(cfg.run.dir).resolve()):
                facts[f"env.options.{name}/{path.relative_to(place.parent)}"] = file_digest(path)
    return facts


def _below(place: Path, run_folder: Path) -> Iterator[Path]:
    """A file, or the first files of a folder and of those below it, by name, but for the run's own. None of a folder
    that holds the working folder: no environment reads all of that."""
    if place.is_file():
        yield place
    elif not Path.cwd().is_relative_to(place.resolve()):
        found: list[Path] = []
        for folder, folders, names in islice(os.walk(place), FOLDER_FILES):
            folders.sort()
            files = filter(Path.is_file, (Path(folder, name) for name in sorted(names)))
            found += islice((one for one in files if not one.resolve().is_relative_to(run_folder)), FOLDER_FILES)
        yield from found[:FOLDER_FILES]


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


def file_digest(path: Path) -> str:
    """A few characters of the SHA-256 of a file; of a large one its size and those of its first part, in which the
    names and shapes of safetensors stand. Of one that cannot be read, why, in words."""
    try:
        size = path.stat().st_size
        if size <= WHOLE_BYTES:
            return sha256(path)[:12]
        with open(path, "rb") as stream:
            first = stream.read(FIRST_BYTES)
            if path.suffix == ".safetensors":
                first += stream.read(max(0, min(WHOLE_BYTES, struct.unpack("<Q", first[:8])[0]) - len(first)))
    except OSError as error:
        return f"not readable ({error.strerror})"
    return f"{size} bytes, {hashlib.sha256(first).hexdigest()[:12]}"


def _code(plugins: Sequence[str] = ()) -> Iterator[tuple[str, Path]]:
    """skyrl's own files, and those of loaded modules: of the packages of `plugins`, and of what is in no library."""
    root = Path(skyrl.__file__).parent
    for path in sorted(root.rglob("*")):
        if path.suffix in CODE[:-1] and "__pycache__" not in path.parts:
            yield f"skyrl/{path.relative_to(root)}", path
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        package = name.partition(".")[0]
        if file and package not in ("skyrl", "__main__") and file.endswith(CODE) and Path(file).is_file():
            if not file.startswith(LIBRARIES) or package in [plugin.partition(".")[0] for plugin in plugins]:
                yield name, Path(file)


def _files(option: str, value: str, cfg: RunConfig) -> Iterator[tuple[str, str]]:
    """The files that an option means which is a file, or a folder in the hub's format."""
    path = Path(value)
    if path.is_file():
        yield option, file_digest(path)
    elif value and value != "tiny":
        folder = locate(value, cfg.model.revision, where=option, weights=option == "model.path")
        for one in sorted(folder.glob("*")):
            if one.suffix in MODEL and one.is_file():
                yield f"{option}/{one.name}", file_digest(one)
