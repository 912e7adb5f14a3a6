"""Options of how the policy is stepped, what it is held near to, and what it learns from besides. See schema.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = "adamw"
    """adamw; muon (Muon for the matrices of hidden layers, AdamW for all else); adamw8bit (AdamW with moments in 8
    bits, by bitsandbytes; single or ddp)."""
    momentum: float = 0.95
    """muon: decay of the mean of a matrix's gradients."""

    lr: float = 1e-5
    """Peak learning rate."""
    schedule: str = "constant"
    """constant, linear or cosine decay to lr * final_lr_ratio over batch.num_steps. It goes by steps of the loop: all
    updates of a step have one rate, and an update that is skipped for want of tokens shifts nothing."""
    warmup_steps: int = 0
    """Steps of linear increase from 0."""
    final_lr_ratio: float = 0.1
    """Where linear and cosine end, as a part of lr."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of their squares."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled, per unit of learning rate."""
    grad_clip_norm: float = 1.0
    """Largest norm of the whole gradient; 0 = no clipping."""


@dataclass(frozen=True)
class ReferenceConfig:
    """The reference that algorithm.kl measures to, where it is not one model that stays what it was at first."""

    sync_every: int = 0
    """Steps after which it takes the policy's weights over; 0 = never."""
    ema: float = 0.0
    """What it keeps of its own weights then: ema * reference + (1 - ema) * policy. 0 = a copy of the policy."""
    models: dict[str, float] = field(default_factory=dict)
    """Further frozen references with the same tokenizer, each with its weight, 'models={path: 0.5}'; the reference
    above has what is left of 1. KL is then the weighted sum of theirs, with estimator k2 or k1+, or in the reward."""


@dataclass(frozen=True)
class RouterConfig:
    """The routers of a mixture of experts."""

    replay: bool = False
    """Trained rows go to the experts that the sampler's routers chose (rollout routing replay): rounding then cannot
    send a token another way in training. The reference keeps its own choices."""
    aux_coef: float = 0.0
    """Weight of a loss that evens out the use of experts within each row (DeepSeek-V3's); 0 = off."""


@dataclass(frozen=True)
class SelfImitationConfig:
    """Supervised learning on the policy's own successes, added to each of its updates."""

    coef: float = 0.0
    """Weight of the mean negative log-probability of their tokens; 0 = off."""
    min_reward: float = 0.0
    """A success has a reward above this."""
    size: int = 256
    """Prompts whose best answer is kept; the one that was found first goes first."""
    rows_per_step: int = 32
    """Answers that one update learns from, over all ranks, drawn anew each time."""


@dataclass(frozen=True)
class ObjectivesConfig:
    """How rewards that are named objectives ({"accuracy": 1.0, "safety": 0.5}) become one."""

    weights: dict[str, float] = field(default_factory=dict)
    """Factor of each objective in the sum; one that is not named here counts 1, or 0 if it has a constraint."""
    normalise: bool = False
    """Estimates the advantage of each objective by itself, then sums by weight and whitens over the batch (GDPO, arXiv
    2601.05242): an objective's range does not decide how much it counts."""
    constraints: dict[str, Any] = field(default_factory=dict)
    """Bounds on means, for example {safety: {min: 0.95, step: 0.1}}: min or max, the step by which the multiplier moves
    per unit beyond the bound (0.1), and where it starts (start, 0)."""
