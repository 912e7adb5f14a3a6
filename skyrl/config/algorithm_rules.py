"""Rules between the options of an algorithm, each with one line for the person: part of validation.py. No torch.

What a loss or an advantage needs and takes is read from its declaration (skyrl.algorithms.declare), a plugin's after
the plugin was imported.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from typing import Any

from skyrl.algorithms.advantages import ADVANTAGES
from skyrl.algorithms.corrections import CORRECTIONS, MASKS, correction_problem
from skyrl.algorithms.declare import LOSSES, Advantage, Loss, policy_losses
from skyrl.algorithms.filters import FILTERS as GROUP_FILTERS
from skyrl.algorithms.kl import KL_ESTIMATORS, NO_GRADIENT_IN_LOSS
from skyrl.algorithms.reductions import REDUCTIONS
from skyrl.config import policy_rules
from skyrl.config.schema import RunConfig
from skyrl.registry.plugins import import_plugins

# Where a plugin may add names: option -> the names that are registered.
REGISTERED: dict[str, Callable[[], list[str]]] = {
    "algorithm.advantage.name": ADVANTAGES.names,
    "algorithm.loss.name": policy_losses,
    "algorithm.loss.reduction": REDUCTIONS.names,
    "algorithm.loss.correction": CORRECTIONS.names,
    "algorithm.kl.estimator": KL_ESTIMATORS.names,
}


def option(cfg: RunConfig, path: str) -> Any:
    """The value at a dotted path."""
    value: Any = cfg
    for part in path.split("."):
        value = getattr(value, part)
    return value


def names_of(cfg: RunConfig, path: str) -> tuple[str, ...]:
    """The names that the option at `path`, one of REGISTERED, may have, with those of plugins when it is not ours."""
    if cfg.plugins and option(cfg, path) not in REGISTERED[path]():
        import_plugins(cfg.plugins)
    return tuple(REGISTERED[path]())


def loss_of(cfg: RunConfig) -> Loss:
    """The declaration of algorithm.loss.name. Raises UserError when there is none."""
    names_of(cfg, "algorithm.loss.name")
    return LOSSES.get(cfg.algorithm.loss.name, "algorithm.loss.name")


def advantage_of(cfg: RunConfig) -> Advantage:
    """The declaration of algorithm.advantage.name. Raises UserError when there is none."""
    names_of(cfg, "algorithm.advantage.name")
    return ADVANTAGES.get(cfg.algorithm.advantage.name, "algorithm.advantage.name")


def corrects(cfg: RunConfig) -> bool:
    return cfg.algorithm.loss.correction != "none"


def those(what: str) -> str:
    """The names of our advantages that need or do `what`, such as "critic"."""
    return " or ".join(one.name for one in ADVANTAGES.things() if getattr(one, what))


def kl_is_k1(cfg: RunConfig) -> bool:
    return cfg.algorithm.kl.estimator in NO_GRADIENT_IN_LOSS


def param_problems(cfg: RunConfig) -> Iterator[str]:
    for group, declared, others in (
        ("advantage", advantage_of(cfg), ADVANTAGES.things()),
        ("loss", loss_of(cfg), LOSSES.things()),
    ):
        given_params = getattr(cfg.algorithm, group).params
        for name, value in given_params.items():
            given = f"algorithm.{group}.params.{name}={value}"
            if name in declared.params:
                if not (param := declared.params[name]).fits(value):
                    yield f"{given}: {declared.name} allows {param.allowed} (default {param.default:g})"
                continue
            owners = [other.name for other in others if name in other.params]
            close = difflib.get_close_matches(name, declared.params, n=1, cutoff=0.5)
            if owners:
                yield f"{given}: has an effect only with algorithm.{group}.name={' or '.join(owners)}; leave it out"
            elif close:
                yield f"{given}: {declared.name} has no such parameter; did you mean {close[0]}?"
            else:
                known = ", ".join(declared.params) or "none"
                yield f"{given}: {declared.name} has no such parameter; its parameters are: {known}"
        filled = {**declared.defaults(), **given_params}
        if declared.rule and (problem := declared.rule(filled, cfg.batch.samples_per_prompt)):
            yield f"algorithm.{group}.{problem}"


def algorithm_problems(cfg: RunConfig) -> Iterator[str]:
    advantage, loss, algorithm, batch = advantage_of(cfg), loss_of(cfg), cfg.algorithm, cfg.batch
    if cfg.trainer != "rl":  # which alone reads algorithm
        return
    if batch.samples_per_prompt < 2 and (advantage.group or algorithm.filters.zero_variance):
        who = f"algorithm.advantage.name={advantage.name}" if advantage.group else "filters.zero_variance"
        yield (
            f"batch.samples_per_prompt={batch.samples_per_prompt}: {who} compares the samples of a prompt; give at "
            "least 2, or use reinforce++ or gae"
        )
    if algorithm.filters.names:
        import_plugins(cfg.plugins)
    for name in algorithm.filters.names:
        GROUP_FILTERS.get(name, "algorithm.filters.names")
    updates = batch.optim_steps_per_batch * batch.epochs_per_batch
    corrected, recomputed = corrects(cfg), algorithm.loss.recompute_old_logprobs
    if updates > 1 and not loss.ratio and (not corrected or recomputed):
        yield (
            f"algorithm.loss.name={loss.name}: has no ratio, so it is wrong for the {updates} updates of one batch "
            "(batch.optim_steps_per_batch * batch.epochs_per_batch); use ppo, cispo, gspo or importance_sampling, or 1"
        )
    correction = algorithm.loss.correction
    bounds = (correction, algorithm.loss.correction_cap, algorithm.loss.correction_low)
    if corrected and (problem := correction_problem(*bounds)):
        yield f"algorithm.loss.{problem}"
    if not recomputed and corrected and (algorithm.loss.correction_normalise or algorithm.loss.rejected == "dropped"):
        if algorithm.loss.correction_normalise or correction in MASKS:
            what = "correction_normalise=true" if algorithm.loss.correction_normalise else "rejected=dropped"
            yield (
                f"algorithm.loss.{what}: needs the weights of a whole optimizer step before it begins; set "
                "algorithm.loss.recompute_old_logprobs=true"
            )
    if advantage.name == "maxrl" and algorithm.filters.overlong_buffer:
        yield (
            f"algorithm.filters.overlong_buffer={algorithm.filters.overlong_buffer:g}: its penalty makes scores below "
            "0, and maxrl divides by their mean; leave it at 0.0, or use algorithm.advantage.name=dr_grpo"
        )
    longest, alpha = cfg.sampler.max_new_tokens * cfg.env.max_turns, algorithm.advantage.params.get("alpha", 0.05)
    if advantage.name == "vapo" and longest > 1 and alpha * longest <= 1:  # of one token lambda says nothing
        yield (
            f"algorithm.advantage.params.alpha={alpha:g}: lambda is 0 up to 1 / alpha tokens, and an episode has at "
            f"most {longest}, so all that is learned is the critic's error; give more than {1 / longest:.2g}, such as 1"
        )
    if advantage.off_policy and not recomputed:
        yield (
            f"algorithm.advantage.name={advantage.name}: weighs by the policy's probabilities over the sampler's, and "
            "without algorithm.loss.recompute_old_logprobs=true it has the sampler's alone; set it"
        )
    if advantage.off_policy and corrected:
        yield (
            f"algorithm.loss.correction={correction}: {advantage.name} has these weights in its advantages, so they "
            "would count twice; leave it at none"
        )
    if advantage.greedy_baseline:
        yield from policy_rules.greedy(cfg)
    if updates > 1 and loss.ratio and corrected and not recomputed:
        yield (
            f"algorithm.loss.correction={algorithm.loss.correction}: with {updates} updates of one batch the loss "
            "would lose its ratio; set algorithm.loss.recompute_old_logprobs=true"
        )
    if algorithm.kl.coef > 0 and algorithm.kl.placement == "reward" and not advantage.token_rewards:
        yield (
            f"algorithm.kl.placement=reward: rewards per token need algorithm.advantage.name="
            f"{those('token_rewards')}, not {advantage.name}; use algorithm.kl.placement=loss"
        )
    if algorithm.kl.coef > 0 and algorithm.kl.placement == "loss" and kl_is_k1(cfg):
        yield (
            "algorithm.kl.estimator=k1: as a term of the loss its expected gradient is 0; use k2, k3 or k1+, or "
            "algorithm.kl.placement=reward"
        )
    episodes = batch.prompts_per_step * batch.samples_per_prompt
    if algorithm.kl.target > 0 and algorithm.kl.horizon < episodes:
        yield f"algorithm.kl.horizon={algorithm.kl.horizon:g}: below the {episodes} episodes of one step; raise it"


def objective_problems(cfg: RunConfig) -> Iterator[str]:
    given, algorithm = cfg.algorithm.objectives, cfg.algorithm
    for name, weight in given.weights.items():
        if not math.isfinite(weight):
            yield f"algorithm.objectives.weights.{name}={weight}: wanted a finite number"
    for name, one in given.constraints.items():
        where = f"algorithm.objectives.constraints.{name}"
        if not isinstance(one, dict):
            yield f"{where}={one}: wanted a bound, such as {{min: {one}}}"
        if unknown := sorted(one.keys() - {"min", "max", "step", "start"}):
            yield f"{where}.{unknown[0]}: no such key; a constraint has min or max, step and start"
        if len(one.keys() & {"min", "max"}) != 1:
            yield f"{where}={dict(one)}: wanted one bound, min or max; for both give one as an objective of its own"
        for key, value in one.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or (key == "step" and value <= 0) or (key == "start" and value < 0):
                wanted = {"step": "a number above 0", "start": "0 or more"}.get(key, "a finite number")
                yield f"{where}.{key}={value}: wanted {wanted}"
    if given.normalise and algorithm.filters.overlong_buffer:
        yield (
            f"algorithm.filters.overlong_buffer={algorithm.filters.overlong_buffer:g}: with "
            "algorithm.objectives.normalise=true rewards are looked at by objective, and it would be lost; leave it at "
            "0.0, or make the length an objective"
        )
    if given.normalise and (advantage_of(cfg).critic or (algorithm.kl.coef > 0 and algorithm.kl.placement == "reward")):
        what = "a critic" if advantage_of(cfg).critic else "algorithm.kl.placement=reward"
        yield (
            f"algorithm.objectives.normalise=true: {what} goes by one reward, not by one for each objective; use "
            "algorithm.advantage.name=grpo with algorithm.kl.placement=loss"
        )
