"""What a process reads and computes with: prompts, code, model files, files of its environment, versions of libraries.

The nodes of a job are compared by it (distributed/compare.py), and a run with its last start.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import skyrl
from skyrl.config.load import flat
from skyrl.config.schema import RunConfig
from skyrl.data import prompts_digest
from skyrl.files import sha256
from skyrl.hub.locate import locate
from skyrl.registry import script_facts
from skyrl.types import Prompt

WHOLE_BYTES = 64 << 20  # of a larger file its size and its first part count: reading terabytes delays every start
FIRST_BYTES = 1 << 20
FOLDER_FILES = 200  # of a folder that an option of an environment names; and as many folders
MODEL = (".json", ".jinja", ".model", ".py", ".safetensors", ".bin", ".spm", ".tiktoken", ".txt")
CODE = (".py", ".cpp", ".cu", ".h", ".yaml", ".so")
LIBRARIES = tuple({f"{sysconfig.get_paths()[key]}/" for key in ("stdlib", "platstdlib", "purelib", "platlib")})
LOADED = ("deepspeed", "jinja2", "tokenizers", "triton")  # libraries whose versions count where they are in use
NO_VERSION = ("started", "platform", "host", "commit", "uncommitted_changes")  # the files themselves are compared


def read_facts(
    cfg: RunConfig, versions: dict[str, Any], prompts: dict[str, Sequence[Prompt]], *, files: bool = True
) -> dict[str, str]:
    """name -> a digest or value in a few characters, of all that this process has read and computes with; without
    `files` only what is in this process's own memory."""
    facts = {f"versions.{name}": str(known) for name, known in versions.items() if name not in NO_VERSION}
    loaded = {name: getattr(sys.modules.get(name), "__version__", None) for name in LOADED}
    facts |= {f"versions.{name}": known for name, known in loaded.items() if known}
    facts |= {f"data.{split}": f"{len(part)} prompts, {prompts_digest(part)}" for split, part in prompts.items()}
    if not files:
        return facts
    facts |= {f"code.{name}": file_digest(path) for name, path in _code(cfg.plugins)} | script_facts()
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


def place_of(value: Any) -> Path | None:
    """The file or folder of this host that a text of env.options names, `~` expanded; None for anything else."""
    path = os.path.expanduser(value) if isinstance(value, str) else ""
    return Path(path) if path and os.path.exists(path) else None


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
    """skyrl's own files, and those of loaded modules: of the packages of `plugins`, and of what is in no library; and
    files that these will load later: of their packages, or beside a plugin of one file."""
    root = Path(skyrl.__file__).parent
    for path in sorted(root.rglob("*")):
        if path.suffix in CODE[:-1] and "__pycache__" not in path.parts:
            yield f"skyrl/{path.relative_to(root)}", path
    packages = list(dict.fromkeys(plugin.partition(".")[0] for plugin in plugins))
    seen: set[Path] = set()
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        package = name.partition(".")[0]
        if (
            file
            and package not in ("skyrl", "__main__", "__mp_main__")
            and file.endswith(CODE)
            and Path(file).is_file()
        ) and (not file.startswith(LIBRARIES) or package in packages):
            seen.add(Path(file))
            yield name, Path(file)
    for package in packages:
        loaded = sys.modules.get(package)
        paths = [found for place in getattr(loaded, "__path__", ()) for found in sorted(Path(place).rglob("*.py"))]
        file = getattr(loaded, "__file__", None)
        for path in paths or _beside(Path(file) if file else None):
            if path not in seen:
                seen.add(path)
                yield f"{package}/{path.name}", path


def _beside(plugin: Path | None) -> Iterator[Path]:
    """The modules in a plugin's folder that it names in an import, at its top or later, and those that these name."""
    left = [plugin] if plugin is not None else []
    known = set(left)
    while left:
        path = left.pop()
        for name in re.findall(r"^\s*(?:from|import)\s+(\w+)", path.read_text(errors="replace"), re.M):
            other = path.with_name(f"{name}.py")
            if other not in known and other.is_file():
                known.add(other)
                left.append(other)
                yield other


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
