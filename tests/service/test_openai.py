"""OpenAI-style endpoints over real HTTP: answers, log-probabilities, streams and refusals."""

import threading
import time

import numpy as np
import pytest
from door_server import INFO, TEXT, events, serving
from small_tokenizers import llama2

from skyrl.service.messages import SampledSequence, SampleResult, SamplingRequest
from skyrl.service.openai import ChatBody, Writer
from skyrl.text.chat import Chat
from skyrl.text.stream import GrowingText
from skyrl.text.tokenizer import tiny_tokenizer
from skyrl.types import UserError


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("door")) as server:
        yield server


def ask(server, path="completions", prefix="/v1/", **body):
    return server.http.post(prefix + path, json={"model": "tiny", **body})


def good(server, path="completions", prefix="/v1/", **body):
    answer = ask(server, path, prefix, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat(server, **body):
    return good(server, "chat/completions", messages=[{"role": "user", "content": "hi"}], **body)


def last(server) -> SamplingRequest:
    return server.answers.seen[-1]


@pytest.mark.parametrize("prefix", ["/v1/", "/oai/api/v1/"])
def test_completion(server, prefix):
    got = good(server, prefix=prefix, prompt="ab", max_tokens=10, temperature=0.5, top_p=0.9, top_k=5, seed=3)
    assert got["object"] == "text_completion" and got["model"] == "tiny" and got["id"].startswith("cmpl-")
    assert got["choices"] == [{"index": 0, "finish_reason": "length", "text": TEXT[:10], "logprobs": None}]
    assert got["usage"] == {"prompt_tokens": 2, "completion_tokens": 10, "total_tokens": 12,
                            "prompt_tokens_details": {"cached_tokens": 3}}  # fmt: skip
    query = last(server)
    params = query.sampling_params
    assert (params.temperature, params.top_p, params.top_k, params.seed, query.base_model) == (0.5, 0.9, 5, 3, "tiny")
    assert query.prompt.tolist() == [97, 98] and params.stop is None and query.seq_id == -1


def test_defaults_are_those_of_openai(server):
    good(server, prompt="ab")
    assert last(server).sampling_params.max_tokens == 16 and last(server).sampling_params.temperature == 1.0
    chat(server)
    assert last(server).sampling_params.max_tokens is None


def test_the_end_and_stops_are_no_text(server):
    whole = good(server, prompt="a", max_tokens=500)["choices"][0]
    assert whole["text"] == TEXT and whole["finish_reason"] == "stop"
    cut = good(server, prompt="a", max_tokens=500, stop=["more", "."])["choices"][0]
    assert cut["text"] == "The answer is 42" and cut["finish_reason"] == "stop"
    assert good(server, prompt="a", max_tokens=500, stop=" answer")["choices"][0]["text"] == "The"


def test_prompts_as_lists_and_ids(server):
    got = good(server, prompt=["ab", "c"], n=2, max_tokens=3)
    assert [choice["index"] for choice in got["choices"]] == [0, 1, 2, 3] and got["usage"]["prompt_tokens"] == 3
    assert got["usage"]["completion_tokens"] == 12
    assert good(server, prompt=[5, 6], max_tokens=1)["usage"]["prompt_tokens"] == 2
    assert last(server).prompt.tolist() == [5, 6]
    assert len(good(server, prompt=[[5, 6], [7]], max_tokens=1)["choices"]) == 2


def test_logprobs_and_echo_of_a_completion(server):
    got = good(server, prompt="ab", max_tokens=2, logprobs=1, echo=True)["choices"][0]
    table = got["logprobs"]
    assert got["text"] == "ab" + TEXT[:2] and table["tokens"] == ["a", "b", "T", "h"]
    assert table["text_offset"] == [0, 1, 2, 3]
    assert table["token_logprobs"] == pytest.approx([None, -0.98, -0.84, -1.04], abs=1e-6)
    assert table["top_logprobs"] == [None, {"b": -1.0}, {"T": -1.0}, {"h": -1.0}]
    scored = good(server, prompt="abc", max_tokens=0, logprobs=0, echo=True)
    assert scored["choices"][0]["text"] == "abc" and scored["usage"]["completion_tokens"] == 0
    assert len(scored["choices"][0]["logprobs"]["token_logprobs"]) == 3
    assert scored["choices"][0]["logprobs"]["top_logprobs"] is None
    plain = good(server, prompt="ab", max_tokens=2, logprobs=2)["choices"][0]["logprobs"]
    assert plain["tokens"] == ["T", "h"] and len(plain["top_logprobs"][0]) == 2


def test_chat(server):
    got = chat(server, max_tokens=4, n=2)
    assert got["object"] == "chat.completion" and len(got["choices"]) == 2
    assert got["choices"][1] == {
        "index": 1, "finish_reason": "length", "message": {"role": "assistant", "content": TEXT[:4]}, "logprobs": None,
    }  # fmt: skip
    assert "".join(map(chr, last(server).prompt)) == "user: hi\nassistant: "
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    good(server, "chat/completions", messages=[{"role": "user", "content": parts}], max_completion_tokens=2)
    assert (
        "".join(map(chr, last(server).prompt)) == "user: ab\nassistant: "
        and last(server).sampling_params.max_tokens == 2
    )


def test_logprobs_of_a_chat(server):
    entry = chat(server, max_tokens=2, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"][0]
    assert entry["token"] == "T" and entry["bytes"] == [84] and entry["logprob"] == pytest.approx(-0.84)
    assert [top["token"] for top in entry["top_logprobs"]] == ["T", "U"]
    assert chat(server, max_tokens=2, logprobs=True)["choices"][0]["logprobs"]["content"][1]["top_logprobs"] == []


def test_streams_of_completions_put_together_are_the_answer(server):
    answer = ask(server, prompt=["a", "b"], n=2, max_tokens=500, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    seen = events(answer.text)
    text = dict.fromkeys(range(4), "")
    for event in seen[:-1]:
        for choice in event["choices"]:
            text[choice["index"]] += choice["text"]
    assert set(text.values()) == {TEXT} and len(seen) > 8
    ends = [c["finish_reason"] for e in seen for c in e["choices"] if c["finish_reason"]]
    assert ends == ["stop"] * 4 and seen[-1]["choices"] == []
    assert seen[-1]["usage"]["completion_tokens"] == 4 * (len(TEXT) + 1) and len({e["id"] for e in seen}) == 1


def letters(text):
    """Each byte is a token; a decoder writes what is no whole character as \ufffd."""
    return list(text.encode()), lambda ids: bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("stops", [(), ("stop!",), ("st", "stop it", "more"), ("\u20ac\u20ac",)])
def test_a_growing_text_gives_out_only_what_stays(size, stops):
    """Whatever comes next: pieces put together are a beginning of the answer, in whole characters."""
    text = "h\u00e9 \u20ac1, sto s  \U0001f600\u20ac stop it. no more \u20ac"
    ids, decode = letters(text)
    at = min((i for i in (text.find(stop) for stop in stops) if i >= 0), default=len(text))
    one, seen = GrowingText(decode, stops, before="stop! "), ""
    for start in range(0, len(ids), size):
        seen += one.more(ids[start : start + size])
        assert ("stop! " + text[:at]).startswith(seen) and "\ufffd" not in seen
        drawn = decode(ids[: start + size]).rstrip("\ufffd")
        if start and not any(drawn.endswith(stop[0]) or stop in drawn for stop in stops) and drawn == drawn.rstrip():
            held = max((n for stop in stops for n in range(len(stop)) if drawn.endswith(stop[:n])), default=0)
            assert len(seen) >= 6 + len(drawn[: len(drawn) - held].rstrip())  # and not less than it could be
    assert seen + one.rest("stop! " + text[:at]) == "stop! " + text[:at]


def test_a_text_that_changes_after_it_was_sent_is_a_fault():
    one = GrowingText(lambda ids: "a" * len(ids), ())
    assert one.more([1, 2]) == "aa"
    with pytest.raises(RuntimeError, match="has changed, after 2 characters"):
        one.rest("ab")


def test_streams_of_chats(server):
    answer = ask(server, "chat/completions", messages=[{"role": "user", "content": "x"}], stream=True, stop="42",
                 logprobs=True)  # fmt: skip
    seen = events(answer.text)
    assert seen[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(event["object"] == "chat.completion.chunk" for event in seen)
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in seen) == "The answer is "
    assert seen[-1]["choices"][0]["finish_reason"] == "stop" and seen[-1]["choices"][0]["logprobs"]["content"]


def test_what_is_not_streamed_is_not_watched(server):
    good(server, prompt="ab", max_tokens=4)
    assert last(server).stream is False
    events(ask(server, prompt="ab", max_tokens=4, stream=True).text)
    assert last(server).stream is True
    scored = events(ask(server, prompt="abc", max_tokens=0, logprobs=0, echo=True, stream=True).text)
    assert last(server).stream is False and "".join(e["choices"][0]["text"] for e in scored) == "abc"
    echoed = events(ask(server, prompt="abc", max_tokens=40, echo=True, stream=True).text)
    assert "".join(e["choices"][0]["text"] for e in echoed) == "abc" + TEXT[:40] and len(echoed) > 2


def test_a_stream_that_fails_says_so(server):
    server.answers.hold.set()
    lines: list[str] = []
    body = {"model": "tiny", "prompt": "a", "stream": True}

    def read():
        with server.client() as http, http.stream("POST", "/v1/completions", json=body) as answer:
            lines.extend(answer.iter_lines())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(100):
            batch = [pending for pending in server.desk._requests.values() if not (pending.started or pending.settled)]
            if batch:
                break
            time.sleep(0.02)
        server.desk.cancel(batch[0].request_id, owner="local")
        reader.join(10)
    finally:
        server.answers.hold.clear()
    assert '"message":"cancelled by the client"' in lines[0] and "[DONE]" not in "".join(lines)


def test_a_client_that_leaves_frees_its_place(server, monkeypatch):
    monkeypatch.setattr("skyrl.service.openai.COMMENT_SECONDS", 0.1)
    server.answers.hold.set()
    try:
        for stream in (False, True):
            with server.client() as http:
                http.timeout = 0.5
                with pytest.raises(Exception, match="timed out"):
                    with http.stream(
                        "POST", "/v1/completions", json={"model": "tiny", "prompt": "zz", "stream": stream}
                    ) as a:
                        for line in a.iter_lines():
                            if line.startswith("data"):
                                break
                            if line.startswith(":"):
                                raise TimeoutError("timed out: a comment, and the client leaves")
            for _ in range(100):
                if not server.desk.has_pending_work():
                    break
                time.sleep(0.05)
            assert not server.desk.has_pending_work(), stream
    finally:
        server.answers.hold.clear()


def test_models_and_paths(server):
    run = server.model()
    path = server.future("save_weights_for_sampler", model_id=run, seq_id=1, path="v1")["path"]
    listed = server.http.get("/v1/models").json()
    assert [one["id"] for one in listed["data"]] == ["tiny", "org/model", path]
    assert server.http.get(f"/v1/models/{path}").json()["id"] == path
    assert server.http.get(f"/v1/models/{path.replace('//', '/')}").json()["id"] == path
    assert server.http.get("/v1/models/org/model").json()["id"] == "org/model"
    assert server.http.get("/v1/models/none").status_code == 404
    good(server, model=path, prompt="a")
    assert (last(server).model_path, last(server).base_model) == (path, None)
    assert ask(server, model=path + "x", prompt="a").status_code == 404


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"prompt": "a", "model": "gpt-5"}, "model 'gpt-5' is not served here"),
        ({"prompt": "a", "frequency_penalty": 0.5}, "frequency_penalty, which this server does not do"),
        ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias, which this server does not do"),
        ({"prompt": "a", "best_of": 4}, "best_of=4, but nothing is ranked"),
        ({"prompt": "a", "suffix": "x"}, "suffix, which this server does not do"),
        ({"prompt": "a", "surprise": 1}, "'surprise'"),
        ({"prompt": "a", "n": 0}, "n=0"),
        ({"prompt": "a", "max_tokens": 0}, "nothing would be answered"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens=-1"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "logprobs": 99}, "logprobs=99"),
        ({"prompt": "a", "stop": [""]}, "stop=a list of 1; allowed"),
        ({"prompt": "a", "stop": ["a" * 4097]}, "stop=a list of 1; allowed: strings of at most 4096 characters"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "prompt; allowed"),
        ({"prompt": ["a", 5]}, "prompt; allowed"),
        ({"prompt": [5, -1]}, "prompt; allowed"),
        ({"prompt": "a" * 4096}, "4096 tokens leave no room"),
        ({}, "prompt is missing"),
    ],
)
def test_completions_that_are_refused(server, body, told):
    answer = ask(server, **body)
    error = answer.json()["error"]
    assert answer.status_code == (404 if "not served" in told else 400) and told in error["message"]
    assert error["type"] in ("invalid_request_error", "not_found_error") and "\n" not in error["message"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"messages": []}, "messages is empty"),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            "the chat template refuses these messages: role robot is not",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'; allowed: text"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
            "has tool_calls: only",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "content=5; allowed"),
        ({"tools": [{"type": "function"}]}, "tools, which this server does not do"),
        ({"response_format": {"type": "json_object"}}, "response_format, which this server does not do"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs=true"),
        ({"presence_penalty": 1}, "presence_penalty, which this server does not do"),
    ],
)
def test_chats_that_are_refused(server, body, told):
    answer = ask(server, "chat/completions", **{"messages": [{"role": "user", "content": "x"}], **body})
    assert answer.status_code == 400 and told in answer.json()["error"]["message"]


def test_what_changes_nothing_is_taken(server):
    chat(server, frequency_penalty=0, presence_penalty=0, logit_bias={}, tools=[], user="me", store=False, stop=None,
         response_format={"type": "text"}, metadata={"a": "b"}, tool_choice="none")  # fmt: skip


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots\nhere') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}[assistant] "
    "{% if enable_thinking is defined and not enable_thinking %}(none) {% endif %}{% if style %}{{ style.tone }}"
    "{% endif %}{% endif %}"
)
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "I  "}


@pytest.fixture(scope="module")
def templated() -> Chat:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return Chat(tokenizer)


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({}, "[user] hi<eos>[assistant] "),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "[user] hi<eos>[assistant] (none) "),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "[user] hi<eos>[assistant] "),
        ({"chat_template_kwargs": {"style": {"tone": "dry"}}}, "[user] hi<eos>[assistant] dry"),
        ({"chat_template_kwargs": None, "continue_final_message": None}, "[user] hi<eos>[assistant] "),
        ({"add_generation_prompt": True, "continue_final_message": False}, "[user] hi<eos>[assistant] "),
        ({"add_generation_prompt": False}, "[user] hi<eos>"),
        ({"messages": [USER, ANSWER], "continue_final_message": True}, "[user] hi<eos>[assistant] I  "),
        (
            {"messages": [USER, ANSWER], "continue_final_message": True, "add_generation_prompt": False},
            "[user] hi<eos>[assistant] I  ",
        ),
        ({"messages": [USER, ANSWER, USER]}, "[user] hi<eos>[assistant] I  <eos>[user] hi<eos>[assistant] "),
    ],
)
def test_what_the_template_is_given(templated, body, wanted):
    (query,) = ChatBody.parse({"model": "m", "messages": [USER], **body}).queries(templated, INFO)
    assert templated.decode(query.prompt.tolist()).rstrip() == wanted.rstrip()


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"messages": [USER, ANSWER]}, "the last message is an assistant's; give continue_final_message=true"),
        ({"continue_final_message": True}, "continue_final_message needs a last message of role assistant"),
        (
            {"messages": [USER, ANSWER], "continue_final_message": True, "add_generation_prompt": True},
            "and no add_generation_prompt",
        ),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs has 'chat_template', which is no"),
        ({"chat_template_kwargs": {"style": 1, "thinking": True}}, "chat_template_kwargs.thinking: the chat template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "'tokenize', which is no variable"),
        ({"chat_template_kwargs": {"tools": []}}, "'tools', which is no variable"),
        ({"chat_template_kwargs": {"continue_final": True}}, "'continue_final', which is no variable"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs=a list of 1; allowed: a map"),
        ({"chat_template_kwargs": {f"k{i}": 0 for i in range(65)}}, "chat_template_kwargs=a mapping of 65"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "the chat template refuses these messages: no robots here"),
    ],
)
def test_what_the_template_cannot_be_given(templated, body, told):
    with pytest.raises(UserError) as caught:
        ChatBody.parse({"model": "m", "messages": [USER], **body}).queries(templated, INFO)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_the_text_of_an_answer_is_what_rewards_read(templated):
    """Only the end token is taken off: special tokens in the middle stay, and so do spaces."""
    tokenizer = templated.tokenizer
    body = ChatBody.parse({"model": "m", "messages": [USER]})
    for text, reason in ((" 1<pad>5 <eos>", "stop"), ("<pad>", "length"), ("a  <eos>", "stop")):
        ids = np.array(tokenizer(text)["input_ids"])
        one = SampledSequence(ids, np.zeros(len(ids), np.float32), reason)
        answer = Writer(body, body.queries(templated, INFO), templated, 0).whole([SampleResult([one])])
        assert answer["choices"][0]["message"]["content"] == templated.read(ids.tolist()) == text.removesuffix("<eos>")


def test_the_tokens_of_log_probabilities_are_the_text_of_the_answer():
    """Also of a tokenizer that begins a word behind a special token with a space of its own."""
    tokenizer = llama2()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}<|assistant|>"
    chat = Chat(tokenizer)
    body = ChatBody.parse({"model": "m", "messages": [USER], "logprobs": True})
    ids = chat.answer([USER], "the sum is 42")[:-1]
    one = SampledSequence(ids, np.zeros(len(ids), np.float32), "length")
    (choice,) = Writer(body, body.queries(chat, INFO), chat, 0).whole([SampleResult([one])])["choices"]
    tokens = [token["token"] for token in choice["logprobs"]["content"]]
    assert "".join(tokens) == choice["message"]["content"] == "the sum is 42"


def test_too_much_work_and_no_tokenizer(tmp_path):
    with serving(tmp_path, max_queued_samples=2) as server:
        server.answers.hold.set()
        waiting = threading.Thread(target=lambda: ask(server, prompt="a", n=2, max_tokens=1))
        waiting.start()
        while not server.desk.has_pending_work():
            time.sleep(0.01)
        answer = ask(server, prompt="a")
        assert answer.status_code == 429 and answer.json()["error"]["type"] == "rate_limit_error"
        server.answers.hold.clear()
        waiting.join(10)
