"""What a run says of itself when it cannot learn: by name, in one line, once."""

from skyrl.algorithms.advantages import ADVANTAGES
from skyrl.tracking.notices import EQUAL_STEPS, SILENT_STEPS, Notices


def step(episodes=8, invalid=0, equal=0, cut=0.25):
    return {
        "episodes:sum": float(episodes),
        "invalid:sum": float(invalid),
        "cut_by_length:mean": cut,
        "filters/groups:sum": 4.0,
        "filters/zero_variance_groups:sum": float(equal),
        "reward:mean": 0.0,
    }


def said(metrics, state=None):
    notices = state or Notices()
    return [line.split(":")[0] for number, one in enumerate(metrics, 1) for line in notices.look(number, one)]


def test_equal_groups_are_told_once_and_only_in_a_row():
    assert said([step(equal=4)] * (EQUAL_STEPS - 1) + [step(equal=3)] + [step(equal=4)] * (EQUAL_STEPS - 1)) == []
    assert said([step(equal=4)] * 3 * EQUAL_STEPS) == ["notice all_groups_equal"]
    critic = Notices()  # whose advantages are not of groups
    assert [line for n in range(9) for line in critic.look(n, step(equal=4), of_groups=False)] == []
    assert said([step()] * 9) == [] and said([{"loss:sum": 1.0}]) == []


def test_the_advantage_itself_says_whether_it_compares_the_samples_of_a_group():
    groups = {one.name for one in ADVANTAGES.things() if one.group}
    assert {"grpo", "dr_grpo", "rloo"} <= groups and not groups & {"gae", "reinforce++"}


def test_all_truncated_and_all_invalid_are_told_once():
    assert said([step(cut=1.0)] * 3) == ["notice all_truncated"]
    assert said([step(), step(invalid=8, equal=4), step(), step(invalid=8, equal=4)]) == ["notice all_invalid"]


def test_verifiers_that_never_work_end_the_run_and_an_outage_of_a_step_does_not():
    fresh = Notices()
    fresh.look(1, step(invalid=8, equal=4))
    assert fresh.hopeless
    worked = Notices()
    for number, one in enumerate([step(), step(invalid=8), step(), *[step(invalid=8)] * (SILENT_STEPS - 1)]):
        worked.look(number, one)
        assert not worked.hopeless
    worked.look(9, step(invalid=8))
    assert worked.hopeless
    again = Notices(dict(worked.said), {**worked.lasted, "all_invalid": 0})  # as a checkpoint gives it back
    assert said([step(invalid=8)], again) == []
