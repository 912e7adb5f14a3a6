"""How many models and samples there may be, and what happens at the limits."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from inprocess import (
    ADAM,
    contents,
    draw,
    drawn,
    logprobs_of,
    mismatch,
    open_client,
    prompt,
    rows,
    same,
    together_and_alone,
)
from requests_made import sampling_request
from tinker import RequestFailedError

from skyrl.service.messages import TooManyRequests


def test_more_models_than_there_may_be(tmp_path):
    """128 open models of which 4 are on the device: those that were parked go on bit for bit, a pending gradient
    included; the 129th and 130th are refused."""
    limits = ["service.max_models=128", "service.max_resident_models=4"]
    with open_client(tmp_path, *limits) as client:

        def make(seed: int) -> Any:
            return client.create_lora_training_client("tiny", rank=2, seed=seed).result()

        def step(model: Any, seed: int) -> list[Any]:
            done = model.forward_backward(rows(seed, count=3), "cross_entropy")
            return [logprobs_of(done.result()), model.optim_step(ADAM).result().metrics]

        first, control = make(0), make(0)
        assert same(step(first, 1), step(control, 1))
        first.forward_backward(rows(2, count=3), "cross_entropy").result()  # pending while parked
        control.forward_backward(rows(2, count=3), "cross_entropy").result()
        expected = [control.optim_step(ADAM).result().metrics, step(control, 3)]
        tensors = contents(client, control.save_state("x").result().path)
        models = [make(seed) for seed in range(126)]
        models_open = client.service.worker.models
        assert models_open.get(first.model_id).offloaded
        assert sum(not models_open.get(m.model_id).offloaded for m in [first, control, *models]) == 4
        for _ in range(2):
            with pytest.raises(
                RequestFailedError, match="128 models are open, at most 128 may be; end a session"
            ) as no:
                make(1)
            assert no.value.category == "user"
        rounds = [[step(model, 50) for model in models[:12]] for _ in range(2)]  # each brings one back
        assert same([first.optim_step(ADAM).result().metrics, step(first, 3)], expected)
        assert same(contents(client, first.save_state("x").result().path), tensors)
        twin = models[12]
        assert same(step(twin, 50), rounds[0][0]) is False  # another seed
        assert not same(rounds[0], rounds[1])


def test_too_many_samples_wait(tmp_path):
    with open_client(tmp_path, "service.max_queued_samples=64") as client:
        sampler = client.create_sampling_client(base_model="tiny").result()
        alone = drawn(sampler.sample(prompt(5, 6), 1, draw(30)).result())
        desk = client.service.scheduler
        lots = [sampler.sample(prompt(5, 6), 40, draw(30, seed=i)) for i in range(24)]
        query = sampling_request(
            10**6, np.array([5, 6]), sampling_session_id=sampler._sampling_session_id, num_samples=60
        )
        with pytest.raises(TooManyRequests, match="samples are waiting, at most 64 may; try again in a moment"):
            for _ in range(200):
                desk.submit(query, owner="local")
                query = query.model_copy(update={"seq_id": query.seq_id + 1})
        start = time.monotonic()
        assert all(len(future.result(60).sequences) == 40 for future in lots)  # the client offers them again
        assert drawn(sampler.sample(prompt(5, 6), 1, draw(30)).result()) == alone
        assert time.monotonic() - start < 60


FULL = ["service.full_parameters=true"]


def test_all_parameters_are_trained(tmp_path):
    """Train, save, load and go on bit for bit; one model at a time; adapters are refused."""
    with open_client(tmp_path, *FULL) as client:
        with pytest.raises(RequestFailedError, match="ask for LoRA rank 0"):
            client.create_lora_training_client("tiny", rank=4).result()
        model = client.create_lora_training_client("tiny", rank=0).result()
        assert model.get_info().is_lora is False and model.get_info().lora_rank is None
        losses = []
        for _ in range(4):
            losses.append(model.forward_backward(rows(0), "cross_entropy").result().metrics["loss:sum"])
            model.optim_step(ADAM).result()
        assert losses[-1] < 0.9 * losses[0]
        path = model.save_state("four").result().path
        tensors = contents(client, path)
        assert tensors["step"] == 4
        known = dict(client.service.engine.models["base"].strategy.module.net.named_parameters())
        assert set(known) <= set(tensors) and {f"m:{name}" for name in known} <= set(
            tensors
        )  # as transformers calls them
        after = logprobs_of(model.forward_backward(rows(1), "cross_entropy").result())
        norm = model.optim_step(ADAM).result().metrics["grad_norm"]
        with pytest.raises(RequestFailedError, match="training all parameters allows one at a time"):
            client.create_training_client_from_state_with_optimizer(path).result()
        model.load_state_with_optimizer(path).result()
        assert same(logprobs_of(model.forward_backward(rows(1), "cross_entropy").result()), after)
        assert model.optim_step(ADAM).result().metrics["grad_norm"] == norm
    with open_client(tmp_path, *FULL) as client:  # a new server on the same folder
        model = client.create_training_client_from_state_with_optimizer(path).result()
        assert same(logprobs_of(model.forward_backward(rows(1), "cross_entropy").result()), after)
        assert model.optim_step(ADAM).result().metrics["grad_norm"] == norm
        assert same(contents(client, path), tensors)


def test_rank_0_needs_a_server_for_it(tmp_path):
    with open_client(tmp_path) as client, pytest.raises(RequestFailedError, match="service.full_parameters=true"):
        client.create_lora_training_client("tiny", rank=0).result()


def test_samples_of_whole_models(tmp_path):
    """Snapshots and checkpoints of whole models, the base as it was, each as alone, whatever is trained meanwhile."""
    with open_client(tmp_path, *FULL) as client:
        model = client.create_lora_training_client("tiny", rank=0).result()
        base = client.create_sampling_client(base_model="tiny").result()
        fresh = model.save_weights_and_get_sampling_client().result()
        plain = drawn(base.sample(prompt(5, 6), 2, draw(16)).result())
        assert drawn(fresh.sample(prompt(5, 6), 2, draw(16)).result()) == plain
        model.forward_backward(rows(0), "cross_entropy"), model.optim_step(ADAM)
        first = model.save_weights_and_get_sampling_client().result()
        alone = drawn(first.sample(prompt(5, 6), 2, draw(16)).result())
        assert alone != plain
        assert mismatch(model, prompt(5, 6), alone) < 1e-4
        model.forward_backward(rows(1), "cross_entropy"), model.optim_step(ADAM)
        second = model.save_weights_and_get_sampling_client("second").result()
        futures = [one.sample(prompt(5, 6), 2, draw(16)) for one in (first, second, base, fresh, first)]
        found = [drawn(future.result()) for future in futures]
        assert found[0] == found[4] == alone and found[2] == found[3] == plain and found[1] not in (alone, plain)
        assert mismatch(model, prompt(5, 6), found[1]) < 1e-4


def test_models_that_share_forward_passes(tmp_path):
    """service.mix_tenants=always: equal to each alone to rounding, no longer bit for bit."""
    with open_client(tmp_path, "service.mix_tenants=always", "batch.max_tokens_per_microbatch=1024") as client:
        together, alone = together_and_alone(client)
        for (one, _), (other, _) in zip(together[0] + together[1], alone[0] + alone[1], strict=True):
            assert one == pytest.approx(other, rel=1e-5)
        for ours, theirs in zip(together[2:], alone[2:], strict=True):
            for name, value in theirs.items():
                np.testing.assert_allclose(ours[name], value, rtol=1e-3, atol=1e-6, err_msg=name)
