"""Endpoints about what was trained and saved: runs, checkpoints, downloads, copies, and what they take."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import date, datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from skyrl.service.archive import TarStream
from skyrl.service.http import Call, Door, HttpError, in_thread, once, reply, route, unix_time
from skyrl.service.records import Checkpoint, CheckpointPath
from skyrl.service.wire_fields import INT32_MAX, INT64_MAX, Fields
from skyrl.types import UserError

RUN = "training_runs/{run_id}"
ONE = RUN + "/checkpoints/{checkpoint_id:path}"
CHUNK = 1 << 20
EVENTS = ("all", "checkpoints", "projects", "teams", "organizations")


def checkpoint_routes(door: Door) -> list[Route]:
    """All of them. What ends in a fixed word stands before the bare checkpoint, whose id takes any path."""
    return [
        route(door, "GET", "training_runs", list_runs),
        route(door, "GET", RUN + "/checkpoints", run_checkpoints),
        route(door, "GET", "models/{run_id}/checkpoints", run_checkpoints),  # of release 0.3.0
        route(door, "POST", ONE + "/publish", partial(set_public, public=True)),
        route(door, "DELETE", ONE + "/publish", partial(set_public, public=False)),
        route(door, "PUT", ONE + "/ttl", set_ttl),
        route(door, "GET", ONE + "/external_weights_urls", external_urls),
        route(door, "GET", ONE + "/archive", archive),
        route(door, "DELETE", ONE, delete),
        route(door, "GET", RUN, get_run),
        route(door, "GET", "checkpoints", list_checkpoints),
        route(door, "POST", "weights_info", weights_info),
        route(door, "POST", "copy_weights", once(copy_weights)),
        route(door, "GET", "download/{rest:path}", download, public=True),
        route(door, "GET", "audit", audit),
        route(door, "GET", "billing/usage/events", usage_events),
        route(door, "GET", "billing/usage/checkpoints/current", usage_now),
    ]


# ---- listings


def _scope(call: Call) -> Any:
    return call.query("access_scope", "owned")


async def list_runs(call: Call) -> Response:
    """Runs, newest first."""
    page = await in_thread(
        call.door.store.list_runs,
        call.owner,
        limit=call.whole_number("limit", 20),
        offset=call.whole_number("offset", 0),
        scope=_scope(call),
        project_id=call.query("project_id") or None,
    )
    return reply({"training_runs": [run.to_json() for run in page.items], "cursor": page.cursor()})


async def get_run(call: Call) -> Response:
    """One run. Also another owner's that has published something: who loads from it needs its base and rank."""
    scope = _scope(call) if "access_scope" in call.request.query_params else "accessible"
    run = await in_thread(call.door.store.get_run, call.path("run_id"), call.owner, scope=scope)
    return reply(run.to_json())


async def run_checkpoints(call: Call) -> Response:
    """All checkpoints of a run, newest first."""
    found = await in_thread(call.door.store.run_checkpoints, call.path("run_id"), call.owner)
    if not _knows_external(call):
        found = [one for one in found if one.path.kind != "external_weights"]
    cursor = {"offset": 0, "limit": len(found), "total_count": len(found)}
    return reply({"checkpoints": [one.to_json() for one in found], "cursor": cursor})


async def list_checkpoints(call: Call) -> Response:
    """The owner's checkpoints of all runs, newest first."""
    limit, offset = call.whole_number("limit", 100), call.whole_number("offset", 0)
    kinds = None if _knows_external(call) else ("weights", "sampler_weights")
    page = await in_thread(call.door.store.list_checkpoints, call.owner, limit=limit, offset=offset, kinds=kinds)
    return reply({"checkpoints": [one.to_json() for one in page.items], "cursor": page.cursor()})


def _knows_external(call: Call) -> bool:
    """Whether this client can read the type "external": releases before 0.28 refuse a whole listing that has one."""
    sent = call.request.headers.get("x-sdk-version") or call.request.headers.get("user-agent", "").rpartition(" ")[2]
    release = re.match(r"(\d+)\.(\d+)", sent)
    agent = "tinker" in call.request.headers.get("user-agent", "").lower()
    return release is None or not agent or (int(release[1]), int(release[2])) >= (0, 28)


async def weights_info(call: Call) -> Response:
    """What a model must be for a checkpoint to fit into it."""
    path = CheckpointPath.parse(Fields(await call.json(), "weights_info").text("tinker_path"))
    found = await in_thread(call.door.store.get_checkpoint, path, call.owner)
    return reply(found.info.to_json())


# ---- changes


def _path(call: Call) -> CheckpointPath:
    return CheckpointPath.of_id(call.path("run_id"), call.path("checkpoint_id"))


async def set_public(call: Call, *, public: bool) -> Response:
    """Publishes, or takes it back; done already is done."""
    path = _path(call)
    await in_thread(call.door.store.set_public, path, call.owner, public)
    call.door.note(call.owner, "checkpoint_publish" if public else "checkpoint_unpublish", tinker_path=path.uri)
    return Response(status_code=204)


async def set_ttl(call: Call) -> Response:
    """Lets a checkpoint expire, counted from now; null keeps it for ever."""
    path, body = _path(call), await call.json()
    if not isinstance(body, dict) or "ttl_seconds" not in body:
        raise UserError("ttl: ttl_seconds is missing; give seconds, or null to keep the checkpoint for ever")
    seconds = Fields(body, "ttl").integer("ttl_seconds", -INT64_MAX, INT64_MAX, None)
    await in_thread(call.door.store.set_ttl, path, call.owner, seconds)
    call.door.note(call.owner, "checkpoint_ttl_set", tinker_path=path.uri, ttl_seconds=seconds)
    return Response(status_code=204)


async def delete(call: Call) -> Response:
    """Deletes a checkpoint."""
    path = _path(call)
    await in_thread(call.door.checkpoints.delete, path, call.owner)
    call.door.note(call.owner, "checkpoint_delete", tinker_path=path.uri)
    return Response(status_code=204)


async def copy_weights(call: Call) -> Response:
    """A copy in a run of its own, which has no model and cannot be trained: of a session, or of a new session in a
    project."""
    fields = Fields(await call.json(), "copy_weights")
    source = CheckpointPath.parse(fields.text("source_path"))
    session_id, number = fields.text("session_id", None), fields.integer("model_seq_id", 0, INT32_MAX, None)
    project = fields.text("destination_project_id", None)
    ttl = fields.integer("ttl_seconds", -INT64_MAX, INT64_MAX, None)
    if "weights_access_token" in fields or call.request.headers.get("x-tinker-weights-access-token"):
        raise UserError("copy_weights: weights_access_token is not supported; let the owner publish the checkpoint")
    fields.end()
    if (project is None) == (session_id is None) or (session_id is None) != (number is None):
        raise UserError("copy_weights: needs destination_project_id, or session_id and model_seq_id, not both")
    copied = await in_thread(_copy, call, source, session_id, number or 0, project, ttl)
    call.door.note(call.owner, "checkpoint_copy", source_path=source.uri, tinker_path=copied.path.uri)
    return reply({"tinker_path": copied.path.uri})


def _copy(
    call: Call, source: CheckpointPath, session_id: str | None, number: int, project: str | None, ttl: int | None
) -> Checkpoint:
    store, owner = call.door.store, call.owner
    found = store.get_checkpoint(source, owner)
    if session_id is None:
        session_id = store.create_session(owner, project_id=project, tags=["copy_weights"]).session_id
    run = store.create_run(session_id, owner, number, found.info)
    store.close_run(run.run_id, owner)
    target = CheckpointPath(run.run_id, source.kind, source.name)
    return call.door.checkpoints.copy(source, owner, target, ttl_seconds=ttl)


# ---- downloads. An address is signed for the caller; whoever has it may fetch it, without a key, for an hour.


def _address(call: Call, found: Checkpoint, file: str) -> tuple[str, float]:
    path = found.path
    signed, expires = call.door.signer.sign(
        f"/api/v1/download/{path.run_id}/{path.kind}/{path.name}/{found.version}/{file}"
    )
    base = call.request.base_url
    return f"{base.scheme}://{base.netloc}{signed}", expires


async def external_urls(call: Call) -> Response:
    """An address for each file of a checkpoint."""
    found = await in_thread(call.door.store.get_checkpoint, _path(call), call.owner)
    files = await in_thread(call.door.archive.files, found.path, found.version)
    signed = {name: _address(call, found, name) for name in files}
    call.door.note(call.owner, "checkpoint_read", tinker_path=found.path.uri, purpose="external_weights_urls")
    expires = min((until for _, until in signed.values()), default=0.0)
    return reply({"urls": {name: url for name, (url, _) in signed.items()}, "expires": unix_time(expires).isoformat()})


async def archive(call: Call) -> Response:
    """The address of one tar of all files, in the form of a redirection, as releases up to 0.34 read it."""
    found = await in_thread(call.door.store.get_checkpoint, _path(call), call.owner)
    url, expires = _address(call, found, "archive.tar")
    until = unix_time(expires)
    call.door.note(call.owner, "checkpoint_read", tinker_path=found.path.uri, purpose="archive")
    headers = {"location": url, "expires": until.strftime("%a, %d %b %Y %H:%M:%S GMT")}
    return reply({"url": url, "expires": until.isoformat()}, 302, headers)


async def download(call: Call) -> Response:
    """A file, or the tar of all. Its address is the permission."""
    if not call.door.signer.valid(call.request.scope["path"], call.query("expires"), call.query("signature")):
        raise HttpError(403, "this address is not signed by this server, or has expired; ask for a new one")
    run_id, kind, name, version, file = call.path("rest").split("/", 4)
    checkpoint = CheckpointPath.of_id(run_id, f"{kind}/{name}")
    if file == "archive.tar":
        tar = await in_thread(call.door.archive.tar, checkpoint, version)
        return _stream(_tar_parts(tar), tar.size, f"{name}.tar", "application/x-tar")
    opened, size = await in_thread(_open, call.door, checkpoint, version, file)
    return _stream(_file_parts(opened), size, Path(file).name, "application/octet-stream")


def _open(door: Door, path: CheckpointPath, version: str, file: str) -> tuple[BinaryIO, int]:
    with door.archive.reading(path, version):
        files = door.archive.files(path, version)
        if file not in files:
            raise HttpError(404, f"{path.uri} has no file {file!r}")
        stream = files[file].open("rb")  # stays readable if the checkpoint is deleted meanwhile
        return stream, files[file].stat().st_size


def _stream(parts: AsyncIterator[bytes], size: int, name: str, kind: str) -> Response:
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name)
    headers = {"content-length": str(size), "content-disposition": f'attachment; filename="{safe}"'}
    return StreamingResponse(parts, media_type=kind, headers=headers)


async def _file_parts(stream: BinaryIO) -> AsyncIterator[bytes]:
    try:
        while part := await in_thread(stream.read, CHUNK):
            yield part
    finally:
        stream.close()


async def _tar_parts(tar: TarStream) -> AsyncIterator[bytes]:
    parts = iter(tar)
    try:
        while (part := await in_thread(next, parts, None)) is not None:
            yield part
    finally:
        tar.close()


# ---- what an organisation asks for


async def audit(call: Call) -> Response:
    """What the caller did to checkpoints on a day, since the server started."""
    kind, day = call.query("event_type", "all"), call.query("day")
    if kind not in EVENTS:
        raise UserError(f"event_type={kind[:60]!r}; allowed: {', '.join(EVENTS)}")
    try:
        wanted = date.fromisoformat(day) if day else datetime.now(timezone.utc).date()
    except ValueError:
        raise UserError(f"day={day[:60]!r}; allowed: a date such as 2026-01-31") from None
    entries = []
    for time, owner, event, details in list(call.door.audit):
        if owner == call.owner and time.date() == wanted and kind in ("all", "checkpoints"):
            entry = {"timestamp": time.isoformat(), "event": event, "event_details": {"user": owner, **details}}
            entry |= {key: details[key] for key in ("tinker_path", "purpose") if key in details}
            entries.append(entry)
    return reply({"entries": entries})


async def usage_events(call: Call) -> Response:
    """Nothing is billed."""
    return reply({"data": [], "sessions": {}, "cost_data_through": datetime.now(timezone.utc).isoformat()})


async def usage_now(call: Call) -> Response:
    """What the caller's checkpoints take; there is no price."""
    found = await in_thread(call.door.store.usage, call.owner, call.query("project_id") or None)
    return reply({"data": [one.to_json() for one in found]})
