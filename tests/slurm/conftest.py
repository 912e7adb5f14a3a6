"""These tests need the Slurm of cluster.sh: make test-slurm."""

import os

import pytest


def pytest_collection_modifyitems(items):
    here = os.path.dirname(__file__)
    ready = os.environ.get("SLURM_CONF") and os.environ.get("SKYRL_TEST_SLURM") == "1"
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.slurm)
            if not ready:
                item.add_marker(pytest.mark.skip(reason="needs a Slurm for tests: make test-slurm"))
