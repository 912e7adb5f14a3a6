"""Named objectives through rollouts and whole runs: what episodes, rows, metrics and checkpoints have of them."""

import dataclasses

import lowercase  # noqa: F401
import numpy as np
import pytest
from gloo import run_ranks
from loop import LOOP, train_here
from small import make_engine, small_config

import skyrl
from skyrl.algorithms.filters import register_filter
from skyrl.algorithms.objectives import Objectives
from skyrl.checkpoint.folder import latest
from skyrl.config.schema import EnvConfig
from skyrl.config.validation import check
from skyrl.distributed.collectives import MetricSums
from skyrl.envs.base import register_environment
from skyrl.envs.rewards import register_reward
from skyrl.rollout import RolloutConfig, episode_metrics, rollout, to_rows
from skyrl.run_dir import read_metrics, read_rollouts
from skyrl.text.chat import Chat
from skyrl.tracking.rollouts import show_rollouts, write_rollouts
from skyrl.types import SamplingParams, UserError


@register_reward("how_many", group=True)
def how_many(texts, prompt):
    """How many other samples of the prompt are as long."""
    return [sum(len(text) == len(other) for other in texts) - 1.0 for text in texts]


@register_environment("goals")
class Goals(lowercase.Lowercase):
    """`turns` turns; `given`: what each turn's reward is, "lower" and "few" being objectives of the text."""

    in_process = True

    def __init__(self, *, turns: int = 1, given: list | None = None, group: list | None = None) -> None:
        super().__init__(turns=turns)
        self.given = given or [["lower", "few"]]

    @classmethod
    def group_rewards(cls, options):
        return options.get("group", [])

    def step(self, text):
        result = super().step(text)
        lower = sum("a" <= c <= "z" for c in text) / max(1, len(text))
        objectives = {"lower": lower, "few": -len(text) / 10, "number": 0.5}
        given = self.given[min(self.turn, len(self.given)) - 1]
        if not isinstance(given, list):
            result.reward = given
            return result
        if self.prompt.extra["number"] % 3 == 1 and "sometimes" in given:
            given = ["lower"]
        result.reward = {name: objectives[name] for name in given if name in objectives}
        return result


@pytest.fixture(scope="module")
def engine():
    return make_engine("auto", "float32", "model.tiny.vocab_size=104", row_tokens=160)


def play(engine, options, *, turns=1, combine=None, count=4, tokens=6, on_error="stop", limit=160):
    env = EnvConfig("goals", dict(options, turns=turns), max_turns=turns, on_error=on_error)
    prompts = list(enumerate(Goals.dataset({}, None, "train", 1)[:count]))
    config = RolloutConfig(env, SamplingParams(tokens), 4, limit, (1, "train"))
    if combine is not None:
        config = dataclasses.replace(config, combine=combine)
    with engine.sampling() as sampler:
        return rollout(sampler, prompts, config, Chat(engine.tokenizer))


def test_weighted_objectives_are_the_reward_of_turns_rows_and_metrics(engine):
    objectives = Objectives({"few": 0.5}, {})
    groups = play(engine, {"given": [["few"], ["lower", "few"]]}, turns=2, combine=objectives.combine)
    sums = MetricSums()
    episode_metrics(sums, groups, prefix="eval/")
    metrics, rows = sums.merged(), to_rows(list(enumerate(groups)))
    for row, episode in zip(rows, [e for group in groups for e in group], strict=True):
        few = [-len(turn.text) / 10 for turn in episode.turns]
        last = episode.turns[-1].objectives
        assert [turn.reward for turn in episode.turns] == [few[0] / 2, pytest.approx(last["lower"] + few[1] / 2)]
        assert episode.objectives == {"few": pytest.approx(sum(few)), "lower": last["lower"]}
        assert row.objectives["few"][row.objectives["few"] != 0].tolist() == few
        assert row.objectives["lower"].sum() == last["lower"] and row.rewards.sum() == pytest.approx(episode.reward)
        assert row.scales.sum() == pytest.approx(last["lower"] - sum(few) / 2)
    for name in ("few", "lower"):
        mean = np.mean([e.objectives[name] for group in groups for e in group])
        assert metrics[f"eval/reward/{name}:mean"] == pytest.approx(mean)


def test_a_group_reward_is_added_when_all_samples_have_ended(engine):
    for given, own in ((["few", "lower"], {"few", "lower"}), (0.25, {"reward"})):
        groups = play(engine, {"given": [given], "group": ["how_many"]})
        for group in groups:
            lengths = [len(e.turns[-1].text) for e in group]
            assert [e.objectives["how_many"] for e in group] == [lengths.count(n) - 1.0 for n in lengths]
            for e in group:
                assert e.objectives.keys() == own | {"how_many"}
                assert e.reward == e.turns[-1].reward == pytest.approx(sum(e.objectives.values()))


def test_a_group_reward_that_fails_masks_its_group_or_stops(engine):
    def fails(texts, prompt):
        if prompt.extra["number"] == 1:
            raise RuntimeError("no")
        return [0.0] * len(texts)

    register_reward("fails_once", group=True)(fails)
    groups = play(engine, {"group": ["fails_once"]}, on_error="mask")
    assert [all(e.invalid for e in group) for group in groups] == [False, True, False, False]
    assert groups[1][0].invalid.startswith("group reward fails_once, prompt goals/train/1: raised RuntimeError: no")
    with pytest.raises(UserError, match="group reward fails_once, prompt goals/train/1: raised RuntimeError: no"):
        play(engine, {"group": ["fails_once"]})


@pytest.mark.parametrize(
    "given, turns, line",
    [
        ([["lower", "sometimes", "few"]], 1, "prompt goals/train/1, sample 0: objective 'few' is missing; give 0.0"),
        ([0.5, ["lower"]], 2, "sample 0: a turn's reward is the number 0.5, others have names .lower.; give all names"),
        ([0.0, ["lower"]], 2, ""),  # nothing is nothing
        ([[], ["lower"]], 2, ""),
    ],
)
def test_episodes_whose_objectives_differ_are_named(engine, given, turns, line):
    if not line:
        assert all(
            e.objectives.keys() == {"lower"} for group in play(engine, {"given": given}, turns=turns) for e in group
        )
        return
    with pytest.raises(UserError, match=line):
        play(engine, {"given": given}, turns=turns)
    masked = play(engine, {"given": given}, turns=turns, on_error="mask")
    assert any(e.invalid for group in masked for e in group)


def test_what_a_limit_cuts_may_lack_objectives(engine):
    """The second turn, which alone gives `lower`, finds no room in some episodes."""
    groups = play(engine, {"given": [["few"], ["few", "lower"]]}, turns=2, limit=14, on_error="stop")
    cut = [e for group in groups for e in group if not e.done]
    assert cut and len(cut) < 16 and all("lower" not in e.objectives for e in cut)
    sums = MetricSums()
    episode_metrics(sums, groups, prefix="")
    lower = sum(e.objectives.get("lower", 0.0) for group in groups for e in group)
    assert sums.merged()["reward/lower:mean"] == pytest.approx(lower / 16)


def test_dumps_have_the_objectives(engine, tmp_path):
    groups = play(engine, {"group": ["how_many"]})
    write_rollouts(tmp_path, "000001", groups, engine.tokenizer, rank=0)
    first = next(read_rollouts(tmp_path, "000001"))
    assert first["objectives"] == groups[0][0].objectives == first["turns"][0]["objectives"]
    assert f"how_many {first['objectives']['how_many']:g}" in show_rollouts(tmp_path, "000001", 1)
    write_rollouts(tmp_path, "000002", play(engine, {"given": [0.5]}), engine.tokenizer, rank=0)
    assert "objectives" not in (tmp_path / "000002-r0.jsonl").read_text()  # as before


# ---- whole runs


BOUNDS = "algorithm.objectives.constraints={few: {min: -0.3, step: 0.4}, lower: {max: 0.1}}"


def config(folder, *more):
    cfg = small_config(*LOOP, f"run.dir={folder}", BOUNDS, "algorithm.objectives.weights={lower: 1.5}", *more)
    return dataclasses.replace(cfg, env=EnvConfig("goals", {"group": ["how_many"]}))


def train_goals(cfg):
    """A function of this module, so that the ranks import it."""
    train_here(cfg)


def multipliers(folder):
    records = [record for record in read_metrics(folder / "metrics.jsonl") if record["step"]]
    return [[record[f"multiplier/{name}:mean"] for name in ("few", "lower")] for record in records]


def test_multipliers_go_on_after_a_resume_and_are_the_same_on_one_rank_and_two(tmp_path):
    """To the bit: in their values in each step, and in the checkpoint's state."""
    train_here(config(tmp_path / "whole", "batch.num_steps=3"))
    run_ranks(2, train_goals, config(tmp_path / "parts", "batch.num_steps=1"))
    train_here(config(tmp_path / "parts", "batch.num_steps=3"))
    whole = multipliers(tmp_path / "whole")
    assert whole == multipliers(tmp_path / "parts") and len({tuple(step) for step in whole}) == 3
    states = [latest(tmp_path / name / "checkpoints").state["multipliers"] for name in ("whole", "parts")]
    assert states[0] == states[1] and states[0].keys() == {"few", "lower"}
    record = read_metrics(tmp_path / "whole" / "metrics.jsonl")[-1]
    names = {"reward/few:mean", "reward/lower:mean", "reward/how_many:mean"}
    assert names < record.keys()


def test_a_filter_of_ones_own_drops_groups_and_others_are_sampled(tmp_path):
    register_filter("even")(lambda episodes: episodes[0].prompt.extra["number"] % 2 == 0)
    more = ["algorithm.filters.names=[even]", "algorithm.filters.refill=true", "batch.num_steps=1"]
    calls = train_here(config(tmp_path, *more))
    record = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["step"]][-1]
    uids = {row.name.split("/")[2] for call in calls for row in call.rows}
    assert len(uids) == 4 and all(int(uid) % 2 == 0 for uid in uids)
    assert record["filters/even:sum"] > 0
    assert record["filters/groups:sum"] >= 4 + record["filters/even:sum"]
    with pytest.raises(UserError, match="algorithm.filters.names: no filter called 'odd'"):
        check(small_config("algorithm.filters.names=[odd]"))


def test_options_that_speak_of_no_objective_end_the_run_in_its_first_step(tmp_path):
    with pytest.raises(
        UserError, match="constraints.safety: env.name=goals has no such objective; its .* few, how_many"
    ):
        train_here(config(tmp_path, "algorithm.objectives.constraints={safety: {min: 1.0}}"))


@pytest.mark.parametrize(
    "option, line",
    [
        ("weights={a: nan}", "weights.a=nan: wanted a finite number"),
        ("constraints={a: {}}", "constraints.a={}: wanted one bound, min or max"),
        ("constraints={a: {min: 1, max: 2}}", "wanted one bound, min or max"),
        (
            "constraints={a: {least: 1}}",
            "constraints.a.least: no such key; a constraint has min or max, step and start",
        ),
        ("constraints={a: {min: inf}}", "constraints.a.min=inf: wanted a finite number"),
        ("constraints={a: {min: 1, step: 0}}", "constraints.a.step=0: wanted a number above 0"),
        ("constraints={a: {max: 1, start: -1}}", "constraints.a.start=-1: wanted 0 or more"),
        ("constraints.a=1", "constraints.a=1: wanted a bound, such as {min: 1}"),
        ("constraints={a: {min: x}}", "constraints.a.min=x: wanted a finite number"),
        ("weights.a=x", "weights.a"),
    ],
)
def test_options_are_checked(option, line):
    with pytest.raises(UserError, match=line):
        check(small_config(f"algorithm.objectives.{option}"))


def test_a_script_gives_functions_with_parameters(tmp_path):
    """In a list, whose dicts are written in Hydra's grammar; so are those of wrappers."""

    def accuracy(text, prompt):
        return 1.0

    def brevity(text, prompt, *, limit: int):
        return -1.0

    reward = [accuracy, {"name": brevity, "limit": 3}, {"name": "overlong", "limit": 5, "margin": 2}]
    given = {"run.dir": str(tmp_path), "data.path": "x.jsonl", "env.wrappers": [{"name": "w", "words": ["a:b", "c"]}]}
    cfg = skyrl.SkyRLTrainer("tiny", reward=reward, config=given).config
    place = f"{__name__}:test_a_script_gives_functions_with_parameters.<locals>."
    assert cfg.env.options["reward"] == [f"{place}accuracy", {"name": f"{place}brevity", "limit": 3}, reward[2]]
    assert cfg.env.wrappers == given["env.wrappers"]


def test_each_objective_by_itself_needs_one_reward_for_each():
    for more in (
        ["algorithm=ppo"],
        ["algorithm=reinforce_pp", "algorithm.kl.coef=0.1", "algorithm.kl.placement=reward"],
    ):
        with pytest.raises(
            UserError, match="algorithm.objectives.normalise=true: .* goes by one reward, not by one for"
        ):
            check(small_config(*more, "algorithm.objectives.normalise=true"))
