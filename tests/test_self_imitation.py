"""What self-imitation keeps and learns from, recomputed from the episodes of the run."""

import json

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from loop import run_loop

from skyrl.config.load import load_config
from skyrl.tracking.base import without_wall_clock
from skyrl.tracking.rollouts import read_rollouts

OWN = [
    "algorithm.self_imitation.coef=0.5",
    "algorithm.self_imitation.min_reward=0.1",
    "algorithm.self_imitation.rows_per_step=3",
    "algorithm.self_imitation.size=5",
    "batch.num_steps=4",
    "debug.deterministic=true",
]


def learned(record):
    """What a step computed, but for an evaluation that a run makes at its end."""
    return {k: v for k, v in without_wall_clock(record).items() if not k.startswith("eval/")}


def kept_in(folder):
    """What the newest checkpoint of a run holds."""
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    reader = dcp.FileSystemReader(newest)
    size = reader.read_metadata().state_dict_metadata["self_imitation/data"].size
    data = {"self_imitation/data": torch.zeros(size, dtype=torch.uint8)}
    dcp.load(data, storage_reader=reader, no_dist=True)
    return json.loads(data["self_imitation/data"].numpy().tobytes())


def expected(folder, steps, size, least):
    """uid -> (reward, tokens of the answer) of what should be kept, oldest first, from the dumped episodes."""
    kept = {}
    for number in range(1, steps + 1):
        best = {}
        for episode in read_rollouts(folder / "rollouts", f"{number:06d}"):
            found = best.get(episode["uid"])
            if episode["reward"] > least and (found is None or episode["reward"] > found[0]):
                best[episode["uid"]] = (episode["reward"], episode["turns"][0]["tokens"])
        for uid, one in best.items():
            if uid not in kept or one[0] >= kept[uid][0]:
                kept.pop(uid, None)
                kept[uid] = one
    return dict(list(kept.items())[-size:])


def test_the_best_answers_are_kept_and_learned_from(tmp_path):
    seen = run_loop(tmp_path / "run", *OWN)
    want = expected(tmp_path / "run", 4, 5, 0.1)
    assert len(want) == 5, "nothing was ever put out: the test shows less than it says"
    kept = kept_in(tmp_path / "run")
    assert [one["uid"] for one in kept] == list(want)
    for one in kept:
        ((tokens, targets, mask),) = one["rows"]
        assert one["reward"] == want[one["uid"]][0]
        assert [t for t, m in zip(targets, mask, strict=True) if m] == want[one["uid"]][1]
        assert tokens[1:] == targets[:-1]
    calls = [call for call in seen.ranks[0] if call.spec.name == "cross_entropy"]
    assert len(calls) == 3, "nothing is known in the first step"
    for number, call in enumerate(calls, start=1):
        known = expected(tmp_path / "run", number, 5, 0.1)
        assert len(call.rows) == min(3, len(known))
        for row in call.rows:
            assert row.targets[row.weights != 0].tolist() == known[row.name.removeprefix("success/")][1]
        weights = np.concatenate([row.weights for row in call.rows])
        assert weights.sum() == pytest.approx(0.5) and len(set(weights[weights != 0].tolist())) == 1
        record = seen.rl[number]
        assert record["self_imitation/loss:sum"] == pytest.approx(0.5 * record["self_imitation/nll:mean"], rel=1e-5)
        assert record["self_imitation/kept:max"] == len(known)
    assert "self_imitation/loss:sum" not in seen.rl[0]


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_what_was_kept(tmp_path):
    whole = run_loop(tmp_path / "whole", *OWN)
    run_loop(tmp_path / "parts", *OWN, "batch.num_steps=2")
    parts = run_loop(tmp_path / "parts", *OWN)
    for a, b in zip(whole.rl, parts.rl, strict=True):
        assert learned(a) == learned(b)
    assert kept_in(tmp_path / "whole") == kept_in(tmp_path / "parts")


@pytest.mark.ranks
@pytest.mark.slow
def test_two_ranks_keep_and_learn_the_same(tmp_path):
    one, two = (run_loop(tmp_path / str(n), *OWN, size=n) for n in (1, 2))
    kept = kept_in(tmp_path / "1")
    assert [(a["uid"], a["reward"]) for a in kept] == [(a["uid"], a["reward"]) for a in kept_in(tmp_path / "2")]
    for a, b in zip(one.rl[1:], two.rl[1:], strict=True):
        assert a["self_imitation/loss:sum"] == pytest.approx(b["self_imitation/loss:sum"], rel=1e-4)
        assert a["grad_norm:mean"] == pytest.approx(b["grad_norm:mean"], rel=1e-3)


def test_the_recipe_has_it():
    assert load_config(["algorithm=self_imitation"]).algorithm.self_imitation.coef > 0
