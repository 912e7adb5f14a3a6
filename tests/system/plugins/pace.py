"""Makes a phase long, tells the test when a rank is in it, and goes wrong there when told to.

SKYRL_PACE is <phase>:<step>:<what>, what = seconds to sleep at the phase's own place, or a way to go wrong; on rank
SKYRL_PACE_RANK alone where that is given.
"""

import os
import time
from pathlib import Path

import numpy as np

import skyrl.checkpoint.checkpointer
import skyrl.distributed.init
import skyrl.engine
import skyrl.sampler.sampler
from skyrl.distributed import phases
from skyrl.distributed.collectives import all_reduce_sum

PHASE, STEP, WHAT = (os.environ.get("SKYRL_PACE", "") + "::").split(":")[:3]
RANK = os.environ.get("RANK", "0")
MINE = os.environ.get("SKYRL_PACE_RANK", RANK) == RANK


def tarry(name: str = "") -> None:
    status = phases.status
    if MINE and (name == PHASE or (status.phase == PHASE and str(status.step) == STEP)):  # saves run beside the loop
        Path(f"in-{RANK}").write_text(PHASE)
        if WHAT == "hang":
            time.sleep(3600)
        if WHAT == "raise":
            raise AssertionError("something nobody thought of")
        if WHAT == "memory":
            raise MemoryError("no more")
        if WHAT == "apart":
            all_reduce_sum(skyrl.distributed.init._world, np.zeros(1))
        time.sleep(float(WHAT or 0))


def before(owner, name, phase=""):
    real = getattr(owner, name)

    def slow(*args, **kwargs):
        tarry(phase)
        return real(*args, **kwargs)

    setattr(owner, name, slow)


if PHASE:
    before(skyrl.engine.Engine, "create")
    before(skyrl.engine.Engine, "forward_backward")
    before(skyrl.sampler.sampler.Sampler, "step")
    before(skyrl.checkpoint.checkpointer, "publish", "saving")
