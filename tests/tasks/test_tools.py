"""The agent with tools: calls of both forms, what they return, and calls that are none."""

import pytest

from skyrl.sandbox import Sandbox, SandboxError
from skyrl.tasks import tools
from skyrl.tasks.tools import calculate, read_calls, tool_schema
from skyrl.types import UserError

ROW = {"prompt": "What is 12*12?", "answer": "144"}
TAG = "<tool_call>\n%s\n</tool_call>"
CALL = '{"name": "calculator", "arguments": {"expression": "12*12"}}'
ONLY = {"tools": ["calculator"]}


@pytest.fixture(scope="module")
def sandbox():
    try:
        Sandbox().level  # noqa: B018  # tries it
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("answers", "options", "reward", "calls", "malformed"),
    [
        (["calculator: 12*12", "It is 144."], {}, 1.0, 1, 0),
        (["I think.\ncalculator: 6*6\ncalculator: 6*24", "144"], {}, 1.0, 2, 0),
        (["It is \\boxed{144}"], {}, 1.0, 0, 0),
        (["calculator: 12*12", "143"], {}, 0.0, 1, 0),
        (["calculator: 12*12", "calculator: 144"], {}, 0.0, 2, 0),  # no answer before the turns are used up
        (["calculator:", "144"], {}, 0.5, 0, 1),
        (["python: print(144)", "144"], {}, 0.5, 0, 1),  # a tool that is not there
        ([TAG % CALL, "144"], {"format": "tags"}, 1.0, 1, 0),
        ([CALL.replace("arguments", "parameters"), "144"], {"format": "tags"}, 1.0, 1, 0),
        ([TAG % CALL + TAG % CALL, "144"], {"format": "tags"}, 1.0, 2, 0),
        ([f"<tool_call>{CALL}", "144"], {"format": "tags"}, 1.0, 1, 0),  # cut where the end tag is the end token
        ([TAG % "calculator(12*12)", "144"], {"format": "tags"}, 0.5, 0, 1),
        ([TAG % '{"name": "calculator"}', "144"], {"format": "tags"}, 0.5, 0, 1),
        ([TAG % '{"name": "calculator", "arguments": {"expression": 5}}', "144"], {"format": "tags"}, 0.5, 0, 1),
        ([TAG % '{"name": "rm", "arguments": {"a": "b"}}', "144"], {"format": "tags"}, 0.5, 0, 1),
        ([TAG % "[]" + TAG % "5" + TAG % ("[" * 9999), "144"], {"format": "tags"}, -0.5, 0, 3),
        (["<tool_response>144</tool_response> so 143"], {"format": "tags"}, 0.0, 0, 0),
    ],
)
def test_the_reward_does_what_it_says(rows, play, answers, options, reward, calls, malformed):
    result, _ = play(rows("tools", ROW, options=ONLY)[0], *answers, malformed=0.5, **options, **ONLY)
    counted = [result.metrics[f"{name}:mean"] for name in ("tool_calls", "malformed_calls")]
    assert (result.reward, counted) == (reward, [calls, malformed])


def test_calls_that_cannot_be_read_are_counted_and_not_all_told(rows, play):
    prompt, bad = (
        rows("tools", ROW, options=ONLY)[0],
        "".join(f'<tool_call>{{"name": "{n}", "arguments": {{"a": "b"}}}}' for n in range(999)),
    )
    for text, told in (("<tool_call></tool_call>" * 999, 1), (bad.replace("}}<", "}}</tool_call><"), 8)):
        result, heard = play(prompt, text, "144", format="tags", malformed=1.0, **ONLY)
        assert heard[1].count("no call: ") == told and result.metrics["malformed_calls:mean"] == 999


def test_rewards_are_those_of_single_turn(rows, play):
    options = {**ONLY, "reward": ["math_last_number", {"name": "length", "target": 3}], "malformed": 0.5}
    prompt = rows("tools", ROW, options=options)[0]
    result, _ = play(prompt, "calculator:", "144", **options)
    assert result.reward["math_last_number"] == 1.0 and result.reward["malformed_calls"] == -0.5
    assert [*result.reward] == [*tools.ToolAgent.objective_names(options)]
    assert result.metrics["correct:mean"] == 1.0


def test_what_the_model_reads(rows, play):
    prompt = rows("tools", ROW, options=ONLY)[0]
    _, heard = play(prompt, "calculator: 12*12\ncalculator: 1/0", "144", **ONLY)
    assert "To call a tool write a line calculator: <expression>; else answer." in heard[0] and "python" not in heard[0]
    assert heard[1] == "144\nerror: division by zero\n"
    _, heard = play(prompt, TAG % CALL, "144", format="tags", **ONLY)
    assert '"name": "calculator"' in heard[0] and heard[1] == "<tool_response>\n144\n</tool_response>\n"
    _, heard = play(prompt, TAG % CALL, "144", format="tags", role="tool", instruct=False, **ONLY)
    assert heard == ["What is 12*12?", "144\n"]  # the template writes the rest


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2+3*4=", "14"), ("1/8", "0.125"), ("-1/8", "-0.125"), ("1/3", "0.333333333333333"), ("2^10", "1024"),
        ("0.1+0.2", "0.3"), ("9^9^9", "error: power too large"), ("x+1", "error: no rational number: x"),
        ("1/0", "error: division by zero"), ("__import__('os')", "error"), ("(" * 300, "error"), ("((((", "error"),
        ("*".join(["200!"] * 40), "error: too large"), ("1/1009*" + "*".join(["200!"] * 9), "error: too large"),
    ],
)  # fmt: skip
def test_the_calculator(expression, value):
    assert calculate(expression) == value if value != "error" else calculate(expression).startswith("error: ")


def test_python_runs_in_the_sandbox(sandbox, rows, play, monkeypatch):
    prompt = rows("tools", ROW)[0]
    program = "python:\n```python\nprint(12 * 12)\n```"
    cases = {
        program: "144\n",
        "python: print(1); 1/0": "1\nZeroDivisionError: division by zero\n",
        "python:\n```\nx = 1\n```": "nothing was printed\n",
        "python: open('/etc/passwd', 'w')": "Error",
        "python: print('a' * 10**4)": "a" * 50 + "\n",
        "python: while True: pass": "timeout\n",
    }
    for text, said in cases.items():
        result, heard = play(prompt, text, "144", max_output=50, cpu_seconds=0.3)
        assert result.reward == 1.0 and (heard[1] == said or said in heard[1]), text
    broken = type("Broken", (), {"run": lambda *args, **kwargs: (_ for _ in ()).throw(SandboxError("no memory"))})()
    monkeypatch.setattr(tools, "default_sandbox", lambda level: broken)
    with pytest.raises(tools.RetryableError, match="no memory"):
        play(prompt, program, "144")


def test_calls_of_several_tools_in_one_turn():
    text = "python:\n```py\na = 1\nprint(a)\n```\nthen\nCalculator : 1+1\n"
    assert read_calls(text, "lines", ["python", "calculator"]) == (
        [("python", "a = 1\nprint(a)\n"), ("calculator", "1+1")],
        [],
    )
    assert len(read_calls("calculator: 1\n" * 20, "lines", ["calculator"])[0]) == tools.MAX_CALLS
    assert tool_schema("python")["function"]["parameters"]["required"] == ["code"]


def test_a_template_is_given_the_tools(chat_with_tools):
    ids = chat_with_tools.prompt([{"role": "user", "content": "What is 2+2?"}])
    assert '"name": "calculator"' in chat_with_tools.decode(ids.tolist())


@pytest.fixture
def chat_with_tools():
    from skyrl.text.chat import Chat
    from skyrl.text.tokenizer import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return Chat(tokenizer, template_kwargs={"tools": [tool_schema("calculator")]})


def test_made_questions_are_answered_by_their_call(rows, play):
    train, test = (rows("tools", split=split, options=ONLY) for split in ("train", "test"))
    assert not {p.messages[0]["content"] for p in train} & {p.messages[0]["content"] for p in test}
    for prompt in test[:30]:
        result = play(
            prompt, lambda said, call=prompt.extra["solution"]: call if "?" in said else said, max_turns=2, **ONLY
        )
        assert result[0].reward == 1.0


@pytest.mark.parametrize(
    ("row", "options", "told"),
    [
        ({"prompt": "?"}, {}, r"train\.jsonl:1: field 'answer' is missing"),
        (ROW, {"tools": ["search"]}, r"env\.options\.tools=\['search'\]: wanted some of: calculator, python"),
        (ROW, {"tools": []}, r"env\.options\.tools"),
        (ROW, {"reward": "none"}, "no reward called 'none'"),
        (ROW, {"format": "xml"}, "wants one of: lines, tags"),
        (ROW, {"malformed": -1.0}, r"env\.options\.malformed=-1\.0"),
    ],
)
def test_what_cannot_be_played_is_refused(rows, row, options, told):
    with pytest.raises(UserError, match=told):
        rows("tools", row, options={**ONLY, **options})
