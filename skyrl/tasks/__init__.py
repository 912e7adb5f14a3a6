"""The built-in tasks; importing this registers them. Imports without torch."""

from skyrl.tasks import (
    arithmetic,
    code,
    datasets,
    expressions,
    feedback,
    games,
    gsm8k,
    guess_number,
    math,
    reasoning_gym,
    search,
    sql,
    structured,
    support,
    tools,
)

__all__ = [
    "arithmetic",
    "code",
    "datasets",
    "expressions",
    "feedback",
    "games",
    "gsm8k",
    "guess_number",
    "math",
    "reasoning_gym",
    "search",
    "sql",
    "structured",
    "support",
    "tools",
]
