"""The environment of reasoning-gym, with a small package of the same shape in its place, and with the real one."""

import sys
from types import SimpleNamespace

import pytest

from skyrl.config.schema import DataConfig, EnvConfig
from skyrl.envs import make_environment
from skyrl.envs.base import ENVIRONMENTS
from skyrl.tasks import reasoning_gym
from skyrl.types import UserError


class Sums:
    """As reasoning-gym's data sets: item i comes from the seed + i."""

    def __init__(self, seed, size, highest=1000):
        assert highest > 0, "highest must be positive"
        self.seed, self.size, self.highest = seed, size, highest

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        number = (self.seed + index) % self.highest
        return {"question": f"{number} + 1 =", "answer": str(number + 1), "metadata": {"number": number}}

    def score_answer(self, answer, entry):
        return 1.0 if int(answer) == entry["metadata"]["number"] + 1 else 0.01


@pytest.fixture
def package(monkeypatch):
    def create(name, **options):
        if name != "sums":
            raise ValueError(f"Dataset '{name}' not registered")
        return Sums(**options)

    made = SimpleNamespace(
        create_dataset=create,
    )
    monkeypatch.setitem(sys.modules, "reasoning_gym", made)
    reasoning_gym._entries.cache_clear()
    yield
    reasoning_gym._entries.cache_clear()


def prompts(split="train", seed=0, **options):
    options = {"dataset": "sums", "num_train": 40, "num_test": 20, **options}
    return ENVIRONMENTS.get("reasoning_gym").dataset(options, DataConfig(), split, seed)


def questions(*args, **options):
    return {prompt.messages[-1]["content"] for prompt in prompts(*args, **options)}


def test_the_seed_chooses_training_questions_and_nothing_is_on_both_sides(package):
    assert questions() == questions() and len(questions()) == 40 and len(questions("test")) == 20
    assert not questions() & questions(seed=1)  # in the package neighbouring seeds share all but one
    assert questions("test") == questions("test", seed=1)
    few = {"config": {"highest": 30}}
    assert len(questions(**few)) == 10 and not questions(**few) & questions("test", **few)


def test_the_score_is_the_data_sets_own(package):
    env = make_environment(
        EnvConfig("reasoning_gym", {"dataset": "sums", "before": [{"role": "system", "content": ""}]})
    )
    prompt = prompts(before=[{"role": "system", "content": ""}])[7]
    assert [m["role"] for m in env.reset(prompt)] == ["system", "user"]
    answer = prompt.extra["answer"]
    for text in (answer, f" {answer}\n", f"It is <answer>0</answer>, no, <answer>{answer}</answer>."):
        result = env.step(text)
        assert (result.reward, result.done, result.metrics) == (1.0, True, {"correct:mean": 1.0}), text
    assert env.step("0").reward == 0.01 and env.step("none").reward == 0.0  # the data set's function raises there
    assert env.step("0").metrics == {"correct:mean": 0.0}


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"dataset": "sum"},
            "env.options.dataset=sum, config={}: reasoning-gym refuses it: Dataset 'sum' not registered",
        ),
        ({"config": {"highest": 0}}, "dataset=sums, config=.*: reasoning-gym refuses it: highest must be positive"),
        ({"config": {"nope": 1}}, "reasoning-gym refuses it: .*unexpected keyword argument 'nope'"),
        ({"config": {"highest": 20}, "num_test": 100}, "all its questions are held out; lower num_test"),
        ({"num_train": 0}, "env.options.num_train=0"),
    ],
)
def test_what_cannot_be_made_is_named(package, options, words):
    with pytest.raises(UserError, match=words):
        prompts(**options)


def test_without_the_package_its_name_is_told(monkeypatch):
    reasoning_gym._entries.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(
        UserError, match="'reasoning-gym' is not installed; run pip install 'skyrl-spmd.reasoning-gym.'"
    ):
        prompts()


def test_the_real_package():
    pytest.importorskip("reasoning_gym")
    reasoning_gym._entries.cache_clear()
    for name in ("chain_sum", "letter_counting", "countdown", "number_sorting", "simple_equations"):
        options = {"dataset": name, "num_train": 6, "num_test": 3}
        env = make_environment(EnvConfig("reasoning_gym", options))
        for prompt in prompts(**options):
            env.reset(prompt)
            assert env.step(prompt.extra["answer"]).metrics == {"correct:mean": 1.0}, name
            assert env.step("none").metrics == {"correct:mean": 0.0}, name
