"""What a loss or an advantage says about itself, as an object that decorates its function. No torch.

    DRO = Loss("dro", needs=("sampling_logprobs", "advantages"), params={"beta": Param(0.05, "Pull to the base")},
               ratio=True, paper="2405.19107")

    @DRO
    def dro(outputs, rows, *, beta): ...

The declaration is the only place that knows the parameters, their ranges and what the rows must hold. Read by: the
rules between options (`algorithm.loss.params.beta`), --help and docs/options.md, the Tinker server, docs/papers.md
(checked) and the engine. A plugin's declaration is read like one of ours.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from skyrl.registry import Registry
from skyrl.types import ROW_FIELDS, UserError

MAY_NEED = tuple(name for name in ROW_FIELDS if name not in ("targets", "weights"))


@dataclass(frozen=True)
class Param:
    """A number that a loss or advantage takes: default, what it does, and the closed range that it lies in. `whole`:
    only whole numbers. `wire`: whether clients of a server may set it."""

    default: float
    doc: str
    low: float = 0.0
    high: float = math.inf
    whole: bool = False
    wire: bool = True

    @property
    def allowed(self) -> str:
        """The range in words."""
        text = f"{self.low:g} or more" if math.isinf(self.high) else f"{self.low:g} to {self.high:g}"
        return f"whole numbers, {text}" if self.whole else text

    def fits(self, value: float) -> bool:
        """Whether `value` is finite and in the range."""
        return math.isfinite(value) and self.low <= value <= self.high and not (self.whole and value % 1)


@dataclass(frozen=True)
class Wire:
    """How clients of the Tinker protocol give what a loss takes, where that differs from the declaration.

    `thresholds`: clip_low and clip_high are absolute bounds of the ratio there, called clip_low_threshold and
    clip_high_threshold, with these defaults, and may be given per token as well. `optional`: further inputs of a
    datum. `all_tokens`: tokens whose advantage is 0 have a loss too.
    """

    thresholds: tuple[float, float] | None = None
    optional: tuple[str, ...] = ()
    all_tokens: bool = False


Rule = Callable[[Mapping[str, float], int], str]


@dataclass(eq=False)
class _Declared:
    """What a loss and an advantage have in common: a name, parameters, the function once it is there, and a `rule`:
    what is wrong with (its parameters together, the samples of a prompt), or ""."""

    name: str
    rule: Rule | None = field(default=None, kw_only=True)

    def defaults(self) -> dict[str, float]:
        """Every parameter with its default."""
        return {name: param.default for name, param in self.params.items()}  # type: ignore[attr-defined]

    def compute(self, *args: Any, params: Mapping[str, Any]) -> Any:
        """What the function returns for `args`; parameters that are not in `params` have their defaults."""
        return self.fn(*args, **{**self.defaults(), **params})

    def _take(self, kind: str, fn: Callable[..., Any], registry: Registry[Any]) -> None:
        params = self.params  # type: ignore[attr-defined]
        given = inspect.signature(fn).parameters.values()
        taken = {p.name for p in given if p.kind is p.KEYWORD_ONLY}
        rest = any(p.kind is p.VAR_KEYWORD for p in given)  # takes what it does not name, too
        if not taken <= set(params) or (taken != set(params) and not rest):
            raise UserError(
                f"{kind} {self.name!r}: declares the parameters {sorted(params)}, its function takes {sorted(taken)} "
                "after the *; make them equal"
            )
        self.fn = fn
        # The registry tells a re-imported thing from a second one of the same name by this attribute.
        self.__qualname__ = f"{fn.__module__}.{fn.__qualname__}"
        registry.register(self.name)(self)


@dataclass(eq=False)
class Loss(_Declared):
    """A loss: fn(outputs, rows, *, <params>) -> (loss of each token [T], metrics), see skyrl.algorithms.losses.

    needs: fields of a row that must be there; `old_logprobs` may stand in for `sampling_logprobs`. kind: "policy" (may
    have a correction, KL and entropy terms), "supervised" (KL and entropy), "critic" (neither). `ratio`: clips or
    weights by pi / base, so several updates of one batch are right. `ratio_mask`: reads the rows' mask of that name,
    and so log-probabilities at untrained tokens. `many`: also for targets [T, K]. `paper`: arXiv number. `wire`: None
    for a loss that clients of a server cannot ask for.
    """

    needs: tuple[str, ...] = ()
    params: dict[str, Param] = field(default_factory=dict)
    kind: Literal["policy", "supervised", "critic"] = "policy"
    ratio: bool = False
    ratio_mask: bool = False
    many: bool = False
    paper: str = ""
    wire: Wire | None = Wire()

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.needs) - set(MAY_NEED)):
            raise UserError(f"loss {self.name!r}: needs {unknown}; a loss may need: {', '.join(sorted(MAY_NEED))}")

    def __call__(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Takes the function that computes this loss, and registers it. Raises UserError for other parameters."""
        self._take("loss", fn, LOSSES)
        return fn

    def compute(self, *args: Any, params: Mapping[str, Any]) -> Any:
        """The same; what a loss of a plugin reports is "loss/<its name>", so that none is one of the loop's own.

        Raises UserError for a metric whose name does not end in its reduction."""
        loss_T, metrics = super().compute(*args, params=params)
        if self.fn.__module__.startswith("skyrl."):
            return loss_T, metrics
        for key in metrics:
            if not str(key).endswith((":mean", ":sum", ":max", ":min")):
                raise UserError(f"loss {self.name!r}: metric {key!r} must end in :mean, :sum, :max or :min")
        return loss_T, {f"loss/{key}": value for key, value in metrics.items()}


@dataclass(eq=False)
class Advantage(_Declared):
    """An advantage: fn(rows, all_reduce_sum, *, <params>) -> Advantages, see skyrl.algorithms.advantages.

    group: compares the samples of a prompt, so it needs at least 2. token_rewards: tells the rewards of an episode's
    tokens apart, so a KL penalty may be one of them. critic: needs a value model, and gives it returns.
    off_policy: weights by the policy's probabilities over the sampler's, so it needs both. greedy_baseline: needs the
    score of a greedy answer to each prompt.
    """

    params: dict[str, Param] = field(default_factory=dict)
    group: bool = False
    token_rewards: bool = False
    critic: bool = False
    off_policy: bool = False
    greedy_baseline: bool = False
    paper: str = ""

    def __call__(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Takes the function that computes this advantage, and registers it. Raises UserError for other parameters."""
        self._take("advantage", fn, ADVANTAGES)
        return fn


LOSSES: Registry[Loss] = Registry("loss")
ADVANTAGES: Registry[Advantage] = Registry("advantage")


def policy_losses() -> list[str]:
    """Names that algorithm.loss.name may have, sorted."""
    return sorted(loss.name for loss in LOSSES.things() if loss.kind == "policy")


def substitutes() -> list[str]:
    """Names of the losses that a server may compute in place of one that is not public, sorted: of advantages and the
    log-probabilities of sampling, and 0 where there is no advantage."""
    needs = {"advantages", "sampling_logprobs"}
    return sorted(
        loss.name for loss in LOSSES.things() if loss.wire and needs == set(loss.needs) and not loss.wire.all_tokens
    )
