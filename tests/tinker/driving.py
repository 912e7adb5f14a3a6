"""What the steps of drive.py share: a run's state, rows, and one way to wait, to draw and to fail."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import tinker
from tinker import types

STEPS: list[tuple[str, Callable[[Any], dict | None]]] = []
RELEASE = tuple(int(part) for part in tinker.__version__.split("."))
PROMPT = "What is 12 + 30?\n"
WAIT = 90.0


class Skip(Exception):
    """The release has no such feature."""


def step(function: Callable) -> Callable:
    """Adds a step; they run in the order of this file."""
    STEPS.append((function.__name__, function))
    return function


def wait(future: Any) -> Any:
    """The result of whatever kind of future a release hands out, or of no future at all."""
    return future.result(timeout=WAIT) if hasattr(future, "result") else future


def takes(function: Callable, name: str) -> bool:
    """Whether this release knows the argument."""
    return name in inspect.signature(function).parameters


def needs(owner: Any, name: str) -> Callable:
    """A method, or Skip."""
    if not hasattr(owner, name):
        raise Skip(f"{tinker.__version__} has no {name}")
    return getattr(owner, name)


class Run:
    """What the steps share."""

    def __init__(self, options: dict) -> None:
        self.base_model: str = options["base_model"]
        self.rank = 8
        self.service = tinker.ServiceClient(user_metadata={"suite": "matrix"})
        self.rest = self.service.create_rest_client()

    def train(self, **more: Any) -> Any:
        return self.service.create_lora_training_client(base_model=self.base_model, rank=self.rank, **more)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def text_input(ids: list[int]) -> types.ModelInput:
    return types.ModelInput.from_ints(ids)


def tensor(values: Any, dtype: type) -> types.TensorData:
    return types.TensorData.from_numpy(np.asarray(values, dtype))


def datum(ids: list[int], **inputs: Any) -> types.Datum:
    """ids [N + 1]: inputs are ids[:-1], targets ids[1:]; other inputs as they are."""
    given = {"target_tokens": tensor(ids[1:], np.int64), **inputs}
    return types.Datum(model_input=text_input(ids[:-1]), loss_fn_inputs=given)


def floats(values: Any) -> types.TensorData:
    return tensor(values, np.float32)


def logprobs_of(result: Any) -> list[np.ndarray]:
    return [np.asarray(out["logprobs"].to_numpy(), np.float64) for out in result.loss_fn_outputs]


def loss_of(result: Any) -> float:
    return float(result.metrics["loss:sum"])


def texts(run: Run) -> list[list[int]]:
    return [run.ids(text) for text in ("one two three four", "1 + 1 = 2", "the quick brown fox")]


def adam(rate: float, **more: Any) -> types.AdamParams:
    return types.AdamParams(learning_rate=rate, beta1=0.9, beta2=0.95, eps=1e-8, **more)


def clear(model: Any) -> None:
    """Drops the pending gradient by a step of rate 0. The moments move: exact comparisons take a fresh model."""
    wait(model.optim_step(adam(0.0)))


def failure(call: Callable[[], Any]) -> dict:
    """How a call fails: {"type", "category", "message", "status"}; {"type": None} when it does not."""
    try:
        wait(call())
    except Exception as error:  # whatever a release raises is the fact
        status = getattr(error, "status_code", None)
        category = str(getattr(getattr(error, "category", None), "value", getattr(error, "category", None)))
        return {"type": type(error).__name__, "category": category, "message": str(error)[:300], "status": status}
    return {"type": None, "category": None, "message": "", "status": None}


def learn_rows(run: Run) -> list[types.Datum]:
    rows = []
    for text in ("red blue red blue red blue", "12 + 30 = 42", "abcabcabcabc"):
        ids = run.ids(text)
        rows.append(datum(ids, weights=floats(np.arange(len(ids) - 1) >= 2)))
    return rows


def policy_rows(run: Run, noise: float = 0.3, **more: Callable[[int], types.TensorData]) -> tuple[list, list, list]:
    """Rows with old log-probs near the model's and advantages of both signs; the first position is not trained."""
    rng = np.random.default_rng(3)
    rows, olds, advantages = [], [], []
    for ids, now in zip(texts(run), run.base_logprobs, strict=True):
        old = (now + noise * rng.normal(size=len(now))).astype(np.float32)
        advantage = rng.normal(size=len(now)).astype(np.float32)
        advantage[0] = 0
        extra = {name: make(len(now)) for name, make in more.items()}
        rows.append(datum(ids, logprobs=floats(old), advantages=floats(advantage), **extra))
        olds.append(old.astype(np.float64))
        advantages.append(advantage.astype(np.float64))
    return rows, olds, advantages


def params(**more: Any) -> types.SamplingParams:
    return types.SamplingParams(**{"max_tokens": 12, "temperature": 1.0, "seed": 11, **more})


def draw(client: Any, prompt: list[int], count: int = 1, more: dict | None = None, **given: Any) -> Any:
    return wait(client.sample(text_input(prompt), count, params(**given), **(more or {})))
