"""A finished run that tests may copy."""

import shutil
from pathlib import Path

import pytest
from launcher import LETTERS


@pytest.fixture(scope="session")
def whole(warm, tmp_path_factory) -> Path:
    """The folder of a deterministic, uninterrupted run of 2 ranks with all its checkpoints. Read only."""
    place = tmp_path_factory.mktemp("whole")
    done = warm.run(*LETTERS, "run.dir=run", cwd=place, ranks=2)
    assert done.code == 0 and done.stderr == "", done.stderr
    return place / "run"


@pytest.fixture
def cut(whole, tmp_path):
    """cut(tag): a copy of that run in the test's folder, as a kill after checkpoint `tag` would leave it."""

    def copy(tag: str, name: str = "run") -> Path:
        shutil.copytree(whole, tmp_path / name)
        for checkpoint in (tmp_path / name / "checkpoints").iterdir():
            if checkpoint.name > tag:
                shutil.rmtree(checkpoint)
        return tmp_path / name

    return copy
