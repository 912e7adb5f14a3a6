"""What micro-batches gave, collected on the device and put back into rows: one transfer at the end of a call."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from skyrl.distributed.collectives import MetricSums
from skyrl.types import Datum, Floats, Microbatch


class RowResults:
    """Log-probabilities (or values), losses and metrics of one call's rows, in any order of micro-batches. `columns`:
    of the outputs, where these are not shaped as the targets; 0 = they are."""

    def __init__(self, rows: list[Datum], columns: int = 0) -> None:
        self.rows, self.columns = rows, columns
        self._picked: list[list[int]] = []
        self._outputs: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._totals: list[Tensor] = []
        self._trained: list[Tensor] = []
        self._sums: dict[str, list[Tensor]] = {}

    def add_output(self, picked: list[int], output: Tensor) -> None:
        """Adds what the model said about the micro-batch of the rows `picked`: [T] or [T, K]."""
        self._picked.append(picked)
        self._outputs.append(output.detach())

    def add_loss(self, total: Tensor, loss: Tensor, metrics: dict[str, Tensor], batch: Microbatch) -> None:
        """Adds the losses of the micro-batch whose output was added last; shapes as the weights'."""
        trained = batch.weights_T != 0
        weighted = loss.detach().double() * batch.weights_T.double()
        self._losses.append(weighted if weighted.ndim == 1 else weighted.sum(1))
        self._totals.append(total.detach())
        self._trained.append(trained.sum())
        for key, value in metrics.items():
            kept = torch.where(trained, value.detach(), {"max": -math.inf, "min": math.inf}.get(_kind(key), 0.0))
            self._sums.setdefault(key, []).append(_reduced(kept, key))

    def outputs(self) -> list[Floats]:
        """One array for each row, in the order of the rows, shaped as its targets."""
        out: list[np.ndarray] = [np.empty(0)] * len(self.rows)
        flat, start = _numbers([one.reshape(-1) for one in self._outputs]), 0
        for picked, output in zip(self._picked, self._outputs, strict=True):
            whole = flat[start : start + output.numel()].reshape(tuple(output.shape))
            start += output.numel()
            for index, (first, last) in zip(picked, self._spans(picked), strict=True):
                part = whole[first:last]
                if part.ndim == 2 and not self.columns:  # other rows of the micro-batch may have more targets
                    shape = self.rows[index].targets.shape
                    part = part[:, : shape[1]] if len(shape) == 2 else part[:, 0]
                out[index] = part
        return out

    def losses(self) -> list[float]:
        """The weighted sum of each row's losses, in float64 and in the order of its tokens; [] without a loss."""
        if len(self._losses) < len(self._picked):
            return []
        out = [0.0] * len(self.rows)
        flat, start = _numbers(self._losses), 0
        for picked, losses in zip(self._picked, self._losses, strict=True):
            for index, (first, last) in zip(picked, self._spans(picked), strict=True):
                out[index] = float(flat[start + first : start + last].sum())
            start += len(losses)
        return out

    def not_finite(self) -> list[str]:
        """The names of the rows in micro-batches whose loss is not finite."""
        finite = [math.isfinite(x) for x in torch.stack(self._totals).tolist()] if self._totals else []
        bad = [picked for picked, fine in zip(self._picked, finite, strict=False) if not fine]
        return [self.rows[index].name or "?" for picked in bad for index in picked]

    def metrics(self) -> MetricSums:
        """This rank's metrics of the loss."""
        out = MetricSums()
        if not self._totals:
            return out
        always = {"loss:sum": self._totals, "trained_tokens:sum": self._trained}  # also where no token was trained
        sums = {key: _reduced(torch.stack(parts).double(), key) for key, parts in {**always, **self._sums}.items()}
        values = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
        trained = values["trained_tokens:sum"]
        for key in values if trained else always:
            out.add(key, values[key], trained if _kind(key) == "mean" else 1.0)
        return out

    def _spans(self, picked: list[int]) -> list[tuple[int, int]]:
        return list(pairwise(accumulate((len(self.rows[index].tokens) for index in picked), initial=0)))


def _kind(key: str) -> str:
    return key.rpartition(":")[2]


def _reduced(values: Tensor, key: str) -> Tensor:
    """One number of many, by the reduction in a metric's key; a mean is divided at the very end."""
    return {"max": values.max, "min": values.min}.get(_kind(key), values.sum)()


def _numbers(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).cpu().numpy() if parts else np.empty(0)
