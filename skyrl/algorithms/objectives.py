"""Named objectives to one reward: weights, and multipliers that hold those with a bound to it. Plain numbers, no torch.

    reward = sum over objectives k of (weight_k + direction_k * multiplier_k) * r_k

direction is 1 for a bound from below ("min"), -1 for one from above ("max"), and the multiplier that of the Lagrangian
of "the most reward with every bound kept": it rises while the mean of an objective breaks its bound and falls, to 0 at
least, while there is room. A bound's own constant is left out: it is equal for all episodes, so no baseline sees it.

What is summed up over the steps alone would swing around the bound without end, as a policy that learns does with a
multiplier that answers late; a part in proportion to what the last step was beyond the bound damps that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from skyrl.types import UserError

STEP = 0.1
"""Default of a constraint's `step`: how far the multiplier moves for a mean that is 1 beyond the bound."""
DAMPING = 5.0
"""The part in proportion, in steps."""
Constraints = Mapping[str, Mapping[str, float]]


class Objectives:
    """The weights in force. Multipliers are the same on every rank and for every number of ranks, since they go by
    means that are rounded once (math.fsum), whatever the order.

    An objective with a bound has the weight 0 unless it is given one, any other 1.
    Source: Stooke et al. 2020 (PID Lagrangian), arXiv 2007.03964, algorithm 2, without its derivative; for language
    models Dai et al. 2024 (Safe RLHF), arXiv 2310.12773.
    """

    def __init__(self, weights: Mapping[str, float] = {}, constraints: Constraints = {}) -> None:  # noqa: B006
        self.weights, self.constraints = weights, constraints
        self.sums = {name: float(one.get("start", 0.0)) for name, one in constraints.items()}
        self.multipliers = dict(self.sums)
        self.names: list[str] = []  # those that the batch under way has, on all ranks
        self.measured: dict[str, list[float]] = {}

    def weight(self, name: str, *, constrained: bool = True) -> float:
        """The factor of an objective; with constrained=False without its multiplier."""
        weight = self.weights.get(name, 0.0 if name in self.constraints else 1.0)
        if constrained and name in self.constraints:
            weight += self.multipliers[name] * (1.0 if "min" in self.constraints[name] else -1.0)
        return weight

    def combine(self, given: Mapping[str, float], *, constrained: bool = True) -> tuple[float, float]:
        """(The reward that these objectives make together; its scale, see variance.py.)"""
        parts = [self.weight(name, constrained=constrained) * value for name, value in given.items()]
        return math.fsum(parts), math.fsum(map(abs, parts))

    def check(self, names: Iterable[str], where: str) -> None:
        """Raises UserError for a weight or constraint of an objective that there is not; `where` says whose."""
        known = sorted(set(names))
        for path, given in (("weights", self.weights), ("constraints", self.constraints)):
            for name in given:
                if name not in known:
                    there = f"its objectives are: {', '.join(known)}" if known else "its rewards are plain numbers"
                    raise UserError(f"algorithm.objectives.{path}.{name}: {where} has no such objective; {there}")

    def update(self) -> None:
        """Moves the multipliers after a step, by what was `measured` in it: of each objective, the sum of every episode
        of all ranks that has a score, in any order. One without any leaves its multiplier alone."""
        for name, one in self.constraints.items():
            if found := self.measured.get(name):
                mean = math.fsum(found) / len(found)
                beyond = one["min"] - mean if "min" in one else mean - one["max"]
                step = float(one.get("step", STEP))
                self.sums[name] = max(0.0, self.sums[name] + step * beyond)
                self.multipliers[name] = max(0.0, self.sums[name] + DAMPING * step * beyond)

    def state_dict(self) -> dict[str, list[float]]:
        """What a checkpoint keeps: of each constraint the multiplier and its sum over the steps."""
        return {name: [self.multipliers[name], self.sums[name]] for name in self.constraints}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Takes back what `state_dict` gave; of constraints that are no more nothing."""
        for name in state.keys() & self.constraints.keys():
            self.multipliers[name], self.sums[name] = state[name]
