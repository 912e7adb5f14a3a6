"""Checkpoints that the code before the restructuring saved are gone on from, with the same bits.

The folders in checkpoint/ are as a kill right after the checkpoint leaves them; the records beside them are what that
code computed when it went on.
"""

import shutil

import pytest
from commands import CHECKPOINTS
from reading import HERE, digest_differences, fingerprint, metric_differences, read_record, read_run


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_old_checkpoint_is_gone_on_from(starter, tmp_path, name):
    shutil.copytree(HERE / "checkpoint" / name, tmp_path / "run")
    starter.run("skyrl.train", *CHECKPOINTS[name].split(), folder=tmp_path)
    recorded, found = read_record(HERE / "checkpoint" / f"{name}.json"), read_run(tmp_path / "run")
    # Steps before the checkpoint were not played again, as they would be if it had been passed over.
    assert found["rollouts"].keys() == recorded["rollouts"].keys()
    exact = recorded["fingerprint"] == fingerprint()
    lines = metric_differences(recorded["metrics"], found["metrics"], exact=exact)
    if exact:
        lines += digest_differences(recorded["rollouts"], found["rollouts"], "rollouts of step")
        lines += digest_differences(recorded["weights"], found["weights"], "weights of")
    assert not lines, "\n".join([f"{len(lines)} differences from the recorded run", *lines[:40]])
    if not exact:
        pytest.skip("recorded on another machine: metrics agree to the tolerance, tokens and weights are not compared")
