"""Endpoints about clients: their settings, keys, sessions, and what the server and its models are."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from skyrl.service.http import Call, Door, HttpError, in_thread, once, reply, route
from skyrl.service.records import CheckpointPath, NotFound, SessionQuery, StatusQuery, parse_time
from skyrl.service.wire_fields import INT32_MAX, Fields, check_metadata
from skyrl.types import UserError

CHUNK_BYTES = 5_000_000
# Small JSON requests have nothing to gain from more than this many samples on their way at once.
SAMPLES_AT_ONCE = 2000


def session_routes(door: Door) -> list[Route]:
    """All of them."""
    return [
        route(door, "POST", "client/config", client_config),
        route(door, "POST", "client/dynamic_config", dynamic_config),
        route(door, "GET", "healthz", health, public=True),
        route(door, "POST", "auth/token", token),
        route(door, "GET", "auth/apikey/me", key_info),
        route(door, "DELETE", "auth/apikey/me", revoke_key),
        route(door, "POST", "create_session", once(create_session)),
        route(door, "POST", "session_heartbeat", heartbeat),
        route(door, "POST", "telemetry", telemetry),
        route(door, "GET", "get_server_capabilities", capabilities),
        route(door, "POST", "get_info", get_info),
        route(door, "POST", "create_sampling_session", create_sampling_session),
        route(door, "POST", "join_sampling_session", once(join_sampling_session)),
        route(door, "GET", "samplers/{sampler_id:path}", get_sampler),
        route(door, "GET", "sessions", list_sessions),
        route(door, "POST", "sessions/search", search_sessions),
        route(door, "POST", "sessions/{session_id}/finish", finish_session),
        route(door, "PUT", "sessions/{session_id}/project", set_project),
        route(door, "GET", "sessions/{session_id}/trace_export", trace_export),
        route(door, "GET", "sessions/{session_id}", get_session),
    ]


async def client_config(call: Call) -> Response:
    """Settings of the client (protocol 1.4), each said, so that a client's own default never decides:

    parallel_fwdbwd_chunks false: chunks come in order, so a missing number is one that was refused, and never one that
    is still on its way. proto_compress_fwdbwd false: on a local network compressing costs more than it saves (zstd
    bodies are read all the same). pjwt_auth_enabled false: keys are compared here, a token would add a call.
    sample_use_retrieve_futures false: a long poll per sample is answered at once here, a feed adds a call.
    sample_join_sampling_session true: clones get numbers that cannot collide. custom_loss_server_side false: losses
    that a client uploads would be code of another person in the training process; the client computes them itself.
    """
    most = min(CHUNK_BYTES, call.door.max_bytes // 2)
    return reply(
        {
            "pjwt_auth_enabled": False,
            "credential_default_source": "api_key",
            "parallel_fwdbwd_chunks": False,
            "fwdbwd_max_chunk_len": 1024,
            "fwdbwd_max_chunk_bytes_count": most,
            "fwdbwd_dispatch_bytes_semaphore_size": 50_000_000,
            "proto_compress_fwdbwd": False,
            "sample_dispatch_bytes_semaphore_size": 10 << 20,
            "inflight_response_bytes_semaphore_size": 50 << 20,
            "sample_max_concurrent_requests": SAMPLES_AT_ONCE,
            "sample_no_retries": False,
            "sample_enable_stuck_detection": True,
            "sample_use_retrieve_futures": False,
            "sample_join_sampling_session": True,
            "custom_loss_server_side": False,
            "billing_exception_max_pause_duration_sec": 3600,
            "use_pyqwest_transport": True,
            # Of older releases: JSON bodies are dearer than protobuf, and both forms of loading work.
            "proto_write_fwdbwd": True,
            "fwd_via_fwdbwd": True,
            "create_model_via_load_weights": True,
        }
    )


async def dynamic_config(call: Call) -> Response:
    """Settings that are asked for again: a cancelled sample is to be withdrawn, which frees its place."""
    return reply({"refresh_interval_sec": 3600, "sample_cancel_enabled": True, "sample_cancel_max_batch_size": 64})


async def health(call: Call) -> Response:
    """For probes, without a key."""
    return reply({"status": "ok"})


async def token(call: Call) -> Response:
    """A token that stands for the caller's key for an hour; clients ask only if they were told to, and ours are not."""
    return reply({"jwt": call.door.signer.token(call.owner)})


async def key_info(call: Call) -> Response:
    """Whose key this is."""
    note = "service.keys_file or SKYRL_API_KEYS" if call.door.keys.required else "this server asks for no key"
    details = {"org_details": {"name": "local"}, "user_details": {"email": f"{call.owner}@localhost"}}
    return reply({"key_id": call.door.keys.number(call.owner), "name": call.owner, "note": note, "details": details})


async def revoke_key(call: Call) -> Response:
    """Refused: keys stand in the operator's file."""
    raise HttpError(403, "keys of this server stand in its operator's file; ask there to remove yours")


async def create_session(call: Call) -> Response:
    """A session. Metadata that are not text are kept as JSON text; fields of later releases change nothing here."""
    fields = Fields(await call.json(), "create_session")
    metadata = fields.take("user_metadata", {})
    if not isinstance(metadata, dict):
        raise UserError(f"{fields.place('user_metadata')}: allowed: a map")
    tags = [str(tag)[:256] for tag in fields.items("tags", [])][:256]
    texts = {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    check_metadata(texts, fields.place("user_metadata"))
    session = await in_thread(
        call.door.store.create_session,
        call.owner,
        tags=tags,
        user_metadata=texts,
        sdk_version=fields.text("sdk_version", ""),
        project_id=fields.text("project_id", None),
        display_name=fields.text("display_name", None),
    )
    return reply({"type": "create_session", "session_id": session.session_id})


async def heartbeat(call: Call) -> Response:
    """Notes that a client lives; 410 for a session that is unknown, which ends its heartbeats quietly."""
    session_id = Fields(await call.json(), "session_heartbeat").text("session_id")
    try:
        await in_thread(call.door.store.heartbeat, session_id, call.owner)
    except NotFound as error:
        raise HttpError(410, str(error)) from error
    return reply({"type": "session_heartbeat"})


async def telemetry(call: Call) -> Response:
    """Taken and thrown away: nothing about a client's program is kept."""
    await call.body()
    return reply({"status": "accepted"})


async def capabilities(call: Call) -> Response:
    """Every name that may be asked for."""
    facts = call.door.facts
    return reply(
        {
            "supported_models": [
                {
                    "model_name": name,
                    "max_context_length": facts.max_context,
                    "trainable": facts.adaptable or facts.full_parameters,
                    "sampleable": True,
                }
                for name in facts.aliases
            ]
        }
    )


async def get_info(call: Call) -> Response:
    """What an open model is."""
    model_id = Fields(await call.json(), "get_info").text("model_id")
    try:
        model = call.door.desk.open_model(model_id, owner=call.owner)
    except UserError as error:
        raise HttpError(404, str(error)) from error
    facts, name = call.door.facts, model["base_model"]
    data = {"arch": facts.arch, "model_name": name, "tokenizer_id": facts.tokenizer_id or None}
    answer = {
        "type": "get_info",
        "model_id": model_id,
        "model_data": {key: value for key, value in data.items() if value is not None},
        "is_lora": model["is_lora"],
        "model_name": name,
        "optimizer_config": {"type": "adamw"},
    }
    if model["lora_rank"] is not None:
        answer["lora_rank"] = model["lora_rank"]
    return reply(answer)


async def create_sampling_session(call: Call) -> Response:
    """A sampling session of a base model or a checkpoint. Posted again with the same number it is the same one."""
    fields = Fields(await call.json(), "create_sampling_session")
    fields.constant("type", "create_sampling_session")
    session_id = fields.text("session_id")
    number = fields.integer("sampling_session_seq_id", 0, INT32_MAX)
    base, path = fields.text("base_model", None), fields.text("model_path", None)
    fields.end()
    sampler_id = await in_thread(make_sampler, call.door, call.owner, session_id, number, base, path)
    return reply({"type": "create_sampling_session", "sampling_session_id": sampler_id})


def make_sampler(door: Door, owner: str, session_id: str, number: int, base: str | None, path: str | None) -> str:
    """The id of the sampling session. Raises UserError, NotFound."""
    version = None
    if path is not None:
        checkpoint = find_weights(door, owner, path)
        base, version = base or checkpoint.info.base_model, checkpoint.version
    elif base is None:
        raise UserError("create_sampling_session: needs base_model or model_path")
    elif base not in door.facts.aliases:
        raise UserError(unknown_model(door, base))
    store = door.store
    try:
        return store.create_sampler(session_id, owner, number, base, model_path=path, version=version).sampler_id
    except NotFound:
        raise
    except UserError:
        known = store.get_sampler(f"{session_id}:sample:{number}", owner)
        if (known.model_path, known.ephemeral_run) != (path, None) or known.base_model != base:
            raise
        return known.sampler_id


def find_weights(door: Door, owner: str, path: str) -> Any:
    """The checkpoint that may be sampled from. Raises UserError, NotFound."""
    parsed = CheckpointPath.parse(path)
    if parsed.kind == "external_weights":
        raise UserError(f"{path}: an external export is for downloads; give a path of kind sampler_weights or weights")
    return door.store.get_checkpoint(parsed, owner)


def unknown_model(door: Door, name: str) -> str:
    """The one line for a base model that is not served."""
    names = list(door.facts.aliases)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (
        f"model {name[:200]!r} is not served here; there are: {', '.join(names[:8])}{more} (service.aliases adds names)"
    )


async def join_sampling_session(call: Call) -> Response:
    """A number for one more process that uses a sampling session."""
    sampler_id = Fields(await call.json(), "join_sampling_session").text("sampling_session_id")
    number = await in_thread(call.door.store.join_sampler, sampler_id, call.owner)
    return reply({"type": "join_sampling_session", "client_counter": number})


async def get_sampler(call: Call) -> Response:
    """What a sampling session samples from."""
    sampler = await in_thread(call.door.store.get_sampler, call.path("sampler_id"), call.owner)
    return reply(sampler.to_json())


async def list_sessions(call: Call) -> Response:
    """Ids, newest first."""
    _scope(call)
    limit, offset = call.whole_number("limit", 20), call.whole_number("offset", 0)
    page = await in_thread(call.door.store.list_sessions, call.owner, limit=limit, offset=offset)
    return reply({"sessions": page.items, "cursor": page.cursor()})


def _scope(call: Call) -> str:
    scope = call.query("access_scope", "owned")
    if scope not in ("owned", "accessible"):
        raise UserError(f"access_scope={scope[:60]!r}; allowed: owned, accessible")
    return scope


async def get_session(call: Call) -> Response:
    """Runs and samplers of a session."""
    _scope(call)
    session = await in_thread(call.door.store.get_session, call.path("session_id"), call.owner)
    return reply(session.to_json())


async def finish_session(call: Call) -> Response:
    """The client is done; its models are closed soon after."""
    fields = Fields(await call.json(), "finish")
    reason = fields.section("reason")
    kind = "success" if reason is None else reason.text("type", "success")
    detail = fields.text("detail", None, length=1 << 16)
    await in_thread(call.door.store.finish_session, call.path("session_id"), call.owner, kind, detail)
    return Response(status_code=204)


async def set_project(call: Call) -> Response:
    """Moves a session to a project."""
    project = Fields(await call.json(), "project").text("project_id")
    await in_thread(call.door.store.set_project, call.path("session_id"), call.owner, project)
    return Response(status_code=204)


async def trace_export(call: Call) -> Response:
    """No traces are kept here, and that is said at once instead of letting the client poll."""
    await in_thread(call.door.store.get_session, call.path("session_id"), call.owner)
    return reply({"status": "failed", "error": "this server records no traces"})


async def search_sessions(call: Call) -> Response:
    """Sessions that match, newest first."""
    query = _session_query(call.owner, await call.json())
    page = await in_thread(call.door.store.search_sessions, call.owner, query)
    return reply(page.to_json())


def _session_query(asker: str, value: Any) -> SessionQuery:
    fields = Fields(value, "sessions/search")
    session_id, name = fields.text("session_id", None), fields.text("display_name", None)
    projects = fields.items("project_ids", None)
    owner, cursor = fields.section("owner"), fields.section("cursor")
    statuses = fields.items("statuses", None)
    query = SessionQuery(
        session_id=session_id,
        project_ids=None if projects is None else tuple(map(str, projects)),
        user_metadata=fields.strings("user_metadata"),
        display_name=name,
        owners=None if owner is None else _owners(asker, owner),
        statuses=None if statuses is None else tuple(_status(one) for one in statuses),
        limit=fields.integer("limit", 1, 200, 50),
        cursor=None if cursor is None else (parse_time(cursor.text("last_created_at")), cursor.text("last_session_id")),
    )
    fields.end()
    return query


def _owners(asker: str, owner: Fields) -> tuple[str, ...] | None:
    kind = owner.text("type", "own")
    if kind in ("own", "accessible"):  # nobody lists another's sessions here
        return (asker,)
    if kind == "user":
        return tuple(map(str, owner.items("owner_urns")))
    raise UserError(f"{owner.place('type')}={kind!r}; allowed: own, accessible, user")


def _status(value: Any) -> StatusQuery:
    fields = Fields(value, "sessions/search", inside="statuses")
    reasons = fields.items("reasons", None)
    return StatusQuery(fields.text("type"), None if reasons is None else tuple(map(str, reasons)))
