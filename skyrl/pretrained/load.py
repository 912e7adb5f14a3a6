"""From `model.*` options to a module with weights; and the probe that checks it before training.

The module is built with its parameters on the meta device and its buffers real, so that rotary frequencies are those
of transformers to the last bit and no memory is spent before a strategy has decided what each rank holds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NoReturn

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from skyrl.config.schema import ModelConfig
from skyrl.hub.locate import locate
from skyrl.hub.model_path import DEQUANTISED
from skyrl.hub.tensor_files import Checkpoint, reason_of
from skyrl.hub.text_part import text_part
from skyrl.models.attention import NAME, AttentionOptions, register
from skyrl.models.forward import CausalLM, precise
from skyrl.models.packed import PackedAttention, loss_dtype
from skyrl.models.weights import fill_from, init_random
from skyrl.pretrained.support import check_module, check_supported
from skyrl.pretrained.tiny import tiny_config
from skyrl.text.tokenizer import TINY, tiny_tokenizer
from skyrl.tracking.advisories import warn_fallback
from skyrl.types import UserError

# Mean absolute difference of log-probabilities over rows and vocabulary; deep models in bfloat16 reach about 0.03.
CHECK_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.05}
Head = Literal["logits", "value", "reward"]


def read_config(cfg: ModelConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Any:
    """The transformers config of `model.path`, checked. Raises UserError for a model that is not supported."""
    if cfg.path == TINY:
        return tiny_config(cfg.tiny, len(tokenizer if tokenizer is not None else tiny_tokenizer()))
    config = _whole_config(cfg)
    part = text_part(config)
    if part is not config:
        warn_fallback(
            f"model.path={cfg.path}: of {config.model_type} its text part, {part.model_type}, is trained and exported; "
            "images and sound are not read"
        )
    check_supported(part)
    if part is not config and not part.tie_word_embeddings:  # where its two configs contradict each other, files do not
        files = Checkpoint(locate(cfg.path, cfg.revision)).files
        part.tie_word_embeddings = not any(name.endswith("lm_head.weight") for name in files)
    return part


def _whole_config(cfg: ModelConfig) -> Any:
    """What transformers makes of the folder's config.json: of a model that takes images, not of its text part alone."""
    folder = locate(cfg.path, cfg.revision)
    try:  # the file's own dtype may be "auto", which is none
        config = AutoConfig.from_pretrained(folder, trust_remote_code=cfg.trust_remote_code, dtype=torch.float32)
        method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
        if method in DEQUANTISED:
            warn_fallback(f"model.path={cfg.path}: its weights are in {method}; they are dequantised and trained whole")
            del config.quantization_config
        return config
    except Exception as error:  # whatever a class makes of values that it did not expect, and code of the folder
        reason = " ".join(f"{type(error).__name__} {error}".split())[:300]
        if "trust_remote_code=True" in str(error):
            reason = "it needs the folder's own code; read that, and set model.trust_remote_code=true to run it"
        raise UserError(f"model.path={cfg.path}: transformers cannot read its config: {reason}") from error


def build_net(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """A transformers causal LM with meta parameters in `dtype` and real buffers (in their own dtype, on the CPU)."""
    register()
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
    with init_empty_weights(include_buffers=False):
        try:
            net = AutoModelForCausalLM.from_config(
                config, attn_implementation=NAME, trust_remote_code=trust_remote_code, dtype=torch.float32
            )
        except Exception as error:  # a table of attention classes instead of the interface, values that fit nothing
            raise UserError(
                f"model.path: model type {config.model_type!r} is not supported: transformers cannot build it as a "
                f"causal LM with its attention interface ({reason_of(error)})"
            ) from error
    net.tie_weights()  # the empty-weights context has made separate parameters of tied ones
    check_module(net)
    net.config.dtype = dtype
    if dtype == torch.float64:
        net.set_experts_implementation("eager")  # the grouped product has no float64
    return net


def build_on_meta(
    cfg: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    head: Head = "logits",
    dtype: torch.dtype = torch.float32,
    max_row_tokens: int | None = None,
) -> CausalLM:
    """The module of `cfg` with parameters in `dtype` on the meta device; its buffers are real and right.
    `max_row_tokens`: the longest row of the run (0 = the model's limit), by which longrope chooses for all rows.

    `load_into` gives it weights, before or after it was sharded. Raises: UserError for a model that cannot be had or
    is not supported.
    """
    net = build_net(read_config(cfg, tokenizer), dtype, trust_remote_code=cfg.trust_remote_code)
    float_head = cfg.head_dtype == "float32" and dtype in (torch.bfloat16, torch.float16)
    model = CausalLM(net, head, chunk_tokens=cfg.logits_chunk_tokens, float_head=float_head).to(dtype)
    if model.rope is not None and max_row_tokens is not None:
        model.rope.limit = max_row_tokens or model.max_positions
    if cfg.compile:
        model.compile_layers()
    if cfg.activation_checkpointing:
        model.checkpoint_layers()
    return model


def load_into(model: CausalLM, cfg: ModelConfig, *, device: torch.device | str, seed: int) -> None:
    """Weights of `cfg.path` for a module from `build_on_meta`, sharded or not; `tiny` and value heads from `seed`.

    Memory is taken on `device` for what is still on the meta device. How tensors are read: docs/models.md. No
    communication. Raises: UserError for files that do not fit the config, naming tensors.
    """
    model.to_empty(device=device)
    if cfg.path == TINY:
        init_random(model, seed, residual_layers=len(model.layers()))
        return
    config = _whole_config(cfg)
    fill_from(model.net, locate(cfg.path, cfg.revision), None if text_part(config) is config else config)
    if model.head != "logits":
        init_random(model, seed, only="value_head.")


def build_model(
    cfg: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head: Head = "logits",
    seed: int = 1,
    max_row_tokens: int | None = None,
) -> CausalLM:
    """The whole model of `cfg` with weights, on `device`: build_on_meta, then load_into."""
    model = build_on_meta(cfg, tokenizer, head=head, dtype=dtype, max_row_tokens=max_row_tokens)
    load_into(model, cfg, device=device, seed=seed)
    return model


class _ShortWindow:
    """Attends as PackedAttention, with `short` in place of the window `long`; `layers`: which layers have attended."""

    def __init__(self, inner: PackedAttention, long: int | None, short: int) -> None:
        self.inner, self.long, self.short = inner, long, short
        self.layers: list[int] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        self.layers.append(layer)
        if self.long is not None and options.window == self.long:
            options = replace(options, window=self.short)
        return self.inner.attend(layer, query, key, value, options)

    def recur(self, layer: int, *args: Any) -> Tensor:
        self.layers.append(layer)
        return self.inner.recur(layer, *args)


def check_against_transformers(model: CausalLM) -> None:
    """Compares a packed forward of two short rows with transformers' own plain one; for whole, unsharded weights.

    Sliding windows are 3 tokens on both sides, so that layers which do not hand theirs to the attention show. Raises:
    UserError with the model type where log-probabilities differ by more than CHECK_TOLERANCE.
    """
    if model.head != "logits":
        return
    config = model.net.config

    def refuse(reason: str) -> NoReturn:
        raise UserError(f"model.path: model type {config.model_type!r} is not supported: {reason}")

    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, model.vocab_size, (n,), generator=generator).to(device) for n in (7, 4)]
    starts = torch.tensor([0, 7, 11], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(len(row), device=device) for row in rows])
    window = getattr(config, "sliding_window", None)
    lengths = torch.tensor([len(row) for row in rows for _ in row], device=device)
    attention = _ShortWindow(PackedAttention(starts, (7, 4)), window, 3)
    limit = 0 if model.rope is None else model.rope.limit
    try:
        if model.rope is not None:
            model.rope.limit = 0
        if window is not None:
            config.sliding_window = 3  # what transformers' masks are made from
        with torch.no_grad():
            try:
                plain = torch.cat(plain_logprobs(model.net, rows))
            except (ValueError, RuntimeError) as error:  # more experts a token than there are, a window that is null
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                refuse(f"its own forward fails with this config.json ({reason_of(error)}); put the model's own back")
            ours = torch.log_softmax(model.logits(model.hidden(torch.cat(rows), positions, attention, lengths)), -1)
    except TypeError as error:
        if "skyrl_attention" not in str(error):
            raise
        refuse("its layers keep keyword arguments from its attention")
    finally:
        if model.rope is not None:
            model.rope.limit = limit
        if window is not None:
            config.sliding_window = window
    if len(set(attention.layers)) != len(attention.layers):
        refuse("a layer of it attends more than once, and the sampler keeps keys and values of one time")
    gap = float((ours - plain).abs().mean())
    if not gap <= CHECK_TOLERANCE[dtype]:
        refuse(f"packed log-probabilities differ from transformers' own by {gap:.2g} on average")


def plain_logprobs(net: Any, rows: list[Tensor]) -> list[Tensor]:
    """log softmax [L, V] of each row by transformers' own forward with eager attention, one row at a time."""
    net.set_attn_implementation("eager")
    try:
        with precise(next(net.parameters()).dtype):
            logits = [net(input_ids=row[None], use_cache=False).logits[0] for row in rows]
        return [torch.log_softmax(one.to(loss_dtype(one.dtype)), -1) for one in logits]
    finally:
        net.set_attn_implementation(NAME)
