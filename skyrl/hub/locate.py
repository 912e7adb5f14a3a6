"""From what `model.path` and `model.tokenizer` name to a local folder in Hugging Face format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skyrl.hub.gguf import converted, gguf_file
from skyrl.hub.model_path import path_problem
from skyrl.hub.policies import POLICIES, policy_path
from skyrl.types import PassingError, UserError

SILENCE_SECONDS = 120.0  # after which a hub that says nothing is given up


def locate(path: str, revision: str = "", *, where: str = "model.path", weights: bool = True) -> Path:
    """The local folder of a model: `path` itself, the hub's copy of it, fetched if need be, or, for a file in GGUF
    format or a folder that holds one, the Hugging Face folder that is made of it once. The name of a registered
    policy means what that gives.

    Raises: UserError that says what was looked for, when there is neither.
    """
    path = policy_path(path) if path in POLICIES else path
    folder = Path(path)
    if weights and (problem := path_problem(path)):
        raise UserError(f"{where}={path}: {problem}")
    if (file := gguf_file(folder, where)) is not None:
        return converted(file, where=where)
    if folder.is_dir():
        return folder
    looked = f"no folder {folder.absolute()}"
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise UserError(f"{where}={path}: {looked}, and a hub name looks like org/name; give one of these, or `tiny`")
    patterns = ["*.json", "*.model", "*.spm", "*.tiktoken", "*.txt", "*.jinja", "*.py", "LICENSE*", "NOTICE*"]
    patterns += ["README.md", *(["*.safetensors"] if weights else [])]  # its head says the licence, as an export's does
    try:
        found = download(path, patterns, revision)
        if weights and not any(found.glob("*.safetensors")):
            download(path, ["pytorch_model*"], revision)
        return found
    except UserError as error:
        raise type(error)(
            f"{where}={path}: {looked}, and the hub gave no model of that name ({error}); hub names look like org/name"
        ) from error


def download(name: str, patterns: Sequence[str], revision: str = "", **more: Any) -> Path:
    """The folder with the files of a model on the hub that match `patterns`, fetched where the hub's cache lacks them.
    `more`: as snapshot_download has it. Raises UserError with the reason in one line."""
    from huggingface_hub import snapshot_download

    try:
        limit_silence()
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(patterns), **more))
    except Exception as error:  # of one of three HTTP libraries, as the release of huggingface_hub has it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise (PassingError if may_pass(error) else UserError)(reason) from error


def limit_silence() -> None:
    """Has the hub's client give up on a hub that is silent; by itself it waits for ever, with the job and its GPUs."""
    from huggingface_hub import get_session

    hooks = get_session().event_hooks["request"]
    if _limit not in hooks:
        hooks.append(_limit)


def _limit(request: Any) -> None:
    asked = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = {
        kind: asked.get(kind) or SILENCE_SECONDS for kind in ("connect", "read", "write", "pool")
    }


def name_for_others(path: str) -> str:
    """A model or data set as others may know it: a hub's name as it is; of a path, which means nothing to them and
    tells who keeps what where, the last folder or file, of an export of ours the run's."""
    hub = path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()
    return path if hub else Path(path.rstrip("/").removesuffix("/export")).resolve().name


def may_pass(error: BaseException | None) -> bool:
    """Whether a client of a hub has failed on the way there or at a hub that is busy, so that it may work later."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status or type(error).__module__.startswith(("httpx", "requests")):
            return not status or status in (408, 429) or status >= 500
        error = error.__cause__ or error.__context__
    return False
