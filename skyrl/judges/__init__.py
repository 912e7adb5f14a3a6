"""Rewards that need more than a comparison; importing this registers them. No torch until a model scores."""

from skyrl.judges import models, policy, rubric

__all__ = ["models", "policy", "rubric"]
