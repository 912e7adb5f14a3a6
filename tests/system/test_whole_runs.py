"""What a user does with runs: start, look at, go on, sweep, export; as the commands of the README."""

import json
import os
import pty
import re
import select
import subprocess
import sys

import pytest
from launcher import LETTERS, TINY, environment, lines_in, python

from skyrl.checkpoint.folder import list_checkpoints
from skyrl.config.options import SFT_UNREAD
from skyrl.run_dir import read_rollouts

EXPORT = [option for option in TINY if option != "checkpoint.export=false"]
NO_WARMUP = [option for option in LETTERS if not option.startswith("warmup.")] + ["warmup.num_steps=0"]


def test_one_process_prints_where_everything_is_and_the_export_answers_as_the_sampler(tmp_path):
    done = python(*EXPORT, "run.dir=run", cwd=tmp_path)
    assert done.code == 0 and done.stderr == "", done.stderr
    table = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[:12])
    assert table["run"].endswith(" in run") and table["ranks"] == "1 x cpu, single, float32"
    assert "parameters in float32" in table["model"] and table["data"].endswith("8 held out")
    assert "resume      nothing: a new run\n" in done.stdout
    run = tmp_path / "run"
    assert "curves      run/curves.png" in done.stdout and (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "model       run/export" in done.stdout and "done: held-out accuracy" in done.stdout
    assert all(len(line) < 110 for line in done.stdout.splitlines() if not line.startswith(("advisory ", "run  ")))

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    card = (run / "export" / "README.md").read_text()
    for row in (
        "| trainer | rl |",
        "| task | env.name=",
        "| algorithm | grpo, ppo |",
        "| held-out accuracy | 0",
        "| steps | ",
    ):
        assert row in card, card
    model, tokenizer = (kind.from_pretrained(run / "export") for kind in (AutoModelForCausalLM, AutoTokenizer))
    played = list(read_rollouts(run / "rollouts", "eval-000010"))
    assert len(played) == 8
    for row in played:
        turn = row["turns"][0]
        assert tokenizer(turn["context_text"])["input_ids"] == turn["context"]
        ids = torch.tensor([turn["context"]])
        with torch.no_grad():
            answer = model.generate(
                ids, do_sample=False, max_new_tokens=4, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
            )
        assert answer[0, len(turn["context"]) :].tolist() == turn["tokens"]
        assert tokenizer.decode(turn["tokens"]) == turn["text"]


def test_a_finished_run_says_so_and_goes_on_with_more_steps(warm, cut, tmp_path):
    run = cut("000010")
    before = (run / "metrics.jsonl").read_bytes()
    done = warm.run(*LETTERS, "run.dir=run", cwd=tmp_path)
    assert done.code == 0 and "finished already: step 10 of 10" in done.stdout and "done: " in done.stdout, done.stderr
    assert (run / "metrics.jsonl").read_bytes() == before and len(list_checkpoints(run / "checkpoints")) == 5
    done = warm.run(*LETTERS, "run.dir=run", "batch.num_steps=8", cwd=tmp_path)
    assert done.code == 0 and "rl 12/12" in done.stdout and "finished already" not in done.stdout
    after = (run / "metrics.jsonl").read_bytes()
    assert after.startswith(before) and lines_in(run / "metrics.jsonl") == 12


def test_resume_from_the_path_of_another_runs_checkpoint(warm, whole, tmp_path):
    options = [f"run.resume={whole}/checkpoints/000006", "run.dir=other"]
    done = warm.run(*LETTERS, *options, cwd=tmp_path)
    assert done.code == 0 and f"resuming from {whole}/checkpoints/000006: rl step 6" in done.stdout, done.stderr
    ours = [json.loads(line) for line in (tmp_path / "other" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["step"]) for row in ours] == [("rl", step) for step in (7, 8, 9, 10)]
    again = warm.run(*LETTERS, *options, cwd=tmp_path)
    assert again.code == 0 and "finished already: step 10 of 10" in again.stdout, again.stderr
    assert lines_in(tmp_path / "other" / "metrics.jsonl") == 4
    assert warm.run(*LETTERS, "run.dir=other", cwd=tmp_path).code == 0


def test_a_sweep_makes_one_folder_for_each_point(warm, tmp_path):
    done = warm.run("-m", "seed=1,2", *NO_WARMUP, "batch.num_steps=1", "run.name=''", cwd=tmp_path)
    assert done.code == 0 and done.stderr == "", done.stderr
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == 2 and "-seed1-" in runs[0].name and "-seed2-" in runs[1].name
    first, second = ((run / "metrics.jsonl").read_text().splitlines() for run in runs)
    assert len(first) == len(second) == 2  # the evaluation before, and one step
    assert json.loads(first[1])["loss:sum"] != json.loads(second[1])["loss:sum"]


def test_wandb_offline_and_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    options = [*NO_WARMUP, "batch.num_steps=2", "tracking.wandb=offline", "tracking.tensorboard=true", "run.dir=run"]
    done = python(*options, cwd=tmp_path)
    assert done.code == 0 and done.stderr == "", done.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert "wandb" not in done.stdout


def test_supervised_training_alone(warm, tmp_path):
    options = [option for option in LETTERS if option.partition("=")[0] not in SFT_UNREAD]
    done = warm.run(*options, "run.dir=run", cwd=tmp_path, module="skyrl.sft")
    assert done.code == 0 and "sft 4/4" in done.stdout and "rl " not in done.stdout.split("done:")[0], done.stderr
    assert "algorithm" not in done.stdout and "held-out" in done.stdout
    assert [info.tag for info in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["000002", "000004"]
    none = [option for option in options if not option.startswith("warmup.")]
    done = warm.run(*none, "warmup.num_steps=0", "run.dir=none", cwd=tmp_path, module="skyrl.sft")
    assert done.code == 2 and "warmup.num_steps=0: supervised training needs at least 1 step" in done.errors[0]


def test_fsdp_on_one_process(warm, tmp_path):
    done = warm.run(*LETTERS, "strategy.name=fsdp", "run.dir=run", cwd=tmp_path)
    assert done.code == 0 and done.stderr == "", done.stderr
    assert lines_in(tmp_path / "run" / "metrics.jsonl") == 10


def test_a_dry_run_for_64_ranks_makes_nothing(warm, tmp_path):
    done = warm.run(*TINY, "dry_run=true", "run.world_size=64", "batch.prompts_per_step=64", cwd=tmp_path)
    assert done.code == 0 and "64 x cpu, ddp, float32" in done.stdout and not (tmp_path / "runs").exists()
    done = warm.run(*TINY, "dry_run=true", "run.world_size=64", cwd=tmp_path)
    assert done.code == 2 and "batch.prompts_per_step=4: fewer than the 64 ranks" in done.errors[0]


def test_a_terminal_shows_one_live_line(tmp_path):
    """With a terminal of 80 columns: rows are rewritten in place, and what stays is a table."""
    main, side = pty.openpty()
    command = [sys.executable, "-m", "skyrl.train", *NO_WARMUP, "run.dir=run"]
    job = subprocess.Popen(command, cwd=tmp_path, env=environment(COLUMNS="80"), stdout=side, stderr=side)
    os.close(side)
    shown = b""
    while select.select([main], [], [], 60)[0]:
        try:
            part = os.read(main, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(main)
    assert job.wait(30) == 0
    text = shown.decode().replace("\r\n", "\n")
    assert "\r\x1b[K" in text and "collect ..." in text and "train ..." in text
    stays = [line.rpartition("\r\x1b[K")[2] for line in text.split("\n")]
    rows = [line for line in stays if re.match(r"rl +\d/6", line)]
    assert [row.split()[1] for row in rows] == ["0/6", "2/6", "4/6", "6/6"]
    assert all(len(line) <= 80 for line in stays if re.match(r" *(rl|step) ", line))
