"""The cache of columns holds what the lines say, whatever happens to the file and to the process."""

import json

import numpy as np
import pytest

from skyrl.dashboard import columns
from skyrl.dashboard.columns import Columns, mean_and_spread, thin
from skyrl.run_dir import RunReader
from skyrl.types import UserError


def write(run, records, mode="a"):
    with open(run / "metrics.jsonl", mode) as stream:
        stream.writelines(json.dumps(one) + "\n" for one in records)


def made(start, end, **more):
    return [{"step": i, "phase": "sft" if i < 4 else "rl", f"m{i % 3}": i * 0.5, **more} for i in range(start, end)]


def expected(records, name):
    return np.array([record.get(name, np.nan) for record in records], float)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(columns, "BLOCK_ROWS", 8)
    monkeypatch.setattr(columns, "CHUNK_BYTES", 300)


@pytest.mark.parametrize("stored", [True, False])
def test_columns_are_the_records_in_blocks_and_in_the_tail_and_after_a_restart(tmp_path, stored):
    records = made(0, 30)
    write(tmp_path, records)
    store = tmp_path / "cache" if stored else None
    if store:
        store.mkdir()
    one = Columns(RunReader(tmp_path), "metrics.jsonl", store=store)
    one.update_all()
    records += made(30, 37, late=1.0)  # a metric that comes late
    write(tmp_path, records[30:])
    one.update_all()
    state = json.loads(json.dumps(one.state()))
    assert bool(state["blocks"]) == stored
    again = Columns(RunReader(tmp_path), "metrics.jsonl", store=store, state=state)
    again.update_all()
    for found in (one, again):
        assert found.rows == len(records)
        for name in ("step", "m0", "m1", "m2", "late"):
            assert np.array_equal(found.get(name), expected(records, name), equal_nan=True), name
        assert found.last("late") == 1.0 and found.last("m0") == 18.0 and found.last("nothing") is None
        steps, values = found.series("m1")
        assert steps.tolist() == [i for i in range(37) if i % 3 == 1] and values[0] == 0.5


def test_a_file_that_was_cut_back_and_grew_again_is_read_anew(tmp_path):
    store = tmp_path / "cache"
    store.mkdir()
    write(tmp_path, made(0, 20))
    one = Columns(RunReader(tmp_path), "metrics.jsonl", store=store)
    one.update_all()
    stale = one.state()
    resumed = made(0, 10) + made(10, 40, other=2.0)
    write(tmp_path, resumed, mode="w")
    one.update_all()
    restarted = Columns(RunReader(tmp_path), "metrics.jsonl", store=store, state=stale)
    restarted.update_all()
    for found in (one, restarted):
        assert np.array_equal(found.get("other"), expected(resumed, "other"), equal_nan=True)
        assert found.get("step").tolist() == list(range(40))
    assert len(list(store.iterdir())) <= 2  # blocks of the file that is no more are gone


def test_a_torn_last_line_waits_and_a_damaged_one_is_told(tmp_path):
    write(tmp_path, made(0, 3))
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 3, "phase": "rl", "m0"')
    one = Columns(RunReader(tmp_path), "metrics.jsonl")
    one.update_all()
    assert one.rows == 3
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write(": 7.0}\n")
    one.update_all()
    assert one.rows == 4 and one.last("m0") == 7.0
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write("no record\n")
    with pytest.raises(UserError, match="not a record of metrics"):
        one.update_all()
    assert one.rows == 4


def test_a_process_that_may_not_write_reads_what_another_one_stored(tmp_path):
    store = tmp_path / "cache"
    store.mkdir()
    write(tmp_path, made(0, 20))
    writer = Columns(RunReader(tmp_path), "metrics.jsonl", store=store)
    writer.update_all()
    reader = Columns(RunReader(tmp_path), "metrics.jsonl", store=store, writable=False, state=writer.state())
    before = {path: path.stat().st_size for path in store.iterdir()}
    write(tmp_path, made(20, 60))
    reader.update_all()
    assert reader.get("step").tolist() == list(range(60))
    assert {path: path.stat().st_size for path in store.iterdir()} == before
    writer.drop_store()  # begun anew by the one that writes
    assert reader.get("step").tolist() == list(range(60))


def test_sums_hold_over_restarts_and_tails_that_are_dropped(tmp_path):
    store = tmp_path / "cache"
    store.mkdir()
    write(tmp_path, [{"step": i, "phase": "rl", "sampled_tokens:sum": 10} for i in range(11)])
    one = Columns(RunReader(tmp_path), "metrics.jsonl", store=store)
    one.update_all()
    one.drop_tail()
    one.update_all()
    assert one.sum("sampled_tokens:sum") == 110
    again = Columns(RunReader(tmp_path), "metrics.jsonl", store=store, state=one.state())
    again.update_all()
    assert again.sum("sampled_tokens:sum") == 110


def test_thinned_values_keep_every_peak_the_order_and_the_ends():
    values = np.sin(np.arange(100_000) / 3000)
    values[[7, 51_234, 99_998]] = [9.0, -9.0, 8.0]
    kept = thin(values, 800)
    assert len(kept) <= 802 and (np.diff(kept) > 0).all() and kept[0] == 0 and kept[-1] == 99_999
    assert {7, 51_234, 99_998} <= set(kept.tolist())
    assert thin(values[:500], 800).tolist() == list(range(500))


def test_mean_and_spread_over_seeds_of_unequal_length():
    first, second = (np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 2.0])), (np.array([1.0, 2.0]), np.array([2.0, 5.0]))
    steps, mean, spread = mean_and_spread([first, second])
    assert steps.tolist() == [1, 2, 3] and mean.tolist() == [1.0, 3.0, 2.0]
    assert np.allclose(spread[:2], [np.std([0, 2], ddof=1), np.std([1, 5], ddof=1)]) and np.isnan(spread[2])
    gap = (np.array([1.0, 3.0]), np.array([4.0, 6.0]))  # one that has another step
    steps, mean, spread = mean_and_spread([first, gap])
    assert steps.tolist() == [1, 2, 3] and mean.tolist() == [2.0, 1.0, 4.0] and np.isnan(spread).tolist() == [0, 1, 0]
