"""How many sequences run at once while several clients share the ranks."""

from skyrl.distributed.balance import RUNNING_PER_RANK, Pace


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
