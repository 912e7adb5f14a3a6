"""Low-rank adapters over a frozen model: what is adapted, their parameters, and which tokens use which adapter.

The model itself is never changed. `install` puts hooks on its products once; `routed` says for one micro-batch which
tokens belong to which adapter. Adapters lie outside of the module, whole on every rank, however the base is laid out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from skyrl.kernels import exact_ops
from skyrl.models.linear_attention import is_delta_net
from skyrl.models.weights import generator_of, path_of
from skyrl.types import LoraSpec, UserError


@dataclass(frozen=True)
class Experts:
    """One stacked parameter of a module of experts, [E, out, in], or [E, in, out] where `transposed`: a linear map of
    each expert. Its A is [E * rank, in] and its B [out, rank * E], as peft lays them out for target_parameters."""

    module: nn.Module
    name: str
    count: int  # E
    inputs: int
    outputs: int
    transposed: bool

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """B A of every expert, in the shape of the parameter."""
        a_ERI, b_ORE = a.view(self.count, -1, self.inputs), b.view(self.outputs, -1, self.count)
        return torch.einsum("ore,eri->eio" if self.transposed else "ore,eri->eoi", b_ORE, a_ERI)


Product = nn.Linear | Conv1D | Experts  # Conv1D is a linear map whose weight lies the other way round, as in GPT-2
Segment = tuple[int, int, "Adapter | None"]  # tokens start ... stop of a pack, and what adapts them


class AdaptableModel(Protocol):
    """What adapters need of a model; forward.CausalLM has it."""

    net: Any
    router: Router | None
    routing: Any

    @property
    def config(self) -> Any:
        """What transformers made of the model's config.json."""

    def layers(self) -> list[nn.Module]:
        """The decoder layers, first to last: where attention and feed-forward products are found."""


class Router:
    """Which adapter applies to which of the T packed tokens; one per model, empty outside of `routed`.

    `places` are the same segments in the order of tokens that the layers see (padded rows have others). `connect`
    makes the embeddings part of the graph, so that every layer takes part in the backward pass.
    """

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.places: list[Segment] = []
        self.connect = False

    def active(self) -> bool:
        """Whether any token has an adapter."""
        return any(adapter is not None for _, _, adapter in self.segments)

    def pad(self, borders: list[int], length: int) -> None:
        """Now the layers see the rows between `borders`, which segments hold whole, each of `length` tokens."""
        row = {border: number for number, border in enumerate(borders)}
        self.places = [(row[start] * length, row[stop] * length, adapter) for start, stop, adapter in self.segments]

    def share(self, tokens: int, scored: int) -> None:
        """From here on the layers see `tokens` tokens and the head `scored`, all of the one segment that there is."""
        assert len(self.segments) <= 1
        self.places = [(0, tokens, adapter) for _, _, adapter in self.segments]
        self.segments = [(0, scored, adapter) for _, _, adapter in self.segments]

    def unembedding(self) -> list[tuple[int, int, tuple[Tensor, Tensor, float] | None]]:
        """Stretches of packed tokens with the (A, B, scale) of the output embedding, None for the base's own."""
        out: list[tuple[int, int, tuple[Tensor, Tensor, float] | None]] = []
        owners: list[Adapter | None] = []
        for start, stop, adapter in self.segments:
            owner = adapter if adapter is not None and adapter.head is not None else None
            if out and owners[-1] is owner:
                out[-1] = (out[-1][0], stop, out[-1][2])
                continue
            owners.append(owner)
            low = None if owner is None or owner.head is None else (*owner.pairs[owner.head], owner.scale)
            out.append((start, stop, low))
        return out


class Adapter(nn.Module):
    """A and B for each adapted product of a model, named "<path in net>.A" [rank, in] and ".B" [out, rank]; those of
    experts hold all of them (see Experts).

    `pairs`: path -> (A, B); `scale`: alpha / rank; `head`: the path of the output embedding if it is adapted. A starts
    as PEFT's (uniform within 1 / sqrt(in)), keyed by (seed, path) and drawn on the CPU: equal on every rank and device;
    B starts at 0, so a fresh adapter changes nothing. `weights`, by the parameters' names, replace both.
    Raises: UserError for what this model cannot adapt, and for weights of other names or shapes.
    """

    def __init__(
        self,
        model: AdaptableModel,
        spec: LoraSpec,
        *,
        name: str,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.spec, self.scale = name, spec, spec.alpha / spec.rank
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        head, linears = output_path(model), adapted(model, spec)
        self.head = head if head in linears else None
        if weights is not None:
            _check_weights(name, linears, spec.rank, weights)
        for path, linear in linears.items():
            holder: nn.Module = self
            for part in path.split("."):
                if part not in holder._modules:
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            if weights is not None:
                a, b = (weights[f"{path}.{side}"] for side in "AB")
            else:
                shape_a, shape_b = shapes_of(linear, spec.rank)
                a = torch.rand(shape_a, generator=generator_of(f"lora/{spec.seed}/{path}")) * 2 - 1
                bound = 1.0 / math.sqrt(shape_a[1])  # kaiming_uniform with a = sqrt(5)
                a, b = a * bound, torch.zeros(shape_b)  # a product: a quotient rounds otherwise
            holder.A, holder.B = (nn.Parameter(t.detach().to(device, dtype, copy=True)) for t in (a, b))
            self.pairs[path] = (holder.A, holder.B)

    def frozen_copy(self, name: str) -> Adapter:
        """The weights as they are now under another name; no gradient, and no tensor shared with this one."""
        twin = copy.deepcopy(self).requires_grad_(False)
        twin.name = name
        return twin

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, detached, not copied."""
        return {name: p.detach() for name, p in self.named_parameters()}


def adapted(model: AdaptableModel, spec: LoraSpec) -> dict[str, Product]:
    """The products that `spec` adapts, by their path in `model.net`, in the order of the module.

    Found by structure: attention's are all linear maps inside the module that attends, the feed-forward ones all
    others of a layer. Raises: UserError for a kind of which the model has none, or some that cannot be adapted
    (experts, modules of other classes), naming the module.
    """
    groups, strange = _groups(model)
    wanted = {kind for kind in ("attn", "mlp", "unembed") if getattr(spec, kind)}
    family = f"model type {model.config.model_type!r}"
    for kind in sorted(wanted):
        if kind in strange or not groups[kind]:
            found = strange.get(kind, "nothing of the kind is found in it")
            raise UserError(
                f"lora.{kind}: {family} has what cannot be adapted ({found}); nn.Linear, Conv1D and experts of "
                f"transformers' interface can; set {kind} (train_{kind}) to false"
            )
    kinds = {id(module): kind for kind, modules in groups.items() for module in modules}
    out: dict[str, Product] = {}
    for path, module in model.net.named_modules():
        if kinds.get(id(module)) in wanted:
            out.update({f"{path}.{one.name}": one for one in experts_of(module)} or {path: module})
    return out


def shapes_of(product: Product, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of A and B."""
    if isinstance(product, Experts):
        return (product.count * rank, product.inputs), (product.outputs, rank * product.count)
    if isinstance(product, Conv1D):
        return (rank, product.nx), (product.nf, rank)
    return (rank, product.in_features), (product.out_features, rank)


def experts_of(module: nn.Module) -> list[Experts]:
    """The stacked parameters of a module of experts that goes through transformers' interface for these: it takes
    tokens with the experts chosen for each. [] for every other module."""
    if not hasattr(module, "is_transposed"):  # the interface says it of each such module
        return []
    turned = bool(module.is_transposed)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    return [
        Experts(module, name, count, one if turned else two, two if turned else one, turned)
        for name, (count, one, two) in shapes.items()
    ]


def _check_weights(name: str, linears: dict[str, Product], rank: int, weights: Mapping[str, Tensor]) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for path, linear in linears.items():
        shapes[f"{path}.A"], shapes[f"{path}.B"] = shapes_of(linear, rank)
    if odd := sorted(shapes.keys() ^ weights.keys()):
        verb = "lacks" if odd[0] in shapes else "has"
        raise UserError(
            f"adapter {name!r}: {verb} {odd[0]} (and {len(odd) - 1} more names differ); give A and B of each adapted "
            f"product, such as {next(iter(shapes))}"
        )
    for key, shape in shapes.items():
        if tuple(weights[key].shape) != shape:
            raise UserError(
                f"adapter {name!r}: {key} has shape {list(weights[key].shape)}, must be {list(shape)}; the rank or the "
                "base model is another"
            )


def output_path(model: AdaptableModel) -> str | None:
    """The path of the output embedding in `model.net`; None for a critic."""
    output = model.net.get_output_embeddings()
    return None if output is None else path_of(model.net, output)


def _groups(model: AdaptableModel) -> tuple[dict[str, list[nn.Module]], dict[str, str]]:
    """The modules with products of each kind; and for a kind that has weights in modules of other classes, one of
    these. What chooses the experts of a token is never adapted: its choice is no product."""
    out: dict[str, list[nn.Module]] = {"attn": [], "mlp": [], "unembed": []}
    strange: dict[str, str] = {}
    for number, layer in enumerate(model.layers()):
        attending = [
            m for m in layer.modules() if (hasattr(m, "is_causal") and hasattr(m, "layer_idx")) or is_delta_net(m)
        ]
        inside = {id(part) for m in attending for part in m.modules()}
        for path, module in layer.named_modules():
            kind = "attn" if id(module) in inside else "mlp"
            if type(module) in (nn.Linear, Conv1D) or experts_of(module):
                out[kind].append(module)
            elif type(module) not in (nn.Embedding, nn.Conv1d) and not is_router(path, layer):
                if any(sum(n > 1 for n in p.shape) > 1 for p in module.parameters(recurse=False)):
                    strange.setdefault(kind, f"{type(module).__name__} {path} of layer {number}")
    output = model.net.get_output_embeddings()
    if type(output) is nn.Linear:
        out["unembed"].append(output)
    return out, strange


def is_router(path: str, layer: nn.Module) -> bool:
    """Whether a module of a layer stands beside experts and chooses among them."""
    beside = layer.get_submodule(path.rpartition(".")[0])
    return path.rpartition(".")[2] in ("gate", "router") and any(hasattr(m, "is_transposed") for m in beside.children())


# ---- hooks


def install(model: AdaptableModel) -> Router:
    """Puts hooks on everything that can be adapted, once; later calls return the same Router.

    Before or after the model was sharded. Without `routed` the hooks change nothing, not even by rounding.
    """
    if model.router is None:
        router = model.router = Router()
        groups, _ = _groups(model)
        paths = {id(module): path for path, module in model.net.named_modules()}
        for module in groups["attn"] + groups["mlp"]:  # the output embedding is never called in training: see CausalLM
            module.skyrl_adapters = (router, paths[id(module)])  # type: ignore[assignment]  # for models.latent as well
            if experts_of(module):
                exact_ops.replace_forward(module, _adapted_experts)
            else:
                module.register_forward_hook(_adds(router, paths[id(module)]))
        model.net.get_input_embeddings().register_forward_hook(_connects(router))
    return model.router


@contextmanager
def routed(model: AdaptableModel, segments: list[Segment], *, connect: bool = False) -> Iterator[None]:
    """Inside, the packed tokens of `segments` go through their adapters; a token in none of them sees the base alone.

    Must last until the backward pass is over: checkpointed layers are computed again there. `segments` are in
    order, do not overlap, and cover all T tokens. `connect`: every layer takes part in the backward pass, whichever
    products the adapters adapt; a sharded base needs it, since its backward is a collective.
    """
    router = install(model)
    if router.segments:
        raise RuntimeError("routed() inside of routed()")
    router.segments = router.places = merged(segments)
    router.connect = connect
    try:
        yield
    finally:
        router.segments, router.places, router.connect = [], [], False


def merged(segments: list[Segment]) -> list[Segment]:
    """The same segments with neighbours of one adapter joined."""
    out: list[Segment] = []
    for start, stop, adapter in segments:
        if out and out[-1][2] is adapter and out[-1][1] == start:
            out[-1] = (out[-1][0], stop, adapter)
        else:
            out.append((start, stop, adapter))
    return out


def segments_of(adapters: list[Adapter | None], lengths: list[int] | None = None) -> list[Segment] | None:
    """Stretches of one adapter over rows that lie end to end, `lengths` rows of each (None: 1); None where all of them
    are the base."""
    if all(adapter is None for adapter in adapters):
        return None
    out, at = [], 0
    for adapter, length in zip(adapters, lengths or [1] * len(adapters), strict=True):
        out.append((at, at + length, adapter))
        at += length
    return merged(out)


def low_rank(x: Tensor, down: Tensor, scale: float) -> Tensor:
    """scale * x A^T, [..., rank]: the small side of an adapter's product."""
    return exact_ops.linear(x, down) * scale


def _adds(router: Router, path: str) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        places = router.places
        pairs = [None if adapter is None else adapter.pairs.get(path) for _, _, adapter in places]
        if not any(pair is not None for pair in pairs):
            return None
        x = args[0]
        if x.numel() != places[-1][1] * x.shape[-1]:
            raise RuntimeError(f"{path} sees {x.numel() // x.shape[-1]} tokens, the adapters' segments {places[-1][1]}")
        parts = []
        for (start, stop, adapter), pair in zip(places, pairs, strict=True):
            out = output.narrow(-2, start, stop - start)
            if adapter is not None and pair is not None:
                u = low_rank(x.narrow(-2, start, stop - start), pair[0], adapter.scale)
                out = out + exact_ops.linear(u, pair[1])
            parts.append(out)
        return parts[0] if len(parts) == 1 else torch.cat(parts, -2)

    return hook


def _adapted_experts(module: Any, plain: Any, hidden: Tensor, *chosen: Tensor) -> Tensor:
    """The experts of each stretch of tokens with their own deltas added, as peft computes them: one weight of all
    experts exists twice for a moment. `chosen`: experts of each token, and what their outputs count."""
    router, path = module.skyrl_adapters
    found = experts_of(module)
    if not any(
        adapter and any(f"{path}.{one.name}" in adapter.pairs for one in found) for *_, adapter in router.places
    ):
        return plain(hidden, *chosen)
    parts = []
    for start, stop, adapter in router.places:
        for one in found:
            pair = None if adapter is None else adapter.pairs.get(f"{path}.{one.name}")
            if pair is not None:  # seen before the parameter, which stays where it is
                weight = module._parameters[one.name]
                module.__dict__[one.name] = weight + (adapter.scale * one.delta(*pair)).to(weight.dtype)
        try:
            parts.append(plain(hidden[start:stop], *(x[start:stop] for x in chosen)))
        finally:
            for one in found:
                module.__dict__.pop(one.name, None)
    return torch.cat(parts)


def _connects(router: Router) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if router.connect and torch.is_grad_enabled() and not output.requires_grad:
            return output.detach().requires_grad_()
        return None

    return hook
