"""POST /feedback over real HTTP, beside the OpenAI-style endpoints whose answers it is about."""

import contextlib
import json
import threading
import time

import httpx
import pytest
from door_server import TEXT, events, serving

from skyrl.config.schema import FeedbackConfig
from skyrl.feedback import door
from skyrl.types import UserError

KEYS = {"tml-ann": "ann", "tml-bob": "bob"}
OPTIONS = FeedbackConfig(enabled=True, rate_per_minute=10_000, objectives=["help", "safe"])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("door"), KEYS, feedback=OPTIONS) as server:
        server.ann, server.bob = server.client("tml-ann"), server.client("tml-bob")
        yield server


def asked(server, http=None, path="completions", **body):
    body = {"model": "tiny", "max_tokens": 4, **({"prompt": "ab"} if path == "completions" else {}), **body}
    answer = (http or server.ann).post(f"/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text
    return events(answer.text)[0]["id"] if body.get("stream") else answer.json()["id"]


def said(server, http=None, path="/feedback", **body):
    return (http or server.ann).post(path, json=body)


def row(server, episode, choice=0):
    """What is kept of an answer and of its feedback."""
    with contextlib.closing(server.queue._db.cursor()) as db:
        answer = db.execute("SELECT * FROM answers WHERE episode = ? AND choice = ?", (episode, choice)).fetchone()
        return answer, db.execute("SELECT objectives, comment FROM feedback WHERE episode = ? AND choice = ?",
                                  (episode, choice)).fetchone()  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_an_answer_can_be_rated_as_soon_as_it_is_there(server, path, stream):
    messages = {"messages": [{"role": "user", "content": "hi"}]} if path.startswith("chat") else {}
    episode = asked(server, path=path, stream=stream, n=2, **messages)
    told = said(server, id=episode, choice=1, reward=0.25, comment="good\nindeed").json()
    assert told == {"id": episode, "choice": 1, "status": "accepted", "learns": True, "why": ""}
    answer, feedback = row(server, episode, 1)
    assert (
        feedback == ('{"reward": 0.25}', "good\nindeed") and answer[2:5] == ("ann", "tiny", 0) and answer[8] == "length"
    )
    assert answer[6] == b"".join(ord(c).to_bytes(8, "little") for c in TEXT[:4])
    assert row(server, episode, 0)[1] is None


def test_rewards_objectives_and_thumbs(server):
    for body, objectives in (
        ({"reward": -1}, {"reward": -1.0}), ({"thumbs": "up"}, {"reward": 1.0}), ({"thumbs": "down"}, {"reward": -1.0}),
        ({"objectives": {"help": 0.5, "safe": -1}}, {"help": 0.5, "safe": -1.0}),
        ({"objectives": {"reward": 0, "safe": 1.0}}, {"reward": 0.0, "safe": 1.0}),
    ):  # fmt: skip
        episode = asked(server)
        assert said(server, path="/v1/feedback", id=episode, **body).status_code == 200
        assert json.loads(row(server, episode)[1][0]) == objectives


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "give one of: reward, objectives, thumbs"),
        ({"reward": 1, "thumbs": "up"}, "give one of"),
        ({"reward": 1.5}, "reward=1.5; allowed: -1 to 1 (feedback.reward_limit)"),
        ({"reward": -1e300}, "allowed: -1 to 1"),
        ({"reward": float("nan")}, "allowed: a finite number"),
        ({"reward": float("inf")}, "allowed: a finite number"),
        ({"reward": "1"}, "reward='1'; allowed"),
        ({"reward": True}, "reward=True; allowed"),
        ({"reward": [1]}, "allowed"),
        ({"thumbs": "UP"}, "allowed: 'up' or 'down'"),
        ({"objectives": {}}, "feedback: objectives"),
        ({"objectives": {"help": 2}}, "help=2.0; allowed: -1 to 1"),
        ({"objectives": {"fun": 1}}, "objectives has 'fun'; allowed: help, safe"),
        ({"objectives": {"help": None}}, "allowed: a finite number"),
        ({"reward": 1, "choice": -1}, "choice=-1; allowed: 0 or more"),
        ({"reward": 1, "comment": "x" * 5000}, "at most 4096 characters"),
        ({"reward": 1, "idempotency_key": "x" * 300}, "at most 256 characters"),
        ({"reward": 1, "rewrad": 1}, "does not know: 'rewrad'"),
    ],
)
def test_what_is_out_of_range_is_refused_and_leaves_nothing(server, body, words):
    episode = asked(server)
    before = server.queue.counts("ann")
    answer = server.ann.post("/feedback", content=json.dumps({"id": episode, **body}))
    assert answer.status_code == 400 and words in answer.json()["detail"], answer.text
    assert row(server, episode)[1] is None
    assert server.queue.counts("ann") == {**before, "refused_invalid": before.get("refused_invalid", 0) + 1}


def test_bodies_that_are_none_and_keys_that_are_wrong(server):
    for content in (b"", b"[]", b"{", b"\xff", b'{"id": 5}'):
        assert server.ann.post("/feedback", content=content).status_code == 400
    assert server.ann.post("/feedback", content=b"x" * (2 << 20)).status_code == 413
    episode = asked(server)
    stranger = server.client("tml-other")
    assert (
        said(server, stranger, id=episode, reward=1).status_code == 401 and stranger.get("/feedback").status_code == 401
    )
    assert said(server, server.bob, id=episode, reward=1).status_code == 404  # told as what does not exist
    assert said(server, server.bob, id=episode, reward=1).json() == {
        "detail": f"feedback: no answer {episode!r}, choice 0"
    }
    assert server.bob.get("/feedback").json()["refused_forged"] == 2
    token = server.ann.post("/api/v1/auth/token").json()["jwt"]
    assert said(server, server.client(token), id=episode, reward=1).status_code == 200


def test_a_head_request_says_nothing_of_an_answer(server):
    before = server.queue.counts("ann")
    assert server.ann.head("/feedback").status_code == 200 and server.queue.counts("ann") == before


def test_a_replay_changes_nothing(server):
    episode, other = asked(server), asked(server)
    body = {"id": episode, "reward": 1, "idempotency_key": "k"}
    assert [said(server, **body).json()["status"] for _ in range(3)] == ["accepted", "repeated", "repeated"]
    assert said(server, **{**body, "reward": -1}).status_code == 409
    assert said(server, **{**body, "id": other}).status_code == 409
    assert row(server, episode)[1][0] == '{"reward": 1.0}' and row(server, other)[1] is None


def test_draws_that_say_nothing_about_the_policy_teach_nothing(server):
    for settings, words in (({"temperature": 0}, "temperature 0"), ({"top_p": 0.9}, "top_p"), ({"top_k": 5}, "top_k")):
        told = said(server, id=asked(server, **settings), reward=1).json()
        assert told["status"] == "accepted" and not told["learns"] and words in told["why"]


def test_what_is_not_drawn_is_not_kept(server):
    episode = asked(server, prompt="abc", max_tokens=0, echo=True)
    assert row(server, episode)[0] is None


def test_a_full_disk_costs_the_feedback_and_not_the_answer(server):
    server.queue._db.execute("PRAGMA query_only = 1")
    try:
        episode = asked(server)
        answer = said(server, id=episode, reward=1)
    finally:
        server.queue._db.execute("PRAGMA query_only = 0")
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert server.ann.get("/feedback").json()["refused_disk"] >= 2


def test_a_key_has_so_many_posts_a_minute(tmp_path):
    options = FeedbackConfig(enabled=True, rate_per_minute=1)
    with serving(tmp_path, KEYS, feedback=options) as server:
        ann, bob = server.client("tml-ann"), server.client("tml-bob")
        told = [said(server, ann, id="cmpl-x", reward=1).status_code for _ in range(2)]
        assert told == [404, 429]
        assert said(server, bob, id="cmpl-x", reward=1).status_code == 404
        assert ann.get("/feedback").json()["refused_limited"] >= 1


def test_without_feedback_there_is_no_such_endpoint(tmp_path):
    with serving(tmp_path) as server:
        assert server.http.post("/feedback", json={}).status_code == 404


def test_a_small_server_of_its_own_shares_the_queue(server, tmp_path, monkeypatch):
    started, stop = [], []
    real = door.serve_in_thread
    monkeypatch.setattr(door, "serve_in_thread", lambda *a, **k: started.append(real(*a, **k)) or started[-1])
    monkeypatch.setattr(door.signal, "signal", lambda number, call: stop.append(call))
    monkeypatch.setenv("SKYRL_API_KEYS", "ann:tml-ann")
    thread = threading.Thread(target=door.serve_feedback, args=([str(server.queue.folder), "service.port=0"],))
    thread.start()
    end = time.monotonic() + 30
    while len(stop) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    episode = asked(server)
    told = httpx.post(
        f"{started[0].url}/feedback", json={"id": episode, "thumbs": "up"}, headers={"x-api-key": "tml-ann"}
    )
    stop[0]()
    thread.join(30)
    assert (
        told.json()["status"] == "accepted"
        and row(server, episode)[1][0] == '{"reward": 1.0}'
        and not thread.is_alive()
    )


def test_the_small_server_says_what_it_needs():
    for args in ([], ["service.port=0"], ["--help"]):
        with pytest.raises(UserError, match="give the folder of the queue first"):
            door.serve_feedback(args)
    with pytest.raises(UserError, match=r"feedback.max_share=2"):
        door.serve_feedback(["x", "feedback.max_share=2"])
