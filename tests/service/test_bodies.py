"""Bodies: whatever a client sends, others are answered meanwhile, and lists are bounded by name."""

import asyncio
import gc
import gzip
import json
import threading
import time
import weakref

import numpy as np
import pytest
import zstandard
from door_server import serving
from starlette.requests import Request

from skyrl.service.codec import JSON, PROTOBUF
from skyrl.types import UserError
from skyrl.web import http
from skyrl.web.http import BodyReader, check_json, read_json

MIB = 1 << 20
TRAIN = b'{"model_id":"a:train:0","seq_id":1,"forward_backward_input":{"loss_fn":"ppo","data":[%s]}}'


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("door")) as server:
        yield server


def many(one: bytes, count: int) -> bytes:
    return b",".join([one] * count)


TAGS = b'{"tags":[%s]}'
BOMBS = {  # (path, body decompressed, content type, encoding, status, what is told)
    "zeros": ("forward_backward", lambda: bytes(60 * MIB), PROTOBUF, "zstd", 400, "not the protobuf message"),
    "datums": ("forward_backward", lambda: b"\x1a\x00" * MIB, PROTOBUF, "zstd", 400, "more than 65536 datums"),
    "numbers": ("forward_backward", lambda: b"\x10\x01" * (2 * MIB), PROTOBUF, "zstd", 400, "1048576 fields"),
    "lists": ("forward_backward", lambda: TRAIN % many(b"[]", 2 * MIB), JSON, "zstd", 400, "more than 262144 lists"),
    "objects": ("asample", lambda: many(b"{}", 2 * MIB), JSON, "zstd", 400, "more than 262144 lists"),
    "deep": ("forward_backward", lambda: b"[" * (30 * MIB), JSON, "zstd", 400, "nested too deeply"),
    "values": ("asample", lambda: b"[" + many(b"0", 3 * MIB) + b"]", JSON, "zstd", 400, "more than 2097152 values"),
    "tags": ("create_session", lambda: TAGS % many(b"[]", 2 * MIB), JSON, "", 413, "4 MiB may be (in create_session)"),
    "packed tags": ("create_session", lambda: TAGS % many(b"[]", 2 * MIB), JSON, "zstd", 400, "at most 4194304"),
    "some tags": ("create_session", lambda: TAGS % many(b"[]", 250_000), JSON, "", 400, "tags=a list of 250000"),
    "gzip": ("forward_backward", lambda: bytes(MIB), PROTOBUF, "gzip", 400, "'gzip'; allowed: none, zstd"),
    "keys": (
        "asample",
        lambda: b"{" + b",".join(b'"%d":1' % i for i in range(300_000)) + b"}",
        JSON,
        "zstd",
        400,
        "keys",
    ),
    "digits": ("asample", lambda: b"[" + many(b"1" * 4000, 10_000) + b"]", JSON, "zstd", 400, "1024 digits"),
    "prompts": ("/v1/completions", lambda: many(b'"a"', 3 * MIB), JSON, "zstd", 400, "more than 2097152 values"),
    "events": ("telemetry", lambda: TAGS % many(b"[]", 10 * MIB), JSON, "", 200, "accepted"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_body_holds_up_nobody(server, name):
    path, made, kind, encoding, status, told = BOMBS[name]
    pack = {"zstd": zstandard.compress, "gzip": lambda body: gzip.compress(body, 1), "": bytes}[encoding]
    body = pack(made())
    headers = {"Content-Type": kind, **({"Content-Encoding": encoding} if encoding else {})}
    took, done = [], threading.Event()

    def ask():
        with server.client() as http:
            while not (done.is_set() and took):
                begun = time.monotonic()
                assert http.get("/api/v1/healthz").status_code == 200
                took.append(time.monotonic() - begun)
                time.sleep(0.002)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        path = path if path.startswith("/") else f"/api/v1/{path}"
        answer = server.http.post(path, content=body, headers=headers)
    finally:
        done.set()
        asking.join()
    assert (answer.status_code, told in answer.text) == (status, True), answer.text
    assert max(took) < 2.0, "the event loop stood still"  # some tens of milliseconds on a quiet machine


def posted(content: bytes, **headers: str) -> Request:
    async def receive():
        await asyncio.sleep(0)
        return {"type": "http.request", "body": content, "more_body": False}

    given = [(b"content-length", str(len(content)).encode()), *((k.encode(), v.encode()) for k, v in headers.items())]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": given}, receive)


def test_large_bodies_of_one_sender_queue_behind_each_other_and_small_ones_before_them():
    order, running, together = [], [], []

    async def all_of_them() -> None:
        reader = BodyReader()

        async def send(sender: str, size: int) -> None:
            def read(body: bytes) -> None:
                running.append(sender)
                together.append(sorted(running))
                if len(body) > http.SMALL_BYTES:
                    time.sleep(0.02)
                running.remove(sender)
                order.append((sender, len(body)))

            await reader.parse(posted(bytes(size)), sender, read, max_bytes=MIB, limit="here")

        large = http.SMALL_BYTES + 1
        await asyncio.gather(*(send("a", large) for _ in range(12)), send("b", large), send("a", 7), send("c", 7))

    asyncio.run(all_of_them())
    assert order.index(("a", 7)) < 3 and order.index(("c", 7)) < 3, "small ones wait for no large one"
    assert order.index(("b", http.SMALL_BYTES + 1)) < 6, "a large one waits for none of another sender"
    assert all(one.count("a") <= 2 and len(one) <= 3 for one in together) and ["a", "b"] in together


def test_the_decompressed_size_decides_where_a_body_is_read():
    here, told = threading.current_thread(), {}
    unknown = zstandard.ZstdCompressor().compressobj()
    bodies = {
        "small": (bytes(100), ""),
        "small packed": (zstandard.compress(bytes(100)), "zstd"),
        "a small body that is large": (zstandard.compress(bytes(MIB)), "zstd"),
        "of unknown size": (unknown.compress(bytes(100)) + unknown.flush(), "zstd"),
        "large": (bytes(MIB), ""),
    }

    async def read_all() -> None:
        for name, (body, encoding) in bodies.items():
            request = posted(body, **{"content-encoding": encoding} if encoding else {})
            told[name] = await BodyReader().parse(
                request, "a", lambda body: threading.current_thread() is here, max_bytes=MIB, limit="here"
            )

    asyncio.run(read_all())
    assert [name for name, in_loop in told.items() if in_loop] == ["small", "small packed"]


def test_json_is_counted_before_it_is_built(monkeypatch):
    """Against the structure that is built, for random values, cut at every place that a part could end."""
    rng = np.random.default_rng(0)
    texts = ["", "a,b", 'q"[{,', "back\\", '\\"', "\\\\", "[[[[", "\u20ac,", '\\"{']

    def draw(depth: int):
        kind = rng.integers(0, 4 if depth < 5 else 2)
        if kind < 2:
            return texts[rng.integers(len(texts))] if kind else int(rng.integers(-5, 5))
        items = [draw(depth + 1) for _ in range(rng.integers(0, 5))]
        return items if kind == 2 else {f"{texts[i % len(texts)]}{i}": item for i, item in enumerate(items)}

    def measure(value) -> tuple[int, int, int, int]:
        """(commas, containers, depth, keys)"""
        if not isinstance(value, (list, dict)):
            return 0, 0, 0, 0
        inside = [measure(item) for item in (value.values() if isinstance(value, dict) else value)]
        commas = sum(one[0] for one in inside) + max(0, len(inside) - 1)
        keys = sum(one[3] for one in inside) + (len(inside) if isinstance(value, dict) else 0)
        return commas, 1 + sum(one[1] for one in inside), 1 + max((one[2] for one in inside), default=0), keys

    monkeypatch.setattr(http, "SMALL_BYTES", 0)
    for trial in range(150):
        value = draw(0)
        commas, containers, depth, keys = measure(value)
        body = json.dumps(value, ensure_ascii=bool(trial % 2)).encode()
        monkeypatch.setattr(http, "COUNTED_BYTES", int(rng.integers(1, 12)))
        limits = {"JSON_VALUES": commas + containers, "JSON_CONTAINERS": containers, "JSON_DEPTH": depth}
        limits |= {"JSON_KEYS": keys, "JSON_DIGITS": 1}
        for name, limit in limits.items():
            monkeypatch.setattr(http, name, limit)
        check_json(body)
        for name, limit in list(limits.items())[:4]:
            if limit:
                monkeypatch.setattr(http, name, limit - 1)
                with pytest.raises(UserError):
                    check_json(body)
                monkeypatch.setattr(http, name, limit)


def test_a_number_of_very_many_digits_is_refused_before_it_is_built():
    for body in (b'["%s"]' % (b"1" * 60_000), b'["a", %s]' % (b"1" * 1024), b'["%s\\"", 1]' % (b"1" * 60_000)):
        check_json(body + b" " * 60_000)
    for body in (b"1" * 60_000, b'["a\\"", -%s]' % (b"1" * 60_000), b'{"a": 0.%s}' % (b"1" * 60_000)):
        with pytest.raises(UserError, match="more than 1024 digits"):
            check_json(body)


def test_a_refused_body_is_let_go_of_at_once():
    """What is refused in a thread comes back with all that it worked on, in a circle with the future that brings it."""

    class Body:
        pass

    async def refuse(kept: list):
        def read():
            body = Body()
            kept.append(weakref.ref(body))
            try:
                raise ValueError(body)
            except ValueError:
                raise UserError("no") from None

        with pytest.raises(UserError):
            await http.in_thread(read)

    kept: list = []
    gc.disable()
    try:
        asyncio.run(refuse(kept))
    finally:
        gc.enable()
    assert kept[0]() is None


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_json_of_another_encoding_is_refused(encoding):
    with pytest.raises(UserError, match="not JSON"):
        read_json('{"a": "b"}'.encode(encoding))


LISTS = {
    "tags": ("create_session", {"tags": ["a"] * 257}, "tags=a list of 257; allowed: at most 256"),
    "a tag": ("create_session", {"tags": ["a" * 257]}, "tags[0]='aaa"),
    "no text": ("create_session", {"tags": [[]]}, "tags[0]=a list of 0; allowed: a string"),
    "metadata": ("create_session", {"user_metadata": {f"k{i}": i for i in range(1025)}}, "user_metadata=a mapping"),
    "deep metadata": (
        "create_session",
        b'{"user_metadata":{"a":' + b"[" * 900 + b"]" * 900 + b"}}",
        "nested too deeply",
    ),
    "words": ("sessions/search", {"display_name": "a " * 1000}, "display_name has 1000 words; allowed: at most 32"),
    "keys": ("sessions/search", {"user_metadata": {f"k{i}": "" for i in range(995)}}, "user_metadata=a mapping of 995"),
    "statuses": ("sessions/search", {"statuses": [{"type": "active"}] * 1000}, "statuses=a list of 1000"),
    "reasons": ("sessions/search", {"statuses": [{"type": "failed", "reasons": ["a"] * 65}]}, "reasons=a list of 65"),
    "projects": ("sessions/search", {"project_ids": ["a"] * 257}, "project_ids=a list of 257"),
    "very many projects": ("sessions/search", {"project_ids": ["abc"] * 250_000}, "project_ids=a list of 250000"),
    "owners": ("sessions/search", {"owner": {"type": "user", "owner_urns": ["a"] * 65}}, "owner_urns=a list of 65"),
    "owner": ("sessions/search", {"owner": {"type": "user", "owner_urns": [1]}}, "owner_urns[0]=1; allowed: a string"),
    "cursor": (
        "sessions/search",
        {"cursor": {"last_created_at": "x" * 5000, "last_session_id": "a"}},
        "last_created_at",
    ),
    "fetched": (
        "retrieve_futures",
        {"target": {"sampling_session_id": "a"}, "timeout": 0, "retrieved_request_ids": ["a"] * 70_000},
        "retrieved_request_ids=a list of 70000",
    ),
    "turns": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a"}] * 4097},
        "messages=a list of 4097",
    ),
    "parts": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 1025}]},
        "content=a list of 1025",
    ),
    "prompts": ("/v1/completions", {"prompt": ["a"] * 1025}, "a list of 1 to 1024"),
    "stops": ("/v1/completions", {"prompt": "a", "stop": ["a"] * 17}, "stop=a list of 17"),
}


@pytest.mark.parametrize("name", LISTS)
def test_every_list_has_a_bound_and_is_refused_by_name(server, name):
    path, body, told = LISTS[name]
    if path.startswith("/v1/"):
        body = {"model": "tiny", **body}
    path = path if path.startswith("/") else f"/api/v1/{path}"
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = server.http.post(path, content=content, headers={"Content-Type": JSON})
    assert answer.status_code == 400 and told in answer.text and "\n" not in answer.text, answer.text


def test_the_largest_searches_are_answered(server):
    body = {
        "display_name": " ".join(["a"] * 32),
        "user_metadata": {f"k{i}": "" for i in range(64)},
        "project_ids": ["p"] * 256,
        "statuses": [{"type": "client_finished", "reasons": ["success"] * 16}] * 16,
        "owner": {"type": "user", "owner_urns": ["local"] * 64},
    }
    assert server.call("sessions/search", **body)["sessions"] == []


def test_a_post_may_be_repeated_under_a_short_key_only(server):
    answer = server.http.post("/api/v1/create_session", json={}, headers={"X-Idempotency-Key": "a" * 300})
    assert answer.status_code == 400 and "X-Idempotency-Key: 300 characters" in answer.text
