"""What the worker asks of store and archive: runs, samplers, checkpoints, spilled snapshots.

Saves are written by a thread of their own, one after the other, from copies; a save is acknowledged when its files and
its row are on the disk. Everything else here is short.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from skyrl.service.archive import Archive
from skyrl.service.archive_content import Content, OptimizerState
from skyrl.service.future_log import FutureLog
from skyrl.service.messages import SaveWeights
from skyrl.service.records import CheckpointPath, ModelInfo, NotFound, Sampler
from skyrl.service.store import Store
from skyrl.service.store_sync import expire_checkpoints, load_checkpoint, reconcile, save_checkpoint
from skyrl.types import LoraSpec

DATABASE, CHECKPOINTS, SPILL = "service.sqlite", "checkpoints", "snapshots"
WRAPPER = "net."  # before the name of each parameter of a whole model, in the engine
Settle = Callable[[int, Exception | None], None]


class CheckpointService:
    """The service's folder. Made on rank 0, by one process at a time; what a dead server left is put right.

    `lines`: what was found at start and is worth telling. Raises UserError when the folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.store = Store(folder / DATABASE)
        self.archive = Archive(folder / CHECKPOINTS)
        self.lines = reconcile(self.store, self.archive).lines
        lost = self.store.recover()
        if lost:
            self.lines.append(
                f"{len(lost)} models were open when the last server ended; clients resume from checkpoints"
            )
        self.futures = FutureLog(self.store)
        self._spill = folder / SPILL
        shutil.rmtree(self._spill, ignore_errors=True)  # ephemeral snapshots end with their server
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="skyrl-save")
        self._saving: set[Future[None]] = set()

    def close(self) -> None:
        """Waits for saves, then lets go of the folder."""
        self.wait()
        self._saver.shutdown()
        self.store.flush_touched()
        self.archive.close()
        self.store.close()

    # ---- runs and samplers -----------------------------------------------------------------------------------------

    def explain_lost(self, model_id: str, owner: str) -> str:
        """Why a model that is not open is gone, or "" when it never was this owner's."""
        try:
            run = self.store.get_run(model_id, owner)
        except NotFound:
            return ""
        last = f"; its last checkpoint is {run.last_checkpoint.path.uri}" if run.last_checkpoint else ""
        why = "was lost when the server restarted" if run.state == "lost" else "is closed"
        return f"{model_id} {why}; create a model from a saved state{last}"

    def ended_sessions(self, sessions: set[str], idle_seconds: float) -> set[str]:
        """Those that were finished, or were silent for `idle_seconds` (0 = any silence is fine)."""
        if not sessions:
            return set()
        silent = {one.session_id for one in self.store.silent_sessions(idle_seconds)} if idle_seconds else set()
        return sessions & (silent | self.store.ended_sessions())

    def add_run(self, owner: str, session: str, model_seq_id: int, facts: ModelInfo, metadata: dict[str, str]) -> None:
        """Records a model that was made."""
        self.store.create_run(session, owner, model_seq_id, facts, metadata)

    def check_session(self, session: str, owner: str) -> None:
        """Raises NotFound unless the session is the owner's."""
        self.store.get_session(session, owner)

    def close_run(self, model_id: str, owner: str) -> None:
        """Records that a model was closed."""
        self.store.close_run(model_id, owner)

    def sampler(self, sampler_id: str, owner: str) -> Sampler:
        """A sampling session. Raises NotFound."""
        return self.store.get_sampler(sampler_id, owner)

    def add_ephemeral_sampler(self, session: str, owner: str, seq: int, base_model: str, run: str) -> str:
        """A sampling session of a snapshot that has no name; returns its id."""
        return self.store.create_sampler(session, owner, seq, base_model, ephemeral_run=run).sampler_id

    def expire(self) -> None:
        """Removes checkpoints whose time has come and answers that nobody asks for any more; writes down which models
        were used."""
        expire_checkpoints(self.store, self.archive)
        self.store.prune_futures()
        self.store.flush_touched()

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def check_save(self, request: SaveWeights, owner: str) -> CheckpointPath:
        """Where a save will be. Raises UserError for a name that cannot be or is taken."""
        name = request.name if request.name is not None else f"{request.seq_id:06d}"
        path = CheckpointPath(request.model_id, request.kind, name)
        self.store.require_free(path, owner, overwrite=request.overwrite)
        return path

    def save(self, request: SaveWeights, path: CheckpointPath, owner: str, content: Content, settle: Settle) -> None:
        """Writes a checkpoint beside the work; `settle(size, error)` when it is acknowledged or has failed."""

        def write() -> None:
            try:
                saved = save_checkpoint(
                    self.store,
                    self.archive,
                    path,
                    owner,
                    content,
                    ttl_seconds=request.ttl_seconds,
                    user_metadata=request.user_metadata,
                    overwrite=request.overwrite,
                    recipients=request.age_recipients,
                )
            except Exception as error:  # every failure belongs to the one who asked for the save
                settle(0, error)
            else:
                settle(saved.size_bytes, None)

        future = self._saver.submit(write)
        self._saving.add(future)
        future.add_done_callback(self._saving.discard)

    def wait(self) -> None:
        """Returns when all saves are settled."""
        for future in list(self._saving):
            future.result()

    def version(self, path: str, reader: str) -> str:
        """Which version a path stands for now. Raises UserError when the reader cannot have it."""
        return self.store.get_checkpoint(CheckpointPath.parse(path), reader).version

    def read(self, path: str, reader: str, *, optimizer: bool) -> Content:
        """A checkpoint's tensors. Raises UserError: not there, another owner's, damaged, no optimizer state."""
        return load_checkpoint(self.store, self.archive, CheckpointPath.parse(path), reader, optimizer=optimizer)[1]

    def read_version(self, path: str, version: str) -> Content:
        """The weights of one version of a checkpoint, for who was allowed to when it was opened."""
        return self.archive.read(CheckpointPath.parse(path), version, optimizer=False)

    # ---- ephemeral snapshots that host memory has no room for --------------------------------------------------------

    def spill(self, name: str, content: Content) -> None:
        """Moves a snapshot to a file."""
        self._spill.mkdir(exist_ok=True)
        torch.save(content, self._file(name))

    def read_spilled(self, name: str) -> Content:
        """A snapshot from its file, which this server wrote."""
        return torch.load(self._file(name), weights_only=False)

    def drop_spilled(self, name: str) -> None:
        """Removes the file."""
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self._spill / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.pt"


def to_content(base_model: str, lora: LoraSpec | None, state: dict[str, Any]) -> Content:
    """An engine's tenant state as a checkpoint's content. Adapter parameters are called <module path>.A and .B; whole
    models' have the names that transformers knows, without the wrapper's."""
    facts = ModelInfo(base_model, lora)
    if lora is None:
        state = {key: _renamed(part, lambda name: name.removeprefix(WRAPPER)) for key, part in state.items()}
    optimizer = None
    if "exp_avg" in state:
        optimizer = OptimizerState(int(state["step"]), state["exp_avg"], state["exp_avg_sq"])
    weights = state["weights"]
    if lora is None:
        return Content(facts, weights=weights, optimizer=optimizer)
    paths = [name[: -len(".A")] for name in weights if name.endswith(".A")]
    pairs = {path: (weights[f"{path}.A"], weights[f"{path}.B"]) for path in paths}
    return Content(facts, adapters=pairs, optimizer=optimizer)


def to_state(content: Content) -> dict[str, Any]:
    """The inverse of `to_content`."""
    state: dict[str, Any] = {"weights": adapter_weights(content) if content.facts.is_lora else content.weights}
    if content.optimizer is not None:
        kept = content.optimizer
        state.update(
            exp_avg=kept.exp_avg, exp_avg_sq=kept.exp_avg_sq, step=torch.tensor(float(kept.step), dtype=torch.float32)
        )
    if not content.facts.is_lora:
        state = {key: _renamed(part, lambda name: WRAPPER + name) for key, part in state.items()}
    return state


def _renamed(part: Any, rename: Callable[[str], str]) -> Any:
    return {rename(name): tensor for name, tensor in part.items()} if isinstance(part, dict) else part


def adapter_weights(content: Content) -> dict[str, torch.Tensor]:
    """Parameter name -> tensor of an adapter."""
    out = {}
    for path, (a, b) in content.adapters.items():
        out[f"{path}.A"], out[f"{path}.B"] = a, b
    return out


def num_bytes(content: Content) -> int:
    """Memory of the weights."""
    return sum(a.nbytes + b.nbytes for a, b in content.adapters.values()) + sum(
        w.nbytes for w in content.weights.values()
    )
