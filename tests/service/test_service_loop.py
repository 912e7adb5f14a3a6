"""The two front doors of the engine: the training loop, and a Tinker script that sends the same data, make the same
parameters."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from inprocess import contents, on_ranks, open_client
from loop import loop_config
from serving import serve
from small import service_options, weights_of
from tinker import AdamParams, Datum, ModelInput, ServiceClient

from skyrl.engine import Engine
from skyrl.trainers.rl import train
from skyrl.types import LossSpec

Update = tuple[list[dict[str, Any]], LossSpec, dict[str, float], float]
RUN = [
    "warmup.num_steps=2",
    "warmup.rows_per_step=8",
    "sampler.temperature=1.0",
    "optim.eps=1e-6",
    "optim.lr=1e-3",
    "seed=3",
]


def looped(folder: Path, *overrides: str) -> tuple[list[Update], dict[str, np.ndarray]]:
    """A run of the loop: (rows, loss, Adam, gradient norm) of each update, and the parameters at its end."""
    updates: list[Any] = []
    last: list[dict[str, np.ndarray]] = [{}]
    forward_backward, optim_step = Engine.forward_backward, Engine.optim_step

    def learn(self: Engine, rows: Any, loss: LossSpec, **more: Any) -> Any:
        kept = [{key: np.array(getattr(row, key)) for key in FIELDS if getattr(row, key) is not None} for row in rows]
        updates.append([kept, loss])
        return forward_backward(self, rows, loss, **more)

    def step(self: Engine, model: str, adam: Any) -> Any:
        metrics = optim_step(self, model, adam)
        updates[-1] += [dataclasses.asdict(adam), metrics["grad_norm:mean"]]
        last[0] = {name.removeprefix("net."): t.numpy().copy() for name, t in weights_of(self).items()}
        return metrics

    Engine.forward_backward, Engine.optim_step = learn, step
    try:
        train(loop_config(folder, *RUN, *overrides))
    finally:
        Engine.forward_backward, Engine.optim_step = forward_backward, optim_step
    return [tuple(update) for update in updates], last[0]


FIELDS = ("tokens", "targets", "weights", "sampling_logprobs", "advantages")


def as_datum(row: dict[str, Any], loss: str) -> Datum:
    """The loop's row for a client: losses there have no weights, but are linear in advantages of one sign."""
    inputs: dict[str, Any] = {"target_tokens": row["targets"]}
    if loss == "cross_entropy":
        inputs["weights"] = row["weights"].astype(np.float32)
    else:
        inputs["logprobs"] = row["sampling_logprobs"].astype(np.float32)
        inputs["advantages"] = (row["advantages"] * row["weights"]).astype(np.float32)
    return Datum(ModelInput.from_ints(row["tokens"].tolist()), inputs)


def sent(client: ServiceClient, updates: list[Update], rank: int = 0) -> tuple[dict[str, np.ndarray], list[float]]:
    """The same updates through a client: (parameters, gradient norms)."""
    path, norms = posted(client, updates, rank)
    return parameters_of(client, path), norms


def posted(client: ServiceClient, updates: list[Update], rank: int) -> tuple[str, list[float]]:
    """The updates; (path of a checkpoint after them, gradient norms)."""
    model = client.create_lora_training_client("tiny", rank=rank, seed=3).result()
    norms = []
    for rows, loss, adam, _ in updates:
        config = {}
        if loss.name == "ppo":
            low, high = loss.params["clip_low"], loss.params["clip_high"]
            config = {"clip_low_threshold": 1.0 - low, "clip_high_threshold": 1.0 + high}
        model.forward_backward([as_datum(row, loss.name) for row in rows], loss.name, config)
        params = {"learning_rate" if key == "lr" else key: value for key, value in adam.items() if key != "momentum"}
        norms.append(model.optim_step(AdamParams(**params)).result().metrics["grad_norm"])
    return model.save_state("end").result().path, norms


def parameters_of(client: ServiceClient, path: str) -> dict[str, np.ndarray]:
    """A checkpoint's parameters."""
    found = contents(client, path)
    return {name: value for name, value in found.items() if name[:2] not in ("m:", "v:") and name != "step"}


def distance(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """l2 norm of the difference over that of `theirs`."""
    assert ours.keys() == theirs.keys()
    pairs = [(ours[name].astype(np.float64), theirs[name].astype(np.float64)) for name in ours]
    return (sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs)) ** 0.5


SERVICE = ["service.full_parameters=true", "seed=3", "batch.max_tokens_per_microbatch=256"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return looped(tmp_path_factory.mktemp("loop") / "run", "batch.max_tokens_per_microbatch=256")


def test_a_script_with_the_loops_data_makes_the_loops_parameters(run, tmp_path):
    updates, parameters = run
    assert [loss.name for _, loss, _, _ in updates] == ["cross_entropy"] * 2 + ["ppo"] * 2
    assert all((loss.kl_coef, loss.entropy_coef, loss.correction) == (0, 0, "none") for _, loss, _, _ in updates)
    with open_client(tmp_path, *SERVICE) as client:
        found, norms = sent(client, updates)
    assert distance(found, parameters) < 1e-6
    np.testing.assert_allclose(norms, [norm for *_, norm in updates], rtol=1e-5)


def test_an_adapter_of_the_loop_is_the_adapter_of_a_script(tmp_path):
    updates, adapter = looped(
        tmp_path / "run", "batch.max_tokens_per_microbatch=256", "model.lora.rank=4", "optim.lr=1e-2"
    )
    assert len(updates) == 4 and sum(name.endswith(".A") for name in adapter) == 2 * 7 + 1
    with open_client(tmp_path, *SERVICE[1:]) as client:
        found, norms = sent(client, updates, rank=4)
        start, _ = sent(client, [], rank=4)
    assert distance(found, adapter) < 1e-6 and distance(start, adapter) > 1e-2
    np.testing.assert_allclose(norms, [norm for *_, norm in updates], rtol=1e-5)


def test_supervised_updates_are_equal_bit_for_bit(run, tmp_path):
    """Weights go through as they are, so nothing at all differs."""
    updates, parameters = run
    with open_client(tmp_path, *SERVICE) as client:
        halfway, norms = sent(client, updates[:2])
    assert norms == [norm for *_, norm in updates[:2]]
    assert distance(halfway, parameters) > 1e-3  # what the other tests would see if two updates were missing


@pytest.mark.ranks
def test_a_script_on_two_ranks_too(run, tmp_path):
    updates, parameters = run
    found, _ = on_ranks(2, sent, tmp_path, *SERVICE, "strategy.name=fsdp", args=[updates])
    assert distance(found, parameters) < 1e-6


@pytest.mark.ranks
def test_a_script_at_a_server_of_two_ranks_too(run, tmp_path):
    """The server is a program of its own here; its checkpoint is read where it left it."""
    updates, parameters = run
    small = [f"{name}={value}" for name, value in service_options(tmp_path, *SERVICE).items() if "folder" not in name]
    with serve(tmp_path, Path("tiny"), *small) as server:
        with tinker.ServiceClient(base_url=server.url, api_key="tml-any") as client:
            path, norms = posted(client, updates, 0)
        server.process.terminate()  # to torchrun, which passes it on
        start = time.monotonic()
        server.process.wait(20)
        assert time.monotonic() - start < 5  # some 0.5 s where there is nothing else to do
        said = server.log.read_text()
        assert "Traceback" not in said and "error" not in said, said
    np.testing.assert_allclose(norms, [norm for *_, norm in updates], rtol=1e-5)
    with open_client(tmp_path / "state", *SERVICE) as client:
        assert distance(parameters_of(client, path), parameters) < 1e-6
