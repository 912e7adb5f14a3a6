"""JSON requests: defaults, refusals by name, and which ones waste no seq_id."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from requests_made import load_weights, save_weights

from skyrl.service.codec import REQUESTS
from skyrl.service.messages import (
    AdamSettings,
    CreateModel,
    LoadWeights,
    OptimStep,
    SamplingRequest,
    SaveWeights,
    SaveWeightsExternal,
    SaveWeightsForSampler,
    UnloadModel,
)
from skyrl.types import UserError
from skyrl.web.tensors import SizeBudget

DATA = Path(__file__).parent / "data"
TURN = {"model_id": "s:train:0", "seq_id": 3}
NEW = {"session_id": "s", "model_seq_id": 1}
PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}
SAMPLE = {"sampling_session_id": "s:sample:0", "seq_id": 0, "prompt": PROMPT}


def plain(request):
    return request.model_dump(exclude={"type"})


def test_create_model():
    made = CreateModel.parse({**NEW, "base_model": "m", "lora_config": {"rank": 4, "train_mlp": False}})
    lora = made.lora_config
    assert (made.problem, lora.rank, lora.seed, made.optimizer_config.type) == ("", 4, None, "adamw")
    assert (lora.train_mlp, lora.train_attn, lora.train_unembed) == (False, True, True)
    whole = CreateModel.parse({**NEW, "base_model": "m", "user_metadata": {"a": "b\nc"}, "lora_config": None})
    assert (whole.problem, whole.lora_config.rank, whole.user_metadata) == ("", 0, {"a": "b\nc"})
    dimuon = CreateModel.parse({**NEW, "base_model": "m", "optimizer_config": {"type": "dimuon", "version": 1}})
    assert (dimuon.problem, dimuon.optimizer_config.type) == ("", "dimuon")


def test_optim_step():
    made = OptimStep.parse({**TURN, "adam_params": {}, "type": "optim_step"})
    assert (made.model_id, made.seq_id, made.adam_params, made.problem) == ("s:train:0", 3, AdamSettings(), "")
    made = OptimStep.parse({**TURN, "adam_params": {"learning_rate": 1, "grad_clip_norm": 0.5}})
    assert (made.adam_params.learning_rate, made.adam_params.grad_clip_norm, made.problem) == (1.0, 0.5, "")
    other = OptimStep.parse({**TURN, "optimizer_params": {"type": "dimuon", "learning_rate": "x"}})
    assert (other.optimizer_params.type, other.problem) == ("dimuon", "")


def test_saves():
    made = SaveWeights.parse({**TURN, "path": "000010", "overwrite": True, "ttl_seconds": 3600})
    assert plain(made) == plain(save_weights("s:train:0", 3, "weights", "000010", ttl_seconds=3600, overwrite=True))
    named = SaveWeightsForSampler.parse({**TURN, "path": "final", "user_metadata": {"a": "b"}})
    assert plain(named) == plain(save_weights("s:train:0", 3, "sampler_weights", "final", user_metadata={"a": "b"}))
    for kind in ("snapshot", "inflight"):
        made = SaveWeightsForSampler.parse({**TURN, "sampling_session_seq_id": 2, "kind": kind})
        assert (made.name, made.kind, made.sampling_session_seq_id, made.problem) == (None, "sampler_weights", 2, "")
    out = SaveWeightsExternal.parse({**TURN, "path": "out", "age_encryption_recipients": ["age1x"]})
    assert plain(out) == plain(save_weights("s:train:0", 3, "external_weights", "out", age_recipients=["age1x"]))


def test_loads_and_unload():
    path = "tinker://s:train:0/weights/a"
    made = LoadWeights.parse({**NEW, "path": path, "optimizer": False, "user_metadata": {"k": "v"}})
    assert made == load_weights(path, False, session_id="s", model_seq_id=1, user_metadata={"k": "v"})
    into = LoadWeights.parse({**TURN, "path": path, "optimizer": True, "session_id": None})
    assert into == load_weights(path, True, model_id="s:train:0", seq_id=3)
    assert LoadWeights.parse({**TURN, "path": path}).optimizer, "release 0.3.0 resumes whole states"
    assert UnloadModel.parse({"model_id": "m", "type": "unload_model"}) == UnloadModel(model_id="m")


def test_sample_defaults_and_stops():
    made = SamplingRequest.parse(SAMPLE)
    params = made.sampling_params
    assert (made.problem, params.stop, params.max_tokens, params.temperature, params.top_k) == ("", None, None, 1.0, -1)
    assert (made.num_samples, made.prompt_logprobs, made.targets) == (1, False, None)
    for given, wanted in (("a", ("a",)), ([], ()), (["a", "b"], ("a", "b")), ([1, 2], (1, 2)), (None, None)):
        assert SamplingRequest.parse({**SAMPLE, "sampling_params": {"stop": given}}).sampling_params.stop == wanted
    old = SamplingRequest.parse({"base_model": "m", "prompt": PROMPT})
    assert (old.problem, old.seq_id, old.base_model, old.sampling_session_id) == ("", -1, "m", None)
    assert SamplingRequest.parse({**SAMPLE, "seq_id": 10**18 + 3}).seq_id == 10**18 + 3
    assert SamplingRequest.parse({**SAMPLE, "record_stability_info": False, "prompt_logprobs": None}).problem == ""


def test_sample_targets_dense_and_sparse():
    dense = {"data": [1, -1, 2, 3], "dtype": "int64", "shape": [2, 2]}
    made = SamplingRequest.parse({**SAMPLE, "target_prompt_logprobs": dense})
    assert made.problem == "" and made.targets.tolist() == [[1, -1], [2, 3]] and made.targets_csr is None
    cells = {"data": [9, 8], "dtype": "int64", "shape": [2, 3], "sparse_crow_indices": [0, 2, 2]}
    made = SamplingRequest.parse({**SAMPLE, "target_prompt_logprobs": {**cells, "sparse_col_indices": [0, 2]}})
    assert made.targets.tolist() == [[9, -1, 8], [-1, -1, -1]], "cells that are not named ask for nothing"
    assert [part.tolist() for part in made.targets_csr] == [[0, 2, 2], [0, 2]]
    wide = {**cells, "shape": [2, 2**31 - 1], "sparse_col_indices": [0, 2]}
    assert (
        "may take"
        in SamplingRequest.parse({**SAMPLE, "target_prompt_logprobs": wide}, budget=SizeBudget(1 << 20)).problem
    )


def lora(**more) -> dict:
    return {**NEW, "base_model": "m", "lora_config": {"rank": 4, **more}}


def adam(**more) -> dict:
    return {**TURN, "adam_params": more}


def sampling(**more) -> dict:
    return {**SAMPLE, "sampling_params": more}


@pytest.mark.parametrize(
    ("operation", "body", "words"),
    [
        ("create_model", lora(alpha=3), "create_model: lora_config has fields that this server does not know: 'alpha'"),
        ("create_model", {**lora(), "colour": 1}, "create_model has fields that this server does not know: 'colour'"),
        ("create_model", lora(rank=-1), "create_model: lora_config.rank=-1; allowed: 0 or more"),
        ("create_model", lora(rank=True), "lora_config.rank=True"),
        ("create_model", lora(rank=None), "lora_config.rank is missing"),
        ("create_model", lora(seed=2**64), "lora_config.seed=an integer beyond 64 bits"),
        ("create_model", lora(train_mlp=1), "lora_config.train_mlp=1; allowed: true or false"),
        ("create_model", lora(train_mlp=False, train_attn=False, train_unembed=False), "trains nothing"),
        ("create_model", NEW, "create_model: base_model is missing"),
        ("create_model", {**lora(), "type": "sample"}, "type='sample'; allowed: 'create_model'"),
        ("create_model", {**lora(), "user_metadata": {"a": 1}}, "user_metadata.a=1; allowed: a string"),
        ("create_model", {**lora(), "optimizer_config": {"type": "adamw", "x": 1}}, "optimizer_config has fields"),
        ("optim_step", adam(learning_rate=float("nan")), "adam_params.learning_rate=nan; allowed: a finite number"),
        ("optim_step", adam(learning_rate="1"), "adam_params.learning_rate='1'"),
        ("optim_step", adam(eps=10**400), "adam_params.eps=an integer beyond 64 bits"),
        ("optim_step", adam(beta3=0.5), "optim_step: adam_params has fields that this server does not know: 'beta3'"),
        ("optim_step", TURN, "one of adam_params and optimizer_params"),
        ("optim_step", {**adam(), "optimizer_params": {"type": "dimuon"}}, "one of adam_params and optimizer_params"),
        ("optim_step", {**TURN, "optimizer_params": {}}, "optimizer_params.type is missing"),
        ("save_weights", TURN, "save_weights: path is missing"),
        ("save_weights", {**TURN, "path": "../x"}, "save_weights: path='../x'; allowed: a name"),
        ("save_weights", {**TURN, "path": "a/b"}, "path='a/b'"),
        ("save_weights", {**TURN, "path": ".."}, "path='..'"),
        ("save_weights", {**TURN, "path": "a\x00"}, "control characters"),
        ("save_weights", {**TURN, "path": "a", "ttl_seconds": 5}, "ttl_seconds=5; allowed: 3600 or more"),
        ("save_weights_for_sampler", TURN, "one of path and sampling_session_seq_id"),
        ("save_weights_for_sampler", {**TURN, "path": "a", "sampling_session_seq_id": 1}, "one of path"),
        ("save_weights_for_sampler", {**TURN, "path": "a", "kind": "other"}, "kind='other'; allowed: 'snapshot' or"),
        ("save_weights_external", {**TURN, "path": "a", "age_encryption_recipients": [3]}, "recipients[0]=3"),
        ("save_weights_external", {**TURN, "path": "a", "overwrite": True}, "does not know: 'overwrite'"),
        ("load_weights", {**TURN, "path": "a", "weights_access_token": "t"}, "token, which is not supported"),
        ("load_weights", {**TURN, "optimizer": True}, "load_weights: path is missing"),
        ("load_weights", {**TURN, "path": "a", "optimizer": "yes"}, "optimizer='yes'; allowed: true or false"),
        ("asample", sampling(min_p=0.1), "sample: sampling_params has fields that this server does not know: 'min_p'"),
        ("asample", sampling(temperature=float("inf")), "sampling_params.temperature=inf"),
        ("asample", sampling(max_tokens=1.5), "sampling_params.max_tokens=1.5"),
        ("asample", sampling(top_k=-2), "sampling_params.top_k=-2; allowed: -1 or more"),
        ("asample", sampling(stop=["a", 1]), "sampling_params.stop=a list of 2"),
        ("asample", sampling(stop=[True]), "sampling_params.stop=a list of 1"),
        ("asample", sampling(stop=7), "sampling_params.stop=7"),
        ("asample", sampling(stop=["a"] * 2000), "sampling_params.stop=a list of 2000"),
        ("asample", {**SAMPLE, "num_samples": 0}, "sample: num_samples=0; allowed: 1 or more"),
        ("asample", {**SAMPLE, "num_samples": 10**9}, "sample: num_samples=1000000000"),
        ("asample", {**SAMPLE, "beam": 2}, "sample has fields that this server does not know: 'beam'"),
        (
            "asample",
            {
                **{key: item for key, item in SAMPLE.items() if key != "sampling_session_id"},
                "base_model": "b",
                "record_stability_info": True,
            },
            "record_stability_info without sampling_session_id",
        ),
        ("asample", {**SAMPLE, "prompt": None}, "sample: prompt is missing"),
        ("asample", {**SAMPLE, "prompt": {"chunks": [{"type": "image"}]}}, "sample: prompt.chunks[0] is 'image'"),
        ("asample", {**SAMPLE, "target_prompt_logprobs": {"data": [1], "dtype": "float32"}}, "allowed: int64 of two"),
    ],
)
def test_wrong_content_fails_through_the_future(operation, body, words):
    made = REQUESTS[operation].parse(body)
    assert words in made.problem and "\n" not in made.problem, made.problem


NOTHING = [None, False, 0, 0.0, "", [], {}]
WHOLE = {
    "create_model": {**NEW, "base_model": "m", "lora_config": {"rank": 4}, "optimizer_config": {"type": "adamw"}},
    "optim_step": {**TURN, "adam_params": {}},
    "save_weights": {**TURN, "path": "a"},
    "save_weights_for_sampler": {**TURN, "path": "a"},
    "save_weights_external": {**TURN, "path": "a"},
    "load_weights": {**TURN, "path": "a"},
    "unload_model": {"model_id": "m"},
    "asample": {
        **SAMPLE,
        "sampling_params": {},
        "target_prompt_logprobs": {"data": [1, 2], "dtype": "int64", "shape": [2, 1]},
    },
}


def places(value):
    """Every JSON object in a value, itself included."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from places(item)


@pytest.mark.parametrize("operation", REQUESTS)
def test_unknown_fields_that_say_nothing_are_accepted_everywhere(operation):
    """A later release of the client sends new fields with their defaults in every call."""
    plainly = REQUESTS[operation].parse(WHOLE[operation])
    assert getattr(plainly, "problem", "") == ""
    for number in range(len(list(places(WHOLE[operation])))):
        body = json.loads(json.dumps(WHOLE[operation]))
        place = list(places(body))[number]
        for value in NOTHING:
            place.update(a_new_one=value, problem=value, stream=value)
            made = REQUESTS[operation].parse(body)
            assert repr(made) == repr(plainly), (number, value)
        for value in (True, 1, -1, 0.5, "x", [None], [0], {"a": None}, float("nan")):
            place["a_new_one"] = value
            try:
                problem = REQUESTS[operation].parse(body).problem
            except UserError as error:
                problem = str(error)
            assert "does not know: 'a_new_one'" in problem and "\n" not in problem, (number, value)


@pytest.mark.parametrize("operation", REQUESTS)
@pytest.mark.parametrize("body", [None, [], "x", 3, {}, {"model_id": ""}, {"model_id": "m", "seq_id": None}])
def test_requests_without_identity_are_refused_at_once(operation, body):
    if operation == "unload_model" and body == {"model_id": "m", "seq_id": None}:
        assert UnloadModel.parse(body) == UnloadModel(model_id="m")
        return
    with pytest.raises(UserError) as caught:
        REQUESTS[operation].parse(body)
    assert "\n" not in str(caught.value)


def test_unclear_addresses_are_refused_at_once():
    with pytest.raises(UserError, match="needs one of model_id"):
        LoadWeights.parse({**TURN, **NEW, "path": "a", "optimizer": True})
    with pytest.raises(UserError, match="seq_id is missing"):
        SamplingRequest.parse({"sampling_session_id": "s", "prompt": PROMPT})
    with pytest.raises(UserError, match="does not know: 'x'"):
        UnloadModel.parse({"model_id": "m", "x": 1})


JUNK = [None, True, -1, 2**31, 2**63, 10**400, 1.5, float("nan"), "", "x" * 5000, "\ud800", "a\nb", [], [[]], [None],
        {}, {"type": []}, {"a": {"b": []}}]  # fmt: skip


@pytest.mark.parametrize("release", ["0.3.0", "0.38.0"])
def test_junk_in_any_place_gives_a_request_or_a_user_error(release):
    bodies = json.loads((DATA / f"requests_{release}.json").read_text())
    draw = random.Random(release)
    for operation, body in bodies.items():
        problems = 0
        for _ in range(400):
            damaged = json.loads(json.dumps(body))
            place = damaged
            while True:
                key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
                if isinstance(place[key], (dict, list)) and place[key] and draw.random() < 0.7:
                    place = place[key]
                    continue
                place[key] = draw.choice(JUNK)
                break
            try:
                made = REQUESTS[operation].parse(damaged)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 400
            else:
                assert "\n" not in made.problem and len(made.problem) < 400
                problems += bool(made.problem)
        assert problems > 20


def test_long_prompts_are_quick():
    tokens = list(range(200_000))
    made = SamplingRequest.parse({**SAMPLE, "prompt": {"chunks": [{"tokens": tokens}]}})
    np.testing.assert_array_equal(made.prompt, tokens)


def test_a_null_among_the_optimizers_numbers_is_a_nan_that_json_lost():
    request = OptimStep.parse({"model_id": "m", "seq_id": 1, "adam_params": {"learning_rate": None}})
    assert "adam_params has 'learning_rate': null (a NaN?)" in request.problem
