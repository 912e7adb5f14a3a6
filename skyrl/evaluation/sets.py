"""The prompts of the sets that eval.sets names, and which of them a model was trained on."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from skyrl.config.eval_sets import RECIPES, EvalSetConfig, eval_sets, options_of_model, own_set
from skyrl.config.load import from_dict
from skyrl.config.schema import RunConfig
from skyrl.config.schema_policy import ObjectivesConfig
from skyrl.data import make_prompts, make_splits
from skyrl.envs.base import ENVIRONMENTS
from skyrl.envs.data_files import NoHeldOut
from skyrl.types import Prompt, UserError

LINE, COMMON = 40, 3  # characters of a line that may be a question; training prompts that may have the same one


@dataclass(frozen=True)
class EvalSet:
    """What is evaluated, how, and on which prompts. `overlap`: how many of these are training prompts too; None where
    those are not known. `title`: its name for a person."""

    config: EvalSetConfig
    prompts: Sequence[Prompt]
    title: str
    overlap: int | None = None


def all_prompts(cfg: RunConfig, evaluates: bool) -> tuple[dict[str, Sequence[Prompt]], str]:
    """The parts "train" and "test" as the environment gives them, of the latter what is played, and that of each set of
    eval.sets, "eval.<name>"; and data.make_splits' line about the held-out ones. With `evaluates` no training prompts,
    and held-out ones only where eval.sets is empty. Raises UserError for what cannot be had, naming the set."""
    parts: dict[str, Sequence[Prompt]] = {}
    line = ""
    if not evaluates:
        parts, line = make_splits(cfg)
    elif not cfg.eval.sets:
        if not cfg.env.name:
            raise UserError("eval.sets is empty: say what is evaluated, for example eval.sets=[arithmetic]")
        try:
            parts["test"] = make_prompts(cfg, "test")
        except NoHeldOut:
            splits, line = make_splits(cfg)
            parts["test"] = splits["test"]
    if not cfg.data.filter and "test" in parts:  # what is not played need not fit
        parts["test"] = parts["test"][: cfg.eval.num_prompts]
    return parts | {f"eval.{one.name}": _prompts_of(cfg, one) for one in eval_sets(cfg)}, line


def _prompts_of(cfg: RunConfig, one: EvalSetConfig) -> Sequence[Prompt]:
    name, env = f"eval.sets: {one.name}: ", one.env.name
    if env not in ENVIRONMENTS and ":" not in env:
        known = sorted({*ENVIRONMENTS.names(), *RECIPES})
        close = difflib.get_close_matches(env, known, n=3, cutoff=0.5) or known
        raise UserError(f"{name}no environment or recipe is called {env!r}; did you mean one of: {', '.join(close)}?")
    whole = replace(cfg, env=one.env, data=one.data)
    if not one.own:  # weights and bounds are those of the run's own rewards
        whole = replace(whole, algorithm=replace(cfg.algorithm, objectives=ObjectivesConfig()))
    try:
        return make_prompts(whole, "test")[: one.num_prompts]
    except UserError as error:
        file = "; give the set its file: {name: ..., path: FILE}" if "data.path is empty" in str(error) else ""
        raise UserError(f"{name}{error}{file}") from error


def named_sets(cfg: RunConfig, parts: Mapping[str, Sequence[Prompt]]) -> tuple[list[EvalSet], list[str]]:
    """The sets that are evaluated, of the prompts that can be played, and a line for each that overlaps with what is
    trained on: the part "train", or what the run was whose checkpoint or export is evaluated."""
    made, lines, keys = [], [], None
    try:
        run = None if "train" in parts else options_of_model(cfg)
        train = parts.get("train") if run is None else make_splits(from_dict(run))[0]["train"]
        keys = None if train is None else Counter(key for some in text_keys(train) for key in some)
    except UserError as error:
        lines.append(f"no overlap with training was looked for: its prompts cannot be had ({error})")
    for one in [*([own_set(cfg)] if parts.get("test") else []), *eval_sets(cfg)]:
        part = parts[f"eval.{one.name}" if one.name else "test"]
        prompts, title = [part[i] for i in range(min(len(part), one.num_prompts))], one.name or one.env.name
        found = overlapping(keys, prompts) if keys is not None else []
        made.append(EvalSet(one, prompts, title, None if keys is None else len(found)))
        if found:
            where = prompts[found[0]].place
            lines.append(f"warning: {title}: {len(found)} of {len(prompts)} prompts are training prompts too: {where}")
    return made, lines


def text_keys(prompts: Iterable[Prompt]) -> Iterator[set[int]]:
    """Of each prompt hashes of what tells it from others: its whole text but for letter case and white space, and its
    long lines, of which one is the question, whatever instruction stands around it."""
    for prompt in prompts:
        texts = [str(message["content"]).casefold() for message in prompt.messages if message["role"] == "user"]
        lines = [" ".join(line.split()) for text in texts for line in text.splitlines()]
        yield {hash(" ".join(lines)), *(hash(line) for line in lines if len(line) >= LINE)}


def overlapping(train: Counter[int], prompts: Sequence[Prompt]) -> list[int]:
    """Indices of the `prompts` that have a key in common with training prompts, whose keys are counted in `train`. One
    that several of `prompts`, or many for training, have is an instruction, or an opening that all episodes share."""
    keys = list(text_keys(prompts))
    own = Counter(key for some in keys for key in some)
    return [i for i, some in enumerate(keys) if any(own[key] == 1 and 0 < train[key] <= COMMON for key in some)]
