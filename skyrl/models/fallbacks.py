"""Says when a fast path is not taken: a slower run than expected should not be a secret."""

from __future__ import annotations

import logging
import os
from functools import lru_cache

log = logging.getLogger(__name__)


@lru_cache(maxsize=1000)
def warn_fallback(line: str) -> None:
    """A warning in one line, with the reason, once in a process for each text; on ranks other than 0 for debugging
    only, since their devices are the same."""
    log.log(logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.DEBUG, line)
