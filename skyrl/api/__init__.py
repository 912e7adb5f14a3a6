"""What a user's script or plugin imports. Imports without torch."""

from pathlib import Path
from typing import Any

from skyrl.algorithms.advantages import Advantages, RewardRows, per_group
from skyrl.algorithms.declare import Advantage, Loss, Param
from skyrl.algorithms.filters import register_filter
from skyrl.api.trainer import SkyRLTrainer
from skyrl.envs.base import Environment, RetryableError, StepResult, register_environment
from skyrl.envs.rewards.base import register_reward
from skyrl.envs.wrappers import Wrapper, register_wrapper
from skyrl.hub.policies import Policy, register_policy
from skyrl.judges.batch import BatchReward
from skyrl.tracking.hooks import Hook
from skyrl.types import Episode, Message, Metrics, Prompt, UserError

__all__ = [
    "Advantage",
    "Advantages",
    "BatchReward",
    "Environment",
    "Episode",
    "Hook",
    "Loss",
    "Message",
    "Metrics",
    "Param",
    "Policy",
    "Prompt",
    "RewardRows",
    "RetryableError",
    "SkyRLTrainer",
    "StepResult",
    "UserError",
    "Wrapper",
    "evaluate",
    "per_group",
    "register_advantage",
    "register_environment",
    "register_filter",
    "register_loss",
    "register_policy",
    "register_reward",
    "register_wrapper",
    "train",
]


def register_loss(name: str, **declared: Any) -> Loss:
    """Decorator: declares a loss, as `Loss(name, ...)` does, and registers the function as algorithm.loss.name=<name>.

    Raises UserError for a name that is taken and for parameters that the function does not take.
    """
    return Loss(name, **declared)


def register_advantage(name: str, **declared: Any) -> Advantage:
    """The same as `register_loss` for an advantage, algorithm.advantage.name=<name>."""
    return Advantage(name, **declared)


def train(*options: str) -> Path:
    """Runs `python -m skyrl.train` with these options in this program, on every rank that calls it.

    Returns the run's folder. Raises UserError for what a person can fix, RunError for a run that cannot go on, and
    StopRun, when all is saved, after a signal or at a deadline.
    """
    from skyrl.config.load import load_config
    from skyrl.main import set_torch_defaults
    from skyrl.sweep import play

    set_torch_defaults()
    cfg = load_config(options)
    play(cfg, "train", sweep=False)
    return Path(cfg.run.dir)


def evaluate(*options: str) -> Metrics:
    """Runs `python -m skyrl.evaluate` with these options in this program. Collective.

    Returns the metrics whose names begin with "eval/", the same on every rank; results and rollouts lie in the run's
    folder. Raises as `train` does.
    """
    from skyrl.config.load import load_config
    from skyrl.main import set_torch_defaults
    from skyrl.run_dir import final_values
    from skyrl.sweep import play

    set_torch_defaults()
    cfg = load_config(options, mode="evaluate")
    play(cfg, "evaluate", sweep=False)
    found = final_values(Path(cfg.run.dir) / "metrics.jsonl")
    return {name: value for name, value in found.items() if name.startswith("eval/")}
