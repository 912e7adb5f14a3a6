"""What the golden client asks a server, in order: every endpoint, in every encoding, and every kind of refusal."""

from __future__ import annotations

from datetime import date
from typing import Any

import zstandard
from messages import FLOAT32, INT64, datum, sparse, tensor, train_request
from wire import PROTOBUF, Wire

ADAM = {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
TRAIN, SAMPLE = "ForwardBackwardOutput", "SampleResponse"
PROMPT = [20, 21, 22, 23, 24]


def row(seed: int, length: int) -> dict[str, list[float]]:
    """Tokens and inputs by formula."""
    at = range(length)
    return {
        "tokens": [(i * 7 + seed) % 90 + 4 for i in at],
        "target_tokens": [((i + 1) * 7 + seed) % 90 + 4 for i in at],
        "logprobs": [-(i % 4 + 1) / 1.0 - 2.0 for i in at],
        "advantages": [(i % 3 - 1 + seed) / 2 for i in at],
        "weights": [float(i % 2) for i in at],
    }


def in_bytes(seed: int, length: int, *names: str) -> bytes:
    """A row in protobuf."""
    values = row(seed, length)
    kinds = {name: INT64 if name == "target_tokens" else FLOAT32 for name in names}
    return datum([int(t) for t in values["tokens"]], **{n: tensor(values[n], kinds[n]) for n in names})


def in_json(seed: int, length: int, *names: str) -> dict[str, Any]:
    """The same row as old releases write it."""
    values = row(seed, length)
    inputs = {
        name: {"data": values[name], "dtype": "int64" if name == "target_tokens" else "float32", "shape": [length]}
        for name in names
    }
    return {"model_input": {"chunks": [{"type": "encoded_text", "tokens": values["tokens"]}]}, "loss_fn_inputs": inputs}


def save_state(wire: Wire) -> None:
    """What the stored server folder holds: a trained model with a training and a sampling checkpoint."""
    session = wire.post("create_session", tags=["old"], user_metadata={"by": "the old release"})["session_id"]
    body = {"session_id": session, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4, "seed": 7}}
    model = wire.future("create_model", body)["model_id"]
    for number in (1, 3):
        data = [in_bytes(seed, 9, "target_tokens") for seed in (1, 2)]
        wire.future("forward_backward", train_request(model, number, data, "cross_entropy"), Content_Type=PROTOBUF)
        wire.future("optim_step", {"model_id": model, "seq_id": number + 1, "adam_params": ADAM})
    wire.future("save_weights", {"model_id": model, "seq_id": 5, "path": "old"})
    wire.future("save_weights_for_sampler", {"model_id": model, "seq_id": 6, "path": "old"})


def exchange_all(wire: Wire) -> None:
    """Everything, on a server that was opened on the stored folder."""
    run = old_state(wire)
    settings(wire)
    session, model = sessions(wire)
    training(wire, session, model)
    refused_through_futures(wire, session, model)
    malformed(wire, session, model)
    sampling(wire, session, run)
    saved(wire, session, model)
    checkpoints(wire, session, model)
    openai(wire, model)
    closing(wire, session, model)
    too_many(wire)


def old_state(wire: Wire) -> str:
    """Checkpoints of an old release: listed, sampled from, and trained on with their optimizer state."""
    run = wire.get("training_runs")["training_runs"][0]["training_run_id"]
    wire.get(f"training_runs/{run}/checkpoints")
    session = wire.post("create_session", sdk_version="0.38.0")["session_id"]
    body = {"session_id": session, "sampling_session_seq_id": 0, "model_path": f"tinker://{run}/sampler_weights/old"}
    sampler = wire.post("create_sampling_session", **body)["sampling_session_id"]
    params = {"max_tokens": 8, "temperature": 1.0, "seed": 5}
    prompt = {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]}
    ask = {"sampling_session_id": sampler, "seq_id": 0, "prompt": prompt, "sampling_params": params}
    wire.future("asample", ask, proto=SAMPLE)
    body = {"session_id": session, "model_seq_id": 1, "path": f"tinker://{run}/weights/old", "optimizer": True}
    wire.future("load_weights", body)
    model = f"{session}:train:1"
    data = [in_bytes(seed, 9, "target_tokens") for seed in (1, 2)]
    wire.future("forward_backward", train_request(model, 1, data, "cross_entropy"), proto=TRAIN, Content_Type=PROTOBUF)
    wire.future("optim_step", {"model_id": model, "seq_id": 2, "adam_params": ADAM})
    wire.future(
        "forward",
        train_request(model, 3, data, "cross_entropy", forward_only=True),
        proto=TRAIN,
        Content_Type=PROTOBUF,
    )
    wire.future("unload_model", {"model_id": model})
    return run


def settings(wire: Wire) -> None:
    """What clients ask first, and who they are."""
    wire.ask("GET", "healthz", key="")
    wire.post("client/config", sdk_version="0.38.0")
    wire.post("client/dynamic_config", sdk_version="0.38.0")
    wire.post("telemetry", events=[])
    wire.get("get_server_capabilities")
    wire.get("auth/apikey/me")
    wire.ask("GET", "auth/apikey/me", key="tml-bob")
    wire.ask("DELETE", "auth/apikey/me")
    token = wire.post("auth/token")["jwt"]
    wire.ask("GET", "auth/apikey/me", key="", X_API_Key=token, note="a token")
    for key in ("", "tml-wrong"):
        wire.ask("GET", "auth/apikey/me", key=key)
    wire.ask("GET", "sessions", key="", Authorization="Bearer tml-ann")
    wire.ask("GET", "sessions", key="eyJ0.eyJ0.x")
    wire.ask("POST", "nowhere", {})
    wire.ask("DELETE", "create_session")


def sessions(wire: Wire) -> tuple[str, str]:
    """A session, another owner's view of it, and a model."""
    body = {
        "tags": ["a", "b"],
        "user_metadata": {"k": "v", "n": 3},
        "sdk_version": "0.38.0",
        "project_id": "p",
        "display_name": "d",
    }
    session = wire.ask("POST", "create_session", body, X_Idempotency_Key="once")["session_id"]
    assert wire.ask("POST", "create_session", body, X_Idempotency_Key="once")["session_id"] == session
    wire.post("session_heartbeat", session_id=session)
    wire.post("session_heartbeat", session_id="s-none")
    wire.get("sessions?limit=1&offset=0")
    wire.get(f"sessions/{session}")
    wire.ask("GET", f"sessions/{session}", key="tml-bob")
    wire.post("sessions/search", display_name="d", limit=5, owner={"type": "own"})
    wire.post("sessions/search", statuses=[{"type": "active"}], limit=500)
    wire.ask("PUT", f"sessions/{session}/project", {"project_id": "q"})
    wire.get(f"sessions/{session}/trace_export")
    lora = {"rank": 4, "seed": 11, "train_mlp": True, "train_attn": True, "train_unembed": False}
    body = {
        "session_id": session,
        "model_seq_id": 0,
        "base_model": "tiny",
        "user_metadata": {"name": "first"},
        "lora_config": lora,
    }
    model = wire.future("create_model", body)["model_id"]
    wire.future("create_model", body)  # the same number is the same model
    wire.post("get_info", model_id=model)
    wire.post("get_info", model_id="none")
    return session, model


def training(wire: Wire, session: str, model: str) -> None:
    """Each loss in protobuf, the JSON of old releases, compressed bodies, and a step."""
    ratio = ("target_tokens", "logprobs", "advantages")
    configs: dict[str, dict[str, float | str]] = {
        "importance_sampling": {},
        "ppo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.5},
        "cispo": {},
        "dro": {"beta": 0.1},
        "gspo": {},
    }
    weighted = [in_bytes(seed, 6 + seed, "target_tokens", "weights") for seed in range(3)]
    body = train_request(model, 1, weighted, "cross_entropy")
    wire.future("forward_backward", body, proto=TRAIN, also_json=True, Content_Type=PROTOBUF)
    number = 2
    for loss, config in configs.items():
        data = [in_bytes(seed, 5 + seed, *ratio) for seed in range(2)]
        body = train_request(model, number, data, loss, config=config)
        wire.future("forward_backward", body, proto=TRAIN, note=f"{loss} {config}", Content_Type=PROTOBUF)
        number += 1
    inputs = {
        "target_tokens": sparse([11, 12, 13, 14], [0, 1, 1, 2, 4], [5, 0, 1, 3], [4, 6], INT64),
        "weights": sparse([0.5, -1.0, 2.0, 0.25], [0, 1, 1, 2, 4], [5, 0, 1, 3], [4, 6], FLOAT32),
    }
    body = train_request(model, number, [datum([5, 6, 7, 8], **inputs)], "cross_entropy")
    wire.future("forward_backward", body, proto=TRAIN, note="sparse targets", Content_Type=PROTOBUF)
    body = train_request(model, number + 1, weighted, "cross_entropy", forward_only=True)
    packed = zstandard.compress(body)
    headers = {"Content_Type": PROTOBUF, "Content_Encoding": "zstd"}
    wire.future("forward_backward", packed, proto=TRAIN, note="zstd", **headers)
    wire.future("optim_step", {"model_id": model, "seq_id": number + 2, "adam_params": ADAM})
    rows = [in_json(seed, 5, "target_tokens", "weights") for seed in range(2)]
    given = {"data": rows, "loss_fn": "cross_entropy"}
    wire.future(
        "forward_backward", {"model_id": model, "seq_id": number + 3, "forward_backward_input": given}, also_json=True
    )
    wire.future("forward", {"model_id": model, "seq_id": number + 4, "forward_input": given})
    adam = {**ADAM, "weight_decay": 0.1, "grad_clip_norm": 0.5}
    wire.future("optim_step", {"model_id": model, "seq_id": number + 5, "adam_params": adam, "type": "optim_step"})
    wire.future("forward", {"model_id": model, "seq_id": number + 6, "forward_input": given})
    second = number + 8
    early = wire.post("optim_step", model_id=model, seq_id=second, adam_params=ADAM)  # waits for the one before
    body = train_request(model, number + 7, weighted, "cross_entropy")
    wire.future("forward_backward", body, proto=TRAIN, Content_Type=PROTOBUF)
    wire.result(early["request_id"])
    assert second == 15  # refused_through_futures goes on with 16


def refused_through_futures(wire: Wire, session: str, model: str) -> None:
    """Wrong content of a right form: accepted, and told as the failure of the request."""

    def step(number: int, **params: Any) -> None:
        wire.future("optim_step", {"model_id": model, "seq_id": number, **params})

    def train(number: int, data: list[bytes], loss: str = "cross_entropy", **config: Any) -> None:
        body = train_request(model, number, data, loss, config=config)
        wire.future("forward_backward", body, proto=TRAIN, note=f"{loss} {config}", Content_Type=PROTOBUF)

    good = [in_bytes(0, 5, "target_tokens")]
    step(16, adam_params={"learning_rate": "fast"})
    step(17, adam_params={"learning_rate": -1.0})
    step(18, adam_params={"momentum": 1.0})
    step(19)
    step(20, optimizer_params={"type": "dimuon"})
    step(21, adam_params={"beta1": 1.0})
    train(22, good, "stable_reinforce")
    train(23, good, "unheard_of")
    train(24, good, "ppo")
    train(25, [datum([1, 2], target_tokens=tensor([3], INT64))])
    train(26, [datum([1, 200], target_tokens=tensor([3, 4], INT64))])
    train(27, [])
    train(28, good, "cross_entropy", clip_low_threshold=0.5)
    train(29, [datum([1, 2], target_tokens=tensor([3.0, 4.0], FLOAT32))])
    ratio = ("target_tokens", "logprobs", "advantages")
    train(30, [in_bytes(0, 4, *ratio)], "ppo", clip_low_threshold=1.5, clip_high_threshold=0.5)
    train(31, [in_bytes(0, 4, *ratio)], "ppo", clip_low_threshold="low")
    wire.future("save_weights", {"model_id": model, "seq_id": 32, "path": "../up"})
    wire.future("save_weights", {"model_id": model, "seq_id": 33, "path": "a", "ttl_seconds": 5})
    wire.future("save_weights_for_sampler", {"model_id": model, "seq_id": 34})
    wire.future("load_weights", {"model_id": model, "seq_id": 35, "path": "tinker://none/weights/none"})
    new = {"session_id": session, "base_model": "tiny"}
    wire.future("create_model", {**new, "model_seq_id": 90, "lora_config": {"rank": 0}})
    wire.future("create_model", {**new, "model_seq_id": 91, "lora_config": {"rank": 1000}})
    wire.future("create_model", {**new, "model_seq_id": 92, "base_model": "unknown", "lora_config": {"rank": 4}})
    wire.future("create_model", {**new, "model_seq_id": 93, "lora_config": {"rank": 4, "color": "red"}})
    nothing = {"rank": 4, "train_mlp": False, "train_attn": False, "train_unembed": False}
    wire.future("create_model", {**new, "model_seq_id": 94, "lora_config": nothing})
    other = {"type": "dimuon", "version": 1}
    wire.future("create_model", {**new, "model_seq_id": 95, "lora_config": {"rank": 4}, "optimizer_config": other})
    wire.future("optim_step", {"model_id": f"{session}:train:77", "seq_id": 1, "adam_params": ADAM})


def malformed(wire: Wire, session: str, model: str) -> None:
    """Wrong in form: refused at once."""
    for path, content, kind in (
        ("forward_backward", b"\xff\xff\xff", PROTOBUF),
        ("forward_backward", b"{}", "application/json"),
        ("forward_backward", b"x", "text/plain"),
        ("optim_step", b"{", "application/json"),
        ("optim_step", b"[" * 2000, "application/json"),
        ("optim_step", b'{"model_id": 3}', "application/json"),
        ("create_model", b"[]", "application/json"),
        ("asample", b"{}", "application/json"),
        ("retrieve_future", b"{}", "application/json"),
        ("retrieve_future", b"\xff", "application/json"),
        ("cancel_future", b'{"request_id": ["a"]}', "application/json"),
        ("retrieve_futures", b"{}", "application/json"),
        ("create_session", b'"x"', "application/json"),
        ("create_custom_loss", b"{}", "application/json"),
        ("get_info", b"", "application/json"),
        ("weights_info", b'{"tinker_path": "elsewhere"}', "application/json"),
    ):
        wire.ask("POST", path, content, note=repr(content[:40]), Content_Type=kind)
    wire.ask("POST", "forward_backward", b"not zstd", note="not zstd", Content_Type=PROTOBUF, Content_Encoding="zstd")
    wire.ask("POST", "forward_backward", bytes(3 << 20), note="3 MiB of zeros", Content_Type=PROTOBUF)
    body = {"session_id": "s-none", "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4}}
    wire.post("create_model", **body)
    wire.ask("POST", "create_model", {**body, "session_id": session}, key="tml-bob")
    wire.ask("POST", "optim_step", {"model_id": model, "seq_id": 99, "adam_params": ADAM}, key="tml-bob")
    wire.post("optim_step", model_id=model, seq_id=0, adam_params=ADAM)
    wire.post("retrieve_future", request_id="none")
    wire.post("load_weights", path="tinker://a/weights/b")
    for query in ("limit=-1", "limit=5000", "offset=x", "access_scope=all"):
        wire.get(f"training_runs?{query}")
        wire.get(f"sessions?{query}")


def sampling(wire: Wire, session: str, run: str) -> None:
    """asample in all its forms, its answers as protobuf and JSON, clones, feeds, and what cannot be drawn."""
    base = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
    sampler = wire.post("create_sampling_session", **base)["sampling_session_id"]
    wire.post("create_sampling_session", **base)
    wire.post("create_sampling_session", **{**base, "base_model": "other"})
    wire.post("create_sampling_session", session_id=session, sampling_session_seq_id=9)
    wire.post("create_sampling_session", **{**base, "sampling_session_seq_id": 8, "more": 1})
    path = f"tinker://{run}/weights/none"
    wire.post("create_sampling_session", session_id=session, sampling_session_seq_id=7, model_path=path)
    wire.post("join_sampling_session", sampling_session_id=sampler)
    wire.get(f"samplers/{sampler}")
    wire.ask("GET", f"samplers/{sampler}", key="tml-bob")
    prompt = {"chunks": [{"type": "encoded_text", "tokens": PROMPT[:2]}, {"tokens": PROMPT[2:]}]}
    seeded = {"max_tokens": 6, "temperature": 1.0, "seed": 3}

    def sample(number: int, params: dict[str, Any] = seeded, **more: Any) -> Any:
        body = {"sampling_session_id": sampler, "seq_id": number, "prompt": prompt, "sampling_params": params, **more}
        return wire.future("asample", body, proto=SAMPLE, also_json=True)

    sample(0, num_samples=2)
    sample(0, num_samples=2)  # the same number is the same request
    sample(1, prompt_logprobs=True, topk_prompt_logprobs=2, topk_sample_logprobs=2)
    sample(2, prompt_logprobs=True, prompt_logprobs_last_n=2, prompt_alt_tokens_k=2)
    targets = {"data": [5, 6, 7, 8], "dtype": "int64", "shape": [4, 2]}
    cells = {"sparse_crow_indices": [0, 1, 2, 2, 4], "sparse_col_indices": [0, 1, 0, 1]}
    sample(3, target_prompt_logprobs={**targets, **cells})
    sample(4, target_prompt_logprobs={**targets, "data": list(range(4, 12))})
    sample(5, {"max_tokens": 40, "temperature": 0.0})
    sample(6, {"max_tokens": 300, "temperature": 1.0, "seed": 4, "stop": ["a", "b"]})
    sample(7, {"max_tokens": 300, "temperature": 1.0, "seed": 4, "stop": [40, 41]})
    sample(8, {"max_tokens": 5, "temperature": 0.7, "seed": -4, "top_k": 5, "top_p": 0.9, "stop": []})
    done = wire.post("asample", sampling_session_id=sampler, seq_id=7 * 10**9, prompt=prompt, sampling_params=seeded)
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": 7}
    ended = wire.post("retrieve_futures", target=target, prev_cursor=0)
    wire.post(
        "retrieve_futures",
        target=target,
        prev_cursor=ended["cursor"],
        timeout=0,
        retrieved_request_ids=[done["request_id"]],
    )
    wire.future("asample", {"base_model": "tiny", "prompt": prompt, "sampling_params": seeded, "seq_id": 0})
    path = f"tinker://{run}/sampler_weights/old"
    wire.future("asample", {"model_path": path, "prompt": prompt, "sampling_params": seeded}, proto=SAMPLE)
    wire.post("asample", model_path=f"tinker://{run}/sampler_weights/none", prompt=prompt)
    wire.post("asample", sampling_session_id=sampler, prompt=prompt)
    wrong: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"max_tokens": 0}, {}),
        ({"max_tokens": 10**6}, {}),
        ({"temperature": -1.0}, {}),
        ({"top_p": 0.0}, {}),
        ({"top_k": -5}, {}),
        ({"stop": [""]}, {}),
        ({"stop": ["a", 3]}, {}),
        ({"color": "red"}, {}),
        ({}, {"num_samples": 0}),
        ({}, {"prompt": {"chunks": []}}),
        ({}, {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1000]}]}}),
        ({}, {"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}}),
        ({}, {"topk_prompt_logprobs": 5000}),
        ({}, {"color": "red"}),
    ]
    for number, (params, more) in enumerate(wrong, 20):
        body = {"sampling_session_id": sampler, "seq_id": number, "prompt": prompt, "sampling_params": params, **more}
        wire.future("asample", body)
    wire.future("asample", {"sampling_session_id": f"{session}:sample:66", "seq_id": 0, "prompt": prompt})


def saved(wire: Wire, session: str, model: str) -> None:
    """Saves of every kind, a name that is taken, and loading into the model and as a new one."""
    names = {"model_id": model, "path": "final"}
    wire.future("save_weights", {**names, "seq_id": 36, "ttl_seconds": 7200, "user_metadata": {"step": "2"}})
    wire.future("save_weights", {**names, "seq_id": 37})
    wire.future("save_weights", {**names, "seq_id": 38, "overwrite": True})
    wire.future("save_weights_for_sampler", {**names, "seq_id": 39, "kind": "snapshot"})
    wire.future("save_weights_external", {**names, "seq_id": 40})
    wire.future("save_weights_external", {**names, "path": "age", "seq_id": 41, "age_encryption_recipients": ["x"]})
    sampler = wire.future("save_weights_for_sampler", {"model_id": model, "seq_id": 42, "sampling_session_seq_id": 5})
    prompt = {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]}
    params = {"max_tokens": 5, "temperature": 1.0, "seed": 9}
    body = {"sampling_session_id": sampler["sampling_session_id"], "seq_id": 0, "prompt": prompt}
    wire.future("asample", {**body, "sampling_params": params}, proto=SAMPLE)
    wire.get(f"samplers/{sampler['sampling_session_id']}")
    path = f"tinker://{model}/weights/final"
    wire.future("load_weights", {"model_id": model, "seq_id": 43, "path": path, "optimizer": False})
    wire.future("load_weights", {"session_id": session, "model_seq_id": 2, "path": path, "optimizer": True})
    wire.post("get_info", model_id=f"{session}:train:2")
    wire.future("unload_model", {"model_id": f"{session}:train:2"})


def checkpoints(wire: Wire, session: str, model: str) -> None:
    """Listings, publishing, lifetimes, downloads, copies, the audit."""
    wire.get(f"training_runs/{model}")
    wire.get(f"training_runs/{model}/checkpoints")
    wire.get(f"models/{model}/checkpoints")
    wire.get("checkpoints?limit=2&offset=1")
    wire.ask("GET", "checkpoints", User_Agent="AsyncTinker/Python 0.7.0")
    wire.ask("GET", "checkpoints", key="tml-bob")
    wire.ask("GET", f"training_runs/{model}", key="tml-bob")
    wire.post("weights_info", tinker_path=f"tinker://{model}/weights/final")
    wire.post("weights_info", tinker_path=f"tinker://{model}/weights/none")
    one = f"training_runs/{model}/checkpoints/"
    wire.ask("POST", f"{one}weights/final/publish")
    wire.ask("GET", f"training_runs/{model}", key="tml-bob")
    wire.ask("GET", "training_runs?access_scope=accessible", key="tml-bob")
    wire.ask("POST", f"{one}weights/final/publish", key="tml-bob")
    wire.ask("DELETE", f"{one}weights/final/publish")
    for body in ({"ttl_seconds": 86400}, {"ttl_seconds": None}, {"ttl_seconds": 5}, {}, []):
        wire.ask("PUT", f"{one}weights/final/ttl", body)
    urls = wire.get(f"{one}external_weights/final/external_weights_urls")["urls"]
    for name in sorted(urls):
        wire.ask("GET", urls[name].removeprefix(str(wire.http.base_url).rstrip("/")), key="")
    address = urls[sorted(urls)[0]].removeprefix(str(wire.http.base_url).rstrip("/"))
    wire.ask("GET", address.split("?")[0], key="")
    for kind in ("weights", "sampler_weights"):
        moved = wire.get(f"{one}{kind}/final/archive")
        wire.ask("GET", moved["url"].removeprefix(str(wire.http.base_url).rstrip("/")), key="")
    source = f"tinker://{model}/sampler_weights/final"
    wire.post("copy_weights", source_path=source, destination_project_id="archive")
    wire.post("copy_weights", source_path=source, session_id=session, model_seq_id=5, ttl_seconds=7200)
    wire.post("copy_weights", source_path=source)
    wire.post("copy_weights", source_path=source, destination_project_id="a", weights_access_token="t")
    wire.ask("DELETE", f"training_runs/{session}:train:5/checkpoints/sampler_weights/final")
    wire.ask("DELETE", f"training_runs/{session}:train:5/checkpoints/sampler_weights/final")
    wire.ask("DELETE", f"{one}weights/..%2F..%2Fup")
    wire.get("audit?event_type=checkpoints")
    wire.get(f"audit?event_type=teams&day={date(2020, 1, 1)}")
    wire.get("audit?event_type=x")
    wire.get("billing/usage/events")
    wire.get("billing/usage/checkpoints/current")


def openai(wire: Wire, model: str) -> None:
    """The endpoints that agents and evaluation tools speak: whole, streamed, with log-probabilities, refused."""
    wire.get("/v1/models")
    wire.get("/oai/api/v1/models/tiny")
    wire.get("/v1/models/unknown")
    wire.ask("GET", "/v1/models", key="tml-wrong")

    def complete(path: str = "/v1/completions", **body: Any) -> None:
        wire.ask("POST", path, {"model": "tiny", "seed": 1, "max_tokens": 6, **body})

    def chat(**body: Any) -> None:
        complete("/v1/chat/completions", **{"messages": [{"role": "user", "content": "hi"}], **body})

    usage = {"stream": True, "stream_options": {"include_usage": True}}
    complete(prompt="2+2=")
    complete("/oai/api/v1/completions", prompt=PROMPT, n=2, temperature=0.5, top_p=0.9)
    complete(prompt=["a", "b"], logprobs=2)
    complete(prompt="abc", echo=True, logprobs=1, max_tokens=0)
    complete(prompt="abc", stop=["a", "e", "i", "o"], max_tokens=200)
    complete(prompt="abc", model=f"tinker://{model}/sampler_weights/final")
    complete(prompt="abc", **usage)
    complete(prompt=["abc", "de"], n=2, logprobs=1, **usage)
    chat()
    chat(logprobs=True, top_logprobs=2, messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}])
    chat(n=2, **usage)
    complete(prompt="abc", model="unknown")
    complete(prompt="abc", model="tinker://none/weights/none")
    complete(prompt="")
    complete(prompt="abc", temperature=-1.0)
    complete(prompt="abc", temperature=-1.0, stream=True)
    complete(prompt="abc", tools=[{"type": "function"}])
    complete(prompt="abc", best_of=3)
    complete(prompt="abc", max_tokens=0)
    complete(prompt="abc", color="red")
    complete(prompt={"a": 1})
    chat(messages=[])
    chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}])
    chat(top_logprobs=2)
    wire.ask("POST", "/v1/completions", b"{", note="no JSON", Content_Type="application/json")


def closing(wire: Wire, session: str, model: str) -> None:
    """The end of a session and of its models."""
    wire.post("cancel_future", request_id="none")
    wire.future("unload_model", {"model_id": model})
    wire.post("get_info", model_id=model)
    wire.future("optim_step", {"model_id": model, "seq_id": 44, "adam_params": ADAM})
    wire.ask("POST", f"sessions/{session}/finish", {"reason": {"type": "success"}, "detail": "done"})
    wire.ask("POST", "sessions/s-none/finish", {})


def too_many(wire: Wire) -> None:
    """429, once as many samples wait as may. How many are taken before depends on time, so only that answer is kept."""
    prompt = {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]}
    params = {"max_tokens": 2000, "temperature": 1.0, "stop": []}
    body = {"base_model": "tiny", "num_samples": 16, "prompt": prompt, "sampling_params": params}
    waiting: list[str] = []
    for _ in range(100):
        answer = wire.ask("POST", "asample", body, note="16 samples", kept=400)
        if "detail" in answer:
            break
        waiting.append(answer["request_id"])
    for request_id in waiting:
        wire.ask("POST", "cancel_future", {"request_id": request_id}, kept=400)
