"""Checkpoints over ranks: written by 2, read by 1, 2 and 4; failures of one rank are everybody's."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from skyrl.checkpoint.checkpointer import Checkpointer
from skyrl.checkpoint.folder import list_checkpoints

PROGRAM = Path(__file__).with_name("checkpoint_ranks.py")
SPEC = importlib.util.spec_from_file_location("checkpoint_ranks", PROGRAM)
ranks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ranks)
build, same, whole = ranks.build, ranks.same, ranks.whole


def launch(num_ranks, *args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    root = str(PROGRAM.parent.parent)
    done = subprocess.run(
        [*command, str(PROGRAM), *map(str, args)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.ranks
def test_saved_on_two_ranks_loaded_on_one_and_four(tmp_path):
    launch(2, "save", tmp_path)
    reference = torch.load(tmp_path / "reference.pt")
    _, tensors = build(None, seed=2, steps=1)
    saver = Checkpointer(
        tmp_path / "checkpoints", keep_last=0, keep_best=False, async_save=False, rank=0, world_size=1, group=None
    )
    assert not same(whole(tensors), reference)
    assert saver.load(tmp_path / "checkpoints" / "s1", tensors) == {"step": 1, "position": 11}
    assert same(whole(tensors), reference)
    launch(4, "load", tmp_path)
    _, tensors = build(None, seed=3, steps=1)
    saver.load(tmp_path / "checkpoints" / "from-4", tensors)
    assert same(whole(tensors), reference)
    assert [info.world_size for info in list_checkpoints(tmp_path / "checkpoints")] == [2, 2, 4]
