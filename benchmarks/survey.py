"""Every causal LM of transformers, made small with random weights: let in with its own bits and numbers, or refused.

    python benchmarks/survey.py --out benchmarks/baselines/cpu-2core/survey.json
    python benchmarks/survey.py gpt_oss deepseek_v3        # some of them; nothing is written without --out

A model of 4 layers is saved, and loaded as `model.path` is. One that is let in is "exact" when its parameters and
buffers equal those of from_pretrained bit for bit, and the log-probabilities of packed rows (training) and of sampled
tokens (three sequences together, in pages of 4 tokens) differ by no more than 1e-3 from transformers' own forward of
each row alone; anything else is "wrong". "refused" and "not made" come with the reason; the latter are those that the
sizes below do not fit, or that have parts of other kinds. tests/models/test_survey.py holds the list against shrinking.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers as tf  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING  # noqa: E402

from skyrl.config.schema import ModelConfig, SamplerConfig  # noqa: E402
from skyrl.models.forward import CausalLM, collate  # noqa: E402
from skyrl.pretrained.load import build_model, check_against_transformers  # noqa: E402
from skyrl.sampler.make import make_sampler  # noqa: E402
from skyrl.types import Datum, SampleRequest, SamplingParams, UserError  # noqa: E402

KINDS = {config.model_type: config for config in reversed(MODEL_FOR_CAUSAL_LM_MAPPING.keys())}
VOCAB, WINDOW, TOLERANCE = 96, 8, 1e-3
# Under the names of most families: those that a family has of them are set.
SIZES: dict[int, str] = {
    VOCAB: "vocab_size vocab_size_per_layer_input",
    128: "max_position_embeddings n_positions n_ctx max_seq_len",
    48: "intermediate_size ffn_dim ffn_hidden_size shared_intermediate_size intermediate_size_mlp",
    32: "hidden_size d_model n_embd dim word_embed_proj_dim",
    24: "moe_intermediate_size shared_expert_intermediate_size moe_intermediate_dim moe_layer_ffn_dim",
    16: "q_lora_rank kv_lora_rank dim_model_base",
    WINDOW: "head_dim global_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim query_pre_attn_scalar laurel_rank "
    "hidden_size_per_layer_input "
    "sliding_window attention_chunk_size",
    4: "num_hidden_layers n_layer num_layers num_attention_heads n_head num_heads num_experts num_local_experts "
    "rotary_dim n_routed_experts moe_num_experts",
    2: "num_key_value_heads num_experts_per_tok moe_topk moe_k bos_token_id num_kv_shared_layers",
    1: "n_shared_experts num_shared_experts n_group topk_group first_k_dense_replace eos_token_id",
    0: "pad_token_id",
}
# Of linear attention, in every second layer where a family has some.
LINEAR = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_heads=4,
    linear_head_dim=8,
    linear_conv_kernel_dim=4,
    num_experts_per_token=2,
)


def sizes(kind: str) -> dict[str, Any]:
    """What is set in the config of a kind. Raises where it has no default."""
    default = KINDS[kind]()
    known: dict[str, Any] = default.to_dict()
    out: dict[str, Any] = {}
    for size, names in SIZES.items():
        out.update({name: size for name in names.split() if name in known or name in vars(default)})
    if known.get("kv_lora_rank"):
        out.update(num_key_value_heads=out["num_attention_heads"])
    if "linear_attention" in (known.get("layer_types") or ()):
        out.update({name: value for name, value in LINEAR.items() if name in known})
        out.update(layer_types=["linear_attention", "full_attention"] * 2)
    if not known.get("num_kv_shared_layers"):
        out.pop("num_kv_shared_layers", None)
    needed = ("num_experts_per_tok",)  # of which a default None stands for nothing that runs
    return {k: v for k, v in out.items() if known.get(k) is not None or k.endswith("_id") or k in needed}


def small(kind: str) -> Any:
    """A net of that kind with large random weights, or why there is none."""
    try:
        config = KINDS[kind](**sizes(kind))
        parts = [name for name, value in vars(config).items() if isinstance(value, tf.PreTrainedConfig)]
        if parts:
            return f"it has parts that stay large: {', '.join(parts)}"
        net = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        net(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0][:150]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in net.parameters():
            noise = torch.randn(param.shape, generator=generator)
            param.copy_(noise * 0.3 if param.ndim > 1 else param + 0.1 * noise)
        net.get_input_embeddings().weight[0] = 0  # of padding, which from_pretrained of some sets to 0
    return net


def outcome(kind: str, folder: str) -> tuple[str, str]:
    """What becomes of one kind ("exact", "wrong", "refused", "not made") and why."""
    net = small(kind)
    if isinstance(net, str):
        return "not made", net
    net.save_pretrained(folder)
    try:
        model = build_model(ModelConfig(path=folder), range(VOCAB))  # type: ignore[arg-type]
        check_against_transformers(model)
    except UserError as refused:
        return "refused", str(refused).partition("is not supported: ")[2].partition("; use a decoder")[0] or str(
            refused
        )
    theirs = tf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    for named in ("named_parameters", "named_buffers"):
        ours, wanted = dict(getattr(model.net, named)()), dict(getattr(theirs, named)())
        if ours.keys() != wanted.keys():
            return "wrong", f"{named}: {sorted(ours.keys() ^ wanted.keys())[0]}"
        for name in ours:
            if not torch.equal(ours[name].to(wanted[name].dtype), wanted[name]):
                return "wrong", f"{name} has other bits"
    gaps = {where: gap for where, gap in compare(model, theirs).items() if not gap <= TOLERANCE}
    return ("wrong", str(gaps)) if gaps else ("exact", "")


@torch.no_grad()
def compare(model: CausalLM, theirs: Any) -> dict[str, float]:
    """Largest difference of log-probabilities from a plain forward, in packed rows and in sampling."""
    rng = np.random.default_rng(0)
    given = {str(length): rng.integers(3, VOCAB, length) for length in (1, 5, 3 * WINDOW)}
    sampler = make_sampler(
        model, SamplerConfig(block_tokens=4), decode=lambda tokens, after=None, skip=frozenset(): "", max_length=128
    )
    for uid, ids in given.items():
        sampler.add(SampleRequest(uid, ids, SamplingParams(max_tokens=20, seed=int(uid), temperature=1.0)))
    drawn: dict[str, Any] = {}
    while sampler.unfinished():
        drawn.update({sample.uid: sample for sample in sampler.step()})
    whole = [np.concatenate([given[uid], drawn[uid].tokens]) for uid in given]
    rows = [Datum(ids[:-1], ids[1:], np.ones(len(ids) - 1, np.float32)) for ids in whole]
    packed = model(collate(rows, torch.float32, "cpu")).logprobs_T.split([len(row.tokens) for row in rows])
    gaps = {"packed": 0.0, "sampled": 0.0}
    for uid, row, own in zip(given, rows, packed, strict=True):
        logits = theirs(input_ids=torch.tensor(row.tokens)[None], use_cache=False).logits[0].float()
        plain = torch.log_softmax(logits, -1).gather(1, torch.tensor(row.targets)[:, None])[:, 0]
        sampled = torch.from_numpy(drawn[uid].logprobs)
        gaps["packed"] = max(gaps["packed"], float((own - plain).abs().max()))
        gaps["sampled"] = max(gaps["sampled"], float((sampled - plain[len(given[uid]) - 1 :]).abs().max()))
    return gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kinds", nargs="*", help="model types; all without")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tf.logging.set_verbosity_error()
    found: dict[str, dict[str, str]] = {}
    for kind in args.kinds or sorted(KINDS):
        with tempfile.TemporaryDirectory() as folder:
            try:
                result, why = outcome(kind, folder)
            except Exception as error:  # a mistake of ours, which the table should show
                result, why = "wrong", f"{type(error).__name__}: {error}".partition("\n")[0][:150]
        found.setdefault(result, {})[kind] = why.replace(folder, "FOLDER")
        print(f"{kind:28} {result:9} {why}", flush=True)
    print(Counter({result: len(kinds) for result, kinds in found.items()}))
    if args.out:
        exact = sorted(found.pop("exact", {}))
        table = {"transformers": tf.__version__, "exact": exact, **dict(sorted(found.items()))}
        args.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
