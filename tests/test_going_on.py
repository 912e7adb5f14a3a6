"""A run that goes on: what it reads must be what it began with. A run that begins with another's weights."""

import json

import pytest
from loop import run_loop

from skyrl.checkpoint.folder import latest
from skyrl.run_dir import FINGERPRINT, RESULT, changed_facts, keep_fingerprint
from skyrl.types import UserError


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of one step."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    return run_loop(folder, "batch.num_steps=1")


def test_edited_code_and_data_are_named_and_refused_until_allowed(begun):
    path = begun.folder / FINGERPRINT
    facts = json.loads(path.read_text())
    assert facts["data.train"].split()[1] == "prompts," and "code.lowercase" in facts
    edited = {**facts, "code.lowercase": "0" * 12, "data.train": "3 prompts, abc", "versions.torch": "1.0"}
    path.write_text(json.dumps(edited))
    kept = {name: (begun.folder / name).read_text() for name in ("config.yaml", "versions.json")}
    with pytest.raises(UserError) as refused:
        run_loop(begun.folder, "batch.num_steps=2")
    assert "has changed since its last start: code.lowercase, data.train; to go on" in str(refused.value)
    assert "run.allow_different=[code.lowercase,data.train]" in str(refused.value)
    assert json.loads(path.read_text()) == edited  # refused again by the same command
    assert kept == {name: (begun.folder / name).read_text() for name in kept}, "of a start that did not happen"
    assert not (begun.folder / "config.1.yaml").exists()
    again = run_loop(begun.folder, "batch.num_steps=1", "run.allow_different=[code.lowercase,data]")
    assert json.loads(path.read_text())["data.train"] == facts["data.train"] and len(again.records) == 2


def test_a_run_that_no_verifier_worked_for_goes_on_with_what_was_mended(begun):
    path, result = begun.folder / FINGERPRINT, begun.folder / RESULT
    facts = json.loads(path.read_text())
    result.write_text(json.dumps({"state": "stopped", "notices": {"all_invalid": "no verifier worked"}}))
    path.write_text(json.dumps({**facts, "code.lowercase": "0" * 12}))
    run_loop(begun.folder, "batch.num_steps=1")
    assert json.loads(path.read_text()) == facts and not result.exists()  # the next edit is asked about again


def test_what_is_changed_and_whose_it_is(tmp_path):
    assert changed_facts(tmp_path, {"data.train": "1"}) == ([], [])
    keep_fingerprint(tmp_path, {"data.train": "1", "code.mine": "2", "code.skyrl/a.py": "3", "versions.torch": "4"})
    now = {"data.train": "1", "code.later": "9", "code.skyrl/a.py": "5", "versions.torch": "6", "data.test": "7"}
    assert changed_facts(tmp_path, now) == (["data.test"], ["code.skyrl/a.py", "versions.torch"])


@pytest.mark.parametrize("optimizer", [True, False])
def test_another_runs_weights_begin_a_new_run(begun, tmp_path, optimizer):
    parent = latest(begun.folder / "checkpoints")
    more = [f"run.resume={begun.folder}", "optim.lr=1e-3", f"run.resume_optimizer={optimizer}"]
    seen = run_loop(tmp_path / "child", *more)
    assert [(r["phase"], r["step"]) for r in seen.records] == [("rl", 0), ("rl", 1), ("rl", 2)]
    before, after = begun.records[-1]["eval/reward:mean"], seen.records[0]["eval/reward:mean"]
    assert before == after  # the weights are the parent's
    child = latest(tmp_path / "child" / "checkpoints")
    assert child.state["parent"] == str(parent.path) and child.state["global_step"] == 2
    run_loop(tmp_path / "child", *more)  # the same command finds the child's own checkpoint
    assert latest(tmp_path / "child" / "checkpoints").sequence == child.sequence
