"""Rules between options of how the policy is drawn from, held near a reference, and stepped. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from skyrl.config.schema import RunConfig


def cuts(cfg: RunConfig) -> Iterator[str]:
    """What a cut of the sampler (top-k, top-p, min-p) cannot be trained with."""
    for name, off, alone in (("top_k", 0, 1), ("top_p", 1.0, None), ("min_p", 0.0, 1.0)):
        value = getattr(cfg.sampler, name)
        if value == alone:
            yield f"sampler.{name}={value}: leaves one token to draw, so nothing is learned; give another, or {off}"
        if value != off and cfg.feedback.enabled:
            yield (
                f"sampler.{name}={value}: with feedback.enabled=true answers are drawn as clients ask, and "
                f"learned from where they are of the whole distribution; leave it at {off}"
            )
