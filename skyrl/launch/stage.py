"""`skyrl-tx stage`: everything a run reads from outside, copied to a folder that nodes without internet can see.

Run it where there is internet, with the options of the run. Every file is copied under a temporary name, synced and
renamed; staging again copies only what is missing. The folder then holds
  model, tokenizer, data, chat_template.jinja   as far as the options name them
  hf              a Hugging Face home with the data sets that the options name by id
  caches          compiled kernels of this machine (SKYRL_WARM_CACHE)
  options         options to add to the command line
  environment.sh  variables to set
  manifest.json   size and SHA-256 of each file
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skyrl.args import Parser, path_arg
from skyrl.config.load import load_config
from skyrl.config.schema import ModelConfig, RunConfig
from skyrl.data import make_prompts
from skyrl.envs.data_files import data_file, is_file_path
from skyrl.files import manifest_entry, verify_manifest, write_atomic
from skyrl.hub.gguf import converted, gguf_file
from skyrl.hub.locate import download
from skyrl.launch.rank import CACHES, cache_folders
from skyrl.registry.plugins import import_plugins
from skyrl.types import UserError

MANIFEST, OPTIONS, ENVIRONMENT, VARIABLE = "manifest.json", "options", "environment.sh", "SKYRL_STAGED"
TOKENIZER = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")
WEIGHTS = (*TOKENIZER, "*.safetensors")
KEPT_EVERY = 64  # files between two writes of the manifest
MARGIN = 2**20
HERE = "${oc.env:" + VARIABLE + "}"  # resolved when a run starts, so the folder may be moved
DATA_SETS = "import sys; from skyrl.launch.stage import load_prompts; load_prompts(sys.argv[1:])"
ENVIRONMENT_TEXT = """\
# Source this where there is no internet.
export SKYRL_STAGED=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1
"""


@dataclass
class Stage:
    """The folder while it is filled. `files` is the manifest: path below the folder -> bytes, sha256 and origin."""

    folder: Path
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    options: list[str] = field(default_factory=list)
    copied: int = 0

    @staticmethod
    def open(folder: Path) -> Stage:
        """The folder with what an earlier stage has left. Raises UserError for a folder of something else."""
        manifest = folder / MANIFEST
        if not manifest.exists():
            if folder.exists() and any(folder.iterdir()):
                raise UserError(f"stage {folder}: is not empty and has no {MANIFEST}; give a new folder")
            return Stage(folder.absolute())
        try:
            files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
            for entry in files.values():
                entry.setdefault("bytes", entry.get("size"))  # as stages were once written
            return Stage(folder.absolute(), files)
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{manifest}: cannot be read ({error}); remove that folder and stage again") from None

    def add(self, sources: Mapping[str, Path]) -> None:
        """Copies files (path below the folder -> source) that are not there yet. Raises UserError without the space."""
        todo = {name: source for name, source in sources.items() if not self._has(name, source)}
        needed = sum(source.stat().st_size for source in todo.values())
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if needed + MARGIN > free:
            raise UserError(
                f"stage {self.folder}: {needed / 2**30:.2f} GiB to copy, {free / 2**30:.2f} GiB free; free some space "
                "or give a folder on another disk"
            )
        for number, (name, source) in enumerate(todo.items(), start=1):
            copy(source, self.folder / name)
            self._note(name, source)
            if number % KEPT_EVERY == 0:
                self.save()
        self.save()

    def note_found(self, below: str) -> None:
        """Puts files into the manifest that something else has written below a folder of the stage."""
        for path in sorted((self.folder / below).rglob("*")):
            name = str(path.relative_to(self.folder))
            if path.is_file() and not path.name.endswith(".lock") and not self._has(name, path):
                self._note(name, path)
        self.save()

    def save(self) -> None:
        write_atomic(self.folder / MANIFEST, json.dumps({"files": self.files}, indent=1, sort_keys=True) + "\n")

    def _note(self, name: str, source: Path) -> None:
        origin = {"source": str(source.absolute()), "changed": source.stat().st_mtime_ns}
        self.files[name] = {**manifest_entry(self.folder / name), **origin}
        self.copied += 1

    def _has(self, name: str, source: Path) -> bool:
        known, target, stat = self.files.get(name), self.folder / name, source.stat()
        same = known is not None and (known["bytes"], known["changed"]) == (stat.st_size, stat.st_mtime_ns)
        return same and target.is_file() and target.stat().st_size == stat.st_size


def copy(source: Path, target: Path) -> None:
    """Copies a file so that `target` is whole or absent."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(source, part)
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def check(folder: Path) -> int:
    """Hashes every file of a stage; how many there are. Raises UserError that names what is missing or differs."""
    if not (folder / MANIFEST).exists():
        raise UserError(f"stage --check {folder}: has no {MANIFEST}; skyrl-tx stage makes such a folder")
    files = Stage.open(folder).files
    # One at a time, so that every damaged file is named, also beside one that is missing.
    if bad := [problem for name, entry in files.items() for problem in verify_manifest(folder, {name: entry})]:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise UserError(f"stage --check {folder}: {'; '.join(bad[:5])}{more}; remove these files and stage again")
    return len(files)


def stage(args: Sequence[str]) -> None:
    """Runs the command line. Raises UserError."""
    p = Parser(prog="skyrl-tx stage", usage="skyrl-tx stage <folder> [flags] [option=value ...]")
    p.add_argument("folder", type=path_arg)
    p.add_argument("options", nargs="*")
    p.add_argument("--serve", action="store_true", help="the options are a server's")
    p.add_argument("--no-caches", action="store_true", help="leaves this machine's compiled kernels out")
    p.add_argument("--check", action="store_true", help="hashes what is there against the manifest")
    flags = p.parse_intermixed_args(list(args))
    if flags.check:
        print(f"{check(flags.folder)} files are as they were staged")
        return
    if "=" in str(flags.folder):
        raise UserError(f"stage {flags.folder}: give the folder first, then options")
    cfg = load_config(flags.options, mode="serve" if flags.serve else "train")
    made = Stage.open(flags.folder)
    made.folder.mkdir(parents=True, exist_ok=True)
    made.save()
    _stage_model(made, cfg.model)
    if not flags.serve:
        _stage_data(made, cfg, flags.options)
    caches = False if flags.no_caches else _stage_caches(made)
    lines = ENVIRONMENT_TEXT
    lines += 'export HF_HOME="$SKYRL_STAGED/hf"\n' if (made.folder / "hf").is_dir() else ""
    lines += 'export SKYRL_WARM_CACHE="$SKYRL_STAGED/caches"\n' if caches else ""
    write_atomic(made.folder / OPTIONS, "".join(f"{option}\n" for option in made.options))
    write_atomic(made.folder / ENVIRONMENT, lines)
    _report(made, flags)


def _report(made: Stage, flags: argparse.Namespace) -> None:
    size = sum(known["bytes"] for known in made.files.values())
    mode = "serve" if flags.serve else "train"
    print(f"{made.folder}: {len(made.files)} files, {size / 2**30:.3f} GiB; {made.copied} copied now")
    print("where there is no internet:")
    print(f"  . {shlex.quote(str(made.folder / ENVIRONMENT))}")
    print(f"  skyrl-tx {shlex.join([mode, *flags.options, *made.options])}")
    print("or as a Slurm job:")
    print(
        f"  {shlex.join(['skyrl-tx', 'launch', '--slurm', '--staged', str(made.folder), '--', mode, *flags.options])}"
    )


def _stage_model(made: Stage, model: ModelConfig) -> None:
    if model.path != "tiny":
        _stage_snapshot(made, "model", model.path, model.revision, "model.path", WEIGHTS)
    if model.tokenizer:
        _stage_snapshot(made, "tokenizer", model.tokenizer, "", "model.tokenizer", TOKENIZER)
    if model.chat_template:
        source = Path(model.chat_template)
        if not source.is_file():
            raise UserError(f"model.chat_template={source}: no such file")
        made.add({"chat_template.jinja": source})
        made.options.append(f"model.chat_template={HERE}/chat_template.jinja")


def _stage_snapshot(made: Stage, name: str, path: str, revision: str, where: str, patterns: Sequence[str]) -> None:
    """A model's or tokenizer's folder, or the hub's files of that name straight into the stage (resumed by the hub)."""
    file = gguf_file(Path(path), where)
    folder = converted(file, where=where) if file else Path(path)
    if folder.is_dir():
        files = [file for file in sorted(folder.iterdir()) if any(fnmatch.fnmatch(file.name, p) for p in patterns)]
        if not files:
            raise UserError(f"{where}={path}: the folder has no files of a model; give one in Hugging Face format")
        made.add({f"{name}/{file.name}": file for file in files})
    else:
        try:
            download(path, patterns, revision, local_dir=made.folder / name)
        except UserError as error:
            raise UserError(f"{where}={path}: no folder {folder.absolute()}, and not from the hub: {error}") from None
        shutil.rmtree(made.folder / name / ".cache", ignore_errors=True)  # the hub's own notes
        made.note_found(name)
    made.options.append(f"{where}={HERE}/{name}")


def _stage_data(made: Stage, cfg: RunConfig, options: Sequence[str]) -> None:
    """Files of prompts, and data sets by id through the very code that will read them."""
    paths = {"data.path": cfg.data.path, "data.eval_path": cfg.data.eval_path}
    sets = [path for path in paths.values() if path and not is_file_path(path)]
    if cfg.data.path and is_file_path(cfg.data.path):
        made.add({f"data/train/{Path(cfg.data.path).name}": data_file(cfg.data, "train")})
        made.options.append(f"data.path={HERE}/data/train/{Path(cfg.data.path).name}")
    if cfg.data.path and not sets:
        test = data_file(cfg.data, "test")
        made.add({f"data/test/{test.name}": test})
        made.options.append(f"data.eval_path={HERE}/data/test/{test.name}")
    if not sets:
        import_plugins(cfg.plugins)
        make_prompts(cfg, "train"), make_prompts(cfg, "test")  # what is wrong with them is better known here
        return
    environment = {**os.environ, "HF_HOME": str(made.folder / "hf")}
    done = subprocess.run([sys.executable, "-c", DATA_SETS, *options], env=environment, capture_output=True, text=True)
    if done.returncode:
        words = done.stderr.strip().splitlines()
        raise UserError(words[-1] if words else f"data.path={cfg.data.path}: could not be loaded")
    made.note_found("hf")


def load_prompts(options: Sequence[str]) -> None:
    """For the process that fills the stage's Hugging Face home: loads the prompts of a run."""
    try:
        cfg = load_config(options)
        import_plugins(cfg.plugins)
        make_prompts(cfg, "train"), make_prompts(cfg, "test")
    except UserError as error:
        sys.exit(str(error))


def _stage_caches(made: Stage) -> bool:
    files = {
        f"caches/{CACHES[variable]}/{path.relative_to(folder)}": path
        for variable, folder in cache_folders().items()
        for path in (sorted(folder.rglob("*")) if folder.is_dir() else ())
        if path.is_file() and not path.name.endswith(".lock")
    }
    if files:
        made.add(files)
    return bool(files)
