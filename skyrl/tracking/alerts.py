"""Where advisories go: advisories.jsonl, a webhook, a command. None of it holds up or ends a run."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from skyrl.config.schema import RunConfig
from skyrl.files import disk_reason
from skyrl.run_dir import ADVISORIES
from skyrl.tracking.advisories import Advisory, warn_fallback
from skyrl.types import UserError

SEND_SECONDS = 10.0  # for the webhook to answer, or the command to end
CLOSE_SECONDS = 5.0  # that the end of a run waits for alerts on their way


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A webhook that moves is told as a failure: urllib would go on as a GET without the body."""

    def redirect_request(self, *args: Any) -> None:
        return None


class Alerts:
    """Keeps and sends advisories, in the order told. A way that fails is said once and tried again the next time."""

    def __init__(self, cfg: RunConfig, folder: Path) -> None:
        """Raises UserError for a webhook that is no address."""
        self.options, self.path = cfg.alerts, Path(folder) / ADVISORIES
        self._about = {"run": cfg.run.name or Path(folder).name, "host": socket.gethostname()}
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        given = cfg.alerts.webhook
        self._url = os.environ.get(given[4:], "") if given.startswith("env:") else given
        if given and not re.match(r"https://[^/\s]|http://(localhost|127\.0\.0\.1)[:/]", self._url):
            raise UserError(
                f"alerts.webhook={given[:12]}...: give an https address (http to this machine alone), "
                "or env:NAME of a variable that holds one"
            )
        if cfg.alerts.webhook or cfg.alerts.command:
            self._thread = threading.Thread(target=self._send_all, name="skyrl-alerts", daemon=True)
            self._thread.start()

    def tell(self, advisory: Advisory) -> None:
        """Appends a line to advisories.jsonl and queues it for the others. Each gets {"name", "step", "remedy", "run",
        "host", "time", "text"}; there `text` is the whole line, which is what chat services show."""
        record = dataclasses.asdict(advisory)
        try:
            with open(self.path, "ab") as stream:
                stream.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        except OSError as problem:
            warn_fallback(f"{self.path}: cannot be written ({disk_reason(problem, self.path)})")
        if self._thread is not None:
            text = f"{self._about['run']}, step {advisory.step}: {advisory.line}"
            self._queue.put({**record, **self._about, "time": time.time(), "text": text})

    def close(self) -> None:
        """Waits a little for what is on its way."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                warn_fallback("alerts: the run ends while some are still on their way; they are in advisories.jsonl")

    def _send_all(self) -> None:
        while (message := self._queue.get()) is not None:
            for way, send in (("webhook", self._post), ("command", self._call)):
                if getattr(self.options, way):
                    try:
                        send(json.dumps(message).encode())
                    except Exception as error:  # whatever it is, an alert must not end the run
                        # its text may hold the address, and the address of a webhook is its secret
                        reason = f"status {error.code}" if isinstance(error, urllib.error.HTTPError) else ""
                        reason = reason or str(getattr(error, "reason", "") or type(error).__name__)
                        warn_fallback(f"alerts.{way}: failed ({reason}); what it would have told is in {self.path}")

    def _post(self, body: bytes) -> None:
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
        urllib.request.build_opener(_NoRedirect).open(request, timeout=SEND_SECONDS).close()

    def _call(self, body: bytes) -> None:
        quiet = subprocess.DEVNULL
        subprocess.run(self.options.command, input=body, stdout=quiet, stderr=quiet, timeout=SEND_SECONDS, check=True)
