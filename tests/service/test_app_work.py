"""Submissions, futures, long polls, feeds and limits over real HTTP."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zstandard
from door_server import TEXT, serving

from skyrl.service import codec, routes_work
from skyrl.service.messages import OptimStep, TrainRequest
from skyrl.types import RunError

PROTOBUF = "application/x-protobuf"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("door")) as server:
        yield server


@pytest.fixture
def short_polls(monkeypatch):
    monkeypatch.setattr(routes_work, "POLL_SECONDS", 0.3)


@pytest.fixture
def held(server):
    server.answers.hold.set()
    yield
    server.answers.hold.clear()


def message(model_id: str, seq_id: int, *, forward_only: bool = False) -> bytes:
    request = codec.ForwardBackwardRequest(
        model_id=model_id, seq_id=seq_id, loss_fn="cross_entropy", forward_only=forward_only
    )
    datum = request.data.add()
    datum.model_input.add().encoded_text.tokens = np.array([5, 6, 7], "<i4").tobytes()
    tensor = datum.loss_fn_inputs["target_tokens"]
    tensor.dense, tensor.dtype = np.array([6, 7, 8], "<i8").tobytes(), codec.INT64
    tensor.shape.append(3)
    return request.SerializeToString()


def old_train(model_id: str, seq_id: int, name: str) -> dict:
    targets = {"data": [6, 7, 8], "dtype": "int64", "shape": [3]}
    row = {"model_input": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}}
    row["loss_fn_inputs"] = {"target_tokens": targets}
    return {"model_id": model_id, "seq_id": seq_id, f"{name}_input": {"data": [row], "loss_fn": "cross_entropy"}}


def sampling_session(server) -> str:
    session = server.session()
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
    return server.call("create_sampling_session", **body)["sampling_session_id"]


def asample(server, sampler: str, seq_id: int, **more) -> dict:
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
    body = {"sampling_session_id": sampler, "seq_id": seq_id, "prompt": prompt, **more}
    return server.call("asample", **body)


def test_a_training_step_in_protobuf(server):
    model_id = server.model()
    posted = server.http.post(
        "/api/v1/forward_backward", content=message(model_id, 1), headers={"Content-Type": PROTOBUF}
    ).json()
    assert posted["model_id"] == model_id
    got = server.http.post(
        "/api/v1/retrieve_future",
        json={"request_id": posted["request_id"], "allow_metadata_only": True},
        headers={"Accept": PROTOBUF, "X-Tinker-Request-Type": "ForwardBackward"},
    )
    assert got.headers["content-type"] == PROTOBUF
    out = codec.ForwardBackwardOutput.FromString(got.content)
    assert dict(out.metrics) == {"loss:sum": 1.0} and out.loss_fn_outputs[0].num_datums == 1
    logprobs = np.frombuffer(out.loss_fn_outputs[0].fields["logprobs"].data, "<f4")
    np.testing.assert_allclose(logprobs, [-0.05, -0.06, -0.07], rtol=1e-6)
    step = server.future("optim_step", model_id=model_id, seq_id=2, adam_params={"learning_rate": 0.5})
    assert step == {"metrics": {"grad_norm": 1.0, "lr": 0.5}}
    again = server.call("retrieve_future", request_id=posted["request_id"])  # repeated, and now as JSON
    assert again["loss_fn_outputs"][0]["logprobs"]["data"] == pytest.approx([-0.05, -0.06, -0.07])


def test_old_json_and_compressed_bodies_and_forward(server):
    model_id = server.model()
    out = server.future("forward_backward", **old_train(model_id, 1, "forward_backward"))
    assert out["metrics"] == {"loss:sum": 1.0}
    server.future("forward", **old_train(model_id, 2, "forward"))
    assert server.answers.seen[-1].forward_only and not server.answers.seen[-2].forward_only
    packed = zstandard.compress(message(model_id, 3, forward_only=True))
    headers = {"Content-Type": PROTOBUF, "Content-Encoding": "zstd"}
    posted = server.http.post("/api/v1/forward_backward", content=packed, headers=headers).json()
    server.call("retrieve_future", request_id=posted["request_id"])
    assert server.answers.seen[-1].forward_only and server.answers.seen[-1].seq_id == 3


def test_repeated_posts_are_one_request_and_order_is_that_of_the_numbers(server):
    model_id = server.model()
    step = {"model_id": model_id, "seq_id": 2, "adam_params": {}}
    early = server.call("optim_step", **step)
    assert server.call("optim_step", **step) == early
    first = server.call("forward_backward", **old_train(model_id, 1, "forward_backward"))
    server.call("retrieve_future", request_id=early["request_id"])
    server.call("retrieve_future", request_id=first["request_id"])
    ran = [one for one in server.answers.seen if getattr(one, "model_id", "") == model_id]
    assert [type(one) for one in ran[1:]] == [TrainRequest, OptimStep]


def test_content_that_is_wrong_fails_through_the_future(server):
    model_id = server.model()
    wrong = server.future("optim_step", model_id=model_id, seq_id=1, adam_params={"learning_rate": "fast"})
    assert wrong["category"] == "user" and "learning_rate" in wrong["error"]
    right = server.future("optim_step", model_id=model_id, seq_id=2, adam_params={})
    assert right["metrics"]["grad_norm"] == 1.0


@pytest.mark.parametrize(
    ("path", "content", "kind"),
    [
        ("forward_backward", b"\xff\xff\xff", PROTOBUF),
        ("forward_backward", b"{}", "application/json"),
        ("forward_backward", b"x", "text/plain"),
        ("optim_step", b"{", "application/json"),
        ("optim_step", b"[" * 100_000, "application/json"),
        ("optim_step", b'{"model_id": 3}', "application/json"),
        ("create_model", b"[]", "application/json"),
        ("asample", b"{}", "application/json"),
        ("retrieve_future", b"{}", "application/json"),
        ("retrieve_future", b"\xff", "application/json"),
        ("cancel_future", b'{"request_id": ["a"]}', "application/json"),
        ("retrieve_futures", b"{}", "application/json"),
        ("create_session", b'"x"', "application/json"),
        ("create_custom_loss", b"{}", "application/json"),
    ],
)
def test_malformed_bodies_are_400_with_a_line(server, path, content, kind):
    answer = server.http.post(f"/api/v1/{path}", content=content, headers={"Content-Type": kind})
    detail = answer.json()["detail"]
    assert answer.status_code == 400 and detail and "\n" not in detail and "Traceback" not in detail


def test_a_model_in_anothers_session_is_404_at_once(server):
    answer = server.post(
        "create_model", session_id="s-none", model_seq_id=0, base_model="tiny", lora_config={"rank": 4}
    )
    assert answer.status_code == 404


def test_sampling_acknowledges_every_sequence(server):
    sampler = sampling_session(server)
    done = asample(server, sampler, 0, num_samples=3, sampling_params={"max_tokens": 5})
    assert len(set(done["sample_sequence_ids"])) == 3
    assert asample(server, sampler, 0, num_samples=3, sampling_params={"max_tokens": 5}) == done
    headers = {"Accept": PROTOBUF}
    got = server.http.post("/api/v1/retrieve_future", json={"request_id": done["request_id"]}, headers=headers)
    out = codec.SampleResponse.FromString(got.content)
    assert len(out.sequences) == 3 and out.sequences[0].stop_reason == 1
    assert np.frombuffer(out.sequences[0].tokens, "<i4").tolist() == [ord(c) for c in TEXT[:5]]
    plain = server.call("retrieve_future", request_id=done["request_id"])
    assert plain["type"] == "sample" and plain["sequences"][0]["stop_reason"] == "length"
    big = asample(server, sampler, 7 * 10**9 + 5)  # a clone's number, beyond 32 bits
    assert "sequences" in server.call("retrieve_future", request_id=big["request_id"])


def test_old_samples_without_a_session(server):
    prompt = {"chunks": [{"tokens": [1, 2]}]}
    assert "sequences" in server.future("asample", base_model="tiny", prompt=prompt, seq_id=0)
    answer = server.post("asample", model_path="tinker://x/sampler_weights/y", prompt=prompt, seq_id=0)
    assert answer.status_code == 404


def test_ephemeral_save_and_unload(server):
    model_id = server.model()
    saved = server.future("save_weights_for_sampler", model_id=model_id, seq_id=1, sampling_session_seq_id=4,
                          kind="snapshot", type="save_weights_for_sampler")  # fmt: skip
    assert saved == {"path": None, "sampling_session_id": model_id.replace("train:0", "sample:4")}
    assert server.get(f"samplers/{saved['sampling_session_id']}")["base_model"] == "tiny"
    assert server.future("unload_model", model_id=model_id)["model_id"] == model_id


def test_a_poll_waits_and_says_why_and_is_woken_at_once(server, held, short_polls):
    model_id_body = {
        "session_id": server.session(),
        "model_seq_id": 0,
        "base_model": "tiny",
        "lora_config": {"rank": 8},
    }
    request_id = server.call("create_model", **model_id_body)["request_id"]
    began = time.monotonic()
    pending = server.post("retrieve_future", request_id=request_id)
    assert 0.25 < time.monotonic() - began < 5 and pending.status_code == 408
    body = pending.json()
    assert body["queue_state"] == "active" and body["queue_state_reason"] and "error" not in body
    routes_work.POLL_SECONDS = 30.0
    with ThreadPoolExecutor(3) as pool:  # two polls of one future, and another request meanwhile
        polls = [pool.submit(server.post, "retrieve_future", request_id=request_id) for _ in range(2)]
        time.sleep(0.2)
        assert server.get("healthz") and not any(poll.done() for poll in polls)
        server.answers.hold.clear()
        began = time.monotonic()
        assert [poll.result().json()["type"] for poll in polls] == ["create_model"] * 2
        assert time.monotonic() - began < 5


def test_unknown_futures_are_410_and_anothers_too(tmp_path):
    with serving(tmp_path, keys={"tml-a": "ann", "tml-b": "bob"}) as server:
        ann, bob = server.client("tml-a"), server.client("tml-b")
        body = {"session_id": server.session(ann), "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 8}}
        request_id = server.call("create_model", ann, **body)["request_id"]
        assert server.post("retrieve_future", ann, request_id="nope").status_code == 410
        assert server.post("retrieve_future", bob, request_id=request_id).status_code == 410
        model_id = server.call("retrieve_future", ann, request_id=request_id)["model_id"]
        assert server.post("get_info", bob, model_id=model_id).status_code == 404
        assert server.post("optim_step", bob, model_id=model_id, seq_id=1, adam_params={}).status_code == 400
        assert server.post("create_model", bob, **body).status_code == 404
        assert server.future("optim_step", ann, model_id=model_id, seq_id=1, adam_params={})["metrics"]


def test_a_fault_of_ours_is_never_a_500_of_retrieve_future(server, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("secret\ndetail")

    monkeypatch.setattr(server.desk, "outcome", broken)
    with caplog.at_level("ERROR", logger="skyrl.service"):
        got = server.call("retrieve_future", request_id="x")
    assert got == {"error": "the server failed on this request; its log says why", "category": "server"}
    line = caplog.records[-1].getMessage()
    assert "RuntimeError: secret detail" in line and "\n" not in line and "retrieve_future" in line
    monkeypatch.setattr(server.desk, "open_model", broken)
    answer = server.post("get_info", model_id="x")
    assert answer.status_code == 500 and "secret" not in answer.text


def test_too_much_work_is_429(tmp_path):
    with serving(tmp_path, max_queued_samples=4) as server:
        server.answers.hold.set()
        sampler = sampling_session(server)
        asample(server, sampler, 0, num_samples=4)
        prompt = {"chunks": [{"tokens": [1]}]}
        answer = server.post("asample", sampling_session_id=sampler, seq_id=1, prompt=prompt)
        assert (
            answer.status_code == 429 and answer.headers["retry-after"] == "1" and "waiting" in answer.json()["detail"]
        )


def test_cancelled_samples_fail_and_others_stay(server, held):
    sampler = sampling_session(server)
    first, second = asample(server, sampler, 0), asample(server, sampler, 1)
    assert server.post("cancel_future", request_id=first["request_id"]).status_code == 204
    assert server.post("cancel_future", request_id="unknown").status_code == 204
    assert "cancelled" in server.call("retrieve_future", request_id=first["request_id"])["error"]
    server.answers.hold.clear()
    assert "sequences" in server.call("retrieve_future", request_id=second["request_id"])


def test_a_feed_tells_ends_once_and_by_clone(server, held):
    sampler = sampling_session(server)
    ids = [asample(server, sampler, i)["request_id"] for i in range(3)]
    other = asample(server, sampler, 2 * 10**9)["request_id"]
    target = {"type": "sampling_session", "sampling_session_id": sampler}
    assert server.call("retrieve_futures", target=target, prev_cursor=0, timeout=0)["completions"] == []
    server.post("cancel_future", request_id=ids[1])
    one = server.call("retrieve_futures", target=target, prev_cursor=0)
    assert one["completions"] == [{"state": "failed", "request_id": ids[1]}]
    waiter = ThreadPoolExecutor(1).submit(
        server.call, "retrieve_futures", target=target, prev_cursor=one["cursor"], retrieved_request_ids=[ids[1]]
    )
    time.sleep(0.1)
    assert not waiter.done()
    server.answers.hold.clear()
    seen, cursor = [], waiter.result()
    while cursor["completions"]:
        seen += [end["request_id"] for end in cursor["completions"]]
        cursor = server.call("retrieve_futures", target=target, prev_cursor=cursor["cursor"], timeout=0)
        time.sleep(0.05)
    assert sorted(seen) == sorted([ids[0], ids[2]])
    clone = server.call("retrieve_futures", target={**target, "cloned_sampler_id": 2}, prev_cursor=0)
    assert clone["completions"] == [{"state": "finished", "request_id": other}]
    assert "sequences" in server.call("retrieve_future", request_id=ids[0])  # what it was told of can be fetched
    again = server.call("retrieve_futures", target=target, prev_cursor=0, timeout=0)
    assert ids[0] not in [end["request_id"] for end in again["completions"]]


def test_large_bodies_are_refused_before_they_are_read(tmp_path):
    with serving(tmp_path, max_request_mib=1) as server:
        sent = 0

        def endless():
            nonlocal sent
            for _ in range(64):
                sent += 1 << 18
                yield bytes(1 << 18)

        answer = server.http.post("/api/v1/create_session", content=bytes((1 << 20) + 1))
        assert answer.status_code == 413 and "max_request_mib" in answer.json()["detail"]
        with server.client() as http:
            try:
                assert http.post("/api/v1/telemetry", content=endless()).status_code == 413
            except Exception as error:  # the door may close while the client still writes
                assert type(error).__name__ in ("WriteError", "ReadError", "RemoteProtocolError")
        bomb = zstandard.compress(bytes(64 << 20))
        headers = {"Content-Type": PROTOBUF, "Content-Encoding": "zstd"}
        answer = server.http.post("/api/v1/forward_backward", content=bomb, headers=headers)
        assert answer.status_code == 400 and "decompressed" in answer.json()["detail"]
        assert server.get("healthz") == {"status": "ok"}


def test_stopping_wakes_polls_and_ends_soon(tmp_path):
    with serving(tmp_path) as server:
        server.answers.hold.set()
        body = {"session_id": server.session(), "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 8}}
        request_id = server.call("create_model", **body)["request_id"]
        answers = []
        poll = threading.Thread(target=lambda: answers.append(server.post("retrieve_future", request_id=request_id)))
        poll.start()
        time.sleep(0.3)
        began = time.monotonic()
        server.serving.stop()
        poll.join(10)
        assert time.monotonic() - began < 5 and answers[0].status_code == 408
        with pytest.raises(RunError, match="the HTTP thread has ended"):
            server.serving.check()


def test_no_such_endpoint_and_method_have_json_bodies(server):
    answer = server.http.get("/api/v1/nothing/here")
    assert answer.status_code == 404 and "no such endpoint" in answer.json()["detail"]
    answer = server.http.get("/api/v1/create_model")
    assert answer.status_code == 405 and answer.json()["detail"]


def test_feeds_forget_the_oldest(monkeypatch):
    monkeypatch.setattr(routes_work, "FEED_IDS", 2)
    monkeypatch.setattr(routes_work, "ALL_FEED_IDS", 3)
    feeds, one, two = routes_work.Feeds(), ("a", "s", 0), ("a", "t", 0)
    for name in ("1", "2", "3"):
        feeds.add(*one, name)
    assert feeds.waiting(one) == ["2", "3"]
    for name in ("4", "5"):
        feeds.add(*two, name)
    assert feeds.waiting(one) == ["3"] and feeds.waiting(two) == ["4", "5"]
    feeds.ended(two, "4", "finished")
    assert feeds.news(two, 0)[1] == [{"state": "finished", "request_id": "4"}] and feeds.waiting(two) == ["5"]
    for name in ("3", "4", "5", "5"):
        feeds.fetched(name)
    assert feeds.news(two, 0) == (0, []) and vars(feeds)["_open"] == vars(feeds)["_done"] == {}
