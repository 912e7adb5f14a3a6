"""An advantage of your own: reward minus the median of the group, which one lucky sample does not move.

    python -m skyrl.train plugins=[examples.advantage] algorithm.advantage.name=median \
        algorithm.advantage.params.scale=2

An advantage is numpy in float64. `per_group` finds the groups and leaves out episodes whose reward failed and groups
whose rewards are all equal; `all_reduce_sum`, for statistics of the whole batch, must be called equally often on every
rank (here: never).
"""

from typing import Any

import numpy as np

from skyrl.api import Advantage, Advantages, Param, RewardRows, per_group

MEDIAN = Advantage("median", params={"scale": Param(1.0, "Multiplies every advantage")}, group=True)


@MEDIAN
def median(rows: RewardRows, all_reduce_sum: Any, *, scale: float) -> Advantages:
    """scale * (R - median of the group's R), the same for every sampled token of an episode."""
    return per_group(rows, lambda score_G: scale * (score_G - np.median(score_G)))
