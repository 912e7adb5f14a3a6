"""Tasks that bring what they need; importing this registers them. Imports without torch."""

from skyrl.tasks import code, feedback, games, math, search, sql, structured, support, tools

__all__ = ["code", "feedback", "games", "math", "search", "sql", "structured", "support", "tools"]
