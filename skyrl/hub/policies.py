"""Models that a user's program makes: a registered policy, or a transformers model in memory, as a folder in Hugging
Face format, which is what everything else reads. No torch until a model is there."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from skyrl.files import user_folder, write_folder_atomic
from skyrl.registry import Registry
from skyrl.types import UserError

SET_BY_SAVING = ("architectures", "dtype", "torch_dtype", "transformers_version")
WANTED = "a transformers causal LM, a pair of that and its tokenizer, or the path or hub name of a model"


class Policy:
    """A model that is made in code; `model.path=<name>` trains it. Subclasses write `load`."""

    def load(self) -> Any:
        """A transformers causal LM, or a pair of that and its tokenizer, or the path or hub name of a model.

        Called once in each process, and must give the same on all ranks and at every start: seed what is random.
        """
        raise NotImplementedError("this policy has no load()")


POLICIES: Registry[Callable[[], Any]] = Registry("policy")


def register_policy(name: str) -> Callable[[Any], Any]:
    """Decorator: makes a Policy, or a function that returns what `Policy.load` does, known as model.path=<name>; or a
    torch.nn.Module class, or a function that makes one of two spaces, as control.policy=<name>: docs/control.md.

    Raises UserError for a name that is taken and for anything else than such a class or a function.
    """

    def keep(thing: Any) -> Any:
        known = not isinstance(thing, type) or hasattr(thing, "load") or hasattr(thing, "forward")
        if not (callable(thing) and known):
            raise UserError(f"register_policy({name!r}): {thing!r} is no skyrl.Policy, torch.nn.Module or function")
        return POLICIES.register(name)(thing)

    return keep


def policy_path(name: str) -> str:
    """What model.path=<name> of a registered policy means: a path or hub name. Raises UserError."""
    return _path_of(name, POLICIES.get(name, "model.path"))


@functools.cache
def _path_of(name: str, made: Callable[[], Any]) -> str:
    where = f"model.path={name}"
    try:
        found = made().load() if isinstance(made, type) else made()
    except UserError:
        raise
    except Exception as error:  # of foreign code
        raise UserError(f"{where}: making this policy raised {type(error).__name__}: {error}") from error
    model, tokenizer = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    return str(model) if isinstance(model, (str, Path)) else str(model_folder(model, tokenizer, where))


def model_folder(model: Any, tokenizer: Any, where: str) -> Path:
    """The folder, in the user's cache and named by its content, of a transformers model and its tokenizer; without one
    that of the model which it was made from. The first process that asks writes it. Raises UserError."""
    if not (hasattr(model, "save_pretrained") and hasattr(model, "state_dict") and hasattr(model, "config")):
        raise UserError(f"{where}: a {type(model).__name__}; give {WANTED}")
    if tokenizer is None:
        origin = str(getattr(model.config, "_name_or_path", "") or "")
        if not origin:
            raise UserError(f"{where}: a model made in code has no tokenizer; give it too: (model, tokenizer)")
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(origin)
        except Exception as error:  # as in text.tokenizer
            said = " ".join(str(error).split())[:200]
            raise UserError(f"{where}: no tokenizer in {origin} ({said}); give (model, tokenizer)") from error
    import torch

    config = {key: value for key, value in model.config.to_dict().items() if key not in SET_BY_SAVING}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(
        str(sorted(tokenizer.get_vocab().items())).encode() + str(getattr(tokenizer, "chat_template", "")).encode()
    )
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    cache = user_folder("XDG_CACHE_HOME", "~/.cache") / "policies"
    folder = cache / f"{type(model).__name__}-{digest.hexdigest()[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").is_file():
            with write_folder_atomic(folder) as part:
                model.save_pretrained(part)
                tokenizer.save_pretrained(part)
    return folder
