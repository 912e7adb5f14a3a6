"""One process for all golden runs, that has imported what takes long."""

import pytest
from starting import Starter


@pytest.fixture(scope="session")
def starter():
    """Starts command lines."""
    process = Starter()
    yield process
    process.close()
