"""A rank's place from Slurm's variables, as a real Slurm 22.05 sets them."""

import pytest

from skyrl.distributed import env as slurm_env
from skyrl.distributed.env import job_port
from skyrl.types import UserError

BATCH = {
    "SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "3", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_TASKS_PER_NODE": "2,1",
}  # fmt: skip
STEP = {
    **BATCH, "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_PROCID": "2",
    "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "localhost,node[0-1]",
}  # fmt: skip


def test_a_task_of_a_step_gets_its_place():
    env = dict(STEP)
    assert slurm_env.from_slurm(env)
    assert {name: env[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")} == {
        "RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "1",
    }  # fmt: skip
    assert env["MASTER_ADDR"] == "localhost" and env["MASTER_PORT"] == str(job_port(41, 2))


def test_the_batch_script_is_no_task_though_it_has_a_rank():
    env = dict(BATCH)
    assert not slurm_env.from_slurm(env) and env == BATCH
    assert slurm_env.in_allocation(BATCH) and not slurm_env.in_allocation(STEP) and slurm_env.in_step(STEP)


@pytest.mark.parametrize("more", [{"RANK": "5"}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_torchrun_and_single_tasks_are_left_alone(more):
    env = {**STEP, **more}
    assert not slurm_env.from_slurm(env) and env == {**STEP, **more}


def test_what_the_batch_script_has_chosen_stays():
    env = {**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "20007"}
    assert slurm_env.from_slurm(env) and (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("10.0.0.1", "20007")


def test_a_task_that_sees_one_gpu_of_its_own_uses_that():
    more = {"SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_NODEID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    alone, all_gpus = {**STEP, **more, "CUDA_VISIBLE_DEVICES": "1"}, {**STEP, **more, "CUDA_VISIBLE_DEVICES": "0,1"}
    slurm_env.from_slurm(alone), slurm_env.from_slurm(all_gpus)
    assert (alone["LOCAL_RANK"], all_gpus["LOCAL_RANK"]) == ("0", "1") and alone["LOCAL_WORLD_SIZE"] == "2"


def test_slurms_notation():
    assert slurm_env.tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(UserError, match="not as Slurm writes it"):
        slurm_env.tasks_per_node("two")
    hosts = {"node[03-5,7],other": "node03", "a1,b2": "a1", "gpu-[1,3]-x": "gpu-1-x", "lone": "lone"}
    assert {text: slurm_env.first_host(text) for text in hosts} == hosts


def test_a_first_node_without_an_address_is_told(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        slurm_env.from_slurm({**STEP, "SLURM_STEP_NODELIST": "no-such-host-in-tests"})
