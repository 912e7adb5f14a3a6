"""Running statistics of observations and returns, the same on all ranks, which are part of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

CLIP, EPS, PRIOR = 10.0, 1e-8, 1e-4  # of what is normalised; added to a variance; weight of a variance of 1
OFTEN = 64  # vector steps from which on statistics are taken up every so many, and before at 1, 2, 4, ...


class RunningMoments:
    """Count, mean and sum of squared deviations of all that `update` was given, on all ranks, in float64.

    Chan, Golub, LeVeque 1983: parts are joined by their means and deviations, which loses no digits where a plain sum
    of squares would.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.count, self.mean, self.squares = np.array(0.0), np.zeros(shape), np.zeros(shape)

    def update(self, values: np.ndarray, all_reduce_sum: Callable[[np.ndarray], np.ndarray]) -> None:
        """Takes up values [N, *shape] of this rank and those of the others. Two sums over ranks, whatever N is."""
        flat = values.reshape(len(values), -1).astype(np.float64)
        total = all_reduce_sum(np.append(flat.sum(0), len(flat)))
        count, mean = total[-1], total[:-1] / max(total[-1], 1.0)
        squares = all_reduce_sum(np.square(flat - mean).sum(0)).reshape(self.mean.shape)
        mean, both = mean.reshape(self.mean.shape), self.count + count
        gap, share = mean - self.mean, count / max(both, 1.0)
        self.squares = self.squares + squares + gap * gap * self.count * share
        self.mean, self.count = self.mean + gap * share, np.array(both)

    @property
    def std(self) -> np.ndarray:
        """The standard deviation of each number, of a population to which 1e-4 of a number with variance 1 belongs: 1
        before the first update."""
        return np.sqrt((self.squares + PRIOR) / (self.count + PRIOR) + EPS)

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """(values - mean) / std, held to [-10, 10], float64."""
        return np.clip((values - self.mean) / self.std, -CLIP, CLIP)

    def state(self) -> dict[str, np.ndarray]:
        """The three arrays, which `load` takes."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Takes back what `state` gave."""
        self.count, self.mean, self.squares = (np.array(state[key]) for key in ("count", "mean", "squares"))


def is_due(step: int) -> bool:
    """Whether statistics are taken up after the vector step `step`, counted from 1 over the whole run: at first often,
    since they are far off, then seldom, since ranks wait for each other."""
    return step % OFTEN == 0 or step < OFTEN and step & (step - 1) == 0


def discounted_sums(rewards_TN: np.ndarray, done_TN: np.ndarray, before_N: np.ndarray, gamma: float) -> np.ndarray:
    """G_t = gamma G_{t-1} + r_t of each environment, beginning at 0 in each episode, [T, N]; G before the first step is
    `before_N`. Their spread is what rewards are divided by (Engstrom et al. 2020, arXiv 2005.12729, section 3)."""
    sums, running = np.empty_like(rewards_TN), before_N
    for t, (reward, done) in enumerate(zip(rewards_TN, done_TN, strict=True)):
        sums[t] = running = gamma * running + reward
        running = np.where(done, 0.0, running)
    return sums
