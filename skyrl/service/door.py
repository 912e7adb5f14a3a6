"""The HTTP door of an open service."""

from __future__ import annotations

from dataclasses import dataclass

from skyrl.service.app import Serving, make_app, serve_in_thread
from skyrl.service.openai_params import TextTools
from skyrl.service.server import Service
from skyrl.types import RunError
from skyrl.web.auth import Keys, read_keys


@dataclass
class HttpDoor:
    """A server in a thread of its own. `keys`: whether clients need one."""

    serving: Serving
    keys: bool

    @property
    def url(self) -> str:
        """Where clients reach it."""
        return self.serving.url

    def check(self) -> None:
        """Raises RunError when the thread that serves HTTP has ended: nobody could reach the server any more."""
        if not self.serving.alive:
            raise RunError("the HTTP thread has ended, so nobody can reach the server; the lines above say why")

    def stop(self) -> None:
        """Takes no new requests; returns when those under way are answered, or after some seconds."""
        self.serving.stop()


def open_door(service: Service, keys: Keys | None = None) -> HttpDoor:
    """Serves HTTP for `service` on service.host and service.port; whose keys are not given, read from its settings.
    Raises UserError for an address or keys that cannot be used."""
    settings = service.cfg.service
    keys = keys or read_keys(settings)
    app = make_app(
        service.scheduler,
        service.checkpoints,
        service.facts,
        settings,
        text=TextTools(service.encode, service.decode, service.render),
        keys=keys,
    )
    return HttpDoor(serve_in_thread(app, settings.host, settings.port), keys.required)
