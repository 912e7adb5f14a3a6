"""A policy that is served and trained by the same ranks: real requests, real votes, real steps."""

from unittest import mock

import pytest
from loop import train_here
from users import live_config, served, taken

from skyrl.checkpoint.folder import latest
from skyrl.config.load import load_config
from skyrl.config.validation import check
from skyrl.run_dir import read_metrics
from skyrl.trainers import live, rl
from skyrl.types import UserError


def test_a_killed_trainer_takes_the_same_rows_again_and_none_twice(tmp_path):
    cfg = live_config(tmp_path, "batch.num_steps=3", "checkpoint.every_steps=2")
    steps, real = [], rl.count_flops

    def die_in_step_3(*args):
        steps.append(0)
        if len(steps) == 3:  # its update is made; the newest checkpoint is that of step 2
            raise RuntimeError("killed")
        real(*args)

    with mock.patch.object(rl, "count_flops", die_in_step_3), pytest.raises(RuntimeError, match="killed"):
        served(cfg)
    before = taken(tmp_path, (1, 2, 3))
    assert [len(step) for step in before] == [4, 4, 4] and latest(tmp_path / "checkpoints").tag == "000002"
    calls = train_here(cfg)  # nobody asks any more: only what was taken can be learned from
    assert sorted(row.name for row in calls[0].rows) == sorted(f"{episode}/0/0" for episode, _ in before[2])
    assert taken(tmp_path, (1, 2, 3)) == before and len(calls) == 1
    assert len({episode for step in before for episode, _ in step}) == 12
    for index, step in enumerate(before):  # answers are of the newest weights, or of those just before
        assert all(index - 1 <= version <= index for _, version in step) and step[-1][1] == index
    records = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["step"] > 0]
    assert [record["feedback/taken:sum"] for record in records] == [4, 8, 12]
    assert all(record["feedback/versions_behind:max"] <= 1 for record in records)


def test_options_of_a_server_are_for_a_run_that_serves(tmp_path):
    for overrides, words in (
        (["service.port=1"], "with feedback.enabled=true"),
        (["feedback.max_versions=3"], "with feedback.enabled=true"),
        (["env.name=feedback"], "env.name=feedback: has no prompts; set feedback.enabled=true"),
        (
            ["experiment=live_feedback", "algorithm.filters.zero_variance=true", "batch.samples_per_prompt=2"],
            "not sampled again",
        ),
        (["experiment=live_feedback", "feedback.max_share=1.5"], "must lie between 0 and 1"),
        (["experiment=live_feedback", "feedback.rate_per_minute=0"], "must be at least 1"),
        (["experiment=live_feedback", "service.aliases={other: some/path}"], "this server has one model"),
        (["service.max_models=3"], "service.max_models: skyrl.train does not read it"),
    ):
        with pytest.raises(UserError, match=words):
            check(load_config(overrides))
    check(load_config(["experiment=live_feedback"]))
    with pytest.raises(UserError, match="others could use this server without a key"):
        live.train_live(live_config(tmp_path, "service.host=0.0.0.0"))
