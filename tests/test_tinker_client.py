"""The in-process client has the SDK's methods, arguments and defaults, and takes and gives the SDK's data."""

from __future__ import annotations

import asyncio
import getpass
import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inprocess import ADAM, draw, drawn, logprobs_of, open_client, prompt, rows

from skyrl import tinker
from skyrl.tinker import job, records, types
from skyrl.types import UserError

# Of release 0.38.0: every method that we have, its arguments and their defaults.
STATE = "path, base_model=None, user_metadata=None, weights_access_token=None"
SDK = {
    "ServiceClient": {
        "copy_weights": "path, *, ttl_seconds=None, weights_access_token=None",
        "create_lora_training_client": "base_model, rank=32, seed=None, train_mlp=True, train_attn=True, "
        "train_unembed=True, user_metadata=None, optimizer=None",
        "create_rest_client": "",
        "create_sampling_client": "model_path=None, base_model=None, retry_config=None, record_stability_info=False",
        "create_training_client_from_state": STATE + ", optimizer=None",
        "create_training_client_from_state_with_optimizer": STATE,
        "get_server_capabilities": "",
    },
    "TrainingClient": {
        "create_sampling_client": "model_path, retry_config=None, record_stability_info=False",
        "forward": "data, loss_fn, loss_fn_config=None",
        "forward_backward": "data, loss_fn, loss_fn_config=None",
        "forward_backward_custom": "data, loss_fn, *, loss_type_input=None",
        "get_info": "",
        "get_tokenizer": "",
        "load_state": "path, weights_access_token=None",
        "load_state_with_optimizer": "path, weights_access_token=None",
        "optim_step": "optim_params=None, *, adam_params=None",
        "save_state": "name, ttl_seconds=None, overwrite=False, user_metadata=None",
        "save_weights_and_get_sampling_client": "name=None, retry_config=None, record_stability_info=False, "
        "kind='snapshot'",
        "save_weights_external": "name, ttl_seconds=None, age_encryption_recipients=None",
        "save_weights_for_sampler": "name, ttl_seconds=None, user_metadata=None",
    },
    "SamplingClient": {
        "compute_logprobs": "prompt, prompt_logprobs_last_n=None",
        "from_sampler_handle": "handle, *, api_key=None",
        "get_base_model": "",
        "get_sampler_handle": "",
        "get_tokenizer": "",
        "sample": "prompt, num_samples, sampling_params, include_prompt_logprobs=False, topk_prompt_logprobs=0, "
        "topk_sample_logprobs=0, target_prompt_logprobs=None, prompt_alt_tokens_k=0, prompt_logprobs_last_n=None",
    },
    "RestClient": {
        "assign_session_project": "session_id, project_id",
        "copy_weights": "path, destination_project_id=None, *, ttl_seconds=None, weights_access_token=None",
        "delete_checkpoint": "training_run_id, checkpoint_id",
        "delete_checkpoint_from_tinker_path": "tinker_path",
        "get_current_checkpoint_storage_usage": "project_id=None",
        "get_external_weights_urls": "tinker_path",
        "get_sampler": "sampler_id",
        "get_server_capabilities": "",
        "get_session": "session_id, access_scope='owned'",
        "get_training_run": "training_run_id, access_scope='owned'",
        "get_training_run_by_tinker_path": "tinker_path, access_scope='owned'",
        "get_weights_info_by_tinker_path": "tinker_path",
        "list_checkpoints": "training_run_id",
        "list_sessions": "limit=20, offset=0, access_scope='owned'",
        "list_training_runs": "limit=20, offset=0, access_scope='owned', project_id=None",
        "list_user_checkpoints": "limit=100, offset=0",
        "publish_checkpoint_from_tinker_path": "tinker_path",
        "search_sessions": "request",
        "set_checkpoint_ttl_from_tinker_path": "tinker_path, ttl_seconds",
        "unpublish_checkpoint_from_tinker_path": "tinker_path",
    },
}
WITHOUT_ASYNC = {"create_rest_client", "get_tokenizer", "from_sampler_handle", "get_sampler_handle", "search_sessions",
                 "get_weights_info_by_tinker_path", "copy_weights", "get_server_capabilities"}  # fmt: skip
# Where `make test-tinker` keeps the SDK's releases, and what they need.
FOLDER = Path(os.environ.get("SKYRL_TEST_CLIENTS") or f"{tempfile.gettempdir()}/skyrl-test-clients-{getpass.getuser()}")
CLIENT = [FOLDER / "tinker-0.38.0", FOLDER / f"dependencies-py{sys.version_info.major}{sys.version_info.minor}"]


def arguments(method: Any) -> str:
    parts, star = [], False
    for one in inspect.signature(method).parameters.values():
        if one.name == "self":
            continue
        if one.kind is one.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        parts.append(one.name if one.default is one.empty else f"{one.name}={one.default!r}")
    return ", ".join(parts)


@pytest.mark.parametrize("name", SDK)
def test_methods_arguments_and_defaults(name):
    ours = getattr(tinker, name)
    for method, expected in SDK[name].items():
        assert arguments(getattr(ours, method)) == expected, method
        if method not in WITHOUT_ASYNC:
            assert inspect.iscoroutinefunction(getattr(ours, f"{method}_async")), method
            assert arguments(getattr(ours, f"{method}_async")) == expected, method


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with open_client(tmp_path_factory.mktemp("service"), user_metadata={"who": "me"}, display_name="a test") as opened:
        yield opened


# ---- types ---------------------------------------------------------------------------------------------------------


def test_model_input():
    whole = types.ModelInput.from_ints([1, 2]).append_int(3).append(types.EncodedTextChunk([4, 5]))
    assert (whole.to_ints(), whole.length, len(whole.chunks)) == ([1, 2, 3, 4, 5], 5, 3)
    assert types.ModelInput.empty().to_ints() == []


def test_tensor_data():
    dense = types.TensorData([1.0, 2.0, 3.0, 4.0], "float32", [2, 2])
    assert dense.to_numpy().dtype == np.float32 and dense.tolist() == [[1, 2], [3, 4]] and dense.data == [1, 2, 3, 4]
    assert types.TensorData.from_torch(torch.ones(3, dtype=torch.bfloat16)).to_torch().dtype == torch.float32
    assert types.TensorData.from_numpy(np.arange(3, dtype=np.int32)).dtype == "int64"
    matrix = torch.zeros(6, 5, dtype=torch.int64)
    matrix[1, 2], matrix[4, 0] = 7, 9
    sparse = types.TensorData.from_torch_sparse(matrix)
    assert sparse.sparse_crow_indices == [0, 0, 1, 1, 1, 2, 2] and sparse.data == [7, 9] and sparse.shape == [6, 5]
    assert torch.equal(sparse.to_torch(), matrix)
    assert sparse.to_numpy(-1)[0, 0] == -1 and sparse.to_numpy(-1)[1, 2] == 7
    assert types.TensorData.from_torch_sparse(torch.ones(6, 5)).sparse_crow_indices is None
    for wrong in (lambda: types.TensorData([1], None), lambda: types.TensorData([1], "int64", [1], [0, 1])):
        with pytest.raises(ValueError, match="TensorData"):
            wrong()


def test_datum_takes_lists_arrays_and_tensors():
    datum = types.Datum(
        types.ModelInput.from_ints([1, 2]),
        {"target_tokens": [2, 3], "weights": torch.tensor([0.5, 1.0]), "logprobs": np.zeros(2), "advantages": [1, 2]},
    )
    kinds = {name: tensor.dtype for name, tensor in datum.loss_fn_inputs.items()}
    assert kinds == {"target_tokens": "int64", "weights": "float32", "logprobs": "float32", "advantages": "float32"}
    with pytest.raises(ValueError, match="rectangle"):
        types.Datum(types.ModelInput.from_ints([1]), {"weights": [[1.0], [1.0, 2.0]]})


def test_answers_are_built_from_json():
    moment = "2026-01-31T12:00:00+00:00"
    one = {"checkpoint_id": "weights/x", "checkpoint_type": "training", "time": moment, "tinker_path": "tinker://r/w/x"}
    run = {"training_run_id": "r", "base_model": "b", "model_owner": "o", "is_lora": True, "last_request_time": moment}
    found = records.build(records.TrainingRun, {**run, "last_checkpoint": one, "unknown": 1})
    assert found.last_checkpoint.time.year == 2026 and found.last_sampler_checkpoint is None and not found.corrupted
    with pytest.raises(ValueError, match="the answer has no base_model"):
        records.build(records.TrainingRun, {"training_run_id": "r"})
    path = types.ParsedCheckpointTinkerPath.from_tinker_path("tinker://s:train:0/sampler_weights/x")
    assert (path.training_run_id, path.checkpoint_type, path.checkpoint_id) == (
        "s:train:0",
        "sampler",
        "sampler_weights/x",
    )


# ---- options -------------------------------------------------------------------------------------------------------


def test_options(monkeypatch):
    monkeypatch.setenv("SKYRL_SERVE_OPTIONS", "seed=5 service.max_models=7 service.folder='a b'")
    cfg = job.serve_config(
        {
            "model": {"tiny": {"hidden_size": 32}},
            "service.max_models": 9,
            "service": {"aliases": {"Qwen/Qwen3-8B": ""}, "allow_anonymous": True},
            "model.tokenizer": "it's=a, {b}",
        }
    )
    assert (cfg.seed, cfg.service.max_models, cfg.service.folder) == (5, 9, "a b")
    assert cfg.service.aliases == {"Qwen/Qwen3-8B": ""} and cfg.service.allow_anonymous
    assert cfg.model.tiny.hidden_size == 32 and cfg.model.tokenizer == "it's=a, {b}"
    assert cfg.service.model_idle_seconds == 0
    with pytest.raises(UserError, match="no such option"):
        job.serve_config({"service": {"folders": "x"}})


# ---- everything once -----------------------------------------------------------------------------------------------


def test_async_use(client):
    """As scripts of the cookbook do: coroutines, futures awaited twice, a client that is used before it is there."""

    async def script() -> tuple[float, float, list[int]]:
        model = await client.create_lora_training_client_async("tiny", rank=2)
        loss = await model.forward_backward_async(rows(0), "cross_entropy")
        step = await model.optim_step_async(ADAM)
        first, second = await loss, await loss.result_async()
        assert first is second and (await step).metrics["lr"] == 1e-2
        sampler = await model.save_weights_and_get_sampling_client_async()
        many = await asyncio.gather(*[sampler.sample_async(prompt(5), 1, draw(4, seed=i)) for i in range(4)])
        again = (await sampler.sample(prompt(5), 1, draw(4, seed=2))).sequences[0]
        assert drawn(many[2]) == [(again.tokens, again.logprobs)]
        path = (await (await model.save_state_async("a"))).path
        other = await client.create_training_client_from_state_with_optimizer_async(path)
        after = await (await other.forward_async(rows(0), "cross_entropy"))
        return first.metrics["loss:sum"], after.metrics["loss:sum"], again.tokens

    before, after, tokens = asyncio.run(script())
    assert after < before and len(tokens) == 4


def test_a_task_that_stops_waiting_withdraws_its_samples(client):
    async def script() -> None:
        sampler = await client.create_sampling_client_async(base_model="tiny")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(sampler.sample_async(prompt(5), 4, draw(4000)), 0.1)
        model = await client.create_lora_training_client_async("tiny", rank=2)
        future = model.forward_backward(rows(0), "cross_entropy")
        with pytest.raises(asyncio.TimeoutError):
            await future.result_async(timeout=1e-6)
        assert (await future).metrics["loss:sum"] > 0

    asyncio.run(script())
    with pytest.raises(TimeoutError):
        client.create_sampling_client(base_model="tiny").sample(prompt(5), 1, draw(4000)).result(timeout=0.01)


def test_questions_about_prompts_and_samples(client):
    sampler = client.create_sampling_client(base_model="tiny")
    tokens = [5, 6, 7, 8]
    targets = types.TensorData([5, 6, 7], "int64", [3, 4], [0, 1, 1, 3], [0, 1, 2])
    response = sampler.sample(
        prompt(*tokens),
        2,
        draw(3),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=2,
        topk_sample_logprobs=3,
        target_prompt_logprobs=targets,
        prompt_alt_tokens_k=2,
    ).result()
    assert len({one.sequence_id for one in response.sequences}) == 2
    assert response.prompt_logprobs[0] is None and len(response.prompt_logprobs) == 4
    assert response.topk_prompt_logprobs[0] is None and len(response.topk_prompt_logprobs[1]) == 2
    assert [len(one) for one in response.sequences[0].topk_logprobs] == [3, 3, 3]
    scored = response.target_prompt_logprobs
    assert scored.sparse_crow_indices == [0, 1, 1, 3] and scored.sparse_col_indices == [0, 1, 2]
    assert len(scored.data) == 3 and max(scored.data) < 0
    assert response.prompt_alt_tokens.tokens.to_numpy().shape == (3, 2)
    own = sampler.compute_logprobs(prompt(*tokens)).result()
    assert own == response.prompt_logprobs
    assert sampler.compute_logprobs(prompt(*tokens), 1).result()[:3] == [None] * 3
    again = tinker.SamplingClient.from_sampler_handle(sampler.get_sampler_handle())
    assert drawn(again.sample(prompt(*tokens), 2, draw(3)).result()) == drawn(response)
    assert again.get_base_model() == "tiny"


def test_records(client):
    model = client.create_lora_training_client("tiny", rank=2, user_metadata={"renderer_name": "x"}).result()
    path = model.save_state("one", user_metadata={"k": "v"}, ttl_seconds=7200).result().path
    sampled = model.save_weights_for_sampler("one").result().path
    with pytest.raises(tinker.RequestFailedError, match="exists"):
        model.save_state("one").result()
    model.save_state("one", overwrite=True).result()
    rest = tinker.RestClient()
    run = rest.get_training_run_by_tinker_path(path).result()
    assert run.training_run_id == model.model_id and run.user_metadata == {"renderer_name": "x"}
    assert run.last_checkpoint.tinker_path == path and run.last_sampler_checkpoint.tinker_path == sampled
    listed = rest.list_checkpoints(model.model_id).result().checkpoints
    assert {one.tinker_path for one in listed} == {path, sampled}
    info = rest.get_weights_info_by_tinker_path(path).result()
    assert (info.base_model, info.lora_rank, info.train_mlp) == ("tiny", 2, True)
    session = model.model_id.partition(":")[0]
    assert model.model_id in rest.get_session(session).result().training_run_ids
    assert session in rest.list_sessions().result().sessions
    assert rest.search_sessions({"display_name": "a test"}).result().sessions[0].session_id == session
    rest.publish_checkpoint_from_tinker_path(path).result()
    assert [one.public for one in rest.list_checkpoints(model.model_id).result().checkpoints if one.tinker_path == path]
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    copy = rest.copy_weights(path, "project").result()
    assert copy != path and rest.get_weights_info_by_tinker_path(copy).result() == info
    assert client.copy_weights(sampled).result().endswith("/sampler_weights/one")
    urls = rest.get_external_weights_urls(sampled).result().urls
    assert json.loads(Path(urls["adapter_config.json"].removeprefix("file://").replace("%3A", ":").replace("%25", "%"))
                      .read_text())["r"] == 2  # fmt: skip
    rest.delete_checkpoint_from_tinker_path(path).result()
    with pytest.raises(tinker.NotFoundError) as caught:
        rest.get_weights_info_by_tinker_path(path).result()
    assert caught.value.status_code == 404
    assert rest.get_current_checkpoint_storage_usage().result().data[0].checkpoint_count >= 2
    assert client.get_server_capabilities().supported_models[0].model_name == "tiny"


def test_refusals(client):
    model = client.create_lora_training_client("tiny", rank=2).result()
    with pytest.raises(tinker.RequestFailedError, match="not served here"):
        client.create_lora_training_client("other").result()
    with pytest.raises(tinker.BadRequestError, match="not served here"):
        client.create_sampling_client(base_model="other").result()
    with pytest.raises(ValueError, match="No data provided"):
        model.forward([], "cross_entropy")
    with pytest.raises(ValueError, match="model_input chunk 0 is image"):
        model.forward([types.Datum(types.ModelInput([Image()]), {"target_tokens": [1]})], "cross_entropy")
    with pytest.raises(tinker.RequestFailedError, match="at least one has to be true|trains nothing"):
        client.create_lora_training_client("tiny", train_mlp=False, train_attn=False, train_unembed=False).result()
    with pytest.raises(UserError, match="weights_access_token is not supported"):
        model.load_state("tinker://a/weights/b", "token")
    with pytest.raises(tinker.RequestFailedError, match="max_tokens=0"):
        client.create_sampling_client(base_model="tiny").sample(prompt(5), 1, draw(0)).result()
    with pytest.warns(UserWarning, match="base_url"):
        tinker.ServiceClient(base_url="http://x").close()


class Image:
    """A chunk that is no text."""

    type = "image"


def test_arrays_may_change_after_the_call(client):
    """What is sent is what was there at the call."""
    model = client.create_lora_training_client("tiny", rank=2).result()
    weights = np.ones(3, np.float32)
    targets = np.array([5, 6, 7])
    datum = types.Datum(types.ModelInput.from_ints([4, 5, 6]), {"target_tokens": targets, "weights": weights})
    expected = model.forward([datum], "cross_entropy").result()
    futures = [model.forward([datum], "cross_entropy") for _ in range(20)]
    weights[:], targets[:] = 0, 4
    assert all(future.result().metrics == expected.metrics for future in futures)
    assert all(logprobs_of(future.result())[0].tolist() == logprobs_of(expected)[0].tolist() for future in futures)


SDK_SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
import tinker as sdk
from tinker import types
from skyrl import tinker as ours
import numpy as np, torch
from inprocess import open_client
with open_client(sys.argv[1]) as client:
    model = client.create_lora_training_client("tiny", rank=2, optimizer=sdk.AdamOptimizerConfig())
    sparse = torch.zeros(6, 8, dtype=torch.int64); sparse[:, 0] = torch.arange(5, 11)
    weights = torch.zeros(6, 8); weights[:, 0] = 1.0
    found = []
    for lib in (types, ours.types):
        inputs = [{"target_tokens": list(range(5, 11)), "weights": [1.0] * 6},
                  {"target_tokens": sparse, "weights": weights}]
        data = [lib.Datum(lib.ModelInput.from_ints(list(range(4, 10))), one) for one in inputs]
        done = model.forward_backward(data, "cross_entropy").result()
        sampler = model.save_weights_and_get_sampling_client().result()
        params = lib.SamplingParams(max_tokens=4, seed=3, stop=[], temperature=0.7)
        targets = lib.TensorData(data=[5, 6], dtype="int64", shape=[2, 1])
        drawn = sampler.sample(lib.ModelInput.from_ints([5, 6, 7]), 2, params, target_prompt_logprobs=targets).result()
        found.append([done.metrics, [x["logprobs"].tolist() for x in done.loss_fn_outputs],
                      [s.tokens for s in drawn.sequences], drawn.target_prompt_logprobs.tolist()])
    model.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    assert found[0] == found[1], found
    assert model.forward_backward_custom(data, lambda d, x: (-(x[0].sum() + x[1].sum()), {})).result().metrics
    for one in ("Datum", "SamplingParams", "AdamParams", "LoraConfig"):
        a, b = getattr(types, one), getattr(ours.types, one)
        names = set(getattr(a, "model_fields", None) or a.__dataclass_fields__)
        assert names == set(b.__dataclass_fields__), one
    for one in ("ForwardBackwardOutput", "SampleResponse", "SampledSequence", "GetInfoResponse", "TrainingRun",
                "Checkpoint", "OptimStepResponse", "SaveWeightsResponse", "WeightsInfoResponse", "GetSessionResponse"):
        a, b = getattr(types, one), getattr(ours.types, one)
        names = {x for x in (getattr(a, "model_fields", None) or a.__dataclass_fields__) if x[0] != "_" and x != "type"}
        assert names == set(b.__dataclass_fields__), (one, names ^ set(b.__dataclass_fields__))
print("fine")
"""


@pytest.mark.skipif(not all(part.exists() for part in CLIENT), reason="the SDK is not here: make test-tinker brings it")
def test_the_sdks_own_objects(tmp_path):
    """Datums, tensors (sparse too) and parameters of the SDK give the same numbers; results have the same fields."""
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here.parent), str(here), *map(str, CLIENT), *sys.path[1:]])
    done = subprocess.run(
        [sys.executable, "-c", SDK_SCRIPT, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "fine", done.stderr
