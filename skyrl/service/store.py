"""What the service remembers over restarts: sessions, runs, samplers, futures, checkpoints.

The methods are in the files store_sessions, store_runs (runs and futures) and store_checkpoints; store_db is the SQLite
below them and records what they return. What touches rows and folders both is store_sync.
"""

from __future__ import annotations

from skyrl.service.store_runs import Runs
from skyrl.service.store_sessions import Sessions


class Store(Sessions, Runs):
    """Store(path): one SQLite file. Thread-safe; transactions are short. Every getter takes the owner who asks, and
    another owner's thing is NotFound, except what is published.

    Raises: UserError, one line, for what a person can mend: the disk, the file, a value out of range.
    """
