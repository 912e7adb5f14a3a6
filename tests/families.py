"""Small random models of the families that are verified: 2 layers, a sliding window shorter than a row of 24."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

WINDOW = 8
_SIZES: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)


def _config(kind: str, **more: Any) -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        if not hasattr(tf, kind):
            pytest.skip(f"transformers {tf.__version__} has no {kind}")
        return getattr(tf, kind)(**{**_SIZES, **more, **changes})

    return make


_SLIDING = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
_LINEAR: dict[str, Any] = dict(
    layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=8, linear_value_head_dim=12, linear_conv_kernel_dim=4,
)  # fmt: skip
_SCALED = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

_GPT: dict[str, Any] = dict(
    vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=128, pad_token_id=0, bos_token_id=None, eos_token_id=1
)

FAMILIES: dict[str, Callable[..., Any]] = {
    "qwen2": _config("Qwen2Config", tie_word_embeddings=True),
    "qwen3": _config("Qwen3Config"),
    "llama3": _config("LlamaConfig", rope_parameters={**_SCALED, "original_max_position_embeddings": 32}),
    "mistral": _config("MistralConfig", sliding_window=WINDOW),
    "gemma2": _config(
        "Gemma2Config", attn_logit_softcapping=5.0, final_logit_softcapping=3.0, query_pre_attn_scalar=8, **_SLIDING
    ),
    "gemma3": _config("Gemma3TextConfig", query_pre_attn_scalar=8, **_SLIDING),
    "phi3": _config("Phi3Config"),
    "olmo2": _config("Olmo2Config"),
    "qwen3_moe": _config(
        "Qwen3MoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True
    ),
    "mixtral": _config("MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
    "granite": _config("GraniteConfig", logits_scaling=3.0, embedding_multiplier=2.0),
    "cohere": _config("CohereConfig", logit_scale=0.25),
    # sinks and windows; chunks; later layers with the keys and values of earlier ones; compressed keys and values
    "gpt_oss": _config("GptOssConfig", num_local_experts=4, num_experts_per_tok=2, **_SLIDING),
    "llama4_text": _config(
        "Llama4TextConfig",
        attention_chunk_size=WINDOW,
        floor_scale=6,
        no_rope_layers=[1, 0],
        num_local_experts=2,
        intermediate_size_mlp=48,
    ),
    "gemma3n_text": _config(
        "Gemma3nTextConfig",
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=WINDOW,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    ),
    "deepseek_v3": _config(
        "DeepseekV3Config",
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=4,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=24,
    ),
    # linear attention beside full attention, with and without experts, values with more heads than keys
    "qwen3_next": _config(
        "Qwen3NextConfig",
        num_hidden_layers=3,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[1],
        **{**_LINEAR, "layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    ),  # fmt: skip
    "qwen3_5": _config("Qwen3_5TextConfig", **_LINEAR),
    "qwen3_5_moe": _config(
        "Qwen3_5MoeTextConfig",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        **_LINEAR,
    ),  # fmt: skip
    "olmo_hybrid": _config("OlmoHybridConfig", **_LINEAR),
    # a decay of each channel, beside latent attention without positions, and experts
    "kimi_linear": _config(
        "KimiLinearConfig",
        layer_types=["linear_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse"],
        linear_num_heads=4,
        linear_head_dim=8,
        linear_conv_kernel_dim=4,
        num_key_value_heads=4,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=12,
        num_experts=4,
        num_experts_per_token=2,
        moe_intermediate_size=24,
    ),
    # the same, with heads of another size in layers of full attention
    "gemma4_text": _config(
        "Gemma4TextConfig",
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=WINDOW,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=8,
        global_head_dim=16,
    ),
    # names and layers of their own: Conv1D, learned positions, one key head for all
    "gpt2": lambda: tf.GPT2Config(**_GPT),
    "gpt_bigcode": lambda: tf.GPTBigCodeConfig(**_GPT),
    "opt": lambda: tf.OPTConfig(
        **{key: _SIZES[key] for key in _SIZES if key not in ("intermediate_size", "num_key_value_heads", "head_dim")},
        ffn_dim=48,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
    ),
}

# its numbers go by the length of the row
LONGROPE = _config(
    "Phi3Config",
    original_max_position_embeddings=16,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 16,
    },
)


LINEAR = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid", "kimi_linear")
# Transformers 5.5 computes linear attention otherwise, and GPTBigCode without its attention interface, whatever torch:
# these are refused when they are loaded (test_load.py), as is Gemma 3n, whose layers share keys and values only through
# a cache there. All are read with 5.23; the releases between were not tried.
OLD = tf.__version__.startswith("5.5.")
REFUSED = (*LINEAR[:4], "gpt_bigcode", "gemma3n_text") if OLD else ()
needs_newer = pytest.mark.skipif(OLD, reason=f"what transformers {tf.__version__} lacks: docs/gpu.md")


def make_net(
    name: str,
    *,
    seed: int = 0,
    std: float | None = None,
    attention: str = "eager",
    refused: bool = False,
    **changes: Any,
) -> Any:
    """A whole float32 transformers model of that family. Weights are large, so that a mistake shows in the logits;
    biases and norms are random too. Those of linear attention are smaller: its norms make much of roundings. Skips the
    test for one of REFUSED, unless `refused`."""
    if name in REFUSED and not refused:
        pytest.skip(f"transformers {tf.__version__} computes {name} otherwise: it is refused when it is loaded")
    torch.manual_seed(seed)
    std = std or (0.15 if name in LINEAR else 0.3)
    config = (LONGROPE if name == "phi3_long" else FAMILIES[name])(**changes)
    net = tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in net.parameters():
            noise = torch.randn(param.shape, generator=generator)
            param.copy_(noise * std if param.ndim > 1 else param + 0.1 * noise)
    return net


# ---- models that take images or sound, whose text parts are trained

_VISION: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
_VISION_QWEN: dict[str, Any] = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
_MROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
_GEMMA = {**_SIZES, **_SLIDING, "query_pre_attn_scalar": 8}
_CHUNKS = dict(attention_chunk_size=8, floor_scale=6, no_rope_layers=[1, 0], num_local_experts=2)
_QWEN_MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, rope_parameters=_MROPE)
WITH_IMAGES: dict[str, dict[str, Any]] = {
    "qwen3_5": dict(text_config={**_SIZES, **_LINEAR}, vision_config=_VISION_QWEN),
    "qwen2_5_vl": dict(
        text_config={**_SIZES, "rope_parameters": _MROPE}, vision_config=_VISION_QWEN, tie_word_embeddings=True
    ),
    "qwen3_vl_moe": dict(
        text_config={**_SIZES, **_QWEN_MOE}, vision_config={**_VISION_QWEN, "deepstack_visual_indexes": [0]}
    ),
    "gemma3": dict(text_config=_GEMMA, vision_config=_VISION, mm_tokens_per_image=4),
    "mistral3": dict(
        text_config={**_SIZES, "model_type": "mistral"},
        vision_config={**_VISION, "head_dim": 8, "model_type": "pixtral"},
        tie_word_embeddings=False,
    ),
    "llama4": dict(
        text_config={**_SIZES, **_CHUNKS, "intermediate_size_mlp": 48},
        vision_config={
            **_VISION, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16
        },
    ),
    "qwen2_audio": dict(
        text_config={**_SIZES, "model_type": "qwen2"},
        audio_config=dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16),
    ),
}  # fmt: skip


def make_with_images(kind: str) -> Any:
    """A whole float32 transformers model of that kind, with the text part and the towers small and random."""
    if kind in REFUSED:
        pytest.skip(f"transformers {tf.__version__} computes {kind} otherwise: it is refused when it is loaded")
    torch.manual_seed(0)
    config = tf.CONFIG_MAPPING[kind](**WITH_IMAGES[kind])
    net: Any = tf.AutoModelForMultimodalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(torch.randn(param.shape) * 0.2 if param.ndim > 1 else param + 0.1 * torch.randn(param.shape))
    return net
