"""Plain HTTP to a real server, every exchange kept with ids, times and addresses replaced by names.

An exchange is a line of the recorded file: what was asked, the status, the headers that matter, and the answer. JSON is
kept as values, protobuf decoded, a stream joined to the text that it carries, a tar as a list of its files.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from messages import decode

KEPT_HEADERS = (
    "content-type content-disposition content-length location retry-after www-authenticate cache-control connection "
    "x-accel-buffering allow"
).split()
PROTOBUF = "application/x-protobuf"
# Replaced wherever they stand in a text, in this order.
PATTERNS = (
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)?"), "<time>"),
    (re.compile(r"expires=\d+&signature=[0-9a-f]+"), "<signature>"),
    (re.compile(r"(?<=/)[0-9a-f]{16}(?=/)"), "<version>"),
    (re.compile(r"\b(chatcmpl|cmpl)-[0-9a-f]{32}\b"), r"\1-<id>"),
    (re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]+"), "<token>"),
)
# Ids: the first one of a kind is called <kind 1> from then on. Of sessions wherever their form is met, of requests in
# the field of that name.
SESSION, REQUEST = re.compile(r"\bs-[0-9a-f]{12}\b"), "request_id"
TIMES = ("created",)
READY_SECONDS = 60.0


class Wire:
    """A client that records. `folder`: the server's working directory, called <folder> in the record."""

    def __init__(self, url: str, folder: Path) -> None:
        self.http = httpx.Client(base_url=url, timeout=60)
        self.exchanges: list[dict[str, Any]] = []
        self._names: dict[str, str] = {str(folder.resolve()): "<folder>", url: "<url>"}
        self._counts: dict[str, int] = {}

    def ask(
        self, method: str, path: str, body: Any = None, *, key: str = "tml-ann", note: str = "", kept: int = 200,
        proto: str = "", **headers: str,
    ) -> Any:  # fmt: skip
        """One exchange; the JSON of the answer, or the response where it is something else.

        body: bytes as they are, anything else as JSON. proto: the message type of a protobuf answer, which is then
        asked for. note: what the record says instead of the body. kept: the least status that is recorded. headers:
        underscores become hyphens.
        """
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if key:
            given["X-API-Key"] = key
        if proto:
            given["Accept"] = PROTOBUF
        if isinstance(body, bytes):
            content = {"content": body}
        else:
            content = {} if body is None else {"json": body}
        if not path.startswith("/"):
            path = f"/api/v1/{path}"
        response = self.http.request(method, path, headers=given, **content)
        value, answer = self._read(response, proto)
        if response.status_code >= kept:
            shown = {name: text for name, text in given.items() if name not in ("X-API-Key", "Accept")}
            self.exchanges.append(
                {
                    "ask": self._plain(f"{method} {path}"),
                    **({"as": key} if key != "tml-ann" else {}),
                    **({"headers": shown} if shown else {}),
                    **({"body": note or self._body(body)} if body is not None else {}),
                    "status": response.status_code,
                    "answer_headers": {
                        name: self._plain(response.headers[name])
                        for name in KEPT_HEADERS
                        if name in response.headers and not (name == "content-length" and value is not response)
                    },
                    "answer": self._plain(answer),
                }
            )
        return value

    def post(self, path: str, /, **body: Any) -> Any:
        """POST of JSON."""
        return self.ask("POST", path, body)

    def get(self, path: str) -> Any:
        """GET."""
        return self.ask("GET", path)

    def future(self, path: str, body: Any, *, proto: str = "", also_json: bool = False, **more: Any) -> Any:
        """A call that is answered with a future, and what becomes of it, as protobuf where `proto` names its type."""
        done = self.ask("POST", path, body, **more)
        if "request_id" not in done:
            return done
        found = self.result(done["request_id"], proto=proto)
        if also_json:
            self.result(done["request_id"])
        return found

    def result(self, request_id: str, *, proto: str = "") -> Any:
        """What becomes of a future."""
        return self.ask("POST", "retrieve_future", {"request_id": request_id, "allow_metadata_only": True}, proto=proto)

    def _body(self, body: Any) -> Any:
        return f"<{len(body)} bytes>" if isinstance(body, bytes) else self._plain(body)

    def _read(self, response: httpx.Response, proto: str) -> tuple[Any, Any]:
        """(what the caller gets, what is recorded)."""
        kind = response.headers.get("content-type", "").split(";")[0]
        if kind == "application/json":
            value = response.json()
            self._learn(value)
            return value, value
        if kind == PROTOBUF:
            return response, decode(response.content, proto)
        if kind == "text/event-stream":
            return response, join_events(response.text)
        if kind == "application/x-tar":
            with tarfile.open(fileobj=io.BytesIO(response.content)) as tar:
                return response, [[one.name, one.size, _content(tar.extractfile(one).read())] for one in tar]
        return response, _content(response.content)

    def _learn(self, value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(value.get(REQUEST), str):
                self._name("request", value[REQUEST])
            for item in value.values():
                self._learn(item)
        elif isinstance(value, list):
            for item in value:
                self._learn(item)
        elif isinstance(value, str):
            for session in SESSION.findall(value):
                self._name("session", session)

    def _name(self, kind: str, value: str) -> None:
        if value not in self._names:
            self._counts[kind] = self._counts.get(kind, 0) + 1
            self._names[value] = f"<{kind} {self._counts[kind]}>"

    def _plain(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {
                self._plain(name): "<time>" if name in TIMES and item else self._plain(item)
                for name, item in value.items()
            }
        if isinstance(value, list):
            return [self._plain(item) for item in value]
        if isinstance(value, str):
            for text, name in self._names.items():
                value = value.replace(text, name)
            for pattern, name in PATTERNS:
                value = pattern.sub(name, value)
        return value


def _content(data: bytes) -> Any:
    """Short JSON as it is; of anything else a digest."""
    if not data:
        return ""
    with contextlib.suppress(ValueError):
        return json.loads(data)
    return f"sha256 {hashlib.sha256(data).hexdigest()[:16]}"


def join_events(text: str) -> dict[str, Any]:
    """A stream of events as what it says in the end, since where it is cut depends on time: for each choice its whole
    text and, once each, what else its events say; and what the events say besides their choices."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line and not line.startswith(":")]
    found: dict[str, Any] = {"ends": lines[-1], "events": [], "choices": {}}
    for line in lines[:-1]:
        event = json.loads(line)
        for choice in event.pop("choices", []):
            known = found["choices"].setdefault(str(choice["index"]), {"text": "", "says": []})
            delta = choice.get("delta")
            part = choice.pop("text", "") if delta is None else delta.pop("content", "")
            known["text"] += part
            if choice not in known["says"]:
                known["says"].append(choice)
        if event not in found["events"]:
            found["events"].append(event)
    found["choices"] = dict(sorted(found["choices"].items()))
    return found


@contextlib.contextmanager
def serving(starter: Any, folder: Path, *options: str) -> Iterator[Wire]:
    """A server on a free port, working in `folder`; it is stopped at the end, and has to end well."""
    number = starter.start("skyrl.serve", "service.port=0", *options, folder=folder)
    end, log = time.monotonic() + READY_SECONDS, folder / ".stderr"
    while True:
        text = log.read_text() if log.exists() else ""
        if found := re.search(r"at (http://\S+)", text):
            break
        assert starter.poll(number) is None and time.monotonic() < end, text
        time.sleep(0.02)
    wire = Wire(found[1], folder)
    try:
        yield wire
    finally:
        wire.http.close()
        starter.stop(number)
    starter.wait(number, folder)
