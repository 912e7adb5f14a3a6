"""The official SDK against a service of this very program: options, refusals, and how a job ends: well, by an error of
the script, by a rank that fails, by a fault in the worker; never by waiting."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
import tinker
from inprocess import draw, open_client, prompt, rows, run_job
from small import service_options

import skyrl.tinker
from skyrl.types import UserError

ranks = pytest.mark.ranks


# ---- options -------------------------------------------------------------------------------------------------------


def test_options(monkeypatch):
    """Those of the environment come first, those of the script win; nested or by path, any text."""
    monkeypatch.setenv("SKYRL_SERVE_OPTIONS", "seed=5 service.max_models=7 service.folder='a b'")
    given = {
        "model": {"tiny": {"hidden_size": 32}},
        "service.max_models": 9,
        "service": {"aliases": {"Qwen/Qwen3-8B": ""}, "allow_anonymous": True, "port": 1, "keys_file": "none"},
        "model.tokenizer": 'it\'s=a, {b} "c"',
    }
    cfg = skyrl.tinker._service_config({"service.folder": "temporary", "seed": 1}, given)
    assert (cfg.seed, cfg.service.max_models, cfg.service.folder) == (5, 9, "a b")
    assert cfg.service.aliases == {"Qwen/Qwen3-8B": ""} and cfg.service.allow_anonymous
    assert cfg.model.tiny.hidden_size == 32 and cfg.model.tokenizer == 'it\'s=a, {b} "c"'
    assert cfg.service.model_idle_seconds == 0
    assert (cfg.service.host, cfg.service.port, cfg.service.keys_file) == ("127.0.0.1", 0, "")
    with pytest.raises(UserError, match="no such option"):
        skyrl.tinker._service_config({}, {"service": {"folders": "x"}})
    with pytest.raises(UserError, match="dry_run=true: for the command line"):
        skyrl.tinker._service_config({}, {"dry_run": True})


def test_without_the_sdk(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the SDK and, for that, Python 3.11 or newer: pip install"):
        with skyrl.tinker.service_client():
            raise AssertionError("the body runs")


# ---- one rank ------------------------------------------------------------------------------------------------------


def test_further_clients_of_the_script_find_the_service(tmp_path, monkeypatch):
    """By the SDK's own variables, which are as before afterwards; the same folder goes on where it stopped."""
    monkeypatch.setenv("TINKER_BASE_URL", "http://elsewhere.test")
    with open_client(tmp_path, user_metadata={"who": "me"}, display_name="a test") as first:
        first.create_lora_training_client("tiny", rank=2).result()
        rest = tinker.RestClient()
        (mine,) = rest.list_sessions().result().sessions
        assert rest.get_session(mine).result().user_metadata == {"who": "me"}
        with tinker.ServiceClient() as second:
            assert second.create_lora_training_client("tiny", rank=2).result().get_info().lora_rank == 2
        assert len(rest.list_sessions().result().sessions) == 2
        with pytest.raises(UserError, match="open in this process already"), open_client(tmp_path):
            raise AssertionError("the body runs")
    assert os.environ["TINKER_BASE_URL"] == "http://elsewhere.test" and "TINKER_API_KEY" not in os.environ
    with open_client(tmp_path):  # one rank alone may open it again
        # The SDK keeps one RestClient() for all that name no address, so this one names it.
        rest = tinker.RestClient(base_url=os.environ["TINKER_BASE_URL"], api_key=os.environ["TINKER_API_KEY"])
        assert len(rest.list_sessions().result().sessions) == 2


def test_only_who_has_the_key_comes_in_and_the_folder_is_temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    given = {name: value for name, value in service_options(Path("-")).items() if name != "service.folder"}
    with skyrl.tinker.service_client(**given) as client:
        client.create_lora_training_client("tiny", rank=2).result().save_state("x").result()
        (folder,) = tmp_path.glob("skyrl-service-*")
        assert list(folder.rglob("optimizer.safetensors"))
        assert os.environ["TINKER_BASE_URL"].startswith("http://127.0.0.1:")
        with pytest.raises(tinker.AuthenticationError):
            tinker.RestClient(base_url=os.environ["TINKER_BASE_URL"], api_key="tml-wrong").list_sessions().result()
    assert not folder.exists()


# ---- ends ----------------------------------------------------------------------------------------------------------


def well(folder: Path) -> None:
    """Ends its block, and goes on alone; neither the body nor what follows runs elsewhere."""
    with open_client(folder / "service") as client:
        model = client.create_lora_training_client("tiny", rank=2).result()
        model.forward_backward(rows(0), "cross_entropy")
        model.save_state("last").result()
    print("alone", os.environ["RANK"], flush=True)
    time.sleep(0.5)
    if os.environ["WORLD_SIZE"] != "1":
        with pytest.raises(UserError, match="the other ranks left with the first service"):
            with open_client(folder / "service"):
                raise AssertionError("the body runs")


def leaves(folder: Path) -> None:
    """sys.exit in the body."""
    with open_client(folder / "service") as client:
        client.create_lora_training_client("tiny", rank=2).result()
        sys.exit()


def script_fails(folder: Path) -> None:
    """An error of the script, with work under way."""
    with open_client(folder / "service") as client:
        sampler = client.create_sampling_client(base_model="tiny").result()
        sampler.sample(prompt(5), 8, draw(4000))
        raise ZeroDivisionError("of the script")


def rank_fails(folder: Path) -> None:
    """Rank 1 runs into an error during a command."""
    from skyrl.service import commands

    if os.environ["RANK"] == "1":

        def broken(context: object, part: object, *args: object) -> None:
            raise RuntimeError("rank 1 broke")

        commands.FUNCTIONS["train"] = broken
    with open_client(folder / "service") as client:
        client.create_lora_training_client("tiny", rank=2).result().forward_backward(rows(0), "cross_entropy").result()


def worker_fails(folder: Path) -> None:
    """A fault in rank 0's own thread, while the script waits."""
    from skyrl.service.models import OpenModels

    def broken(*args: object, **more: object) -> None:
        raise KeyError("a fault of the service")

    OpenModels.content = broken
    with open_client(folder / "service") as client:
        client.create_lora_training_client("tiny", rank=2).result().save_state("x").result()


def refused(folder: Path) -> None:
    """Options that cannot be."""
    with open_client(folder / "service", "strategy.name=single"):
        print("the body runs")


@ranks
@pytest.mark.parametrize("size", [1, 2])
def test_a_script_that_ends_well(size, tmp_path):
    ended = run_job(size, well, tmp_path)
    assert ended.codes == [0] * size, ended.output
    assert ended.output.count("alone") == 1 and "Traceback" not in ended.output
    assert any((tmp_path / "service" / "checkpoints").rglob("optimizer.safetensors"))


@ranks
def test_a_script_that_leaves_early(tmp_path):
    ended = run_job(2, leaves, tmp_path)
    assert ended.codes == [0, 0], ended.output


@ranks
def test_an_error_of_the_script_ends_all_ranks(tmp_path):
    ended = run_job(2, script_fails, tmp_path)
    assert ended.codes[0] == 1 and None not in ended.codes, ended.output
    assert "ZeroDivisionError: of the script" in ended.output
    assert ended.seconds < 40


@ranks
def test_a_rank_that_fails_ends_the_job(tmp_path):
    ended = run_job(2, rank_fails, tmp_path)
    assert None not in ended.codes and 0 not in ended.codes, ended.output
    assert "RuntimeError: rank 1 broke" in ended.output and "in broken" in ended.output


@ranks
@pytest.mark.parametrize("size", [1, 2])
def test_a_fault_of_the_worker_ends_the_job_with_its_traceback(size, tmp_path):
    ended = run_job(size, worker_fails, tmp_path)
    assert None not in ended.codes and ended.codes[0] == 1, ended.output
    assert "KeyError: 'a fault of the service'" in ended.output and "in broken" in ended.output


@ranks
def test_options_that_cannot_be(tmp_path):
    ended = run_job(2, refused, tmp_path)
    assert None not in ended.codes and 0 not in ended.codes, ended.output
    assert "strategy.name=single" in ended.output


@ranks
def test_under_torchrun(tmp_path):
    """The same script, started as users start it; the options from the environment."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os
            import tinker
            import skyrl.tinker

            with skyrl.tinker.service_client() as client:
                model = client.create_lora_training_client("tiny", rank=2).result()
                row = tinker.Datum(tinker.ModelInput.from_ints([4, 5]), {"target_tokens": [5, 6]})
                loss = model.forward_backward([row], "cross_entropy").result().metrics["loss:sum"]
                print("rank", os.environ["RANK"], "loss", loss > 0)
            """
        )
    )
    given = {**service_options(tmp_path / "service")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    repository = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([repository, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "SKYRL_SERVE_OPTIONS": " ".join(f"{k}={v}" for k, v in given.items()), "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "rank 0 loss True"
