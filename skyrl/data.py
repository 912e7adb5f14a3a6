"""Prompts of a run: where they come from, and their order. Position i is an integer, so any run can go on anywhere.

Files are read by envs/data_files.py, since environments need it too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from skyrl.config.schema import RunConfig
from skyrl.envs import ENVIRONMENTS, environment_options
from skyrl.envs.base import Split
from skyrl.envs.data_files import messages_problem
from skyrl.types import Prompt, UserError

_MASK = 2**64 - 1


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
    cls = ENVIRONMENTS.get(cfg.env.name, "env.name")
    prompts = cls.dataset(environment_options(cfg.env), cfg.data, split, cfg.seed)
    if split == "train" and cfg.data.max_prompts:
        prompts = prompts[: cfg.data.max_prompts]
    if not len(prompts):
        raise UserError(f"env.name={cfg.env.name}: its dataset() has no {split} prompts")
    _check(prompts, cfg.env.name, split)
    return prompts


def _check(prompts: Sequence[Prompt], env: str, split: str) -> None:
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
