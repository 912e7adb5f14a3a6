"""What tinker_door.py measures, written once for a server of its own and for the service of skyrl.tinker.

As a script it is the HTTP client: `python workload.py '{"kind": "step", ...}'` prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

PROMPT_TOKENS, NEW_TOKENS = 24, 16


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Ids below 256 (bytes), different for every prompt."""
    draw = np.random.default_rng(seed)
    return [draw.integers(32, 122, PROMPT_TOKENS).tolist() for _ in range(count)]


def rl_step(tinker: Any, model: Any, groups: list[list[int]], samples: int, seed: int) -> dict[str, float]:
    """One step of RL as a script would write it; seconds of each part and tokens.

    tinker: the module with ModelInput, SamplingParams, Datum, TensorData, AdamParams.
    """
    clock, times = time.perf_counter, {}
    start = clock()
    sampler = model.save_weights_and_get_sampling_client()
    sampler = sampler.result() if hasattr(sampler, "result") else sampler
    times["snapshot"] = clock() - start
    params = tinker.SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0, stop=[], seed=seed)
    start = clock()
    inputs = [tinker.ModelInput.from_ints(ids) for ids in groups]
    futures = [sampler.sample(prompt, samples, params) for prompt in inputs]
    answers = [future.result() for future in futures]
    times["sample"] = clock() - start
    start = clock()
    rows, trained = [], 0
    for ids, answer in zip(groups, answers, strict=True):
        for i, sequence in enumerate(answer.sequences):
            drawn = [int(token) for token in sequence.tokens]
            before = len(ids) - 1
            rows.append(
                tinker.Datum(
                    model_input=tinker.ModelInput.from_ints([*ids, *drawn[:-1]]),
                    loss_fn_inputs={
                        "target_tokens": tensor(tinker, [*ids[1:], *drawn], np.int64),
                        "logprobs": tensor(tinker, [0.0] * before + list(sequence.logprobs), np.float32),
                        "advantages": tensor(tinker, [0.0] * before + [(-1.0) ** i / 64] * len(drawn), np.float32),
                    },
                )
            )
            trained += len(ids) + len(drawn) - 1
    times["rows"] = clock() - start
    start = clock()
    passed = model.forward_backward(rows, "importance_sampling")
    stepped = model.optim_step(tinker.AdamParams(learning_rate=1e-4))
    passed.result()
    times["forward_backward"] = clock() - start
    start = clock()
    stepped.result()
    times["optim_step"] = clock() - start
    times["trained_tokens"] = float(trained)
    return times


def tensor(tinker: Any, values: list, dtype: type) -> Any:
    """A TensorData of one dimension."""
    return tinker.TensorData.from_numpy(np.asarray(values, dtype))


def steps(tinker: Any, service: Any, order: dict) -> dict[str, Any]:
    """Median seconds of each part of order["steps"] RL steps after two that warm up."""
    model = service.create_lora_training_client(base_model=order["model"], rank=8, seed=0)
    model.get_info()
    groups = prompts(order["prompts"])
    seen = [rl_step(tinker, model, groups, order["samples"], seed) for seed in range(order["steps"] + 2)][2:]
    parts = {name: float(np.median([one[name] for one in seen])) for name in seen[0]}
    parts["total"] = float(np.median([sum(one[k] for k in one if k != "trained_tokens") for one in seen]))
    return parts


def concurrent(tinker: Any, service: Any, order: dict) -> dict[str, Any]:
    """Keeps order["at_once"] single-sample requests in flight, spread over order["tenants"] models of different
    weights, until order["requests"] are answered; tokens/s, and latency of one request at the client."""
    clients = []
    for tenant in range(order["tenants"]):
        model = service.create_lora_training_client(base_model=order["model"], rank=8, seed=tenant)
        clients.append(model.save_weights_and_get_sampling_client())
    params = tinker.SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0, stop=[])
    texts = [tinker.ModelInput.from_ints(ids) for ids in prompts(64)]

    def ask(i: int) -> Any:
        return clients[i % len(clients)].sample(texts[i % len(texts)], 1, params)

    for future in [ask(i) for i in range(order["at_once"])]:
        future.result()
    latencies: list[float] = []
    slots, done, lock = threading.Semaphore(order["at_once"]), threading.Event(), threading.Lock()

    def answered(begin: float) -> Callable[[Any], None]:
        def note(_: Any) -> None:
            with lock:
                latencies.append(time.perf_counter() - begin)
                if len(latencies) == order["requests"]:
                    done.set()
            slots.release()

        return note

    start = time.perf_counter()
    for i in range(order["requests"]):
        slots.acquire()
        begin = time.perf_counter()
        on_done(ask(i), answered(begin))
    done.wait(300)
    seconds = time.perf_counter() - start
    return {
        "tokens_per_second": order["requests"] * NEW_TOKENS / seconds,
        "p50_ms": 1e3 * float(np.quantile(latencies, 0.5)),
        "p95_ms": 1e3 * float(np.quantile(latencies, 0.95)),
        "requests": order["requests"],
    }


def on_done(future: Any, call: Callable[[Any], None]) -> None:
    """Calls when the future is done; the SDK's newest futures have no callback, so a thread waits for those."""
    if hasattr(future, "add_done_callback"):
        future.add_done_callback(call)
    else:
        threading.Thread(target=lambda: call(future.result()), daemon=True).start()


def first_sample(tinker: Any, service: Any, order: dict) -> dict[str, Any]:
    """From the call that takes a snapshot to the first sampled token of it, in milliseconds."""
    model = service.create_lora_training_client(base_model=order["model"], rank=8, seed=0)
    params = tinker.SamplingParams(max_tokens=1, temperature=1.0, stop=[])
    prompt = tinker.ModelInput.from_ints(prompts(1)[0])
    seen = []
    for _ in range(order["steps"] + 3):
        start = time.perf_counter()
        sampler = model.save_weights_and_get_sampling_client()
        sampler = sampler.result() if hasattr(sampler, "result") else sampler
        middle = time.perf_counter()
        sampler.sample(prompt, 1, params).result()
        seen.append((middle - start, time.perf_counter() - start))
    snapshot, whole = np.array(seen[3:]).T * 1e3
    return {
        "snapshot_ms": float(np.median(snapshot)),
        "to_first_sample_ms": float(np.median(whole)),
        "to_first_sample_p95_ms": float(np.quantile(whole, 0.95)),
    }


KINDS = {"step": steps, "concurrent": concurrent, "first_sample": first_sample}


def main() -> None:
    """One measurement with the SDK on the path, against TINKER_BASE_URL."""
    import tinker

    order = json.loads(sys.argv[1])
    service = tinker.ServiceClient()
    print(json.dumps(KINDS[order["kind"]](tinker, service, order)), flush=True)
    if hasattr(service, "close"):
        service.close("success").result()


if __name__ == "__main__":
    main()
