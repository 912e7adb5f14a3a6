"""What one request may ask for, and how much may be under way: bounds on memory, known before any command is sent.

Estimates are worst cases in bytes, of arrays that the answer holds; what a command needs beside them is bounded by the
scorer's and the sampler's own budgets.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

from skyrl.service.messages import RequestFailed, SamplingRequest, TrainRequest

ANSWER_BYTES = 256 << 20  # of one request
FLIGHT_BYTES = 1 << 30  # of all requests that draw or are scored; more wait for their turn
SCORE_TOKENS, SCORE_BYTES = 65536, 256 << 20  # of one scoring command on each rank
STOP_CHARACTERS = 4096  # of all stop strings of a request: each is looked for after each token
WIDE_TARGETS = 1 << 23  # targets of a row in all, and of a micro-batch that is as wide as its widest row
CELL = 8  # bytes of a token with its log-probability in a table
T = TypeVar("T")


def answer_bytes(query: SamplingRequest, max_tokens: int) -> int:
    """What the answer to a sample can take."""
    prompt = len(query.prompt)
    drawn = query.num_samples * max_tokens * (12 + CELL * query.topk_sample_logprobs)
    asked = CELL * query.topk_prompt_logprobs + 12 * query.prompt_alt_tokens_k + (4 if query.prompt_logprobs else 0)
    targets = 0 if query.targets is None else 12 * query.targets.size
    return drawn + prompt * (8 + asked) + targets


def check_sample(query: SamplingRequest, max_tokens: int, *, max_request_tokens: int, max_samples: int) -> None:
    """Raises RequestFailed for a request that is too large by itself."""
    if query.num_samples > max_samples:
        raise RequestFailed(
            f"num_samples={query.num_samples}; at most {max_samples} may wait (service.max_queued_samples)"
        )
    each = len(query.prompt) + max_tokens
    if query.num_samples * each > max_request_tokens:
        raise RequestFailed(
            f"{query.num_samples} samples of up to {each} tokens are more than "
            f"service.max_tokens_per_request={max_request_tokens}"
        )
    size = answer_bytes(query, max_tokens)
    if size > ANSWER_BYTES:
        raise RequestFailed(
            f"the answer could take {size >> 20} MiB, at most {ANSWER_BYTES >> 20} may be; ask for fewer samples, "
            "tokens, targets or alternatives in one request"
        )


def check_stops(stops: Iterable[str]) -> None:
    """Raises RequestFailed for stop strings that would slow down everybody's draws."""
    if (size := sum(map(len, stops))) > STOP_CHARACTERS:
        raise RequestFailed(f"stop: {size} characters in all; at most {STOP_CHARACTERS} may be")


def check_width(request: TrainRequest, *, max_tokens_per_microbatch: int) -> None:
    """Raises RequestFailed for rows with so many targets that a micro-batch, padded to its widest row, would not
    fit."""
    for number, datum in enumerate(request.data):
        targets = datum.inputs.get("target_tokens")
        if targets is None or targets.ndim != 2:
            continue
        most = WIDE_TARGETS // max(max_tokens_per_microbatch, len(datum.tokens), 1)
        if targets.shape[1] > max(1, most):
            raise RequestFailed(
                f"{request.loss_fn}: datum {number}: target_tokens has {targets.shape[1]} columns; at most {most} fit "
                f"into a micro-batch of {max_tokens_per_microbatch} tokens"
            )


def round_robin(items: Iterable[tuple[Hashable, T]]) -> list[T]:
    """The items of (whose, item) in an order in which everybody has a turn after the other; each one's own order
    stays."""
    seen: dict[Hashable, int] = {}
    found = []
    for whose, item in items:
        seen[whose] = seen.get(whose, -1) + 1
        found.append((seen[whose], item))
    return [item for _, item in sorted(found, key=lambda pair: pair[0])]
