"""What must be right before a run in Gymnasium environments (trainer=control), and its part of the plan. No torch."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator
from typing import Any

from skyrl.config.algorithm_rules import advantage_of, loss_of, those
from skyrl.config.schema import RunConfig
from skyrl.registry.plugins import import_plugins
from skyrl.types import UserError

EXTRA = {
    "control": "install the extra with pip install 'skyrl-spmd[control]'",
    "atari": "install the extra with pip install 'skyrl-spmd[atari]'",
}


def control_problems(cfg: RunConfig) -> Iterator[str]:
    """A line for each rule between the options of trainer=control that `cfg` breaks."""
    control, advantage, loss = cfg.control, advantage_of(cfg), loss_of(cfg)
    steps = control.n_envs * control.n_steps
    if cfg.warmup.num_steps:
        yield f"experiment={cfg.experiment}: is a recipe for language models; begin from experiment=control"
    if not control.env_id:
        yield "control.env_id: no environment is named; give the id of a Gymnasium environment, for example CartPole-v1"
    if steps % control.minibatch_size:
        near = [n for n in range(1, steps + 1) if steps % n == 0]
        near = sorted(sorted(near, key=lambda n: abs(n - control.minibatch_size))[:3])
        yield (
            f"control.minibatch_size={control.minibatch_size}: does not divide control.n_envs * control.n_steps = "
            f"{steps}; near ones that do: {', '.join(map(str, near))}"
        )
    if not advantage.critic:
        yield (
            f"algorithm.advantage.name={advantage.name}: trainer=control learns with a critic; use {those('critic')} "
            "(experiment=control has gae)"
        )
    if not cfg.algorithm.advantage.params.get("bootstrap"):
        yield (
            "algorithm.advantage.params.bootstrap=0: an episode that a limit cuts would count as ended, and so would "
            "every step of the loop; set it to 1"
        )
    if unknown := set(loss.needs) - {"sampling_logprobs", "advantages"}:
        yield f"algorithm.loss.name={loss.name}: needs {', '.join(sorted(unknown))}, which is not there; use ppo"
    if (control.epochs > 1 or control.minibatch_size < steps) and not loss.ratio:
        yield (
            f"algorithm.loss.name={loss.name}: has no ratio, so it is right for one update of a batch alone; set "
            f"control.epochs=1 and control.minibatch_size={steps}, or use ppo"
        )
    if cfg.strategy.name not in ("auto", "single", "ddp") or cfg.strategy.offload != "none":
        yield f"strategy.name={cfg.strategy.name}: policies for control are whole on every rank; use auto or ddp"


def import_gymnasium() -> Any:
    """The package. Raises UserError where it is missing."""
    try:
        return importlib.import_module("gymnasium")
    except ImportError:
        raise UserError(f"trainer=control: gymnasium is not installed; {EXTRA['control']}") from None


def find_environment(cfg: RunConfig) -> None:
    """Makes control.env_id known to Gymnasium: imports plugins, the module before its colon, and ale_py for ALE/.
    Raises UserError for a package that is missing and for an id that does not exist, with the closest ones."""
    name, gymnasium = cfg.control.env_id, import_gymnasium()
    import_plugins(cfg.plugins)
    module, _, own = name.rpartition(":")
    if name.startswith("ALE/"):
        try:
            gymnasium.register_envs(importlib.import_module("ale_py"))
        except ImportError:
            raise UserError(f"control.env_id={name}: ale_py is not installed; {EXTRA['atari']}") from None
    elif module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"control.env_id={name}: {module} cannot be imported: {error}") from error
    if own not in gymnasium.registry:
        close = difflib.get_close_matches(own, gymnasium.registry, n=3, cutoff=0.5)
        meant = f"did you mean {' or '.join(close)}?" if close else "gymnasium.pprint_registry() lists all"
        raise UserError(f"control.env_id={name}: no environment of this id is registered; {meant}")


def describe_control(cfg: RunConfig) -> list[tuple[str, str]]:
    """Lines of the plan: the environment, what a step is, and how it is learned from."""
    control, algorithm = cfg.control, cfg.algorithm
    steps = control.n_envs * control.n_steps
    updates = control.epochs * steps // control.minibatch_size
    return [
        ("env", f"{control.env_id}, {control.n_envs} of them ({control.vectorization}), policy {control.policy}"),
        ("step", f"{control.n_envs} x {control.n_steps} = {steps} steps of environments; {cfg.batch.num_steps} steps"),
        ("updates", f"{updates} a step: {control.epochs} epochs in minibatches of {control.minibatch_size}"),
        ("algorithm", f"{algorithm.advantage.name}, {algorithm.loss.name}, learning rate {cfg.optim.lr:g}"),
    ]
