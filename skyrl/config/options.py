"""All options as a flat list, read from the dataclasses and the docstrings under their fields; who reads which, and
which have another name today. No torch, no Hydra."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import yaml

from skyrl.algorithms.advantages import ADVANTAGES
from skyrl.algorithms.losses import LOSSES
from skyrl.args import config_dir
from skyrl.config import schema, schema_policy, schema_server, trainers

# All that a server reads besides `service`. What is drawn, and how, comes with each request.
SERVER_READS = (
    "seed dry_run plugins model strategy service feedback dashboard chat batch.max_tokens_per_microbatch "
    "batch.max_row_tokens debug.deterministic run.world_size run.threads run.collective_timeout_seconds "
    "run.allow_different sampler.backend sampler.block_tokens sampler.max_running sampler.kv_cache_gib "
    "sampler.prefix_cache sampler.cuda_graphs"
).split()
# Command -> groups that it does not read, although it reads what is around them.
SFT_UNREAD = (
    "service feedback algorithm batch.num_steps batch.samples_per_prompt batch.optim_steps_per_batch "
    "batch.epochs_per_batch optim.lr optim.warmup_steps sampler.temperature debug.check_weights_every"
).split()
TRAIN_UNREAD = (  # a run that serves has one model, whose checkpoints are the run's
    "service.folder service.aliases_file service.tokenizer_id service.max_models service.max_resident_models "
    "service.max_rank service.full_parameters service.mix_tenants service.model_idle_seconds service.gap_seconds "
    "service.loss_substitutes"
).split()
PAIRS_UNREAD = [path for path in SFT_UNREAD if path not in ("batch.num_steps", "optim.lr", "optim.warmup_steps")]
DISTILL_UNREAD = "service feedback algorithm batch.optim_steps_per_batch batch.epochs_per_batch".split()
EVALUATE_UNREAD = (
    "service feedback algorithm.advantage algorithm.loss algorithm.kl algorithm.filters algorithm.critic "
    "algorithm.router optim warmup batch.num_steps batch.prompts_per_step batch.samples_per_prompt "
    "batch.optim_steps_per_batch batch.epochs_per_batch checkpoint run.resume_optimizer eval.every_steps "
    "eval.stop_when eval.patience debug.check_replicas_every debug.check_weights_every tracking.rollouts_every trainer "
    "preference reward_model distill data.epochs"
).split()
CONTROL_UNREAD = (
    "service feedback model.path model.revision model.tokenizer model.chat_template model.trust_remote_code "
    "model.head_dtype model.activation_checkpointing model.logits_chunk_tokens model.lora model.tiny sampler batch env "
    "algorithm.kl algorithm.reference algorithm.self_imitation algorithm.filters algorithm.router algorithm.objectives "
    "algorithm.critic.lr algorithm.critic.warmup_steps algorithm.loss.reduction algorithm.loss.correction "
    "algorithm.loss.top_entropy algorithm.loss.recompute_old_logprobs data chat warmup preference reward_model distill "
    "eval.num_prompts eval.samples_per_prompt eval.temperature eval.sets eval.k eval.group_by tracking.rollouts_every "
    "debug.check_weights_every"
).split()
UNREAD: dict[str, Sequence[str]] = {
    "train": TRAIN_UNREAD,
    "sft": SFT_UNREAD,
    "evaluate": EVALUATE_UNREAD,
    "serve": ("model.lora",),
    **dict.fromkeys(("dpo", "reward_model"), PAIRS_UNREAD),
    "distill": DISTILL_UNREAD,
    "control": CONTROL_UNREAD,
}
# Names of an earlier release -> the ones of today, as which saved configs are read.
RENAMED = {
    "algorithm.loss.recompute_anchor": "algorithm.loss.recompute_old_logprobs",
    "algorithm.loss.clip_low": "algorithm.loss.params.clip_low",
    "algorithm.loss.clip_high": "algorithm.loss.params.clip_high",
    "algorithm.advantage.gamma": "algorithm.advantage.params.gamma",
    "algorithm.advantage.lam": "algorithm.advantage.params.lam",
    "algorithm.advantage.eps": "algorithm.advantage.params.eps",
}


@dataclass(frozen=True)
class Option:
    """One option: dotted path, type as written ("path" for PathStr), default, docstring in one line."""

    path: str
    type: str
    default: Any
    doc: str


def reads(mode: str, path: str) -> bool:
    """Whether `python -m skyrl.<mode>` reads the option at `path`, or anything in the group at `path`."""
    if any(path == group or path.startswith(group + ".") for group in UNREAD[mode]):
        return False
    if mode != "serve":
        return True
    return any(f"{path}.".startswith(f"{known}.") or known.startswith(f"{path}.") for known in SERVER_READS)


@lru_cache
def _docstrings() -> dict[tuple[str, str], str]:
    """(class, field) -> the string literal that follows the field, in one line."""
    found: dict[tuple[str, str], str] = {}
    parts = (schema, schema_policy, schema_server, trainers)
    nodes = (node for part in parts for node in ast.parse(inspect.getsource(part)).body)
    for node in (node for node in nodes if isinstance(node, ast.ClassDef)):
        for item, after in zip(node.body, node.body[1:], strict=False):
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(after, ast.Expr):
                if isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
                    found[node.name, item.target.id] = " ".join(after.value.value.split())
    return found


@lru_cache
def _walk() -> tuple[tuple[Option, ...], dict[str, str]]:
    """Every option in the order of the schema, and every group with what it is about."""
    options: list[Option] = []
    groups: dict[str, str] = {}

    def walk(cls: type, prefix: str) -> None:
        types = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            path, kind = prefix + field.name, types[field.name]
            if dataclasses.is_dataclass(kind):
                groups[path] = " ".join(str(kind.__doc__).split())
                walk(typing.cast(type, kind), path + ".")
                continue
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            written = str(field.type).replace("PathStr", "path")
            options.append(Option(path, written, default, _docstrings().get((cls.__name__, field.name), "")))

    walk(schema.RunConfig, "")
    return tuple(options), groups


@lru_cache
def all_options(mode: str = "") -> tuple[Option, ...]:
    """Every option that command `mode` reads, in the order of the schema; "" = every option there is."""
    return tuple(option for option in _walk()[0] if not mode or reads(mode, option.path))


@lru_cache
def groups(mode: str = "") -> dict[str, str]:
    """Dotted path of every group of options that command `mode` reads -> what it is about (its class's docstring)."""
    return {path: about for path, about in _walk()[1].items() if not mode or reads(mode, path)}


def parameters() -> list[Option]:
    """The options below algorithm.advantage.params and algorithm.loss.params, as the registered advantages and losses
    declare them; the text says whose they are. The default is that of the first that has it."""
    found = []
    for group, declared in (
        ("advantage", ADVANTAGES.things()),
        ("loss", [loss for loss in LOSSES.things() if loss.kind == "policy"]),
    ):
        for name in dict.fromkeys(name for one in declared for name in one.params):
            owners = {one.name: one.params[name] for one in declared if name in one.params}
            first = next(iter(owners.values()))
            defaults = ", ".join(f"{owner} {param.default:g}" for owner, param in owners.items())
            doc = f"{first.doc}; {first.allowed}. Default of {defaults}."
            found.append(Option(f"algorithm.{group}.params.{name}", "float", first.default, doc))
    return found


@lru_cache(maxsize=1)
def short_names() -> dict[str, str]:
    """Full path -> the shortest end of it that no other option of a run has ("optim.lr" stays, "top_k" is enough)."""
    paths = [option.path for option in (*all_options("train"), *parameters())]

    def shortest(path: str) -> str:
        parts = path.split(".")
        for count in range(1, len(parts)):
            tail = ".".join(parts[-count:])
            if sum(other == tail or other.endswith("." + tail) for other in paths) == 1:
                return tail
        return path

    return {path: shortest(path) for path in paths}


def suggest(path: str, extra: tuple[str, ...] = (), mode: str = "train") -> str:
    """The option or group that was probably meant by `path`; "" when nothing is close."""
    known = [*(one.path for one in (*all_options(mode), *parameters()) if reads(mode, one.path)), *groups(mode), *extra]
    last = path.rsplit(".", 1)[-1]
    for ours, theirs in yaml.safe_load((config_dir() / "elsewhere.yaml").read_text(encoding="utf-8")).items():
        if reads(mode, ours) and {path, last} & {*theirs.split()}:
            return ours
    # A right name in the wrong or no group: lr, loss.reduction, model.num_layers.
    same_name = [name for name in known if name.rsplit(".", 1)[-1] == last]
    inside = [name for name in same_name if name.startswith(path.removesuffix(last))]
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.7)
    return close[0] if close and not inside else " or ".join((inside or same_name)[:3])


def unknown_option(path: str, folders: tuple[str, ...] = (), mode: str = "train") -> str:
    """The one line for an option that command `mode` does not have. `folders` are conf's groups of files."""
    if mode == "serve" and path.startswith("model.lora"):
        return f"{path}: clients of a server ask for adapters themselves (create_lora_training_client); leave it out"
    known = {option.path for option in all_options()} | set(groups())
    if path in known and not reads(mode, path):
        named = {"sft batch.num_steps": "warmup.num_steps", "sft optim.lr": "warmup.lr"}
        own = (named | {"control batch.num_steps": "control.total_steps"}).get(f"{mode} {path}", "")
        who = f"skyrl.{mode}" if mode in ("train", "sft", "evaluate", "serve", "control") else f"trainer={mode}"
        return f"{path}: {who} does not read it; " + (f"its own is {own}" if own else "leave it out")
    meant = suggest(path, folders, mode)
    return f"{path}: no such option; " + (f"did you mean {meant}?" if meant else "--help lists all options")


def alias_problems(cfg: schema.RunConfig, aliases: dict[str, str], where: str) -> Iterator[str]:
    """One line for each alias that cannot be kept; `where` names the option or file they come from."""
    for name, path in aliases.items():
        if not name:
            yield f"{where}: an empty name; write the name that clients ask for"
        if path not in ("", cfg.model.path):
            yield (
                f"{where}: {name} is to be {path}, but this server has one model, model.path={cfg.model.path}; give "
                '"", or start another server for it'
            )
