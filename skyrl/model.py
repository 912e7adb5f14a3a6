"""One model of the engine: its weights under a strategy, what it is for, how far it is trained, and what samples it.

An adapter (LoRA) is a model too: a small one of its own, whose forward pass is that of the frozen base it lies over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from skyrl.algorithms.losses import LOSSES, compute_loss
from skyrl.config.schema import BatchConfig, ModelConfig
from skyrl.distributed.collectives import gather_objects, on_leader
from skyrl.distributed.init import World
from skyrl.models.experts import replaying
from skyrl.models.forward import CausalLM
from skyrl.models.lora import Adapter, install, routed, segments_of
from skyrl.models.packed import PADDING_ROW, collate, loss_dtype
from skyrl.models.results import RowResults
from skyrl.models.weights import persistent_buffers, put
from skyrl.pretrained.export import export_model
from skyrl.pretrained.peft import merge_adapter, write_adapter
from skyrl.sampler.sampler import Sampler
from skyrl.strategies.base import Strategy, full_tensor, local_tensor
from skyrl.types import AdamParams, Datum, LoraSpec, LossSpec, Metrics, RunError, UserError

MakeSampler = Callable[..., Sampler]  # sampler.make.make_sampler with all that every model has in common


@dataclass(frozen=True)
class ModelSpec:
    """What to create. `head`: logits (a policy), value (a critic) or reward (a value without a bias, as classifiers of
    transformers have it). `source` names other weights than the run's own. A frozen model has no gradient and no
    optimizer. `copy_of` starts from another model of this engine, as it is now, instead of from `model.path`. `lora`
    makes an adapter over the frozen model `base`, whole on every rank however the base is laid out.
    `averaged`: a frozen model whose weights are means, which are kept in the precision of masters."""

    head: Literal["logits", "value", "reward"] = "logits"
    trainable: bool = True
    copy_of: str = ""
    source: ModelConfig | None = None
    lora: LoraSpec | None = None
    base: str = ""
    averaged: bool = False


@dataclass(frozen=True)
class OpenSampler:
    """A model as it is sampled: whole weights, and a sampler over `adapters`. A frozen one's stays open."""

    module: CausalLM
    sampler: Sampler
    adapters: Mapping[str, Adapter]


class Model:
    """Weights, optimizer and pending gradient (`strategy`), what they are for (`spec`), and the number of optimizer
    steps they have seen (`version`). Methods are collective unless they say otherwise."""

    def __init__(self, name: str, spec: ModelSpec, strategy: Strategy, world: World, base: Model | None = None) -> None:
        self.name, self.spec, self.strategy, self.world, self.base = name, spec, strategy, world, base
        self.version = 0
        self.open: OpenSampler | None = None
        self._sampler: Sampler | None = None  # kept from one `sampling` to the next, which refreshes it

    @property
    def whole(self) -> Model:
        """The model whose module computes this one: an adapter's base, else itself."""
        return self.base or self

    # ---- training --------------------------------------------------------------------------------------------------

    def run_microbatch(
        self,
        results: RowResults,
        picked: list[int],
        adapters: list[Adapter | None],
        loss: LossSpec,
        *,
        backward: bool,
        layout: BatchConfig,
        top_k: int = 0,
        entropy: bool = False,
    ) -> None:
        """Forward pass, loss and backward pass of the rows `picked` of `results.rows`, each through its adapter (one
        for every row of the call), laid out as `layout` says. With `top_k` log-probabilities and ids of the likeliest
        tokens instead of those of the targets, with `entropy` the policy's entropies. Without any row one token of
        weight 0, for the sake of collectives."""
        rows, is_critic = [results.rows[i] for i in picked] or [PADDING_ROW], self.spec.head != "logits"
        batch = collate(
            rows,
            dtype=loss_dtype(next(self.strategy.module.parameters()).dtype),
            device=self.world.device,
            fill={**LOSSES.get(loss.name).defaults(), **loss.params} if loss.name else {},
            share=layout.share_prefixes and len({id(adapters[i]) for i in picked}) == 1,
        )
        balance = bool(loss.name and loss.router_aux_coef)
        choices = nullcontext() if is_critic else replaying(self.strategy.module, batch, balance=balance)
        with self._routed(rows, [adapters[i] for i in picked] or [None], connect=backward), choices as routing:
            given: Any = {"temperature": loss.temperature, "packing": layout.packing, "top_k": top_k}
            out = self.strategy.module(batch, entropy=(bool(loss.name) or entropy) and not is_critic, **given)
            if picked:
                scored_T = out.entropy_T if entropy else out.logprobs_T
                results.add_output(picked, out.values_T if is_critic else scored_T)
            if not loss.name:
                return
            loss_T, metrics = compute_loss(out, batch, loss)
            total = (loss_T * batch.weights_T).sum()
            if balance and routing is not None:
                balance_T = routing.balance_D()[batch.row_T]
                total = total + loss.router_aux_coef * (balance_T * batch.weights_T).sum()
                metrics["router_balance:mean"] = balance_T
            if backward:
                self.strategy.backward(total)
            if picked:
                results.add_loss(total, loss_T, metrics, batch)

    def _routed(
        self, rows: list[Datum], adapters: list[Adapter | None], *, connect: bool
    ) -> AbstractContextManager[None]:
        """Inside, the tokens of each row go through its adapter."""
        module = self.strategy.module
        if module.router is None:
            return nullcontext()
        segments = segments_of(adapters, [len(row.tokens) for row in rows]) or []
        # ranks may train adapters of other kinds at the same time, or none: their backward collectives must agree
        return routed(module, segments, connect=connect and self.strategy.is_sharded)

    def optim_step(self, adam: AdamParams) -> Metrics:
        """One AdamW step from everything pending; returns {"grad_norm:mean", "lr:mean"}."""
        self.check_trainable()
        metrics = self.strategy.optim_step(adam)
        self.version += 1
        return {**metrics, "lr:mean": adam.lr}

    def check_trainable(self) -> None:
        """Raises UserError for a frozen model. Local."""
        if not self.spec.trainable:
            raise UserError(f"model {self.name!r} is frozen")

    def copy_weights(self, source: Model, keep: float = 0.0) -> None:
        """Takes the weights of a model of the same shape and layout, as they are now: keep * own + (1 - keep) * given,
        in the precision of its masters."""
        given = source.strategy.state_dict(optimizer=False)["weights"]
        own = self.strategy.state_dict(optimizer=False)["weights"]
        with torch.no_grad():
            for name, tensor in own.items():
                if keep:
                    mine = local_tensor(tensor)
                    mine.mul_(keep).add_(local_tensor(given[name]).to(mine), alpha=1.0 - keep)
                else:
                    tensor.copy_(given[name])
        self.strategy.load_state_dict({"weights": own}, optimizer=False)

    # ---- sampling --------------------------------------------------------------------------------------------------

    @contextmanager
    def sampling(self, make: MakeSampler, *, keep: bool = True) -> Iterator[Sampler]:
        """A sampler over the weights as they are now: the trained parameters themselves where every rank has them
        whole, else a copy that is filled in place where they have changed. Both stay for the next time with `keep`."""
        adapters = None if self.base is None else {self.name: self.strategy.module}
        finished = False
        with torch.no_grad():
            module = self.whole.strategy.gathered()
            if adapters is not None:
                install(module)
            if self._sampler is None:
                self._sampler = make(
                    module, version=self.version, adapters=adapters, base_name=self.spec.base or "policy"
                )
            else:
                if adapters is not None:
                    self._sampler.forget_adapter(self.name)  # it has changed in place
                self._sampler.refresh(self.version)
                self._sampler.metrics()  # dropped: an evaluation's counts are not the next step's
            self.open = OpenSampler(module, self._sampler, adapters or {})
            try:
                yield self._sampler
                finished = True
            finally:
                self.open = None
                if not finished:
                    self._sampler = None  # it may hold requests that nobody waits for
                if not keep:
                    self.free_sampling()

    def free_sampling(self) -> None:
        """Gives back what `sampling` keeps: the cache, what the sampler has packed or recorded, the gathered copy."""
        self._sampler = None
        if self.whole.open is None:
            self.whole.strategy.free_gathered()

    def open_sampler(self, make: MakeSampler, adapters: Mapping[str, Adapter]) -> OpenSampler:
        """As Engine.open_sampler, over `adapters` (a live mapping). Of a model that is trained what `sampling` has
        opened, inside its block; raises UserError elsewhere."""
        if self.open is None:
            if self.spec.trainable:
                raise UserError(f"model {self.name!r} is trained itself; only a frozen base can stay open for sampling")
            module = self.strategy.gathered()
            if module is not self.strategy.module:
                install(module)
            self.open = OpenSampler(module, make(module, adapters=adapters, base_name=self.name), adapters)
        return self.open

    def replace_weights(self, weights: Mapping[str, Tensor]) -> None:
        """As Engine.replace_base: its open sampler goes on with the new weights."""
        if self.open is not None and self.open.sampler.unfinished():
            raise RuntimeError(f"model {self.name!r} cannot be replaced: samples are under way")
        self.load_whole_state({"weights": weights}, optimizer=False)
        if self.open is not None:
            self.strategy.gathered()  # the copy that the sampler reads, where there is one, takes the new weights
            self.open.sampler.refresh(self.open.sampler.version + 1)

    # ---- state -----------------------------------------------------------------------------------------------------

    def state(self, *, optimizer: bool) -> dict[str, Any]:
        """Tensors by kind and name, and "version", for a checkpoint. Views: copy before the next step."""
        optimizer = optimizer and self.spec.trainable
        return {**self.strategy.state_dict(optimizer=optimizer), "version": self.version}

    def load_state(self, state: Mapping[str, Any], *, optimizer: bool) -> None:
        """Takes back what `state` gave, after a checkpoint filled it."""
        parts = dict(state)
        self.version = int(parts.pop("version"))
        self.strategy.load_state_dict(parts, optimizer=optimizer and self.spec.trainable)

    def whole_state(self, *, optimizer: bool) -> dict[str, Any]:
        """Whole tensors as copies on the CPU of every rank, as Engine.model_state has them."""
        parts = self.strategy.state_dict(optimizer=optimizer)
        step = {"step": parts.pop("step").detach().clone().cpu()} if "step" in parts else {}
        return {key: {name: _whole(t) for name, t in part.items()} for key, part in parts.items()} | step

    def load_whole_state(self, state: Mapping[str, Any], *, optimizer: bool) -> None:
        """Takes what `whole_state` gave, the same on every rank, as Engine.load_model_state does."""
        own = self.strategy.state_dict(optimizer=self.spec.trainable)
        step = own.pop("step", None)
        given = {key: state.get(key) if optimizer or key == "weights" else None for key in own}
        for key, part in own.items():
            if optimizer or key == "weights":
                _check_fits(self.name, key, part, given[key])
        if self.spec.trainable:
            self.strategy.clear_gradient()
        for key, part in own.items():
            new = given[key]
            for name, tensor in part.items():
                put(tensor, torch.zeros(tensor.shape) if new is None else new[name])
        if step is not None:
            own["step"] = torch.as_tensor(float(state["step"]) if optimizer else 0.0, dtype=step.dtype)
        self.strategy.load_state_dict(own, optimizer=self.spec.trainable)

    def export(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, *, source: ModelConfig, about: str
    ) -> None:
        """As Engine.export, in `dtype`; what is not weights is that of `source`."""
        lora, net = self.spec.lora, self.whole.strategy.module
        state = self.whole.strategy.full_state_dict(dtype)
        state.update((name, buffer.cpu()) for name, buffer in persistent_buffers(net).items())
        weights = {} if lora is None else self.strategy.full_state_dict(torch.float32)

        place = (tokenizer, folder, dtype)

        def write() -> None:
            if lora is None:
                reward = self.spec.head == "reward"
                export_model(state, net.config, *place, source=source, classifier=reward, about=about)
                return
            config, written, heads = merge_adapter(state, weights, lora, net)
            more = partial(write_adapter, weights=written, spec=lora, base=source.path, heads=heads)
            export_model(*(state, config, *place), source=source, more=lambda part: more(part / "adapter"), about=about)

        on_leader(self.world, write)

    def check_replicas(self) -> None:
        """Raises RunError unless all ranks hold the same weights (layouts without shards)."""
        if self.strategy.is_sharded:
            return
        weights = self.strategy.state_dict(optimizer=False)["weights"]
        digest = [float(t.double().sum()) for t in weights.values()]
        everyone = gather_objects(self.world, digest)
        for rank, other in enumerate(everyone):
            if other != everyone[0]:
                name = next(n for n, a, b in zip(weights, everyone[0], other, strict=True) if a != b)
                raise RunError(f"rank {rank} holds other weights than rank 0, first in {name}")


def _whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU; of a sharded tensor the whole (collective)."""
    return full_tensor(tensor).detach().to("cpu", copy=True)


def _check_fits(model: str, key: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor] | None) -> None:
    if given is None:
        raise UserError(f"model {model!r}: the saved state has no {key}; load it without the optimizer")
    for name in sorted(own.keys() | given.keys()):
        shapes = [list(part[name].shape) if name in part else "nothing" for part in (own, given)]
        if shapes[0] != shapes[1]:
            raise UserError(f"model {model!r}: {key} {name} is {shapes[0]} here and {shapes[1]} in the saved state")
