"""Conversations to ids: turns are closed once, rows end as the template ends a turn, rewards read what was drawn."""

import re
from functools import partial

import numpy as np
import pytest
from small_tokenizers import KINDS, SPECIALS, characters
from tokenizers import processors

from skyrl.text.chat import Chat
from skyrl.text.stream import GrowingText
from skyrl.text.tokenizer import encode, encode_after
from skyrl.types import UserError

USER = [{"role": "user", "content": "7+5="}]
LOW = [{"role": "user", "content": "too low"}]


def template(turn, opening):
    """One turn after the other, `turn` with role and content in it; `opening` before an answer."""
    turns = "{% for m in messages %}" + turn.replace("ROLE", "{{ m['role'] }}").replace("TEXT", "{{ m['content'] }}")
    return turns + "{% endfor %}{% if add_generation_prompt %}" + opening + "{% endif %}"


# template -> what closes a turn, up to and with its first end token
TEMPLATES = {
    "end token": (template("<|ROLE|>TEXT<|EOT|>", "<|assistant|>"), "<|EOT|>"),
    "a line break after it": (template("<|ROLE|>\nTEXT<|EOT|>\n", "<|assistant|>\n"), "<|EOT|>"),
    "a line break before it": (template("<|ROLE|> {{ m['content'] + '\n<|EOT|>\n' }}", "<|assistant|> "), "\n<|EOT|>"),
    "spaces around the text": (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}"
        "{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
        " </s>",
    ),
    "two end tokens": (template("ROLE:TEXT<|EOT|></s>\n", "assistant:"), "<|EOT|>"),
    "trimmed": (template("<|ROLE|>{{ m['content'] | trim }}<end_of_turn>\n", "<|assistant|>"), "<end_of_turn>"),
    "words only": (template("### ROLE:TEXT\n\n", "### assistant:"), None),
    "nothing after the last turn": (
        template("<|ROLE|>TEXT{% if not loop.last or m['role'] == 'user' %}</s>{% endif %}", "<|assistant|>"), None,
    ),
}  # fmt: skip
ENDS = ("</s>", "<|EOT|>", "<end_of_turn>")


def chat_of(name, make=characters, **more):
    tokenizer = make()
    tokenizer.chat_template = TEMPLATES[name][0]
    return Chat(tokenizer, {tokenizer.convert_tokens_to_ids(end): "tokenizer" for end in ENDS}, **more)


def ids_of(chat, text):
    return encode(chat.tokenizer, text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_and_games_are_the_ids_of_the_whole_text(name, kind):
    """Prompt, answer and continuation, end to end, are what the template writes, tokenised at once."""
    chat, closing = chat_of(name, KINDS[kind]), TEMPLATES[name][1]
    prompt, answer = chat.prompt(USER), chat.answer(USER, "12")
    more = chat.continuation(answer.tolist(), LOW)
    messages = [*USER, {"role": "assistant", "content": "12"}, *LOW]
    later = chat.answer(messages, "13")
    if closing is None:  # the template ends no turn: the first end token does
        assert answer[-1] == next(iter(chat.end_tokens)) and not set(answer[:-1].tolist()) & set(chat.end_tokens)
        assert chat.read(answer.tolist(), int(prompt[-1])) == "12"
        return
    whole = chat.render(messages)
    if ids_of(chat, whole)[: len(prompt)] != prompt.tolist():
        return  # a token of the whole text lies over the end of the prompt, which is read without an answer
    assert [*prompt, *answer, *more] == ids_of(chat, whole)
    assert [*prompt, *answer, *more, *later] == ids_of(
        chat,
        whole
        + chat.render([*messages, {"role": "assistant", "content": "13"}], answer_next=False)[len(whole) :].partition(
            closing
        )[0]
        + closing,
    )
    assert sum(int(token) in chat.end_tokens for token in answer) == 1 and answer[-1] in chat.end_tokens
    assert chat.read(answer.tolist(), int(prompt[-1])).strip() == "12"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_turn_is_closed_once_however_it_ended(name):
    """Cut before its end, within the white space before it, at it, or by another end token."""
    chat, closing = chat_of(name), TEMPLATES[name][1]
    ends = [chat.tokenizer.convert_tokens_to_ids(end) for end in ENDS]
    answer = chat.answer(USER, "12").tolist()
    after = chat.continuation(answer, LOW).tolist()
    for cut in range(1, len(answer)):
        if closing is not None and cut >= len(answer) - len(ids_of(chat, closing)):
            assert answer[:cut] + chat.continuation(answer[:cut], LOW).tolist() == answer + after, cut
    for end in ends:
        drawn = [*ids_of(chat, "12"), end]
        more = chat.continuation(drawn, LOW).tolist()
        if closing is not None:
            own = name == "two end tokens" and end == ends[0]  # the second of the template's own
            assert more == (after[1:] if own else after), chat.decode(more)


def test_what_a_stop_string_has_written_is_not_written_again():
    chat = chat_of("words only")
    for drawn, more in [
        ("12", "\n\n### user:too low\n\n### assistant:"), ("12\n", "\n### user:too low\n\n### assistant:"),
        ("12\n\n### ", "user:too low\n\n### assistant:"), ("12\n\n### user:", "too low\n\n### assistant:"),
    ]:  # fmt: skip
        assert chat.decode(chat.continuation(ids_of(chat, drawn), LOW)) == more


THINKS = "<|assistant|><think>\n"
SAYS = {
    "kept": template("<|ROLE|>TEXT<|EOT|>", THINKS),
    "dropped": template("<|ROLE|>{{ m['content'].split('</think>')[-1] }}<|EOT|>", THINKS),
}


@pytest.mark.parametrize("name", SAYS)
def test_what_the_opening_of_an_answer_says_is_not_said_twice(name):
    """A template that opens an answer with <think>, and a solution that begins with it; whatever it does to history."""
    tokenizer = characters((*SPECIALS, "<think>", "</think>"))
    tokenizer.chat_template = SAYS[name]
    chat = Chat(tokenizer, {tokenizer.convert_tokens_to_ids("<|EOT|>"): "tokenizer"})
    row = "<|user|>7+5=<|EOT|><|assistant|><think>\nhm\n</think>\n\n12<|EOT|>"
    for text in ("<think>\nhm\n</think>\n\n12", "hm\n</think>\n\n12"):
        assert chat.decode([*chat.prompt(USER), *chat.answer(USER, text)]) == row
    assert chat.decode(chat.answer(USER, "1 > 0")) == "1 > 0<|EOT|>"


def test_a_turn_may_end_with_what_opens_the_next():
    """As GLM-4's: nothing is written behind the last answer, and the next role's token is an end token."""
    tokenizer = characters()
    tokenizer.chat_template = template("<|ROLE|>TEXT", "<|assistant|>")
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    chat = Chat(tokenizer, {2: "tokenizer", user: "generation_config.json"})
    assert chat.answer(USER, "12").tolist() == ids_of(chat, "12<|user|>")
    assert chat.decode(chat.continuation(ids_of(chat, "12<|user|>"), LOW)) == "too low<|assistant|>"
    assert chat.decode(chat.continuation(ids_of(chat, "12"), LOW)) == "<|user|>too low<|assistant|>"


def test_plain_text_has_no_turns():
    chat = Chat(characters())
    end = chat.tokenizer.eos_token_id
    assert chat.decode(chat.prompt([{"role": "user", "content": "1+1="}])) == "1+1="
    assert chat.answer(USER, "2").tolist() == [*ids_of(chat, "2"), end]
    assert chat.decode(chat.continuation([*ids_of(chat, "2"), end], LOW)) == "too low"
    bos = Chat(KINDS["byte level, bos"]())
    assert bos.start("7+5=")[0] == bos.tokenizer.bos_token_id
    assert bos.start("<s>7+5=").tolist() == bos.start("7+5=").tolist()
    assert bos.start("7</s>").tolist() == [*bos.start("7"), bos.tokenizer.eos_token_id]  # written, and not added
    for behind in ("</s>", "<|EOT|>"):  # what a tokenizer adds behind a text, its end token or another
        closed = KINDS["byte level"]()
        token = closed.convert_tokens_to_ids(behind)
        closed.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"<s> $A {behind}", special_tokens=[("<s>", closed.bos_token_id), (behind, token)]
        )
        assert Chat(closed).start("7+5=").tolist() == bos.start("7+5=").tolist()
        assert Chat(closed).start(f"7{behind}").tolist() == [*bos.start("7"), token]


def test_the_reward_reads_what_was_drawn():
    specials = (*SPECIALS, "<think>", "</think>")
    tokenizer = characters(specials, clean_up_tokenization_spaces=True)
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials[4:])})
    chat = Chat(tokenizer)
    for text in ("<think>4</think>1<pad>5", "if x != y : f ( a , b ) .", " 4 ", "1<|EOT|>5"):
        assert chat.read([*ids_of(chat, text), tokenizer.eos_token_id]) == text == chat.read(ids_of(chat, text))
    assert chat.read([tokenizer.eos_token_id] * 2) == "</s>"


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_stay_without_a_space_that_nobody_wrote_or_are_left_out(kind):
    tokenizer = KINDS[kind]()
    last = tokenizer.convert_tokens_to_ids("<|assistant|>")
    for text in ("4<|EOT|>12", "<|user|>4<|user|>", "the <|EOT|>sum", "<pad><pad>5"):
        drawn = [*encode_after(tokenizer, "<|assistant|>", text), tokenizer.eos_token_id]
        read = Chat(tokenizer).read(drawn, last)
        bare = Chat(tokenizer, skip_special_tokens=True).read(drawn, last)
        if kind == "word pieces":  # its decoder writes a space between any two
            read, bare, text = read.replace(" ", ""), bare.replace(" ", ""), text.replace(" ", "")
        assert (read, bare) == (text, words(text))


def words(text):
    return re.sub("<[^>]+>", "", text)


def test_an_end_that_nothing_names_is_a_warning():
    tokenizer = characters()
    tokenizer.chat_template = TEMPLATES["a line break before it"][0]
    chat = Chat(tokenizer)
    eot = tokenizer.convert_tokens_to_ids("<|EOT|>")
    assert chat.describe_ends() == "</s> (2: tokenizer)"
    (line,) = chat.warnings()
    assert f"ends an assistant's turn with <|EOT|> ({eot})" in line and f"sampler.stop_token_ids=[{eot}]" in line
    assert chat.answer(USER, "12").tolist() == ids_of(chat, "12\n<|EOT|>")  # what the template ends with all the same
    assert Chat(tokenizer, {2: "tokenizer", eot: "generation_config.json"}).warnings() == []
    closed = template("<|ROLE|>TEXT<|EOT|>\n", "<|assistant|>") + "{% if not add_generation_prompt %}</s>{% endif %}"
    tokenizer.chat_template = closed  # </s> ends the conversation, and no turn: the Phi-3 family
    chat = Chat(tokenizer)
    assert f"ends an assistant's turn with <|EOT|> ({eot})" in chat.warnings()[0]
    assert chat.answer(USER, "12").tolist() == ids_of(chat, "12<|EOT|>\n</s>")
    after = ids_of(chat, "\n<|user|>too low<|EOT|>\n<|assistant|>")
    for end in (2, eot):
        assert chat.continuation([*ids_of(chat, "12"), end], LOW).tolist() == after
    for name in ("words only", "spaces around the text"):
        tokenizer.chat_template = TEMPLATES[name][0]
        assert Chat(tokenizer).warnings() == []


def test_a_template_that_writes_the_date_is_a_warning():
    """A run that goes on tomorrow would read other prompts than today, and a resumed one others than before."""
    tokenizer = characters()
    date = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    tokenizer.chat_template = date + TEMPLATES["spaces around the text"][0]
    (line,) = Chat(tokenizer).warnings()
    assert "writes today's date" in line and "chat.template_kwargs={date_string: '26 Jul 2024'} keeps one" in line
    assert Chat(tokenizer, template_kwargs={"date_string": "26 Jul 2024"}).warnings() == []


def test_a_history_without_thoughts_and_another_model_s_tokenizer_are_warnings():
    tokenizer = characters()
    tokenizer.chat_template = TEMPLATES["spaces around the text"][0]
    assert Chat(tokenizer, vocab_size=len(tokenizer) + 2).warnings() == []  # padded
    (line,) = Chat(tokenizer, vocab_size=2 * len(tokenizer)).warnings()
    assert "it seems to be another model's" in line and "give model.tokenizer" in line
    ends = {2: "tokenizer", tokenizer.convert_tokens_to_ids("<|EOT|>"): "config.json"}
    tokenizer.chat_template = template("<|ROLE|>{{ m['content'].split('</think>')[-1] }}<|EOT|>", "<|assistant|>")
    (line,) = Chat(tokenizer, ends).warnings()
    assert "drops what earlier answers thought" in line and "model.chat_template" in line


def test_a_system_message_without_a_template_is_refused():
    chat = Chat(characters())
    assert chat.render([{"role": "user", "content": "7+5="}]) == "7+5="
    with pytest.raises(UserError, match="no chat template that tells it .* give model.chat_template, or a chat model"):
        chat.render([{"role": "system", "content": "Add."}, {"role": "user", "content": "7+5="}])


def test_a_token_beyond_the_embedding_is_named_when_it_occurs():
    tokenizer = characters()
    size = len(tokenizer)
    tokenizer.add_tokens(["<image>", "<audio>"])
    chat = Chat(tokenizer, vocab_size=size)
    assert len(chat.prompt(USER)) == 4
    with pytest.raises(
        UserError, match=rf"token '<audio>' \({size + 1}\) is beyond the model's embedding of {size} rows"
    ):
        chat.prompt([{"role": "user", "content": "see <audio>"}])
    for made in (
        lambda: chat.answer(USER, "<image>"),
        lambda: chat.continuation([], [{"role": "user", "content": "<image>"}]),
    ):
        with pytest.raises(UserError, match="token '<image>'"):
            made()
    assert np.issubdtype(chat.prompt(USER).dtype, np.int64)


def test_templates_that_refuse_or_drop():
    tokenizer = characters()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(UserError, match="is not written by the chat template"):
        Chat(tokenizer).continuation([], LOW)
    tokenizer.chat_template = "{{ raise_exception('System role\nnot supported') }}"
    with pytest.raises(UserError, match="the chat template refuses these messages: System role not supported"):
        Chat(tokenizer).prompt(USER)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ ' think' if think else '' }}"
    assert Chat(tokenizer, template_kwargs={"think": True}).render(USER) == "7+5= think"
    assert Chat(tokenizer, template_kwargs={"think": True}).render(USER, think=False) == "7+5="


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_is_streamed_is_the_whole_one(kind):
    """Also behind a special token, after which some tokenizers write a space that nobody wrote."""
    chat = chat_of("end token", KINDS[kind])
    last, drawn = int(chat.prompt(USER)[-1]), chat.answer(USER, "the sum is 42").tolist()
    whole = chat.read(drawn, last)
    growing = GrowingText(partial(chat.decode, after=last), ())
    given = [growing.more([token]) for token in drawn[:-1]]
    assert whole == "the sum is 42" and "".join(given) + growing.rest(whole) == whole
