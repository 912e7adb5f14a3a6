"""Tasks that bring what they need; importing this registers them. Imports without torch."""

from skyrl.tasks import code

__all__ = ["code"]
