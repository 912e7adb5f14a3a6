"""What all tasks share: recipes of their names, splits, turns, and that a user sees them."""

import json

import pytest

from skyrl.config.load import config_dir
from skyrl.config.schema import DataConfig
from skyrl.config.validation import OUR_TASKS
from skyrl.envs import ENVIRONMENTS
from skyrl.launch.listing import list_things
from skyrl.tasks.base import last_block
from skyrl.types import UserError

MADE = ("code", "mastermind", "search", "sql", "structured", "support", "tic_tac_toe")
OTHERS = ("tools", "math", "support_model")


def test_each_has_a_recipe_of_its_name_and_is_listed(capsys):
    for name in (*MADE, *OTHERS):
        assert name in OUR_TASKS and ENVIRONMENTS.get(name).name == name
        if name != "support_model":  # its recipe is that of support, with the address of a model
            assert f"\n  name: {name}\n" in (config_dir() / "experiment" / f"{name}.yaml").read_text()
    list_things(["environments"])
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert {*MADE, *OTHERS} <= listed


@pytest.mark.parametrize("name", MADE)
def test_made_prompts_depend_on_seed_and_split_alone(rows, name):
    first, again, other = rows(name), rows(name), rows(name, seed=1)
    test, other_test = rows(name, split="test"), rows(name, split="test", seed=1)
    assert [p.extra for p in first] == [p.extra for p in again] != [p.extra for p in other]
    assert [p.extra for p in test] == [p.extra for p in other_test]
    train, held_out = ({json.dumps([p.messages, p.extra]) for p in prompts} for prompts in (first, test))
    assert len(train) == len(first) and len(held_out) == len(test) and not train & held_out


def test_held_out_rows_may_be_a_file_while_others_are_made(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "?", "schema": {"type": "null"}, "answer": null}\n')
    data, env = DataConfig(eval_path=str(path)), ENVIRONMENTS.get("structured")
    assert [p.extra["schema"] for p in env.dataset({}, data, "test", 0)] == [{"type": "null"}]
    assert len(env.dataset({}, data, "train", 0)) > 2000


def test_an_episode_ends_with_its_turns(rows, play):
    prompt = rows("mastermind")[0]
    result, heard = play(prompt, "1", "1", "1", max_turns=2)
    assert result.done and len(heard) == 2
    with pytest.raises(UserError, match="env.max_turns=0: wanted at least 1"):
        ENVIRONMENTS.get("mastermind")(max_turns=0)


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("a", "a"), ("```sql\na\n```", "a\n"), ("```\na\n```", "a\n"), ("```SQL\na", "a"), ("", ""), ("`a`", "`a`"),
        ("x\n```sql\na\n```\n```\nb\n```", "b\n"), ("```python\na\n```", "```python\na\n```"), ("```", "```"),
    ],
)  # fmt: skip
def test_the_last_block(text, block):
    assert last_block(text, "sql|sqlite") == block


def test_many_fences_take_no_time():
    last_block("```sql\n" * 20_000 + "```" * 20_000, "sql|sqlite")
