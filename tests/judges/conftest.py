"""A judge that answers as it is told, in the shape of OpenAI's chat completions."""

import http.server
import json
import threading
import time

import pytest


class Judge:
    """`script`: what the next requests get, (status, headers, body) or a text that the model says; then `says`.
    `requests`: bodies of those that came, with the headers under "headers"."""

    def __init__(self):
        self.script, self.requests, self.says, self.delay = [], [], '{"score": 7}', 0.0
        judge = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.requests.append(
                    {**body, "headers": {name.lower(): value for name, value in self.headers.items()}}
                )
                time.sleep(judge.delay)
                said = judge.script.pop(0) if judge.script else judge.says
                if isinstance(said, str):
                    message = {"role": "assistant", "content": said}
                    choice = {"index": 0, "message": message, "finish_reason": "stop"}
                    said = (
                        200,
                        {},
                        {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]},
                    )
                status, headers, body = said
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                kind = "text/html" if isinstance(body, str) else "application/json"
                for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *about: None  # a client that did not wait
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def judge(tmp_path, monkeypatch):
    monkeypatch.setenv("SKYRL_JUDGE_CACHE", str(tmp_path / "cache"))
    made = Judge()
    yield made
    made.server.shutdown()
    made.server.server_close()
