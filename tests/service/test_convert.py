"""From wire requests to engine rows, losses, draws; every refusal names what is wrong, and nothing bad gets through."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from requests_made import optim_step, sampling_request

from skyrl.service.messages import OptimStep, RequestFailed, ServerInfo, TrainRequest, WireDatum
from skyrl.service.validation import adam_params, check_prompt, loss_spec, sampling_params, served_losses, to_rows
from skyrl.web.tensors import Tensor

FACTS = ServerInfo({"m": Path("m")}, "m", "m", False, "qwen3", 16, 50, (2,), adaptable=True)


def f32(*values):
    return np.array(values, np.float32)


def ints(*values):
    return np.array(values, np.int64)


def request(loss="cross_entropy", tokens=(1, 2, 3), config=None, **inputs):
    inputs = {"target_tokens": ints(2, 3, 4), **inputs}
    data = [WireDatum(ints(*tokens), {k: v for k, v in inputs.items() if v is not None})]
    return TrainRequest("s:train:0", 1, data, loss, config or {}, False)


def policy(loss, **inputs):
    return request(loss, **{"logprobs": f32(-1, -2, -3), "advantages": f32(0, 1, -1), **inputs})


def rows_of(one):
    loss_spec(one)
    return to_rows(one, FACTS, max_tokens=100)


def test_cross_entropy_rows():
    (row,) = rows_of(request(weights=f32(0, 1, -2)))
    assert row.weights.tolist() == [0, 1, -2] and row.model == "s:train:0" and row.name == "datum 0"
    (row,) = rows_of(request())
    assert row.weights.tolist() == [1, 1, 1]
    many = request(target_tokens=ints(1, 2, 3, 4, 5, 6).reshape(3, 2), weights=f32(*range(6)).reshape(3, 2))
    (row,) = rows_of(many)
    assert row.targets.shape == row.weights.shape == (3, 2)


def test_policy_rows_train_where_the_advantage_is_not_zero_and_dro_everywhere():
    (row,) = rows_of(policy("ppo"))
    assert row.weights.tolist() == [0, 1, 1] and row.sampling_logprobs.tolist() == [-1, -2, -3]
    (row,) = rows_of(policy("dro"))
    assert row.weights.tolist() == [1, 1, 1]
    (row,) = rows_of(policy("gspo", sequence_ratio_mask=f32(0, 1, 1)))
    assert row.ratio_mask.tolist() == [0, 1, 1]
    (row,) = rows_of(policy("cispo", clip_low_threshold=f32(0.5, 0.5, 0.9), clip_high_threshold=f32(2, 3, 4)))
    assert row.clip_low.tolist() == pytest.approx([0.5, 0.5, 0.1]) and row.clip_high.tolist() == [1, 2, 3]


@pytest.mark.parametrize("high", [1e6, 1e7, 1e30, 1e300, math.inf])
@pytest.mark.parametrize("loss", ["ppo", "cispo", "gspo"])
def test_thresholds_that_clip_nothing_are_legal(loss, high):
    for low in (0.0, -math.inf):
        spec = loss_spec(policy(loss, config={"clip_low_threshold": low, "clip_high_threshold": high}))
        assert spec.params["clip_high"] == high - 1.0 and spec.params["clip_low"] == 1.0 - low
    per_token = f32(2, min(high, 3e38), np.inf)
    (row,) = rows_of(policy(loss, clip_high_threshold=per_token, clip_low_threshold=f32(0, 0.5, -np.inf)))
    assert row.clip_high.tolist() == (per_token - 1).tolist() and row.clip_low[2] == np.inf


def test_thresholds_become_the_losses_parameters():
    assert loss_spec(policy("ppo")).params == pytest.approx({"clip_low": 0.2, "clip_high": 0.2})
    assert loss_spec(policy("cispo")).params == pytest.approx({"clip_low": 1.0, "clip_high": 3.0})
    own = loss_spec(policy("ppo", config={"clip_low_threshold": 0.9, "clip_high_threshold": 1.5}))
    assert own.params == pytest.approx({"clip_low": 0.1, "clip_high": 0.5})
    assert loss_spec(policy("dro", config={"beta": 0.2})).params == {"beta": 0.2}
    assert set(served_losses()) == {"cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo"}


BAD = {
    "unknown loss": (request("no_such"), "loss_fn 'no_such' is not known"),
    "not public": (
        request("stable_reinforce"),
        "not public; use .* cookbook: loss_fn=cispo.*service.loss_substitutes",
    ),
    "custom": (request("custom"), "custom losses are off"),
    "config of another loss": (request(config={"beta": 1.0}), "'beta' does not apply to cross_entropy; allowed: none"),
    "config text": (policy("ppo", config={"clip_low_threshold": "low"}), "clip_low_threshold='low': needs a number"),
    "config inf": (policy("dro", config={"beta": float("inf")}), "beta=inf: needs a finite number"),
    "thresholds below 0": (policy("ppo", config={"clip_low_threshold": -1.0}), "0 <= low <= high"),
    "threshold nan": (
        policy("ppo", config={"clip_high_threshold": float("nan")}),
        "high_threshold=nan: needs a number",
    ),
    "thresholds nan": (policy("ppo", clip_high_threshold=f32(1, np.nan, 1)), "clip_high_threshold is not a number"),
    "config nan": (policy("dro", config={"beta": float("nan")}), "needs a finite number"),
    "thresholds crossed": (policy("ppo", config={"clip_low_threshold": 2.0}), "0 <= low <= high"),
    "negative beta": (policy("dro", config={"beta": -1.0}), "allowed: 0 or more"),
    "no targets": (request(target_tokens=None), "no target_tokens"),
    "no advantages": (policy("ppo", advantages=None), "no advantages"),
    "input of another loss": (request(logprobs=f32(1, 2, 3)), "'logprobs' does not apply"),
    "mask": (policy("ppo", mask=f32(1, 1, 1)), "'mask' does not apply"),
    "long row": (request(tokens=[1] * 17), "17 tokens; allowed: 1 to 16"),
    "no tokens": (request(tokens=[]), "0 tokens"),
    "token too large": (request(tokens=(1, 2, 50)), "token 50 is not in the vocabulary"),
    "negative token": (request(tokens=(1, -2, 3)), "token -2 is not in the vocabulary"),
    "target too large": (request(target_tokens=ints(1, 2, 99)), "token 99"),
    "ragged": (request(target_tokens=ints(1, 2)), r"shape \[2\], the input has 3 tokens"),
    "float targets": (request(target_tokens=f32(1, 2, 3)), "has to be int64"),
    "many targets for ppo": (policy("ppo", target_tokens=ints(1, 2, 3, 4, 5, 6).reshape(3, 2)), r"allowed: \[3\]"),
    "no targets at all": (request(target_tokens=np.zeros((3, 0), np.int64)), "shape"),
    "weights of another shape": (request(weights=f32(1, 2)), "they have to be equal"),
    "nan weight": (request(weights=f32(1, np.nan, 1)), "not finite"),
    "huge advantage": (policy("ppo", advantages=f32(1, 1e30, 1)), "at most 1e"),
    "no data": (TrainRequest("m", 1, [], "cross_entropy", {}, False), "without data"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name):
    bad, text = BAD[name]
    with pytest.raises(RequestFailed, match=text) as refused:
        rows_of(bad)
    assert refused.value.category == "user" and "\n" not in refused.value.message


def test_a_request_with_too_many_tokens_is_refused():
    with pytest.raises(RequestFailed, match="3 tokens in one request, at most 2"):
        to_rows(request(), FACTS, max_tokens=2)


def test_adam():
    adam = adam_params(optim_step("m", 1, learning_rate=0.1, grad_clip_norm=2.0))
    assert (adam.lr, adam.beta1, adam.beta2, adam.eps, adam.weight_decay, adam.grad_clip_norm) == (
        0.1, 0.9, 0.95, 1e-12, 0.0, 2.0,
    )  # fmt: skip
    for bad in ({"learning_rate": -1.0}, {"beta1": 1.0}, {"eps": float("inf")}):
        with pytest.raises(RequestFailed):
            adam_params(optim_step("m", 1, **bad))


@pytest.mark.parametrize(("given", "meant"), [(1e6, 1e6), (1e7, 1e7), (1e300, 1e300), (math.inf, 0.0), (0, 0.0)])
def test_a_norm_that_clips_nothing_is_legal(given, meant):
    body = json.loads(json.dumps({"model_id": "m", "seq_id": 1, "adam_params": {"grad_clip_norm": given}}))
    step = OptimStep.parse(body)
    assert step.problem == "" and adam_params(step).grad_clip_norm == meant
    body["adam_params"]["grad_clip_norm"] = math.nan
    assert "grad_clip_norm=nan; allowed: a number, 0 or infinity = no clipping" in OptimStep.parse(body).problem


def test_another_optimizer_is_refused():
    with pytest.raises(RequestFailed, match="'dimuon' is refused"):
        adam_params(OptimStep.parse({"model_id": "m", "seq_id": 1, "optimizer_params": {"type": "dimuon"}}))


def query(**more):
    return sampling_request(**{"seq_id": 0, "prompt": ints(1, 2, 3), "max_tokens": 4, **more})


def test_stops():
    def params(stop):
        (one,) = sampling_params(query(stop=stop), FACTS, "key")
        return one.stop, one.stop_token_ids

    assert params(None) == ((), (2,))
    assert params(()) == ((), ())
    assert params(("\n", "end")) == (("\n", "end"), (2,))
    assert params((7, 8)) == ((), (7, 8))


def test_seeds_are_keyed_by_request_and_sample():
    def seeds(key, **more):
        return [one.seed for one in sampling_params(query(num_samples=3, **more), FACTS, key)]

    assert len(set(seeds("a"))) == 3 and seeds("a") == seeds("a") and not set(seeds("a")) & set(seeds("b"))
    assert seeds("a", seed=5) == seeds("b", seed=5) != seeds("a", seed=6)
    (one,) = sampling_params(query(max_tokens=None), FACTS, "k")
    assert one.max_tokens == 13 and one.top_k == 0


def test_queries_that_are_refused():
    bad = [
        {"prompt": ints()},
        {"prompt": ints(*[1] * 16)},
        {"prompt": ints(1, 60)},
        {"max_tokens": 14},
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"stop": ("",)},
        {"stop": (50,)},
        {"topk_sample_logprobs": 51},
        {"target_tokens": Tensor(np.zeros((3, 1), np.int64))},
        {"target_tokens": Tensor(np.full((2, 1), 50))},
    ]
    for one in bad:
        with pytest.raises(RequestFailed):
            sampling_params(query(**one), FACTS, "k")
    check_prompt(query(target_tokens=Tensor(np.full((2, 3), -1))), FACTS)
