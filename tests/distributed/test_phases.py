"""Where a rank is, what counts as progress, and how long it may stand still."""

import threading
import time

import numpy as np
import pytest
from gloo import run_ranks
from small import small_config

from skyrl.distributed import phases
from skyrl.distributed.collectives import all_reduce_sum
from skyrl.distributed.init import init_distributed
from skyrl.envs import clock


@pytest.fixture(autouse=True)
def fresh():
    phases.reset()


def watched(seconds=1.0):
    """Seconds without progress as another thread sees them while this one sleeps."""
    seen = []

    def look():
        until = time.monotonic() + seconds - 0.1
        while time.monotonic() < until:
            seen.append(phases.progress(clock.now())[0])
            time.sleep(0.05)

    thread = threading.Thread(target=look)
    thread.start()
    time.sleep(seconds)
    thread.join()
    return seen[-1]


def test_sleep_is_no_progress_and_a_beat_is():
    assert watched() > 0.5
    beats = threading.Thread(target=lambda: [(time.sleep(0.1), phases.heartbeat()) for _ in range(12)])
    beats.start()
    assert watched() < 0.4
    beats.join()


def test_patience_depends_on_the_phase():
    assert phases.timeout(10) == 100  # opening
    phases.enter("training", 1)
    assert phases.timeout(10) == 100  # for the first time
    phases.enter("generation", 1)
    phases.status.patience = 15
    assert phases.timeout(10) == 150
    phases.enter("training", 2)
    assert phases.timeout(10) == 10
    phases.status.longest["training"] = 20  # it has taken that long, and ended well
    assert phases.timeout(10) == 60
    phases.enter("generation", 2)
    assert phases.timeout(10) == 15
    phases.enter("saving", 2)
    assert phases.timeout(10) == 100


def test_a_phase_stays_when_things_go_wrong():
    phases.enter("between phases", 0)
    with phases.inside("generation", 3):
        pass
    assert phases.status.phase == "between phases"
    with pytest.raises(ValueError), phases.inside("training", 3):
        raise ValueError
    assert (phases.status.phase, phases.status.step) == ("training", 3)


def _waits():
    import torch
    import torch.distributed as dist

    world = init_distributed(small_config())
    seen = []

    def see():
        time.sleep(0.5)
        seen.append(phases.progress(clock.now())[1])

    for wait in (lambda: all_reduce_sum(world, np.ones(1)), lambda: dist.all_reduce(torch.ones(1))):
        thread = threading.Thread(target=see)
        thread.start()
        if world.rank == 1:
            time.sleep(1.0)
        wait()
        thread.join()
    return seen, phases.status.calls, "time.sleep(0.5)" not in phases.stacks()


@pytest.mark.ranks
def test_who_waits_in_a_collective_is_seen_from_the_stack():
    waiting, late = run_ranks(2, _waits)
    assert waiting[0] == ["all_reduce_sum", "all_reduce"] and late[0] == ["", ""]
    assert waiting[1] == late[1]
