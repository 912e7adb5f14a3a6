"""run.window: open and closed times of the day, over midnight too."""

import time
from datetime import datetime, timedelta

import pytest

from skyrl.config.load import load_config
from skyrl.config.run_rules import closed_until, read_window
from skyrl.config.schema import RunFolderConfig
from skyrl.config.validation import check
from skyrl.distributed.stop import save_by
from skyrl.types import UserError


def options(window, margin=120.0, **more):
    return RunFolderConfig(window=window, save_margin_seconds=margin, **more)


@pytest.mark.parametrize(
    ("window", "now", "opens"),
    [
        ("22:00-06:00", "21:59:59", "22:00:00"),
        ("22:00-06:00", "22:00:00", None),
        ("22:00-06:00", "23:30:00", None),
        ("22:00-06:00", "00:00:00", None),
        ("22:00-06:00", "05:57:59", None),
        ("22:00-06:00", "05:58:00", "22:00:00"),  # what is left is kept for saving
        ("22:00-06:00", "12:00:00", "22:00:00"),
        ("09:00-17:30", "08:00:00", "09:00:00"),
        ("09:00-17:30", "17:29:00", "+1 09:00:00"),
        ("9:00-17:30:30", "17:28:29", None),
        ("00:00-23:59", "12:00:00", None),
        ("20:00-00:00", "23:00:00", None),
        ("20:00-00:00", "00:00:00", "20:00:00"),
    ],
)
def test_open_and_closed(window, now, opens):
    moment = datetime.fromisoformat(f"2026-06-10T{now}")
    found = closed_until(options(window), moment)
    if opens is None:
        assert found is None
    else:
        days, _, clock = opens.rpartition(" ")
        assert found == datetime.fromisoformat(f"2026-06-10T{clock}") + timedelta(days=int(days or 0))
    seen = read_window(options(window), moment)
    assert seen.ends_in - 120 > seen.begins_in >= 0


@pytest.mark.parametrize(
    "text", ["22-6", "22:00", "25:00-06:00", "22:00-24:00", "22:61-06:00", "22:00 - 06:00", "never"]
)
def test_what_is_no_window_is_refused_before_a_run_starts(text):
    with pytest.raises(UserError, match=f"run.window={text}: give two times of the day"):
        check(load_config([f"run.window='{text}'"]))


@pytest.mark.parametrize("text", ["22:00-22:00", "22:00-22:02"])
def test_a_window_that_never_opens_is_refused(text):
    with pytest.raises(UserError, match="it never has time to work"):
        check(load_config([f"run.window='{text}'"]))


def test_the_end_of_the_window_is_a_deadline_unless_an_earlier_one_is_there():
    now = datetime.now()
    text = f"{now - timedelta(seconds=60):%H:%M:%S}-{now + timedelta(seconds=600):%H:%M:%S}"
    assert save_by(options(text), {}) - time.monotonic() == pytest.approx(480, abs=2)
    assert save_by(options(text, must_save_by="+300"), {}) - time.monotonic() == pytest.approx(180, abs=2)
    assert save_by(options(text, must_save_by="+900"), {}) - time.monotonic() == pytest.approx(480, abs=2)
    assert save_by(options(text, must_save_by="never"), {}) - time.monotonic() == pytest.approx(480, abs=2)


@pytest.fixture
def berlin(monkeypatch):
    """Summer time begins on 29 March 2026 at 2:00 and ends on 25 October at 3:00."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("window", "now", "opens", "hours"),
    [
        ("22:00-06:00", "2026-03-28T23:00", None, 6),  # by the clock 7, of which one is left out
        ("22:00-06:00", "2026-10-24T23:00", None, 8),
        ("05:00-06:00", "2026-03-28T12:00", "2026-03-29T05:00", 17),
        ("05:00-06:00", "2026-10-24T12:00", "2026-10-25T05:00", 19),
        ("02:10-02:50", "2026-03-28T12:00", "2026-03-29T03:10", 15 - 1 / 6),  # times that there are not, an hour later
        ("02:00-03:00", "2026-03-28T12:00", "2026-03-30T02:00", 38),  # a night without that hour
        ("02:10-02:50", "2026-10-25T01:00", "2026-10-25T02:10", 2 - 1 / 6),  # the first of the two
    ],
)
def test_both_ends_go_by_the_clock_when_it_is_put_forward_or_back(berlin, window, now, opens, hours):
    moment = datetime.fromisoformat(now)
    assert closed_until(options(window), moment) == (opens and datetime.fromisoformat(opens))
    assert read_window(options(window), moment).ends_in == pytest.approx(hours * 3600)


def test_a_run_that_meets_a_closed_window_stops_at_once():
    """The window has closed between the look whether a run may begin and this one: its end is not tomorrow's."""
    now = datetime.now()
    text = f"{now + timedelta(hours=1):%H:%M:%S}-{now + timedelta(hours=2):%H:%M:%S}"
    assert save_by(options(text), {}) - time.monotonic() == pytest.approx(0, abs=2)
