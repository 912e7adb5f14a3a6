"""Keys, tokens and signed addresses, and that the door asks for them."""

import dataclasses
import sys
import time

import pytest
from door_server import serving

from skyrl.config.schema import ServiceConfig
from skyrl.types import UserError
from skyrl.web import auth
from skyrl.web.auth import Keys, Signer, is_loopback, read_keys


def settings(**values) -> ServiceConfig:
    return dataclasses.replace(ServiceConfig(), **values)


def test_keys_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SKYRL_API_KEYS", "eve:tml-eve")
    path = tmp_path / "keys"
    path.write_text("# people\nann: tml-a1\nann:tml-a2\n\nbob:tml-b:c\n")
    keys = read_keys(settings(keys_file=str(path)))
    assert [keys.owner(k) for k in ("tml-a1", "tml-a2", "tml-b:c", "tml-eve", "", None)] == [
        "ann", "ann", "bob", None, None, None,
    ]  # fmt: skip
    assert keys.required and keys.number("bob") == 3 and "tml-a1" not in repr(vars(keys))


def test_keys_of_the_environment_or_none(monkeypatch):
    monkeypatch.setenv("SKYRL_API_KEYS", "ann:tml-1, bob:tml-2,")
    keys = read_keys(settings(host="0.0.0.0"))
    assert (keys.owner("tml-1"), keys.owner("tml-2"), keys.owner("tml-3")) == ("ann", "bob", None)
    monkeypatch.delenv("SKYRL_API_KEYS")
    assert read_keys(settings()).owner(None) == "local"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tml-x", "entry 1: write name:key"),
        ("a b:tml-x", "entry 1: write name:key"),
        ("\nann:secret", "entry 2: the key of ann must begin with tml-"),
        ("ann:tml-x y", "must begin with tml- and have no spaces"),
        ("ann:tml-x\nbob:tml-x", "entry 2: bob has the same key as ann"),
        ("# nobody", "has no key"),
    ],
)
def test_keys_that_cannot_be_are_one_line_without_the_key(tmp_path, text, told):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_keys(settings(keys_file=str(path)))
    assert told in str(error.value) and "\n" not in str(error.value)
    assert "secret" not in str(error.value) and "tml-x" not in str(error.value)


def test_other_addresses_need_keys(tmp_path, monkeypatch):
    monkeypatch.delenv("SKYRL_API_KEYS", raising=False)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        with pytest.raises(UserError, match="others could use this server without a key"):
            read_keys(settings(host=host))
    assert not read_keys(settings(host="0.0.0.0", allow_anonymous=True)).required
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("localhost.evil.org", "1.2.3.4")))


def test_signed_addresses_hold_for_their_path_and_time(monkeypatch):
    signer = Signer()
    signed, expires = signer.sign("/a/tinker:x/y z", seconds=60)
    path, _, query = signed.partition("?")
    given = dict(part.split("=") for part in query.split("&"))
    assert path == "/a/tinker%3Ax/y%20z" and expires - time.time() <= 60
    assert signer.valid("/a/tinker:x/y z", **given)
    assert not signer.valid("/a/tinker:x/y", **given)
    assert not signer.valid("/a/tinker:x/y z", given["expires"] + "0", given["signature"])
    assert not signer.valid("/a/tinker:x/y z", given["expires"], "0" * 64)
    assert not signer.valid("/a/tinker:x/y z", "", "") and not signer.valid("/a", "9" * 40, "\ud800")
    assert not Signer().valid("/a/tinker:x/y z", **given)
    monkeypatch.setattr(auth.time, "time", lambda: expires + 1)
    assert not signer.valid("/a/tinker:x/y z", **given)


def test_tokens_hold_for_their_owner_and_time(monkeypatch):
    signer = Signer()
    token = signer.token("ann", seconds=60)
    assert signer.token_owner(token) == "ann" and Signer().token_owner(token) is None
    head, body, seal = token.split(".")
    other = signer.token("bob").split(".")[1]
    for forged in (f"{head}.{other}.{seal}", f"{head}.{body}.", "eyJ", "eyJ..", f"{head}.{body}.{seal}x", "\u20ac.."):
        assert signer.token_owner(forged) is None
    monkeypatch.setattr(auth.time, "time", lambda now=time.time(): now + 61)
    assert signer.token_owner(token) is None


def test_digests_and_not_keys_are_compared():
    keys = Keys({"tml-1": "ann"})
    assert keys.owner("tml-\udcff") is None and keys.owner("tml-1\x00") is None


def test_the_door_asks_for_a_key(tmp_path):
    with serving(tmp_path, keys={"tml-a": "ann", "tml-b": "bob"}) as server:
        nobody, ann, bob = server.client("tml-wrong"), server.client("tml-a"), server.client("tml-b")
        for path in ("client/config", "create_session", "retrieve_future", "asample", "get_info"):
            answer = server.post(path, nobody)
            assert answer.status_code == 401 and "TINKER_API_KEY" in answer.json()["detail"], path
        for path in ("training_runs", "checkpoints", "sessions", "audit", "get_server_capabilities"):
            assert nobody.get(f"/api/v1/{path}").status_code == 401, path
        del nobody.headers["X-API-Key"]
        assert nobody.get("/api/v1/sessions").status_code == 401 and nobody.get("/v1/models").status_code == 401
        assert nobody.get("/api/v1/healthz").status_code == 200
        bearer = {"Authorization": "bearer tml-a"}
        assert nobody.get("/v1/models", headers=bearer).status_code == 200
        assert server.get("auth/apikey/me", bob)["name"] == "bob" and server.get("auth/apikey/me", bob)["key_id"] == 2
        session = server.session(ann)
        assert server.get("sessions", ann)["sessions"] == [session] and server.get("sessions", bob)["sessions"] == []
        assert server.post("session_heartbeat", bob, session_id=session).status_code == 410
        token = server.call("auth/token", ann)["jwt"]
        assert server.get("sessions", server.client(token))["sessions"] == [session]
        answer = server.client(token[:-1]).get("/api/v1/sessions")
        assert answer.status_code == 401 and 'error="invalid_token"' in answer.headers["www-authenticate"]


def test_without_keys_web_pages_of_others_are_refused(tmp_path):
    with serving(tmp_path) as server:
        for page in ("https://evil.example", "null", "http://[", "http://[::1"):
            there = {"Origin": page}
            assert server.http.post("/api/v1/create_session", headers=there, content=b"{}").status_code == 403
        here = {"Origin": server.serving.url}
        assert server.http.post("/api/v1/create_session", headers=here, json={}).status_code == 200
        assert server.client("eyJ.any.thing").get("/api/v1/sessions").status_code == 200  # any key will do


def test_a_busy_event_loop_leaves_the_interpreter_to_who_computes(tmp_path):
    """With Python's own 5 ms each operation of a step would wait so long for the thread that serves HTTP."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.005)
    try:
        with serving(tmp_path):
            assert sys.getswitchinterval() <= 0.001
    finally:
        sys.setswitchinterval(before)
