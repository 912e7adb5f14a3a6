"""Options of the trainers beside RL (`trainer=...`), and the rules between them. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from skyrl.config.schema_server import PathStr

if TYPE_CHECKING:
    from skyrl.config.schema import RunConfig

NO_REWARD = ("chat", "preference")  # environments whose rows are learned from as they are
CHOICES = {
    "trainer": ("rl", "sft", "dpo", "reward_model", "distill", "control"),
    "control.vectorization": ("sync", "async"),
    "control.preprocess": ("none", "atari"),
    "preference.loss": ("dpo", "ipo", "simpo", "orpo", "kto"),
}
# Path or group -> (where it has an effect, what that is in words), as in validation.py.
APPLIES: dict[str, tuple[Callable[[RunConfig], bool], str]] = {
    "preference": (lambda cfg: cfg.trainer == "dpo", "with trainer=dpo"),
    "preference.label_smoothing": (
        lambda cfg: cfg.preference.loss in ("dpo", "simpo"),
        "with preference.loss=dpo or simpo",
    ),
    "preference.gamma": (lambda cfg: cfg.preference.loss == "simpo", "with preference.loss=simpo"),
    **dict.fromkeys(
        ("preference.desirable_weight", "preference.undesirable_weight"),
        (lambda cfg: cfg.preference.loss == "kto", "with preference.loss=kto"),
    ),
    "reward_model": (lambda cfg: cfg.trainer == "reward_model", "with trainer=reward_model"),
    "distill": (lambda cfg: cfg.trainer == "distill", "with trainer=distill"),
    "control": (lambda cfg: cfg.trainer == "control", "with trainer=control"),
    "control.frame_size": (lambda cfg: cfg.control.preprocess == "atari", "with control.preprocess=atari"),
}


@dataclass(frozen=True)
class PreferenceConfig:
    """Learning from pairs of answers, or from answers that were liked or not (trainer=dpo)."""

    loss: str = "dpo"
    """dpo, ipo, simpo, orpo (pairs), or kto (pairs, or rows with completion and label)."""
    beta: float = 0.1
    """Pull to the reference (dpo, ipo's tau, kto), scale of the margin (simpo: 2 to 2.5 in its paper) or weight of the
    odds ratio (orpo)."""
    label_smoothing: float = 0.0
    """Probability, below 0.5, that a pair is the wrong way round (dpo, simpo); 0 = none."""
    gamma: float = 0.5
    """Margin that the chosen answer is to have, in units of beta times log-probability per token (simpo)."""
    desirable_weight: float = 1.0
    """Weight of answers that were liked (kto)."""
    undesirable_weight: float = 1.0
    """Weight of those that were not (kto); where these are few, more."""


@dataclass(frozen=True)
class RewardModelConfig:
    """Training of a reward model on pairs (trainer=reward_model)."""

    center_coef: float = 0.0
    """Weight of the squared sum of a pair's rewards, which keeps them around 0; 0 = off, 0.01 is usual."""


@dataclass(frozen=True)
class DistillConfig:
    """Learning the distribution of a teacher with the same tokenizer (trainer=distill)."""

    teacher: PathStr = ""
    """The frozen teacher: a folder in Hugging Face format or a hub name."""
    on_policy: float = 1.0
    """Part of the steps whose answers the student draws itself (GKD's lambda); the others learn on solutions of
    data."""
    beta: float = 1.0
    """Between KL(teacher || student), 0, and KL(student || teacher), 1: the generalised Jensen-Shannon divergence."""
    teacher_top_k: int = 0
    """The teacher's likeliest tokens that are told apart, the rest counting as one; 0 = the whole vocabulary."""


def control_options(overrides: Sequence[str]) -> list[str]:
    """What was typed for skyrl.control, with env=<id> as control.env_id; without a recipe that of the same name."""
    found = [f"control.env_id={one[4:]}" if one.startswith("env=") else one for one in overrides]
    return found if any(one.startswith("experiment=") for one in found) else ["experiment=control", *found]


def with_control_steps(cfg: RunConfig) -> RunConfig:
    """`cfg` with the steps of the loop that control.total_steps are; of another trainer itself."""
    if cfg.trainer != "control":
        return cfg
    steps = -(-cfg.control.total_steps // max(1, cfg.control.n_envs * cfg.control.n_steps))
    return replace(cfg, batch=replace(cfg.batch, num_steps=max(1, steps)))


def problems(cfg: RunConfig) -> Iterator[str]:
    """A line for each rule between the options of trainers that `cfg` breaks."""
    trainer, lora = cfg.trainer, cfg.model.lora.rank
    if trainer == "rl" and cfg.env.name in NO_REWARD and not cfg.feedback.enabled:
        right = "sft" if cfg.env.name == "chat" else "dpo or reward_model"
        yield f"env.name={cfg.env.name}: its rows are to be learned and give no reward; set trainer={right}"
    if not cfg.preference.beta > 0:
        yield f"preference.beta={cfg.preference.beta:g}: must be above 0"
    for name in ("on_policy", "beta"):
        if not 0 <= (value := getattr(cfg.distill, name)) <= 1:
            yield f"distill.{name}={value:g}: must lie between 0 and 1"
    if not cfg.preference.label_smoothing < 0.5:
        yield (
            f"preference.label_smoothing={cfg.preference.label_smoothing:g}: must be below 0.5, where a pair says "
            "nothing any more"
        )
    if trainer == "reward_model" and (lora or cfg.warmup.num_steps):
        what = f"model.lora.rank={lora}" if lora else f"warmup.num_steps={cfg.warmup.num_steps}"
        yield f"{what}: trainer=reward_model trains all weights, with a head that says no tokens; leave it at 0"
    given = cfg.preference
    if trainer == "dpo" and not (given.desirable_weight or given.undesirable_weight):
        yield "preference.desirable_weight=0: preference.undesirable_weight is 0 too, so nothing is learned; raise one"
    if trainer == "sft" and not (cfg.warmup.num_steps or cfg.data.epochs):
        yield "warmup.num_steps=0: supervised training needs at least 1 step, or data.epochs"
    if trainer == "dpo" and cfg.preference.loss == "kto" and cfg.batch.prompts_per_step < 2:
        yield (
            f"batch.prompts_per_step={cfg.batch.prompts_per_step}: preference.loss=kto pairs each prompt with the "
            "answer to another one of the step, to estimate the KL; give at least 2"
        )
    if trainer == "distill" and not cfg.distill.teacher:
        yield "distill.teacher: no teacher is named; give a folder in Hugging Face format or a hub name"
