"""Layout invariance: parameters after 5 steps do not depend on ranks, micro-batches, strategy or packing.

The small model of benchmarks/layout_invariance.py, where the whole matrix runs on the default model.
"""

import sys
from pathlib import Path

import pytest
import torch
from gloo import run_ranks

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import layout_invariance as bench  # noqa: E402

LIMITS = {"float32": 1e-6, "float64": 1e-12}
# (strategy, budget, packing): between them every value of each, and the extremes together.
CHOSEN = {
    1: [("single", 4096, True), ("single", 96, False), ("fsdp", 96, True)],
    2: [("ddp", 96, True), ("ddp", 4096, False), ("fsdp", 4096, True), ("fsdp", 96, False)],
    4: [("ddp", 96, True), ("fsdp", 96, True), ("fsdp", 4096, False)],
}


def wanted(size, dtypes):
    return [bench.Layout(size, *one, dtype) for dtype in dtypes for one in CHOSEN[size]]


@pytest.mark.ranks
def test_parameters_do_not_depend_on_the_layout(tmp_path):
    for size in CHOSEN:
        run_ranks(size, bench.run_layouts, tmp_path, "small", wanted(size, LIMITS), timeout=200)
    for dtype, limit in LIMITS.items():
        names = [one.name for size in CHOSEN for one in wanted(size, [dtype])]
        pairs = bench.compare_all(tmp_path, names)
        assert len(pairs) == 45
        worst = max(pairs, key=lambda pair: pair["relative_l2"])
        assert worst["relative_l2"] < limit, worst
        assert worst["relative_l2"] > 0, "all bits equal: were these different layouts?"


def test_the_steps_are_of_the_kind_that_could_tell(monkeypatch):
    """Parameters move far more than the limit, ranks begin with unequal loads, rows are of many lengths."""
    layout = bench.Layout(1, "single", 4096, True, "float32")
    moved, losses = bench.train_one(layout, "small")
    monkeypatch.setattr(bench, "STEPS", 0)
    begun, _ = bench.train_one(layout, "small")
    assert bench.compare(moved, begun)[0] > 1e-3
    assert len(set(losses)) == 5
    rows = bench.rows_of(0, bench.World(0, 1, 0, torch.device("cpu")))
    assert sum(row.weights.sum() for row in rows) == pytest.approx(1.0)
    assert len({len(row.tokens) for row in rows}) > 10
    assert any(uneven(step, 4) for step in range(5)), "ranks are even already: no row would move"


def uneven(step, size):
    rows = bench.rows_of(step, bench.World(0, 1, 0, torch.device("cpu")))
    loads = [sum(len(r.tokens) for r in rows if int(r.name.split("/")[0]) % size == rank) for rank in range(size)]
    return max(loads) > 1.1 * sum(loads) / size
