"""Checkpoints: sharded tensors and plain state under one name, complete or absent, free of the world size.

Built on torch.distributed.checkpoint (DCP). A checkpoint is a folder <tag>/ with DCP's files and a manifest.json, which
is written last. The folder is called <tag>.tmp-... until it is complete, so whatever kills a run leaves whole
checkpoints only. Exports in Hugging Face format are not made here.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import skyrl
from skyrl.checkpoint.folder import Best, CheckpointInfo, is_final, publish, read_checkpoint, remedy, retain, survey
from skyrl.envs import clock
from skyrl.files import disk_reason, verify_manifest
from skyrl.types import UserError, few

SEEN_SECONDS = 30.0  # within which what another host has written is seen, over a slow network too


class Checkpointer:
    """Saves, keeps and loads the checkpoints of one folder. `save`, `load` and `wait` are collective.

    group: a gloo group of all ranks used for nothing else, as its collectives run in a background thread beside those
    of training (on a shared group they interleave and hang); None with one process. rank and world_size are those of
    the group. keep_last: newest that stay, 0 = all. keep_best: the one with the best score stays besides; `best` says
    which metric that is.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        keep_best: bool,
        async_save: bool,
        rank: int,
        world_size: int,
        group: dist.ProcessGroup | None,
        config_digest: str = "",
        best: Best = Best(),
    ) -> None:
        assert world_size == 1 or group is not None, "several ranks need a gloo group that only the checkpointer uses"
        self.folder, self.keep_last, self.keep_best, self.async_save = Path(folder), keep_last, keep_best, async_save
        self.rank, self.world_size, self.group, self.config_digest = rank, world_size, group, config_digest
        self.best = best
        self.pending: _Save | None = None  # that was begun, and that nobody has waited for
        self._lines: list[str] = []
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # DCP of torch 2.7 itself uses it

    def save(
        self, tag: str, tensors: dict[str, Any], state: dict[str, Any], *, score: float | None, block: bool = False
    ) -> None:
        """Writes `tensors` (nested dicts of tensors, DTensors, numbers) and `state` (plain JSON) as checkpoint `tag`.

        First waits for the save before. Returns when everything is copied to CPU memory, or with block=True or without
        async_save when the checkpoint is complete. `state` of rank 0 is the one that counts. `score`: the value of
        `best.metric`, None where it was not measured.
        Raises: UserError when this save (if blocking) or the one before failed; what was complete stays.
        """
        self.wait()
        assert tag and "/" not in tag and is_final(Path(tag)), f"bad checkpoint tag {tag!r}"
        copy = json.loads(json.dumps(state))  # the caller's goes on changing
        if repr(copy) != repr(state):
            raise TypeError(f"checkpoint {tag}: its state does not come back from JSON as it was")
        staged = {name: _staged(value) for name, (_, _, value) in _flatten(tensors).items()}
        self.pending = _Save(tag, staged, copy, _finite(score))
        # daemon: a dying run must not hang in a collective whose peers are gone
        thread = threading.Thread(target=self._background, args=(self.pending,), name="skyrl-checkpoint", daemon=True)
        self.pending.thread = thread
        thread.start()
        if block or not self.async_save:
            self.wait()

    def poll(self) -> list[str]:
        """Lines about what was completed or deleted since the last call; local, never waits. [] on ranks but 0.

        Raises: on rank 0, UserError when the save in the background failed. The job should then end: the other ranks
        learn of it in `wait` or `save`.
        """
        if self.rank == 0 and self.pending is not None and not self.pending.thread.is_alive():
            self.wait()
        lines, self._lines = self._lines, []
        return lines

    def wait(self) -> None:
        """Blocks until the save in the background is complete. Raises its error, the same one on every rank."""
        if self.pending is None:
            return
        self.pending.thread.join()
        pending, self.pending = self.pending, None
        self._lines += pending.lines
        if pending.error is not None:
            raise pending.error

    def close(self, timeout_seconds: float = 20.0) -> bool:
        """Gives a save in the background some time to complete, for a run that ends with an error. True if it is."""
        if self.pending is None:
            return True
        self.pending.thread.join(timeout_seconds)
        return not self.pending.thread.is_alive() and self.pending.error is None

    def improves(self, score: float) -> bool:
        """Whether `score` is better than that of every checkpoint in the folder, and the best one is to be kept. Local;
        for rank 0, with no save under way."""
        return self.keep_best and self.best.improves(score, survey(self.folder)[0])

    def load(self, path: Path, tensors: dict[str, Any], *, partial: bool = False) -> dict[str, Any]:
        """Fills `tensors` (a template as given to `save`, of any sharding) in place; returns the saved state.

        Every file is checked before any tensor changes: sizes, checksums (each rank reads a share), names, shapes and
        dtypes. Numbers in the template are replaced in its dicts. partial=True: the checkpoint may hold more.
        Raises: UserError, the same on every rank, for a damaged checkpoint or one of another model.
        """
        flat = _flatten(tensors)
        values = {name: value for name, (_, _, value) in flat.items()}
        info: CheckpointInfo | None = None
        problem: str | None = None
        try:
            info = read_checkpoint(path)
            self._verify_files(info)
            _check_template(info, values, partial)
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"checkpoint {path}: cannot be read ({disk_reason(error)}); {remedy(Path(path))}"
        first = next((text for text in self._all_gather(problem) if text is not None), None)
        if first is not None:
            raise UserError(first)
        assert info is not None
        reader = dcp.FileSystemReader(info.path)
        dcp.load(values, storage_reader=reader, process_group=self.group, no_dist=self.group is None)
        for name, (holder, key, value) in flat.items():
            if not isinstance(value, torch.Tensor):
                holder[key] = values[name]
        return info.state

    # -- in the background thread; every rank makes the same collectives in the same order --

    def _background(self, job: _Save) -> None:
        # Exception, not OSError alone: an error kept from the caller would be a checkpoint silently missing
        try:
            job.error = self._write(job)
        except Exception as problem:
            job.error = problem
        finally:
            job.staged = {}

    def _write(self, job: _Save) -> Exception | None:
        start = time.monotonic()
        tmp = self.folder / f"{job.tag}.tmp-{secrets.token_hex(4)}"
        error: Exception | None = None
        if self.rank == 0:
            error = self._attempt(job, lambda: tmp.mkdir(parents=True))
        tmp, error = self._broadcast((tmp, error))
        if error is not None:
            return error
        writer = _Writer(tmp)
        try:
            dcp.save(job.staged, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
        except CheckpointException as problem:  # raised on all ranks, after all have stopped writing
            if self.rank == 0:
                shutil.rmtree(tmp, ignore_errors=True)  # the error below matters more; the next start tries again
                error = self._explain(job, problem)
            return self._broadcast(error)
        parts = self._all_gather(writer.fs.sums)
        if self.rank == 0:
            files = {name: entry for part in parts for name, entry in part.items()}
            error = self._attempt(job, lambda: self._finalise(job, tmp, files, start))
            if error is not None:
                shutil.rmtree(tmp, ignore_errors=True)
        return self._broadcast(error)

    def _attempt(self, job: _Save, action: Any) -> Exception | None:
        # every error becomes a value: the other ranks wait for the error
        try:
            action()
        except Exception as problem:
            return self._explain(job, problem)
        return None

    def _finalise(self, job: _Save, tmp: Path, files: dict[str, dict[str, Any]], start: float) -> None:
        """Manifest, rename, retention; rank 0 only, and once it sees every part that any rank has written."""
        until = clock.now() + SEEN_SECONDS
        while (unseen := verify_manifest(tmp, files, hashed=())) and clock.now() < until:
            time.sleep(0.2)
            os.listdir(tmp)  # a client of NFS looks at a folder again when it is listed
        if unseen:
            raise UserError(
                f"checkpoint {self.folder / job.tag}: not saved: {unseen[0]} as rank 0 on {socket.gethostname()} sees "
                f"that folder, after {SEEN_SECONDS:g} s; give a run.dir on a file system that all hosts share"
            )
        manifest = {
            "tag": job.tag,
            "step": job.state.get("step"),
            "score": job.score,
            "metric": self.best.metric,
            "world_size": self.world_size,
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": {"skyrl": skyrl.__version__, "torch": torch.__version__},
            "config_digest": self.config_digest,
            "files": dict(sorted(files.items())),
            "state": job.state,
        }
        lines = publish(self.folder, tmp, manifest)
        size = sum(entry["bytes"] for entry in files.values()) / 2**20
        job.lines.append(f"saved checkpoint {self.folder / job.tag} ({size:.1f} MiB, {time.monotonic() - start:.1f} s)")
        job.lines += lines + retain(self.folder, keep_last=self.keep_last, best=self.best if self.keep_best else None)

    def _explain(self, job: _Save, problem: BaseException) -> Exception:
        """One line for what a person can fix (disk full, read-only), the whole story for anything else."""
        where, cause, story = "", problem, ""
        if isinstance(problem, CheckpointException):
            rank, (cause, trace) = sorted(problem.failures.items())[0]
            where = f" on rank {rank}" if self.world_size > 1 else ""
            story = "\n" + "".join(trace.format())
        if isinstance(cause, UserError):
            return cause
        if not isinstance(cause, OSError):
            return RuntimeError(f"checkpoint {job.tag}{where}: {cause!r}{story}")
        advice = {
            errno.ENOSPC: "free some space there or set run.dir to a bigger disk",
            errno.EDQUOT: "free some of your quota or set run.dir to another disk",
            errno.EFBIG: "raise the limit on file sizes (ulimit -f) or set run.dir to another disk",
        }.get(cause.errno or 0, "make that folder writable or set run.dir to another one")
        known, _ = survey(self.folder)
        last = max(known, key=lambda info: info.sequence, default=None)
        kept = f"the last complete checkpoint is {last.path}" if last else "no complete checkpoint exists yet"
        reason = disk_reason(cause, self.folder)
        return UserError(f"checkpoint {self.folder / job.tag}: not saved{where} ({reason}); {advice}; {kept}")

    # -- collectives; what is sent is small, so one kind is enough --

    def _broadcast(self, value: Any) -> Any:
        return self._all_gather(value)[0]

    def _all_gather(self, value: Any) -> list[Any]:
        if self.group is None:
            return [value]
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, value, group=self.group)
        return box

    def _verify_files(self, info: CheckpointInfo) -> None:
        """Sizes of all files on every rank; checksums of this rank's share, largest files dealt out first, and of the
        one that every rank reads before others can tell it that it is damaged."""
        names = sorted(info.files, key=lambda name: (-info.files[name]["bytes"], name))
        hashed = {*names[self.rank :: self.world_size], *info.files.keys() & {".metadata"}}
        problems = verify_manifest(info.path, info.files, hashed=hashed)
        if problems:
            raise UserError(f"checkpoint {info.path}: {problems[0]}; {remedy(info.path)}")


@dataclass
class _Save:
    """One save in the background."""

    tag: str
    staged: dict[str, Any]
    state: dict[str, Any]
    score: float | None
    thread: threading.Thread = field(default_factory=threading.Thread)
    error: Exception | None = None
    lines: list[str] = field(default_factory=list)


class _HashingStream:
    """A file for writing that keeps the checksum of what passes through, so that nothing is read back."""

    def __init__(self, path: Path) -> None:
        self.stream = open(path, "wb", buffering=1 << 20)
        self.sha, self.num_bytes = hashlib.sha256(), 0
        self.problem: OSError | None = None

    def write(self, data: Any) -> int:
        # Torch's zip writer, in C++, does not survive an exception of its stream: the error is kept, what follows is
        # dropped, and `close` raises.
        view = memoryview(data).cast("B")
        if self.problem is None:
            try:
                self.stream.write(view)
                self.sha.update(view)
            except OSError as problem:
                self.problem = problem
        self.num_bytes += len(view)
        return len(view)

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        """Nothing: `close` flushes, once."""

    def close(self) -> None:
        if self.stream.closed:
            return
        try:
            if self.problem is None:
                self.stream.flush()
                os.fsync(self.stream.fileno())
        except OSError as problem:
            self.problem = problem
        try:
            self.stream.close()
        except OSError as problem:
            self.problem = self.problem or problem
        if self.problem is not None:
            raise self.problem


class _HashingFiles(FileSystem):
    """DCP's file access, with sizes and checksums of what was written in `sums`."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        stream = _HashingStream(Path(path))
        try:
            yield stream
        finally:
            stream.close()
        self.sums[Path(path).name] = {"bytes": stream.num_bytes, "sha256": stream.sha.hexdigest()}

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class _Writer(dcp.FileSystemWriter):
    def __init__(self, path: Path) -> None:
        # copy-ahead 0: what is written lies on the CPU already, and the copying loader would open a context on GPU 0
        # in every rank. Syncing is done by the stream, which flushes first.
        super().__init__(path, thread_count=1, sync_files=False, per_thread_copy_ahead=0)
        self.fs: _HashingFiles = _HashingFiles()


def _flatten(tree: Any, path: str = "") -> dict[str, tuple[Any, Any, Any]]:
    """name -> (holder, key, leaf), the name made of the keys on the way joined by "/"."""
    flat: dict[str, tuple[Any, Any, Any]] = {}
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        name = f"{path}/{key}" if path else str(key)
        if isinstance(value, (dict, list)):
            below = _flatten(value, name)
        elif isinstance(value, (torch.Tensor, int, float, str, bool, type(None))):
            below = {name: (tree, key, value)}
        else:
            raise TypeError(
                f"checkpoint entry {name}: {type(value).__name__} is neither tensor nor plain number or text"
            )
        if not flat.keys().isdisjoint(below):
            raise ValueError(f"checkpoint entry {name}: two entries have this name")
        flat.update(below)
    return flat


def _staged(value: Any) -> Any:
    # torch's own staging leaves DTensors without dimensions uncopied; training would change them under the writer
    if isinstance(value, torch.Tensor):
        with torch.no_grad():
            return value.detach().to("cpu", copy=True)
    return value


def _check_template(info: CheckpointInfo, flat: dict[str, Any], partial: bool) -> None:
    """Names, shapes and dtypes of the checkpoint must be those of `flat`; raises UserError naming the differences."""
    saved = dcp.FileSystemReader(info.path).read_metadata().state_dict_metadata
    missing = sorted(flat.keys() - saved.keys())
    extra = [] if partial else sorted(saved.keys() - flat.keys())
    others = []
    for name in sorted(flat.keys() & saved.keys()):
        entry, value = saved[name], flat[name]
        there = f"{list(entry.size)} {entry.properties.dtype}" if isinstance(entry, TensorStorageMetadata) else "plain"
        here = f"{list(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else "plain"
        if there != here:
            others.append(f"{name} is {there} there and {here} here".replace("torch.", ""))
    groups = [("lacks", missing), ("has besides", extra), ("differs:", others)]
    parts = [f"it {word} {few(names, 3)}" for word, names in groups if names]
    if parts:
        raise UserError(
            f"checkpoint {info.path}: of another model or setup: {'; '.join(parts)}; give the model, strategy and "
            "algorithm options it was saved with, another run.dir, or run.resume=never"
        )


def _finite(score: float | None) -> float | None:
    return float(score) if score is not None and math.isfinite(score) else None
