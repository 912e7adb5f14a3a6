"""Checkpoints over ranks: written by 2, read by 1, 2 and 4; failures of one rank are everybody's."""

import pytest
import torch
from checkpoint_ranks import build, load, run, same, save, whole
from gloo import run_ranks

from skyrl.checkpoint.checkpointer import Checkpointer
from skyrl.checkpoint.folder import list_checkpoints


@pytest.mark.ranks
def test_saved_on_two_ranks_loaded_on_one_and_four(tmp_path):
    run_ranks(2, run, save, tmp_path)
    reference = torch.load(tmp_path / "reference.pt")
    _, tensors = build(None, seed=2, steps=1)
    saver = Checkpointer(
        tmp_path / "checkpoints", keep_last=0, keep_best=False, async_save=False, rank=0, world_size=1, group=None
    )
    assert not same(whole(tensors), reference)
    assert saver.load(tmp_path / "checkpoints" / "s1", tensors) == {"step": 1, "position": 11}
    assert same(whole(tensors), reference)
    run_ranks(4, run, load, tmp_path)
    _, tensors = build(None, seed=3, steps=1)
    saver.load(tmp_path / "checkpoints" / "from-4", tensors)
    assert same(whole(tensors), reference)
    assert [info.world_size for info in list_checkpoints(tmp_path / "checkpoints")] == [2, 2, 4]
