"""Linear attention by the gated delta rule behind a short convolution (Qwen3-Next, Qwen3.5, OLMo Hybrid, Kimi Linear).

Of a sequence such a layer keeps one matrix of each head and the last inputs of its convolution, however long it is.
The module's projections and norm stay transformers' own. What lies between them, where tokens meet those before them,
is a DeltaRule that the module hands to the `recur` of `skyrl_attention`: training starts it anew at each packed row,
sampling goes on from a sequence's states.

The rule and the states are in float64 where products in float32 on a CPU are exact (exact_ops), else float32.
On CUDA in bfloat16 flash-linear-attention's kernels compute it where they are installed (`cuda_rule`).

Letters: B rows, L tokens of each, C channels of the convolution, W its width, H heads of values, K and V the channels
of one head's keys and values, N chunks of a row, S tokens of a chunk, D decays of one head and token: 1, or K of them
(Kimi Linear). Decays of all heads lie side by side, [..., H * D].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from skyrl.kernels import exact_ops
from skyrl.tracking.advisories import warn_fallback

CHUNK = 64  # tokens that are computed together; between chunks the state is carried
MANY_DECAYS_CHUNK = 16  # of them where each channel has a decay: a number for each two tokens and channel exists then
# How the modules that are known name their projections: queries, keys and values; gate; beta; decay.
PROJECTIONS = (("in_proj_qkvz", "in_proj_ba"), ("in_proj_qkv", "in_proj_z"), ("q_proj", "g_proj"))
States = tuple[Tensor, Tensor]  # inputs [B, W - 1, C] in the model's dtype; matrices [B, H, K, V] in wide_dtype


@dataclass(frozen=True)
class StateShape:
    """What one layer of linear attention keeps of a sequence."""

    width: int  # W - 1
    channels: int  # C
    num_heads: int  # H
    key_size: int  # K
    value_size: int  # V

    def empty(self, rows: int, dtype: torch.dtype, device: torch.device) -> States:
        """The states of `rows` sequences before their first token."""
        matrices = torch.zeros(
            rows, self.num_heads, self.key_size, self.value_size, dtype=wide_dtype(dtype, device), device=device
        )
        return torch.zeros(rows, self.width, self.channels, dtype=dtype, device=device), matrices

    def nbytes(self, dtype: torch.dtype, device: torch.device) -> int:
        """Bytes of the states of one sequence."""
        matrices = self.num_heads * self.key_size * self.value_size * wide_dtype(dtype, device).itemsize
        return matrices + self.width * self.channels * dtype.itemsize


def wide_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What the rule computes in, and keeps its matrices in, for a model in `dtype`."""
    exact = dtype == torch.float64 or (dtype == torch.float32 and device.type == "cpu")
    return torch.float64 if exact else torch.float32


@dataclass(frozen=True)
class DeltaRule:
    """The recurrence of one layer: a causal convolution over each channel, its activation, the gated delta rule."""

    weight_CW: Tensor
    bias_C: Tensor | None
    activation: Callable[[Tensor], Tensor]
    key_heads: int
    shape: StateShape

    def run(
        self,
        mixed_BLC: Tensor,
        decay_BLH: Tensor,
        beta_BLH: Tensor,
        before: States | None = None,
        real_BL: Tensor | None = None,
        *,
        chunk: int = CHUNK,
    ) -> tuple[Tensor, States]:
        """[B, L, H, V] in wide_dtype and the states after it, of rows that go on from `before` (None: they begin).

        `mixed_BLC`: queries, keys and values before the convolution. A token first multiplies the state by exp(decay),
        then puts beta of its value in the place of what the state holds for its key. Decays are [B, L, H], or
        [B, L, H * K] with one of each channel of the keys. `real_BL`: False in the padding behind a row, whose outputs
        mean nothing and which leaves no trace in the states.
        """
        shape, wide = self.shape, wide_dtype(mixed_BLC.dtype, mixed_BLC.device)
        (rows, length, _), dtype = mixed_BLC.shape, mixed_BLC.dtype
        inputs, state_BHKV = before or shape.empty(rows, dtype, mixed_BLC.device)
        inputs_BMC = torch.cat([inputs, mixed_BLC], 1)
        if real_BL is not None:
            decay_BLH, beta_BLH = (x.masked_fill(~real_BL.unsqueeze(-1), 0) for x in (decay_BLH, beta_BLH))
            last_BW = real_BL.sum(1, keepdim=True) + torch.arange(shape.width, device=inputs.device)
            inputs = inputs_BMC.gather(1, last_BW.unsqueeze(-1).expand(-1, -1, shape.channels))
        else:
            inputs = inputs_BMC[:, length:]
        weight_CW, wide_BMC = self.weight_CW.to(wide), inputs_BMC.to(wide)
        taps = [wide_BMC[:, i : i + length] * weight_CW[:, i] for i in range(shape.width + 1)]
        convolved_BLC = sum(taps[1:], taps[0]) if self.bias_C is None else sum(taps, self.bias_C.to(wide))
        sizes = [self.key_heads * shape.key_size] * 2 + [shape.num_heads * shape.value_size]
        parts = self.activation(convolved_BLC).split(sizes, -1)
        each = (shape.key_size, shape.key_size, shape.value_size)
        query, key, value = (x.unflatten(-1, (-1, n)).transpose(1, 2) for x, n in zip(parts, each, strict=True))
        group = shape.num_heads // self.key_heads
        query, key = (_unit(x).repeat_interleave(group, 1) for x in (query, key))
        decay_BHLD = decay_BLH.double().unflatten(-1, (shape.num_heads, -1)).transpose(1, 2)
        chunk = min(chunk, length, chunk if decay_BHLD.shape[-1] == 1 else MANY_DECAYS_CHUNK)
        by_kernels = mixed_BLC.is_cuda and dtype == torch.bfloat16 and decay_BHLD.shape[-1] == 1 and length > 1
        out_BHLV, state_BHKV = (cuda_rule() if by_kernels else gated_delta_rule)(
            query * shape.key_size**-0.5, key, value, decay_BHLD, beta_BLH.to(wide).transpose(1, 2),
            state_BHKV.to(wide), chunk
        )  # fmt: skip
        return out_BHLV.transpose(1, 2), (inputs, state_BHKV)


def _unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def gated_delta_rule(
    query_BHLK: Tensor,
    key_BHLK: Tensor,
    value_BHLV: Tensor,
    decay_BHLD: Tensor,
    beta_BHL: Tensor,
    state_BHKV: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """out [B, H, L, V] and the state after the last token, of

        S_t = exp(decay_t) S_t-1 + k_t beta_t (v_t - exp(decay_t) S_t-1^T k_t)^T,   out_t = S_t^T q_t,

    a chunk of tokens at a time: within one, what each token puts into the state is the solution of a triangular
    system (Yang et al. 2024, arXiv 2412.06464). `chunk` 1 is that formula itself.
    """
    length = query_BHLK.shape[2]
    pad = -length % chunk
    if pad:  # with decay and beta of 0 such a token changes nothing
        query_BHLK, key_BHLK, value_BHLV = (F.pad(x, (0, 0, 0, pad)) for x in (query_BHLK, key_BHLK, value_BHLV))
        decay_BHLD, beta_BHL = F.pad(decay_BHLD, (0, 0, 0, pad)), F.pad(beta_BHL, (0, pad))
    query, key, value = (x.unflatten(2, (-1, chunk)) for x in (query_BHLK, key_BHLK, value_BHLV))  # [B, H, N, S, C]
    beta = beta_BHL.unflatten(2, (-1, chunk)).unsqueeze(-1)
    # A sum over a chunk may be 1e5 times its last terms, which are the ones that count: so it is float64 everywhere.
    sums = decay_BHLD.unflatten(2, (-1, chunk)).double().cumsum(3)  # [B, H, N, S, D]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=sums.device).triu(1).unsqueeze(-1)
    between = (sums.unsqueeze(4) - sums.unsqueeze(3)).masked_fill(later, float("-inf")).to(query.dtype).exp()
    since, until = (x.to(query.dtype).exp() for x in (sums, sums[..., -1:, :] - sums))

    def products(x: Tensor, y: Tensor) -> Tensor:
        """x_i^T exp(the decay between) y_j of two tokens, [B, H, N, S, S]; 0 where j is later."""
        if between.shape[-1] == 1:
            return x @ y.transpose(-1, -2) * between.squeeze(-1)
        return (x.unsqueeze(4) * y.unsqueeze(3) * between).sum(-1)

    system = products(beta * key, key)
    known = torch.cat([beta * value, beta * key * since], -1)
    news, olds = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True).split(
        [value.shape[-1], key.shape[-1]], -1
    )
    seen, query, key = products(query, key), query * since, key * until
    outs = []
    for n in range(query.shape[2]):
        new = news[:, :, n] - olds[:, :, n] @ state_BHKV
        outs.append(query[:, :, n] @ state_BHKV + seen[:, :, n] @ new)
        state_BHKV = state_BHKV * since[:, :, n, -1].unsqueeze(-1) + key[:, :, n].transpose(-1, -2) @ new
    return torch.cat(outs, 2)[:, :, :length], state_BHKV


@cache
def cuda_rule() -> Callable[..., tuple[Tensor, Tensor]]:
    """gated_delta_rule by flash-linear-attention's kernels (of one decay a head; products in bfloat16, sums and states
    in float32) where they are installed; which it is, is said once."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as error:
        warn_fallback(f"linear attention is computed by torch ({error}); pip install 'skyrl-spmd[fla]' has kernels")
        return gated_delta_rule
    warn_fallback("linear attention is computed by flash-linear-attention")

    def rule(*given: Any) -> tuple[Tensor, Tensor]:
        parts = [x.transpose(1, 2).contiguous() for x in given[:5]]
        parts = [*(x.bfloat16() for x in parts[:3]), parts[3].squeeze(-1).float(), parts[4].float()]
        out, state = chunk_gated_delta_rule(*parts, scale=1.0, initial_state=given[5].float(), output_final_state=True)
        return out.transpose(1, 2).to(given[0].dtype), state.to(given[0].dtype)

    return rule


# ---- the modules of transformers


def is_delta_net(module: nn.Module) -> bool:
    """Whether a module is linear attention of the kind that is known here."""
    if hasattr(module, "forget_gate"):  # Kimi Linear
        return all(hasattr(module, part) for part in ("conv1d", "layer_idx", "q_proj", "b_proj", "g_b_proj", "o_norm"))
    parts = ("A_log", "dt_bias", "conv1d", "layer_idx", "num_v_heads")
    return all(hasattr(module, part) for part in parts) and any(
        all(hasattr(module, part) for part in parts) for parts in PROJECTIONS
    )


def hook_delta_nets(net: nn.Module) -> None:
    """Makes linear attention ask the `skyrl_attention` of a forward pass; without one it stays transformers' own, so
    the check of a model when it is loaded (pretrained.load) compares two computations."""
    for module in net.modules():
        if is_delta_net(module):
            exact_ops.replace_forward(module, _attend)


def _attend(module: Any, plain: Any, hidden_states: Tensor, *args: Any, skyrl_attention: Any = None, **kw: Any) -> Any:
    if skyrl_attention is None:
        return plain(hidden_states, *args, **kw)
    x, wide = hidden_states, wide_dtype(hidden_states.dtype, hidden_states.device)
    decay: Tensor | None = None
    if hasattr(module, "in_proj_qkvz"):  # by groups of one key head
        *parts, z, b, a = module.fix_query_key_value_ordering(module.in_proj_qkvz(x), module.in_proj_ba(x))
        mixed = torch.cat([part.flatten(2) for part in parts], -1)
    elif hasattr(module, "in_proj_qkv"):
        mixed, z, b, a = (getattr(module, f"in_proj_{part}")(x) for part in ("qkv", "z", "b", "a"))
    elif hasattr(module, "forget_gate"):
        *parts, b = (getattr(module, f"{part}_proj")(x) for part in "qkvb")
        mixed, z = torch.cat(parts, -1), module.g_b_proj(module.g_a_proj(x))
        decay = module.forget_gate(x).flatten(2).to(wide)
    else:
        *parts, z, b, a = (getattr(module, f"{part}_proj")(x) for part in "qkvgba")
        mixed = torch.cat(parts, -1)
    beta = b.to(wide).sigmoid() * (2 if getattr(module, "allow_neg_eigval", False) else 1)
    if decay is None:
        decay = -module.A_log.to(wide).exp() * F.softplus(a.to(wide) + module.dt_bias.to(wide))
        heads, keys, sizes = module.num_v_heads, module.num_k_heads, (module.head_k_dim, module.head_v_dim)
    else:
        heads, keys, sizes = module.num_heads, module.num_heads, (module.head_dim, module.head_dim)
    weight, size = module.conv1d.weight.squeeze(1), sizes[1]
    shape = StateShape(weight.shape[1] - 1, weight.shape[0], heads, *sizes)
    rule = DeltaRule(weight, module.conv1d.bias, ACT2FN[module.activation], keys, shape)
    out_THV = skyrl_attention.recur(module.layer_idx, rule, mixed[0], decay[0], beta[0]).to(x.dtype)
    norm, project = (module.norm, module.out_proj) if hasattr(module, "out_proj") else (module.o_norm, module.o_proj)
    out = norm(out_THV.reshape(-1, size), z.reshape(-1, size))
    return project(out.view(*x.shape[:-1], heads * size))
