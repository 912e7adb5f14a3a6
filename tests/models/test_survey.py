"""Every causal LM of transformers that can be made small is let in with its own bits and numbers, or refused."""

import numpy as np
import pytest
import torch
import transformers as tf
from families import WINDOW
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from skyrl.config.schema import ModelConfig
from skyrl.models.forward import collate
from skyrl.models.load import build_model, check_against_transformers
from skyrl.types import Datum, UserError
from tests.sampler.tools import requests, run, sampler

KINDS = {config.model_type: config for config in reversed(MODEL_FOR_CAUSAL_LM_MAPPING.keys())}
VOCAB = 96
# Under the names of most families: those that a family has of them are set.
SIZES = {
    VOCAB: "vocab_size vocab_size_per_layer_input",
    128: "max_position_embeddings n_positions n_ctx max_seq_len",
    48: "intermediate_size ffn_dim ffn_hidden_size shared_intermediate_size intermediate_size_mlp",
    32: "hidden_size d_model n_embd dim word_embed_proj_dim",
    24: "moe_intermediate_size shared_expert_intermediate_size moe_intermediate_dim moe_layer_ffn_dim",
    16: "q_lora_rank kv_lora_rank dim_model_base",
    8: "head_dim global_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim query_pre_attn_scalar laurel_rank",
    WINDOW: "sliding_window",
    4: "num_hidden_layers n_layer num_layers num_attention_heads n_head num_heads num_experts num_local_experts "
    "rotary_dim n_routed_experts moe_num_experts",
    2: "num_key_value_heads num_experts_per_tok moe_topk moe_k bos_token_id",
    1: "n_shared_experts num_shared_experts n_group topk_group first_k_dense_replace eos_token_id",
    0: "pad_token_id hidden_size_per_layer_input",
}


def small(kind):
    """A net of that type with large random weights; None where the values above do not fit together."""
    try:
        default = KINDS[kind]()
        sizes = {name: size for size, names in SIZES.items() for name in names.split() if hasattr(default, name)}
        unset = {name for name in sizes if getattr(default, name) is None and not name.endswith("_id")}
        config = KINDS[kind](**{name: size for name, size in sizes.items() if name not in unset})
        if any(isinstance(value, tf.PreTrainedConfig) for value in vars(config).values()):
            return None  # of several parts, which stay large
        net = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        net(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    except Exception:
        return None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in net.parameters():
            noise = torch.randn(param.shape, generator=generator)
            param.copy_(noise * 0.3 if param.ndim > 1 else param + 0.1 * noise)
    return net


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_let_in_with_its_own_bits_or_refused(kind, tmp_path):
    net = small(kind)
    if net is None:
        pytest.skip("not made small by these sizes")
    net.save_pretrained(tmp_path)
    cfg = ModelConfig(path=str(tmp_path))
    try:
        model = build_model(cfg, range(VOCAB))
        check_against_transformers(model)
    except UserError as refused:
        assert "\n" not in str(refused)
        pytest.skip(str(refused)[:200])
    theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32).eval()
    for named in ("named_parameters", "named_buffers"):
        ours, wanted = dict(getattr(model.net, named)()), dict(getattr(theirs, named)())
        assert ours.keys() == wanted.keys()
        assert [name for name in ours if not torch.equal(ours[name].to(wanted[name].dtype), wanted[name])] == []
    rng = np.random.default_rng(0)
    asked = requests([rng.integers(3, VOCAB, length) for length in (1, 5, 3 * WINDOW)], temperature=1.0)
    drawn = run(sampler(model, backend="auto", block_tokens=4), asked)
    whole = [np.concatenate([request.tokens, drawn[request.uid].tokens]) for request in asked]
    rows = [Datum(tokens=ids[:-1], targets=ids[1:], weights=np.ones(len(ids) - 1, np.float32)) for ids in whole]
    with torch.no_grad():
        packed = model(collate(rows, torch.float32, "cpu")).logprobs_T.split([len(row.tokens) for row in rows])
        logits = [theirs(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0, :-1].float() for ids in whole]
    for request, ids, own, plain in zip(asked, whole, packed, logits, strict=True):
        wanted = torch.log_softmax(plain, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        np.testing.assert_allclose(own, wanted, atol=1e-3, rtol=0)
        start = len(request.tokens) - 1
        np.testing.assert_allclose(drawn[request.uid].logprobs, wanted[start:], atol=1e-3, rtol=0)
