"""Plays episodes (environment x sampler) on one rank, and turns them into rows.

Tokens are never made twice (text/chat.py makes them): the context of a later turn is the earlier context, the very
tokens that were sampled, and the tokens of the environment's answer. What was sampled is what is trained, id for id.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from skyrl.algorithms.objectives import Objectives
from skyrl.algorithms.truncation import join_support, split_support
from skyrl.algorithms.variance import score_of
from skyrl.config.schema import EnvConfig
from skyrl.distributed.collectives import MetricSums
from skyrl.distributed.phases import heartbeat
from skyrl.engine import Engine
from skyrl.envs.base import StepResult, group_rewards_of, objective_names_of
from skyrl.envs.guard import BadResult, check_scores, describe_error, place_of_call
from skyrl.envs.rewards.base import GroupCall, Reward, reward_names
from skyrl.judges.batch import BatchReward, RankTools
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
    TokenSupport,
    Turn,
    UserError,
)
from skyrl.workers.calls import Answer, LocalCalls
from skyrl.workers.pool import WorkerPool, open_calls


def draw_seed(*key: Any) -> int:
    """A 63-bit seed from what is drawn (run seed, phase, prompt, sample, turn); never from rank or time."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class RolloutConfig:
    """How episodes are played: group size, sampling, limits, and the key of every draw.

    `params.seed` is not used: each turn's seed comes from `key`, the prompt's position, the sample and the turn.
    `combine` makes one reward of named objectives, with its scale (algorithms.objectives).
    `stop_requested` says whether this rank shall stop playing. `progress` hears of every episode that has ended: how
    many, and of how many; `finished` of every group that has, by its place among the prompts.
    """

    env: EnvConfig
    params: SamplingParams
    group_size: int
    max_row_tokens: int
    key: tuple[Any, ...]
    plugins: Sequence[str] = ()
    combine: Callable[[dict[str, float]], tuple[float, float]] = Objectives().combine
    stop_requested: Callable[[], bool] = lambda: False
    progress: Callable[[int, int], None] = lambda done, total: None
    finished: Callable[[int, list[Episode]], None] = lambda group, episodes: None


@dataclass
class ActiveEpisode:
    """An episode that is being played. `group` is its place among the prompts of this rank."""

    group: int
    position: int
    index: int
    prompt: Prompt
    seed: int
    context: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    observed: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    metrics: MetricSums = field(default_factory=MetricSums)
    calls: MetricSums = field(default_factory=MetricSums)
    done: bool = False


def rollout(
    sampler: Sampler, prompts: Sequence[tuple[int, Prompt]], config: RolloutConfig, chat: Chat
) -> list[list[Episode]]:
    """The groups of episodes of `prompts` ((position in the data, prompt) pairs), in that order, samples in order.

    Sampling goes on while environments are called; when an answer comes changes no draw and no order. No collective:
    each rank plays its own prompts. [] when `config.stop_requested` says so: what was under way is dropped, and its
    draws are the same next time. Raises UserError when an environment or reward fails and env.on_error is "stop".
    """
    with open_calls(config.env, config.plugins) as calls:
        playing = _Rollout(sampler, config, chat, calls, len(prompts))
        try:
            for group, (position, prompt) in enumerate(prompts):
                for index in range(config.group_size):
                    playing.check_stop()
                    playing.open(group, position, index, prompt)
                    playing.take_answers()
            while sampler.unfinished() or calls.waiting:
                playing.check_stop()
                playing.take_answers()
                for sample in sampler.step() if sampler.unfinished() else ():
                    playing.take_sample(sample)
        except _Stopped:
            playing.drop()
            return []
    groups = cast(list[list[Episode]], playing.groups)
    if not group_rewards_of(config.env, batch=True):  # else score_batch does
        _check_objectives(groups, config.env)
    return groups


class _Stopped(Exception):
    """This rank was asked to stop."""


_KEYS = itertools.count()  # of episodes, for those who make calls: they may still close what an earlier one left


class _Rollout:
    """One rollout under way: episodes go to and fro between the sampler and those who call environments."""

    def __init__(
        self, sampler: Sampler, config: RolloutConfig, chat: Chat, calls: LocalCalls | WorkerPool, num_groups: int
    ) -> None:
        self.sampler, self.config, self.chat, self.calls = sampler, config, chat, calls
        self.groups: list[list[Episode | None]] = [[None] * config.group_size for _ in range(num_groups)]
        self._called: dict[int, ActiveEpisode] = {}  # by key, until they end
        self._sampled: dict[str, int] = {}  # uid of a request -> key
        self._scored = bool(group_rewards_of(config.env))
        # By key: a group's place, and those of its episodes whose rewards as a group are asked for.
        self._scoring: dict[int, tuple[int, list[Episode]]] = {}
        self._ended, self._total = 0, num_groups * config.group_size
        self._openings: dict[int, tuple[list[Message], Ints]] = {}  # of each group, the last one: most are alike

    def check_stop(self) -> None:
        """Says that this rank goes on. Raises _Stopped when it is not to."""
        heartbeat()
        if self.config.stop_requested():
            raise _Stopped

    def open(self, group: int, position: int, index: int, prompt: Prompt) -> None:
        """Begins an episode: asks for its environment, and for what that says first."""
        seed = draw_seed(*self.config.key, position, prompt.uid, index, "reset")
        key = next(_KEYS)
        self._called[key] = ActiveEpisode(group, position, index, prompt, seed)
        self.calls.open(key, prompt, seed)

    def take_answers(self) -> None:
        """Goes on with the episodes whose environments have answered."""
        for answer in self.calls.poll(wait=not self.sampler.unfinished()):
            if answer.key in self._scoring:
                self._take_scores(answer)
                continue
            episode = self._called[answer.key]
            for name, value in answer.counts.items():
                episode.calls.add(name, value)
            if answer.outcome.invalid:
                self._finish(answer.key, "aborted", answer.outcome.invalid)
            elif episode.turns:
                self._take_turn(answer.key, cast(StepResult, answer.outcome.value))
            else:
                self._begin(answer.key, cast(list[Message], answer.outcome.value))

    def take_sample(self, sample: Sample) -> None:
        """Gives a finished sample to its environment."""
        check_drawn(sample)
        key = self._sampled.pop(sample.uid)
        episode = self._called[key]
        text = self.chat.read(sample.tokens.tolist(), int(episode.context[-1]))
        episode.turns.append(Turn(episode.context, sample, text=text, observed=episode.observed))
        self.calls.step(key, text)

    def drop(self) -> None:
        """Takes everything back that is under way."""
        for uid in self._sampled:
            self.sampler.cancel(uid)
        self.calls.drop()

    def _begin(self, key: int, messages: list[Message]) -> None:
        episode = self._called[key]
        known = self._openings.get(episode.group)
        if known is None or known[0] != messages:
            ids, problem = _ids(self.config, episode.prompt, "began with", self.chat.prompt, messages)
            if ids is None:
                self._finish(key, "aborted", problem)
                return
            self._openings[episode.group] = known = messages, ids
        episode.context, episode.observed = known[1], messages
        self._request(key)

    def _take_turn(self, key: int, result: StepResult) -> None:
        """Notes what the environment answered to a turn, and goes on as it says."""
        episode = self._called[key]
        turn, sample, episode.done = episode.turns[-1], episode.turns[-1].sample, result.done
        if isinstance(result.reward, dict):
            turn.objectives = result.reward
            turn.reward, turn.scale = self.config.combine(result.reward)
        else:
            turn.reward = float(result.reward)
        for name, value in result.metrics.items():
            if name == "correct:mean":  # accuracy: what the last turn says that says so
                episode.metrics.values.pop(name, None)
            episode.metrics.add(name, value)
        if result.done or len(episode.turns) >= self.config.env.max_turns:
            self._finish(key, sample.stop)
            return
        what, drawn = f"answered to turn {len(episode.turns)}", sample.tokens.tolist()
        more, problem = _ids(self.config, episode.prompt, what, self.chat.continuation, drawn, result.observation)
        if more is None:
            self._finish(key, "aborted", problem)
            return
        episode.context, episode.observed = np.concatenate([episode.context, sample.tokens, more]), result.observation
        self._request(key)

    def _request(self, key: int) -> None:
        """Asks the sampler for the next turn, if there is room for one."""
        config, episode = self.config, self._called[key]
        room = config.max_row_tokens - len(episode.context)
        if room <= 0 and not episode.turns:
            raise UserError(
                f"{episode.prompt.place} has {len(episode.context)} tokens, and rows end at "
                f"{config.max_row_tokens}; raise batch.max_row_tokens or leave it out of the data "
                "(data.max_prompt_tokens finds such prompts at the start)"
            )
        if config.env.max_episode_tokens:
            drawn = sum(len(turn.sample.tokens) for turn in episode.turns)
            room = min(room, config.env.max_episode_tokens - drawn)
        if room <= 0:
            self._finish(key, "length")
            return
        uid = f"{episode.position}/{episode.index}/{len(episode.turns)}"
        seed = draw_seed(*config.key, episode.position, episode.prompt.uid, episode.index, len(episode.turns))
        params = replace(
            config.params,
            max_tokens=min(room, config.params.max_tokens),
            seed=seed,
            stop_token_ids=self.chat.stop_token_ids,
        )
        self._sampled[uid] = key
        self.sampler.add(SampleRequest(uid=uid, tokens=episode.context, params=params))

    def _finish(self, key: int, stop: StopReason, invalid: str = "") -> None:
        episode = self._called.pop(key)
        reward, _ = score_of(turn.reward for turn in episode.turns)
        whole = Episode(episode.prompt, episode.index, episode.turns, reward, stop, episode.metrics.merged(), invalid)
        whole.seed, whole.calls, whole.done = episode.seed, episode.calls.merged(), episode.done
        whole.position = episode.position
        group = self.groups[episode.group]
        group[episode.index] = whole
        self.calls.close(key)
        self._ended += 1
        self.config.progress(self._ended, self._total)
        if None in group:
            return
        scored = [one for one in group if one is not None and one.turns and not one.invalid]
        if self._scored and scored:
            key = next(_KEYS)
            self._scoring[key] = episode.group, scored
            self.calls.score(key, episode.prompt, [one.turns[-1].text for one in scored])
        else:
            self.config.finished(episode.group, cast(list[Episode], group))

    def _take_scores(self, answer: Answer) -> None:
        """Adds what rewards of a whole group have said to the last turns of its episodes."""
        place, episodes = self._scoring.pop(answer.key)
        scores = cast(list[dict[str, float]], answer.outcome.value or [{}] * len(episodes))
        for name, value in answer.counts.items():
            episodes[0].calls[name] = episodes[0].calls.get(name, 0.0) + value
        for episode, score in zip(episodes, scores, strict=True):
            episode.invalid = answer.outcome.invalid
            _add_scores(episode, score, self.config)
        self.config.finished(place, cast(list[Episode], self.groups[place]))


def _add_scores(episode: Episode, score: dict[str, float], config: RolloutConfig) -> None:
    """Adds objectives that were found when the episode had ended to its last turn."""
    for turn in episode.turns:
        if turn.reward and not turn.objectives:
            turn.objectives = {"reward": turn.reward}
    if taken := score.keys() & episode.objectives.keys():
        _refuse(config.env, episode, f"two rewards both give {min(taken)!r}; rename one")
    last = episode.turns[-1]
    last.objectives = {**last.objectives, **score}
    for turn in episode.turns:
        if turn.objectives:
            turn.reward, turn.scale = config.combine(turn.objectives)
    episode.reward, _ = score_of(turn.reward for turn in episode.turns)


Judges = Sequence[tuple[Reward, BatchReward]]  # the rewards of whole batches of a run, each made


def score_batch(judges: Judges, groups: list[list[Episode]], config: RolloutConfig, tools: RankTools) -> None:
    """Adds what rewards of a whole batch say to the last turns of a rank's episodes; see BatchReward. Collective where
    they are. Raises UserError for a reward that fails as a whole, and under env.on_error=stop for a score that is none.
    """
    for reward, judge in judges:
        episodes = [one for group in groups for one in group if one.turns and not one.invalid]
        try:
            scores = list(judge.score(episodes, tools))
        except (UserError, RunError):
            raise
        except Exception as error:
            raise UserError(f"reward {reward.name}: score() raised {describe_error(error)}; fix it") from error
        if len(scores) != len(episodes):
            raise UserError(f"reward {reward.name}: score() gave {len(scores)} scores for {len(episodes)} episodes")
        for episode, score in zip(episodes, scores, strict=True):
            if isinstance(score, Exception):
                where = place_of_call("score()", reward.name, episode.prompt)
                episode.invalid = f"{where}, sample {episode.index}: {score}"
                continue
            try:
                (checked,) = check_scores(GroupCall(reward, {}, (episode.turns[-1].text,)), [score])
                _add_scores(episode, checked, config)
            except BadResult as error:
                _refuse(config.env, episode, f"reward {reward.name}: score() returned {error}; fix it")
    _check_objectives(groups, config.env)


def rank_tools(engine: Engine, reference: str) -> RankTools:
    """What rewards of whole batches are given of the engine."""

    def reference_logprobs(episodes: Sequence[Episode]) -> list[Floats]:
        # Over the whole distribution, and by the reference's own routers.
        rows = [replace(row, support=None, experts=None) for row in to_rows([(0, list(episodes))])]
        scored = engine.score([row.datum(row.mask.astype(np.float32)) for row in rows], 1.0, model=reference).logprobs
        found: list[list[Floats]] = [[np.zeros(0)] for _ in episodes]
        for row, logprobs in zip(rows, scored, strict=True):
            found[row.episode].append(np.asarray(logprobs)[row.mask])
        return [np.concatenate(parts) for parts in found]

    def generate(conversations: Sequence[list[Message]], max_tokens: int) -> list[str | None]:
        found: list[str | None] = [None] * len(conversations)
        params = SamplingParams(max_tokens, temperature=0.0, stop_token_ids=engine.chat.stop_token_ids)
        with engine.sampling("policy") as sampler:
            for number, messages in enumerate(conversations):
                ids = engine.chat.prompt(messages)
                if len(ids) + max_tokens <= engine.max_row_tokens:
                    sampler.add(SampleRequest(str(number), ids, params))
            while sampler.unfinished():
                heartbeat()
                for sample in sampler.step():
                    found[int(sample.uid)] = engine.chat.read(sample.tokens.tolist(), 0)
        return found

    return RankTools(engine.world.device, reference_logprobs, generate)


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


def _refuse(env: EnvConfig, episode: Episode, problem: str) -> None:
    """Leaves out an episode whose objectives are no score. Raises UserError under env.on_error=stop."""
    who = place_of_call(f"environment {env.name}", ", ".join(reward_names(env.options.get("reward"))), episode.prompt)
    line = f"{who}, sample {episode.index}: {problem}"
    if env.on_error == "stop":
        raise UserError(f"{line}, or set env.on_error=mask to leave such episodes out of training")
    episode.invalid = line


def _check_objectives(groups: list[list[Episode]], env: EnvConfig) -> None:
    """Refuses episodes that lack an objective that others have, or have one too many. What a limit cut may lack."""
    scored = [(one, one.objectives) for group in groups for one in group if one.turns and not one.invalid]
    known = set(objective_names_of(env)) or set().union(*(given for _, given in scored))
    for episode, given in scored if known else ():
        number = next((turn.reward for turn in episode.turns if turn.reward and not turn.objectives), None)
        if number is not None:
            names = ", ".join(sorted(known))
            _refuse(
                env, episode, f"a turn's reward is the number {number:g}, others have names ({names}); give all names"
            )
        elif extra := sorted(given.keys() - known):
            _refuse(
                env, episode, f"objective {extra[0]!r} is none of those declared ({', '.join(sorted(known))}); add it"
            )
        elif missing := sorted(known - given.keys()) if episode.done else []:
            _refuse(env, episode, f"objective {missing[0]!r} is missing; give 0.0 where it earns nothing")


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
    marks the sampled targets, `trained` those of them that the filters leave, `selected` what clip_cov and kl_cov pick.
    `rewards` holds each turn's reward on its last token, `scales` its scale and `objectives` what was named of it.
    `group` is the place of its prompt in the batch of all ranks, `episode` counts this rank's.
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
    scales: Floats | None = None
    objectives: dict[str, Floats] = field(default_factory=dict)
    support: TokenSupport | None = None
    experts: Ints | None = None
    selected: Floats | None = None
    baseline: float | None = None

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
            selected=self.selected,
            name=self.name,
            support=self.support,
            experts=self.experts,
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
    logprobs, rewards, scales = np.zeros(length, np.float32), np.zeros(length), np.zeros(length)
    objectives: dict[str, Floats] = {}
    supports: list[tuple[int, TokenSupport]] = []
    experts: list[Ints] = []
    for turn in turns:
        start = len(turn.context) - 1
        end = start + len(turn.sample.tokens)
        mask[start:end] = True
        logprobs[start:end] = turn.sample.logprobs
        if turn.sample.support is not None:
            supports.append((start, turn.sample.support))
        if turn.sample.experts is not None:  # a later turn may have read the same tokens anew, and by other experts
            experts.append(turn.sample.experts[sum(map(len, experts)) :])
        rewards[end - 1] += turn.reward
        scales[end - 1] += max(turn.scale, abs(turn.reward))
        for name, value in turn.objectives.items():
            objectives.setdefault(name, np.zeros(length))[end - 1] += value
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
        scales=scales,
        objectives=objectives,
        baseline=episode.baseline,
        support=join_support(length, [(start, split_support(one)) for start, one in supports]) if supports else None,
        experts=np.concatenate(experts) if experts else None,
    )


def episode_metrics(sums: MetricSums, groups: list[list[Episode]], prefix: str) -> None:
    """Adds what episodes say of themselves: reward, each objective as "<prefix>reward/<name>", accuracy, length, stop
    reasons, and the environment's own metrics as "<prefix>env/<name>", so that no name an environment gives is one of
    the loop's.

    Episodes whose verifier failed are counted as "<prefix>invalid:sum" and left out of reward and accuracy.
    """
    names = dict.fromkeys(name for group in groups for one in group if not one.invalid for name in one.objectives)
    for group in groups:
        for episode in group:
            sums.add(f"{prefix}episodes:sum", 1.0)
            sums.add(f"{prefix}invalid:sum", float(bool(episode.invalid)))
            length = sum(len(turn.sample.tokens) for turn in episode.turns)
            sums.add(f"{prefix}length:mean", float(length))
            sums.add(f"{prefix}length:max", float(length))
            sums.add(f"{prefix}cut_by_length:mean", float(episode.stop == "length"))
            sums.add(f"{prefix}turns:mean", float(len(episode.turns)))
            for key, value in episode.calls.items():
                sums.add(f"{prefix}{key}", value)
            if episode.invalid:
                continue
            sums.add(f"{prefix}reward:mean", episode.reward)
            objectives = episode.objectives if names else {}
            for name in names:
                sums.add(f"{prefix}reward/{name}:mean", objectives.get(name, 0.0))
            correct = episode.metrics.get("correct:mean", float(episode.reward > 0))
            sums.add(f"{prefix}accuracy:mean", correct)
            for key, value in episode.metrics.items():
                if key != "correct:mean":
                    sums.add(f"{prefix}env/{key}", value)
