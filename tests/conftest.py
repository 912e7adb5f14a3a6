"""What tests of several folders share."""

from collections.abc import Iterator

import pytest
from launcher import Warm


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Forks ranks of command lines without paying for imports."""
    process = Warm()
    yield process
    process.close()
