"""The imitation Hub and one server for all tests of the real clients."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from clients import NEWEST, Missing, release_path
from hub import MODEL, add_data, make_hub
from serving import Server, serve

# Whether clients that are not here may be downloaded: make test-tinker says so.
DOWNLOAD = os.environ.get("SKYRL_TEST_DOWNLOAD") == "1"


@pytest.fixture(scope="session")
def download() -> bool:
    return DOWNLOAD


@pytest.fixture(scope="session")
def newest(download: bool) -> None:
    """Skips before anything is started where not even the newest client can be had."""
    try:
        release_path(NEWEST, download=download)
    except Missing as why:
        pytest.skip(f"tinker {NEWEST}: {why}")


@pytest.fixture(scope="session")
def hub(newest: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working directory of the clients."""
    folder = make_hub(tmp_path_factory.mktemp("hub"))
    add_data(folder)
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, hub: Path) -> Iterator[Server]:
    """Two ranks that serve the hub's model under the name Qwen/Qwen3-8B."""
    with serve(tmp_path_factory.mktemp("server"), hub / MODEL, aliases=(MODEL,), tokenizer_id=MODEL) as running:
        yield running
