"""Rewards that need more than a comparison; importing this registers them. No torch until a model scores."""

from skyrl.judges import policy, rubric

__all__ = ["policy", "rubric"]
