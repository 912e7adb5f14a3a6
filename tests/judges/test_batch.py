"""Rewards of whole batches in the loop: likelihood under the reference, grades by the policy, a plugin's, failures."""

from pathlib import Path

import numpy as np
import pytest
from gloo import run_ranks
from loop import LOOP, train_here
from small import make_engine, small_config

from skyrl.api import BatchReward, register_reward
from skyrl.config.schema import EnvConfig
from skyrl.data import make_prompts
from skyrl.engine import ModelSpec
from skyrl.envs.base import group_rewards_of
from skyrl.envs.rewards.base import REWARDS
from skyrl.judges.batch import RankTools
from skyrl.judges.policy import SelfRubric
from skyrl.planner.memory import needs_reference
from skyrl.rollout import RolloutConfig, rank_tools, score_batch
from skyrl.run_dir import read_metrics, read_rollouts
from skyrl.types import Episode, Prompt, Sample, SamplingParams, Turn, UserError


@register_reward("test_brevity", batch=True)
class Brevity(BatchReward):
    """Minus the number of characters, or what `gives` says of each text."""

    def __init__(self, *, gives: str = "-float(len(text))") -> None:
        self.gives = compile(gives, "gives", "eval")

    def score(self, episodes, tools):
        return [eval(self.gives, {"text": one.turns[-1].text}) for one in episodes if one.turns[-1].text != "lost"]


def run(folder, reward, *more):
    """Records of the steps of RL, and the first step's rollouts."""
    train_here(small_config(*LOOP, f"run.dir={folder}", f"env.options.reward={reward}", *more))
    records = [one for one in read_metrics(Path(folder) / "metrics.jsonl") if one["phase"] == "rl" and one["step"]]
    return records, list(read_rollouts(Path(folder) / "rollouts", "000001"))


MORE = ["algorithm.kl.coef=0", "sampler.temperature=1.0", "optim.lr=0.05"]


def test_likelihood_is_the_reference_s_and_needs_no_kl(tmp_path):
    """In the first step the reference is the policy: its log-probabilities are those that the sampler drew with. Later
    it is not."""
    records, episodes = run(tmp_path, "likelihood", *MORE, "batch.num_steps=2")
    for one in episodes:
        assert one["reward"] == pytest.approx(np.mean(one["turns"][0]["logprobs"]), abs=2e-5)
    assert "kl/coef:mean" not in records[0] and records[0]["reward:mean"] == records[0]["reward/likelihood:mean"]
    later = read_rollouts(tmp_path / "rollouts", "000002")
    gaps = [one["reward"] - np.mean(one["turns"][0]["logprobs"]) for one in later]
    assert np.max(np.abs(gaps)) > 1e-3
    cfg = small_config("env.options.reward=[exact,likelihood]", *MORE)
    assert needs_reference(cfg) and not needs_reference(small_config(*MORE))
    assert not needs_reference(small_config("env.options.reward=of_a_plugin", *MORE))  # told where it is used


def logprobs_of(strategy, texts):
    """Under a reference that lies on these ranks as `strategy` says; the second rank has no episodes."""
    engine = make_engine(strategy, "float32")
    engine.create("reference", ModelSpec(trainable=False, copy_of="policy"))
    mine = episodes(*texts) if engine.world.rank == 0 else []
    for number, one in enumerate(mine):
        one.turns[0].context = np.arange(4, 7 + number)
        one.turns[0].sample = Sample("u", np.arange(20, 22 + number), np.zeros(2 + number), "stop", 0)
    return rank_tools(engine, "reference").reference_logprobs(mine)


@pytest.mark.ranks
@pytest.mark.slow
def test_likelihood_under_a_sharded_reference():
    """Every rank takes part, also one that has nothing to score."""
    expected = logprobs_of("single", ["a", "b", "c"])
    found, nothing = run_ranks(2, logprobs_of, "fsdp", ["a", "b", "c"])
    assert nothing == [] and [len(one) for one in found] == [2, 3, 4]
    assert all(np.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True))


def test_refill_scores_each_round_before_groups_are_chosen(tmp_path):
    more = ["algorithm=dapo", "algorithm.filters.max_refill_rounds=2", "batch.num_steps=1"]
    (one,), _ = run(tmp_path, "{name:test_brevity,gives:'1.0'}", *MORE, *more)
    assert one["episodes:sum"] == 32.0 and one["sampler/tokens:sum"] == one["sampled_tokens:sum"]


def test_a_policy_that_writes_no_grades_ends_the_run_with_a_line(tmp_path):
    more = ["env.on_error=mask", "batch.max_row_tokens=2000", "batch.num_steps=1"]
    with pytest.raises(UserError, match="sample 0: the policy wrote no grades: it is no JSON object"):
        run(tmp_path, "[exact,{name:self_rubric,max_tokens:4}]", *more)


def test_the_policy_s_grades_are_scores():
    asked = []

    def generate(conversations, max_tokens):
        asked.extend(conversations)
        return ['{"score": 5}', None, "five"]

    scores = SelfRubric(max_tokens=9).score(episodes("a", "b", "c"), RankTools("cpu", lambda given: [], generate))
    assert scores[0] == 0.5 and all(isinstance(one, ValueError) for one in scores[1:])
    assert [one["role"] for one in asked[0]] == ["user"] and '"answer": "a"' in asked[0][0]["content"]


def episodes(*texts):
    sample = Sample("u", np.array([1]), np.zeros(1), "stop", 0)
    prompt = Prompt("p/1", "e", [], {"source": "rows.jsonl:3"})
    turns = [Turn(np.array([1]), sample, text=text, objectives={"exact": 1.0}, reward=1.0) for text in texts]
    return [Episode(prompt, i, [turn], 1.0, "stop", done=True) for i, turn in enumerate(turns)]


def score(gives, *texts, on_error="mask"):
    env = EnvConfig("single_turn", {"reward": ["exact", {"name": "test_brevity", "gives": gives}]}, on_error=on_error)
    judges = [(reward, reward(**params)) for reward, params in group_rewards_of(env, batch=True)]
    group = episodes(*texts)
    score_batch(judges, [group], RolloutConfig(env, SamplingParams(1), 2, 9, ()), None)
    return group


def test_scores_join_the_objectives():
    one, two = score("-float(len(text))", "ab", "abcd")
    assert (one.objectives, one.reward) == ({"exact": 1.0, "test_brevity": -2.0}, -1.0) and two.reward == -3.0
    (one,) = score("{'short': 1, 'calm': 0.5}", "ab")
    assert one.objectives == {"exact": 1.0, "short": 1.0, "calm": 0.5} and one.reward == 2.5
    assert score("1.0") == []


def test_an_exception_masks_its_episode_whatever_on_error_says():
    one, two = score("ValueError('away') if text == 'b' else 1.0", "a", "b", on_error="stop")
    assert not one.invalid and one.reward == 2.0
    assert two.invalid == "score() (reward test_brevity), prompt p/1 (rows.jsonl:3), sample 1: away"


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        ("float('nan') if text == 'b' else 1.0", "sample 1: reward test_brevity: score.* nan as the score"),
        ("None if text == 'b' else 1.0", "sample 1: .*None as the score.*wanted a number"),
        ("{'short': float('inf')} if text == 'b' else {'short': 1.0}", "sample 1: .*'short'.*finite"),
        ("{'exact': 1.0} if text == 'b' else 1.0", "sample 1: .*'exact'"),
        ("{'short': 1.0} if text == 'b' else {'short': 1.0, 'calm': 1.0}", "sample 1: objective 'calm' is missing"),
    ],
)
def test_what_is_no_score_is_named(gives, said):
    one, two = score(gives, "a", "b")
    assert not one.invalid
    with pytest.raises(UserError, match=said):
        score(gives, "a", "b", on_error="stop")
    assert two.invalid and "rows.jsonl:3" in two.invalid


def test_a_reward_that_fails_as_a_whole_is_one_line():
    with pytest.raises(UserError, match=r"reward test_brevity: score\(\) raised ZeroDivisionError.*fix it"):
        score("1 / 0", "a")
    with pytest.raises(UserError, match=r"reward test_brevity: score\(\) gave 1 scores for 2 episodes"):
        score("1.0", "a", "lost")
    with pytest.raises(UserError, match="batch=True is for a class with a method score"):
        register_reward("test_none", batch=True)(lambda text, prompt: 1.0)
    bad = small_config("env.options.reward={name:self_rubric,rubric:''}")
    with pytest.raises(UserError, match="self_rubric: max_tokens=0: wanted 1 or more"):
        REWARDS.get("self_rubric")(max_tokens=0)
    with pytest.raises(UserError, match="reward_model: label=-1: wanted 0 or more"):
        REWARDS.get("reward_model")(model="x", label=-1)
    with pytest.raises(UserError, match="rubric='': wanted a text"):
        make_prompts(bad, "train")
