"""The formula against torch's own count, and peaks by name."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from skyrl.tracking.flops import (
    ModelShape,
    causal_attended,
    forward_flops,
    peak_flops,
    sample_attended,
    train_flops,
)


def small_model():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=120,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=80,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    return Qwen3ForCausalLM(config)


def test_formula_equals_torchs_count():
    """Eager attention computes the whole square, the formula the causal half: the count is compared with the square."""
    model, length = small_model(), 24
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)  # tied: the embedding is the output
    shape = ModelShape(num_params=weights, num_layers=3, attention_channels=4 * 16)
    tokens = torch.arange(length)[None]
    with FlopCounterMode(display=False) as forward:
        loss = model(tokens).logits.sum()
    assert forward.get_total_flops() == pytest.approx(forward_flops(shape, length, length * length), rel=1e-3)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    whole = forward.get_total_flops() + backward.get_total_flops()
    assert whole == pytest.approx(train_flops(shape, length, length * length), rel=0.01)
    embedded = model.requires_grad_(False).get_input_embeddings()(tokens).requires_grad_()
    with FlopCounterMode(display=False) as frozen:  # as under adapters
        model(inputs_embeds=embedded).logits.sum().backward()
    want = train_flops(shape, length, length * length, frozen=True)
    assert frozen.get_total_flops() == pytest.approx(want, rel=0.01) and want < 0.75 * whole


def test_pairs_counted_one_by_one():
    assert causal_attended([3, 1]) == (1 + 2 + 3) + 1
    assert sample_attended(5, 3) == 6 + 7 + 8
    assert causal_attended([5]) + sample_attended(5, 3) == causal_attended([8])


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
        ("", None),
        ("Intel(R) Xeon(R) CPU", None),
        ("NVIDIA H1000", None),
    ],
)
def test_peaks_by_name(name, tflops):
    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)
