"""Which model families are supported; everything else is refused by name."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import nn

from skyrl.models.forward import decoder_of
from skyrl.models.linear_attention import is_delta_net
from skyrl.types import UserError

LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention", "linear_attention"})
# Config fields that change logits between the hidden state and the softmax, beyond what logprobs.head_spec applies.
UNKNOWN_HEAD_FIELDS = ("lm_head_multiplier", "output_multiplier_scale", "output_logit_soft_cap", "logits_soft_cap")


def check_supported(config: Any) -> None:
    """Raises UserError, with the model type and the reason, for a family that skyrl cannot train exactly.

    What a config does not tell, check_module and load.check_against_transformers find in the module and its numbers.
    """
    kind = getattr(config, "model_type", type(config).__name__)

    def refuse(reason: str) -> None:
        raise UserError(
            f"model.path: model type {kind!r} is not supported: {reason}; use a decoder-only text model with softmax "
            "attention, such as qwen2, qwen3, llama, mistral, gemma2, gemma3_text, phi3, olmo2, mixtral or qwen3_moe"
        )

    if getattr(config, "is_encoder_decoder", False):
        refuse("it is an encoder-decoder")
    parts = [part for part in ("vision_config", "audio_config", "text_config") if getattr(config, part, None)]
    if parts:
        refuse(f"it takes more than text (its config has {', '.join(parts)}), and its text part is no causal LM")
    others = sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES)
    if others:
        refuse(f"it has layers of type {', '.join(others)}")
    for field in UNKNOWN_HEAD_FIELDS:
        if getattr(config, field, None) not in (None, 1.0):
            refuse(f"its head rescales logits ({field})")
    if getattr(config, "position_embedding_type", "absolute") not in ("absolute", "rope", "rotary"):
        refuse(f"position_embedding_type={config.position_embedding_type}")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if any(isinstance(kind, dict) and kind.get("rope_type") in ("dynamic", "longrope") for kind in rope.values()):
        refuse("some of its layers have a rope_type that depends on the longest row of a batch (dynamic, longrope)")
    if rope.get("rope_type", rope.get("type")) == "dynamic":
        refuse("rope_type dynamic changes with every token beyond the first window, and cached keys do not")
    if getattr(config, "quantization_config", None) is not None:
        refuse("its weights are quantized")


def check_module(net: Any) -> None:
    """The checks that need the built (meta) module. Raises UserError with the model type."""
    kind = net.config.model_type

    def refuse(reason: str) -> None:
        raise UserError(f"model.path: model type {kind!r} is not supported: {reason}")

    linear = [module for module in net.modules() if is_delta_net(module)]
    kinds = getattr(net.config, "layer_types", None) or []
    if len(linear) != kinds.count("linear_attention"):
        refuse("its linear attention is not the gated delta rule of qwen3_next, qwen3_5, olmo_hybrid and kimi_linear")
    if getattr(net, "_is_stateful", False) and not kinds:  # of a family; its layers may all be softmax attention
        refuse("it carries a recurrent state")
    if decoder_of(net) is net:
        refuse("it has no decoder apart from its head")
    told = getattr(decoder_of(net), "_supports_attention_backend", False) or getattr(net, "_is_stateful", False)
    if not told:  # by hybrid families it never is
        refuse("its attention does not go through transformers' attention interface")
    # transformers 5.5 hands them on in a cache alone: without one, as in training, these layers would take their own.
    sharing = [module for module in net.modules() if getattr(module, "is_kv_shared_layer", False)]
    if any("shared_kv_states" not in signature(module.forward).parameters for module in sharing):
        refuse("this transformers shares keys and values between layers only through a cache; take a newer one (5.23)")
    known = [module.conv1d for module in linear]
    if any(isinstance(module, (nn.Conv1d, nn.Conv2d)) and module not in known for module in net.modules()):
        refuse("it has convolutions")
