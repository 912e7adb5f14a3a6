"""Tests here play tasks as well."""

import skyrl.tasks  # noqa: F401
