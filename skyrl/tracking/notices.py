"""What a run says of itself before anybody asks: that it cannot learn as it is set up, and why.

Each notice has a name, is one line, is said once in the life of a run and stands in its result.json.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from functools import lru_cache

from skyrl.types import Metrics

log = logging.getLogger(__name__)

EQUAL_STEPS = 5  # steps in a row without a group that can teach, before it is said
SILENT_STEPS = 3  # steps in a row without one verifier that worked, before a run that has had some stops


@dataclass
class Notices:
    """What was said so far (name -> line), and how many steps in a row something has lasted. Part of a checkpoint."""

    said: dict[str, str] = field(default_factory=dict)
    lasted: dict[str, int] = field(default_factory=dict)

    def _lasts(self, name: str, is_so: bool) -> int:
        self.lasted[name] = self.lasted.get(name, 0) + 1 if is_so else 0
        return self.lasted[name]

    def look(self, step: int, metrics: Metrics, *, of_groups: bool = True) -> list[str]:
        """The lines that a finished step of RL gives cause for, by its global metrics.

        `of_groups`: the advantage compares the samples of a group, so that equal rewards teach nothing."""
        episodes, invalid = metrics.get("episodes:sum", 0.0), metrics.get("invalid:sum", 0.0)
        if not episodes:
            return []
        if invalid < episodes:
            self.lasted["worked"] = 1
        groups, equal = metrics.get("filters/groups:sum", 0.0), metrics.get("filters/zero_variance_groups:sum", 0.0)
        reward = metrics.get("reward:mean", 0.0)
        found = {}
        if self._lasts("all_groups_equal", groups == equal and invalid < episodes) >= EQUAL_STEPS and of_groups:
            found["all_groups_equal"] = (
                f"in {EQUAL_STEPS} steps in a row all rewards of each group were equal (mean {reward:g}), so nothing "
                "is learned: the task is too hard or too easy for this model, or the reward does not tell answers "
                "apart; see the rollouts; partial rewards, a warm-up (warmup.num_steps) or other data help"
            )
        if metrics.get("cut_by_length:mean", 0.0) == 1.0:
            found["all_truncated"] = (
                f"all {episodes:.0f} episodes of step {step} were truncated: none ended by itself; raise "
                "sampler.max_new_tokens, or see in the rollouts why no turn ends (the start says what ends a turn)"
            )
        if self._lasts("all_invalid", invalid == episodes):
            found["all_invalid"] = (
                f"all {episodes:.0f} episodes of step {step} are invalid: no verifier worked; the rollouts hold the "
                "reasons"
            )
        new = {name: f"notice {name}: {text}" for name, text in found.items() if name not in self.said}
        self.said |= new
        return list(new.values())

    @property
    def hopeless(self) -> bool:
        """Whether verifiers fail for all episodes: from the first step on, or for SILENT_STEPS in a row."""
        return self.lasted.get("all_invalid", 0) >= (SILENT_STEPS if self.lasted.get("worked") else 1)


@lru_cache(maxsize=1000)
def warn_fallback(line: str, every_rank: bool = False) -> None:
    """A warning in one line, with the reason, once in a process for each text; on ranks other than 0 for debugging
    only, since their devices are the same. `every_rank`: on all, with the rank's number: their memory is not."""
    rank = os.environ.get("RANK", "0")
    if every_rank and rank != "0":
        line = f"rank {rank}: {line}"
    log.log(logging.WARNING if every_rank or rank == "0" else logging.DEBUG, line)
