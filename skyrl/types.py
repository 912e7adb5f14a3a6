"""The data that crosses a folder border, with shapes. No logic beyond checks; imports without torch.

Shape letters used in the whole project: P prompts, G samples of a prompt, D rows, S sequences in a pack, T packed
tokens, L length of one row, V vocabulary, H heads, K key/value heads, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Ints = np.ndarray  # int64, one dimension
Floats = np.ndarray  # float32 or float64, one dimension
Message = dict[str, Any]  # {"role": "user", "content": "..."}
Metrics = dict[str, float]  # the key ends in its reduction: "loss:sum", "ratio:mean", "length:max", "length:min"
StopReason = Literal["stop", "length", "aborted"]  # a stop rule or end of episode; token limit; cut short by us


def few(names: Sequence[Any], most: int = 4) -> str:
    """The first of some names for a person, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


class UserError(ValueError):
    """Something a person can fix: the message is one line with place, given value, allowed values and remedy."""

    exit_code = 2


class PassingError(UserError):
    """May pass by itself, as a hub's silence or a lost node's lock: it ends as faults do, so schedulers try again."""

    exit_code = 1


class RunError(RuntimeError):
    """A run that must not go on, such as one whose loss is not finite: the message is one line, no traceback needed."""


class StopRun(Exception):
    """The run was asked to stop: every rank leaves the loop at the same point. `exit_code` tells the launcher whether
    the same command should be started again (75) or a person wanted the end (130)."""

    def __init__(self, message: str = "", exit_code: int = 75) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Prompt:
    """One task given to an environment. `extra` is private to the environment (the answer, for example)."""

    uid: str
    env: str
    messages: list[Message]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Where it stands, for errors: "file:line" of its row, else its uid."""
        return str(self.extra.get("source") or f"prompt {self.uid}")


@dataclass(frozen=True)
class SamplingParams:
    """How to draw one sequence. Log-probabilities are those of softmax(logits / temperature), over all of V.

    temperature 0 means greedy (log-probabilities then at temperature 1). top_k 0, top_p 1, min_p 0 switch each cut
    off; the cuts change what is drawn, but the log-probabilities that are reported only with `processed_logprobs`:
    then they are of the softmax over what the cuts leave, which is recorded (`Sample.support`). `stop` strings and
    `stop_token_ids` end the sequence and stay in its tokens. `seed` keys the draws: position j of a request uses draw
    j of that seed, whatever else runs beside it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    processed_logprobs: bool = False

    @property
    def cuts(self) -> bool:
        """Whether some tokens may not be drawn; nothing changes for a greedy draw."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass(frozen=True)
class TokenSupport:
    """The tokens that could be drawn at each of L positions: `counts` [L] int32, 0 = all of V, and `ids` int32, those
    of all positions end to end."""

    counts: Ints
    ids: Ints


@dataclass(frozen=True)
class SampleRequest:
    """Draw one continuation of `tokens` [L]. Requests with equal tokens share their prefill."""

    uid: str
    tokens: Ints
    params: SamplingParams
    model: str = "policy"
    version: int | None = None  # None: the weights as they are now


@dataclass(frozen=True)
class Sample:
    """What was drawn: tokens and log-probabilities [L], stop tokens included, and the version of the weights."""

    uid: str
    tokens: Ints
    logprobs: Floats
    stop: StopReason
    version: int
    support: TokenSupport | None = None  # what could be drawn, where the log-probabilities are of nothing else
    experts: Ints | None = None  # int16 [context + L - 1, layers, k]: a mixture's choices, where they are recorded


@dataclass
class Turn:
    """One call of the sampler inside an episode. `context` [L] are the very ids the sampler was given.

    `reward` is the environment's number, or what its named `objectives` come to together; `scale`, if above |reward|,
    is how large the numbers are that it was summed from (algorithms.variance).
    """

    context: Ints
    sample: Sample
    reward: float = 0.0
    text: str = ""  # what the environment was given to read
    observed: list[Message] = field(default_factory=list)  # what was said to the model since the turn before
    objectives: dict[str, float] = field(default_factory=dict)
    scale: float = 0.0


@dataclass
class Episode:
    """A prompt played to its end. `reward` is the sum over turns; `invalid`: why it is no score (masked, counted).
    `done`: the environment ended it, not a limit. `baseline`: the reward of a greedy answer to its prompt, NaN where
    that has none; None where the advantage asks for no such answer. `position`: of its prompt in the stream."""

    prompt: Prompt
    index: int  # which of the G samples of its prompt
    turns: list[Turn]
    reward: float
    stop: StopReason
    metrics: Metrics = field(default_factory=dict)
    invalid: str = ""  # why the reward is not a score; "" when it is one
    seed: int = 0  # that the environment's reset was given, if it takes one
    calls: Metrics = field(default_factory=dict)  # what had to be done beside plain calls: retries, replays, ...
    done: bool = False
    baseline: float | None = None
    position: int = 0

    @property
    def objectives(self) -> dict[str, float]:
        """The sum over turns of each named objective; {} where rewards are plain numbers."""
        names = dict.fromkeys(name for turn in self.turns for name in turn.objectives)
        return {name: math.fsum(turn.objectives.get(name, 0.0) for turn in self.turns) for name in names}


ROW_FIELDS = (
    "targets weights sampling_logprobs advantages old_logprobs reference values returns clip_low clip_high "
    "ratio_mask selected".split()
)  # arrays of a row besides its tokens, one entry per token


@dataclass
class Datum:
    """One trainable row, already shifted: targets[i] is the token after tokens[i]. All arrays are [L].

    `weights` is mask and reduction in one: 0 means not trained. `sampling_logprobs` are under the policy that
    sampled (behaviour), `old_logprobs` under the proximal policy (in its place `sampling_logprobs`), `reference` under
    the frozen model.
    For cross-entropy and scores `targets` and `weights` may both be [L, K]: K targets at each position.
    `clip_low` and `clip_high` are the losses' parameters of these names, one per token; they win over the parameters.
    `ratio_mask`: the tokens (not 0) whose log-ratios make up GSPO's sequence mean; without it the trained ones.
    `support`: log-probabilities, entropy and gradient of each position are those of the softmax over these tokens.
    `selected`: the tokens (not 0) that clip_cov and kl_cov treat otherwise (algorithms.selection).
    `experts` [L, layers, k] int16: the experts that each token goes to, -1 = those that the routers choose.
    """

    tokens: Ints
    targets: Ints
    weights: Floats
    model: str = "policy"
    sampling_logprobs: Floats | None = None
    advantages: Floats | None = None
    old_logprobs: Floats | None = None
    reference: Floats | None = None
    values: Floats | None = None
    returns: Floats | None = None
    name: str = ""  # names the row in errors: "uid/sample/turn"
    clip_low: Floats | None = None
    clip_high: Floats | None = None
    ratio_mask: Floats | None = None
    support: TokenSupport | None = None
    selected: Floats | None = None
    experts: Ints | None = None

    def __post_init__(self) -> None:
        length = len(self.tokens)
        assert self.support is None or len(self.support.counts) == length
        assert self.experts is None or len(self.experts) == length
        for key in ROW_FIELDS:
            value = getattr(self, key)
            if value is not None and len(value) != length:
                raise UserError(f"row {self.name or '?'}: {key} has {len(value)} entries, tokens has {length}")
        shapes = np.shape(self.targets), np.shape(self.weights)
        if shapes[0] != shapes[1] or len(shapes[0]) not in (1, 2):
            raise UserError(
                f"row {self.name or '?'}: targets have shape {list(shapes[0])} and weights {list(shapes[1])}; give "
                "both as [L], or both as [L, K]"
            )
        if length == 0:
            raise UserError(f"row {self.name or '?'}: empty")


@dataclass
class Microbatch:
    """Rows packed end to end: T tokens of S sequences. `starts_S1` [S+1] int32 are the borders, `lengths` their
    differences as numbers, `row_T` [T] int64 the sequence of each token. Optional fields are None when no row of the
    batch has them; float tensors have the dtype of the loss (float32, or float64 for a float64 model). `targets_T` and
    `weights_T` are [T, K] when any row has several targets; cells that a row lacks are target 0 with weight 0.
    `experts_TLK` int16 are the experts of each token by layer, -1 = free. The last fields are indices, int64: of
    beginnings that rows share (algorithms.prefixes), and `support_2N`, a token and an entry of the vocabulary that its
    softmax is over (tokens without any: over all of it)."""

    tokens_T: Tensor
    targets_T: Tensor
    positions_T: Tensor
    row_T: Tensor
    starts_S1: Tensor
    lengths: tuple[int, ...]
    weights_T: Tensor
    sampling_logprobs_T: Tensor | None = None
    advantages_T: Tensor | None = None
    old_logprobs_T: Tensor | None = None
    reference_T: Tensor | None = None
    values_T: Tensor | None = None
    returns_T: Tensor | None = None
    clip_low_T: Tensor | None = None
    clip_high_T: Tensor | None = None
    ratio_mask_T: Tensor | None = None
    selected_T: Tensor | None = None
    experts_TLK: Tensor | None = None
    distinct_U: Tensor | None = None
    place_T: Tensor | None = None
    scored_P: Tensor | None = None
    pair_T: Tensor | None = None
    support_2N: Tensor | None = None

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)


@dataclass
class ForwardOutput:
    """What a model says about a Microbatch: log pi(target) in nats, entropy in nats, values; each [T], loss dtype.
    logprobs_T is [T, K] for targets [T, K]."""

    logprobs_T: Tensor
    entropy_T: Tensor | None = None
    values_T: Tensor | None = None


@dataclass(frozen=True)
class LossSpec:
    """A loss by name (algorithms.losses.LOSSES) and every number it needs.

    loss_T = policy_T * correction_T + kl_coef * kl_T - entropy_coef * entropy_T, then weighted and summed.
    `params` are the keyword arguments of the named loss. `correction` is algorithms.corrections.CORRECTIONS' name for
    the sampler/trainer mismatch, between `correction_low` and `correction_cap`, times `correction_scale`. `temperature`
    is the one the rows were sampled at. `router_aux_coef` times how unevenly each row uses a mixture's experts
    (models.experts) is added, with the sum of the row's weights.
    """

    name: str
    params: dict[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    correction: str = "none"
    correction_cap: float = 2.0
    correction_low: float = 0.0
    correction_scale: float = 1.0
    router_aux_coef: float = 0.0


@dataclass(frozen=True)
class AdamParams:
    """One AdamW step. grad_clip_norm 0 means no clipping. Weight decay is decoupled: p -= lr * weight_decay * p.
    `momentum` is Muon's, of whatever it steps."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    momentum: float = 0.95


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters: W + alpha / rank * B A, with A [rank, in] and B [out, rank]. Which products are adapted:
    attention's, the feed-forward ones, the output embedding. Initial values depend on `seed` and names alone.

    Raises UserError for a rank below 1, an alpha that is not above 0, or nothing to adapt.
    """

    rank: int
    alpha: float = 32.0
    seed: int = 0
    mlp: bool = True
    attn: bool = True
    unembed: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora.rank={self.rank}: must be at least 1")
        if not self.alpha > 0:
            raise UserError(f"lora.alpha={self.alpha}: must be above 0")
        if not (self.mlp or self.attn or self.unembed):
            raise UserError("lora: mlp, attn and unembed are all false; set at least one of them to true")


@dataclass
class TrainOutput:
    """logprobs: one [L] (or [L, K]) array per row given, in that order; metrics: the same on every rank; losses: the
    weighted sum of each row's losses, summed in float64 (none from a score)."""

    logprobs: list[Floats]
    metrics: Metrics
    values: list[Floats] | None = None
    losses: list[float] = field(default_factory=list)
