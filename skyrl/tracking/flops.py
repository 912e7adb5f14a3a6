"""Floating-point operations of a step by a written formula, and what a device could do at most."""

from __future__ import annotations

from dataclasses import dataclass

# Dense bf16 matmul peak in TFLOP/s, from the makers' data sheets (no sparsity). Longest matching name wins.
_BLACKWELL = {"B200": 2250.0}
_HOPPER = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H20": 148.0,
    **dict.fromkeys(("H100", "H200", "GH200", "H800"), 989.0),
}
_ADA = {"L40S": 362.0, "L40": 181.0, "L4": 121.0, "RTX 6000 Ada": 182.0, "RTX 4090": 165.2}
_AMPERE = {"A100": 312.0, "A800": 312.0, "A40": 149.7, "A30": 165.0, "A10G": 70.0, "A10": 125.0, "RTX 3090": 71.0}
_AMD = {"MI300X": 1307.4, "MI250X": 383.0}
PEAK_TFLOPS = {**_BLACKWELL, **_HOPPER, **_ADA, **_AMPERE, **_AMD}


@dataclass(frozen=True)
class ModelShape:
    """What the formula needs. num_params counts the weights that a token passes through in matmuls: all but the input
    embedding (unless it is tied to the output), and of a mixture of experts only those that a token is sent to."""

    num_params: int
    num_layers: int
    attention_channels: int  # num_heads * head_dim


def forward_flops(shape: ModelShape, num_tokens: int, attended: int) -> float:
    """FLOPs of one forward pass: 2 * params * tokens + 4 * layers * channels * attended.

    attended: sum over tokens of the positions that each attends to (itself included); `causal_attended` gives it for
    whole rows. Scores and their application to the values are 2 FLOPs each for a channel and pair. Source: Kaplan et
    al. 2020 (arXiv 2001.08361), table 1, but with the causal half only.
    """
    return 2.0 * shape.num_params * num_tokens + 4.0 * shape.num_layers * shape.attention_channels * attended


def train_flops(shape: ModelShape, num_tokens: int, attended: int, *, frozen: bool = False) -> float:
    """FLOPs of forward and backward: three times the forward pass. What checkpointing computes again is not counted:
    this is the work the model needs, so that MFU compares between settings. A `frozen` model under adapters has no
    gradients of weights, a third of the matmuls; the adapters' own work, a few percent, is left out."""
    spared = 2.0 * shape.num_params * num_tokens if frozen else 0.0
    return 3.0 * forward_flops(shape, num_tokens, attended) - spared


def causal_attended(lengths: list[int]) -> int:
    """Pairs of (token, earlier or same token) in rows of these lengths."""
    return sum(length * (length + 1) // 2 for length in lengths)


def sample_attended(prompt_length: int, new_tokens: int) -> int:
    """Pairs in drawing `new_tokens` after a prompt that is in the cache: its prefill counts with causal_attended."""
    return new_tokens * prompt_length + new_tokens * (new_tokens + 1) // 2


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of one device in FLOP/s by its name as torch gives it; None for an unknown one."""
    words = f" {device_name.replace('-', ' ').upper()} "
    matches = [name for name in PEAK_TFLOPS if f" {name.upper()} " in words]  # whole ones: "A100" is not an "A10"
    return PEAK_TFLOPS[max(matches, key=len)] * 1e12 if matches else None
