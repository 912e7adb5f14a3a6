"""Prompts that cannot be played are found before anything is played, by file:line, or left out and counted."""

import json
from dataclasses import replace

import pytest

from skyrl.config.schema import DataConfig, EnvConfig, ModelConfig, RunConfig, WarmupConfig
from skyrl.text.chat import Chat
from skyrl.text.fit import CHUNK, PromptCheck, check_task, leave_out
from skyrl.text.tokenizer import tiny_tokenizer
from skyrl.types import Prompt, UserError

KNOWN = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}[{{ m.role[0] }}]{{ m.content }}<eos>"
    "{% elif m.role == 'tool' %}{{ raise_exception('No tools here') }}{% endif %}{% endfor %}[a]"
)
ROWS = {
    "empty": {"prompt": ""},
    "surrogate": {"prompt": "a\ud83d"},
    "long": {"prompt": "x" * 70},
    "developer": {"messages": [{"role": "developer", "content": "x"}, {"role": "user", "content": "y"}]},
    "tool": {"prompt": [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]},
}


@pytest.fixture
def run(tmp_path):
    def run(*rows, template="", test=({"prompt": "t"},), rows_end=64, filter=(), warmup=0, **data):
        for split, some in (("train", rows), ("test", test)):
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        (tmp_path / "t.jinja").write_text(template)
        cfg = RunConfig(
            env=EnvConfig(name="single_turn", options={"reward": "format"}),
            model=ModelConfig(chat_template=str(tmp_path / "t.jinja") if template else ""),
            data=DataConfig(path=str(tmp_path / "train.jsonl"), filter=list(filter), **data),
            warmup=WarmupConfig(num_steps=warmup),
        )
        return check_task(cfg, rows_end, files=True)[0]

    return run


OK = {"prompt": "2+2=", "solution": "4"}


@pytest.mark.parametrize(
    ("row", "template", "kind", "said"),
    [
        (ROWS["empty"], "", "empty", "the prompt has no tokens, nothing for a model to go on"),
        (ROWS["surrogate"], "", "refused", r"character 2 of the text is \ud83d, half of a surrogate pair"),
        (ROWS["surrogate"], KNOWN, "refused", r"character 2 of the text is \ud83d"),
        (ROWS["long"], "", "too_long", "70 tokens, and rows of 64 must have room for an answer; shorten it"),
        ({"prompt": "x" * 64}, "", "too_long", "64 tokens, and rows of 64"),
        ({"prompt": "\u00e9" * 70}, "", "too_long", "70 tokens"),
        (ROWS["long"], KNOWN, "too_long", "77 tokens"),
        (ROWS["developer"], KNOWN, "refused", "message 1 of 2 (role 'developer') is not written"),
        (
            {"prompt": "x", "tools": [{"type": "function"}]},
            KNOWN + "{% if tools %}{{ tools }}{% endif %}",
            "refused",
            "field 'tools' is not given to the chat template; write them into a message",
        ),
        (
            {"prompt": "x", "chat_template_kwargs": {"a": 1}},
            KNOWN,
            "refused",
            "field 'chat_template_kwargs' is not read; chat.template_kwargs holds for all rows",
        ),
        (ROWS["tool"], KNOWN, "refused", "the chat template refuses these messages: No tools here"),
    ],
)
def test_a_prompt_that_cannot_be_played_is_named_by_its_line_or_left_out(run, tmp_path, row, template, kind, said):
    for split, rows in (("train", (OK, row)), ("test", (OK,))):
        with pytest.raises(UserError) as error:
            run(*rows, template=template, test=(OK, row))
        at = tmp_path / f"{split}.jsonl"
        assert str(error.value).startswith(f"{at}:2: {said}") and "\n" not in str(error.value)
        assert f"or data.filter=[{kind}] leaves such prompts out" in str(error.value)
    for filter in ([kind], ["all"]):
        line = run(OK, row, row, template=template, filter=filter)[0]
        assert line.startswith(f"left out 2 of 3 train prompts (2 {kind}), first {tmp_path}/train.jsonl:2: {said}")
    with pytest.raises(UserError, match="no prompts are left"):
        run(row, template=template, filter=[kind])
    others = sorted({"empty", "refused", "too_long"} - {kind})
    with pytest.raises(UserError, match=r"train.jsonl:2: .*\(1 more like it\)"):
        run(OK, row, row, template=template, filter=others)


def test_what_fits_to_the_last_token_is_played(run):
    run({"prompt": "x" * 63}, {"prompt": "."}, {"prompt": "\u00e9" * 63})
    run({"prompt": "x" * 63}, max_prompt_tokens=63)
    run({"prompt": "x", "tools": [1], "chat_template_kwargs": {}}, {"prompt": "x", "tools": []}, template=KNOWN)
    with pytest.raises(UserError, match="train.jsonl:1: 31 tokens, above data.max_prompt_tokens=30"):
        run({"prompt": "x" * 31}, max_prompt_tokens=30)
    run(OK, test=[OK] * 256 + [ROWS["long"]])  # is never played


def test_supervised_rows_have_a_solution_and_room_for_it(run):
    run(OK, {"prompt": "x" * 40, "solution": "y" * 23}, warmup=1)
    with pytest.raises(UserError, match="train.jsonl:2: 65 tokens with its solution, and rows end at 64; shorten it"):
        run(OK, {"prompt": "x" * 40, "solution": "y" * 24}, warmup=1)
    with pytest.raises(UserError, match="train.jsonl:2: no solution to learn from; give it one, or set warmup.num_st"):
        run(OK, {"prompt": "x"}, warmup=1, filter=["all"])
    with pytest.raises(UserError, match="train.jsonl:1: character 1 of the text is .udc00"):
        run({"prompt": "x", "solution": "\udc00"}, warmup=1)
    assert "1 too_long" in run(OK, {"prompt": "x", "solution": "y" * 99}, warmup=1, filter=["too_long"])[0]


def test_ranks_find_together_what_one_finds_alone():
    prompts = [Prompt(f"e/{i}", "e", [{"role": "user", "content": "x" * (i % 97)}]) for i in range(3 * CHUNK)]
    chat, cfg = Chat(tiny_tokenizer(), vocab_size=100), RunConfig(data=DataConfig(filter=["too_long", "empty"]))
    check = PromptCheck.of(cfg, "train", 64)
    alone, done = check.run(chat, enumerate(prompts), print), []
    parts = [check.run(chat, list(enumerate(prompts))[rank::3], done.append) for rank in range(3)]
    assert {(one.index, one.kind) for one in alone} == {(one.index, one.kind) for part in parts for one in part}
    left, line = leave_out(cfg, "train", prompts, [one for part in parts for one in part])
    assert left == [p for p in prompts if 0 < len(p.messages[0]["content"]) < 64]
    assert line.startswith(f"left out {len(prompts) - len(left)} of {len(prompts)} train prompts (16 empty, ")
    narrow = Chat(tiny_tokenizer(), vocab_size=90)  # an embedding with fewer rows than the tokenizer has entries
    seen = check.run(narrow, [(0, replace(prompts[3], messages=[{"role": "user", "content": "a~"}])), (1, prompts[3])])
    assert [(one.index, one.kind) for one in seen] == [(0, "refused")] and "beyond the model's embedding" in seen[
        0
    ].problem
