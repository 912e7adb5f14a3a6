"""Customer support: a scripted customer, and one who is played by a model behind a real socket."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from skyrl.envs.base import RetryableError
from skyrl.tasks.support import NOT_UNDERSTOOD
from skyrl.types import UserError

ROW = {
    "prompt": "Refund me.",
    "facts": {"order": "It is 4821.", "date": "3 days ago.", "mail address": "a@b.c"},
    "asks": {"order": ["number", "order"]},
    "action": "refund 4821",
}


@pytest.mark.parametrize(
    ("answers", "options", "reward", "metrics"),
    [
        (["Which order?", "action: refund 4821"], {}, 1.0, (0, 0, 1)),
        (["Ok.\n Action:  REFUND  4821 "], {}, 1.0, (0, 0, 1)),  # a lucky guess is right
        (["action: refund 4812"], {"wrong": 0.5}, -0.5, (1, 0, 0)),
        (["action: decline 4821"], {}, 0.0, (1, 0, 0)),
        (["action: refund 4821 and 4822"], {}, 0.0, (1, 0, 0)),
        (["action: refund 4821\naction: decline 4821"], {}, 0.0, (1, 0, 0)),
        (["The action: refund 4821 would be right", "order?"], {}, 0.0, (0, 0, 0)),
        (["order?", "order?", "hello"], {"patience": 2}, 0.0, (0, 1, 0)),
        (["action:", "action: "], {}, 0.0, (0, 0, 0)),
    ],
)
def test_the_reward_does_what_it_says(rows, play, answers, options, reward, metrics):
    result, _ = play(rows("support", ROW)[0], *answers, **options)
    names = ("wrong_action", "customer_left", "correct")
    assert result.reward == reward and tuple(result.metrics[f"{name}:mean"] for name in names) == metrics


def test_what_the_customer_tells(rows, play):
    prompt = rows("support", ROW)[0]
    asked = ("Hi", "The NUMBER, date and mail address?", "Your mail  address!", "update, reordering", "date?")
    _, heard = play(prompt, *asked, "action: x", patience=9)
    assert [said.strip() for said in heard[1:]] == [
        NOT_UNDERSTOOD, "It is 4821. 3 days ago.", "a@b.c", NOT_UNDERSTOOD, "3 days ago."
    ]  # fmt: skip


def test_made_customers_are_served_by_asking(rows, play):
    def player(said):
        if "Customer:" in said:
            player.track = "My order has not come" in said
            return "What is the order number, and when did you buy it?"
        _, _, order, days, *_ = said.replace(".", "").split()
        return f"action: {'track' if player.track else 'refund' if int(days) <= 30 else 'decline'} {order}"

    prompts = rows("support", split="test")
    assert {p.extra["action"].split()[0] for p in prompts} == {"refund", "decline", "track"}
    assert all(play(prompt, player, max_turns=2)[0].reward == 1.0 for prompt in prompts)


@pytest.mark.parametrize(
    ("word", "text"),
    [("gr\u00f6\u00dfe", "Welche GR\u00d6SSE?"), ("\u043d\u043e\u043c\u0435\u0440", "\u041d\u043e\u043c\u0435\u0440?"),
     ("e-mail", "Your e-mail?"), ("order_number", "The order number, please"), ("Order no.", "order no?"),
     ("\u65e5\u671f", "\u60a8\u7684\u65e5\u671f\u662f?")],
)  # fmt: skip
def test_words_that_ask_are_of_any_script(rows, play, word, text):
    for told in ({"facts": {"x": "It is 5."}, "asks": {"x": [word]}}, {"facts": {word: "It is 5."}, "asks": {}}):
        _, heard = play(rows("support", {**ROW, **told})[0], text, "action: refund 4821")
        assert heard[1] == "It is 5.\n"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"facts": {}}, "field 'facts' is {}"),
        ({"facts": {"order": 5}}, "wanted a text for each fact"),
        ({"action": None}, "field 'action' is None"),
        ({"asks": {"name": ["name"]}}, "field 'asks' .* one of the facts"),
        ({"asks": {"order": "number"}}, "field 'asks'"),
        ({"asks": {"order": []}}, "field 'asks'"),
        ({"asks": {"order": ["?!"]}}, "field 'asks'"),
        ({"action": " "}, "field 'action' is ' '"),
        ({"asks": [1]}, "field 'asks'"),
    ],
)
def test_a_row_that_cannot_be_played_is_refused_by_its_line(rows, change, told):
    with pytest.raises(UserError, match=r"train\.jsonl:1: .*" + told):
        rows("support", {**ROW, **change})


@pytest.fixture
def endpoint():
    """A server of the shape of OpenAI's: `replies` are (status, words or text), `asked` what it was sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append((self.path, self.headers.get("Authorization"), body))
            status, words = server.replies.pop(0)
            message = {"choices": [{"message": {"role": "assistant", "content": words}}]}
            text = words if isinstance(words, bytes) else json.dumps(message).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.replies, server.asked = [], []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_customer_who_is_played_by_a_model(rows, play, endpoint, monkeypatch):
    monkeypatch.setenv("THE_KEY", "secret")
    url = f"http://127.0.0.1:{endpoint.server_port}/v1/"
    options = {"base_url": url, "model": "small", "key_variable": "THE_KEY", "temperature": 0.5}
    endpoint.replies += [(200, " It's 4821, I think. "), (200, "Three days.")]
    prompt = rows("support_model", {**ROW, "persona": "You are angry."}, options=options)[0]
    result, heard = play(prompt, "Which order?", "And when?", "action: refund 4821", seed=7, **options)
    assert result.reward == 1.0 and heard == ["Refund me.", "It's 4821, I think.\n", "Three days.\n"]
    path, key, body = endpoint.asked[1]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer secret", "small", 0.5)
    system, *rest = body["messages"]
    assert "- order: It is 4821.\n" in system["content"] and system["content"].endswith("You are angry.")
    assert [m["role"] for m in rest] == ["assistant", "user", "assistant", "user"] and rest[-1][
        "content"
    ] == "And when?"
    assert endpoint.asked[0][2]["seed"] + 1 == body["seed"]


@pytest.mark.parametrize("reply", [(429, "busy"), (503, "down"), (200, b"no json"), (200, b"{}"), (200, ""), (200, 5)])
def test_an_endpoint_that_fails_is_asked_again_and_nothing_is_counted_twice(rows, endpoint, reply):
    import asyncio

    from skyrl.config.schema import EnvConfig
    from skyrl.envs import make_environment

    options = {"base_url": f"http://127.0.0.1:{endpoint.server_port}", "model": "small"}
    endpoint.replies += [reply, (200, "yes")]
    env = make_environment(EnvConfig(name="support_model", options=options, max_turns=3))
    env.reset(rows("support_model", ROW, options=options)[0])
    with pytest.raises(RetryableError):
        asyncio.run(env.step("order?"))
    result = asyncio.run(env.step("order?"))
    assert result.observation[0]["content"] == "yes\n" and env.turns == 1 and len(env.said) == 4
    assert endpoint.asked[0] == endpoint.asked[1]


def test_what_an_endpoint_refuses_is_named(rows, play, endpoint):
    options = {"base_url": f"http://127.0.0.1:{endpoint.server_port}", "model": "small"}
    prompt = rows("support_model", ROW, options=options)[0]
    endpoint.replies.append((404, b"no such model"))
    with pytest.raises(UserError, match=r"env\.options\.base_url: http://.* answers 404: no such model"):
        play(prompt, "order?", "order?", **options)
    gone = {"base_url": "http://127.0.0.1:9", "model": "small"}
    with pytest.raises(RetryableError, match="ConnectError"):
        play(prompt, "order?", "order?", **gone)
    with pytest.raises(UserError, match=r"env\.options\.key_variable='NONE_SUCH'"):
        rows("support_model", ROW, options={**options, "key_variable": "NONE_SUCH"})
    with pytest.raises(UserError, match=r"env\.options\.base_url='host:1'"):
        rows("support_model", ROW, options={**options, "base_url": "host:1"})
