"""The official Tinker SDK against a service that this very program opens: no server to start, no address to give.

    with skyrl.tinker.service_client(model={"path": "Qwen/Qwen3-0.6B"}) as client:
        model = client.create_lora_training_client(base_model="Qwen/Qwen3-0.6B", rank=32).result()

Alone or under torchrun. The script runs on rank 0 and speaks HTTP with a port of 127.0.0.1 whose key only this program
has; the engine on all ranks is the one of skyrl.train and skyrl.serve. Imports without torch and without the SDK.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shlex
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from skyrl.config.load import as_overrides, load_config
from skyrl.config.schema import RunConfig
from skyrl.distributed.env import rank
from skyrl.main import end_now
from skyrl.types import UserError
from skyrl.web.auth import LOCAL_OWNER, Keys

SESSION = ("user_metadata", "project_id", "display_name")
_refusal = ""  # why no service can be opened in this process now


@contextlib.contextmanager
def service_client(**options: Any) -> Iterator[Any]:
    """A `tinker.ServiceClient` for the body of the `with` block, on rank 0.

    `options` are those of skyrl.serve, nested (model={"path": "x"}) or by path (**{"model.path": "x"}); they come after
    those of SKYRL_SERVE_OPTIONS, which are written as on the command line. user_metadata, project_id and display_name
    describe the session and go to the SDK. Checkpoints and records are in a temporary folder unless service.folder
    names one. Further clients of the body, and of its child processes, find the service by the SDK's own variables.

    Under torchrun every rank has to come here. All but rank 0 work for it until it leaves the block, and then end
    (SystemExit 0): neither the body nor what follows it runs there. An error of the body is raised on rank 0 and ends
    the service; a rank that fails ends the job. As with any server, wait for the futures whose effects you want.

    Raises UserError without the SDK, for options that cannot be, and for a second service where there can be one.
    """
    global _refusal
    from skyrl.distributed.init import shutdown
    from skyrl.service.frontend import start_http_server
    from skyrl.service.server import open_service

    if _refusal:
        raise UserError(_refusal)
    session = {name: options.pop(name) for name in SESSION if name in options}
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="skyrl-service-")) if rank() == 0 else "-"
            service = open_service(_service_config({"service.folder": folder}, options))
        except BaseException as error:
            if rank() != 0:  # all have the same error, and rank 0 tells it
                end_now(error, "serve")
            shutdown(failed=True)
            raise
        stack.callback(shutdown)
        if service is None:  # rank 0 has left its block
            raise SystemExit(0)
        stack.callback(service.close)
        key = "tml-" + secrets.token_urlsafe(32)
        server = start_http_server(service, Keys({key: LOCAL_OWNER}))
        stack.callback(server.stop)
        service.worker.check = server.check
        worker = threading.Thread(target=_work, args=(service,), name="skyrl-worker", daemon=True)
        worker.start()
        stack.callback(_stop, service, worker)
        _refusal = "a service is open in this process already; tinker.ServiceClient() is another client of it"
        stack.enter_context(_environment(TINKER_BASE_URL=server.url, TINKER_API_KEY=key))
        yield stack.enter_context(importlib.import_module("tinker").ServiceClient(**session))


def _service_config(defaults: Mapping[str, Any], options: Mapping[str, Any]) -> RunConfig:
    if importlib.util.find_spec("tinker") is None:
        raise UserError(
            "skyrl.tinker needs the SDK and, for that, Python 3.11 or newer: pip install 'skyrl-spmd[tinker]'"
        )
    given = shlex.split(os.environ.get("SKYRL_SERVE_OPTIONS", ""))
    cfg = load_config([*as_overrides(defaults), *given, *as_overrides(options)], mode="serve")
    if cfg.dry_run:
        raise UserError("dry_run=true: for the command line, python -m skyrl.serve")
    # The client is in this process: its silence means that it computes, not that it is gone.
    service = replace(cfg.service, host="127.0.0.1", port=0, keys_file="", model_idle_seconds=0.0)
    return replace(cfg, service=service)


def _work(service: Any) -> None:
    try:
        service.worker.run()
    except BaseException as error:  # the script may wait for a result that never comes
        end_now(error, "serve")


def _stop(service: Any, worker: threading.Thread) -> None:
    """Finishes the work in hand and all saves, and lets the other ranks leave; what waits is refused."""
    global _refusal
    _refusal = "the other ranks left with the first service; keep its block open" if service.world.size > 1 else ""
    service.worker.stop("the service is closed")
    service.scheduler.close("the service is closed")  # wakes the worker
    worker.join()


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables while it lasts; and loopback goes through no proxy."""
    values["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"]))
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
