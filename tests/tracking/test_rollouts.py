"""Dumped episodes: exact, atomic, and enough to recompute what was logged."""

import json
import math
import os

import numpy as np
import pytest

from benchmarks.recompute_metrics import recompute_metrics
from skyrl.run_dir import dumps, read_rollouts
from skyrl.tracking.rollouts import show_rollouts, write_rollouts
from skyrl.types import Episode, Prompt, Sample, Turn, UserError


class Letters:
    def decode(self, token_ids, **options):
        assert options == {"skip_special_tokens": False}
        return "".join(chr(token) for token in token_ids)


def episode(uid, index, answers, rewards, **options):
    turns, context = [], [ord(c) for c in "Q:"]
    for answer, reward in zip(answers, rewards, strict=True):
        tokens = np.array([ord(c) for c in answer])
        logprobs = np.linspace(-1, -1 / 3, len(tokens)).astype(np.float32)
        turns.append(Turn(np.array(context), Sample(uid, tokens, logprobs, "stop", 3), reward))
        context = context + list(tokens) + [ord("\n")]
    settings = dict(stop="stop", metrics={}, invalid="")
    return Episode(Prompt(uid, "toy", []), index, turns, sum(rewards), **{**settings, **options})


def groups():
    return [
        [episode("a", 0, ["12", "3é"], [0.0, 1.0]), episode("a", 1, ["4444"], [0.0], stop="length")],
        [episode("b", 0, ["5"], [1.0], metrics={"correct:mean": 0.0}), episode("b", 1, ["6"], [9.0], invalid="broke")],
    ]


def test_every_token_and_number_comes_back(tmp_path):
    path = write_rollouts(tmp_path / "rollouts", "000007", groups(), Letters(), rank=0)
    assert path.name == "000007-r0.jsonl" and sorted(os.listdir(path.parent)) == [path.name, "tokens-r0.json"]
    sampled = json.loads((path.parent / "tokens-r0.json").read_text())
    assert {int(token): text for token, text in sampled.items()} == {ord(letter): letter for letter in "123é456"}
    episodes = list(read_rollouts(tmp_path / "rollouts", "000007"))
    assert [(e["uid"], e["index"]) for e in episodes] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    for line, given in zip(episodes, [e for group in groups() for e in group], strict=True):
        assert (line["reward"], line["stop"], line["invalid"]) == (given.reward, given.stop, given.invalid)
        for turn, original in zip(line["turns"], given.turns, strict=True):
            assert turn["tokens"] == original.sample.tokens.tolist() and turn["context"] == original.context.tolist()
            assert np.array_equal(np.float32(turn["logprobs"]), original.sample.logprobs)
            assert turn["text"] == Letters().decode(turn["tokens"], skip_special_tokens=False)
            assert turn["version"] == 3
    assert episodes[0]["turns"][1]["context_text"] == "Q:12\n" and episodes[0]["turns"][1]["text"] == "3é"


def test_lines_say_what_was_expected_and_are_shown_in_the_terminal(tmp_path):
    one = episode("a", 0, ["12", "3"], [0.0, 1.0])
    one.prompt.extra.update({"answer": 7, "rubric": {"a": float("nan")}, "seen": {1, 2}})
    write_rollouts(tmp_path, "000002", [[one]], Letters(), rank=0)
    write_rollouts(tmp_path, "eval-000002", groups(), Letters(), rank=0)
    (line,) = read_rollouts(tmp_path, "000002")
    assert line["expected"] == 7 and line["extra"]["rubric"] == {"a": "nan"} and line["extra"]["seen"] == "{1, 2}"
    assert dumps(tmp_path) == ["000002", "eval-000002"]
    text = show_rollouts(tmp_path, "000002", 4)
    assert "reward 1, ended by" in text and text.count("--- drawn") == 2 and text.endswith("--- expected\n7")
    assert show_rollouts(tmp_path, "eval-000002", 2).count("========") == 2


def test_parts_of_ranks_are_read_in_order_and_kinds_stay_apart(tmp_path):
    for rank in range(11):
        write_rollouts(tmp_path, "000010", [[episode(str(rank), 0, ["1"], [0.0])]], Letters(), rank=rank)
    write_rollouts(tmp_path, "eval-000010", groups(), Letters(), rank=0)
    assert [e["uid"] for e in read_rollouts(tmp_path, "000010")] == [str(rank) for rank in range(11)]
    assert len(list(read_rollouts(tmp_path, "eval-000010"))) == 4 and not list(read_rollouts(tmp_path, "000011"))


def test_recomputed_metrics_by_hand(tmp_path):
    write_rollouts(tmp_path, "000001", groups(), Letters(), rank=0)
    assert recompute_metrics(list(read_rollouts(tmp_path, "000001"))) == {
        "episodes:sum": 4,
        "invalid:sum": 1,
        "sampled_tokens:sum": 10,
        "length:mean": 2.5,
        "length:max": 4,
        "cut_by_length:mean": 0.25,
        "turns:mean": 1.25,
        "reward:mean": 2 / 3,
        "accuracy:mean": 1 / 3,
    }
    assert recompute_metrics([]) == {"episodes:sum": 0, "invalid:sum": 0, "sampled_tokens:sum": 0}


def test_reward_that_is_no_number_is_still_json(tmp_path):
    write_rollouts(tmp_path, "000001", [[episode("a", 0, ["1"], [math.nan], invalid="nan")]], Letters(), rank=0)
    (line,) = read_rollouts(tmp_path, "000001")
    assert line["reward"] == "nan"


def test_trouble_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_rollouts(tmp_path, "000001", groups(), Letters(), rank=0)
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device.*tracking.rollouts_every=0"):
        write_rollouts(tmp_path, "000001", [], Letters(), rank=0)
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == [path.name, "tokens-r0.json"]
