"""Which parameters a decode plan needs, found in the module by structure. No copies: the plan refers to the module.

A plan covers decoders made of RMSNorm, rotary attention with grouped heads (optionally normed and biased) and a gated
SiLU MLP. Anything else is answered with the reason, and the module path is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from skyrl.models.attention_calls import LayerCall

if TYPE_CHECKING:
    from skyrl.models.forward import CausalLM
    from skyrl.models.lora import Adapter

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class LayerPlan:
    """The modules of one decoder layer; `qk_norms` is None where queries and keys are not normed."""

    input_norm: Any  # of transformers, like the other norms: a module with weight and eps
    qkv: list[nn.Linear]
    qk_norms: tuple[Any, Any] | None
    out: nn.Linear
    mlp_norm: Any
    gate_up: list[nn.Linear]
    down: nn.Linear


@dataclass(frozen=True)
class DecodePlan:
    """A decoder as data. cos_LC and sin_LC are the rotary tables in the model's dtype, L = longest row."""

    layers: list[LayerPlan]
    embedding: nn.Embedding
    norm: Any
    head: nn.Linear
    heads: int
    kv_heads: int
    channels: int  # of one head
    eps: float
    scale: float
    cos_LC: Tensor
    sin_LC: Tensor
    float_head: bool = False  # logits in float32 from a head in bfloat16 (model.head_dtype)
    paths: dict[nn.Module, str] = field(default_factory=dict)  # of every module, in the net: the names adapters use

    def adapted(self, adapter: Adapter, parts: list[nn.Linear]) -> list[tuple[Tensor, Tensor] | None]:
        """A and B of an adapter for each of some linears; None where it has none."""
        return [adapter.pairs.get(self.paths[part]) for part in parts]

    def check(self, adapter: Adapter) -> None:
        """Raises RuntimeError when an adapter changes something that is not in the plan."""
        linears = [x for layer in self.layers for x in (*layer.qkv, layer.out, *layer.gate_up, layer.down)]
        strange = set(adapter.pairs) - {self.paths[linear] for linear in (*linears, self.head)}
        if strange:
            raise RuntimeError(f"adapter {adapter.name!r} changes {sorted(strange)[0]}, which the decode plan lacks")


def make_decode_plan(model: CausalLM, calls: list[LayerCall], max_length: int) -> DecodePlan | str:
    """The plan of a model, or why there is none. `calls` is what its layers ask of attention."""
    config = model.config
    if config.model_type not in FAMILIES:
        return f"no decode plan for model type {config.model_type}"
    if next(model.parameters()).dtype == torch.float64:
        return "float64: the module is the reference there"
    plain = LayerCall(calls[0].shape, calls[0].num_heads, calls[0].scale, window=None, softcap=None)
    if any(call != plain for call in calls):
        return "layers differ or have a window, a soft cap, chunks or sinks"
    if model.rope is not None:
        return "rotary embeddings of type longrope"
    if config.hidden_act not in ("silu", "swish"):
        return f"activation {config.hidden_act}"
    if model.head_spec.scale != 1.0 or model.head_spec.softcap:
        return "scaled or capped logits"
    call, decoder = calls[0], model.decoder
    layers = [_layer(layer) for layer in model.layers()]
    norms = [norm for layer in layers for norm in (layer.input_norm, layer.mlp_norm, *(layer.qk_norms or ()))]
    eps = {float(norm.variance_epsilon) for norm in (*norms, decoder.norm)}
    if len(eps) != 1:
        return "norms with different eps"
    positions = torch.arange(max_length, device=decoder.embed_tokens.weight.device).unsqueeze(0)
    cos, sin = decoder.rotary_emb(decoder.embed_tokens.weight[:1].unsqueeze(0), positions)
    channels = call.shape.key_size
    if cos.shape[-1] != channels or call.shape.value_size != channels:
        return "rotary over a part of the channels, or values of another size"
    head = model.net.get_output_embeddings()
    return DecodePlan(
        layers, decoder.embed_tokens, decoder.norm, head, call.num_heads, call.shape.num_heads, channels,
        eps.pop(), call.scale, cos[0].contiguous(), sin[0].contiguous(),
        model.float_head, {module: path for path, module in model.net.named_modules()},
    )  # fmt: skip


def _layer(layer: Any) -> LayerPlan:
    attend, mlp = layer.self_attn, layer.mlp
    norms = (attend.q_norm, attend.k_norm) if hasattr(attend, "q_norm") else None
    return LayerPlan(
        input_norm=layer.input_layernorm,
        qkv=[attend.q_proj, attend.k_proj, attend.v_proj],
        qk_norms=norms,
        out=attend.o_proj,
        mlp_norm=layer.post_attention_layernorm,
        gate_up=[mlp.gate_proj, mlp.up_proj],
        down=mlp.down_proj,
    )
