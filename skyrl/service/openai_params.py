"""Bodies of completions and chat/completions, to samples. What is not done here is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from skyrl.service.messages import SamplingRequest, ServerInfo
from skyrl.service.wire_fields import INT32_MAX, INT64_MAX, Fields, check_text
from skyrl.types import Ints, Message, UserError

DEFAULT_MAX_TOKENS = 16  # of completions, as OpenAI has it; a chat goes on as far as the context allows
MAX_PROMPTS = 1024
MAX_TOP = 20
MAX_STOPS = 16
# Accepted when they say what is the case anyway: field -> such values, besides null.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "parallel_tool_calls": (True, False),
}
# Change nothing about what is drawn.
IGNORED = ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")


@dataclass(frozen=True)
class TextTools:
    """The tokenizer, as functions. encode: text to ids, nothing added. decode: ids to text, special tokens written
    out. render: a chat to ids, ready for an answer; raises UserError when the model has no chat template."""

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    render: Callable[[list[Message]], Sequence[int]]


@dataclass(frozen=True)
class Ask:
    """A parsed body. `queries` has one sample request per prompt, the weights not filled in yet.

    top: how many alternatives per token are wanted, None = no log-probabilities at all. echo: the prompt is part of
    the answer; empty: and nothing is drawn (max_tokens 0).
    """

    model: str
    chat: bool
    queries: list[SamplingRequest]
    stops: tuple[str, ...]
    top: int | None
    stream: bool
    usage_event: bool
    echo: bool = False
    empty: bool = False


def parse_completion(body: Any, text: TextTools, facts: ServerInfo) -> Ask:
    """completions. Prompts are text or token ids, one or several. Raises UserError."""
    fields = Fields(body, "completions")
    prompts = _prompts(fields.take("prompt"), text)
    limit = fields.integer("max_tokens", 0, INT32_MAX, DEFAULT_MAX_TOKENS)
    echo = fields.flag("echo", False)
    top = fields.integer("logprobs", 0, MAX_TOP, None)
    return _ask(fields, prompts, facts, chat=False, limit=limit, echo=echo, top=top)


def parse_chat(body: Any, text: TextTools, facts: ServerInfo) -> Ask:
    """chat/completions, with text messages. Raises UserError."""
    fields = Fields(body, "chat/completions")
    messages = [_message(value, i) for i, value in enumerate(fields.items("messages"))]
    if not messages:
        raise UserError("chat/completions: messages is empty; give at least one")
    limit = fields.integer("max_completion_tokens", 1, INT32_MAX, None)
    older = fields.integer("max_tokens", 1, INT32_MAX, None)
    wanted, top = fields.flag("logprobs", False), fields.integer("top_logprobs", 0, MAX_TOP, None)
    if top is not None and not wanted:
        raise UserError("chat/completions: top_logprobs needs logprobs=true")
    try:
        prompt = text.render(messages)
    except UserError:
        raise
    except Exception as error:  # templates refuse what they do not know with errors of their own
        what = " ".join(str(error).split())[:300]
        raise UserError(f"chat/completions: the chat template refuses these messages: {what}") from error
    return _ask(
        fields, [np.asarray(prompt, np.int64)], facts, chat=True, limit=limit or older, echo=False,
        top=(top or 0) if wanted else None,
    )  # fmt: skip


def _prompts(value: Any, text: TextTools) -> list[Ints]:
    if isinstance(value, str):
        return [_encoded(value, text)]
    if not isinstance(value, list) or not value or len(value) > MAX_PROMPTS:
        raise UserError(f"completions: prompt; allowed: text or token ids, or a list of 1 to {MAX_PROMPTS} of them")
    if all(type(one) is int for one in value):
        return [_ids(value)]
    return [_encoded(one, text) if isinstance(one, str) else _ids(one) for one in value]


def _encoded(value: str, text: TextTools) -> Ints:
    check_text(value, "completions: prompt", length=1 << 24, empty=True, controls=True)
    return np.asarray(text.encode(value), np.int64)


def _ids(value: Any) -> Ints:
    if not isinstance(value, list) or not all(type(one) is int and 0 <= one <= INT32_MAX for one in value):
        raise UserError("completions: prompt; allowed: text, or a list of token ids")
    return np.asarray(value, np.int64)


def _message(value: Any, number: int) -> Message:
    fields = Fields(value, "chat/completions", inside=f"messages[{number}]")
    role, content = fields.text("role", length=64), fields.take("content", "")
    for name in ("name", "tool_calls", "tool_call_id", "function_call", "refusal", "audio"):
        if name in fields and fields.take(name) not in ([], ""):
            raise UserError(f"{fields.place(name)} is refused: only role and content are used here")
    fields.end()
    if isinstance(content, list):
        parts = [Fields(part, "chat/completions", inside=f"messages[{number}].content") for part in content]
        for part in parts:
            if (kind := part.text("type")) != "text":
                raise UserError(f"{part.place('type')}={kind!r}; allowed: text, the models here read nothing else")
        content = "".join(part.text("text", empty=True, length=1 << 24) for part in parts)
    if not isinstance(content, str):
        raise UserError(f"{fields.place('content')}; allowed: text, or a list of text parts")
    return {"role": role, "content": content}


def _ask(
    fields: Fields, prompts: list[Ints], facts: ServerInfo, *, chat: bool, limit: int | None, echo: bool,
    top: int | None,
) -> Ask:  # fmt: skip
    model = fields.text("model")
    stops = _stops(fields)
    count = fields.integer("n", 1, 65536, 1)
    empty = limit == 0
    if empty and not echo:
        raise UserError(f"{fields.place('max_tokens')}=0: nothing would be answered; give 1 or more, or echo=true")
    best = fields.integer("best_of", 1, 65536, count)
    if best != count:
        raise UserError(f"{fields.place('best_of')}={best} is refused: nothing is ranked here; leave it out")
    stream, options = fields.flag("stream", False), fields.section("stream_options")
    usage = options is not None and options.flag("include_usage", False)
    common: dict[str, Any] = {
        "seq_id": -1,
        "stream": stream and not empty,
        "num_samples": count,
        "max_tokens": 1 if empty else limit,
        "temperature": fields.number("temperature", 1.0),
        "top_p": fields.number("top_p", 1.0),
        "top_k": fields.integer("top_k", -1, INT32_MAX, -1) or -1,
        "seed": fields.integer("seed", -INT64_MAX - 1, INT64_MAX, None),
        "stop": stops or None,
        "topk_sample_logprobs": 0 if empty else top or 0,
        "prompt_logprobs": echo and top is not None,
        "topk_prompt_logprobs": (top or 0) if echo else 0,
    }
    _rest(fields)
    for prompt in prompts:
        if not len(prompt):
            raise UserError(f"{fields.place('prompt')} is empty: give at least one token")
        if len(prompt) >= facts.max_context and not empty:
            raise UserError(
                f"{fields.place('prompt')}: {len(prompt)} tokens leave no room for an answer in the context of "
                f"{facts.max_context}; shorten it"
            )
    queries = [SamplingRequest(prompt=prompt, **common) for prompt in prompts]
    return Ask(model, chat, queries, stops, top, stream, usage, echo, empty)


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop", None)
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise UserError(f"{fields.place('stop')}; allowed: a text that is not empty, or a list of up to {MAX_STOPS}")
    return tuple(stops)


def _rest(fields: Fields) -> None:
    """Takes what changes nothing, and refuses by name what would."""
    for name in IGNORED:
        fields.take(name, None)
    for name, neutral in NEUTRAL.items():
        value = fields.take(name, None)
        if value is not None and value not in neutral:
            raise UserError(f"{fields.place(name)} is refused: this server does not do it; leave it out")
    fields.end()
