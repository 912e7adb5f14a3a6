"""Steps of drive.py: models, losses and optimizer steps."""

from __future__ import annotations

import numpy as np
import tinker
import torch
from driving import (
    PROMPT,
    Run,
    Skip,
    adam,
    clear,
    datum,
    floats,
    learn_rows,
    logprobs_of,
    loss_of,
    policy_rows,
    step,
    takes,
    tensor,
    text_input,
    texts,
    wait,
)
from tinker import types

# ---- models -------------------------------------------------------------------------------------------------------


@step
def session(run: Run) -> dict:
    capabilities = wait(run.service.get_server_capabilities())
    return {"models": [m.model_name for m in capabilities.supported_models]}


@step
def create(run: Run) -> dict:
    run.model = run.train(seed=7, user_metadata={"renderer_name": "qwen3"})
    info = run.model.get_info()
    data = info.model_data
    return {
        "model_id": info.model_id,
        "model_name": data.model_name,
        "arch": data.arch,
        "is_lora": getattr(info, "is_lora", None),
        "lora_rank": getattr(info, "lora_rank", None),
        "tokenizer_id": getattr(data, "tokenizer_id", None),
    }


@step
def tokenizer(run: Run) -> dict:
    run.tokenizer = run.model.get_tokenizer()
    return {"entries": len(run.tokenizer), "round": run.tokenizer.decode(run.ids(PROMPT)), "text": PROMPT}


@step
def same_seed(run: Run) -> dict:
    """A fresh adapter is the base; a seed fixes the start: one step from the same seed gives the same weights."""
    rows = [datum(ids, weights=floats(np.ones(len(ids) - 1))) for ids in texts(run)]
    seen = []
    for seed in (5, 5, 6):
        model = run.train(seed=seed)
        fresh = logprobs_of(wait(model.forward(rows, "cross_entropy")))
        wait(model.forward_backward(rows, "cross_entropy"))
        wait(model.optim_step(adam(1e-2)))
        seen.append((fresh, logprobs_of(wait(model.forward(rows, "cross_entropy")))))
    base = seen[0][0]

    def equal(a: list, b: list) -> bool:
        return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

    return {
        "fresh_equal": all(equal(base, fresh) for fresh, _ in seen),
        "seed_equal": equal(seen[0][1], seen[1][1]),
        "seeds_differ": not equal(seen[0][1], seen[2][1]),
    }


# ---- losses -------------------------------------------------------------------------------------------------------


@step
def forward(run: Run) -> dict:
    rows = [datum(ids, weights=floats(np.ones(len(ids) - 1))) for ids in texts(run)]
    result = wait(run.model.forward(rows, "cross_entropy"))
    run.base_logprobs = logprobs_of(result)
    return {
        "lengths_right": [len(x) for x in run.base_logprobs] == [len(ids) - 1 for ids in texts(run)],
        "loss_error": loss_of(result) + sum(x.sum() for x in run.base_logprobs),
        "mean_logprob": float(np.concatenate(run.base_logprobs).mean()),
        "one_colon": all(name.count(":") == 1 for name in result.metrics),
    }


@step
def forward_keeps_gradient(run: Run) -> dict:
    """After a forward alone there is nothing to step on."""
    rows = [datum(ids, weights=floats(np.ones(len(ids) - 1))) for ids in texts(run)]
    model = run.train(seed=5)
    wait(model.forward(rows, "cross_entropy"))
    wait(model.optim_step(adam(1e-2)))
    after = logprobs_of(wait(model.forward(rows, "cross_entropy")))
    return {"equal": all(np.array_equal(x, y) for x, y in zip(run.base_logprobs, after, strict=True))}


def policy_loss(name: str, now: np.ndarray, old: np.ndarray, a: np.ndarray, config: dict) -> float:
    """The protocol's formulas, summed over one row. gspo: the mask is all ones."""
    ratio = np.exp(now - old)
    low = config.get("clip_low_threshold", 0.0 if name == "cispo" else 0.8)
    high = config.get("clip_high_threshold", 4.0 if name == "cispo" else 1.2)
    if name == "importance_sampling":
        return -(ratio * a).sum()
    if name == "ppo":
        return -np.minimum(ratio * a, np.clip(ratio, low, high) * a).sum()
    if name == "cispo":
        return -(np.clip(ratio, low, high) * now * a).sum()
    if name == "dro":
        return -(now * a - 0.5 * config["beta"] * (now - old) ** 2).sum()
    assert name == "gspo"
    ratio = np.exp((now - old).mean()) * np.ones_like(a)
    return -np.minimum(ratio * a, np.clip(ratio, low, high) * a).sum()


CONFIGS: dict[str, list[dict]] = {
    "importance_sampling": [{}],
    "ppo": [{}, {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}],
    "cispo": [{}, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}],
    "dro": [{"beta": 0.05}],
    "gspo": [{"clip_low_threshold": 0.99, "clip_high_threshold": 1.01}],
}


@step
def policy_losses(run: Run) -> dict:
    """Error of loss:sum against the formula on the returned log-probs, per loss and config this release can name."""
    allowed = set(types.LossFnType.__args__)
    errors: dict[str, float] = {}
    for name, configs in CONFIGS.items():
        if name not in allowed:
            continue
        for config in configs:
            more = {"sequence_ratio_mask": lambda n: floats(np.ones(n))} if name == "gspo" else {}
            rows, olds, advantages = policy_rows(run, **more)
            result = wait(run.model.forward_backward(rows, name, loss_fn_config=config or None))
            now = logprobs_of(result)
            expected = sum(policy_loss(name, n, o, a, config) for n, o, a in zip(now, olds, advantages, strict=True))
            errors[f"{name}{sorted(config.values()) if config else ''}"] = abs(loss_of(result) - expected)
    clear(run.model)
    return {"errors": errors}


@step
def per_token_thresholds(run: Run) -> dict:
    """Thresholds as inputs: in older releases too, since inputs are a free map."""
    rows, olds, advantages = policy_rows(
        run,
        clip_low_threshold=lambda n: floats(np.linspace(0.7, 0.95, n)),
        clip_high_threshold=lambda n: floats(np.linspace(1.3, 1.05, n)),
    )
    result = wait(run.model.forward_backward(rows, "ppo"))
    expected = 0.0
    for now, old, a in zip(logprobs_of(result), olds, advantages, strict=True):
        config = {
            "clip_low_threshold": np.linspace(0.7, 0.95, len(now)).astype(np.float32),
            "clip_high_threshold": np.linspace(1.3, 1.05, len(now)).astype(np.float32),
        }
        expected += policy_loss("ppo", now, old, a, config)
    clear(run.model)
    return {"error": abs(loss_of(result) - expected)}


@step
def weights_of_every_kind(run: Run) -> dict:
    """Negative, zero and missing weights of cross_entropy."""
    facts = {}
    for name, make in {"negative": lambda n: -np.ones(n), "ramp": lambda n: np.linspace(-1, 2, n)}.items():
        rows = [datum(ids, weights=floats(make(len(ids) - 1))) for ids in texts(run)]
        result = wait(run.model.forward_backward(rows, "cross_entropy"))
        used = [make(len(x)).astype(np.float32) for x in run.base_logprobs]
        facts[name] = abs(loss_of(result) + sum((w * x).sum() for w, x in zip(used, logprobs_of(result), strict=True)))
    result = wait(run.model.forward_backward([datum(ids) for ids in texts(run)], "cross_entropy"))
    facts["missing"] = abs(loss_of(result) + sum(x.sum() for x in logprobs_of(result)))
    clear(run.model)
    return {"errors": facts}


@step
def many_targets(run: Run) -> dict:
    """N x K targets; column 0 is the text itself."""
    ids = texts(run)[0]
    n, k = len(ids) - 1, 3
    targets = np.stack([ids[1:], np.arange(n) + 5, np.full(n, 9)], axis=1)
    weights = np.random.default_rng(1).uniform(-0.2, 1, (n, k)).astype(np.float32)
    row = types.Datum(
        model_input=text_input(ids[:-1]),
        loss_fn_inputs={"target_tokens": tensor(targets, np.int64), "weights": floats(weights)},
    )
    result = wait(run.model.forward_backward([row], "cross_entropy"))
    clear(run.model)
    out = result.loss_fn_outputs[0]["logprobs"]
    now = np.asarray(out.data, np.float64).reshape(n, k) if out.shape is None else logprobs_of(result)[0]
    return {
        "shape_right": list(np.shape(now)) == [n, k],
        "column_error": float(np.abs(now[:, 0] - run.base_logprobs[0]).max()),
        "loss_error": abs(loss_of(result) + float((weights * now).sum())),
    }


@step
def sparse_targets(run: Run) -> dict:
    """CSR targets and weights: absent cells count as token 0 with weight 0."""
    if not hasattr(types.TensorData, "from_torch_sparse"):
        raise Skip(f"{tinker.__version__} has no sparse tensors")
    ids = texts(run)[0]
    n = len(ids) - 1
    targets = torch.zeros((n, 4), dtype=torch.int64)
    weights = torch.zeros((n, 4))
    targets[:, 1] = torch.tensor(ids[1:])
    weights[:, 1] = 0.5
    targets[n // 2, 3], weights[n // 2, 3] = 11, -0.25
    sparse = types.Datum(
        model_input=text_input(ids[:-1]), loss_fn_inputs={"target_tokens": targets, "weights": weights}
    )
    dense = types.Datum(
        model_input=text_input(ids[:-1]),
        loss_fn_inputs={"target_tokens": tensor(targets, np.int64), "weights": floats(weights)},
    )
    went_sparse = sparse.loss_fn_inputs["target_tokens"].sparse_crow_indices is not None
    one, other = (wait(run.model.forward_backward([row], "cross_entropy")) for row in (sparse, dense))
    clear(run.model)
    return {
        "went_sparse": went_sparse,
        "equal": bool(np.array_equal(logprobs_of(one)[0], logprobs_of(other)[0])),
        "loss_difference": abs(loss_of(one) - loss_of(other)),
    }


@step
def custom_loss(run: Run) -> dict:
    """A Python loss of the log-probs: its value comes back, and its gradient is what cross entropy would have made."""

    def half_squares(data: list, logprobs: list) -> tuple:
        loss = sum((x**2).sum() for x in logprobs) / 2
        return loss, {"tokens:sum": float(sum(len(x) for x in logprobs))}

    rows = [datum(ids, weights=floats(np.ones(len(ids) - 1))) for ids in texts(run)]
    model = run.train(seed=5)
    result = wait(model.forward_backward_custom(rows, half_squares))
    wait(model.optim_step(adam(1e-2)))
    custom = logprobs_of(wait(model.forward(rows, "cross_entropy")))
    twin = run.train(seed=5)  # the same gradient by hand: dC/dl = l, so weights = -l
    linear = [datum(ids, weights=floats(-x)) for ids, x in zip(texts(run), run.base_logprobs, strict=True)]
    wait(twin.forward_backward(linear, "cross_entropy"))
    wait(twin.optim_step(adam(1e-2)))
    direct = logprobs_of(wait(twin.forward(rows, "cross_entropy")))
    value = sum((x**2).sum() for x in run.base_logprobs) / 2
    return {
        "metric": float(result.metrics["tokens:sum"]),
        "tokens": sum(len(x) for x in run.base_logprobs),
        "value_error": abs(loss_of(result) - value) / value,
        "equal": max(float(np.abs(x - y).max()) for x, y in zip(custom, direct, strict=True)),
    }


# ---- steps --------------------------------------------------------------------------------------------------------


@step
def learn(run: Run) -> dict:
    """Eight steps, all posted before any is awaited."""
    run.learner = run.train(seed=1, user_metadata={"purpose": "learn"})
    futures = []
    for _ in range(8):
        futures.append(run.learner.forward_backward(learn_rows(run), "cross_entropy"))
        futures.append(run.learner.optim_step(adam(2e-2)))
    results = [wait(future) for future in futures]
    return {"losses": [loss_of(result) for result in results[::2]], "step_metrics": dict(results[1].metrics or {})}


@step
def accumulate(run: Run) -> dict:
    """Two calls and one step equal one call with both halves and one step; clipping shows in the norm's metric."""
    rows = learn_rows(run)
    weights = []
    for parts in ([rows], [rows[:1], rows[1:]]):
        model = run.train(seed=2)
        for part in parts:
            wait(model.forward_backward(part, "cross_entropy"))
        wait(model.optim_step(adam(1e-2)))
        weights.append(logprobs_of(wait(model.forward(rows, "cross_entropy"))))
    difference = max(float(np.abs(x - y).max()) for x, y in zip(*weights, strict=True))
    return {"difference": difference}


@step
def clipping(run: Run) -> dict:
    """With eps large beside the gradient AdamW's first step is proportional to it, so a clip to 1e-3 shows."""
    if not takes(types.AdamParams, "grad_clip_norm"):
        raise Skip(f"{tinker.__version__} cannot clip")
    moved = []
    for clip in (0.0, 1e-3):
        model = run.train(seed=2)
        before = logprobs_of(wait(model.forward(learn_rows(run), "cross_entropy")))
        wait(model.forward_backward(learn_rows(run), "cross_entropy"))
        params = types.AdamParams(learning_rate=1.0, beta1=0.0, beta2=0.0, eps=1e3, grad_clip_norm=clip)
        wait(model.optim_step(params))
        after = logprobs_of(wait(model.forward(learn_rows(run), "cross_entropy")))
        moved.append(max(float(np.abs(x - y).max()) for x, y in zip(before, after, strict=True)))
    return {"free": moved[0], "clipped": moved[1]}
