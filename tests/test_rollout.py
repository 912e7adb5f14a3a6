"""Episodes and their rows, with a real sampler: what was sampled is what is trained, id for id."""

import copy
import math

import lowercase  # noqa: F401
import numpy as np
import pytest
from small import make_engine

from skyrl.algorithms.filters import trained_masks
from skyrl.config.schema import DataConfig, EnvConfig
from skyrl.distributed.collectives import MetricSums
from skyrl.envs.base import ENVIRONMENTS, Environment, StepResult, register_environment
from skyrl.envs.wrappers import make_environment
from skyrl.rollout import RolloutConfig, draw_seed, episode_metrics, rollout, to_rows
from skyrl.text.chat import Chat
from skyrl.text.tokenizer import tiny_tokenizer
from skyrl.types import Episode, Prompt, Sample, SamplingParams, Turn, UserError

CHAT = (
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
GAME = EnvConfig(name="guess_number", max_turns=4, options={"low": 1, "high": 20})


@pytest.fixture(scope="module")
def engine():
    return make_engine("auto", "float32", "model.tiny.vocab_size=104", row_tokens=160)


def prompts_of(env, split="train"):
    options = dict(env.options, max_turns=env.max_turns) if env.name == "guess_number" else env.options
    return list(enumerate(ENVIRONMENTS.get(env.name).dataset(options, DataConfig(), split, 1)))


def play(engine, env, prompts, *, group=4, tokens=5, limit=160, key=(1, "train"), chat=None, temperature=1.0):
    params = SamplingParams(tokens, temperature=temperature)
    chat = chat or Chat(engine.tokenizer)
    with engine.sampling() as sampler:
        return rollout(sampler, prompts, RolloutConfig(env, params, group, limit, key), chat)


def ids_of(row):
    return np.concatenate([row.tokens, row.targets[-1:]])


def tokens_of(groups):
    return [[[t.sample.tokens.tolist() for t in e.turns] for e in group] for group in groups]


# ---- tokens


def check_rows(groups, rows, tokenizer):
    """Everything that must hold for unbroken episodes, against the episodes themselves."""
    episodes = [e for group in groups for e in group]
    assert len(rows) == len(episodes)
    for row, episode in zip(rows, episodes, strict=True):
        sampled = np.concatenate([turn.sample.tokens for turn in episode.turns])
        ids = ids_of(row)
        assert row.targets[row.mask].tolist() == sampled.tolist()
        np.testing.assert_array_equal(row.tokens[1:], row.targets[:-1])
        assert row.mask.sum() == len(sampled)
        np.testing.assert_array_equal(
            row.sampling_logprobs[row.mask], np.concatenate([t.sample.logprobs for t in episode.turns])
        )
        assert not row.sampling_logprobs[~row.mask].any() and not row.rewards[~row.mask].any()
        assert tokenizer.decode(row.targets[row.mask]) == "".join(
            tokenizer.decode(t.sample.tokens) for t in episode.turns
        )
        for turn in episode.turns:  # the sampler was given the very beginning of the row, and its answer follows
            start = len(turn.context)
            assert turn.context.tolist() == ids[:start].tolist()
            assert turn.sample.tokens.tolist() == ids[start : start + len(turn.sample.tokens)].tolist()
            assert row.rewards[start + len(turn.sample.tokens) - 2] == turn.reward
        assert math.fsum(row.rewards) == episode.reward


def test_a_token_goes_to_the_experts_that_drew_it():
    """A later turn reads the tokens of those before it: again, where the cache has them no more, and in bfloat16 then
    perhaps by other experts than those that gave their log-probabilities."""

    def turn(context, tokens, first):
        experts = first + np.arange(len(context) + len(tokens) - 1, dtype=np.int16)[:, None, None]
        return Turn(np.array(context), Sample("u", np.array(tokens), np.zeros(len(tokens)), "stop", 0, None, experts))

    turns = [turn([4, 5], [7, 8], 0), turn([4, 5, 7, 8, 6], [9], 100), turn([4, 5, 7, 8, 6, 9, 6], [3, 2], 200)]
    (row,) = to_rows([(0, [Episode(Prompt("p", "env", []), 0, turns, 0.0, "stop")])])
    assert row.experts[:, 0, 0].tolist() == [0, 1, 2, 103, 104, 205, 206, 207]


def test_rewards_of_turns_reach_the_row_as_they_are():
    """10.1 + 0.2 and 10.3, each rounded to float32, would be two scores."""
    drawn = Sample("0/0/0", np.array([7, 8]), np.zeros(2, np.float32), "stop", 0)
    turns = [Turn(np.array([4, 5]), drawn, 10.1), Turn(np.array([4, 5, 7, 8, 6]), drawn, 0.2)]
    episode = Episode(Prompt("p", "env", []), 0, turns, 10.3, "stop")
    (row,) = to_rows([(0, [episode])])
    assert row.rewards[row.rewards != 0].tolist() == [10.1, 0.2]


def test_a_game_of_several_turns_trains_what_was_sampled(engine):
    prompts = prompts_of(GAME)
    groups = play(engine, GAME, prompts, group=8)
    check_rows(groups, to_rows(list(enumerate(groups))), engine.tokenizer)
    assert max(len(e.turns) for g in groups for e in g) == 4
    assert any(e.reward == 1.0 for g in groups for e in g), "nobody guessed right: the test shows less than it could"
    for row, episode in zip(to_rows(list(enumerate(groups))), [e for g in groups for e in g], strict=True):
        env = make_environment(GAME)  # the same game again, in text
        text = "".join(m["content"] for m in env.reset(episode.prompt))
        for turn in episode.turns:
            text += engine.tokenizer.decode(turn.sample.tokens, skip_special_tokens=False)
            answer = env.step(engine.chat.read(turn.sample.tokens))
            assert answer.reward == turn.reward
            text += "" if answer.done else answer.observation[0]["content"]
        assert engine.tokenizer.decode(ids_of(row), skip_special_tokens=False) == text


@pytest.mark.parametrize("end", ["<eos>", "<end>"])
def test_a_chat_template_closes_each_turn_once(engine, end):
    """`end` closes a turn in the template. A sample that wrote an end token itself gets no second one; a cut sample
    gets one that is not trained. <end> is not the tokenizer's own end: it comes through sampler.stop_token_ids."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT.replace("<eos>", end)
    ends = {1: "tokenizer"}
    if end != "<eos>":
        tokenizer.add_special_tokens({"additional_special_tokens": [end]})
        ends[tokenizer.convert_tokens_to_ids(end)] = "sampler.stop_token_ids"
    chat = Chat(tokenizer, ends)
    end_id = tokenizer.convert_tokens_to_ids(end)
    env = EnvConfig(name="lowercase", max_turns=3, options={"turns": 3})
    groups = play(engine, env, prompts_of(env)[:30], group=4, tokens=6, chat=chat)
    rows = to_rows(list(enumerate(groups)))
    check_rows(groups, rows, tokenizer)
    ended = cut = 0
    for row, episode in zip(rows, [e for g in groups for e in g], strict=True):
        turns = [tokenizer.decode(t.sample.tokens, skip_special_tokens=False) for t in episode.turns]
        text = f"[u]{episode.prompt.messages[0]['content']}{end}\n[a]"
        for number, turn in enumerate(turns, start=1):
            text += turn
            if number < len(turns):
                closed = turn.endswith((end, "<eos>"))  # by either end token
                ended, cut = ended + closed, cut + (not closed)
                text += ("" if closed else end) + f"\n[u]({number}){end}\n[a]"
        assert tokenizer.decode(ids_of(row), skip_special_tokens=False) == text
        trained_ends = int((row.targets[row.mask] == end_id).sum())
        assert trained_ends == sum(turn.endswith(end) for turn in turns)
        assert sum(t.sample.stop == "stop" and t.sample.tokens[-1] == end_id for t in episode.turns) == trained_ends
    assert ended > 3 and cut > 3


def test_texts_without_a_template_and_a_template_without_answers():
    tokenizer = tiny_tokenizer()
    plain = Chat(tokenizer)
    assert tokenizer.decode(plain.prompt([{"role": "user", "content": "1+1="}])) == "1+1="
    assert plain.answer([], "2").tolist() == [*tokenizer("2")["input_ids"], tokenizer.eos_token_id]
    assert plain.read(plain.answer([], "2")) == "2"
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(UserError, match="is not written by the chat template"):
        Chat(tokenizer).continuation([], [{"role": "user", "content": "x"}])


@register_environment("test_developer")
class Developer(Environment):
    in_process = True

    def step(self, text):
        return StepResult(1.0, False, [{"role": "developer", "content": "go on"}])


def test_an_observation_that_the_template_drops_is_named_or_kept_apart(engine):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages if m.role in ('user', 'assistant') %}[{{ m.role[0] }}]{{ m.content }}<eos>{% endfor %}"
    )
    prompts = [(0, Prompt("p", "test_developer", [{"role": "user", "content": "1+1="}], {"source": "f.jsonl:3"}))]
    said = (
        "f.jsonl:3: what env.name=test_developer answered to turn 1: message 3 of 3 .role 'developer'. is not written"
    )
    with pytest.raises(UserError, match=said):
        play(engine, EnvConfig(name="test_developer", max_turns=2), prompts, group=1, chat=Chat(tokenizer))
    kept = play(engine, EnvConfig(name="test_developer", max_turns=2, on_error="mask"), prompts, chat=Chat(tokenizer))
    assert all("role 'developer'" in episode.invalid and episode.stop == "aborted" for episode in kept[0])
    first = [(0, Prompt("p", "test_developer", [{"role": "developer", "content": "x"}], {"source": "f.jsonl:3"}))]
    with pytest.raises(UserError, match="f.jsonl:3: what env.name=test_developer began with: message 1 of 1"):
        play(engine, EnvConfig(name="test_developer"), first, chat=Chat(tokenizer))
    kept = play(engine, EnvConfig(name="test_developer", on_error="mask"), first, chat=Chat(tokenizer))
    assert all("began with: message 1" in episode.invalid and episode.stop == "aborted" for episode in kept[0])


# ---- draws


def test_samples_of_a_prompt_differ_and_depend_on_nothing_but_their_key(engine):
    env = EnvConfig(name="lowercase")
    prompts = prompts_of(env)[:9]
    everyone = play(engine, env, prompts, tokens=12)
    for group in tokens_of(everyone):
        assert len({tuple(e[0]) for e in group}) == len(group)
    for size in (2, 3):  # as it is dealt to ranks
        for rank in range(size):
            mine = prompts[rank::size]
            assert tokens_of(play(engine, env, mine, tokens=12)) == tokens_of(everyone[rank::size])
    assert tokens_of(play(engine, env, prompts[:2], group=2, tokens=12)) == [
        group[:2] for group in tokens_of(everyone[:2])
    ]
    assert tokens_of(play(engine, env, prompts, tokens=12)) == tokens_of(everyone)
    for other in ((2, "train"), (1, "eval")):
        changed = tokens_of(play(engine, env, prompts, tokens=12, key=other))
        assert all(a != b for x, y in zip(changed, tokens_of(everyone), strict=True) for a, b in zip(x, y, strict=True))


def test_the_same_prompt_at_another_position_is_drawn_anew(engine):
    env = EnvConfig(name="lowercase")
    prompt = prompts_of(env)[3][1]
    first, second = tokens_of(play(engine, env, [(3, prompt), (103, prompt)], tokens=12))
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_turns_have_seeds_of_their_own():
    seeds = {draw_seed(1, "train", p, "uid", g, t) for p in range(10) for g in range(10) for t in range(10)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)


# ---- limits and failures


def test_an_episode_ends_where_the_row_ends(engine):
    env = EnvConfig(name="lowercase", max_turns=9, options={"turns": 9})
    limit = 24
    groups = play(engine, env, prompts_of(env)[:12], tokens=6, limit=limit)
    rows = to_rows(list(enumerate(groups)))
    assert {e.stop for g in groups for e in g} == {"length"}
    assert all(len(ids_of(row)) <= limit for row in rows)
    assert any(len(ids_of(row)) == limit for row in rows)
    assert {len(e.turns) for g in groups for e in g} <= {2, 3, 4, 5, 6}
    assert {row.stop for row in rows} == {"length"}
    check_rows(groups, rows, engine.tokenizer)
    with pytest.raises(
        UserError, match=r"prompt lowercase/train/3 has 7 tokens, and rows end at 7; raise batch.max_row"
    ):
        play(engine, env, prompts_of(env)[3:4], limit=7)


def test_a_rewritten_history_opens_a_new_row():
    def turn(context, tokens, reward):
        tokens = np.array(tokens)
        return Turn(np.array(context), Sample("u", tokens, -0.1 * tokens.astype(np.float32), "stop", 0), reward)

    prompt = Prompt("e/train/1", "e", [{"role": "user", "content": "?"}])
    whole = [turn([1, 2], [3, 4], 0.5), turn([1, 2, 3, 4, 9], [5], 0.25)]
    broken = [*whole, turn([1, 2, 8, 9], [6, 7], 1.0), turn([1, 2, 8, 9, 6, 7, 9], [4], 0.0)]
    empty = [turn([1, 2], [], 0.0)]
    groups = [[Episode(prompt, i, turns, 0.0, "stop") for i, turns in enumerate((whole, broken, empty))]]
    rows = to_rows(list(enumerate(groups)))
    assert [row.name for row in rows] == ["e/train/1/0/0", "e/train/1/1/0", "e/train/1/1/1"]
    assert [row.episode for row in rows] == [0, 1, 1] and [row.group for row in rows] == [0, 0, 0]
    assert ids_of(rows[1]).tolist() == [1, 2, 3, 4, 9, 5]
    assert ids_of(rows[2]).tolist() == [1, 2, 8, 9, 6, 7, 9, 4]
    assert rows[1].mask.tolist() == [False, True, True, False, True]
    assert rows[2].mask.tolist() == [False, False, False, True, True, False, True]
    assert rows[1].rewards.tolist() == [0.0, 0.0, 0.5, 0.0, 0.25]
    assert rows[2].rewards.tolist() == [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    np.testing.assert_allclose(rows[2].sampling_logprobs[rows[2].mask], [-0.6, -0.7, -0.4], rtol=1e-6)


OF_THE_LOOP = (
    "reward:mean",
    "turns:mean",
    "ratio:mean",
    "kl/coef:mean",
    "eval/accuracy:mean",
    "time/train_seconds:sum",
)


@pytest.fixture
def counting():
    """An environment of three turns that reports under each reduction, and "correct" at every turn."""

    @register_environment("counting")
    class Counting(Environment):
        in_process = True

        def step(self, text):
            self.turn = getattr(self, "turn", 0) + 1
            level = [4.0, 1.0, 2.0][self.turn - 1]
            metrics = {f"level:{kind}": level for kind in ("sum", "mean", "max", "min")}
            metrics |= {"first:sum": 1.0} if self.turn == 1 else {}
            metrics["correct:mean"] = float(self.turn == 3)
            metrics |= dict.fromkeys(OF_THE_LOOP, 9.0) if self.turn == 3 else {}
            return StepResult(0.0, self.turn == 3, [{"role": "user", "content": "?"}], metrics)

    yield EnvConfig(name="counting", max_turns=3)
    del ENVIRONMENTS._things["counting"]


def test_a_metrics_reduction_holds_over_turns_episodes_and_ranks(engine, counting):
    prompts = [(i, Prompt(f"counting/train/{i}", "counting", [{"role": "user", "content": "?"}])) for i in range(2)]
    groups = play(engine, counting, prompts, group=2, tokens=2)
    each = {"level:sum": 7.0, "level:mean": 7 / 3, "level:max": 4.0, "level:min": 1.0, "first:sum": 1.0}
    for episode in (e for group in groups for e in group):
        assert episode.metrics == {**each, "correct:mean": 1.0, **dict.fromkeys(OF_THE_LOOP, 9.0)}
    ranks = [MetricSums(), MetricSums()]
    for tally, group in zip(ranks, groups, strict=True):
        episode_metrics(tally, [group], prefix="")
    ranks[0].merge(ranks[1].values)  # as over real ranks: distributed/test_collectives.py
    merged = ranks[0].merged()
    own = {key.removeprefix("env/"): value for key, value in merged.items() if key.startswith("env/")}
    assert own["level:sum"] == 4 * 7.0 and own["first:sum"] == 4.0 and merged["accuracy:mean"] == 1.0
    assert (own["level:mean"], own["level:max"], own["level:min"]) == (pytest.approx(7 / 3), 4.0, 1.0)
    # Whatever an environment calls its numbers, none is one of the loop's.
    assert (merged["turns:mean"], merged["reward:mean"]) == (3.0, 0.0) and set(OF_THE_LOOP) < set(own)
    assert not {"ratio:mean", "kl/coef:mean", "eval/accuracy:mean", "time/train_seconds:sum"} & set(merged)


def test_an_episode_without_a_score_is_kept_apart(engine):
    env = EnvConfig(name="lowercase", options={"broken": 3}, on_error="mask")
    prompts = prompts_of(env)[1:8]  # 3 and 6 are broken
    groups = play(engine, env, prompts)
    for (number, _), group in zip(prompts, groups, strict=True):
        for episode in group:
            assert bool(episode.invalid) == (number % 3 == 0)
            assert "this prompt is broken" in episode.invalid or not episode.invalid
    rows = to_rows(list(enumerate(groups)))
    masks = trained_masks(
        [row.mask for row in rows], [row.stop for row in rows], np.array([r.valid for r in rows]), "keep"
    )
    for row, mask in zip(rows, masks, strict=True):
        number = int(row.name.split("/")[2])
        assert row.valid == (number % 3 != 0) and mask.any() == row.valid
    whole = play(engine, EnvConfig(name="lowercase"), prompts)
    assert tokens_of(whole) == tokens_of(groups), "a failure changes no draw"
    stop = copy.copy(env)
    object.__setattr__(stop, "on_error", "stop")
    with pytest.raises(UserError, match="lowercase/train/3"):
        play(engine, stop, prompts)
