"""skyrl-tx stage: what it copies, that it goes on where it stopped, that damage is found, and that a run can use it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from skyrl.config.load import load_config
from skyrl.launch import rank
from skyrl.launch.stage import Stage, check, stage
from skyrl.types import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A model's folder, its tokenizer's, data, a template and a cache of kernels."""
    for name, files in {
        "model": {"config.json": "{}", "model.safetensors": "x" * 5000, "optimizer.pt": "not needed"},
        "tok": {"tokenizer.json": "{}", "big.safetensors": "not for a tokenizer"},
        "data": {"a_train.jsonl": '{"prompt": "1+1"}\n', "a_test.jsonl": '{"prompt": "2+2"}\n'},
        "triton/ab": {"kernel.cubin": "binary", "some.lock": ""},
    }.items():
        (tmp_path / name).mkdir(parents=True)
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "CUDA_CACHE_PATH"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    (tmp_path / "mine.py").write_text(
        "from skyrl.api import *\nfrom skyrl.envs.data_files import *\n"
        "@register_environment('staged')\n"
        "class Staged(Environment):\n"
        "    @classmethod\n"
        "    def dataset(cls, options, data, split, seed):\n"
        "        return read_prompts(data_file(data, split), 'staged', split)\n"
        "    def step(self, text):\n"
        "        return StepResult(0.0, done=True)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def options(place):
    return [
        f"model.path={place}/model", f"model.tokenizer={place}/tok", f"model.chat_template={place}/chat.jinja",
        f"data.path={place}/data/a_train.jsonl", "experiment=custom", "env.name=staged", "plugins=[mine]",
    ]  # fmt: skip


STAGED = {
    "model/config.json", "model/model.safetensors", "tokenizer/tokenizer.json", "chat_template.jinja",
    "data/train/a_train.jsonl", "data/test/a_test.jsonl", "caches/triton/ab/kernel.cubin",
}  # fmt: skip


def test_everything_that_a_run_reads(sources, capsys, monkeypatch):
    stage([str(sources / "out"), *options(sources)])
    told = capsys.readouterr().out
    assert "7 files" in told and "7 copied now" in told and f". {sources}/out/environment.sh" in told
    assert set(Stage.open(sources / "out").files) == STAGED
    stage([str(sources / "out"), *options(sources)])
    assert "0 copied now" in capsys.readouterr().out
    assert check(sources / "out") == 7

    (sources / "out").rename(sources / "moved")  # to another disk, say
    show = f". {sources}/moved/environment.sh && env"
    env = dict(
        line.split("=", 1)
        for line in subprocess.check_output(["bash", "-c", show], text=True).splitlines()
        if "=" in line
    )
    assert env["SKYRL_STAGED"] == f"{sources}/moved" and env["HF_HUB_OFFLINE"] == "1" and "HF_HOME" not in env
    monkeypatch.setenv("SKYRL_STAGED", env["SKYRL_STAGED"])
    cfg = load_config([*options(sources), *(sources / "moved" / "options").read_text().splitlines()])
    assert (
        cfg.model.path == f"{sources}/moved/model" and cfg.data.eval_path == f"{sources}/moved/data/test/a_test.jsonl"
    )
    assert Path(cfg.model.chat_template).read_text() == "{{ messages }}" and cfg.model.tokenizer.endswith(
        "moved/tokenizer"
    )

    nodes = {"SKYRL_WARM_CACHE": env["SKYRL_WARM_CACHE"], "SKYRL_LOCAL_CACHE": str(sources / "local")}
    assert rank.local_caches(nodes) == sources / "local"
    assert (Path(nodes["TRITON_CACHE_DIR"]) / "ab" / "kernel.cubin").read_text() == "binary"


def test_a_stage_that_was_cut_goes_on(sources, capsys):
    stage([str(sources / "out"), *options(sources), "--no-caches"])
    (sources / "out/model/model.safetensors").unlink()
    manifest = json.loads((sources / "out/manifest.json").read_text())
    del manifest["files"]["tokenizer/tokenizer.json"]
    (sources / "out/manifest.json").write_text(json.dumps(manifest))
    (sources / "model/config.json").write_text('{"a": 1}')
    capsys.readouterr()
    stage([str(sources / "out"), *options(sources), "--no-caches"])
    assert "6 files" in (told := capsys.readouterr().out) and "3 copied now" in told
    assert check(sources / "out") == 6 and (sources / "out/model/config.json").read_text() == '{"a": 1}'


def test_damage_is_found(sources, capsys):
    stage([str(sources / "out"), *options(sources)])
    weights = sources / "out/model/model.safetensors"
    weights.write_text("x" * 4999 + "y")
    (sources / "out/chat_template.jinja").unlink()
    with pytest.raises(
        UserError, match="chat_template.jinja is missing; file model/model.safetensors is damaged .*; remove these"
    ):
        stage([str(sources / "out"), "--check"])


def refused(*args):
    with pytest.raises(UserError) as error:
        stage(args)
    return str(error.value)


def test_mistakes(sources, monkeypatch):
    assert "is not empty and has no manifest.json" in refused(str(sources))
    assert "give the folder first" in refused("model.path=tiny", str(sources / "out"))
    assert "did you mean optim.lr?" in refused(str(sources / "out"), "optim.lrr=1")
    assert "has no config.json; give a folder in Hugging Face format" in refused(
        str(sources / "out"), f"model.path={sources}/triton"
    )
    assert "no such file; give a .jsonl or .parquet file" in refused(
        str(sources / "out2"), "experiment=gsm8k", f"data.path={sources}/no.jsonl"
    )
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.statvfs_result and type("Usage", (), {"free": 100}))
    assert "GiB to copy, 0.00 GiB free; free some space" in refused(str(sources / "out3"), *options(sources))


def test_a_hub_that_cannot_be_reached_is_one_line(sources):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "HF_HOME": str(sources / "hf")}
    command = [sys.executable, "-m", "skyrl.cli", "stage", str(sources / "out"), "model.path=no-org/no-model"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "model.path=no-org/no-model: no folder" in done.stderr and "not from the hub" in done.stderr


def test_a_tiny_model_needs_nothing(sources, capsys):
    stage([str(sources / "out"), "--no-caches", "seed=3"])
    assert "0 files" in capsys.readouterr().out and (sources / "out/options").read_text() == ""
