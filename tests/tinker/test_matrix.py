"""A whole session of each of twelve Tinker releases against one server of two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from clients import NEWEST, RELEASES, Missing, drive
from facts import problems
from hub import MODEL
from serving import Server


def session_of(release: str, server: Server, hub: Path, download: bool) -> None:
    try:
        facts = drive(release, server.url, hub, download=download, base_model=MODEL)
    except Missing as why:
        pytest.skip(f"tinker {release}: {why}")
    assert facts["release"]["release"] == release
    wrong = problems(facts, MODEL)
    assert not wrong, "\n".join(f"{step}: {what}" for step, what in wrong.items()) + "\n" + facts["log"][-3000:]
    assert server.alive()


@pytest.mark.tinker
@pytest.mark.timeout(600)
@pytest.mark.parametrize("release", RELEASES)
def test_release(release: str, server: Server, hub: Path, download: bool) -> None:
    session_of(release, server, hub, download)


@pytest.mark.ranks
def test_newest_release(server: Server, hub: Path) -> None:
    """In `make test`, where the client is here already; nothing is downloaded."""
    session_of(NEWEST, server, hub, download=False)
