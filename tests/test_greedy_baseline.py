"""ReMax: the baseline of a prompt is the reward of the greedy answer that its own policy gives."""

import numpy as np
import pytest
from loop import run_loop
from lowercase import Lowercase
from small import make_engine

from skyrl.config.schema import DataConfig
from skyrl.tracking.rollouts import read_rollouts
from skyrl.types import SampleRequest, SamplingParams

ENDS = {"endings": "=ab7"}
REMAX = ["algorithm=remax", "batch.samples_per_prompt=2", "batch.num_steps=1"]


def greedy_rewards(uids):
    """What the greedy answers of the fresh model to these prompts are worth, by hand."""
    engine = make_engine()
    prompts = {prompt.uid: prompt for prompt in Lowercase.dataset(ENDS, DataConfig(), "train", 1)}
    found = {}
    with engine.sampling() as sampler:
        for uid in uids:
            ids = engine.chat.prompt(prompts[uid].messages)
            params = SamplingParams(8, temperature=0.0, stop_token_ids=tuple(engine.chat.stop_token_ids))
            sampler.add(SampleRequest(uid, ids, params))
        while sampler.unfinished():
            for sample in sampler.step():
                text = engine.chat.read(sample.tokens.tolist(), 0)
                found[sample.uid] = sum("a" <= c <= "z" for c in text) / max(1, len(text))
    return found


def test_the_advantage_is_the_reward_above_the_greedy_answer_s(tmp_path):
    seen = run_loop(tmp_path / "run", *REMAX, env=ENDS)
    rewards = {(e["uid"], e["index"]): e["reward"] for e in read_rollouts(tmp_path / "run" / "rollouts", "000001")}
    want = greedy_rewards({uid for uid, _ in rewards})
    assert len(rewards) == 8 and len(set(want.values())) > 1, "the greedy answer is neither dumped nor one of all"
    for name, row in seen.updates()[0].items():
        uid, index, _ = name.rsplit("/", 2)
        gap = rewards[uid, int(index)] - want[uid]
        assert row.advantages[row.weights != 0] == pytest.approx(gap, abs=1e-12)
    assert seen.rl[0]["greedy_reward:mean"] == pytest.approx(np.mean(list(want.values())))
    assert seen.rl[0]["sampled_tokens:sum"] > seen.rl[0]["trained_tokens:sum"]


@pytest.mark.slow
def test_one_sample_of_a_prompt_is_enough(tmp_path):
    seen = run_loop(tmp_path / "run", *REMAX, "batch.samples_per_prompt=1", "env.on_error=mask", env={"broken": 2})
    kept = [name for name, row in seen.updates()[0].items() if row.weights.any()]
    assert kept and seen.rl[0]["invalid:sum"] > 0 and seen.rl[0]["grad_norm:mean"] > 0


@pytest.mark.ranks
@pytest.mark.slow
def test_two_ranks_have_the_same_baselines(tmp_path):
    one, two = (run_loop(tmp_path / str(n), *REMAX, size=n, env=ENDS) for n in (1, 2))
    for name, row in one.updates()[0].items():
        np.testing.assert_array_equal(row.advantages, two.updates()[0][name].advantages)
