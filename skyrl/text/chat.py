"""Conversations to token ids and drawn tokens to text: one implementation for training, evaluation, supervised rows and
both doors of the server.

    prompt(messages)                  ids that a model reads before it answers
    answer(messages, text)            ids of an answer to learn, closed as the template closes a turn
    continuation(drawn, messages)     ids between what was drawn and the next answer
    read(drawn)                       text of what was drawn, as rewards read it; stop strings are searched in the same

Tokens are never made twice: the ids of prompt, drawn answer and continuation, end to end, are the row that is trained.
Nothing here knows a row of a file: who calls puts file:line before the text of a UserError. Imports without torch.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from skyrl.config.schema import ChatConfig, ModelConfig, RunConfig
from skyrl.text.check import check_text, lost_message, structure, template_variables
from skyrl.text.tokenizer import Decode, encode, encode_after, end_tokens, load_tokenizer, make_decode
from skyrl.types import Ints, Message, UserError

_MARK = "<<<answer goes here>>>"
_NEXT = "<<<the next message goes here>>>"
KINDS = 4096  # structures of conversations of which is kept what the template leaves out
TAIL = 32  # drawn tokens that are looked at for how what follows them is tokenised


def chat_of(cfg: RunConfig) -> Chat:
    """The Chat of a run or a server: `load_chat` with all options that it has."""
    return load_chat(cfg.model, cfg.chat, stop_token_ids=cfg.sampler.stop_token_ids)


def load_chat(model: ModelConfig, options: ChatConfig = ChatConfig(), *, stop_token_ids: Sequence[int] = ()) -> Chat:
    """The Chat of a model: its tokenizer, its end tokens and `stop_token_ids` (sampler.stop_token_ids) beside them.

    Reads no weights. Raises UserError for a tokenizer or template that cannot be had."""
    tokenizer = load_tokenizer(model)
    ends = end_tokens(model, tokenizer)
    ends |= {token: "sampler.stop_token_ids" for token in stop_token_ids if token not in ends}
    chat = Chat(
        tokenizer, ends, template_kwargs=options.template_kwargs, skip_special_tokens=options.skip_special_tokens
    )
    chat.check_variables(options.template_kwargs, "chat.template_kwargs")
    return chat


class Chat:
    """A tokenizer with its chat template, or plain text without one: the contents of the messages end to end.

    `end_tokens`: ids of the tokens that end a turn -> who names them; None = the tokenizer's alone. `template_kwargs`:
    variables for the template, such as enable_thinking. `skip_special_tokens`: rewards read a text without them.
    `vocab_size`: rows of the model's embedding, 0 = not known yet; a tokenizer may have more entries, which must not
    occur.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_tokens: Mapping[int, str] | None = None,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        skip_special_tokens: bool = False,
        vocab_size: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.end_tokens = dict(end_tokens or {tokenizer.eos_token_id: "tokenizer"})
        self.template_kwargs = dict(template_kwargs or {})
        self.vocab_size = vocab_size
        self.decode: Decode = make_decode(tokenizer)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}
        self._skipped = special if skip_special_tokens else set()
        self._between: dict[str, str] = {}
        self._lost: dict[bytes, str] = {}  # digest of a structure and variables -> what the template leaves out

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a turn, for SamplingParams; the tokenizer's own first."""
        return tuple(self.end_tokens)

    def check_variables(self, given: Iterable[str], where: str) -> None:
        """Raises UserError, naming `where`, for a variable that the template does not read and that would so have no
        effect."""
        known = self._variables
        if known is not None and (unknown := [name for name in given if name not in known]):
            reads = f"it reads: {', '.join(sorted(known)) or 'none'}" if self.has_template else "there is none"
            raise UserError(f"{where}.{unknown[0]}: the chat template does not read it; {reads}")

    def unread_field(self, fields: Mapping[str, Any]) -> str:
        """Of a row: a field that other trainers give to the template and this one does not, in words; "" for none."""
        if fields.get("tools") and "tools" in (self._variables or ()):
            return "field 'tools' is not given to the chat template; write them into a message, or rename the field"
        if fields.get("chat_template_kwargs") and self.has_template:
            return "field 'chat_template_kwargs' is not read; chat.template_kwargs holds for all rows, remove the field"
        return ""

    @functools.cached_property
    def _variables(self) -> set[str] | None:
        return template_variables(getattr(self.tokenizer, "chat_template", None))

    # ---- text ------------------------------------------------------------------------------------------------------

    def render(
        self,
        messages: Sequence[Message],
        *,
        answer_next: bool = True,
        continue_final: bool | None = None,
        **kwargs: Any,
    ) -> str:
        """The conversation as the text a model reads: with the opening of an answer (`answer_next`), or open at the end
        of the last message, an assistant's, which the model then continues (`continue_final`; no opening then. None =
        where an answer comes next and the last message is an assistant's).

        kwargs: variables for the template, over `template_kwargs`. Raises UserError in one line for a message that the
        template would leave out, with the template's own words when it refuses these messages, and for half of a
        surrogate pair.
        """
        for message in messages:
            check_text(message["content"])
        if not self.has_template:
            if any(message["role"] == "system" and message["content"].strip() for message in messages):
                raise UserError(
                    "there is a system message, and the tokenizer has no chat template that tells it from the rest; "
                    "give model.chat_template, or a chat model"
                )
            return "".join(message["content"] for message in messages)
        variables = {**self.template_kwargs, **kwargs}
        if continue_final is None:
            continue_final = answer_next and bool(messages) and messages[-1]["role"] == "assistant"
        if continue_final and not messages[-1]["content"].strip():
            raise UserError("the last message is an assistant's and empty, so there is nothing to continue; remove it")
        if lost := self._lost_of(messages, variables):
            raise UserError(lost)
        try:
            return self._apply(answer_next and not continue_final, continue_final, variables, messages)
        except Exception as error:  # templates refuse what they do not know with errors of their own
            words = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"the chat template refuses these messages: {words}") from error

    def _lost_of(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """What the template leaves out of these messages (check.py), known for each structure and set of variables."""
        kind = hashlib.sha256(repr((list(map(structure, messages)), sorted(variables.items()))).encode()).digest()
        if kind not in self._lost:
            if len(self._lost) >= KINDS:
                self._lost.clear()
            write = functools.partial(self._apply, False, False, variables)
            self._lost[kind] = lost_message(messages, write, getattr(self.tokenizer, "chat_template", None))
        return self._lost[kind]

    def _apply(self, opening: bool, continued: bool, variables: Mapping[str, Any], messages: Sequence[Message]) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=opening, continue_final_message=continued, **variables
        )

    def after_answer(self, messages: Sequence[Message] = ()) -> str:
        """What the template writes after the text of an assistant's turn: the end of the turn and, where `messages`
        follow, these and the opening of the next answer.

        Raises UserError when the template does not write an assistant's text where it stands."""
        turn = [{"role": "user", "content": "."}, {"role": "assistant", "content": _MARK}]
        _, mark, text = self.render([*turn, *messages], answer_next=bool(messages)).partition(_MARK)
        if not mark:
            raise UserError("model.chat_template: the template does not contain the assistant's own text")
        return text

    def read(self, drawn: Sequence[int], after: int | None = None) -> str:
        """The text of drawn tokens as rewards read it: the end token at their end is taken off, other special tokens
        stay (without `skip_special_tokens`), and so does every space. `after`: the last token of their context."""
        tokens = list(drawn)
        if tokens and tokens[-1] in self.end_tokens:
            tokens.pop()
        return self.decode(tokens, after, self._skipped)

    # ---- ids -------------------------------------------------------------------------------------------------------

    def prompt(self, messages: Sequence[Message], *, continue_final: bool | None = None, **kwargs: Any) -> Ints:
        """Ids [L] that a model reads before it answers `messages`; arguments as for `render`.

        Without a template a beginning-of-sequence token is added where the tokenizer has one; templates write theirs.
        Raises UserError as `render`, and for a token that the model does not have."""
        text = self.render(messages, continue_final=continue_final, **kwargs)
        return self._ids(encode(self.tokenizer, text)) if self.has_template else self.start(text)

    def start(self, text: str) -> Ints:
        """Ids of a plain text that a model shall go on with: a beginning-of-sequence token is added where the tokenizer
        has one and the text does not begin with it; what the tokenizer adds behind a text is taken off."""
        ids = encode(self.tokenizer, text)
        if self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token):
            return self._ids(ids)
        whole = list(self.tokenizer(text, verbose=False)["input_ids"])
        places = range(len(whole) - len(ids), -1, -1) if ids else ()
        return self._ids(next((whole[: at + len(ids)] for at in places if whole[at : at + len(ids)] == ids), ids))

    def answer(self, messages: Sequence[Message], text: str, **kwargs: Any) -> Ints:
        """Ids of the answer `text` to `messages` as supervised training wants it. They go on from `prompt(messages)`
        and end as the template ends an assistant's turn: with what it writes up to its first end token, at the end of
        a conversation or before the next message; without a template, or where it writes none, with the text and the
        first of `end_tokens`. What the opening of an answer says already (`<think>`) is not said again.

        Raises UserError as `render` and `after_answer`."""
        prompt = self.render(messages, **kwargs)
        check_text(text)
        if not self.has_template:
            return self._ids([*encode_after(self.tokenizer, prompt, text), next(iter(self.end_tokens))])
        closing, ended = self._closing
        said = [*messages, {"role": "assistant", "content": text}]
        if messages and messages[-1]["role"] == "assistant":  # the answer goes on with it
            said[-2:] = [{**messages[-1], "content": messages[-1]["content"] + text}]
        whole = self.render(said, answer_next=False, **kwargs).removesuffix(closing)
        written = whole[len(prompt) :] if whole.startswith(prompt) and whole.rstrip().endswith(text.strip()) else None
        if written is None:  # the opening of an answer is not what stands before one that is given
            opening = prompt.removeprefix(self.render(messages, answer_next=False, **kwargs))
            written = _beyond(opening, text)
        ids = encode_after(self.tokenizer, prompt, written + ended)
        return self._ids(ids if ended else [*ids, next(iter(self.end_tokens))])

    def conversation(self, messages: Sequence[Message]) -> tuple[Ints, np.ndarray]:
        """Ids [L] of a whole conversation, which ends with an assistant's message, and a mask [L] of those that the
        assistant says, each turn with its end token. Made as a rollout makes them, turn by turn, so that what is
        learned stands where the sampler would draw it. Raises UserError as `prompt`, `answer` and `continuation`."""
        parts: list[Ints] = []
        said = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        for last, number in zip([-1, *said], said, strict=False):
            before = messages[:number]
            parts.append(
                self.continuation(parts[-1].tolist(), messages[last + 1 : number]) if parts else self.prompt(before)
            )
            parts.append(self.answer(before, messages[number]["content"]))
        learned = [np.full(len(part), number % 2 == 1) for number, part in enumerate(parts)]
        return np.concatenate(parts), np.concatenate(learned)

    def continuation(self, drawn: Sequence[int], messages: Sequence[Message]) -> Ints:
        """Ids between the drawn tokens of an answer and the next one: the rest of the end of its turn, the new
        messages, and the opening of the next answer.

        The turn is closed once: after an end token that was drawn, nothing of the template's own end is repeated, nor
        of what it writes before it (white space, a stop string) when that was drawn. Raises UserError as `render` and
        `after_answer`."""
        tokens = list(drawn[-TAIL:])
        before = self.decode(tokens)
        if not self.has_template:
            return self._ids(encode_after(self.tokenizer, before, self.render(messages)))
        text = self.after_answer(messages)
        between = self._between_messages(messages)
        if not text.startswith(between):
            between = text
        end = self._first_end(between)
        if end and tokens and tokens[-1] in self.end_tokens:
            name = self._name(tokens[-1])
            at = between.find(name) if name else -1
            text = text[end[1] if at < 0 else at + len(name) :]
        else:
            limit = end[0] if end else len(between) if len(between) < len(text) else 0
            sizes = [*([end[1]] if end else []), *range(limit, -1, -1)]
            text = text[next(size for size in sizes if before.endswith(text[:size])) :]
        return self._ids(encode_after(self.tokenizer, before, text))

    def _between_messages(self, messages: Sequence[Message]) -> str:
        """What the template writes between an answer's text and that of the first of `messages`, whatever its text."""
        role = str(messages[0]["role"])
        if role not in self._between:
            marked = [{**message, "content": _NEXT} for message in messages]
            self._between[role] = self.after_answer(marked).partition(_NEXT)[0]
        return self._between[role]

    @functools.cached_property
    def _closing(self) -> tuple[str, str]:
        """What the template writes behind the last answer of a conversation, and what of it, or of what stands before
        the next message, ends the turn: up to its first end token; "" where there is none."""
        closing = self.after_answer()
        for text in (closing, self._before_user):
            if end := self._first_end(text):
                return closing, text[: end[1]]
        return closing, ""

    @functools.cached_property
    def _before_user(self) -> str:
        """What stands between an answer and a user's next message; "" for a template that refuses it."""
        try:
            return self._between_messages([{"role": "user", "content": "."}])
        except UserError:
            return ""

    def _first_end(self, text: str) -> tuple[int, int] | None:
        """Where the first end token in what the template writes after an answer begins and ends; without one, where the
        first special token of the end of a turn does, which nothing names (`warnings`)."""
        for tokens in (self._end_texts, self._unnamed):
            places = [(at, at + len(token)) for token in tokens if (at := text.find(token)) >= 0]
            if places:
                return min(places)
        return None

    @functools.cached_property
    def _end_texts(self) -> list[str]:
        return [name for name in map(self._name, self.end_tokens) if name]

    @functools.cached_property
    def _unnamed(self) -> list[str]:
        """The special token that the template ends a turn with, if no end token names it. What it writes behind the
        last turn alone, as the end of a conversation, ends no turn before another message."""
        if not self.has_template:
            return []
        try:
            closing = self.after_answer()
        except UserError:
            return []
        between = self._before_user or closing
        if any(name in between for name in self._end_texts):
            return []
        special = {str(entry) for entry in getattr(self.tokenizer, "added_tokens_decoder", {}).values()}
        found = sorted((closing.find(token), token) for token in special if token and token in closing)
        both = [token for _, token in found if token in between]
        named = any(name in closing for name in self._end_texts)
        return (both or [token for _, token in found if not named])[:1]

    def _name(self, token: int) -> str:
        """A token as it stands in text; "" for an id that the tokenizer does not have."""
        if token >= len(self.tokenizer):
            return ""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return str(added[token]) if token in added else self.decode([token])

    # ---- for the plan and the log ----------------------------------------------------------------------------------

    def describe_ends(self) -> str:
        """The tokens that end a turn and who names them: "<eos> (1: tokenizer), <end> (5: generation_config.json)"."""
        names = {token: repr(self._name(token))[1:-1] or "?" for token in self.end_tokens}
        return ", ".join(f"{names[token]} ({token}: {source})" for token, source in self.end_tokens.items())

    def warnings(self) -> list[str]:
        """What is doubtful about the tokenizer and its template, one line each: another model's tokenizer, an end of
        turn that nothing names, a history without thoughts, prompts that depend on the day."""
        lines = []
        if self.vocab_size > 1.1 * len(self.tokenizer):  # padding of an embedding is a few per cent
            lines.append(
                f"the model has {self.vocab_size} tokens and the tokenizer {len(self.tokenizer)}: it seems to be "
                "another model's, and what it does not have would be drawn and read as nothing; give model.tokenizer"
            )
        if not self.has_template and getattr(self.tokenizer, "name_or_path", None):  # a tiny model's has no name
            lines.append(
                "the tokenizer has no chat template: messages stand end to end, without roles, as suits a base model "
                "that goes on with a text; for a chat give model.chat_template=FILE, or the chat model of the family"
            )
        if self._drops_thoughts():
            lines.append(
                "the chat template drops what earlier answers thought (<think>); later turns of a game keep it, as "
                "it was drawn, and prompts with earlier answers lose it; model.chat_template gives another template"
            )
        for name in self._unnamed:
            token = self.tokenizer.convert_tokens_to_ids(name)
            lines.append(
                f"the chat template ends an assistant's turn with {name} ({token}), which tokenizer, config.json and "
                f"generation_config.json do not name: answers go on after it; give sampler.stop_token_ids=[{token}]"
            )
        template = str(getattr(self.tokenizer, "chat_template", None))
        if "strftime_now" in template and "date_string" not in self.template_kwargs:
            fixed = (
                "chat.template_kwargs={date_string: '26 Jul 2024'}" if "date_string" in template else "another template"
            )
            lines.append(f"the chat template writes today's date, so tomorrow's prompts are others; {fixed} keeps one")
        return lines

    def _drops_thoughts(self) -> bool:
        """Whether the template leaves thoughts out of an answer that another message follows, and has the answer."""
        user = {"role": "user", "content": "."}
        said = [user, {"role": "assistant", "content": f"<think>\n{_NEXT}\n</think>\n\n{_MARK}"}, user]
        try:
            text = self.render(said)
        except UserError:
            return False
        return _MARK in text and _NEXT not in text

    def _ids(self, ids: Sequence[int]) -> Ints:
        """Checked against the embedding."""
        found = np.asarray(ids, np.int64)
        if self.vocab_size and len(found) and found.max() >= self.vocab_size:
            token = int(found[found >= self.vocab_size][0])
            name = self.tokenizer.convert_ids_to_tokens(token)
            raise UserError(
                f"token {name!r} ({token}) is beyond the model's embedding of {self.vocab_size} rows; leave it out, or "
                "give the model's own tokenizer"
            )
        return found


def _beyond(opening: str, text: str) -> str:
    """What of an answer's `text` its `opening` has not said: a template that thinks may open one with `<think>`."""
    said = opening.rstrip()
    sizes = (size for size in range(min(len(said), len(text)), 0, -1) if text[size - 1] == ">")
    size = next((size for size in sizes if said.endswith(text[:size])), 0)
    return text[size:].lstrip() if size and said != opening else text[size:]
