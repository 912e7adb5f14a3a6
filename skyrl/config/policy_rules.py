"""Rules between options of how the policy is drawn from, held near a reference, and stepped. No torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

from skyrl.config.schema import RunConfig
from skyrl.types import UserError

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
    "optim.momentum": (lambda cfg: cfg.optim.name == "muon", "with optim.name=muon"),
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


def several(cfg: RunConfig) -> Iterator[str]:
    """What several references cannot be had with."""
    models, kl = cfg.algorithm.reference.models, cfg.algorithm.kl
    for path, weight in models.items():
        if not 0 < weight <= 1:
            yield f"algorithm.reference.models: {path}: {weight}: must be above 0 and at most 1"
    if sum(models.values()) > 1 + 1e-9:
        yield (
            f"algorithm.reference.models={dict(models)}: the weights are above 1 together; the reference that the run "
            "makes has what is left of 1"
        )
    if models and kl.placement == "loss" and kl.estimator not in ("k2", "k1+"):
        yield (
            f"algorithm.kl.estimator={kl.estimator}: with algorithm.reference.models only k2 and k1+ have the gradient "
            "of the weighted sum of their KLs; use one of them, or algorithm.kl.placement=reward"
        )


def imitation(cfg: RunConfig) -> Iterator[str]:
    """What self-imitation cannot do."""
    given = cfg.algorithm.self_imitation
    if given.coef > 0 and given.rows_per_step > given.size:
        yield (
            f"algorithm.self_imitation.rows_per_step={given.rows_per_step}: above "
            f"algorithm.self_imitation.size={given.size}, the answers that are kept; lower it"
        )


def routers(cfg: RunConfig) -> Iterator[str]:
    """What the options for a mixture's routers cannot be had with."""
    given = cfg.algorithm.router
    for wanted, option in ((given.replay, "replay=true"), (given.aux_coef > 0, f"aux_coef={given.aux_coef}")):
        for broken, what in ((not cfg.batch.packing, "batch.packing=false"), (cfg.model.compile, "model.compile=true")):
            if wanted and broken:
                yield f"algorithm.router.{option}: cannot be had with {what}; leave one of them out"


def check_packages(cfg: RunConfig) -> None:
    """Raises UserError for a package that the optimizer needs and this machine lacks. Imports none."""
    if cfg.optim.name == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "optim.name=adamw8bit: bitsandbytes is not installed; install the extra with pip install "
            "'skyrl-spmd[bitsandbytes]', or use optim.name=adamw"
        )


def optimizers(cfg: RunConfig) -> Iterator[str]:
    """What an optimizer other than AdamW cannot step."""
    name, strategy, lora = cfg.optim.name, cfg.strategy.name, cfg.model.lora.rank
    if name == "adamw":
        return
    if lora:
        yield f"optim.name={name}: with model.lora.rank={lora} adapters are stepped by AdamW; use optim.name=adamw"
    if name == "muon" and strategy.startswith("zero"):
        yield (
            f"optim.name=muon: strategy.name={strategy} steps flat parts of matrices, and Muon needs whole ones; use "
            "strategy.name=fsdp, which shards as much as zero3"
        )
    if name == "adamw8bit" and strategy not in ("auto", "single", "ddp"):
        yield (
            f"optim.name=adamw8bit: strategy.name={strategy} has its masters in shards, which "
            "bitsandbytes cannot step; use auto or ddp, or optim.name=adamw"
        )
    if name == "adamw8bit" and cfg.model.dtype == "float64":
        yield "optim.name=adamw8bit: bitsandbytes has no float64 (model.dtype); use optim.name=adamw"


def greedy(cfg: RunConfig) -> Iterator[str]:
    """What an advantage with a greedy answer as its baseline (ReMax) cannot be had with."""
    name = cfg.algorithm.advantage.name
    if cfg.feedback.enabled:
        yield (
            f"algorithm.advantage.name={name}: needs a greedy answer to each prompt, which nobody rates with "
            "feedback.enabled=true; use reinforce++"
        )
    if cfg.algorithm.objectives.normalise:
        yield (
            f"algorithm.advantage.name={name}: its baseline is one reward, and algorithm.objectives.normalise=true "
            "looks at each objective by itself; use algorithm.advantage.name=grpo, or leave it at false"
        )
