"""One script, several ranks and layouts of the base: the same losses, steps, samples and log-probabilities."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gloo
import numpy as np
import pytest
from inprocess import ADAM, contents, draw, drawn, logprobs_of, mismatch, on_ranks, open_client, prompt, rl_rows, rows
from small import service_options
from tinker import AdamParams, ServiceClient

from skyrl.config.load import as_overrides, load_config
from skyrl.service import server
from skyrl.service.commands import SOON
from skyrl.service.sampling import FEW
from skyrl.types import UserError

LAYOUTS = [(2, "ddp"), (2, "fsdp"), (4, "fsdp"), pytest.param((4, "ddp"), marks=pytest.mark.slow)]
PROMPTS = [prompt(5, 6, 7), prompt(5, 6, 7, 8, 9, 10), prompt(20)]


def workout(client: ServiceClient) -> dict[str, Any]:
    """Two models that train by several losses side by side, then sample; everything that came back."""
    one = client.create_lora_training_client("tiny", rank=4, seed=7).result()
    two = client.create_lora_training_client("tiny", rank=8, seed=8, train_unembed=False).result()
    base = client.create_sampling_client(base_model="tiny").result()
    out: dict[str, Any] = {"losses": [], "logprobs": [], "steps": [], "samples": []}

    def note(*futures: Any) -> None:
        for future in futures:
            done = future.result()
            out["losses"].append(done.metrics["loss:sum"])
            out["logprobs"] += logprobs_of(done)

    for step in range(2):
        futures = [
            one.forward_backward(rows(step), "cross_entropy"),
            two.forward_backward(rows(10 + step, count=5), "cross_entropy"),
            one.forward_backward(rows(20 + step, count=3), "cross_entropy"),
        ]
        steps = [one.optim_step(ADAM), two.optim_step(AdamParams(learning_rate=3e-3, weight_decay=0.1))]
        note(*futures)
        out["steps"] += [step.result().metrics["grad_norm"] for step in steps]
    scores = one.forward(rows(3), "cross_entropy").result()
    for number, loss in enumerate(("importance_sampling", "ppo", "cispo", "dro")):
        note(one.forward_backward(rl_rows(number, logprobs_of(scores), rows(3)), loss))
    out["steps"].append(one.optim_step(ADAM).result().metrics["grad_norm"])
    note(one.forward(rows(4), "cross_entropy"), two.forward(rows(4), "cross_entropy"))
    samplers = [
        one.save_weights_and_get_sampling_client().result(),
        two.save_weights_and_get_sampling_client().result(),
        base,
    ]
    asked = [sampler.sample(p, 3, draw()) for sampler in samplers for p in PROMPTS]
    asked += [sampler.sample(PROMPTS[0], 1, draw(temperature=0.0)) for sampler in samplers]
    out["samples"] = [drawn(future.result()) for future in asked]
    out["scored"] = [sampler.compute_logprobs(PROMPTS[1]).result()[1:] for sampler in samplers]
    out["saved"] = contents(client, one.save_state("end").result().path)
    out["mismatch"] = [mismatch(one, PROMPTS[0], drawn(asked[0].result()))]
    out["mismatch"].append(mismatch(two, PROMPTS[1], drawn(asked[4].result())))
    return out


def _rank_that_cannot_plan(folder: str) -> str:
    """Why this rank's service was not opened; only rank 1 finds a reason."""

    def refuse(*args: Any, **more: Any) -> Any:
        raise UserError("this rank has no room")

    if os.environ["RANK"] == "1":
        server.make_plan = refuse
    cfg = load_config([*as_overrides(service_options(Path(folder)))], mode="serve")
    try:
        server.open_service(cfg)
    except UserError as error:
        return str(error)
    return "opened"


@pytest.mark.ranks
def test_what_one_rank_finds_wrong_with_the_plan_is_told_on_all(tmp_path):
    one, other = gloo.run_ranks(2, _rank_that_cannot_plan, str(tmp_path), timeout=240)
    assert one == other and one.startswith("rank 1 on ") and one.endswith(": this rank has no room")


def _stretches(client: ServiceClient) -> tuple[set[float], set[float]]:
    """How long stretches of a second are while a small client samples beside a large one, and while it does not."""
    sampling, found = client.service.worker.sampling, (set(), set())
    sampling.slice_seconds, call = lambda: 1.0, sampling.leader.call

    def noted(method: str, *args: Any, **more: Any) -> Any:
        if method == "sample":
            alone = len({one.client for one in sampling._active.values()}) < 2
            assert alone or not any(batch.awaited for batch in more["parts"])
            found[alone].add(args[0])
        return call(method, *args, **more)

    large, small = (one.create_sampling_client(base_model="tiny").result() for one in (client, ServiceClient()))
    futures = [large.sample(PROMPTS[0], 1, draw(400)) for _ in range(2 * FEW)]
    sampling.leader.call = noted
    small.sample(PROMPTS[0], 1, draw(4)).result()
    [future.result() for future in futures]
    return found


@pytest.mark.ranks
def test_all_ranks_end_a_stretch_together_while_a_small_client_waits(tmp_path):
    """They wait for each other: a rank that ended alone would be idle until the others end, and tell nobody."""
    beside, alone = on_ranks(2, _stretches, tmp_path)
    assert beside == {SOON} and alone == {1.0}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    with open_client(tmp_path_factory.mktemp("alone")) as client:
        return workout(client)


def test_sampling_and_training_agree(alone):
    assert max(alone["mismatch"]) < 1e-4


@pytest.mark.ranks
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_and_layouts_change_nothing(alone, layout, tmp_path):
    """Sampled tokens are equal; all numbers to rounding: sums of gradients have another order on several ranks."""
    size, strategy = layout
    found = on_ranks(size, workout, tmp_path, f"strategy.name={strategy}")
    np.testing.assert_allclose(found["losses"], alone["losses"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["steps"], alone["steps"], rtol=1e-5)
    for ours, theirs in zip(found["logprobs"], alone["logprobs"], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    for ours, theirs in zip(found["samples"], alone["samples"], strict=True):
        assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
        for (_, mine), (_, other) in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(found["scored"]), np.concatenate(alone["scored"]), rtol=0, atol=1e-5)
    assert found["saved"].keys() == alone["saved"].keys()
    for name, value in alone["saved"].items():
        np.testing.assert_allclose(found["saved"][name], value, rtol=1e-3, atol=1e-6, err_msg=name)
    assert max(found["mismatch"]) < 1e-4
    # the base itself and the first step's log-probabilities come from no sum over ranks
    assert found["samples"][6:9] == alone["samples"][6:9]
