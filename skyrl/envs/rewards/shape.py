"""Rewards for how a text is written, whatever it says: pieces to add up. Penalties are 0 at best and -1 at worst."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from skyrl.envs.rewards.base import register_reward
from skyrl.types import Prompt, UserError

_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|(?=<tool_call>)|\Z)|</tool_call>", re.DOTALL)


@register_reward("length", rate="off_target")
def length(text: str, prompt: Prompt, *, target: int, tolerance: int = 0) -> float:
    """Minus how far the text's length is from `target`, as a part of it; both in characters. 0 within `tolerance`."""
    if target <= 0 or tolerance < 0:
        raise UserError(f"reward length: target={target} must be above 0, tolerance={tolerance} at least 0")
    return -min(1.0, max(0, abs(len(text) - target) - tolerance) / target)


@register_reward("overlong", rate="overlong")
def overlong(text: str, prompt: Prompt, *, limit: int, margin: int = 0) -> float:
    """0 up to limit - margin characters, then linearly down to -1 at `limit`; the soft punishment of DAPO (arXiv
    2503.14476, section 3.4, equation 13), in characters."""
    if not 0 <= margin <= limit:
        raise UserError(f"reward overlong: margin={margin} must be between 0 and limit={limit}")
    over = len(text) - (limit - margin)
    return -min(1.0, over / margin if margin else 1.0) if over > 0 else 0.0


@register_reward("repetition", rate="repeats")
def repetition(text: str, prompt: Prompt, *, n: int = 3, characters: bool = False) -> float:
    """Minus the part of the text's runs of `n` words (or characters) that were there before."""
    if n < 1:
        raise UserError(f"reward repetition: n={n} must be at least 1")
    runs = list(_runs(text, n, characters))
    return len(set(runs)) / len(runs) - 1.0 if runs else 0.0


@register_reward("tags", rate="well_formed")
def tags(text: str, prompt: Prompt, *, names: list[str] | None = None, pattern: str = "") -> float:
    """1.0 when the text is <name>...</name> for each of `names` (think, answer), once, in order, only space between, or
    with a `pattern` when that regular expression matches the whole text; else 0.0."""
    if pattern:
        return float(re.fullmatch(pattern, text, re.DOTALL) is not None)
    names = names or ["think", "answer"]
    wanted = r"\s*".join(rf"<{re.escape(name)}>.*?</{re.escape(name)}>" for name in names)
    once = all(text.count(f"<{name}>") == text.count(f"</{name}>") == 1 for name in names)
    return float(once and re.fullmatch(rf"\s*{wanted}\s*", text, re.DOTALL) is not None)


@register_reward("tool_calls", rate="malformed_tool_calls")
def tool_calls(text: str, prompt: Prompt) -> float:
    """Minus the part of the text's tool calls that are malformed; 0 without any.

    A call is <tool_call>{"name": ..., "arguments": {...}}</tool_call>. Where the prompt's row has "tools" (as chat
    templates take them), it must name one of them, with all arguments that are required and no unknown one.
    """
    given = [tool.get("function", tool) for tool in prompt.extra.get("tools") or ()]
    known = {tool["name"]: tool.get("parameters") or {} for tool in given} if given else None
    right = [_well_formed(call[1], call[2], known) for call in _CALL.finditer(text)]
    return sum(right) / len(right) - 1.0 if right else 0.0


def _well_formed(body: str | None, end: str | None, known: dict[str, dict[str, Any]] | None) -> bool:
    try:
        call = json.loads(body or "")
    except (ValueError, RecursionError):
        return False
    if not (end and isinstance(call, dict) and isinstance(call.get("name"), str)):
        return False
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict) or known is None:
        return isinstance(arguments, dict)
    if call["name"] not in known:
        return False
    schema = known[call["name"]]
    allowed = schema.get("properties", arguments)
    return set(schema.get("required", ())) <= arguments.keys() <= set(allowed)


@register_reward("diversity", group=True, objectives=["diversity"])
def diversity(texts: Sequence[str], prompt: Prompt, *, n: int = 1, characters: bool = False) -> list[float]:
    """For each sample of a prompt, 1 minus the mean overlap (Jaccard) of its runs of `n` words (or characters) with
    those of each other sample: 0 where all are the same, 1 where it shares nothing."""
    runs = [set(_runs(text, n, characters)) for text in texts]
    others = max(1, len(runs) - 1)
    shared = [[len(a & b) / len(a | b) if a | b else 1.0 for b in runs] for a in runs]  # 1 with itself
    return [1.0 - (math.fsum(row) - 1.0) / others for row in shared]


def _runs(text: str, n: int, characters: bool) -> Iterator[tuple[str, ...]]:
    parts = list(text) if characters else re.findall(r"\w+|[^\w\s]", text)
    return zip(*(parts[i:] for i in range(n)), strict=False)
