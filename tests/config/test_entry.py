"""The command line in real processes: what it prints, which code it ends with, and that it leaves no files behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from skyrl.config.docs import config_groups
from skyrl.config.load import load_config, to_dict
from skyrl.config.options import all_options, reads
from skyrl.main import set_torch_defaults, split_args
from skyrl.planner.device import ALLOCATOR
from skyrl.types import UserError

ROOT = Path(__file__).resolve().parents[2]
# Stands in for the loops: tells that it ran, or fails as seed and plugins say.
TRAINER = """
import os, sys, types
from skyrl.types import UserError

def train(cfg, hooks=()):
    if cfg.seed == 13:
        raise UserError("seed=13: this one is refused")
    if cfg.seed == 14:
        raise RuntimeError("this one breaks")
    print("RAN", cfg.seed, cfg.run.name, os.getpid(), os.getcwd(), flush=True)

trainer = types.ModuleType("skyrl.trainers.rl")
trainer.train = train
sys.modules["skyrl.trainers.rl"] = trainer
from skyrl.main import run_entry
run_entry("train")
"""


def run(folder: Path, *args: str, code: str = TRAINER, **env: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "HYDRA_FULL_ERROR")}
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=folder,
        env={**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


MAIN = "from skyrl.train import main; main()"
WITHOUT_TORCH = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; " + MAIN


def test_help_names_every_option_recipe_and_group_without_torch(tmp_path):
    done = run(tmp_path, "--help", code=WITHOUT_TORCH)
    assert done.returncode == 0 and done.stderr == ""
    for option in all_options():
        assert (f" {option.path}=" in done.stdout) == reads("train", option.path) and option.doc
    for names in config_groups().values():
        assert all(f"  {name} " in done.stdout and comment for name, comment in names.items())
    assert "Traceback" not in done.stdout


def test_cfg_job_prints_the_config_and_nothing_else_happens(tmp_path):
    done = run(tmp_path, "optim.lr=0.5", "--cfg", "job", "batch.num_steps=3", code=WITHOUT_TORCH)
    assert done.returncode == 0
    shown, ours = yaml.safe_load(done.stdout), to_dict(load_config(["optim.lr=0.5", "batch.num_steps=3"]))
    shown.pop("run"), ours.pop("run")  # run.name is filled later
    for kind in ("loss", "advantage"):  # Hydra shows what was given; declared defaults are filled in when it is read
        assert shown["algorithm"][kind].pop("params") == {} != ours["algorithm"][kind].pop("params")
    for group in ("batch", "env", "algorithm", "warmup", "sampler"):
        assert shown[group] == ours[group]
    assert shown["optim"]["lr"] == 0.5 and list(tmp_path.iterdir()) == []


def test_info_shows_how_the_config_was_put_together(tmp_path):
    done = run(tmp_path, "--info", "defaults", "algorithm=dapo", code=MAIN)
    assert done.returncode == 0 and "algorithm/dapo" in done.stdout and "experiment/arithmetic" in done.stdout


def test_dry_run_prints_the_plan_without_torch_and_without_a_folder(tmp_path):
    done = run(tmp_path, "--dry-run", "run.world_size=64", "batch.prompts_per_step=64", code=WITHOUT_TORCH)
    assert done.returncode == 0, done.stderr
    assert "64 x cpu, ddp, float32" in done.stdout and "peak" in done.stdout and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["env.name=nope"], "env.name: no environment called 'nope'"),
        (["env.options.x=1"], "env.options.x: environment 'arithmetic' has no such option"),
        (["env.options.reward=nope"], "env.options.reward: no reward called 'nope'"),
        (["plugins=[nope]"], "plugins=[nope]: no module 'nope'"),
        (["experiment=gsm8k_expressions"], "data.path"),
    ],
)
def test_dry_run_looks_at_the_task(tmp_path, options, told):
    done = run(tmp_path, "dry_run=true", *options, code=WITHOUT_TORCH)
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_plan_for_another_machine_needs_no_data_here(tmp_path):
    done = run(tmp_path, "dry_run=true", "experiment=gsm8k_expressions", "run.world_size=8", code=WITHOUT_TORCH)
    assert done.returncode == 0, done.stderr


def test_one_run_gets_its_name_and_leaves_no_file(tmp_path):
    done = run(tmp_path, "optim.lr=0.5")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.split()[:3] == ["RAN", "1", "arithmetic-seed1-optim.lr=0.5"]
    assert list(tmp_path.iterdir()) == []


def test_sweep_runs_every_point_in_one_process_and_one_folder(tmp_path):
    done = run(tmp_path, "-m", "seed=1,2", "optim.lr=0.1,0.2")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0 and done.stderr == ""
    assert [(row[1], row[2]) for row in rows] == [
        (seed, f"arithmetic-seed{seed}-optim.lr={lr}") for seed in "12" for lr in ("0.1", "0.2")
    ]
    assert {row[3] for row in rows} == {rows[0][3]} and {row[4] for row in rows} == {str(tmp_path.resolve())}
    assert list(tmp_path.iterdir()) == []


def test_sweep_goes_on_after_a_failed_point_and_ends_with_its_code(tmp_path):
    done = run(tmp_path, "seed=13,1,14,2", "--multirun")
    assert done.returncode == 2
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["1", "2"]
    assert "skyrl: error: seed=13: this one is refused" in done.stderr
    assert "RuntimeError: this one breaks" in done.stderr and "2 run(s) of the sweep failed" in done.stderr
    assert run(tmp_path, "-m", "seed=14,1").returncode == 1


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["optim.lrr=1"], "skyrl: error: optim.lrr: no such option; did you mean optim.lr?"),
        (["seed=13"], "skyrl: error: seed=13: this one is refused"),
        (["--fast"], "skyrl: error: --fast: no such flag; options are written option=value, --help lists them"),
        (["--cfg", "jobs"], "skyrl: error: --cfg jobs: choose one of job, hydra, all"),
        (["-m", "seed=1,2", "optim.lrr=1"], "skyrl: error: optim.lrr: no such option; did you mean optim.lr?"),
        (["batch.prompts_per_step=7", "batch.optim_steps_per_batch=2", "dry_run=true"], None),
    ],
)
def test_a_mistake_is_one_line_and_code_2(tmp_path, args, line):
    done = run(tmp_path, *args)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("skyrl: error: ")
    assert line is None or done.stderr.strip() == line


def test_anything_else_is_a_traceback_and_code_1(tmp_path):
    done = run(tmp_path, "seed=14")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and done.stderr.rstrip().endswith("RuntimeError: this one breaks")
    assert "hydra" not in done.stderr


def test_other_ranks_are_silent_and_end_later(tmp_path):
    shown = run(tmp_path, "--help", RANK="1", WORLD_SIZE="2")
    assert (shown.returncode, shown.stdout) == (0, "")
    shown = run(tmp_path, "--cfg", "job", RANK="1", WORLD_SIZE="2")
    assert (shown.returncode, shown.stdout) == (0, "")
    ran = run(tmp_path, RANK="1", WORLD_SIZE="2")
    assert ran.stdout.startswith("RAN 1")  # its own output is not swallowed
    done = run(tmp_path, "optim.lrr=1", RANK="1", WORLD_SIZE="2")
    assert done.returncode == 2 and done.stderr.startswith("skyrl: error: rank 1: optim.lrr")


def test_a_rank_that_is_done_waits_for_its_threads_and_runs_what_was_registered(tmp_path):
    """It leaves without Python's own end, where a thread of torch that is late could abort it."""
    own = """
import atexit, threading, time
class Bad:
    def __del__(self):
        print("taken down", flush=True)
kept = Bad()
atexit.register(print, "registered")
def thread():
    threading.main_thread().join()
    time.sleep(0.1)
    print("thread", kept is not None)
threading.Thread(target=thread).start()
"""
    alone = run(tmp_path, code=own + TRAINER)
    assert (alone.returncode, alone.stdout.split()[-5:]) == (0, ["thread", "True", "registered", "taken", "down"])
    done = run(tmp_path, code=own + TRAINER, RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stdout.split()[-3:]) == (0, ["thread", "True", "registered"])


def test_a_run_with_equals_signs_in_its_name_can_be_evaluated(tmp_path):
    """Runs are named by their options, and model= becomes run.resume or model.path after Hydra's quotes were put."""
    (tmp_path / "runs" / "a-batch.num_steps=2,3" / "checkpoints" / "000002").mkdir(parents=True)
    own = "from skyrl.main import run_entry; run_entry('evaluate')"
    done = run(tmp_path, "model=runs/a-batch.num_steps=2,3", code=own)
    assert done.returncode == 2 and "a-batch.num_steps=2,3/checkpoints/000002/manifest.json: cannot be" in done.stderr
    (tmp_path / "runs" / "a-batch.num_steps=2,3" / "export").mkdir()
    done = run(tmp_path, "model=runs/a-batch.num_steps=2,3/export", code=own)
    assert done.returncode == 2 and "model.path=runs/a-batch.num_steps=2,3/export: " in done.stderr


def test_recipes_of_ones_own_and_their_mistakes(tmp_path):
    folder = tmp_path / "own" / "experiment"
    folder.mkdir(parents=True)
    head = "# @package _global_\n"
    (folder / "good.yaml").write_text(
        head + 'experiment: good\nbatch: {prompts_per_step: 64}\nsampler: {stop: ["\\n"]}\n'
    )
    (folder / "unknown.yaml").write_text(head + "batch: {prompts_per_stepp: 64}\n")
    (folder / "wrong.yaml").write_text(head + "batch: {prompts_per_step: many}\n")
    (folder / "broken.yaml").write_text(head + "batch: [\n")
    done = run(tmp_path, "--config-dir", "own", "experiment=good", "dry_run=true", code=WITHOUT_TORCH)
    assert done.returncode == 0 and "64 prompts x" in done.stdout and "good-seed1" in done.stdout

    def told(name: str) -> str:
        done = run(tmp_path, "--config-dir", "own", f"experiment={name}", code=WITHOUT_TORCH)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        return done.stderr.strip()

    assert told("unknown") == (
        "skyrl: error: experiment/unknown.yaml: batch.prompts_per_stepp: no such option; did you mean "
        "batch.prompts_per_step?"
    )
    assert told("wrong").startswith("skyrl: error: experiment/wrong.yaml: batch.prompts_per_step: Value 'many'")
    assert told("broken").startswith("skyrl: error: ") and "broken.yaml, line 3: not YAML" in told("broken")


@pytest.mark.ranks
def test_under_torchrun_a_mistake_is_told_once(tmp_path):
    args = ["-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "skyrl.train", "optim.lrr=1"]
    done = subprocess.run(
        [sys.executable, *args],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("skyrl: error")]
    assert told == ["skyrl: error: optim.lrr: no such option; did you mean optim.lr?"]


def test_in_a_slurm_step_a_mistake_is_told_once_a_node(tmp_path):
    def start(rank: int) -> subprocess.Popen:
        step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "3", "SLURM_PROCID": str(rank)}
        env = {**os.environ, **step, "RANK": str(rank), "WORLD_SIZE": "3", "TMPDIR": str(tmp_path)}
        command = [sys.executable, "-m", "skyrl.train", "optim.lrr=1"]
        env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)

    ranks = [start(rank) for rank in range(3)]
    told = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2, 2]
    assert told == ["skyrl: error: optim.lrr: no such option; did you mean optim.lr?\n", "", ""]


def test_flags_and_overrides_may_come_in_any_order():
    assert split_args(["a=1", "--cfg", "job", "b=2"]) == (["--cfg=job"], ["a=1", "b=2"])
    assert split_args(["-c", "job", "-p", "optim", "a=-1"]) == (["-c", "job", "-p", "optim"], ["a=-1"])
    assert split_args(["--info", "a=1"]) == (["--info=all"], ["a=1"])
    assert split_args(["--dry-run", "-m"]) == (["-m"], ["dry_run=true"])
    with pytest.raises(UserError, match="-p: needs a value"):
        split_args(["-p"])


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({}, {ALLOCATOR: "expandable_segments:True"}),
        ({"PYTORCH_HIP_ALLOC_CONF": "x:1"}, {"PYTORCH_HIP_ALLOC_CONF": "x:1"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
    ],
)
def test_segments_of_a_gpu_grow_unless_a_person_says_otherwise(given, want, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(given))
    set_torch_defaults()
    assert {key: value for key, value in os.environ.items() if "ALLOC_CONF" in key} == want
