"""No message vanishes between what was given and what a model reads; what is no text does not reach a tokenizer."""

import pytest

from skyrl.config.schema import ChatConfig, ModelConfig
from skyrl.text.chat import KINDS, Chat, load_chat
from skyrl.text.check import lost_message
from skyrl.text.tokenizer import tiny_tokenizer
from skyrl.types import UserError

OPENING = "{% if add_generation_prompt %}[a]{% endif %}"
GENERIC = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}" + OPENING
KNOWN = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}[{{ m.role[0] }}]{{ m.content }}<eos>"
    "{% endif %}{% endfor %}" + OPENING
)
FIRST_SYSTEM = (
    "{% if messages[0].role == 'system' and messages[0].content %}[s]{{ messages[0].content | trim }}{% endif %}"
    "{% for m in messages if m.role != 'system' %}[{{ m.role[0] }}]{{ m.content | trim }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<eos>{% endfor %}" + OPENING
)
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}"
)
THINKING = (  # drops what an earlier turn thought, as Qwen3 does: on purpose, and not a message
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content.split('</think>')[-1] if not loop.last else m.content }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}[a]{% if enable_thinking is false %}<t></t>{% endif %}{% endif %}"
)


def chat_of(template, **kwargs):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Chat(tokenizer, template_kwargs=kwargs)


def say(*turns):
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool", "d": "developer"}
    return [{"role": names.get(role, role), "content": content} for role, content in turns]


HI = ("u", "hi")


@pytest.mark.parametrize(
    ("template", "messages", "lost"),
    [
        (KNOWN, say(("d", "be kind"), HI), "message 1 of 2 (role 'developer') is not written by the chat template, so"),
        (KNOWN, say(HI, ("a", "x"), ("t", "42")), "message 3 of 3 (role 'tool') is not written"),
        (KNOWN, say(HI, ("narrator", "it rains")), "message 2 of 2 (role 'narrator') is not written"),
        (KNOWN, say(("t", ""), HI), "message 1 of 2 (role 'tool') is empty, and the chat template writes nothing"),
        (KNOWN, say(("d", "hi"), HI), "message 1 of 2 (role 'developer')"),  # its text stands there, but as another's
        (
            FIRST_SYSTEM,
            say(("s", ""), HI),
            "message 1 of 2 (role 'system') is empty, and the chat template writes nothing",
        ),
        (FIRST_SYSTEM, say(HI, ("s", "later")), "message 2 of 2 (role 'system') is not written"),
        (
            KNOWN,
            [{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}, *say(HI)],
            "the tool_calls of message 1",
        ),
        (STRICT, say(("s", "x"), HI), "the chat template refuses these messages: System role not supported"),
        (STRICT, say(HI, HI), "the chat template refuses these messages: Conversation roles must alternate"),
        (GENERIC, say(("u", "a\ud83d")), r"character 2 of the text is \ud83d, half of a surrogate pair and no text"),
        (None, say(("u", "a\ud83d")), r"character 2 of the text is \ud83d"),
        (GENERIC, say(HI, ("a", " ")), "the last message is an assistant's and empty, so there is nothing to continue"),
    ],
)
def test_what_a_template_leaves_out_is_refused(template, messages, lost):
    chat = chat_of(template)
    for _ in range(2):  # the second time from memory
        with pytest.raises(UserError) as error:
            chat.prompt(messages)
        assert str(error.value).startswith(lost) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (GENERIC, say(("d", "be kind"), ("narrator", "x"), ("t", "{}"), HI)),
        (GENERIC, say(("s", ""), HI)),
        (KNOWN, say(("s", " x "), HI, ("a", ""), HI)),
        (FIRST_SYSTEM, say(("s", "  trimmed\n"), HI)),
        (FIRST_SYSTEM, [*say(HI), {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}, *say(("t", "42"))]),
        (STRICT, say(HI, ("a", ""), HI)),
        (THINKING, say(HI, ("a", "<think>4</think>5"), HI)),
        (None, say(("s", ""), ("t", "x"))),
    ],
)
def test_what_a_template_writes_is_read(template, messages):
    chat_of(template).prompt(messages)


def test_an_observation_and_a_solution_are_checked_too():
    chat = chat_of(KNOWN)
    with pytest.raises(UserError, match=r"message 3 of 3 \(role 'tool'\) is not written"):
        chat.continuation([5], say(("t", "42")))
    with pytest.raises(UserError, match="surrogate"):
        chat.answer(say(HI), "4\udc00")
    with pytest.raises(UserError, match="surrogate"):
        chat.start("4\udc00")
    chat.continuation([5], say(HI))


def test_a_last_message_of_an_assistant_is_continued():
    chat = chat_of(GENERIC)
    assert chat.render(say(HI, ("a", "It is "))) == "[user]hi<eos>[assistant]It is "
    assert chat.render(say(HI, ("a", "x")), continue_final=False) == "[user]hi<eos>[assistant]x<eos>[a]"
    assert chat_of(None).render(say(HI, ("a", "It is "))) == "hiIt is "
    with pytest.raises(UserError, match="the chat template refuses these messages: "):
        chat_of(KNOWN.replace("{{ m.content }}", "{{ m.content | upper }}")).prompt(say(HI, ("a", "it is")))


def test_variables_reach_the_template_and_one_it_does_not_read_is_refused(tmp_path):
    assert chat_of(THINKING, enable_thinking=False).render(say(HI)).endswith("[a]<t></t>")
    assert chat_of(THINKING).render(say(HI), enable_thinking=False).endswith("[a]<t></t>")
    assert chat_of(THINKING).render(say(HI)).endswith("[a]")
    (tmp_path / "t.jinja").write_text(THINKING)
    model = ModelConfig(chat_template=str(tmp_path / "t.jinja"))
    assert load_chat(model, ChatConfig({"enable_thinking": False})).template_kwargs == {"enable_thinking": False}
    with pytest.raises(UserError, match="template_kwargs.thinking: the chat template does not read it; it reads: ena"):
        load_chat(model, ChatConfig({"thinking": False}))
    with pytest.raises(UserError, match="chat.template_kwargs.x: the chat template does not read it; there is none"):
        load_chat(ModelConfig(), ChatConfig({"x": 1}))
    for taken in ("messages", "add_generation_prompt", "range", "raise_exception"):
        with pytest.raises(UserError, match=f"kwargs.{taken}: the chat template does not read it; it reads: enable_t"):
            chat_of(THINKING).check_variables([taken], "kwargs")


def test_what_one_request_leaves_out_on_purpose_is_not_refused_to_others():
    """The verdict is kept for a structure and the template's variables together, and not for ever more of them."""
    chat = chat_of(
        "{% for m in messages if not (hide and m.role == 'system') %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    messages = say(("s", "be kind"), HI)
    with pytest.raises(UserError, match="role 'system'. is not written"):
        chat.render(messages, hide=True)
    assert chat.render(messages) == "[system]be kind[user]hi"
    for number in range(KINDS + 10):
        chat._lost_of(messages, {"hide": number})
    assert len(chat._lost) <= KINDS


def test_what_an_answer_thought_is_known_to_the_template_or_refused():
    thought = [{"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}, *say(HI)]
    with pytest.raises(UserError, match=r"the reasoning_content of message 1 of 2 \(role 'assistant'\) is not read by"):
        chat_of(GENERIC).render(thought)
    drops = GENERIC + "{# of the last answer alone: reasoning_content #}"  # on purpose, as Qwen3 does
    assert chat_of(drops).render(thought).startswith("[assistant]4<eos>[user]hi")
    assert chat_of(GENERIC).render([{**thought[0], "reasoning_content": None}, *say(HI)])


def test_many_blank_messages_cost_few_texts():
    texts = []

    def write(messages):
        texts.append(messages)
        return " ".join(f"[{m['role']}]{m['content']}" for m in messages)

    assert lost_message(say(*[("u", "")] * 2000), write) == "" and len(texts) <= 3
    roles = say(*[(f"role {i}", "") for i in range(2000)])
    assert lost_message(roles, write) == "2000 roles have messages without a text; remove these messages"
    assert len(texts) <= 4
