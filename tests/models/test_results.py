"""What micro-batches gave reaches the host in one piece each."""

from collections import Counter

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from skyrl.models.packed import collate
from skyrl.models.results import RowResults
from skyrl.types import Datum


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def test_metrics_are_read_together():
    """A number that is read alone makes the host wait for a GPU once more."""
    rows = [Datum(np.arange(n), np.arange(n), np.arange(n) > 1) for n in (4, 3, 5)]
    results, values = RowResults(rows), torch.arange(1.0, 8.0)
    for picked in ([0, 1], [2]):
        batch = collate([rows[i] for i in picked], torch.float32, "cpu")
        mine = values[: len(batch.weights_T)]
        results.add_output(picked, mine)
        results.add_loss((mine * batch.weights_T).sum(), mine, {"x:mean": mine, "y:max": mine, "z:min": mine}, batch)
    with Operators() as operators:
        found = results.metrics().values
    assert not operators.counts[torch.ops.aten._local_scalar_dense.default]
    trained = [3.0, 4.0, 7.0, 3.0, 4.0, 5.0]
    assert found == {
        "loss:sum": (sum(trained), 1.0), "trained_tokens:sum": (6.0, 1.0), "x:mean": (sum(trained), 6.0),
        "y:max": (7.0, 1.0), "z:min": (3.0, 1.0),
    }  # fmt: skip
    untrained = RowResults(rows[:1])
    batch = collate([Datum(np.arange(2), np.arange(2), np.zeros(2))], torch.float32, "cpu")
    untrained.add_output([0], batch.weights_T)
    untrained.add_loss(batch.weights_T.sum(), batch.weights_T, {"x:mean": batch.weights_T}, batch)
    assert untrained.metrics().values == {"loss:sum": (0.0, 1.0), "trained_tokens:sum": (0.0, 1.0)}
    assert RowResults([]).metrics().values == {}
