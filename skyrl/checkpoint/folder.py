"""Folders of checkpoints: manifests, which checkpoints are complete, what to resume from, what to delete. No torch.

A checkpoint is a folder <tag>/ whose manifest.json was written last and whose name was given last: until then it is
<tag>.tmp-..., and while it is deleted <tag>.trash-...; neither counts as a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import skyrl
from skyrl.files import disk_reason, sync_folder, to_trash, verify_manifest, write_atomic
from skyrl.types import UserError

FORMAT = 1
MANIFEST = "manifest.json"
_FIELDS = ("tag", "sequence", "score", "world_size", "files", "config_digest", "state")


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint as its manifest describes it. A higher `sequence` was written later.

    files: name -> {"bytes", "sha256"}. state: what the trainer gave to `save`. score: the value of `metric`, None where
    it was not measured.
    """

    path: Path
    tag: str
    sequence: int
    score: float | None
    world_size: int
    files: dict[str, dict[str, Any]]
    config_digest: str
    state: dict[str, Any]
    metric: str


@dataclass(frozen=True)
class Best:
    """Which checkpoint is the best one: with the most (mode max) or least (min) of a metric, the first of equals."""

    metric: str = "eval/accuracy:mean"
    mode: str = "max"

    def of(self, known: Iterable[CheckpointInfo]) -> CheckpointInfo | None:
        """The best of those that this metric was measured for; None without any."""
        sign = 1.0 if self.mode == "max" else -1.0
        measured = [
            (sign * info.score, info) for info in known if info.score is not None and info.metric == self.metric
        ]
        return max(measured, key=lambda pair: (pair[0], -pair[1].sequence))[1] if measured else None

    def improves(self, score: float, known: Iterable[CheckpointInfo]) -> bool:
        """Whether `score` is better than all of `known`. What is not finite never is."""
        best = self.of(known)
        if best is None or best.score is None or not math.isfinite(score):
            return math.isfinite(score)
        return score > best.score if self.mode == "max" else score < best.score


def read_checkpoint(path: Path) -> CheckpointInfo:
    """The manifest of one checkpoint, checked against its own digest; reads no weights.

    Raises: UserError when there is none, it is damaged, or another format of skyrl wrote it.
    """
    try:
        return _read(Path(path))
    except _Unusable as problem:
        raise UserError(f"checkpoint {path}: {problem}; {remedy(Path(path))}") from None


def list_checkpoints(folder: Path) -> list[CheckpointInfo]:
    """Complete checkpoints in `folder`, oldest first. Half-written ones and other folders are not among them.

    Raises: UserError when a manifest is damaged: skipping it would silently resume from an older state.
    """
    return sorted((read_checkpoint(path) for path in _candidates(folder)), key=lambda info: info.sequence)


def latest(folder: Path) -> CheckpointInfo | None:
    """The newest complete checkpoint in `folder`, or None. Raises: UserError as list_checkpoints does."""
    return max(list_checkpoints(folder), key=lambda info: info.sequence, default=None)


def newest(folder: Path) -> CheckpointInfo | None:
    """The same, whatever lies beside it: for those who do not resume from it."""
    return max(survey(folder)[0], key=lambda info: info.sequence, default=None)


def find_resume(setting: str, folder: Path) -> CheckpointInfo | None:
    """What run.resume asks for: auto = the newest of `folder` or None, never = None, else the checkpoint at that path.

    Raises: UserError when a path is given that holds no complete checkpoint, or when a manifest is damaged.
    """
    if setting == "auto":
        return latest(folder)
    if setting == "never":
        return None
    if not (Path(setting) / MANIFEST).is_file() or not is_final(Path(setting)):
        known = ", ".join(str(info.path) for info in survey(folder)[0]) or "none in this run folder"
        raise UserError(
            f"run.resume={setting}: no complete checkpoint there; give auto, never or the path of one (known: {known})"
        )
    return read_checkpoint(Path(setting))


def clean_leftovers(folder: Path) -> list[str]:
    """Removes what killed runs left half-written or half-deleted in `folder`; returns one line for each.

    Only on rank 0, under the run lock, before anything is saved. A checkpoint that was killed between its manifest and
    its rename is complete and gets its name.
    """
    lines = []
    for path in sorted(Path(folder).glob("*")):
        if is_final(path) or not path.is_dir():
            continue
        final = path.with_name(path.name.rsplit(".tmp-", 1)[0])
        try:
            if ".tmp-" in path.name and not final.exists() and _whole(path):
                path.rename(final)
                lines.append(f"checkpoint {final.name}: complete, only its renaming was cut short; finished now")
                continue
            shutil.rmtree(path)
        except OSError as problem:
            raise UserError(
                f"checkpoint leftover {path}: cannot be removed ({disk_reason(problem)}); remove it"
            ) from None
        lines.append(f"removed {path.name}: left by a run that was killed while it wrote or deleted it")
    return lines


def publish(folder: Path, tmp: Path, manifest: dict[str, Any]) -> list[str]:
    """Completes the checkpoint whose files lie in `tmp`: writes its manifest, gives it its name; returns lines.

    `manifest` lacks only format, sequence and digest. A checkpoint of the same name is replaced.
    """
    known, broken = survey(folder)
    sequence = 1 + max((info.sequence for info in known), default=0)
    manifest = {"format": FORMAT, "tag": manifest["tag"], "sequence": sequence, **manifest}
    manifest["digest"] = digest(manifest)
    write_atomic(tmp / MANIFEST, json.dumps(manifest, indent=1))
    sync_folder(tmp)
    final = folder / manifest["tag"]
    # A kill between the two renames leaves tmp, which clean_leftovers recognises as complete.
    trash = to_trash(final) if final.exists() else None
    try:
        tmp.rename(final)
    except OSError:
        if trash is not None:
            trash.rename(final)
        raise
    sync_folder(folder)
    lines = [] if trash is None else _delete(trash)
    return lines + [f"checkpoint {path}: {MANIFEST} is damaged; left alone" for path in broken if path != final]


def retain(folder: Path, *, keep_last: int, best: Best | None) -> list[str]:
    """Deletes all but the newest `keep_last` (0 = all) and the best (None: whatever it is); returns lines of trouble.

    Called after a new checkpoint is complete: the one a run resumed from outlives its successor's birth.
    """
    known = sorted(survey(folder)[0], key=lambda info: info.sequence)
    keep = {info.tag for info in (known if keep_last == 0 else known[-keep_last:])}
    if best is not None and (kept := best.of(known)) is not None:
        keep.add(kept.tag)
    lines = []
    for info in known:
        if info.tag not in keep:
            lines += _delete(info.path)
    return lines


def survey(folder: Path) -> tuple[list[CheckpointInfo], list[Path]]:
    """Complete checkpoints, and those whose manifest is damaged (kept: deleting them is a person's decision)."""
    good: list[CheckpointInfo] = []
    broken: list[Path] = []
    for path in _candidates(folder):
        try:
            good.append(_read(path))
        except _Unusable:
            broken.append(path)
    return good, broken


def remedy(path: Path) -> str:
    """What to do about a checkpoint that cannot be used: the one before it, if there is one."""
    known = survey(path.parent)[0]
    mine = [info.sequence for info in known if info.path.name == path.name]
    before = [i for i in known if i.path.name != path.name and (not mine or i.sequence < mine[0])]
    newest = max(before, key=lambda info: info.sequence, default=None)
    return (f"give run.resume={newest.path}, or " if newest else "") + "move that folder away and start again"


def is_final(path: Path) -> bool:
    """Whether the name is that of a complete checkpoint."""
    return ".tmp-" not in path.name and ".trash-" not in path.name


def digest(manifest: dict[str, Any]) -> str:
    """The manifest's own checksum, without the entry that holds it."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


class _Unusable(Exception):
    """Why a manifest cannot be used; without advice, as finding advice reads manifests."""


def _read(path: Path) -> CheckpointInfo:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except OSError as problem:
        raise _Unusable(f"not a complete checkpoint ({disk_reason(problem)})") from None
    except ValueError:
        raise _Unusable(f"{MANIFEST} is damaged") from None
    given = manifest.pop("digest", None) if isinstance(manifest, dict) else None
    if given is None or given != digest(manifest):
        raise _Unusable(f"{MANIFEST} is damaged")
    if manifest["format"] != FORMAT:
        raise _Unusable(
            f"format {manifest['format']} of skyrl {manifest['versions']['skyrl']}, this skyrl {skyrl.__version__} "
            f"reads format {FORMAT}; use the version that wrote it"
        )
    metric = manifest.get("metric", Best.metric)  # older releases knew no other
    return CheckpointInfo(path=path, metric=metric, **{key: manifest[key] for key in _FIELDS})


def _candidates(folder: Path) -> list[Path]:
    return sorted(path.parent for path in Path(folder).glob(f"*/{MANIFEST}") if is_final(path.parent))


def _whole(path: Path) -> bool:
    """Whether the manifest is good and every file is there with its size."""
    try:
        files = _read(path).files
    except _Unusable:
        return False
    return not verify_manifest(path, files, hashed=())


def _delete(path: Path) -> list[str]:
    """Trouble costs space and loses nothing, so it is a line and no error; the next start tries again."""
    try:
        shutil.rmtree(path if not is_final(path) else to_trash(path))
    except OSError as problem:
        return [f"checkpoint {path}: could not be deleted ({disk_reason(problem)})"]
    return []
