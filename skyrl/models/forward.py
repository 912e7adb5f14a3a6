"""A transformers model as training sees it: packed rows in, log-probabilities, entropy or values out.

The model itself is unchanged; only its attention goes through skyrl.models.attention, and its head is applied in
blocks (skyrl.models.logprobs). Dropout and router noise stay off, since the sampler has none.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from skyrl.algorithms.truncation import support_within
from skyrl.hub.tensor_files import kept_in_float32
from skyrl.kernels import exact_ops
from skyrl.models import compiled, latent, longrope
from skyrl.models.attention import NAME, Attention, register
from skyrl.models.experts import Routing
from skyrl.models.linear_attention import hook_delta_nets
from skyrl.models.logprobs import finish_logits, head_spec, log_probs, matmul_float, sums_in_float32
from skyrl.models.lora import Router, Segment, low_rank
from skyrl.models.packed import PackedAttention, PaddedAttention, SharedAttention, collate, loss_dtype, spread
from skyrl.models.weights import aliases_of, path_of
from skyrl.types import ForwardOutput, Microbatch, UserError

__all__ = ["CausalLM", "collate"]

TOP_ROWS = 128  # of whole logits at a time, where the likeliest tokens are looked for


def decoder_of(net: Any) -> Any:
    """The model without its head; Llama 4's prefix is that of the model with images, so its base_model is itself."""
    return getattr(net, "model", net) if net.base_model is net else net.base_model


class CausalLM(nn.Module):
    """`net`, a transformers causal LM with attn_implementation "skyrl", and what training and sampling ask of it.

    Parameters are named as in `net` with "net." before; a critic (`head` "value") has "value_head.weight" and ".bias",
    a reward model (`head` "reward") the first of these, in place of the output embedding. Always in eval mode.
    Everything that training needs happens inside `forward`, so that the module can be the root of a sharded model.
    """

    def __init__(
        self,
        net: PreTrainedModel,
        head: Literal["logits", "value", "reward"] = "logits",
        *,
        chunk_tokens: int = 0,
        float_head: bool = False,
    ) -> None:
        super().__init__()
        register()
        if net.config._attn_implementation != NAME:
            net.set_attn_implementation(NAME)
        exact_ops.hook_norms(net)
        exact_ops.hook_half_ops(net)
        hook_delta_nets(net)
        decoder_of(net).warn_if_padding_and_no_attention_mask = lambda *args: None  # it would wait for the device
        latent.install(net)
        self.rope = longrope.install(net)  # None where no choice is to be made
        self.net = net
        self.head = head
        self.chunk_tokens = chunk_tokens
        self.float_head = float_head  # logits from a product in float32, of weights in bfloat16
        self.router: Router | None = None  # adapters, once models.lora.install was called
        self.routing: Routing | None = None  # of a mixture's experts, once models.experts.routing_of was called
        self.head_spec = head_spec(net.config)
        self.compiles = False  # whether training and scoring go through compiled layers
        self.top_tokens = 1 << 30  # ids below this one are those that top_k looks among
        embeddings: Any = net.get_input_embeddings()
        self.vocab_size: int = embeddings.weight.shape[0]
        embedding = embeddings.weight
        if head != "logits":
            channels = net.get_output_embeddings().weight.shape[1]  # OPT's may be other than hidden_size
            bias = head == "value"
            self.value_head = nn.Linear(channels, 1, bias=bias, device=embedding.device, dtype=embedding.dtype)
            _drop_output(net)
        else:
            output = net.get_output_embeddings()
            if type(output) is not nn.Linear:
                kind = type(output).__name__
                raise UserError(f"model.path: {net.config.model_type} has a {kind} as its head, which is not supported")
            self.vocab_size = output.weight.shape[0]
        self.train(False)

    # ---- shape of the model ----------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        return self.net.config

    @property
    def max_positions(self) -> int:
        """Longest row that the model was made for; a large number where its config has no limit."""
        return int(getattr(self.net.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)

    @property
    def tied(self) -> bool:
        """Whether the output embedding is the input embedding."""
        output = self.net.get_output_embeddings()
        return output is not None and output.weight is self.net.get_input_embeddings().weight

    @property
    def decoder(self) -> Any:
        """The model without its head: embeddings, layers, final norm."""
        return decoder_of(self.net)

    def layers(self) -> list[Any]:
        """The decoder layers, first to last: units of sharding and of activation checkpointing."""
        count = self.net.config.get_text_config().num_hidden_layers
        for module in self.decoder.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return list(module)
        raise UserError(f"model.path: found no list of {count} decoder layers in {self.net.config.model_type}")

    def output_weight(self) -> tuple[Tensor, Tensor | None]:
        """weight [V, C] and bias [V] (or None) of the head."""
        output = self.net.get_output_embeddings()
        return output.weight, output.bias

    # ---- modes -----------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> CausalLM:
        """Stays in eval mode whatever is asked: no dropout, no router noise. Gradients do not depend on the mode."""
        return super().train(False)

    def compile_layers(self) -> None:
        """Training and scoring go through layers of torch.compile from now on (models/compiled.py). Once, before
        `checkpoint_layers` and before the layers are sharded; no new names."""
        self.compiles = True
        compiled.compile_layers(self.layers())

    def checkpoint_layers(self) -> None:
        """Recomputes each decoder layer in the backward pass. Once, before the layers are sharded; no new names."""
        for layer in self.layers():
            exact_ops.replace_forward(layer, _run_checkpointed)

    def kept(self, dtype: torch.dtype) -> frozenset[str]:
        """The parameters that stay in float32 in a model in `dtype` (hub.tensor_files), by their names here."""
        return frozenset(f"net.{name}" for name in kept_in_float32(self.net, dtype))

    def to(self, *args: Any, **kwargs: Any) -> CausalLM:
        """As nn.Module.to, but a dtype is for parameters only: rotary frequencies lose digits when they are cast; and
        not for those that are `kept` in float32."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        buffers, kept = {id(buffer) for buffer in self.buffers()}, self.kept(dtype)
        wide = {id(p) for name, p in self.named_parameters() if name in kept}

        def move(t: Tensor) -> Tensor:
            as_it_is = id(t) in buffers or not t.is_floating_point()
            cast = None if as_it_is else torch.float32 if id(t) in wide else dtype
            return t.to(device if not t.is_meta else None, cast, non_blocking)

        return _keep_ties(self, lambda: self._apply(move))

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> CausalLM:
        """Memory for parameters on the meta device; other parameters and all buffers keep their values."""

        def move(t: Tensor) -> Tensor:
            return torch.empty_like(t, device=device) if t.is_meta else t.to(device)

        return _keep_ties(self, lambda: self._apply(move, recurse=recurse))

    # ---- computation -----------------------------------------------------------------------------------------------

    def hidden(
        self, tokens_T: Tensor, positions_T: Tensor, attention: Attention, lengths_T: Tensor | None = None
    ) -> Tensor:
        """Final, normed hidden states [T, C] in the model's dtype; `attention` says which tokens see which.
        `lengths_T`: tokens of the row of each, by which longrope chooses."""
        if self.rope is not None:
            self.rope.choose(lengths_T)
        embeddings: Any = self.net.get_input_embeddings()
        weight = embeddings.weight
        exact = exact_ops.is_float32_cpu(weight) or exact_ops.is_bfloat16_cpu(weight)
        exact = exact and not compiled.is_used()
        with precise(weight.dtype), exact_ops.enabled(exact):
            out = self.decoder(
                input_ids=tokens_T[None],
                position_ids=positions_T[None],
                use_cache=False,
                skyrl_attention=attention,
                skyrl_positions_T=positions_T,
            )
        if self.rope is not None:
            self.rope.long = None
        return out.last_hidden_state[0]

    def logits(self, hidden: Tensor, segments: list[Segment] | None = None) -> Tensor:
        """Logits [..., V] in float32 (float64 for float64), with the family's own scaling and capping; no gradient.
        `segments`: whose adapter of the output embedding each row has, where rows have adapters."""
        weight_VC, bias_V = self.output_weight()
        with torch.no_grad():
            rows = hidden.reshape(-1, hidden.shape[-1])
            wide = rows.float() if self.float_head and not sums_in_float32(rows) else rows
            product = matmul_float(wide, weight_VC, bias_V)
            for start, stop, adapter in segments or ():
                if adapter is not None and adapter.head is not None:
                    down, up = adapter.pairs[adapter.head]
                    product[start:stop] += matmul_float(low_rank(rows[start:stop], down, adapter.scale), up)
            return finish_logits(product, self.head_spec).view(*hidden.shape[:-1], -1)

    def forward(
        self, mb: Microbatch, *, temperature: float = 1.0, entropy: bool = False, packing: bool = True, top_k: int = 0
    ) -> ForwardOutput:
        """log pi(target) at `temperature`, with entropy if asked; from a critic values, and zeros for logprobs_T. With
        `top_k` logprobs_T is [T, 2 * top_k], the likeliest tokens' and their ids; no gradient, and no adapters.

        packing=False computes each row padded to the longest one, by another attention: slow, to compare with.
        Inside models.lora.routed, tokens go through their adapters. Shapes [T] (log-probabilities as the targets,
        [T] or [T, K]; entropy only for [T]), float32 (float64 for a float64 model).
        Raises: UserError for a row beyond max_positions.
        """
        if mb.max_length > self.max_positions:
            raise UserError(
                f"a row of {mb.max_length} tokens is longer than the {self.max_positions} positions of this model; "
                "lower batch.max_row_tokens"
            )
        shared = packing and mb.distinct_U is not None and not top_k
        with compiled.using(self.compiles):
            if shared and (self.rope is None or self.rope.limit):  # without a limit longrope chooses by the whole row
                return self._forward_shared(mb, temperature, entropy)
            if packing:
                lengths_T = None if self.rope is None else mb.starts_S1.diff()[mb.row_T]
                attention = PackedAttention(mb.starts_S1, mb.lengths)
                hidden_TC = self.hidden(mb.tokens_T, mb.positions_T, attention, lengths_T)
            else:
                hidden_TC = self._hidden_padded(mb)
            if top_k:
                return ForwardOutput(self._top_logprobs(hidden_TC, temperature, top_k))
            return self._outputs(hidden_TC, mb.targets_T, temperature, entropy, mb.support_2N)

    def _top_logprobs(self, hidden_TC: Tensor, temperature: float, top_k: int) -> Tensor:
        parts = []
        for hidden in hidden_TC.split(TOP_ROWS):
            logprobs, ids = torch.log_softmax(self.logits(hidden) / temperature, -1)[:, : self.top_tokens].topk(top_k)
            parts.append(torch.cat([logprobs, ids.to(logprobs.dtype)], 1))  # ids below 2^24 are exact in float32
        return torch.cat(parts)

    def _forward_shared(self, mb: Microbatch, temperature: float, entropy: bool) -> ForwardOutput:
        """The same, with beginnings that rows share computed once (algorithms.prefixes)."""
        assert mb.distinct_U is not None and mb.place_T is not None and mb.scored_P is not None
        if self.router is not None:
            self.router.share(len(mb.distinct_U), len(mb.scored_P))
        if self.routing is not None:
            self.routing.shared = True
        attention = SharedAttention(PackedAttention(mb.starts_S1, mb.lengths), mb)
        hidden_UC = self.hidden(mb.tokens_T[mb.distinct_U], mb.positions_T[mb.distinct_U], attention)
        cut_2N = mb.support_2N
        if cut_2N is not None and mb.pair_T is not None:
            cut_2N = cut_2N.clone()
            cut_2N[0] = mb.pair_T[cut_2N[0]]
        hidden_PC = spread(hidden_UC, mb.place_T[mb.scored_P])
        out = self._outputs(hidden_PC, mb.targets_T[mb.scored_P], temperature, entropy, cut_2N)
        entropy_T, values_T = (None if one is None else one[mb.pair_T] for one in (out.entropy_T, out.values_T))
        return ForwardOutput(out.logprobs_T[mb.pair_T], entropy_T, values_T)

    def _outputs(
        self, hidden_TC: Tensor, targets_T: Tensor, temperature: float, entropy: bool, support_2N: Tensor | None
    ) -> ForwardOutput:
        if self.head != "logits":
            # cloned: a view as the output of a sharded root loses its pre-backward hook when it is written to
            values_T = self.value_head(hidden_TC)[:, 0].to(loss_dtype(hidden_TC.dtype)).clone()
            return ForwardOutput(torch.zeros_like(values_T), None, values_T)
        entropy = entropy and targets_T.ndim == 1
        if self.router is None or not self.router.active():
            return ForwardOutput(*self._log_probs(hidden_TC, targets_T, temperature, entropy, None, support_2N))
        parts = []
        for start, stop, pair in self.router.unembedding():
            hidden, low = hidden_TC[start:stop], None
            if pair is not None:
                low = (low_rank(hidden, pair[0], pair[2]), pair[1])
            cut_2N = None if support_2N is None else support_within(support_2N, start, stop)
            parts.append(self._log_probs(hidden, targets_T[start:stop], temperature, entropy, low, cut_2N))
        entropies = [e for _, e in parts if e is not None]
        return ForwardOutput(torch.cat([p for p, _ in parts]), torch.cat(entropies) if entropy else None)

    def _log_probs(
        self,
        hidden_TC: Tensor,
        targets: Tensor,
        temperature: float,
        entropy: bool,
        low: tuple[Tensor, Tensor] | None,
        support_2N: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        weight_VC, bias_V = self.output_weight()
        if self.float_head:
            hidden_TC, low = hidden_TC.float(), None if low is None else (low[0].float(), low[1])
        return log_probs(
            hidden_TC,
            weight_VC,
            targets,
            bias_V=bias_V,
            low_rank=low,
            temperature=temperature,
            head=self.head_spec,
            entropy=entropy,
            chunk_tokens=self.chunk_tokens,
            support_2N=support_2N,
        )

    def _hidden_padded(self, mb: Microbatch) -> Tensor:
        rows, length = mb.starts_S1.shape[0] - 1, mb.max_length
        if self.router is not None and self.router.segments:
            self.router.pad(mb.starts_S1.tolist(), length)
        place_T = mb.row_T * length + mb.positions_T
        tokens = mb.tokens_T.new_zeros(rows * length).scatter(0, place_T, mb.tokens_T)
        positions = torch.arange(length, device=tokens.device).repeat(rows)
        lengths = mb.starts_S1.diff().repeat_interleave(length)
        return F.embedding(place_T, self.hidden(tokens, positions, PaddedAttention(rows, length), lengths))


class _StayDouble(TorchFunctionMode):
    """Turns casts to float32 into casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if a is torch.float32 else a for k, a in (kwargs or {}).items()}
        return func(*args, **kwargs)


def precise(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """For float64 models: no step inside is rounded to float32, as norms, rotary embeddings and routers of transformers
    are; without it two layouts of the same float64 computation differ by 1e-8. Nothing for other dtypes."""
    return _StayDouble() if dtype == torch.float64 else nullcontext()


def _run_checkpointed(layer: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    dtype, exact, compiles = next(layer.parameters()).dtype, exact_ops.is_enabled(), compiled.is_used()

    def again(*args: Any, **kwargs: Any) -> Any:  # in the backward pass, outside of all three
        with precise(dtype), exact_ops.enabled(exact), compiled.using(compiles):
            return forward(*args, **kwargs)

    return checkpoint(again, *args, use_reentrant=False, **kwargs)


def _drop_output(net: PreTrainedModel) -> None:
    """Takes the output embedding out of a critic, so that no unused weight is trained, sharded or saved."""
    parent, _, leaf = path_of(net, net.get_output_embeddings()).rpartition(".")
    setattr(net.get_submodule(parent), leaf, nn.Identity())


def _keep_ties(module: CausalLM, change: Any) -> CausalLM:
    """Runs `change`, which may replace parameters, and makes names that shared one parameter share it again."""
    ties = aliases_of(module)
    change()
    for name, first in ties.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, module.get_parameter(first))
    return module
