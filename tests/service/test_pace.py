"""How many sequences run at once while several clients share the ranks."""

from skyrl.distributed.balance import RUNNING_PER_RANK, Pace
from skyrl.envs import clock


def measured(step_seconds) -> Pace:
    """After as many steps as it takes to find the room, in which a step of n takes step_seconds(n)."""
    pace = Pace()
    for _ in range(20):
        for load in (1, 2, 5, pace.room()):
            pace.note(load, step_seconds(load))
    return pace


def test_where_steps_cost_the_same_whatever_their_size_all_room_is_used():
    assert measured(lambda load: 0.01).room() >= RUNNING_PER_RANK - 1


def test_where_steps_grow_with_their_size_few_run():
    """A step of 16 takes 1.5 times as long as one of few; nothing is learnt from a few slow ones."""
    pace = measured(lambda load: 0.01 * (1 + load / 30))
    assert 7 <= pace.room() <= 15
    pace.note(7, 1.0)
    for _ in range(30):
        pace.note(7, 0.01)
    assert 7 <= pace.room() <= 15


def test_room_is_found_step_by_step():
    pace = Pace()
    assert pace.room() == 7
    for load in (3, 7):
        pace.note(load, 0.01)
    assert pace.room() == 15
    pace.note(15, 0.1)
    assert pace.room() == 7


def test_what_was_slow_once_is_tried_again(monkeypatch):
    """A number of sequences that is too slow is not run, so nothing else would correct what a stall made of it; and
    where all steps have become slower, those of a few are measured anew."""
    now = 0.0
    monkeypatch.setattr(clock, "now", lambda: now)

    def room_after(*seconds: float, stall: int = 0) -> int:
        """Room after a slow step of so many sequences (0 = none), and a while in which each step takes seconds[-1]."""
        nonlocal now
        pace = Pace()
        for load in (1, 5, 9, 17):
            pace.note(load, 1.0 if load == stall else seconds[0])
        for _ in range(2000):
            now += 0.03
            pace.note(pace.room() // 2 + 2, seconds[-1])
        return pace.room()

    assert room_after(0.01) == room_after(0.01, stall=5) == room_after(0.01, stall=17) == RUNNING_PER_RANK - 1
    assert room_after(0.003, 0.01) == RUNNING_PER_RANK - 1


def test_what_is_slow_is_seldom_tried(monkeypatch):
    now, tried = 0.0, 0
    monkeypatch.setattr(clock, "now", lambda: now)
    pace = measured(lambda load: 0.01 * (1 + load / 30))
    for _ in range(2000):
        now += 0.03
        tried += pace.room() > 15
        pace.note(pace.room(), 0.01 * (1 + pace.room() / 30))
    assert 1 <= tried <= 5
