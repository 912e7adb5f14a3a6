"""benchmarks/gpu_smoke.py comes to its end on a machine without a GPU, and says what it skipped and why."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/gpu_smoke.py"


@pytest.mark.slow
def test_it_runs_to_its_end_and_gives_each_check_a_verdict(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out.json"), "--size=toy", "--seconds=600"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["checks"]) == 14 and found["commit"]
    wrong = {name: check for name, check in found["checks"].items() if check["verdict"] not in ("ok", "skipped")}
    assert not wrong and all(check["verdict"] == "ok" or check["reason"] for check in found["checks"].values())
