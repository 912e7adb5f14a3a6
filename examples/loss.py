"""A loss of your own, with a parameter of its own: importance sampling whose weight is capped.

    python -m skyrl.train plugins=[examples.loss] algorithm.loss.name=capped algorithm.loss.params.cap=1.5

A loss gets packed tokens and returns one number a token; it takes no mean. Weights, mask and reduction
(algorithm.loss.reduction) are applied by the engine, so a loss is right on any number of ranks.
"""

from typing import Any

from skyrl.api import Loss, Param

CAPPED = Loss(
    "capped",
    needs=("advantages", "sampling_logprobs"),
    params={"cap": Param(2.0, "Largest weight of a token, as in truncated importance sampling", low=1.0)},
    ratio=True,
)


@CAPPED
def capped(outputs: Any, rows: Any, *, cap: float) -> tuple[Any, dict[str, Any]]:
    """-min(r, cap) A log pi, where r = pi / (the policy that sampled) carries no gradient.

    The metrics' names end in how they are reduced over trained tokens.
    """
    ratio_T = (outputs.logprobs_T - rows.sampling_logprobs_T).detach().exp()
    loss_T = -ratio_T.clamp(max=cap) * rows.advantages_T * outputs.logprobs_T
    return loss_T, {"capped:mean": (ratio_T > cap).to(ratio_T.dtype)}
