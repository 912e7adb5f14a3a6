"""Runs, checkpoints, downloads and copies over real HTTP, with real files below."""

import io
import tarfile
from datetime import datetime, timezone

import httpx
import pytest
from door_server import ADAPTER, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    keys = {"tml-any": "ann", "tml-b": "bob"}
    with serving(tmp_path_factory.mktemp("door"), keys=keys) as server:
        yield server


@pytest.fixture(scope="module")
def bob(server):
    return server.client("tml-b")


@pytest.fixture(scope="module")
def run(server):
    """A run with a checkpoint of each kind, all called final."""
    run = server.model(user_metadata={"renderer_name": "role_colon"})
    kinds = ("save_weights", "save_weights_for_sampler", "save_weights_external")
    for number, kind in enumerate(kinds, 1):
        saved = server.future(kind, model_id=run, seq_id=number, path="final", ttl_seconds=7200)
        assert saved["path"].startswith(f"tinker://{run}/") and saved["path"].endswith("/final")
    return run


def one(run: str, checkpoint: str, rest: str = "") -> str:
    return f"/api/v1/training_runs/{run}/checkpoints/{checkpoint}{rest}"


def test_runs_are_listed_whole(server, bob, run):
    found = server.get(f"training_runs/{run}")
    assert found["training_run_id"] == run and found["base_model"] == "tiny" and found["model_owner"] == "ann"
    assert found["is_lora"] is True and found["lora_rank"] == 8 and found["corrupted"] is False
    assert found["user_metadata"] == {"renderer_name": "role_colon"}
    assert found["last_checkpoint"]["tinker_path"] == f"tinker://{run}/weights/final"
    assert found["last_sampler_checkpoint"]["checkpoint_type"] == "sampler"
    assert datetime.fromisoformat(found["last_request_time"]).tzinfo is not None
    page = server.get("training_runs", limit=1, offset=0, access_scope="owned")
    assert len(page["training_runs"]) == 1 and page["cursor"]["limit"] == 1 and page["cursor"]["total_count"] >= 1
    assert server.get("training_runs", bob)["training_runs"] == []
    assert bob.get(f"/api/v1/training_runs/{run}").status_code == 404


def test_checkpoints_are_listed_whole(server, bob, run):
    found = server.get(f"training_runs/{run}/checkpoints")
    assert server.get(f"models/{run}/checkpoints") == found  # release 0.3.0
    assert found["cursor"] == {"offset": 0, "limit": 3, "total_count": 3}
    kinds = {entry["checkpoint_id"]: entry["checkpoint_type"] for entry in found["checkpoints"]}
    assert kinds == {
        "weights/final": "training",
        "sampler_weights/final": "sampler",
        "external_weights/final": "external",
    }
    first = found["checkpoints"][0]
    assert first["size_bytes"] == sum(map(len, ADAPTER.values())) and first["public"] is False and first["expires_at"]
    page = server.get("checkpoints", limit=2, offset=0)
    assert len(page["checkpoints"]) == 2 and page["cursor"]["total_count"] >= 3
    assert server.get("checkpoints", bob)["checkpoints"] == []
    assert bob.get(f"/api/v1/training_runs/{run}/checkpoints").status_code == 404
    info = server.call("weights_info", tinker_path=f"tinker://{run}/weights/final")
    assert info == {"base_model": "tiny", "is_lora": True, "lora_rank": 8, "train_unembed": True, "train_mlp": True,
                    "train_attn": True, "optimizer_config": {"type": "adamw"}}  # fmt: skip
    assert server.post("weights_info", bob, tinker_path=f"tinker://{run}/weights/final").status_code == 404


def test_releases_that_cannot_read_external_checkpoints_do_not_get_them(server, run):
    def kinds(path, version):
        headers = {"User-Agent": f"AsyncTinker/Python {version}"}
        answer = server.client("tml-any").get(f"/api/v1/{path}", headers=headers).json()
        assert answer["cursor"]["total_count"] >= len(answer["checkpoints"])
        return {entry["checkpoint_type"] for entry in answer["checkpoints"]}

    for path in (f"training_runs/{run}/checkpoints", "checkpoints?limit=100&offset=0"):
        assert kinds(path, "0.7.0") == kinds(path, "0.27.9") == {"training", "sampler"}
        assert (
            kinds(path, "0.28.0")
            == kinds(path, "9" * 5000 + ".1")
            == kinds(path, "0.38.0")
            == {"training", "sampler", "external"}
        )


def test_publishing_twice_is_fine_and_shows_to_others(server, bob, run):
    path = one(run, "weights/final", "/publish")
    assert bob.post(path).status_code == 404
    assert [server.http.post(path).status_code for _ in range(2)] == [204, 204]
    listed = server.get(f"training_runs/{run}/checkpoints", bob)["checkpoints"]
    assert [entry["checkpoint_id"] for entry in listed] == ["weights/final"]
    assert server.get(f"training_runs/{run}", bob)["last_checkpoint"]["public"] is True
    assert bob.delete(path).status_code == 404
    assert [server.http.delete(path).status_code for _ in range(2)] == [204, 204]
    assert bob.get(f"/api/v1/training_runs/{run}").status_code == 404
    assert server.http.post(one(run, "weights/none", "/publish")).status_code == 404


def test_ttl_and_its_limits(server, bob, run):
    def until() -> str | None:
        listed = server.get(f"training_runs/{run}/checkpoints")["checkpoints"]
        return next(e for e in listed if e["checkpoint_id"] == "weights/final").get("expires_at")

    path = one(run, "weights/final", "/ttl")
    assert server.http.put(path, json={"ttl_seconds": None}).status_code == 204 and until() is None
    assert server.http.put(path, json={"ttl_seconds": 86400}).status_code == 204
    left = datetime.fromisoformat(until()) - datetime.now(timezone.utc)
    assert 86000 < left.total_seconds() <= 86400
    for wrong in ({}, {"ttl_seconds": 5}, {"ttl_seconds": "x"}, {"ttl_seconds": 2**80}, []):
        answer = server.http.put(path, json=wrong)
        assert answer.status_code == 400 and answer.json()["detail"], wrong
    assert bob.put(path, json={"ttl_seconds": 7200}).status_code == 404


def test_files_are_fetched_without_a_key_from_signed_addresses(server, bob, run):
    got = server.http.get(one(run, "external_weights/final", "/external_weights_urls")).json()
    assert set(got["urls"]) == set(ADAPTER) and datetime.fromisoformat(got["expires"]) > datetime.now(timezone.utc)
    for name, url in got["urls"].items():
        answer = httpx.get(url)
        assert answer.content == ADAPTER[name] and int(answer.headers["content-length"]) == len(ADAPTER[name])
    url = got["urls"]["adapter_config.json"]
    assert httpx.get(url[:-1] + "x").status_code == 403 and httpx.get(url.split("?")[0]).status_code == 403
    other = url.replace("adapter_config.json", "meta.json")
    assert httpx.get(other).status_code == 403
    assert bob.get(one(run, "external_weights/final", "/external_weights_urls")).status_code == 404


def test_archive_is_a_tar_behind_a_redirection(server, run):
    answer = server.http.get(one(run, "sampler_weights/final", "/archive"))
    assert (
        answer.status_code == 302 and answer.headers["expires"] and answer.json()["url"] == answer.headers["location"]
    )
    data = httpx.get(answer.headers["location"])
    with tarfile.open(fileobj=io.BytesIO(data.content), mode="r:*") as tar:
        assert {member.name: tar.extractfile(member).read() for member in tar} == ADAPTER
    assert len(data.content) == int(data.headers["content-length"])


def test_deleting_and_what_it_ends(server, bob):
    run = server.model()
    server.future("save_weights_for_sampler", model_id=run, seq_id=1, path="a.b-1")
    path = one(run, "sampler_weights/a.b-1")
    url = server.http.get(path + "/external_weights_urls").json()["urls"]["adapter_config.json"]
    assert bob.delete(path).status_code == 404 and httpx.get(url).status_code == 200
    assert server.http.delete(path).status_code == 204
    assert server.http.delete(path).status_code == 404
    assert server.get(f"training_runs/{run}/checkpoints")["checkpoints"] == []
    assert httpx.get(url).status_code == 400


def test_ids_may_come_percent_encoded(server, run):
    path = one(run.replace(":", "%3A"), "weights%2Ffinal", "/publish")
    assert server.http.post(path).status_code == 204
    assert server.http.delete(path).status_code == 204


@pytest.mark.parametrize(
    "bad", ["weights/../final", "weights", "weights/a/b", "nothing/final", "weights/.hidden", "%00/x"]
)
def test_paths_that_lead_elsewhere_are_refused(server, run, bad):
    answer = server.http.request("DELETE", f"/api/v1/training_runs/{run}/checkpoints/" + bad.replace("..", "%2E%2E"))
    assert answer.status_code in (400, 404) and answer.json()["detail"]


def test_resume_from_a_checkpoint_of_another_session(server, run):
    session = server.session()
    body = {"session_id": session, "model_seq_id": 3, "path": f"tinker://{run}/weights/final", "optimizer": False}
    server.future("load_weights", **body)
    assert server.call("get_info", model_id=f"{session}:train:3")["lora_rank"] == 8
    sampler = server.call("create_sampling_session", session_id=session, sampling_session_seq_id=0,
                          model_path=f"tinker://{run}/sampler_weights/final")["sampling_session_id"]  # fmt: skip
    assert server.get(f"samplers/{sampler}") == {
        "sampler_id": sampler, "base_model": "tiny", "model_path": f"tinker://{run}/sampler_weights/final",
    }  # fmt: skip


def test_copies_in_a_project_or_a_session(server, bob, run):
    source = f"tinker://{run}/sampler_weights/final"
    copied = server.call("copy_weights", source_path=source, destination_project_id="archive")["tinker_path"]
    assert copied.endswith("/sampler_weights/final") and copied != source
    session = server.session()
    second = server.call("copy_weights", source_path=source, session_id=session, model_seq_id=5, ttl_seconds=7200)
    assert second["tinker_path"] == f"tinker://{session}:train:5/sampler_weights/final"
    run_id, checkpoint = copied.removeprefix("tinker://").split("/", 1)
    urls = server.http.get(one(run_id, checkpoint, "/external_weights_urls")).json()["urls"]
    assert httpx.get(urls["adapter_model.safetensors"]).content == ADAPTER["adapter_model.safetensors"]
    into = {"session_id": session, "model_seq_id": 1}
    project = {"destination_project_id": "a"}
    for wrong in ({}, {"session_id": session}, project | into, project | {"weights_access_token": "t"}):
        assert server.post("copy_weights", source_path=source, **wrong).status_code == 400, wrong
    assert server.post("copy_weights", bob, source_path=source, destination_project_id="a").status_code == 404


def test_audit_and_usage(server, bob, run):
    server.http.post(one(run, "weights/final", "/publish"))
    entries = server.get("audit", event_type="checkpoints", day=datetime.now(timezone.utc).date().isoformat())[
        "entries"
    ]
    mine = [
        e for e in entries if e["event"] == "checkpoint_publish" and e["tinker_path"] == f"tinker://{run}/weights/final"
    ]
    assert mine and mine[-1]["event_details"]["user"] == "ann"
    assert server.get("audit", bob)["entries"] == [] and server.get("audit", day="2001-01-01")["entries"] == []
    assert server.get("audit", event_type="teams")["entries"] == []
    for wrong in ({"event_type": "x"}, {"day": "today"}):
        assert server.http.get("/api/v1/audit", params=wrong).status_code == 400
    events = server.get(
        "billing/usage/events", starting_on="2026-01-01T00:00:00Z", ending_before="2026-01-02T00:00:00Z"
    )
    assert events["data"] == [] and events["sessions"] == {}
    usage = server.get("billing/usage/checkpoints/current")["data"]
    assert sum(one["checkpoint_count"] for one in usage) == server.get("checkpoints")["cursor"]["total_count"]
    assert server.get("billing/usage/checkpoints/current", bob)["data"] == []


@pytest.mark.parametrize("query", ["limit=-1", "limit=5000", "offset=x", "limit=1e3", "access_scope=all"])
def test_pages_that_cannot_be(server, query):
    for path in ("training_runs", "checkpoints", "sessions"):
        if "scope" in query and path == "checkpoints":
            continue
        answer = server.http.get(f"/api/v1/{path}?{query}")
        assert answer.status_code == 400 and answer.json()["detail"]


def test_checkpoints_are_searched_as_release_0_39_asks(server, bob):
    """By metadata, type, base model, project and owner, newest first, a page at a time."""
    session = server.session(project_id="searched")
    created = server.future("create_model", session_id=session, model_seq_id=0, base_model="tiny",
                            lora_config={"rank": 8})  # fmt: skip
    run = created["model_id"]
    for number in range(1, 4):
        more = {"user_metadata": {"step": str(number), "recipe": "r"}}
        server.future("save_weights", model_id=run, seq_id=number, path=f"s{number}", **more)
    server.future("save_weights_for_sampler", model_id=run, seq_id=4, path="s3")
    found = server.call("checkpoints/search", project_ids=["searched"])
    assert found == server.call("search_checkpoints", project_ids=["searched"]) and "next_cursor" not in found
    assert [one["checkpoint_id"] for one in found["checkpoints"]] == [
        "sampler_weights/s3", "weights/s3", "weights/s2", "weights/s1",
    ]  # fmt: skip
    assert {one["base_model"] for one in found["checkpoints"]} == {"tiny"}

    def names(client=None, **query):
        answer = (client or server.http).post("/api/v1/checkpoints/search", json={"project_ids": ["searched"], **query})
        return [one["checkpoint_id"].partition("/")[2] for one in answer.json()["checkpoints"]]

    assert names(user_metadata={"step": "2"}) == names(user_metadata={"step": "2", "recipe": "r"}) == ["s2"]
    assert names(user_metadata={"step": "2", "recipe": "x"}) == names(base_models=[]) == names(bob) == []
    assert names(checkpoint_type="sampler") == ["s3"] and names(checkpoint_type="external") == []
    assert names(base_models=["other", "tiny"], checkpoint_type="training") == ["s3", "s2", "s1"]
    assert names(project_ids=["default"], user_metadata={"recipe": "r"}) == []
    assert names(owner={"type": "user", "owner_urns": ["bob"]}) == []
    assert names(bob, owner={"type": "user", "owner_urns": ["ann"]}) == []
    seen, cursor = [], {}
    for size in (3, 1):
        page = server.call("checkpoints/search", project_ids=["searched"], limit=3, **cursor)
        assert len(page["checkpoints"]) == size
        seen += page["checkpoints"]
        cursor = {"cursor": page.get("next_cursor")}
    assert seen == found["checkpoints"] and cursor == {"cursor": None}
    for wrong in ({"limit": 0}, {"checkpoint_type": "weights"}, {"colour": "red"},
                  {"cursor": {"last_created_at": "yesterday", "last_checkpoint_uuid": "x"}}):  # fmt: skip
        answer = server.post("checkpoints/search", **wrong)
        assert answer.status_code == 400 and "\n" not in answer.json()["detail"], wrong


@pytest.mark.parametrize("end", ["start", "finish"])
def test_uploads_of_weights_are_refused_by_name(server, end):
    answer = server.post(f"external_weights_upload_{end}", upload_id="x")
    assert answer.status_code == 400 and "takes no weights from its clients" in answer.json()["detail"]
