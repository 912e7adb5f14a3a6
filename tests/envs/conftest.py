import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """Folder with GSM8K's train.jsonl and test.jsonl, or the test is skipped."""
    root = Path(os.environ.get("SKYRL_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data") / "gsm8k"
    if not (root / "train.jsonl").is_file() or not (root / "test.jsonl").is_file():
        pytest.skip("GSM8K not here: set SKYRL_TEST_DATA to the folder that holds gsm8k/train.jsonl and test.jsonl")
    return root
