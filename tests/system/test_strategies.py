"""Real command lines under every kind of layout: resume from one to the other, accelerate as the launcher."""

import importlib.util
import shutil
import sys

import pytest
from launcher import LETTERS, _finish, free_port
from test_survival import close, played, records

from skyrl.planner.device import torch_release

pytestmark = pytest.mark.ranks
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
ZERO3, HSDP = ["strategy.name=zero3"], ["strategy.name=hsdp", "strategy.shard_size=2"]


def resumed(warm, run, ranks, options, at):
    done = warm.run(*LETTERS, "run.dir=run", *options, cwd=run.parent, ranks=ranks)
    assert done.code == 0 and f"resuming from run/checkpoints/{at}" in done.stdout, done.stderr
    assert done.stderr == ""


@needs_deepspeed
def test_a_run_of_ddp_goes_on_under_zero3_and_then_hsdp(warm, whole, cut, tmp_path):
    run = cut("000006")
    resumed(warm, run, 2, [*ZERO3, "strategy.offload=all"], "000006")
    close(records(run), records(whole))
    for later in ("000009", "000010"):
        shutil.rmtree(run / "checkpoints" / later, ignore_errors=True)
    if torch_release() < (2, 8):  # on a CPU it has no hsdp
        return
    resumed(warm, run, 4, HSDP, "000008")
    close(records(run), records(whole))
    for tag in ("000009", "000010"):
        assert played(run, tag) == played(whole, tag)


def accelerate(*options: str, cwd, launch: str):
    """`accelerate launch <launch> -m skyrl.train <options>`, two processes on CPUs."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), "--num_processes=2"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}"]
    return _finish([*command, "-m", "skyrl.train", *options], cwd, 120, {})


@needs_deepspeed
def test_accelerate_launch_is_as_good_as_torchrun(whole, tmp_path):
    """--multi_gpu is accelerate's word for torchrun; strategy.device says where. What its flags say of plugins and
    precision is not heard: the run's options are."""
    done = accelerate(*LETTERS, *ZERO3, "strategy.device=cpu", "run.dir=run", cwd=tmp_path, launch="--multi_gpu")
    assert done.code == 0 and not done.errors, done.stderr
    close(records(tmp_path / "run"), records(whole), tolerance=2e-5)  # ten updates; after five it is within 1e-5


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("launch", ["--multi_gpu", "--use_deepspeed --zero_stage=2", "--use_fsdp --fsdp_version=2"])
@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2"])
def test_what_accelerate_was_told_does_not_change_the_run(whole, tmp_path, launch, name):
    options = [f"strategy.name={name}", "strategy.device=cpu", "run.dir=run"]
    done = accelerate(*LETTERS, *options, cwd=tmp_path, launch=launch)
    assert done.code == 0 and not done.errors, done.stderr
    # ten updates at a learning rate of 1e-2 make much of rounding; zero2 is 2e-5 off, however it is launched
    close(records(tmp_path / "run"), records(whole), tolerance=5e-5)


def test_a_layout_that_does_not_fit_the_ranks_starts_nothing(warm, tmp_path):
    done = warm.run(*LETTERS, "strategy.name=hsdp", "strategy.shard_size=3", "run.dir=run", cwd=tmp_path, ranks=2)
    assert done.code != 0 and len(done.errors) == 1
    assert "strategy.shard_size=3: does not divide the 2 ranks" in done.errors[0] and not (tmp_path / "run").exists()
