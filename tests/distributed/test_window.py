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
