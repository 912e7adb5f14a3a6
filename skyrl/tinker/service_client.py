"""ServiceClient and RestClient: where a script begins, and what was made by scripts before."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from datetime import datetime, timedelta, timezone
from types import TracebackType
from typing import Any, Literal

from skyrl.service.records import CheckpointPath
from skyrl.service.wire_json import parse_create_model, parse_load_weights
from skyrl.tinker import records
from skyrl.tinker.futures import APIFuture, ClientFuture, finished, settle, then, with_async
from skyrl.tinker.job import Job, current_job, open_job, part, release_job
from skyrl.tinker.records import build
from skyrl.tinker.sampling_client import NO_TOKEN, SamplingClient, Session, open_sampler, present, refuse_stability
from skyrl.tinker.training_client import TrainingClient, open_training
from skyrl.types import UserError

Status = Literal["success", "errored", "interrupted"]
FILE_SECONDS = 3600


@with_async(
    "create_lora_training_client",
    "create_training_client_from_state",
    "create_training_client_from_state_with_optimizer",
    "create_sampling_client",
    "get_server_capabilities",
    wait=True,
)
class ServiceClient:
    """A session with the service that this program itself is.

    The first client opens the service from `options`, nested as in `ServiceClient(model={"path": "x"},
    service={"folder": "y"})` or by path, and from SKYRL_SERVE_OPTIONS (as on the command line of skyrl.serve); later
    ones share it. Under torchrun every rank runs the script: rank 0 goes on, and every other rank works for it inside
    this constructor until rank 0 has closed all its clients, and then leaves the process (SystemExit 0). So nothing
    after the constructor runs on ranks but 0. A rank that fails ends the job. Make the first client in the main thread.

    Use it in `with`, or call `close`: then what was submitted is waited for. After an error, and at the end of a script
    that did neither, only the work in hand and saves are finished. With several ranks a closed service cannot be
    opened again.

    user_metadata, project_id, display_name describe the session. base_url, api_key and default_headers_overrides are
    the SDK's and mean nothing here; giving them warns. Raises UserError for options that cannot be.
    """

    def __init__(
        self,
        user_metadata: dict[str, str] | None = None,
        project_id: str | None = None,
        *,
        display_name: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        default_headers_overrides: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        if base_url or api_key or default_headers_overrides:
            warnings.warn(
                "skyrl.tinker has no server to go to: base_url, api_key and headers mean nothing", stacklevel=2
            )
        self._job = open_job(options)
        self._closed = False
        try:
            body = present(
                tags=[],
                user_metadata=user_metadata,
                sdk_version="skyrl",
                project_id=project_id or os.environ.get("TINKER_PROJECT_ID") or None,
                display_name=display_name,
            )
            made = self._job.call("POST", "create_session", body).result()
        except BaseException:
            release_job(self._job)
            raise
        self._session = Session(self._job, made["session_id"])

    def __enter__(self) -> ServiceClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("success")
        else:
            self.close("errored" if issubclass(kind, Exception) else "interrupted")

    # ---- models ----------------------------------------------------------------------------------------------------

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
        optimizer: Any = None,
    ) -> ClientFuture[TrainingClient]:
        """A new model. rank 0: all parameters, where the service has service.full_parameters."""
        number = next(self._session.models)
        lora = present(rank=rank, seed=seed, train_mlp=train_mlp, train_attn=train_attn, train_unembed=train_unembed)
        body = present(
            session_id=self._session.session_id,
            model_seq_id=number,
            base_model=base_model,
            lora_config=lora,
            user_metadata=user_metadata,
            optimizer_config=None if optimizer is None else {"type": optimizer.type},
        )
        return open_training(self._session, parse_create_model(body), self._model_id(number))

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: Any = None,
    ) -> ClientFuture[TrainingClient]:
        """A new model with a checkpoint's weights; its optimizer starts anew."""
        return self._from_state(path, False, base_model, user_metadata, weights_access_token, optimizer)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> ClientFuture[TrainingClient]:
        """A new model that goes on exactly where the checkpoint was saved."""
        return self._from_state(path, True, base_model, user_metadata, weights_access_token, None)

    def _from_state(
        self,
        path: str,
        with_optimizer: bool,
        base_model: str | None,
        user_metadata: dict[str, str] | None,
        token: str | None,
        optimizer: Any,
    ) -> ClientFuture[TrainingClient]:
        if token is not None:
            raise UserError(NO_TOKEN)
        number = next(self._session.models)
        body = present(
            session_id=self._session.session_id,
            model_seq_id=number,
            path=path,
            optimizer=with_optimizer,
            base_model=base_model,
            user_metadata=user_metadata,
            optimizer_config=None if optimizer is None else {"type": optimizer.type},
        )
        return open_training(self._session, parse_load_weights(body), self._model_id(number))

    def _model_id(self, number: int) -> str:
        return f"{self._session.session_id}:train:{number}"

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
    ) -> ClientFuture[SamplingClient]:
        """A client of a checkpoint, or of the base model. retry_config: nothing here needs it."""
        if model_path is None and base_model is None:
            raise ValueError("Either model_path or base_model must be provided")
        refuse_stability(record_stability_info)
        return ClientFuture(open_sampler(self._session, model_path=model_path, base_model=base_model).future())

    # ---- the rest --------------------------------------------------------------------------------------------------

    def get_server_capabilities(self) -> records.GetServerCapabilitiesResponse:
        """The names that may be asked for."""
        return self.create_rest_client().get_server_capabilities().result()

    def create_rest_client(self) -> RestClient:
        """A client for sessions, runs and checkpoints."""
        return RestClient(self._job)

    def copy_weights(
        self, path: str, *, ttl_seconds: int | None = None, weights_access_token: str | None = None
    ) -> APIFuture[str]:
        """The path of a copy that belongs to this session."""
        if weights_access_token is not None:
            raise UserError(NO_TOKEN)
        body = present(
            source_path=path,
            session_id=self._session.session_id,
            model_seq_id=next(self._session.models),
            ttl_seconds=ttl_seconds,
        )
        return then(self._job.call("POST", "copy_weights", body), lambda json: json["tinker_path"])

    def close(self, status: Status = "success", detail: str | None = None) -> APIFuture[None]:
        """Ends the session; with "success" after everything that was submitted. When it was the last client, the
        service ends on all ranks, and this returns when it has."""
        out: Future[None] = Future()
        if self._closed:
            return finished(None)
        self._closed = True
        settle(out, lambda: self._close(status, detail))
        out.result()
        return APIFuture(out)

    def _close(self, status: Status, detail: str | None) -> None:
        try:
            if status == "success":
                self._job.drain()
            body = present(reason={"type": status}, detail=detail)
            self._job.call("POST", f"sessions/{part(self._session.session_id)}/finish", body).result()
        finally:
            release_job(self._job)


@with_async(
    "get_training_run", "get_training_run_by_tinker_path", "list_training_runs", "list_checkpoints",
    "list_user_checkpoints", "delete_checkpoint", "delete_checkpoint_from_tinker_path",
    "publish_checkpoint_from_tinker_path", "unpublish_checkpoint_from_tinker_path",
    "set_checkpoint_ttl_from_tinker_path", "get_session", "list_sessions", "get_sampler", "copy_weights",
    "assign_session_project", "get_external_weights_urls", "get_current_checkpoint_storage_usage", wait=True,
)  # fmt: skip
class RestClient:
    """What sessions made: runs, checkpoints, samplers. Needs an open ServiceClient somewhere in the process.

    The SDK's billing, audit log, traces and whoami are about a hosted service and are not here."""

    def __init__(self, _job: Job | None = None, *, base_url: str | None = None, api_key: str | None = None) -> None:
        self._job = _job or current_job()

    def _get(self, answer: type[Any], method: str, path: str, body: Any = None, **query: Any) -> APIFuture[Any]:
        return then(self._job.call(method, path, body, **query), lambda json: build(answer, json))

    def _do(self, method: str, path: str, body: Any = None) -> APIFuture[None]:
        return then(self._job.call(method, path, body), lambda json: None)

    def get_server_capabilities(self) -> APIFuture[records.GetServerCapabilitiesResponse]:
        """The names that may be asked for."""
        return self._get(records.GetServerCapabilitiesResponse, "GET", "get_server_capabilities")

    def get_training_run(self, training_run_id: str, access_scope: str = "owned") -> APIFuture[records.TrainingRun]:
        """A run."""
        return self._get(records.TrainingRun, "GET", _run(training_run_id), access_scope=access_scope)

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: str = "owned"
    ) -> APIFuture[records.TrainingRun]:
        """The run of a checkpoint."""
        return self.get_training_run(CheckpointPath.parse(tinker_path).run_id, access_scope)

    def list_training_runs(
        self, limit: int = 20, offset: int = 0, access_scope: str = "owned", project_id: str | None = None
    ) -> APIFuture[records.TrainingRunsResponse]:
        """Runs, newest first."""
        query = dict(limit=limit, offset=offset, access_scope=access_scope, project_id=project_id)
        return self._get(records.TrainingRunsResponse, "GET", "training_runs", **query)

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> APIFuture[records.WeightsInfoResponse]:
        """What a model has to be for this checkpoint."""
        return self._get(records.WeightsInfoResponse, "POST", "weights_info", {"tinker_path": tinker_path})

    def list_checkpoints(self, training_run_id: str) -> APIFuture[records.CheckpointsListResponse]:
        """All checkpoints of a run."""
        return self._get(records.CheckpointsListResponse, "GET", f"{_run(training_run_id)}/checkpoints")

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> APIFuture[records.CheckpointsListResponse]:
        """Checkpoints of all runs, newest first."""
        return self._get(records.CheckpointsListResponse, "GET", "checkpoints", limit=limit, offset=offset)

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> APIFuture[None]:
        """Deletes it. checkpoint_id: kind/name."""
        return self._do("DELETE", f"{_run(training_run_id)}/checkpoints/{part(checkpoint_id)}")

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Deletes it."""
        return self._do("DELETE", _one(tinker_path))

    def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Lets others read it."""
        return self._do("POST", f"{_one(tinker_path)}/publish")

    def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Takes that back."""
        return self._do("DELETE", f"{_one(tinker_path)}/publish")

    def set_checkpoint_ttl_from_tinker_path(self, tinker_path: str, ttl_seconds: int | None) -> APIFuture[None]:
        """Lets it expire so many seconds from now; None: never."""
        return self._do("PUT", f"{_one(tinker_path)}/ttl", {"ttl_seconds": ttl_seconds})

    def copy_weights(
        self,
        path: str,
        destination_project_id: str | None = None,
        *,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> APIFuture[str]:
        """The path of a copy in a project."""
        if weights_access_token is not None:
            raise UserError(NO_TOKEN)
        body = present(source_path=path, destination_project_id=destination_project_id, ttl_seconds=ttl_seconds)
        return then(self._job.call("POST", "copy_weights", body), lambda json: json["tinker_path"])

    def get_session(self, session_id: str, access_scope: str = "owned") -> APIFuture[records.GetSessionResponse]:
        """What a session made."""
        path = f"sessions/{part(session_id)}"
        return self._get(records.GetSessionResponse, "GET", path, access_scope=access_scope)

    def list_sessions(
        self, limit: int = 20, offset: int = 0, access_scope: str = "owned"
    ) -> APIFuture[records.ListSessionsResponse]:
        """Sessions, newest first."""
        query = dict(limit=limit, offset=offset, access_scope=access_scope)
        return self._get(records.ListSessionsResponse, "GET", "sessions", **query)

    def search_sessions(self, request: Any) -> APIFuture[records.SessionSearchResponse]:
        """Sessions that match: the SDK's SessionSearchRequest, or its fields as a dict."""
        fields = request if isinstance(request, Mapping) else request.model_dump(mode="json", exclude_none=True)
        return self._get(records.SessionSearchResponse, "POST", "sessions/search", dict(fields))

    def assign_session_project(self, session_id: str, project_id: str) -> APIFuture[None]:
        """Moves a session to a project."""
        return self._do("PUT", f"sessions/{part(session_id)}/project", {"project_id": project_id})

    def get_sampler(self, sampler_id: str) -> APIFuture[records.GetSamplerResponse]:
        """What a sampling session samples from."""
        return self._get(records.GetSamplerResponse, "GET", f"samplers/{part(sampler_id)}")

    def get_current_checkpoint_storage_usage(
        self, project_id: str | None = None
    ) -> APIFuture[records.CurrentCheckpointStorageUsageResponse]:
        """What checkpoints take."""
        answer = records.CurrentCheckpointStorageUsageResponse
        return self._get(answer, "GET", "billing/usage/checkpoints/current", project_id=project_id)

    def get_external_weights_urls(self, tinker_path: str) -> APIFuture[records.ExternalWeightsUrlsResponse]:
        """file:// addresses of a checkpoint's files: there is no server to download from."""
        out: Future[records.ExternalWeightsUrlsResponse] = Future()

        def find() -> records.ExternalWeightsUrlsResponse:
            checkpoints, path = self._job.service.checkpoints, CheckpointPath.parse(tinker_path)
            found = checkpoints.store.get_checkpoint(path, self._job.owner)
            urls = {name: file.as_uri() for name, file in checkpoints.archive.files(path, found.version).items()}
            return records.ExternalWeightsUrlsResponse(
                urls, datetime.now(timezone.utc) + timedelta(seconds=FILE_SECONDS)
            )

        settle(out, find)
        return APIFuture(out)


def _run(run_id: str) -> str:
    return f"training_runs/{part(run_id)}"


def _one(tinker_path: str) -> str:
    path = CheckpointPath.parse(tinker_path)
    return f"{_run(path.run_id)}/checkpoints/{part(path.checkpoint_id)}"
