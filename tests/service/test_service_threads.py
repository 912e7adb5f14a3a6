"""What keeps clients from each other's threads and time: long searches, half-sent bodies, training beside sampling."""

import logging
import socket
import threading
import time

import pytest
from door_server import serving

from skyrl.web import http


@pytest.fixture
def server(tmp_path):
    with serving(tmp_path) as server:
        yield server


def half_sent(server) -> socket.socket:
    """A request of which half the body has come."""
    sender = socket.create_connection(("127.0.0.1", server.serving.port))
    sender.sendall(b"POST /api/v1/asample HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{")
    return sender


def test_searches_leave_threads_to_everything_else(server, monkeypatch):
    """Sixty of them, more than there are threads for what waits for a disk, keep no session from starting."""
    searching, go_on, store = threading.Event(), threading.Event(), server.checkpoints.store

    def search(*args, made=store.search_sessions):
        searching.set()
        go_on.wait(30)
        return made(*args)

    monkeypatch.setattr(store, "search_sessions", search)
    session, answers = server.session(), []

    def ask():
        with server.client() as client:
            answers.append(server.call("sessions/search", client))

    asking = [threading.Thread(target=ask) for _ in range(60)]
    try:
        for thread in asking:
            thread.start()
        assert searching.wait(30)
        time.sleep(0.3)
        assert server.session() and server.call("session_heartbeat", session_id=session)
        assert not answers
    finally:
        go_on.set()
        for thread in asking:
            thread.join()
    assert len(answers) == 60


def test_a_body_of_which_nothing_comes_any_more_gives_up_its_place(server, monkeypatch):
    """Eight of them would keep all other large bodies of their sender waiting."""
    monkeypatch.setattr(http, "STALL_SECONDS", 0.2)
    senders = [half_sent(server) for _ in range(http.LARGE_BODIES)]
    answer = server.http.post("/api/v1/asample", content=b"[" + b" " * 100_000)
    assert answer.status_code == 400 and "not JSON" in answer.text
    for sender in senders:
        with sender:
            assert sender.recv(100).startswith(b"HTTP/1.1 408 ")


def test_what_is_half_sent_when_the_server_stops_is_cut_off_without_a_traceback(tmp_path, caplog):
    with caplog.at_level(logging.ERROR), serving(tmp_path) as server:
        sender = half_sent(server)
        assert server.http.get("/api/v1/healthz").status_code == 200
    with sender:
        assert not sender.recv(100).startswith(b"HTTP/1.1 2")
    assert not caplog.records
