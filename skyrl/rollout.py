"""Plays episodes (environment x sampler) on one rank, and turns them into rows.

Tokens are never made twice (text/chat.py makes them): the context of a later turn is the earlier context, the very
tokens that were sampled, and the tokens of the environment's answer. What was sampled is what is trained, id for id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from skyrl.algorithms.variance import score_of
from skyrl.config.schema import EnvConfig
from skyrl.distributed.collectives import MetricSums
from skyrl.distributed.phases import heartbeat
from skyrl.envs.base import Environment, make_environment
from skyrl.envs.guard import Guard
from skyrl.sampler.sampler import Sampler
from skyrl.text.chat import Chat
from skyrl.types import (
    Datum,
    Episode,
    Floats,
    Ints,
    Message,
    Prompt,
    RunError,
    Sample,
    SampleRequest,
    SamplingParams,
    StopReason,
    Turn,
    UserError,
)


def draw_seed(*key: Any) -> int:
    """A 63-bit seed from what is drawn (run seed, phase, prompt, sample, turn); never from rank or time."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class RolloutConfig:
    """How episodes are played: group size, sampling, limits, and the key of every draw.

    `params.seed` is not used: each turn's seed comes from `key`, the prompt's position, the sample and the turn.
    `stop_requested` says whether this rank shall stop playing. `progress` hears of every episode that has ended: how
    many, and of how many.
    """

    env: EnvConfig
    params: SamplingParams
    group_size: int
    max_row_tokens: int
    key: tuple[Any, ...]
    stop_requested: Callable[[], bool] = lambda: False
    progress: Callable[[int, int], None] = lambda done, total: None


@dataclass
class ActiveEpisode:
    """An episode that is being played."""

    position: int
    index: int
    prompt: Prompt
    env: Environment
    context: Ints
    turns: list[Turn] = field(default_factory=list)
    metrics: MetricSums = field(default_factory=MetricSums)


def rollout(
    sampler: Sampler, prompts: Sequence[tuple[int, Prompt]], config: RolloutConfig, chat: Chat
) -> list[list[Episode]]:
    """The groups of episodes of `prompts` ((position in the data, prompt) pairs), in that order, samples in order.

    No collective: each rank plays its own prompts. [] when `config.stop_requested` says so: what was under way is
    dropped, and its draws are the same next time. Raises UserError when an environment or reward fails and env.on_error
    is "stop".
    """
    guard = Guard(config.env)
    groups: list[list[Episode | None]] = [[None] * config.group_size for _ in prompts]
    active: dict[str, tuple[int, ActiveEpisode]] = {}
    ended, total = 0, len(prompts) * config.group_size

    def finish(group: int, episode: ActiveEpisode, stop: StopReason, invalid: str = "") -> None:
        nonlocal ended
        reward, _ = score_of(turn.reward for turn in episode.turns)
        whole = Episode(episode.prompt, episode.index, episode.turns, reward, stop, episode.metrics.merged(), invalid)
        groups[group][episode.index] = whole
        guard.call(episode.env.close, prompt=episode.prompt)
        ended += 1
        config.progress(ended, total)

    def request(group: int, episode: ActiveEpisode) -> None:
        room = config.max_row_tokens - len(episode.context)
        if room <= 0:
            if not episode.turns:
                raise UserError(
                    f"{episode.prompt.place} has {len(episode.context)} tokens, and rows end at "
                    f"{config.max_row_tokens}; raise batch.max_row_tokens or leave it out of the data "
                    "(data.max_prompt_tokens finds such prompts at the start)"
                )
            finish(group, episode, "length")
            return
        uid = f"{episode.position}/{episode.index}/{len(episode.turns)}"
        seed = draw_seed(*config.key, episode.position, episode.prompt.uid, episode.index, len(episode.turns))
        params = replace(
            config.params,
            max_tokens=min(room, config.params.max_tokens),
            seed=seed,
            stop_token_ids=chat.stop_token_ids,
        )
        active[uid] = (group, episode)
        sampler.add(SampleRequest(uid=uid, tokens=episode.context, params=params))

    with guard:
        for group, (position, prompt) in enumerate(prompts):
            known: tuple[list[Message], Ints] | None = None
            for index in range(config.group_size):
                heartbeat()
                if config.stop_requested():
                    return _dropped(guard, sampler, active)
                what = f"environment {config.env.name}.__init__"
                made = guard.call(make_environment, config.env, prompt=prompt, what=what)
                if made.value is None:
                    groups[group][index] = Episode(prompt, index, [], 0.0, "aborted", {}, made.invalid)
                    continue
                env = made.value
                opening = guard.call(env.reset, prompt, prompt=prompt)
                ids, problem = None, opening.invalid
                if opening.value is not None and known is not None and known[0] == opening.value:
                    ids = known[1]
                elif opening.value is not None:
                    ids, problem = _ids(config, prompt, "began with", chat.prompt, opening.value)
                    known = (opening.value, ids) if ids is not None else None
                if ids is None:
                    groups[group][index] = Episode(prompt, index, [], 0.0, "aborted", {}, problem)
                    guard.call(env.close, prompt=prompt)
                    continue
                request(group, ActiveEpisode(position, index, prompt, env, ids))
        while sampler.unfinished():
            heartbeat()
            if config.stop_requested():
                return _dropped(guard, sampler, active)
            for sample in sampler.step():
                group, episode = active.pop(sample.uid)
                _take_turn(guard, config, chat, group, episode, sample, request, finish)
    return groups  # type: ignore[return-value]


def _dropped(guard: Guard, sampler: Sampler, active: dict[str, tuple[int, ActiveEpisode]]) -> list[list[Episode]]:
    """Takes everything back that is under way."""
    for uid, (_, episode) in active.items():
        sampler.cancel(uid)
        guard.call(episode.env.close, prompt=episode.prompt)
    return []


def _take_turn(
    guard: Guard,
    config: RolloutConfig,
    chat: Chat,
    group: int,
    episode: ActiveEpisode,
    sample: Sample,
    request: Any,
    finish: Any,
) -> None:
    """Gives a finished sample to the environment and goes on as it says."""
    check_drawn(sample)
    turn = Turn(episode.context, sample)
    episode.turns.append(turn)
    text = chat.read(sample.tokens.tolist(), int(episode.context[-1]))
    outcome = guard.call(episode.env.step, text, prompt=episode.prompt)
    if outcome.invalid:
        finish(group, episode, "aborted", outcome.invalid)
        return
    result = outcome.value
    assert result is not None
    turn.reward = float(result.reward)
    for key, value in result.metrics.items():
        if key == "correct:mean":  # accuracy: what the last turn says that says so
            episode.metrics.values.pop(key, None)
        episode.metrics.add(key, value)
    if result.done or len(episode.turns) >= config.env.max_turns:
        finish(group, episode, sample.stop)
        return
    what = f"answered to turn {len(episode.turns)}"
    more, problem = _ids(config, episode.prompt, what, chat.continuation, sample.tokens.tolist(), result.observation)
    if more is None:
        finish(group, episode, "aborted", problem)
        return
    episode.context = np.concatenate([episode.context, sample.tokens, more])
    request(group, episode)


def _ids(config: RolloutConfig, prompt: Prompt, what: str, make: Callable[..., Ints], *given: Any) -> tuple[Any, str]:
    """Ids of what an environment said, or None and why it has none, where env.on_error masks such episodes. Raises
    UserError with the prompt's place otherwise."""
    try:
        return make(*given), ""
    except UserError as error:
        said = f"{prompt.place}: what env.name={config.env.name} {what}: {error}"
        if config.env.on_error == "stop":
            raise UserError(said) from error
        return None, said


def check_drawn(sample: Sample) -> None:
    """Raises RunError for a sample that ended because its adapter gives logits that are not finite."""
    if sample.stop == "aborted":
        raise RunError(
            f"the adapter gives logits that are not finite, first for request {sample.uid}; go on from a checkpoint "
            "before, with a lower learning rate"
        )


Group = tuple[int, list[Episode]]  # (place in the step's batch, over all ranks; its episodes)


@dataclass(frozen=True)
class Row:
    """One row of an episode on its way to a Datum; all arrays are [L], shifted as a Datum's.

    Nothing in it changes: each stage of the loop returns rows with one more field set (`dataclasses.replace`). `mask`
    marks the sampled targets, `trained` those of them that the filters leave. `rewards` holds each turn's reward on the
    last token of that turn. `group` is the place of its prompt in the batch of all ranks, `episode` counts this rank's.
    """

    name: str
    tokens: Ints
    targets: Ints
    mask: np.ndarray
    rewards: Floats
    sampling_logprobs: Floats
    group: int
    episode: int
    stop: StopReason
    valid: bool
    reference: Floats | None = None
    values: Floats | None = None
    advantages: Floats | None = None
    returns: Floats | None = None
    trained: np.ndarray | None = None
    old_logprobs: Floats | None = None

    def datum(self, weights: Floats) -> Datum:
        """What the engine trains on: this row with its weights, which are mask and reduction in one."""
        return Datum(
            tokens=self.tokens,
            targets=self.targets,
            weights=weights,
            sampling_logprobs=self.sampling_logprobs,
            advantages=self.advantages,
            old_logprobs=self.old_logprobs,
            reference=self.reference,
            values=self.values,
            returns=self.returns,
            name=self.name,
        )


def to_rows(groups: Sequence[Group]) -> list[Row]:
    """Rows of all episodes, in order. A turn whose context does not begin with everything before it opens a new row
    of the same episode. Episodes without a sampled token give no row."""
    rows: list[Row] = []
    episode = 0
    for place, group in groups:
        for one in group:
            for number, turns in enumerate(_chains(one.turns)):
                rows.append(_row(one, turns, place, episode, number))
            episode += 1
    return rows


def _chains(turns: list[Turn]) -> list[list[Turn]]:
    chains: list[list[Turn]] = []
    known: np.ndarray = np.empty(0, np.int64)
    for turn in turns:
        if len(turn.sample.tokens) == 0:
            continue
        extends = len(turn.context) >= len(known) and np.array_equal(turn.context[: len(known)], known)
        if chains and extends:
            chains[-1].append(turn)
        else:
            chains.append([turn])
        known = np.concatenate([turn.context, turn.sample.tokens])
    return chains


def _row(episode: Episode, turns: list[Turn], group: int, number: int, part: int) -> Row:
    ids = np.concatenate([turns[-1].context, turns[-1].sample.tokens])
    length = len(ids) - 1
    mask = np.zeros(length, bool)
    logprobs, rewards = np.zeros(length, np.float32), np.zeros(length)
    for turn in turns:
        start = len(turn.context) - 1
        end = start + len(turn.sample.tokens)
        mask[start:end] = True
        logprobs[start:end] = turn.sample.logprobs
        rewards[end - 1] += turn.reward
    return Row(
        name=f"{episode.prompt.uid}/{episode.index}/{part}",
        tokens=ids[:-1],
        targets=ids[1:],
        mask=mask,
        rewards=rewards,
        sampling_logprobs=logprobs,
        group=group,
        episode=number,
        stop=episode.stop,
        valid=not episode.invalid,
    )


def episode_metrics(sums: MetricSums, groups: list[list[Episode]], prefix: str) -> None:
    """Adds what episodes say of themselves: reward, accuracy, length, stop reasons, and the environment's own metrics
    as "<prefix>env/<name>", so that no name an environment gives is one of the loop's.

    Episodes whose verifier failed are counted as "<prefix>invalid:sum" and left out of reward and accuracy.
    """
    for group in groups:
        for episode in group:
            sums.add(f"{prefix}episodes:sum", 1.0)
            sums.add(f"{prefix}invalid:sum", float(bool(episode.invalid)))
            length = sum(len(turn.sample.tokens) for turn in episode.turns)
            sums.add(f"{prefix}length:mean", float(length))
            sums.add(f"{prefix}length:max", float(length))
            sums.add(f"{prefix}cut_by_length:mean", float(episode.stop == "length"))
            sums.add(f"{prefix}turns:mean", float(len(episode.turns)))
            if episode.invalid:
                continue
            sums.add(f"{prefix}reward:mean", episode.reward)
            correct = episode.metrics.get("correct:mean", float(episode.reward > 0))
            sums.add(f"{prefix}accuracy:mean", correct)
            for key, value in episode.metrics.items():
                if key != "correct:mean":
                    sums.add(f"{prefix}env/{key}", value)
