"""The environment of a run that learns from its users alone (feedback.enabled): it has nothing to play."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skyrl.config.schema import DataConfig
from skyrl.envs.base import Environment, Split, register_environment
from skyrl.envs.data_files import NoHeldOut
from skyrl.envs.single_turn import no_files
from skyrl.types import Prompt


@register_environment("feedback")
class LiveUsers(Environment):
    """No prompts of its own: users ask, and POST /feedback says what their answers were worth. With another
    environment a run learns from its users as well, and is evaluated on that environment's held-out prompts."""

    @classmethod
    def dataset(cls, options: dict[str, Any], data: DataConfig, split: Split, seed: int) -> Sequence[Prompt]:
        """One prompt that is never played, and none held out."""
        no_files("feedback", data)
        if split == "test":
            raise NoHeldOut("env.name=feedback has no held-out prompts", "set eval.every_steps=0, or name another env")
        return [Prompt("user", "feedback", [{"role": "user", "content": "?"}])]
