"""Reinforcement learning for language models: one program on every process, no controller."""

import importlib
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what skyrl.api has is here too, and is imported when it is first asked for
    from skyrl.api import *  # noqa: F403

try:
    __version__ = version("skyrl-spmd")  # of the tag from which it was installed; pyproject.toml, tool.hatch.version
except PackageNotFoundError:  # a checkout that is on the path and was never installed
    __version__ = "0.0.0"


# Written out, since a name that is looked up here while modules are being imported must not import skyrl.api.
_LAZY = frozenset(
    "Advantage Advantages BatchReward Environment Episode Hook Loss Message Metrics Param Policy Prompt RetryableError "
    "RewardRows SkyRLTrainer StepResult UserError Wrapper evaluate per_group register_advantage register_environment "
    "register_filter register_loss register_policy register_reward register_wrapper".split()
)


def __getattr__(name: str) -> Any:
    """What skyrl.api has, but for its function `train`: skyrl.train is the module."""
    if name not in _LAZY:
        raise AttributeError(f"module 'skyrl' has no attribute {name!r}")
    return getattr(importlib.import_module("skyrl.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


def _warn_of_namesakes() -> None:
    """PyPI's skyrl and skyrl-tx are the Ray-based SkyRL, whose files lie under the same import name as ours."""
    for other in ("skyrl", "skyrl-tx"):
        try:
            found = version(other)
        except PackageNotFoundError:
            continue
        print(
            f"skyrl: another project's package {other} {found} is installed in this environment and has the same "
            f"import name; one may run the other's code: pip uninstall {other}, or give each an environment of its own",
            file=sys.stderr,
        )


if os.environ.get("RANK", "0") == "0":
    _warn_of_namesakes()
