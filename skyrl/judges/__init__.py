"""Rewards that need more than a comparison; importing this registers them. No torch until a model scores."""

from skyrl.judges import claims, models, overlap, policy, rubric

__all__ = ["claims", "models", "overlap", "policy", "rubric"]
