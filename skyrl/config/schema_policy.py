"""Options of how the policy is stepped, what it is held near to, and what it learns from besides. See schema.py."""

from __future__ import annotations

from dataclasses import dataclass, field


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
