"""Every episode of a step as text, tokens, log-probs and rewards, for eyes and for checks of the metrics.

One line of JSON for each episode; each rank writes the groups it played. Nothing here is read back by training.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skyrl.files import explain_write, write_atomic
from skyrl.run_dir import read_rollouts
from skyrl.tracking.jsonl import plain, to_json
from skyrl.types import Datum, Episode, Floats

EXPECTED = ("answer", "target", "solution", "ground_truth", "label")  # fields of a prompt that hold what is wanted


def write_rollouts(folder: Path, name: str, groups: Sequence[Sequence[Episode]], tokenizer: Any, *, rank: int) -> Path:
    """Writes this rank's groups to <folder>/<name>-r<rank>.jsonl, whole or not at all; returns that path.

    name: the step with six digits, with "<kind>-" before it for other than training ("eval-000010"). Text is decoded
    with special tokens visible. <folder>/tokens-r<rank>.json holds the text of each token sampled so far, by itself.
    Raises: UserError when the file cannot be written.
    """
    path = Path(folder) / f"{name}-r{rank}.jsonl"
    lines = (to_json(_episode_entry(episode, tokenizer)) + "\n" for group in groups for episode in group)
    with explain_write(path, "free some space, or give tracking.rollouts_every=0"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "".join(lines))
        _keep_token_texts(path.with_name(f"tokens-r{rank}.json"), groups, tokenizer)
    return path


def write_trained(folder: Path, step: int, rows: Sequence[tuple[Datum, Floats | None]], *, rank: int) -> None:
    """Writes what rows that this rank has trained on say of the dumped tokens: {row: {"first": place of the first one
    that is trained, "advantages": from there on, "logprobs": by the trainer before its update, which the sampler's are
    compared with; null where a token is not trained}}. rows: with those log-probs, None for later updates of the step.
    Rows of a prompt that was played twice have one name and are left out. Raises UserError when it cannot be written.
    """
    count, found = Counter(row.name for row, _ in rows), dict[str, dict[str, Any]]()
    for row, logprobs in rows:
        if count[row.name] > 1 or not len(at := np.flatnonzero(row.weights)):
            continue
        one = found[row.name] = {"first": int(at[0])}
        for key, values in (("advantages", row.advantages), ("logprobs", logprobs)):
            if values is not None:
                kept = np.where(row.weights == 0, np.nan, np.asarray(values, np.float64))
                one[key] = [value if math.isfinite(value) else None for value in kept[at[0] : at[-1] + 1].tolist()]
    path = Path(folder) / f"{step:06d}-r{rank}.jsonl.trained"
    with explain_write(path):
        write_atomic(path, json.dumps(found))


def _keep_token_texts(path: Path, groups: Sequence[Sequence[Episode]], tokenizer: Any) -> None:
    """Viewers colour a text token by token; a token's text is decoded and written once, not with every episode."""
    known: dict[int, str] = {}
    with contextlib.suppress(OSError, ValueError, AttributeError):
        known = {int(token): text for token, text in json.loads(path.read_text(encoding="utf-8")).items()}
    sampled = {
        token for group in groups for one in group for turn in one.turns for token in turn.sample.tokens.tolist()
    }
    if new := sampled - known.keys():
        known |= {token: tokenizer.decode([token], skip_special_tokens=False) for token in new}
        write_atomic(path, json.dumps(dict(sorted(known.items())), ensure_ascii=False))


def append_rollouts(path: Path, group: Sequence[Episode], tokenizer: Any) -> None:
    """Adds the episodes of one prompt to a file of this rank's, in one piece. Raises UserError when it cannot be."""
    with explain_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as stream:
            stream.write("".join(to_json(_episode_entry(one, tokenizer)) + "\n" for one in group).encode())


def show_rollouts(folder: Path, name: str, count: int) -> str:
    """The first `count` episodes of a dump for eyes: what was asked, drawn and expected, and what it was worth."""
    lines = []
    for number, episode in zip(range(count), read_rollouts(folder, name), strict=False):
        reward = f"reward {float(episode['reward']):g}{named(episode.get('objectives', {}))}"
        said = f"{episode['uid']} sample {episode['index']}: {reward}, ended by {episode['stop']}"
        lines.append(f"{'=' * 8} {number + 1}. {said}")
        seen = ""
        for turn in episode["turns"]:
            context = turn["context_text"]
            lines += ["--- prompt" if not seen else "--- answer of the environment", context.removeprefix(seen)]
            reward = f"reward {float(turn['reward']):g}{named(turn.get('objectives', {}))}"
            lines += [f"--- drawn ({len(turn['tokens'])} tokens, {reward})", turn["text"]]
            seen = context + turn["text"]
        if episode["expected"] is not None:
            lines += ["--- expected", str(episode["expected"])]
        if episode["invalid"]:
            lines += ["--- invalid", episode["invalid"]]
    return "\n".join(lines)


def named(objectives: Mapping[str, float]) -> str:
    """Objectives in words, behind a reward: " (accuracy 1, brevity 0.2)"; "" without any."""
    return f" ({', '.join(f'{name} {value:g}' for name, value in objectives.items())})" if objectives else ""


def _readable(value: Any) -> Any:
    """A value of any kind as JSON may hold it; what it cannot hold as its text."""
    return json.loads(json.dumps(plain(value), default=str, skipkeys=True))


def _episode_entry(episode: Episode, tokenizer: Any) -> dict[str, Any]:
    turns = [
        {
            "context_text": tokenizer.decode(turn.context.tolist(), skip_special_tokens=False),
            "text": tokenizer.decode(turn.sample.tokens.tolist(), skip_special_tokens=False),
            "read": turn.text,
            "reward": float(turn.reward),
            **({"objectives": turn.objectives} if turn.objectives else {}),
            "stop": turn.sample.stop,
            "version": turn.sample.version,
            "context": turn.context.tolist(),
            "tokens": turn.sample.tokens.tolist(),
            "logprobs": turn.sample.logprobs.tolist(),
            **({k: v.tolist() for k, v in vars(turn.sample.support).items()} if turn.sample.support else {}),
        }
        for turn in episode.turns
    ]
    extra = episode.prompt.extra
    expected = next((extra[key] for key in EXPECTED if key in extra), None)
    return {
        "uid": episode.prompt.uid,
        "env": episode.prompt.env,
        "index": episode.index,
        "position": episode.position,
        "seed": episode.seed,
        "expected": _readable(expected),
        "extra": _readable(episode.prompt.extra),
        "reward": float(episode.reward),
        **({"objectives": episode.objectives} if episode.objectives else {}),
        "stop": episode.stop,
        **({} if episode.baseline is None else {"baseline": episode.baseline}),
        "invalid": episode.invalid,
        "metrics": {key: float(value) for key, value in episode.metrics.items()},
        "turns": turns,
    }
