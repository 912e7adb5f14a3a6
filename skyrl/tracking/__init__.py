"""Numbers and texts of a run, for people and programs; see docs/metrics.md for every key."""

from skyrl.tracking.base import Sink, Tracker, make_tracker

__all__ = ["Sink", "Tracker", "make_tracker"]
