"""The text model inside a model that also takes images, video or sound: its config. Its weights: models/weights.py."""

from __future__ import annotations

from typing import Any

# Text parts that are no causal LM of transformers by themselves, and the one that computes the same on text alone,
# where all axes of their rotary positions are equal; with what their code does and their config does not say.
SAME_ON_TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen2_5_omni_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_omni_moe_text": ("qwen3_moe", {}),
}
TOWERS = ("vision", "audio", "visual", "image", "video")


def text_part(config: Any) -> Any:
    """The config of the causal LM inside a model with towers for images or sound; any other config as it is, one whose
    text part is no causal LM of transformers among them."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    text = config.get_text_config(decoder=True)
    towers = any(tower in name for name in vars(config) for tower in TOWERS)
    if text is config or getattr(config, "is_encoder_decoder", False) or not towers:
        return config
    tied = all(getattr(part, "tie_word_embeddings", True) for part in (config, text))  # they may contradict each other
    if found := SAME_ON_TEXT.get(text.model_type):
        same, more = CONFIG_MAPPING[found[0]], found[1]
        known = same().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
        given = {key: value for key, value in text.to_dict().items() if key in known}
        rope = {key: value for key, value in (text.rope_parameters or {}).items() if not key.startswith("mrope_")}
        if rope.get("rope_type") == "mrope":
            rope["rope_type"] = "default"
        text = same(**{**given, "rope_parameters": rope, **more})
    elif type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config
    text.tie_word_embeddings = tied
    for field in ("eos_token_id", "bos_token_id", "pad_token_id"):
        if getattr(text, field, None) is None:
            setattr(text, field, getattr(config, field, None))
    if (quantized := getattr(config, "quantization_config", None)) is not None:
        text.quantization_config = quantized
    return text
