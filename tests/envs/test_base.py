"""Options, registration and making of environments."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from skyrl.api import Environment, StepResult, register_environment
from skyrl.config.schema import DataConfig, EnvConfig
from skyrl.envs import ENVIRONMENTS, Guard
from skyrl.envs.base import environment_options
from skyrl.envs.rewards import REWARDS
from skyrl.envs.wrappers import make_environment
from skyrl.types import Prompt, UserError

REPO = Path(__file__).parents[2]


@register_environment("test_options")
class Options(Environment):
    def __init__(
        self,
        *,
        needed: int,
        part: float = 0.5,
        flag: bool = False,
        words: list[str] | None = None,
        level: Literal["easy", "hard"] = "easy",
        file: Path | None = None,
        max_turns: int = 1,
    ) -> None:
        self.values = (needed, part, flag, words, level, max_turns)
        self.file = file


def make(**options):
    return make_environment(EnvConfig(name="test_options", options=options, max_turns=3))


def test_options_arrive_typed():
    assert make(needed=2).values == (2, 0.5, False, None, "easy", 3)
    assert make(needed=2, part=1, flag=True, words=["a"], level="hard").values == (2, 1, True, ["a"], "hard", 3)


def test_an_option_that_is_a_path_has_its_home_folder_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert make(needed=2, file="~/a b").file == Path("/home/me/a b") and make(needed=2).file is None
    with pytest.raises(UserError, match="env.options.file=~nobody-here/x: no home folder of nobody-here"):
        make(needed=2, file="~nobody-here/x")
    with pytest.raises(UserError, match=r"file=3: environment 'test_options' wants \S*pathlib.Path"):
        make(needed=2, file=3)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"needed": 1, "prt": 1},
            "env.options.prt: environment 'test_options' has no such option; it has: needed, part",
        ),
        ({}, "env.options.needed: environment 'test_options' needs it; give it int"),
        ({"needed": "1"}, "env.options.needed='1': environment 'test_options' wants int here"),
        ({"needed": True}, "env.options.needed=True"),
        ({"needed": 1.5}, "env.options.needed=1.5"),
        ({"needed": 1, "part": "x"}, "env.options.part='x'"),
        ({"needed": 1, "flag": 1}, "env.options.flag=1: environment 'test_options' wants bool"),
        ({"needed": 1, "words": "a"}, "env.options.words='a'"),
        ({"needed": 1, "words": [1]}, "env.options.words=[1]"),
        ({"needed": 1, "level": "mid"}, "env.options.level='mid': environment 'test_options' wants one of: easy, hard"),
        ({"needed": 1, "max_turns": 2}, "env.options.max_turns: this is an option of every environment"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError) as caught:
        make(**options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="env.name: no environment called 'aritmetic'; choose one of: .*arithmetic"):
        make_environment(EnvConfig(name="aritmetic"))


def test_environments_without_a_constructor_or_with_open_options():
    @register_environment("test_plain")
    class Plain(Environment):
        pass

    @register_environment("test_open")
    class Open(Environment):
        def __init__(self, **options):
            self.options = options

    with pytest.raises(UserError, match="has no such option; it has: none"):
        make_environment(EnvConfig(name="test_plain", options={"a": 1}))
    assert environment_options(EnvConfig(name="test_plain", max_turns=4)) == {}
    assert make_environment(EnvConfig(name="test_open", options={"a": 1})).options == {"a": 1}
    with pytest.raises(NotImplementedError, match="'test_plain' has no step"):
        Plain().step("x")


def test_registering_is_checked():
    with pytest.raises(UserError, match="no subclass"):
        register_environment("test_int")(int)
    with pytest.raises(UserError, match="called 'test_options' already"):
        register_environment("test_other")(Options)
    assert "test_other" not in ENVIRONMENTS

    class Arithmetic2(Environment):
        pass

    with pytest.raises(UserError, match="registered twice"):
        register_environment("arithmetic")(Arithmetic2)
    assert Arithmetic2.name == ""


def test_results_do_not_share_their_defaults():
    StepResult(1.0, True).observation.append({})
    StepResult(1.0, True).metrics["a:sum"] = 1.0
    assert StepResult(1.0, True) == StepResult(1.0, True, [], {})


def test_default_dataset_reads_rows(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2=", "answer": "3"}\n')
    (tmp_path / "test.jsonl").write_text('{"messages": [{"role": "user", "content": "2+2="}], "answer": "4"}\n')
    data = DataConfig(path=str(tmp_path / "train.jsonl"))
    cls = ENVIRONMENTS.get("single_turn")
    train = cls.dataset({"reward": "exact"}, data, "train", 0)
    assert [p.uid for p in train] == ["single_turn/train/0", "single_turn/train/1"]
    assert train[1] == Prompt(
        "single_turn/train/1",
        "single_turn",
        [{"role": "user", "content": "1+2="}],
        {"answer": "3", "source": f"{tmp_path / 'train.jsonl'}:2"},
    )
    test = cls.dataset({"reward": "exact"}, data, "test", 0)
    env = make_environment(EnvConfig(name="single_turn", options={"reward": "exact"}))
    assert env.reset(test[0]) == [{"role": "user", "content": "2+2="}]
    assert env.step("4") == StepResult(1.0, True, metrics={"correct:mean": 1.0})
    assert env.step("5") == StepResult(0.0, True, metrics={"correct:mean": 0.0})


def test_a_limit_that_no_reward_reaches_is_refused():
    for limit in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"env\.options\.correct_reward=(nan|inf): wanted a finite number"):
            make_environment(EnvConfig(name="single_turn", options={"reward": "exact", "correct_reward": limit}))


def test_everything_imports_and_plays_without_torch():
    code = (
        "import sys, skyrl.api, skyrl.data, skyrl.envs as e\n"
        "from skyrl.config.schema import RunConfig, EnvConfig\n"
        "from skyrl.answers.equal import answers_equal\n"
        "assert not {'torch', 'sympy', 'datasets'} & set(sys.modules), 'imported at start'\n"
        "for name in ('arithmetic', 'guess_number'):\n"
        "    cfg = RunConfig(env=EnvConfig(name=name))\n"
        "    prompt = skyrl.data.PromptStream(skyrl.data.make_prompts(cfg, 'test'), 1, True).at(5)\n"
        "    env, guard = e.make_environment(cfg.env), e.Guard(cfg.env)\n"
        "    guard.call(env.reset, prompt, prompt=prompt); guard.call(env.step, '3', prompt=prompt)\n"
        "assert answers_equal('2x', 'x+x')\n"
        "assert 'torch' not in sys.modules\n"
    )
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_docs_name_every_built_in():
    text = (REPO / "docs" / "environments.md").read_text()
    for registry in (ENVIRONMENTS, REWARDS):
        ours = [name for name in registry.names() if registry.get(name).__module__.startswith("skyrl.")]
        assert len(ours) > 3  # other test modules register theirs in the same process
        for name in ours:
            assert f"`{name}`" in text, name


def test_the_examples_of_the_docs_play():
    blocks = (REPO / "docs" / "environments.md").read_text().split("```python\n")[1:]
    own = [block for block in blocks if block.startswith("# my_task.py")]  # test_pages.py runs the others
    assert len(own) == 2
    for block in own:
        exec(compile(block.split("```")[0], "docs/environments.md", "exec"), {})
    prompt = Prompt("p", "countdown", [{"role": "user", "content": "count"}], {"answer": "24"})
    cfg = EnvConfig(name="countdown", options={"start": 2}, max_turns=2)
    env, guard = make_environment(cfg), Guard(cfg)
    assert guard.call(env.reset, prompt, prompt=prompt).value == prompt.messages
    assert not guard.call(env.step, "2", prompt=prompt).value.done
    assert guard.call(env.step, "1", prompt=prompt).value.metrics == {"correct:mean": 1.0}
    assert REWARDS.get("short_and_right")("it is 24", prompt) == pytest.approx(1 - 0.008)
