"""Endpoints about what was trained and saved: runs, checkpoints, downloads, copies, and what they take."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import date, datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import Field
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from skyrl.service.app import AppState, RequestContext, once, route
from skyrl.service.messages import Count
from skyrl.service.storage.records import CheckpointPath, CheckpointQuery, CheckpointRecord, present
from skyrl.types import UserError
from skyrl.web.http import HttpError, in_thread, reply, whole_number
from skyrl.web.message import INT64_MAX, JsonMessage, Text, refused

RUN = "training_runs/{run_id}"
ONE = RUN + "/checkpoints/{checkpoint_id:path}"
CHUNK = 1 << 20
EVENTS = ("all", "checkpoints", "projects", "teams", "organizations")


class SetTtl(JsonMessage, operation="ttl", lenient=True):
    """ttl: seconds from now, or null to keep the checkpoint for ever."""

    ttl_seconds: int | None = Field(ge=-INT64_MAX, le=INT64_MAX)

    @classmethod
    def prepare(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Here null says something."""
        if "ttl_seconds" not in value:
            raise refused("needs ttl_seconds: seconds from now, or null to keep the checkpoint for ever")
        return value


class CopyWeights(JsonMessage, operation="copy_weights"):
    """copy_weights: to a new model_seq_id of a session, or to a new session in a project."""

    source_path: Text
    session_id: Text | None = None
    model_seq_id: Count | None = None
    destination_project_id: Text | None = None
    ttl_seconds: int | None = Field(None, ge=-INT64_MAX, le=INT64_MAX)
    weights_access_token: Any = None


def checkpoint_routes(state: AppState) -> list[Route]:
    """Endpoints about what was saved. What ends in a fixed word comes before the bare checkpoint, whose id takes any
    path."""
    return [
        route(state, "GET", "training_runs", list_runs),
        route(state, "GET", RUN + "/checkpoints", run_checkpoints),
        route(state, "GET", "models/{run_id}/checkpoints", run_checkpoints),  # of release 0.3.0
        route(state, "POST", ONE + "/publish", partial(set_public, public=True)),
        route(state, "DELETE", ONE + "/publish", partial(set_public, public=False)),
        route(state, "PUT", ONE + "/ttl", set_ttl),
        route(state, "GET", ONE + "/external_weights_urls", external_urls),
        route(state, "GET", ONE + "/archive", archive),
        route(state, "DELETE", ONE, delete),
        route(state, "GET", RUN, get_run),
        route(state, "GET", "checkpoints", list_checkpoints),
        # Read from the documentation of release 0.39, which does not say the path of the search.
        *(route(state, "POST", name, search_checkpoints) for name in ("checkpoints/search", "search_checkpoints")),
        *(route(state, "POST", f"external_weights_upload_{end}", refuse_upload) for end in ("start", "finish")),
        route(state, "POST", "weights_info", weights_info),
        route(state, "POST", "copy_weights", once(copy_weights)),
        route(state, "GET", "download/{rest:path}", download, public=True),
        route(state, "GET", "audit", audit),
        route(state, "GET", "billing/usage/events", usage_events),
        route(state, "GET", "billing/usage/checkpoints/current", usage_now),
    ]


# ---- listings


async def list_runs(context: RequestContext) -> Response:
    page = await context.search(
        context.state.store.list_runs,
        context.owner,
        limit=whole_number(context.request, "limit", 20),
        offset=whole_number(context.request, "offset", 0),
        scope=context.query("access_scope", "owned"),
        project_id=context.query("project_id") or None,
    )
    return reply({"training_runs": [run.to_json() for run in page.items], "cursor": page.cursor()})


async def get_run(context: RequestContext) -> Response:
    """One run. Also another owner's that has published something: who loads from it needs its base and rank."""
    scope = context.query("access_scope", "accessible")
    run = await in_thread(context.state.store.get_run, context.path("run_id"), context.owner, scope=scope)
    return reply(run.to_json())


async def run_checkpoints(context: RequestContext) -> Response:
    """All checkpoints of a run, newest first."""
    found = await in_thread(context.state.store.run_checkpoints, context.path("run_id"), context.owner)
    if not _knows_external(context):
        found = [one for one in found if one.path.kind != "external_weights"]
    cursor = {"offset": 0, "limit": len(found), "total_count": len(found)}
    return reply({"checkpoints": [one.to_json() for one in found], "cursor": cursor})


async def list_checkpoints(context: RequestContext) -> Response:
    """The owner's checkpoints of all runs, newest first."""
    limit, offset = whole_number(context.request, "limit", 100), whole_number(context.request, "offset", 0)
    kinds = None if _knows_external(context) else ("weights", "sampler_weights")
    listing = context.state.store.list_checkpoints
    page = await context.search(listing, context.owner, limit=limit, offset=offset, kinds=kinds)
    return reply({"checkpoints": [one.to_json() for one in page.items], "cursor": page.cursor()})


async def search_checkpoints(context: RequestContext) -> Response:
    """The owner's checkpoints that match, newest first."""
    query = await context.message(CheckpointQuery)
    page = await context.search(context.state.store.search_checkpoints, context.owner, query)
    return reply(present(checkpoints=[one.to_json() for one in page.items], next_cursor=page.next_cursor))


def _knows_external(context: RequestContext) -> bool:
    """Whether this client can read the type "external": releases before 0.28 refuse a whole listing that has one."""
    sent = (
        context.request.headers.get("x-sdk-version") or context.request.headers.get("user-agent", "").rpartition(" ")[2]
    )
    release = re.match(r"([0-9]{1,9})\.([0-9]{1,9})", sent)
    agent = "tinker" in context.request.headers.get("user-agent", "").lower()
    return release is None or not agent or (int(release[1]), int(release[2])) >= (0, 28)


async def weights_info(context: RequestContext) -> Response:
    """What a model must be for a checkpoint to fit into it."""
    path = CheckpointPath.parse(await context.text("weights_info", "tinker_path"))
    found = await in_thread(context.state.store.get_checkpoint, path, context.owner)
    return reply(found.info.to_json())


# ---- changes


def _path(context: RequestContext) -> CheckpointPath:
    return CheckpointPath.of_id(context.path("run_id"), context.path("checkpoint_id"))


async def set_public(context: RequestContext, *, public: bool) -> Response:
    """Publishes, or takes it back; done already is done."""
    path = _path(context)
    await in_thread(context.state.store.set_public, path, context.owner, public)
    context.state.add_audit(
        context.owner, "checkpoint_publish" if public else "checkpoint_unpublish", tinker_path=path.uri
    )
    return Response(status_code=204)


async def set_ttl(context: RequestContext) -> Response:
    """Lets a checkpoint expire, counted from now; null keeps it for ever."""
    path, seconds = _path(context), (await context.message(SetTtl)).ttl_seconds
    await in_thread(context.state.store.set_ttl, path, context.owner, seconds)
    context.state.add_audit(context.owner, "checkpoint_ttl_set", tinker_path=path.uri, ttl_seconds=seconds)
    return Response(status_code=204)


async def delete(context: RequestContext) -> Response:
    path = _path(context)
    await in_thread(context.state.checkpoints.delete, path, context.owner)
    context.state.add_audit(context.owner, "checkpoint_delete", tinker_path=path.uri)
    return Response(status_code=204)


async def copy_weights(context: RequestContext) -> Response:
    """A copy in a run of its own, which has no model and cannot be trained: of a session, or of a new session in a
    project."""
    body = await context.message(CopyWeights)
    source, session_id, project = CheckpointPath.parse(body.source_path), body.session_id, body.destination_project_id
    if body.weights_access_token is not None or context.request.headers.get("x-tinker-weights-access-token"):
        raise UserError("copy_weights: weights_access_token is not supported; let the owner publish the checkpoint")
    if (project is None) == (session_id is None) or (session_id is None) != (body.model_seq_id is None):
        raise UserError("copy_weights: needs destination_project_id, or session_id and model_seq_id, not both")
    copied = await in_thread(_copy, context, source, body)
    context.state.add_audit(context.owner, "checkpoint_copy", source_path=source.uri, tinker_path=copied.path.uri)
    return reply({"tinker_path": copied.path.uri})


def _copy(context: RequestContext, source: CheckpointPath, body: CopyWeights) -> CheckpointRecord:
    store, owner, session_id = context.state.store, context.owner, body.session_id
    found = store.get_checkpoint(source, owner)
    if session_id is None:
        made = store.create_session(owner, project_id=body.destination_project_id, tags=["copy_weights"])
        session_id = made.session_id
    run = store.create_run(session_id, owner, body.model_seq_id or 0, found.info)
    store.close_run(run.run_id, owner)
    target = CheckpointPath(run.run_id, source.kind, source.name)
    try:
        return context.state.checkpoints.copy(source, owner, target, ttl_seconds=body.ttl_seconds)
    except UserError:  # the same may be asked for again
        store.forget_run(run.run_id)
        raise


async def refuse_upload(context: RequestContext) -> Response:
    """Refused: an external checkpoint is for downloads, and neither loads nor samples here."""
    await context.ignore_body()
    raise UserError("external_weights_upload is refused: this server takes no weights from its clients; start it with "
                    "model.path=<folder of the weights>, or load a checkpoint that was saved here")  # fmt: skip


# ---- downloads. An address is signed for the caller; whoever has it may fetch it, without a key, for an hour.


def _address(context: RequestContext, found: CheckpointRecord, file: str) -> tuple[str, float]:
    path = found.path
    signed = f"/api/v1/download/{path.run_id}/{path.kind}/{path.name}/{found.version}/{file}"
    return context.state.signer.address(context.request, signed)


async def external_urls(context: RequestContext) -> Response:
    """An address for each file of a checkpoint."""
    found = await in_thread(context.state.store.get_checkpoint, _path(context), context.owner)
    files = await in_thread(context.state.checkpoints.archive.files, found.path, found.version)
    signed = {name: _address(context, found, name) for name in files}
    context.state.add_audit(
        context.owner, "checkpoint_read", tinker_path=found.path.uri, purpose="external_weights_urls"
    )
    expires = min((until for _, until in signed.values()), default=0.0)
    return reply(
        {
            "urls": {name: url for name, (url, _) in signed.items()},
            "expires": datetime.fromtimestamp(expires, timezone.utc).isoformat(),
        }
    )


async def archive(context: RequestContext) -> Response:
    """The address of one tar of all files, in the form of a redirection, as releases up to 0.34 read it."""
    found = await in_thread(context.state.store.get_checkpoint, _path(context), context.owner)
    url, expires = _address(context, found, "archive.tar")
    until = datetime.fromtimestamp(expires, timezone.utc)
    context.state.add_audit(context.owner, "checkpoint_read", tinker_path=found.path.uri, purpose="archive")
    headers = {"location": url, "expires": until.strftime("%a, %d %b %Y %H:%M:%S GMT")}
    return reply({"url": url, "expires": until.isoformat()}, 302, headers)


async def download(context: RequestContext) -> Response:
    """A file, or the tar of all. Its address is the permission."""
    context.state.signer.check(context.request)
    run_id, kind, name, version, file = context.path("rest").split("/", 4)
    checkpoint = CheckpointPath.of_id(run_id, f"{kind}/{name}")
    if file == "archive.tar":
        tar = await in_thread(context.state.checkpoints.archive.tar, checkpoint, version)
        return _stream(_parts(iter(tar), tar.close), tar.size, f"{name}.tar", "application/x-tar")
    opened, size = await in_thread(_open, context.state, checkpoint, version, file)
    return _stream(
        _parts(iter(partial(opened.read, CHUNK), b""), opened.close), size, Path(file).name, "application/octet-stream"
    )


def _open(state: AppState, path: CheckpointPath, version: str, file: str) -> tuple[BinaryIO, int]:
    with state.checkpoints.archive.reading(path, version):
        files = state.checkpoints.archive.files(path, version)
        if file not in files:
            raise HttpError(404, f"{path.uri} has no file {file!r}")
        stream = files[file].open("rb")  # stays readable if the checkpoint is deleted meanwhile
        return stream, files[file].stat().st_size


def _stream(parts: AsyncIterator[bytes], size: int, name: str, kind: str) -> Response:
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name)
    headers = {"content-length": str(size), "content-disposition": f'attachment; filename="{safe}"'}
    return StreamingResponse(parts, media_type=kind, headers=headers)


async def _parts(parts: Iterator[bytes], close: Callable[[], None]) -> AsyncIterator[bytes]:
    try:
        while (part := await in_thread(next, parts, None)) is not None:
            yield part
    finally:
        close()


# ---- what an organisation asks for


async def audit(context: RequestContext) -> Response:
    """What the caller did to checkpoints on a day, since the server started."""
    kind, day = context.query("event_type", "all"), context.query("day")
    if kind not in EVENTS:
        raise UserError(f"event_type={kind[:60]!r}; allowed: {', '.join(EVENTS)}")
    try:
        wanted = date.fromisoformat(day) if day else datetime.now(timezone.utc).date()
    except ValueError:
        raise UserError(f"day={day[:60]!r}; allowed: a date such as 2026-01-31") from None
    entries = []
    for time, owner, event, details in list(context.state.audit):
        if owner == context.owner and time.date() == wanted and kind in ("all", "checkpoints"):
            entry = {"timestamp": time.isoformat(), "event": event, "event_details": {"user": owner, **details}}
            entry |= {key: details[key] for key in ("tinker_path", "purpose") if key in details}
            entries.append(entry)
    return reply({"entries": entries})


async def usage_events(context: RequestContext) -> Response:
    return reply({"data": [], "sessions": {}, "cost_data_through": datetime.now(timezone.utc).isoformat()})


async def usage_now(context: RequestContext) -> Response:
    """What the caller's checkpoints take; there is no price."""
    found = await context.search(context.state.store.usage, context.owner, context.query("project_id") or None)
    return reply({"data": found})
