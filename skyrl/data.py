"""Prompts of a run: where they come from, and their order. Position i is an integer, so any run can go on anywhere.

Files are read by envs/data_files.py, since environments need it too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np

from skyrl.algorithms.objectives import Objectives
from skyrl.config.schema import RunConfig
from skyrl.envs import environment_options
from skyrl.envs.base import Split, group_rewards_of, objective_names_of
from skyrl.envs.data_files import NoHeldOut, messages_problem
from skyrl.envs.guard import describe_error
from skyrl.envs.wrappers import classes_of
from skyrl.judges import policy as _judges  # noqa: F401
from skyrl.tasks import code as _registered  # noqa: F401
from skyrl.types import Prompt, UserError

_MASK = 2**64 - 1
DEEP = 60  # levels into which a value of a prompt is followed


class PromptStream:
    """An endless order over prompts: epoch after epoch, each in its own permutation keyed by (seed, epoch).

    Without state: `at(i)` depends on i, the seed and the number of prompts only, so a resumed run, at any world size,
    sees the order an uninterrupted one would. Ranks need no communication: each asks for its own positions.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool) -> None:
        if not len(prompts):
            raise UserError("no prompts: the data is empty")
        self.prompts, self.seed, self.shuffle = prompts, seed, shuffle
        self._orders: dict[int, np.ndarray] = {}  # the two epochs last asked for: a step may cross a border

    def __len__(self) -> int:
        """Prompts of one epoch."""
        return len(self.prompts)

    def index(self, position: int) -> int:
        """Index into the prompts of `position` (0 or more, without end). Raises IndexError below 0."""
        if position < 0:
            raise IndexError(f"position {position} is below 0")
        epoch, place = divmod(position, len(self.prompts))
        return int(self._order(epoch)[place]) if self.shuffle else place

    def at(self, position: int) -> Prompt:
        """The prompt at `position` (0 or more, without end)."""
        return self.prompts[self.index(position)]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            while len(self._orders) >= 2:
                del self._orders[next(iter(self._orders))]
            # Sorting raw Philox words, not Generator.permutation, whose stream numpy may change between versions.
            key = np.array([self.seed & _MASK, epoch & _MASK], dtype=np.uint64)
            words = np.random.Philox(key=key).random_raw(len(self.prompts))
            self._orders[epoch] = np.argsort(words, kind="stable").astype(np.int32 if len(words) < 2**31 else np.int64)
        return self._orders[epoch]


def make_prompts(cfg: RunConfig, split: Split) -> Sequence[Prompt]:
    """The prompts of the run's environment for "train" or "test", in their own order (PromptStream shuffles).

    data.max_prompts cuts "train". Raises UserError for bad options, bad or missing data (with file:line), a prompt
    of a wrong form, or uids that are not unique. Whether they can be played needs a tokenizer: text/fit.py.
    """
    if cfg.data.max_prompts < 0:
        raise UserError(f"data.max_prompts={cfg.data.max_prompts}: wanted 0 (all) or more")
    cls = classes_of(cfg.env)[0]
    options = environment_options(cfg.env)
    group_rewards_of(cfg.env)
    for reward, params in group_rewards_of(cfg.env, batch=True):
        reward(**params)  # says what is wrong with them
    if names := objective_names_of(cfg.env):
        objectives = cfg.algorithm.objectives
        Objectives(objectives.weights, objectives.constraints).check(names, f"env.name={cfg.env.name}")
    try:
        prompts = cls.dataset(options, cfg.data, split, cfg.seed)
    except UserError:
        raise
    except Exception as error:  # of foreign code
        raise UserError(
            f"env.name={cfg.env.name}: its dataset(), asked for {split} prompts, raised {describe_error(error)}"
        ) from error
    if not (hasattr(prompts, "__len__") and hasattr(prompts, "__getitem__")):
        raise UserError(
            f"env.name={cfg.env.name}: its dataset() returned a {type(prompts).__name__}, wanted a sequence of Prompt"
        )
    if split == "train" and cfg.data.max_prompts:
        prompts = prompts[: cfg.data.max_prompts]
    if not len(prompts):
        raise UserError(f"env.name={cfg.env.name}: its dataset() has no {split} prompts")
    _check(prompts, cfg.env.name, split, cls.row_checks(options))
    return prompts


def make_splits(cfg: RunConfig) -> tuple[dict[str, Sequence[Prompt]], str]:
    """The prompts of both splits, and a line about where the held-out ones are from if it is no file of theirs.

    Data without a held-out file gives some of its own rows: those whose messages have the least hashes, a tenth but no
    more than eval.num_prompts (rows with the same messages stay together). With eval.every_steps=0 all rows are trained
    on and nothing is evaluated. Raises UserError as make_prompts does, and for one made task that would be both.
    """
    train = make_prompts(cfg, "train")
    try:
        test = make_prompts(cfg, "test")
        if not (cfg.data.path or cfg.data.eval_path) and len(train) == len(test) == 1:
            _refuse_equal(cfg.env.name, train[0], test[0])
        return {"train": train, "test": test}, ""
    except NoHeldOut as error:
        if cfg.eval.every_steps == 0:
            return {"train": train, "test": []}, "no held-out rows (eval.every_steps=0): nothing is evaluated"
        texts = (canonical(prompt.messages).encode(errors="backslashreplace") for prompt in train)
        digests = [hashlib.sha256(text).digest() for text in texts]
        limit = sorted(digests)[max(1, min(len(train) // 10, cfg.eval.num_prompts)) - 1]
        kept = [prompt for prompt, digest in zip(train, digests, strict=True) if digest > limit]
        if not kept:
            raise
        held_out = [prompt for prompt, digest in zip(train, digests, strict=True) if digest <= limit]
        line = f"held out by hash: {len(held_out)} of the {len(train)} rows of {cfg.data.path} ({error.looked})"
        return {"train": kept, "test": held_out}, line


def _refuse_equal(env: str, train: Prompt, test: Prompt) -> None:
    if canonical([train.messages, train.extra]) == canonical([test.messages, test.extra]):
        text = repr(train.messages[-1]["content"])[:60]
        remedy = "set eval.every_steps=0 to train without an evaluation, or env.options so that it makes more"
        raise NoHeldOut(f"env.name={env} makes one task, {text}, which would be trained on and held out", remedy)


def _check(prompts: Sequence[Prompt], env: str, split: str, checks: Sequence[Callable[[Prompt], object]]) -> None:
    uids: set[str] = set()
    for index, prompt in enumerate(prompts):
        place = f"env.name={env}: {split} prompt {index} of its dataset()"
        if not isinstance(prompt, Prompt):
            raise UserError(f"{place} is a {type(prompt).__name__}, wanted skyrl.api.Prompt")
        if prompt.uid in uids:
            raise UserError(f"{place} has uid {prompt.uid!r}, which another one has; uids must be unique")
        if prompt.env != env:
            raise UserError(f"{place} has env {prompt.env!r}, wanted {env!r}")
        problem = messages_problem(prompt.messages)
        if problem:
            raise UserError(f"{place}: messages {problem}")
        uids.add(prompt.uid)
        for check in checks:
            check(prompt)


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """A few characters of the SHA-256 of prompts, the same in all processes that have read the same."""
    digest = hashlib.sha256()
    for prompt in prompts:
        parts = [prompt.uid, prompt.env, prompt.messages, prompt.extra]
        digest.update(canonical(parts).encode(errors="backslashreplace"))
    return digest.hexdigest()[:12]


def canonical(value: Any, above: tuple[int, ...] = ()) -> str:
    """A value of any kind as a text that tells it from others and is the same in all processes: without addresses,
    without the order of a set. Objects count by what pickle would store of them. `above`: the ids of what it is part
    of. Never raises: what cannot be looked into is its type's name."""
    if type(value) is str:
        return repr(value)
    kind = type(value).__qualname__
    try:
        if value is None or isinstance(value, (str, bytes, bytearray, int, float, type, re.Pattern)):
            return hex(value) if type(value) is int else repr(value)
        if id(value) in above or len(above) > DEEP:
            return kind
        above = (*above, id(value))
        if isinstance(value, Mapping):
            parts = sorted(f"{canonical(key, above)}: {canonical(one, above)}" for key, one in value.items())
        elif isinstance(value, Set):
            parts = sorted(canonical(one, above) for one in value)
        elif isinstance(value, (list, tuple)):
            parts, kind = [canonical(one, above) for one in value], ""
        elif hasattr(value, "detach") and hasattr(value, "tolist"):  # a tensor
            parts = [str(value.dtype), str(list(value.shape)), canonical(value.detach().tolist(), above)]
        else:
            stored = value.__reduce_ex__(4)  # a name, or what makes it, its state, its items and pairs
            stored = stored if isinstance(stored, tuple) else (stored,)
            parts = [canonical(list(one) if isinstance(one, Iterator) else one, above) for one in stored]
        return f"{kind}({', '.join(parts)})"
    except Exception:  # of foreign code
        return kind
