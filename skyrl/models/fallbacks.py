"""Says when a fast path is not taken: a slower run than expected should not be a secret."""

from __future__ import annotations

import logging
import os
from functools import lru_cache

log = logging.getLogger(__name__)


@lru_cache(maxsize=1000)
def warn_fallback(line: str, every_rank: bool = False) -> None:
    """A warning in one line, with the reason, once in a process for each text; on ranks other than 0 for debugging
    only, since their devices are the same. `every_rank`: on all, with the rank's number: their memory is not."""
    rank = os.environ.get("RANK", "0")
    if every_rank and rank != "0":
        line = f"rank {rank}: {line}"
    log.log(logging.WARNING if every_rank or rank == "0" else logging.DEBUG, line)
