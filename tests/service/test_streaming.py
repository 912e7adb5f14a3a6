"""Text that is streamed while it is drawn, by a real service over real HTTP."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest
from inprocess import open_client

from skyrl.service.frontend import start_http_server

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    with open_client(folder, "service.port=0", "service.slice_seconds=0.005") as client:
        service = client.service
        opened = start_http_server(service)
        with httpx.Client(base_url=opened.url, timeout=60) as http:
            yield http, service
        opened.stop()


def ask(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": PROMPT, "max_tokens": 2000, "seed": 4, **more}


def whole(http: httpx.Client, **more: Any) -> list[dict[str, Any]]:
    answer = http.post("/v1/completions", json=ask(**more))
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def stream(http: httpx.Client, **more: Any) -> list[tuple[float, dict[str, Any]]]:
    """(seconds since the request, choice) of every piece."""
    found, start = [], time.monotonic()
    with http.stream("POST", "/v1/completions", json=ask(stream=True, **more)) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                found += [(time.monotonic() - start, one) for one in json.loads(line[6:])["choices"]]
    return found


def joined(pieces: list[tuple[float, dict[str, Any]]], index: int = 0) -> str:
    return "".join(one["text"] for _, one in pieces if one["index"] == index)


def test_the_first_piece_comes_long_before_the_last(door):
    http, _ = door
    expected = whole(http, temperature=0)[0]  # greedy: this model then never draws the end
    assert expected["finish_reason"] == "length"
    pieces = stream(http, temperature=0)
    assert joined(pieces) == expected["text"]
    assert [one["finish_reason"] for _, one in pieces if one["finish_reason"]] == [expected["finish_reason"]]
    times = [at for at, _ in pieces]
    assert len(pieces) > 3 and times == sorted(times)  # how many depends on how fast the machine draws
    assert times[0] < times[-1]  # by how much depends on the machine
    longest = max(len(one["text"]) for _, one in pieces)
    assert longest < len(expected["text"]) / 3  # and not most of it at once


def test_several_samples_and_stops_while_another_does_not_stream(door):
    http, service = door
    plain = whole(http, n=3, max_tokens=300)
    text = plain[1]["text"]
    stop = text[len(text) // 2 :][:3]
    expected = whole(http, n=3, max_tokens=300, stop=[stop, "never there"], logprobs=2)
    pieces = stream(http, n=3, max_tokens=300, stop=[stop, "never there"], logprobs=2)
    for index in range(3):
        assert joined(pieces, index) == expected[index]["text"]
        (last,) = [one for _, one in pieces if one["index"] == index and one["finish_reason"]]
        assert last["finish_reason"] == expected[index]["finish_reason"]
        assert last["logprobs"] == expected[index]["logprobs"]
    assert any(one["finish_reason"] == "stop" for one in expected)
    assert all(one["logprobs"] is None for _, one in pieces if not one["finish_reason"])


def test_nothing_is_watched_when_nobody_streams(door, monkeypatch):
    http, service = door
    leader, slices, told = service.worker.leader, [], []
    call, progress = leader.call, service.scheduler.progress

    def noted(method: str, *args: Any, parts: Any = None) -> Any:
        slices.extend(len(part.watched) for part in parts or [] if method == "sample")
        return call(method, *args, parts=parts)

    monkeypatch.setattr(leader, "call", noted)
    monkeypatch.setattr(service.scheduler, "progress", lambda *args: (told.append(args), progress(*args)))
    whole(http, temperature=0)
    assert slices and not any(slices) and not told
    stream(http, temperature=0)
    assert any(slices) and told


def test_a_reader_that_leaves_ends_the_draw(door):
    http, service = door
    with http.stream("POST", "/v1/completions", json=ask(stream=True, max_tokens=4000, temperature=0, n=60)) as answer:
        lines = answer.iter_lines()  # held: when the iterator is dropped, httpx closes the connection at once
        assert next(lines).startswith("data: {") and service.worker.sampling._active
    deadline = time.monotonic() + 10
    while service.worker.sampling._active and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not service.worker.sampling._active
