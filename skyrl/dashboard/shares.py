"""Links that show one run to whoever has them: read-only, for some hours, or until they are taken back.

A link is a signed token that names an entry of links.json, and counts only while the entry does. The key of the
signatures is kept too, so links outlive a restart of the server; sessions do not.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from skyrl.files import write_atomic
from skyrl.web.auth import Signer

MAX_HOURS = 24 * 90
MAX_LINKS = 1000


@dataclass(frozen=True)
class ShareLink:
    """A link to one run, which ends at `expires` (Unix seconds)."""

    id: str
    run: str
    made_by: str
    expires: float


class ShareLinks:
    """The links of one folder of runs, in `folder`/links.json, which several servers may share."""

    def __init__(self, folder: Path, signer: Signer) -> None:
        self._path, self._signer = folder / "links.json", signer

    def make(self, run: str, hours: float, made_by: str) -> tuple[ShareLink, str]:
        """(a new link to `run`, its token). Raises ValueError for too many hours or links."""
        if not 0 < hours <= MAX_HOURS:
            raise ValueError(f"hours: give more than 0 and at most {MAX_HOURS}")
        link = ShareLink(secrets.token_hex(8), run, made_by, time.time() + hours * 3600)
        with self._changing() as links:
            if len(links) >= MAX_LINKS:
                raise ValueError(f"there are {MAX_LINKS} links already; revoke some first")
            links.append(link)
        return link, self._signer.token(f"link:{link.id}", seconds=max(1, int(hours * 3600)))

    def open(self, token: str) -> ShareLink | None:
        """The link that a token was made for, while it lasts; else None."""
        kind, _, name = (self._signer.token_owner(token) or "").partition(":")
        return self.get(name) if kind == "link" else None

    def get(self, name: str) -> ShareLink | None:
        """The link of this id, while it lasts; else None."""
        return next((link for link in self.active() if link.id == name), None)

    def revoke(self, name: str) -> bool:
        """Takes a link back at once, with every session that it opened. False where there is none of this id."""
        with self._changing() as links:
            kept = [link for link in links if link.id != name]
            found = len(kept) < len(links)
            links[:] = kept
        return found

    def active(self) -> list[ShareLink]:
        """All that still open their run, oldest first. None where the file is damaged."""
        try:
            links = [ShareLink(**one) for one in json.loads(self._path.read_text(encoding="utf-8"))]
        except (FileNotFoundError, ValueError, TypeError):
            return []
        return [link for link in links if time.time() < link.expires]

    @contextlib.contextmanager
    def _changing(self) -> Iterator[list[ShareLink]]:
        with open(self._path.with_name("links.lock"), "w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            links = self.active()
            yield links
            write_atomic(self._path, json.dumps([asdict(link) for link in links], indent=1) + "\n")
