"""A sandbox for code that models write: `run_code`, `Sandbox`, `python -m skyrl.sandbox run FILE`. Without torch."""

from skyrl.sandbox.api import (
    LEVELS,
    Level,
    Limits,
    Sandbox,
    SandboxError,
    SandboxResult,
    Status,
    default_sandbox,
    run_code,
)
from skyrl.sandbox.plain import to_text

__all__ = [
    "LEVELS",
    "Level",
    "Limits",
    "Sandbox",
    "SandboxError",
    "SandboxResult",
    "Status",
    "default_sandbox",
    "run_code",
    "to_text",
]
