"""A process's place from what its launcher sets: a real Slurm 22.05, Open MPI, MPICH, torchrun, and leftovers."""

import os

import pytest

from skyrl.distributed import place
from skyrl.distributed.network import job_port
from skyrl.launch.rank import bind_cpus
from skyrl.types import UserError

BATCH = {
    "SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "3", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "localhost,node[0-1]", "SLURM_TASKS_PER_NODE": "2,1",
}  # fmt: skip
STEP = {
    **BATCH, "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_PROCID": "2",
    "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "localhost,node[0-1]",
}  # fmt: skip
# The shell of salloc with use_interactive_step, and the one of srun --pty bash, which says the same of a real step.
SALLOC = {**BATCH, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PTY_PORT": "33715"}
PTY = {**STEP, "SLURM_PROCID": "0", "SLURM_PTY_PORT": "40837", "SLURM_TASK_PID": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-host-77@1",
}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def taken(environment):
    env = dict(environment)
    assert place.take_place(env)
    return tuple(env[name] for name in NAMES), env["MASTER_ADDR"], int(env["MASTER_PORT"])


def refused(environment):
    env = dict(environment)
    with pytest.raises(UserError) as error:
        place.take_place(env)
    assert env == environment and "\n" not in str(error.value)
    return str(error.value)


def test_a_task_of_a_step_gets_its_place():
    assert taken(STEP) == (("2", "3", "0", "1"), "localhost", job_port(41, 2))


def test_a_name_left_by_torchrun_is_no_place():
    assert taken({**STEP, "TORCHELASTIC_RUN_ID": "stale"})[0] == ("2", "3", "0", "1")


def test_a_place_that_a_script_has_set_in_part_is_completed():
    assert taken({**STEP, "RANK": "2", "WORLD_SIZE": "3"})[0] == ("2", "3", "0", "1")
    assert taken({**STEP, "RANK": "", "WORLD_SIZE": ""})[0] == ("2", "3", "0", "1")
    assert taken({**OPEN_MPI, "RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "h"})[:2] == (("3", "4", "3", "4"), "h")


def test_a_place_on_a_machine_that_another_shell_has_left_is_none():
    env = {"LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "x", "HOME": "/"}
    assert not place.take_place(env) and env == {"HOME": "/"}


def test_a_process_of_mpirun_gets_its_place():
    ranks, address, port = taken(OPEN_MPI)
    assert (ranks, address) == (("3", "4", "3", "4"), "127.0.0.1") and port == taken(OPEN_MPI)[2]
    assert port != taken({**OPEN_MPI, "PMIX_NAMESPACE": "prterun-host-78@1"})[2]
    assert taken(MPICH)[:2] == (("1", "2", "1", "2"), "127.0.0.1")
    jsrun = {f"JSM_NAMESPACE_{name}": value for name, value in zip(NAMES, "1212", strict=True)}
    jsrun |= {"JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_LOCAL_SIZE": "2"}
    assert taken(jsrun)[0] == ("1", "2", "1", "2")


def test_ranks_of_mpirun_inherit_the_step_of_its_daemons():
    env = {**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", **OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
           "OMPI_COMM_WORLD_LOCAL_RANK": "1"}  # fmt: skip
    assert taken({**env, "MASTER_ADDR": "h", "MASTER_PORT": "5"})[:2] == (("3", "4", "1", "2"), "h")
    pmi2 = {**STEP, "PMI_RANK": "2", "PMI_SIZE": "3"}  # srun --mpi=pmi2 says the same twice
    assert taken(pmi2)[0] == ("2", "3", "0", "1")


def test_several_machines_need_a_place_to_meet():
    two = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    assert "nothing says where they meet; set MASTER_ADDR" in refused(two)
    assert taken({**two, "MASTER_ADDR": "h", "MASTER_PORT": "5"})[1:] == ("h", 5)
    assert "does not say its place on this machine" in refused({"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "2"})
    assert "does not say its place on this machine" in refused({"PMI_RANK": "0", "PMI_SIZE": "2"})


@pytest.mark.parametrize(
    "environment",
    [
        {},
        BATCH,
        SALLOC,
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {**STEP, "RANK": "5", "WORLD_SIZE": "6", "TORCHELASTIC_RUN_ID": "x"},
        {**STEP, "RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0"},  # a script that has copied Slurm's own
        {"RANK": "", "WORLD_SIZE": ""},
        {**BATCH, "RANK": ""},
        {"PMI_RANK": "1", "PMI_SIZE": "2", "RANK": "1", "WORLD_SIZE": "2"},  # what only the script knows: its machine
        {**STEP, "RANK": "5", "WORLD_SIZE": "6"},  # a launcher of its own in each task
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"RANK": "0"},
        {"WORLD_SIZE": "1"},
        {"PMIX_RANK": "0", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},  # mpirun -n 1
        {"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"},  # srun --mpi=pmix
        {"PMIX_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"},  # a script that gives each its own
        {"PMIX_RANK": "1", "RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"},  # torchrun in each
    ],
)
def test_what_is_right_is_left_alone(environment):
    env = dict(environment)
    assert not place.take_place(env) and env == environment


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({**STEP, "RANK": "0", "WORLD_SIZE": "1"}, "RANK=0 WORLD_SIZE=1: this process is rank 2 of 3 of srun, so 3"),
        ({**STEP, "RANK": "0", "WORLD_SIZE": "3"}, "ranks would be there twice; unset RANK and WORLD_SIZE"),
        ({**STEP, "WORLD_SIZE": "3"}, "WORLD_SIZE=3: not the place of a rank"),
        ({**STEP, "RANK": "0"}, "RANK=0: not the place of a rank"),
        ({**OPEN_MPI, "RANK": "0", "WORLD_SIZE": "1"}, "rank 3 of 4 of Open MPI, so 4 ranks would not know"),
        ({**MPICH, "RANK": "0", "WORLD_SIZE": "2"}, "ranks would be there twice"),
        ({**STEP, "WORLD_SIZE": "1"}, "WORLD_SIZE=1: not the place of a rank"),  # else three worlds of one
        ({**OPEN_MPI, "RANK": "", "WORLD_SIZE": "1"}, "WORLD_SIZE=1: not the place of a rank"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=3 LOCAL_WORLD_SI"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "8"}, "LOCAL_RANK=0 LOCAL_WORLD_SIZE=8: no place of a"),
        ({"RANK": "0", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "RANK=0 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2: no place"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4: a launcher has started this process, and does not"),
        ({**BATCH, "PMI_SIZE": "2"}, "PMI_SIZE=2: a launcher has started this process, and does not say which it is"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "5"}, "OMPI_COMM_WORLD_RANK=5 with OMPI_COMM_WORLD_SIZE=4: no rank of"),
        ({k: v for k, v in STEP.items() if k != "SLURM_STEP_TASKS_PER_NODE"} | {"SLURM_STEP_NUM_NODES": "2"},
         "does not say its place on this machine"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2: not the place of a rank"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 WORLD_SIZE=2: not the place of a rank, RANK from 0"),
        ({"RANK": "1"}, "RANK=1: not the place of a rank"),
        ({"PMIX_RANK": "0", "PMIX_NAMESPACE": "prterun-h-7@1"}, "PMIX_RANK=0: a launcher has started this process"),
        ({"PMIX_RANK": "1", "RANK": "0"}, "PMIX_RANK=1: a launcher has started this process, and does"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_RANK=1: a launcher has started this process"),
        ({"MV2_COMM_WORLD_RANK": "0"}, "MV2_COMM_WORLD_RANK=0: a launcher"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one' is not a number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' is not a number"),
    ],
)  # fmt: skip
def test_worlds_that_do_not_fit_are_refused_by_name(environment, words):
    assert words in refused(environment)


def test_interactive_shells_are_the_allocation():
    for shell in (BATCH, SALLOC):
        assert place.in_allocation(shell) and not place.in_step(shell)
    assert place.in_step(STEP) and not place.in_allocation(STEP) and not place.in_allocation({})
    # What is typed into the shell of srun --pty is not its task; the task itself, and those of an inner srun, are.
    assert place.in_allocation(PTY, terminal=True) and place.in_step(PTY, terminal=False)
    assert place.in_step({**PTY, "SLURM_TASK_PID": str(os.getpid())}, terminal=True)


def test_a_task_that_sees_one_gpu_of_its_own_uses_that():
    more = {"SLURM_NODEID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    assert taken({**STEP, **more, "CUDA_VISIBLE_DEVICES": "1"})[0] == ("1", "3", "0", "2")
    assert taken({**STEP, **more, "CUDA_VISIBLE_DEVICES": "0,1"})[0] == ("1", "3", "1", "2")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_below_torchrun_the_rank_counts_and_not_the_task():
    """torchrun in a step of one task: SLURM_LOCALID is 0 for each of its children."""
    cores = sorted(os.sched_getaffinity(0))
    task = {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
    bound = []
    try:
        for rank in "01":
            more = {"TORCHELASTIC_RUN_ID": "x", "RANK": rank, "LOCAL_RANK": rank, "SLURM_CPU_BIND_TYPE": "mask_cpu:"}
            assert bind_cpus([], {**task, **more}) == [f"run.threads={len(cores) // 2}"]
            bound.append(os.sched_getaffinity(0))
            os.sched_setaffinity(0, cores)
    finally:
        os.sched_setaffinity(0, cores)
    assert bound[0] and bound[1] and not bound[0] & bound[1]


def test_what_the_batch_script_has_chosen_stays():
    assert taken({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "20007"})[1:] == ("10.0.0.1", 20007)


def test_slurms_notation():
    assert place.tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(UserError, match="not as Slurm writes it"):
        place.tasks_per_node("two")
    hosts = {"node[03-5,7],other": "node03", "a1,b2": "a1", "gpu-[1,3]-x": "gpu-1-x", "lone": "lone", "": ""}
    hosts |= {"rack[1-2]n[03-04],x": "rack1n03"}
    assert {text: place.first_host(text) for text in hosts} == hosts


def test_a_first_node_without_an_address_is_told(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "set MASTER_ADDR" in refused({**STEP, "SLURM_STEP_NODELIST": "no-such-host-in-tests"})
