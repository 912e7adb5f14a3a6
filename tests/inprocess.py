"""Services inside this process (one rank) or inside forked ranks, driven by the official SDK through skyrl.tinker."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import gloo
import numpy as np
import pytest
from small import service_options, supervised

import skyrl.tinker
from skyrl.service import server
from skyrl.service.commands import NOT_FINITE

# Not "tinker", which tests/tinker would be where there is no SDK.
pytest.importorskip("tinker.types", reason="the official SDK is not here: it needs Python 3.11", exc_type=ImportError)
from tinker import AdamParams, Datum, ModelInput, RequestFailedError, SamplingParams, ServiceClient  # noqa: E402

ADAM = AdamParams(learning_rate=1e-2, grad_clip_norm=50.0)


@contextlib.contextmanager
def open_client(folder: Path, *overrides: str, **more: Any) -> Iterator[ServiceClient]:
    """A client whose service is this process, or these ranks; tests look into it as `client.service`."""
    opened, open_service = [], server.open_service

    def noted(cfg: Any) -> Any:
        opened.append(open_service(cfg))
        return opened[-1]

    with mock.patch.object(server, "open_service", noted):
        with skyrl.tinker.service_client(**service_options(folder, *overrides, **more)) as client:
            client.service = opened[0]
            yield client


def on_ranks(size: int, script: Callable[..., Any], folder: Path, *overrides: str, args: Sequence[Any] = ()) -> Any:
    """What `script(client, *args)` returns on rank 0 of a service of `size` ranks. `script` is a top-level function."""
    return gloo.run_ranks(size, _script_rank, script, folder, overrides, tuple(args), timeout=240)[0]


def _script_rank(script: Callable[..., Any], folder: Path, overrides: Sequence[str], args: tuple[Any, ...]) -> Any:
    try:
        with open_client(folder, *overrides) as client:
            return script(client, *args)
    except SystemExit as end:
        assert os.environ["RANK"] != "0" and not end.code
        return None


@dataclass
class Ended:
    """How each rank of a job ended: exit codes (negative: signals), and what they printed together."""

    codes: list[int | None]
    output: str
    seconds: float


def run_job(size: int, script: Callable[[Path], None], folder: Path, *, timeout: float = 60.0) -> Ended:
    """`script(folder)` on every rank, each in a process of its own. As torchrun does, the other ranks get SIGTERM when
    one has failed. A code is None for a rank that had to be killed after `timeout` seconds."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    ranks = [gloo._SERVER.Process(target=_job_rank, args=(r, size, port, script, folder)) for r in range(size)]
    for process in ranks:
        process.start()
    told = False
    while any(process.is_alive() for process in ranks) and time.monotonic() - start < timeout:
        if not told and any(process.exitcode for process in ranks):
            told = True
            for process in ranks:
                process.terminate()
        time.sleep(0.05)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    text = "".join(path.read_text() for path in sorted(folder.glob("rank*.log")))
    return Ended(codes, text, time.monotonic() - start)


def _job_rank(rank: int, size: int, port: int, script: Callable[[Path], None], folder: Path) -> None:
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(log, 1), os.dup2(log, 2)
    names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_PORT=port)
    os.environ.update({**{name: str(value) for name, value in names.items()}, "MASTER_ADDR": "127.0.0.1"})
    code = 0
    try:
        script(folder)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    import atexit

    atexit._run_exitfuncs()  # a forked process skips them; Python's own end runs them after the traceback
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


# ---- data ----------------------------------------------------------------------------------------------------------


def prompt(*tokens: int) -> ModelInput:
    """A prompt of these tokens."""
    return ModelInput.from_ints(list(tokens))


def rows(seed: int, count: int = 9, longest: int = 40) -> list[Datum]:
    """Rows for cross_entropy: ragged, some positions without weight."""
    return [
        Datum(ModelInput.from_ints(tokens), {"target_tokens": targets, "weights": weights})
        for tokens, targets, weights in supervised(seed, count, longest)
    ]


def rl_rows(seed: int, logprobs: Sequence[np.ndarray], given: Sequence[Datum]) -> list[Datum]:
    """The rows `given` for ppo and its kin: as if sampled by a policy near the one that gave `logprobs`."""
    rng = np.random.default_rng(seed)
    found = []
    for datum, own in zip(given, logprobs, strict=True):
        noise = rng.normal(0, 0.2, len(own))
        advantages = np.where(np.arange(len(own)) < 2, 0.0, rng.normal())
        inputs = {
            "target_tokens": datum.loss_fn_inputs["target_tokens"],
            "logprobs": (own + noise).astype(np.float32),
            "advantages": advantages.astype(np.float32),
        }
        found.append(Datum(datum.model_input, inputs))
    return found


def logprobs_of(output: Any) -> list[np.ndarray]:
    """Log-probabilities of each row."""
    return [one["logprobs"].to_numpy() for one in output.loss_fn_outputs]


def draw(max_tokens: int = 12, temperature: float = 1.0, seed: int | None = 5, stop: Any = ()) -> SamplingParams:
    """Draws that only their length ends."""
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, stop=list(stop))


def drawn(response: Any) -> list[tuple[list[int], list[float]]]:
    """(tokens, log-probabilities) of each sample."""
    return [(one.tokens, one.logprobs) for one in response.sequences]


def contents(client: ServiceClient, path: str) -> dict[str, Any]:
    """A checkpoint's tensors by name, as arrays: weights, moments and the step."""
    checkpoints = client.service.checkpoints
    content = checkpoints.load(path, "local", optimizer=True)
    found = dict(content.weights)
    assert content.optimizer is not None
    found |= {f"m:{name}": tensor for name, tensor in content.optimizer.exp_avg.items()}
    found |= {f"v:{name}": tensor for name, tensor in content.optimizer.exp_avg_sq.items()}
    return {name: tensor.numpy() for name, tensor in found.items()} | {"step": content.optimizer.step}


def same(a: Any, b: Any) -> bool:
    """Whether two results are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return a == b


def mismatch(model: Any, begin: ModelInput, samples: list[tuple[list[int], list[float]]]) -> float:
    """Mean |difference| between the log-probabilities of drawing tokens and those of training on them."""
    data, known = [], []
    for tokens, logprobs in samples:
        whole = begin.to_ints() + tokens
        data.append(Datum(ModelInput.from_ints(whole[:-1]), {"target_tokens": whole[1:]}))
        known.append(np.array(logprobs))
    found = logprobs_of(model.forward(data, "cross_entropy").result())
    return float(np.mean([np.abs(f[-len(k) :] - k).mean() for f, k in zip(found, known, strict=True)]))


# ---- tenants -------------------------------------------------------------------------------------------------------


def new(client: ServiceClient, seed: int = 7, rank: int = 4, **more: Any) -> Any:
    """A tenant."""
    return client.create_lora_training_client("tiny", rank=rank, seed=seed, **more).result()


def train(model: Any, seed: int, steps: int = 2) -> list[Any]:
    """Posts steps without waiting for any; the futures."""
    futures = []
    for step in range(steps):
        futures.append(model.forward_backward(rows(seed + step), "cross_entropy"))
        futures.append(model.optim_step(ADAM))
    return futures


def results(futures: list[Any]) -> list[Any]:
    """What futures of training gave, comparable bit for bit."""
    done = [future.result() for future in futures]
    return [(one.metrics, logprobs_of(one) if hasattr(one, "loss_fn_outputs") else []) for one in done]


def saved(client: ServiceClient, model: Any, name: str = "x") -> dict[str, Any]:
    """Its tensors."""
    return contents(client, model.save_state(name, overwrite=True).result().path)


def together_and_alone(client: ServiceClient) -> list[Any]:
    """Two tenants trained side by side, then the same two one after the other: (results, tensors) of each."""
    found = []
    for together in (True, False):
        one, two = new(client, 7), new(client, 8, rank=8, train_mlp=False)
        if together:
            pairs = [train(one, 100, steps=3), train(two, 200, steps=3)]
            pairs = [results(pair) for pair in pairs]
        else:
            pairs = [results(train(one, 100, steps=3)), results(train(two, 200, steps=3))]
        found.append([*pairs, saved(client, one), saved(client, two)])
    return found


def refused_beside(futures: list[Any], alone: Any) -> None:
    """The first, third, ... request asks a model that is not finite and is refused; the others
    give what `alone` is."""
    for index, future in enumerate(futures):
        if index % 2:
            assert drawn(future.result()) == alone
        else:
            with pytest.raises(RequestFailedError, match=NOT_FINITE):
                future.result()
