"""Settings, sessions, samplers and facts over real HTTP."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from door_server import INFO, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("door")) as server:
        yield server


def test_settings_are_all_said(server):
    config = server.call("client/config", sdk_version="0.38.0")
    assert config["parallel_fwdbwd_chunks"] is False and config["custom_loss_server_side"] is False
    assert config["pjwt_auth_enabled"] is False and config["sample_use_retrieve_futures"] is False
    assert config["fwdbwd_max_chunk_bytes_count"] == 5_000_000
    assert server.http.post("/api/v1/client/config").status_code == 200  # no body at all
    dynamic = server.call("client/dynamic_config", sdk_version="0.38.0")
    assert dynamic["sample_cancel_enabled"] is True and dynamic["refresh_interval_sec"] >= 10


def test_chunks_stay_below_the_largest_body(tmp_path):
    with serving(tmp_path, max_request_mib=1) as small:
        assert small.call("client/config")["fwdbwd_max_chunk_bytes_count"] == 1 << 19


def test_health_telemetry_capabilities_and_key(server):
    assert server.get("healthz") == {"status": "ok"}
    assert server.call("telemetry", events=[{"a": 1}], session_id="sessionless-1") == {"status": "accepted"}
    models = server.get("get_server_capabilities")["supported_models"]
    assert [one["model_name"] for one in models] == list(INFO.aliases)
    assert models[0] == {"model_name": "tiny", "max_context_length": 4096, "trainable": True, "sampleable": True}
    key = server.get("auth/apikey/me")
    assert key["name"] == "local" and isinstance(key["key_id"], int)
    assert key["details"]["user_details"]["email"] == "local@localhost"
    assert server.http.delete("/api/v1/auth/apikey/me").status_code == 403


def test_a_session_from_begin_to_end(server):
    body = {
        "tags": ["a"], "user_metadata": {"k": "v", "n": 3}, "sdk_version": "0.38.0", "project_id": "p",
        "display_name": "my run", "type": "create_session", "a_later_field": 1,
    }  # fmt: skip
    made = server.call("create_session", **body)
    session = made["session_id"]
    assert made["type"] == "create_session" and "/" not in session
    assert server.call("session_heartbeat", session_id=session) == {"type": "session_heartbeat"}
    assert session in server.get("sessions", limit=100, offset=0)["sessions"]
    found = server.get(f"sessions/{session}")
    assert found["user_metadata"] == {"k": "v", "n": "3"} and found["display_name"] == "my run"
    assert server.http.put(f"/api/v1/sessions/{session}/project", json={"project_id": "q"}).status_code == 204
    told = server.get(f"sessions/{session}/trace_export")
    assert told["status"] == "ready"
    path = told["url"].partition("/api/")[2]
    assert server.http.get(f"/api/{path}").json()["traceEvents"] == []  # no work yet
    assert server.http.get(f"/api/{path}0").status_code == 403
    assert b"skyrl_samples_waiting" in server.http.get("/metrics").content
    hits = server.call("sessions/search", session_id=session, user_metadata={"k": "v"}, owner={"type": "own"})
    assert [one["session_id"] for one in hits["sessions"]] == [session]
    assert hits["sessions"][0]["project_id"] == "q" and hits["sessions"][0]["status"] == {"type": "active"}
    end = server.post(f"sessions/{session}/finish", reason={"type": "errored"}, detail="boom")
    assert end.status_code == 204 and end.content == b""
    query = {"statuses": [{"type": "client_finished", "reasons": ["errored"]}], "limit": 1}
    assert server.call("sessions/search", **query)["sessions"][0]["session_id"] == session


def test_metadata_of_any_length_is_refused(server):
    """It is kept and listed: many values that are each short enough may not add up to megabytes."""
    many = {f"name{i}": "x" * 60_000 for i in range(5)}
    answer = server.http.post("/api/v1/create_session", json={"user_metadata": many})
    assert answer.status_code == 422 or answer.status_code == 400, answer.text
    assert "user_metadata has 300025 characters in all; allowed: at most 262144" in answer.text


def test_search_pages_with_a_cursor_and_refuses_what_it_does_not_know(server):
    made = [server.session(display_name="paged one") for _ in range(3)]
    first = server.call("sessions/search", display_name="PAGED", limit=2)
    assert [one["session_id"] for one in first["sessions"]] == made[:0:-1]
    second = server.call("sessions/search", display_name="PAGED", limit=2, cursor=first["next_cursor"])
    assert [one["session_id"] for one in second["sessions"]] == made[:1] and "next_cursor" not in second
    for wrong in ({"limit": 0}, {"cursor": {"last_created_at": "x", "last_session_id": "y"}}, {"owner": {"type": "z"}},
                  {"statuses": [{"type": "z"}]}, {"nonsense": 1}):  # fmt: skip
        answer = server.post("sessions/search", **wrong)
        assert answer.status_code == 400 and answer.json()["detail"], wrong
    assert server.call("sessions/search", owner={"type": "user", "owner_urns": ["someone"]})["sessions"] == []


def test_heartbeat_of_an_unknown_session_is_410_and_others_404(server):
    assert server.post("session_heartbeat", session_id="s-none").status_code == 410
    for path in ("sessions/s-none", "sessions/s-none/trace_export", "samplers/s-none:sample:0"):
        answer = server.http.get(f"/api/v1/{path}")
        assert answer.status_code == 404 and "not found" in answer.json()["detail"]
    assert server.post("sessions/s-none/finish", reason={"type": "success"}).status_code == 404
    assert server.post("join_sampling_session", sampling_session_id="s-none:sample:0").status_code == 404
    assert server.post("get_info", model_id="s-none:train:0").status_code == 404


def test_sampling_sessions_of_a_base(server):
    session = server.session()
    body = {"session_id": session, "sampling_session_seq_id": 7, "base_model": "org/model"}
    made = server.call("create_sampling_session", type="create_sampling_session", **body)
    assert made == {"type": "create_sampling_session", "sampling_session_id": f"{session}:sample:7"}
    assert server.call("create_sampling_session", **body) == made  # a repeated post
    assert server.get(f"samplers/{session}:sample:7") == {
        "sampler_id": f"{session}:sample:7",
        "base_model": "org/model",
    }
    assert server.post("create_sampling_session", **{**body, "base_model": "tiny"}).status_code == 400
    joined = [server.call("join_sampling_session", sampling_session_id=f"{session}:sample:7") for _ in range(2)]
    assert [one["client_counter"] for one in joined] == [1, 2]
    assert f"{session}:sample:7" in server.get(f"sessions/{session}")["sampler_ids"]


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        ({"base_model": "no/such"}, 400, "model 'no/such' is not served here; there are: tiny, org/model"),
        ({"base_model": None}, 400, "needs base_model or model_path"),
        ({"model_path": "tinker://a/b"}, 400, "exactly three parts"),
        ({"model_path": "tinker://a/weights/.."}, 400, "begins with a dot"),
        ({"model_path": "tinker://a/external_weights/x"}, 400, "is for downloads"),
        ({"model_path": "tinker://a/sampler_weights/x"}, 404, "not found"),
        ({"session_id": "s-none"}, 404, "not found"),
        ({"sampling_session_seq_id": -1}, 400, "sampling_session_seq_id"),
        ({"sampling_session_seq_id": 2**70}, 400, "sampling_session_seq_id"),
        ({"surprise": True}, 400, "surprise"),
    ],
)
def test_sampling_sessions_that_cannot_be(server, change, status, told):
    body = {"session_id": server.session(), "sampling_session_seq_id": 0, "base_model": "tiny", **change}
    answer = server.post("create_sampling_session", **body)
    assert answer.status_code == status and told in answer.json()["detail"]


def test_get_info_says_everything(server):
    model_id = server.model()
    assert server.call("get_info", model_id=model_id, type="get_info") == {
        "type": "get_info",
        "model_id": model_id,
        "model_data": {"arch": "qwen3", "model_name": "tiny", "tokenizer_id": "some/tokenizer"},
        "is_lora": True,
        "lora_rank": 8,
        "model_name": "tiny",
        "optimizer_config": {"type": "adamw"},
    }


def test_a_token_stands_for_the_key(server):
    token = server.call("auth/token")["jwt"]
    assert re.fullmatch(r"eyJ[\w-]+\.[\w-]+\.[\w-]+", token)


def test_a_repeated_post_is_done_once(server):
    def post(key: str, path: str = "create_session", **body) -> dict:
        return server.http.post(f"/api/v1/{path}", json=body, headers={"X-Idempotency-Key": key}).json()

    with ThreadPoolExecutor(4) as pool:
        made = {one["session_id"] for one in pool.map(post, ["a"] * 8)}
    assert len(made) == 1 and post("b")["session_id"] not in made
    session = made.pop()
    assert server.http.post("/api/v1/create_session", json={}).json()["session_id"] != session
    wrong = {"sampling_session_id": f"{session}:sample:0"}
    assert "not found" in post("c", "join_sampling_session", **wrong)["detail"]
    server.call("create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model="tiny")
    joined = [post("c", "join_sampling_session", **wrong)["client_counter"] for _ in range(2)]
    assert joined == [1, 1]  # the error before was not kept
    prompt = {"chunks": [{"tokens": [1, 2]}]}
    assert post("d", "asample", base_model="tiny", prompt=prompt) == post(
        "d", "asample", base_model="tiny", prompt=prompt
    )
