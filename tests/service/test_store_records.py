"""Paths of checkpoints, times, and the JSON that clients read."""

from datetime import datetime, timedelta, timezone

import pytest

from skyrl.service.storage.records import (
    CheckpointPath,
    CheckpointRecord,
    ModelInfo,
    Page,
    TrainingRun,
    from_micros,
    parse_time,
    to_micros,
)
from skyrl.types import LoraSpec, UserError

NOW = datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=timezone.utc)
INFO = ModelInfo("org/name", LoraSpec(8, seed=3, unembed=False))


@pytest.mark.parametrize(
    "uri, parts",
    [
        ("tinker://s-1:train:0/weights/final", ("s-1:train:0", "weights", "final")),
        ("tinker://r/sampler_weights/a.b-c_d 1", ("r", "sampler_weights", "a.b-c_d 1")),
        ("tinker://r/external_weights/gr\u00f6\u00dfe", ("r", "external_weights", "gr\u00f6\u00dfe")),
        (f"tinker://r/weights/{'x' * 128}", ("r", "weights", "x" * 128)),
    ],
)
def test_good_paths(uri, parts):
    path = CheckpointPath.parse(uri)
    assert (path.run_id, path.kind, path.name) == parts
    assert path.uri == uri and CheckpointPath.of_id(path.run_id, path.checkpoint_id) == path


@pytest.mark.parametrize(
    "uri",
    [
        "", "tinker://", "http://r/weights/x", "TINKER://r/weights/x", "tinker://r/weights", "tinker://r/weights/",
        "tinker:///weights/x", "tinker://r//x", "tinker://r/weights/x/", "tinker://r/weights/a/b", "tinker://r/other/x",
        "tinker://r/weights/..", "tinker://../weights/x", "tinker://./weights/x", "tinker://r/weights/.v-1",
        "tinker://r/weights/a\\b", "tinker://r/weights/a\x00b", "tinker://r/weights/a\nb", "tinker://r/weights/a\x7f",
        "tinker://r/weights/\u202e", "tinker://r/weights/\ud800", "tinker://r/weights/\u00a0",
        f"tinker://r/weights/{'x' * 129}", "tinker://r/weights/" + "\U0001f600" * 64, "tinker://r/..weights/x",
        f"tinker://{'r' * 200}/weights/x", "tinker://r/weights/x\r", "tinker://r/weights/~\u2028",
    ],
)  # fmt: skip
def test_bad_paths(uri):
    with pytest.raises(UserError) as caught:
        CheckpointPath.parse(uri)
    text = str(caught.value)
    assert "\n" not in text and text.isascii() and len(text) < 500


def test_a_path_made_from_parts_is_checked_too():
    for parts in [("r", "weights", "../x"), ("r", "weights", "a/b"), ("a/b", "weights", "x"), ("r", "..", "x")]:
        with pytest.raises(UserError):
            CheckpointPath(*parts)


def test_times_are_exact_to_the_microsecond():
    assert from_micros(to_micros(NOW)) == NOW
    assert to_micros(NOW.astimezone(timezone(timedelta(hours=5, minutes=30)))) == to_micros(NOW)
    for text in ("2026-01-31T12:00:00.123456Z", "2026-01-31T12:00:00.123456+00:00", "2026-01-31T13:00:00.123456+01:00"):
        assert parse_time(text) == to_micros(NOW)
    # of no year that Python has in UTC: earlier and later than all others
    assert parse_time("0001-01-01T00:00:00+23:59") < to_micros(NOW) < parse_time("9999-12-31T23:59:59-23:59")
    for text in ("2026-01-31T12:00:00", "yesterday", "", "Z"):
        with pytest.raises(UserError, match="time"):
            parse_time(text)


def make_checkpoint(**changes):
    fields = dict(
        path=CheckpointPath("s:train:0", "weights", "final"), owner="a", version="v", created_at=NOW, size_bytes=10,
        public=False, expires_at=None, user_metadata={}, info=INFO, has_optimizer=True,
    )  # fmt: skip
    return CheckpointRecord(**{**fields, **changes})


def test_json_has_the_protocol_s_names_and_no_nulls():
    checkpoint = make_checkpoint()
    assert checkpoint.to_json() == {
        "checkpoint_id": "weights/final",
        "checkpoint_type": "training",
        "time": "2026-01-31T12:00:00.123456+00:00",
        "tinker_path": "tinker://s:train:0/weights/final",
        "size_bytes": 10,
        "public": False,
        "user_metadata": {},
        "base_model": "org/name",
    }
    assert make_checkpoint(expires_at=NOW).to_json()["expires_at"] == "2026-01-31T12:00:00.123456+00:00"
    run = TrainingRun("s:train:0", "s", "a", INFO, {"k": "v"}, NOW, NOW, "lost", last_checkpoint=checkpoint)
    assert run.to_json() == {
        "training_run_id": "s:train:0",
        "base_model": "org/name",
        "model_owner": "a",
        "is_lora": True,
        "corrupted": True,
        "lora_rank": 8,
        "last_request_time": "2026-01-31T12:00:00.123456+00:00",
        "last_checkpoint": checkpoint.to_json(),
        "user_metadata": {"k": "v"},
    }
    assert INFO.to_json() == {
        "base_model": "org/name",
        "is_lora": True,
        "lora_rank": 8,
        "train_unembed": False,
        "train_mlp": True,
        "train_attn": True,
        "optimizer_config": {"type": "adamw"},
    }
    whole = ModelInfo("org/name")
    assert whole.to_json() == {"base_model": "org/name", "is_lora": False, "optimizer_config": {"type": "adamw"}}
    assert ModelInfo.parse(whole.dump()) == whole and ModelInfo.parse(INFO.dump()) == INFO
    assert Page([1], 2, 1, 9).cursor() == {"offset": 2, "limit": 1, "total_count": 9}
