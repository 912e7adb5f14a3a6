"""How a job with a service inside ends: well, by an error of the script, by a rank that fails, by a fault in the
worker; never by waiting."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from inprocess import draw, open_client, options, prompt, rows, run_job

from skyrl import tinker
from skyrl.types import UserError

pytestmark = pytest.mark.ranks


def well(folder: Path) -> None:
    """Closes, and goes on alone; nothing after the constructor runs elsewhere."""
    with open_client(folder / "service") as client:
        model = client.create_lora_training_client("tiny", rank=2)
        model.forward_backward(rows(0), "cross_entropy")
        model.save_state("last")  # nobody waits for it, and yet it is there
    print("alone", os.environ["RANK"], flush=True)
    time.sleep(0.5)
    with pytest.raises(RuntimeError, match="is closed"):
        model.forward(rows(0), "cross_entropy").result()


def well_without_close(folder: Path) -> None:
    """Just ends."""
    client = open_client(folder / "service")
    client.create_lora_training_client("tiny", rank=2).save_state("last").result()


def script_fails(folder: Path) -> None:
    """An error of the script, with work under way."""
    with open_client(folder / "service") as client:
        sampler = client.create_sampling_client(base_model="tiny")
        sampler.sample(prompt(5), 8, draw(4000))
        raise ZeroDivisionError("of the script")


def script_fails_without_with(folder: Path) -> None:
    """The same without anyone to close."""
    client = open_client(folder / "service")
    client.create_sampling_client(base_model="tiny").sample(prompt(5), 8, draw(4000))
    raise ZeroDivisionError("of the script")


def rank_fails(folder: Path) -> None:
    """Rank 1 runs into an error during a command."""
    from skyrl.service import commands

    if os.environ["RANK"] == "1":

        def broken(context: object, part: object, *args: object) -> None:
            raise RuntimeError("rank 1 broke")

        commands.FUNCTIONS["train"] = broken
    with open_client(folder / "service") as client:
        client.create_lora_training_client("tiny", rank=2).forward_backward(rows(0), "cross_entropy").result()


def worker_fails(folder: Path) -> None:
    """A fault in rank 0's own thread, while the script waits."""
    from skyrl.service.models import OpenModels

    def broken(*args: object, **more: object) -> None:
        raise KeyError("a fault of the service")

    OpenModels.content = broken
    with open_client(folder / "service") as client:
        client.create_lora_training_client("tiny", rank=2).save_state("x").result()


def refused(folder: Path) -> None:
    """Options that cannot be."""
    open_client(folder / "service", "strategy.name=single")


@pytest.mark.parametrize("size", [1, 2])
def test_a_script_that_ends_well(size, tmp_path):
    ended = run_job(size, well, tmp_path)
    assert ended.codes == [0] * size, ended.output
    assert ended.output.count("alone") == 1 and "Traceback" not in ended.output
    assert any((tmp_path / "service" / "checkpoints").rglob("optimizer.safetensors"))


@pytest.mark.parametrize("size", [1, 2])
def test_a_script_that_does_not_close(size, tmp_path):
    ended = run_job(size, well_without_close, tmp_path)
    assert ended.codes == [0] * size, ended.output


@pytest.mark.parametrize("script", [script_fails, script_fails_without_with])
def test_an_error_of_the_script_ends_all_ranks(script, tmp_path):
    ended = run_job(2, script, tmp_path)
    assert ended.codes[0] == 1 and None not in ended.codes, ended.output
    assert "ZeroDivisionError: of the script" in ended.output
    assert ended.seconds < 40


def test_a_rank_that_fails_ends_the_job(tmp_path):
    ended = run_job(2, rank_fails, tmp_path)
    assert None not in ended.codes and 0 not in ended.codes, ended.output
    assert "RuntimeError: rank 1 broke" in ended.output and "in broken" in ended.output


@pytest.mark.parametrize("size", [1, 2])
def test_a_fault_of_the_worker_ends_the_job_with_its_traceback(size, tmp_path):
    ended = run_job(size, worker_fails, tmp_path)
    assert None not in ended.codes and ended.codes[0] == 1, ended.output
    assert "KeyError: 'a fault of the service'" in ended.output and "in broken" in ended.output


def test_options_that_cannot_be(tmp_path):
    ended = run_job(2, refused, tmp_path)
    assert None not in ended.codes and 0 not in ended.codes, ended.output
    assert "strategy.name=single" in ended.output


def test_under_torchrun(tmp_path):
    """The same script, started as users start it; the import is the only line that differs from the SDK's."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os
            from skyrl import tinker

            with tinker.ServiceClient() as client:
                model = client.create_lora_training_client("tiny", rank=2)
                row = tinker.Datum(tinker.ModelInput.from_ints([4, 5]), {"target_tokens": [5, 6]})
                loss = model.forward_backward([row], "cross_entropy").result().metrics["loss:sum"]
                print("rank", os.environ["RANK"], "loss", loss > 0)
            """
        )
    )
    given = {**options(tmp_path / "service")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    repository = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([repository, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "SKYRL_SERVE_OPTIONS": " ".join(f"{k}={v}" for k, v in given.items()), "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "rank 0 loss True"


def test_one_service_for_all_clients_of_a_process(tmp_path):
    """Later clients share the first one's service; options come too late for them; the last one ends it."""
    first = open_client(tmp_path)
    second = tinker.ServiceClient()
    with pytest.raises(UserError, match="options come too late"):
        open_client(tmp_path)
    assert first._session.session_id != second._session.session_id
    first.close()
    assert second.create_lora_training_client("tiny", rank=2).get_info().lora_rank == 2
    assert tinker.RestClient().list_sessions().result().sessions
    second.close()
    with pytest.raises(UserError, match="no service is open"):
        tinker.RestClient()
    with open_client(tmp_path) as third:  # one rank alone may open it again
        assert len(third.create_rest_client().list_sessions().result().sessions) == 3
