"""Endpoints about clients: their settings, keys, sessions, and what the server and its models are."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import Field, StringConstraints
from starlette.responses import Response
from starlette.routing import Route

from skyrl.service.app import LOADING, AppState, RequestContext, once, route
from skyrl.service.messages import METADATA_NAMES, Count, check_metadata
from skyrl.service.storage.records import CheckpointPath, NotFound, SessionQuery, present
from skyrl.service.storage.store import seen
from skyrl.tracking.prometheus import exposition
from skyrl.types import UserError, few
from skyrl.web.http import HttpError, in_thread, reply, whole_number
from skyrl.web.message import JsonMessage, Text

CHUNK_BYTES = 5_000_000
# Small JSON requests have nothing to gain from more than this many samples on their way at once.
SAMPLES_AT_ONCE = 2000
Tag = Annotated[str, StringConstraints(max_length=256)]


class CreateSession(JsonMessage, operation="create_session", lenient=True):
    """create_session. Fields of later releases change nothing here."""

    tags: list[Tag] = Field([], max_length=256)
    user_metadata: dict[str, Any] = Field({}, max_length=METADATA_NAMES)
    sdk_version: Text = ""
    project_id: Text | None = None
    display_name: Text | None = None


class CreateSamplingSession(JsonMessage, operation="create_sampling_session"):
    """create_sampling_session: of a base model or a checkpoint."""

    session_id: Text
    sampling_session_seq_id: Count
    base_model: Text | None = None
    model_path: Text | None = None


class FinishReason(JsonMessage, lenient=True):
    """Why a session ended."""

    type: Text = "success"


class FinishSession(JsonMessage, operation="finish", lenient=True):
    reason: FinishReason = FinishReason()
    detail: Annotated[str, StringConstraints(min_length=1, max_length=1 << 16)] | None = None


def session_routes(state: AppState) -> list[Route]:
    """Endpoints about clients, sessions and samplers."""
    return [
        route(state, "POST", "client/config", client_config),
        route(state, "POST", "client/dynamic_config", dynamic_config),
        route(state, "GET", "healthz", health, public=True),
        route(state, "GET", "readyz", ready, public=True),
        route(state, "POST", "auth/token", token),
        route(state, "GET", "auth/apikey/me", key_info),
        route(state, "DELETE", "auth/apikey/me", revoke_key),
        route(state, "POST", "create_session", once(create_session)),
        route(state, "POST", "session_heartbeat", heartbeat),
        route(state, "POST", "telemetry", telemetry),
        route(state, "GET", "get_server_capabilities", capabilities),
        route(state, "POST", "get_info", get_info),
        route(state, "POST", "create_sampling_session", create_sampling_session),
        route(state, "POST", "join_sampling_session", once(join_sampling_session)),
        route(state, "GET", "samplers/{sampler_id:path}", get_sampler),
        route(state, "GET", "sessions", list_sessions),
        route(state, "POST", "sessions/search", search_sessions),
        route(state, "POST", "sessions/{session_id}/finish", finish_session),
        route(state, "PUT", "sessions/{session_id}/project", set_project),
        route(state, "GET", "sessions/{session_id}/trace_export", trace_export),
        route(state, "GET", "session_trace/{session_id}", session_trace, public=True),
        route(state, "GET", "/metrics", metrics),
        route(state, "GET", "sessions/{session_id}", get_session),
    ]


async def client_config(context: RequestContext) -> Response:
    """Settings of the client (protocol 1.4), each said, so that a client's own default never decides:

    parallel_fwdbwd_chunks false: chunks come in order, so a missing number is one that was refused, and never one that
    is still on its way. proto_compress_fwdbwd false: on a local network compressing costs more than it saves (zstd
    bodies are read all the same). pjwt_auth_enabled false: keys are compared here, a token would add a call.
    sample_use_retrieve_futures false: a long poll per sample is answered at once here, a feed adds a call.
    sample_join_sampling_session true: clones get numbers that cannot collide. custom_loss_server_side false: losses
    that a client uploads would be code of another person in the training process; the client computes them itself.
    """
    most = min(CHUNK_BYTES, context.state.max_bytes // 2)
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


async def dynamic_config(context: RequestContext) -> Response:
    """Settings that are asked for again: a cancelled sample is to be withdrawn, which frees its place."""
    return reply({"refresh_interval_sec": 3600, "sample_cancel_enabled": True, "sample_cancel_max_batch_size": 64})


async def health(context: RequestContext) -> Response:
    """For probes, without a key: whether the server takes requests."""
    return reply({"status": "ok"})


async def ready(context: RequestContext) -> Response:
    """For probes, without a key: whether the model is loaded. Ours, not the protocol's."""
    if not context.state.chat.done():
        raise HttpError(503, LOADING)
    return reply({"status": "ok"})


async def token(context: RequestContext) -> Response:
    """A token that stands for the caller's key for an hour; clients ask only if they were told to, and ours are not."""
    return reply({"jwt": context.state.signer.token(context.owner)})


async def key_info(context: RequestContext) -> Response:
    """Whose key this is."""
    note = "service.keys_file or SKYRL_API_KEYS" if context.state.keys.required else "this server asks for no key"
    details = {"org_details": {"name": "local"}, "user_details": {"email": f"{context.owner}@localhost"}}
    return reply(
        {"key_id": context.state.keys.number(context.owner), "name": context.owner, "note": note, "details": details}
    )


async def revoke_key(context: RequestContext) -> Response:
    """Refused: keys stand in the operator's file."""
    raise HttpError(403, "keys of this server stand in its operator's file; ask there to remove yours")


async def create_session(context: RequestContext) -> Response:
    """A session. Metadata that are not text are kept as JSON text; fields of later releases change nothing here."""
    body = await context.message(CreateSession)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in body.user_metadata.items()}
    try:
        check_metadata(texts)
    except ValueError as error:
        raise UserError(f"create_session: user_metadata {error}") from None
    session = await in_thread(
        context.state.store.create_session,
        context.owner,
        tags=body.tags,
        user_metadata=texts,
        sdk_version=body.sdk_version,
        project_id=body.project_id,
        display_name=body.display_name,
    )
    return reply({"type": "create_session", "session_id": session.session_id})


async def heartbeat(context: RequestContext) -> Response:
    """Notes that a client lives, in memory: neither a disk nor a queue for threads makes one look silent. 410 for a
    session that is unknown, which ends its heartbeats quietly."""
    session_id, store = await context.text("session_heartbeat", "session_id"), context.state.store
    if not store.live.touch(session_id, context.owner):
        try:
            await in_thread(store.heartbeat, session_id, context.owner)  # which says why
        except NotFound as error:
            raise HttpError(410, str(error)) from error
    return reply({"type": "session_heartbeat"})


async def telemetry(context: RequestContext) -> Response:
    """Taken and thrown away: nothing about a client's program is kept."""
    await context.ignore_body()
    return reply({"status": "accepted"})


async def capabilities(context: RequestContext) -> Response:
    """Every name that may be asked for."""
    await context.state.loaded()
    facts = context.state.info
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


async def get_info(context: RequestContext) -> Response:
    """What an open model is."""
    model_id = await context.text("get_info", "model_id")
    try:
        model = context.state.scheduler.open_model(model_id, owner=context.owner)
    except UserError as error:
        raise HttpError(404, str(error)) from error
    facts, name = context.state.info, model.base_model
    return reply(
        present(
            type="get_info",
            model_id=model_id,
            model_data=present(arch=facts.arch, model_name=name, tokenizer_id=facts.tokenizer_id or None),
            is_lora=model.is_lora,
            model_name=name,
            optimizer_config={"type": "adamw"},
            lora_rank=model.lora.rank if model.lora else None,
        )
    )


async def create_sampling_session(context: RequestContext) -> Response:
    """A sampling session of a base model or a checkpoint. Posted again with the same number it is the same one."""
    body = await context.message(CreateSamplingSession)
    sampler_id = await in_thread(make_sampler, context.state, context.owner, body)
    return reply({"type": "create_sampling_session", "sampling_session_id": sampler_id})


def make_sampler(state: AppState, owner: str, body: CreateSamplingSession) -> str:
    """The id of the sampling session. Raises UserError, NotFound."""
    base, path, version, store = body.base_model, body.model_path, None, state.store
    if path is not None:
        checkpoint = find_weights(state, owner, path)
        base, version = base or checkpoint.info.base_model, checkpoint.version
    elif base is None:
        raise UserError("create_sampling_session: needs base_model or model_path")
    elif base not in state.info.aliases:
        raise UserError(unknown_model(state, base))
    session_id, number = body.session_id, body.sampling_session_seq_id
    try:
        return store.create_sampler(session_id, owner, number, base, model_path=path, version=version).sampler_id
    except NotFound:
        raise
    except UserError as error:
        try:
            known = store.get_sampler(f"{session_id}:sample:{number}", owner)
        except NotFound:
            raise error from None  # its session has ended
        if (known.model_path, known.ephemeral_run) != (path, None) or known.base_model != base:
            raise
        return known.sampler_id


def find_weights(state: AppState, owner: str, path: str) -> Any:
    """The checkpoint that may be sampled from. Raises UserError, NotFound."""
    parsed = CheckpointPath.parse(path)
    if parsed.kind == "external_weights":
        raise UserError(f"{path}: an external export is for downloads; give a path of kind sampler_weights or weights")
    return state.store.get_checkpoint(parsed, owner)


def unknown_model(state: AppState, name: str) -> str:
    """The one line for a base model that is not served."""
    names = list(state.info.aliases)
    return f"model {name[:200]!r} is not served here; there are: {few(names, 8)} (service.aliases adds names)"


async def join_sampling_session(context: RequestContext) -> Response:
    """A number for one more process that uses a sampling session."""
    sampler_id = await context.text("join_sampling_session", "sampling_session_id")
    number = await in_thread(context.state.store.join_sampler, sampler_id, context.owner)
    return reply({"type": "join_sampling_session", "client_counter": number})


async def get_sampler(context: RequestContext) -> Response:
    """What a sampling session samples from: clients then load its tokenizer, which the tiny model writes itself."""
    await context.state.loaded()
    sampler = await in_thread(context.state.store.get_sampler, context.path("sampler_id"), context.owner)
    return reply(sampler.to_json())


async def list_sessions(context: RequestContext) -> Response:
    seen(context.query("access_scope", "owned"))
    limit, offset = whole_number(context.request, "limit", 20), whole_number(context.request, "offset", 0)
    page = await context.search(context.state.store.list_sessions, context.owner, limit=limit, offset=offset)
    return reply({"sessions": page.items, "cursor": page.cursor()})


async def get_session(context: RequestContext) -> Response:
    """Runs and samplers of a session."""
    seen(context.query("access_scope", "owned"))
    session = await in_thread(context.state.store.get_session, context.path("session_id"), context.owner)
    return reply(session.to_json())


async def finish_session(context: RequestContext) -> Response:
    """The client is done; its models are closed soon after."""
    body, session_id = await context.message(FinishSession), context.path("session_id")
    await in_thread(context.state.store.finish_session, session_id, context.owner, body.reason.type, body.detail)
    return Response(status_code=204)


async def set_project(context: RequestContext) -> Response:
    """Moves a session to a project."""
    project = await context.text("project", "project_id")
    await in_thread(context.state.store.set_project, context.path("session_id"), context.owner, project)
    return Response(status_code=204)


async def trace_export(context: RequestContext) -> Response:
    """A signed address of the session's timeline, which is made when it is fetched."""
    session = await in_thread(context.state.store.get_session, context.path("session_id"), context.owner)
    url, _ = context.state.signer.address(context.request, f"/api/v1/session_trace/{session.session_id}")
    return reply({"status": "ready", "url": url})


async def session_trace(context: RequestContext) -> Response:
    """When each newer request of a session has waited and run, for ui.perfetto.dev. Its address is the permission."""
    context.state.signer.check(context.request)
    return reply(context.state.scheduler.log.trace(context.path("session_id")))


async def metrics(context: RequestContext) -> Response:
    """For a Prometheus server: what waits and is open, and counts since the start, of all owners together."""
    text = exposition(context.state.scheduler.values, {"model": context.state.info.model_path})
    return Response(text, media_type="text/plain; version=0.0.4")


async def search_sessions(context: RequestContext) -> Response:
    """Sessions that match, newest first."""
    query = await context.message(SessionQuery)
    page = await context.search(context.state.store.search_sessions, context.owner, query)
    return reply(present(sessions=[one.summary_json() for one in page.items], next_cursor=page.next_cursor))
