"""Rules between options of how the policy is drawn from, held near a reference, and stepped. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from skyrl.config.schema import RunConfig

# As validation.APPLIES: where an option has an effect, and what that is in words.
APPLIES: dict[str, tuple[Callable[[RunConfig], bool], str]] = {
    "algorithm.reference": (lambda cfg: cfg.algorithm.kl.coef > 0, "with algorithm.kl.coef above 0"),
    "algorithm.reference.ema": (
        lambda cfg: cfg.algorithm.reference.sync_every > 0,
        "with algorithm.reference.sync_every above 0",
    ),
    "algorithm.self_imitation": (
        lambda cfg: cfg.algorithm.self_imitation.coef > 0,
        "with algorithm.self_imitation.coef above 0",
    ),
    "optim.final_lr_ratio": (
        lambda cfg: cfg.optim.schedule != "constant" or cfg.warmup.schedule in ("linear", "cosine"),
        "with optim.schedule=linear or cosine, or warmup.schedule",
    ),
}


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


def references(cfg: RunConfig) -> Iterator[str]:
    """What a reference that moves cannot be had with."""
    every, lora = cfg.algorithm.reference.sync_every, cfg.model.lora.rank
    if every and lora:
        yield (
            f"algorithm.reference.sync_every={every}: with model.lora.rank={lora} the reference is the frozen model "
            "under the adapter, which nothing may change; leave it out, or train all weights (model.lora.rank=0)"
        )
    if every >= cfg.batch.num_steps:
        yield (
            f"algorithm.reference.sync_every={every}: the reference would never be used in its new form within "
            f"batch.num_steps={cfg.batch.num_steps}; lower it"
        )


def imitation(cfg: RunConfig) -> Iterator[str]:
    """What self-imitation cannot do."""
    given = cfg.algorithm.self_imitation
    if given.coef > 0 and given.rows_per_step > given.size:
        yield (
            f"algorithm.self_imitation.rows_per_step={given.rows_per_step}: above "
            f"algorithm.self_imitation.size={given.size}, the answers that are kept; lower it"
        )
