"""The page docs/papers.md, from the declarations in skyrl/algorithms and from conf/algorithm: `python docs/papers.py >
docs/papers.md`. A test holds it up to date."""

import inspect
import re

import yaml

from skyrl.algorithms import advantages, corrections, filters, kl, losses, objectives, reductions, selection
from skyrl.args import config_dir
from skyrl.trainers import rl, self_imitation

HEAD = """# Papers, functions, settings

Generated from the declarations in `skyrl/algorithms/` and from `conf/algorithm/`: `python docs/papers.py >
docs/papers.md`. One line per named piece: what it computes, where it comes from, the parameters with their defaults,
the recipes that use it (`algorithm=<name>`), and where we differ from the paper. Parts combine freely unless a line
says otherwise; `dry_run=true` refuses what does not fit. Advantages, losses, corrections, reductions and KL are tested
to 1e-10 against plain Python loops (`tests/algorithms/reference.py`), values and gradients. DPO and its kin, reward
models and distillation: [trainers](trainers.md). What is not here: [What we do not do](not-here.md).
"""
ADVANTAGES = """R is an episode's score: the sum of its rewards over all turns. An episode whose verifier failed has
no score; it is in no baseline and gets advantage 0. Groups of equal scores, but for rounding, get exactly 0."""
LOSSES = """r = exp(log pi - base). The base is `old_logprobs`, recomputed before the update
(`loss.recompute_old_logprobs=true`), else the sampler's log-probabilities. An entropy bonus is `loss.entropy_coef`.
`cross_entropy` is the loss of the warm-up and of SFT, `value` the critic's (`critic.clip`)."""
CORRECTIONS = """The weight multiplies the policy term only. Without old log-probs the current policy stands in for
them and the ratio of the loss becomes 1, so that no weight counts twice: exact for the first update of a batch; with
several updates per batch set `loss.recompute_old_logprobs=true`. `loss.correction_normalise=true` divides the weights
by their mean over the optimizer step. Whether the tokens that a mask rejects stay in the denominator of the reduction
is `loss.rejected`: `counted` (the default) or `dropped`."""
REDUCTIONS = """Weights per token, counted over all ranks, so that the engine only sums. Counted are the tokens that
filters leave; a token that a clip or a mask sets to 0 later is still counted (but see `loss.rejected`)."""
KL = """As a term of the loss (`kl.placement=loss`), for `kl.coef` above 0. In the reward (`kl.placement=reward`) it
is always k1: Ziegler et al. 2019, arXiv 1909.08593. `k1` in the loss is refused: its expected gradient is 0. Expected
gradients on-policy (Tang and Munos 2025, arXiv 2506.09477; Liu et al. 2025, arXiv 2510.01555): `k2` and the forms
with a + that of KL(pi, ref), `k3` that of KL(ref, pi), `k3_ratio` that of KL(pi, ref) off-policy too."""
OTHER = [
    ("objectives.normalise", advantages.decoupled),
    ("objectives.constraints", objectives.Objectives),
    ("filters.zero_variance, filters.refill", filters.zero_variance_groups),
    ("filters.overlong=mask", filters.trained_masks),
    ("filters.overlong_buffer", filters.overlong_penalty),
    ("loss.top_entropy", selection.top_entropy),
    ("loss.name=clip_cov", selection.clip_cov_tokens),
    ("loss.name=kl_cov", selection.kl_cov_tokens),
    ("kl.placement=reward", advantages.kl_rewards),
    ("kl.target, kl.horizon", kl.AdaptiveKL),
    ("reference.sync_every, reference.ema", rl.sync_reference),
    ("self_imitation.coef", self_imitation),
]


def recipes() -> dict[str, dict]:
    """The name of each file in conf/algorithm -> what it sets."""
    files = sorted((config_dir() / "algorithm").glob("*.yaml"))
    return {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}


def users(group: str, key: str, name: str) -> str:
    """The recipes in which the option `group`.`key` has the value `name`."""
    return ", ".join(f"`{file}`" for file, given in recipes().items() if given.get(group, {}).get(key) == name)


def user(options: str) -> str:
    """The recipes that set the first of these options."""
    group, _, key = options.split(",")[0].split("=")[0].partition(".")
    return ", ".join(f"`{file}`" for file, given in recipes().items() if key in given.get(group, {}) and key != "name")


def parts(function) -> tuple[str, str, str]:
    """(what is computed, source, what differs) of a docstring."""
    text = " ".join(inspect.getdoc(function).split())
    before, _, rest = text.partition("Source: ")
    source, _, differs = rest.partition("Differs: ")
    return before.strip(), source.strip().rstrip("."), differs.strip().rstrip(".")


def cell(text: str) -> str:
    """A text that may stand between two bars of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


def table(rows: list[tuple[str, object, str, str]]) -> list[str]:
    """Rows of (name, function, parameters, recipes)."""
    lines = [
        "| name | computes | paper | function | parameters | recipes | what differs |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, function, params, used in rows:
        what, source, differs = (cell(text) or "-" for text in parts(function))
        named = f"`{function.__name__.rpartition('.')[2]}`"
        lines.append(f"| `{name}` | {what} | {source} | {named} | {params or '-'} | {used or '-'} | {differs} |")
    return lines


def declared(registry, group: str) -> list[tuple[str, object, str, str]]:
    """Rows of the losses or advantages of `registry`."""
    ours = [one for one in registry.things() if one.fn.__module__.startswith("skyrl.")]
    return [
        (
            one.name,
            one.fn,
            ", ".join(f"`{name}` {param.default:g}" for name, param in one.params.items()),
            users(group, "name", one.name),
        )
        for one in sorted(ours, key=lambda one: one.name)
    ]


def options_of(given: dict) -> str:
    """What a recipe sets, as it would be typed below `algorithm.`."""
    flat = []
    for group, values in given.items():
        for key, value in values.items():
            inner = value.items() if isinstance(value, dict) else [(None, value)]
            flat += [f"{group}.{key}{f'.{name}' if name else ''}={str(x).replace('True', 'true')}" for name, x in inner]
    return " ".join(flat)


def page() -> str:
    """The whole page."""
    lines = [HEAD, "## Advantages (`algorithm.advantage.name`)", "", ADVANTAGES, ""]
    lines += table(declared(advantages.ADVANTAGES, "advantage"))
    lines += ["", "## Losses (`algorithm.loss.name`)", "", LOSSES, "", *table(declared(losses.LOSSES, "loss"))]
    for title, text, registry, group, key in (
        ("Corrections (`algorithm.loss.correction`)", CORRECTIONS, corrections.CORRECTIONS, "loss", "correction"),
        ("Reductions (`algorithm.loss.reduction`)", REDUCTIONS, reductions.REDUCTIONS, "loss", "reduction"),
        ("KL (`algorithm.kl.estimator`)", KL, kl.KL_ESTIMATORS, "kl", "estimator"),
    ):
        rows = [(name, function, "", users(group, key, name)) for name, function in registry.items()]
        lines += ["", f"## {title}", "", text, "", *table(rows)]
    lines += [
        "",
        "## Objectives, filters, tokens and what stands beside the loss",
        "",
        *table([(name, of, "", user(name)) for name, of in OTHER]),
    ]
    lines += ["", "## Recipes (`algorithm=<name>`)", "", "All without KL; add `kl.coef` where the paper has it.", ""]
    lines += ["| algorithm | options under `algorithm.` |", "|---|---|"]
    lines += [f"| `{name}` | `{options_of(given)}` |" for name, given in recipes().items()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


if __name__ == "__main__":
    print(page(), end="")
