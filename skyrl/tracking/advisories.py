"""What a run says of itself before anybody asks: that it cannot learn as it is set up, or goes astray, and why.

Each advisory has a name, a text of one line and a remedy, is said once in the life of a run, and stands in its
advisories.jsonl and result.json. `advise` says what a metrics.jsonl calls for; conf/advisories.yaml has the words.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np
import yaml

from skyrl.args import config_dir
from skyrl.types import Metrics

log = logging.getLogger(__name__)

EQUAL_STEPS = 5  # steps in a row without a group that can teach, before it is said
SILENT_STEPS = 3  # steps in a row without one verifier that worked, before a run that has had some stops
FEW, MANY = 10, 50  # steps whose means are compared: what changes fast, and the reward
SOLVED = 0.9  # accuracy of training episodes from which neither a plateau nor a low entropy is a fault


@dataclass(frozen=True)
class Advisory:
    """One thing said of a run: `step` is the one after which it was seen."""

    name: str
    step: int
    text: str
    remedy: str

    @property
    def line(self) -> str:
        """As the console shows it."""
        return f"advisory {self.name}: {self.text}; {self.remedy}"


@lru_cache
def rules() -> dict[str, dict[str, str]]:
    """Every rule by its name, in words: what it looks_at, the reason why that matters, the remedy."""
    return yaml.safe_load((config_dir() / "advisories.yaml").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


class History:
    """What rules compare: of each metric its first FEW and its last 2 * MANY values in RL, every evaluation, and facts
    that are no metrics (`stops`, `disk_free_gib`, `checkpoint_gib`). A resumed run makes it from its metrics.jsonl."""

    def __init__(self) -> None:
        self.first: dict[str, list[float]] = {}
        self.last: dict[str, deque[float]] = {}
        self.evaluations: list[tuple[int, float, float, float]] = []  # step, accuracy, episodes, training reward then
        self.facts: dict[str, Any] = {}
        self.step = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes the record of one finished step, in order."""
        self.step = int(record["step"])
        for key in METRICS if record["phase"] == "rl" and self.step else METRICS[:1]:
            if math.isfinite(value := record.get(key, math.nan)):
                self.last.setdefault(key, deque(maxlen=2 * MANY)).append(value)
                if len(first := self.first.setdefault(key, [])) < FEW:
                    first.append(value)
        if (accuracy := record.get("eval/accuracy:mean")) is not None:
            reward = self.mean("reward:mean", FEW)
            self.evaluations.append((self.step, accuracy, record.get("eval/episodes:sum", 1.0), reward))

    def values(self, key: str, count: int) -> list[float]:
        """The last `count` values of a metric; [] before there are so many."""
        found = self.last.get(key, ())
        return list(found)[-count:] if len(found) >= count else []

    def mean(self, key: str, count: int) -> float:
        """Their mean; NaN, which no comparison holds for, before there are so many."""
        values = self.values(key, count)
        return sum(values) / count if values else math.nan

    def start(self, key: str) -> float:
        """The mean of a metric's first FEW values; NaN before there are so many."""
        values = self.first.get(key, [])
        return sum(values) / FEW if len(values) == FEW else math.nan


METRICS = (  # the first one is looked at in supervised steps too
    "speed/mfu:mean reward:mean accuracy:mean entropy:mean logprob_gap:mean cut_by_length:mean episodes:sum "
    "sampler/preemptions:sum"
).split()


def _stalled(h: History) -> str:
    rewards, now = h.values("reward:mean", 2 * MANY), h.mean("reward:mean", MANY)
    if not rewards or 2 * now * MANY > sum(rewards) or h.mean("accuracy:mean", MANY) >= SOLVED:
        return ""
    return f"the mean reward of the last {MANY} steps ({now:.3g}) is no higher than that of the {MANY} before"


def _reward_collapse(h: History) -> str:
    rewards = list(h.last.get("reward:mean", ()))
    parts = [rewards[n : n + FEW] for n in range(len(rewards) - FEW + 1)]
    best, now = max(parts[:-FEW], key=sum, default=[]), parts[-1] if parts else []  # without a step in common
    most, mean = sum(best) / FEW, sum(now) / FEW
    noise = math.sqrt((np.var(best) + np.var(now)) / FEW) if best else math.inf
    collapsed = most - mean > max(0.5 * abs(most), 4 * noise)
    return f"the mean reward of {FEW} steps fell from {most:.3g} to {mean:.3g}" if collapsed else ""


def _entropy_collapse(h: History) -> str:
    now, first, rewards = h.mean("entropy:mean", FEW), h.start("entropy:mean"), h.values("reward:mean", 2 * FEW)
    rises = not rewards or sum(rewards[FEW:]) > sum(rewards[:FEW])
    if rises or not (now < 0.05 * first and h.mean("accuracy:mean", FEW) < SOLVED):
        return ""
    return f"the policy's entropy has fallen from {first:.3g} to {now:.3g} nats, and the reward rises no more"


def _gap_rising(h: History) -> str:
    now, first = h.mean("logprob_gap:mean", FEW), h.start("logprob_gap:mean")
    rises = now > max(3 * first, 0.02)
    return f"sampler and trainer differ by {now:.2g} nats a token, at first by {first:.2g}" if rises else ""


def _truncation(h: History) -> str:
    least = min(h.values("cut_by_length:mean", FEW), default=0.0)
    return f"in {FEW} steps in a row at least {least:.0%} of the episodes were cut" if least > 0.3 else ""


def _evaluation_falls(h: History) -> str:
    *before, last, now = h.evaluations if len(h.evaluations) > 2 else [(0, 0.0, 1.0, math.nan)] * 3
    step, best, episodes, reward = max(before, key=lambda one: one[1])
    least = best - max(0.03, 2 * math.sqrt(2 * best * (1 - best) / episodes)) if 0 <= best <= 1 else -math.inf
    rose = now[3] > (h.start("reward:mean") if math.isnan(reward) else reward)
    if not (rose and last[1] < least and now[1] < least):
        return ""
    return f"held-out accuracy fell from {best:.3f} (step {step}) to {now[1]:.3f}, while the training reward rose"


def _low_mfu(h: History) -> str:
    most = max(h.values("speed/mfu:mean", 2 * FEW), default=1.0)
    return f"at most {most:.1%} of the devices' peak was used in {2 * FEW} steps in a row" if most < 0.02 else ""


def _disk(h: History) -> str:
    free, need = h.facts.get("disk_free_gib", math.inf), h.facts.get("checkpoint_gib", 0.0)
    about = f"{free:.1f} GiB are free on the disk of the run folder, where a checkpoint takes {need:.2g}"
    return about if free < max(1.0, 2 * need) else ""


def _stopped_often(h: History) -> str:
    stops = h.facts.get("stops", [])[-3:]
    minutes = (stops[-1] - stops[0]) / 60 if len(stops) == 3 else math.inf
    return f"the run was stopped three times within {minutes:.0f} minutes" if minutes < 120 else ""


def _sequences_preempted(h: History) -> str:
    pairs = list(zip(h.values("episodes:sum", FEW), h.values("sampler/preemptions:sum", FEW), strict=False))
    often = bool(pairs) and all(preempted > 0.1 * episodes for episodes, preempted in pairs)
    return f"in {FEW} steps in a row more than a tenth of the sequences lost their cache" if often else ""


# Rules over the steps so far; each gives its text, "" while all is well. The others are in Advisories.look.
CHECKS = {
    "stalled": _stalled,
    "reward_collapse": _reward_collapse,
    "entropy_collapse": _entropy_collapse,
    "logprob_gap_rising": _gap_rising,
    "truncation_rate": _truncation,
    "reward_up_evaluation_down": _evaluation_falls,
    "low_mfu": _low_mfu,
    "disk_nearly_full": _disk,
    "preempted_too_often": _stopped_often,
    "sequences_preempted": _sequences_preempted,
}


def stop_times(stops: Iterable[Mapping[str, Any]]) -> list[float]:
    """Unix seconds of the stops (lines of stops.jsonl) that no person has asked for."""
    found = []
    for stop in stops:
        with contextlib.suppress(KeyError, ValueError):
            if stop["reason"] not in ("SIGINT", "stop file"):
                found.append(datetime.strptime(stop["at"], "%Y-%m-%dT%H:%M:%S%z").timestamp())
    return found


@dataclass
class Advisories:
    """What was said so far (name -> line), and how many steps in a row something has lasted. Part of a checkpoint."""

    said: dict[str, str] = field(default_factory=dict)
    lasted: dict[str, int] = field(default_factory=dict)

    def look(self, step: int, metrics: Metrics, *, of_groups: bool = True) -> list[Advisory]:
        """What a finished step of RL gives cause for by its episodes, whose metrics all ranks have: the same on all.

        `of_groups`: the advantage compares the samples of a group, so that equal rewards teach nothing."""
        episodes, invalid = metrics.get("episodes:sum", 0.0), metrics.get("invalid:sum", 0.0)
        if not episodes:
            return []
        if invalid < episodes:
            self.lasted["worked"] = 1
        groups, equal = metrics.get("filters/groups:sum", 0.0), metrics.get("filters/zero_variance_groups:sum", 0.0)
        mean, found = metrics.get("reward:mean", 0.0), {}
        if self._lasts("all_groups_equal", groups == equal and invalid < episodes) >= EQUAL_STEPS and of_groups:
            found["all_groups_equal"] = (
                f"in {EQUAL_STEPS} steps in a row all rewards of each group were equal (mean {mean:g}), so nothing is "
                "learned"
            )
        if metrics.get("cut_by_length:mean", 0.0) == 1.0:
            found["all_truncated"] = f"all {episodes:.0f} episodes of step {step} were truncated: none ended by itself"
        if self._lasts("all_invalid", invalid == episodes):
            found["all_invalid"] = f"all {episodes:.0f} episodes of step {step} are invalid: no verifier worked"
        return self._new(step, found)

    def look_back(self, history: History) -> list[Advisory]:
        """What the steps so far give cause for, after `history` has taken the last one. Rank 0 alone has the record."""
        return self._new(history.step, {name: check(history) for name, check in CHECKS.items()})

    def _lasts(self, name: str, is_so: bool) -> int:
        self.lasted[name] = self.lasted.get(name, 0) + 1 if is_so else 0
        return self.lasted[name]

    def _new(self, step: int, found: dict[str, str]) -> list[Advisory]:
        new = {name: text for name, text in found.items() if text and name not in self.said}
        told = [Advisory(name, step, text, rules()[name]["remedy"]) for name, text in new.items()]
        self.said |= {one.name: one.line for one in told}
        return told

    @property
    def hopeless(self) -> bool:
        """Whether verifiers fail for all episodes: from the first step on, or for SILENT_STEPS in a row."""
        return self.lasted.get("all_invalid", 0) >= (SILENT_STEPS if self.lasted.get("worked") else 1)


def advise(records: Iterable[Mapping[str, Any]], *, of_groups: bool = True) -> list[Advisory]:
    """What the records of a metrics.jsonl, in order, give cause for: what the run itself has said of them, but for what
    is no metric (its disk, its stops)."""
    state, history, found = Advisories(), History(), list[Advisory]()
    for record in records:
        history.add(record)
        found += state.look(history.step, dict(record), of_groups=of_groups) if record["phase"] == "rl" else []
        found += state.look_back(history)
    return found


@lru_cache(maxsize=1000)
def warn_fallback(line: str, every_rank: bool = False) -> None:
    """A warning in one line, with the reason, once in a process for each text; on ranks other than 0 for debugging
    only, since their devices are the same. `every_rank`: on all, with the rank's number: their memory is not."""
    rank = os.environ.get("RANK", "0")
    if every_rank and rank != "0":
        line = f"rank {rank}: {line}"
    log.log(logging.WARNING if every_rank or rank == "0" else logging.DEBUG, line)
