"""The adapter's files are what the real peft package reads, and mean the same there."""

import json

import pytest
import torch
from small import small_config
from transformers import AutoModelForCausalLM

from skyrl.pretrained.peft import write_adapter
from skyrl.pretrained.tiny import tiny_config
from skyrl.service.storage.archive import Archive
from skyrl.service.storage.content import Content
from skyrl.service.storage.records import CheckpointPath, ModelInfo
from skyrl.text.tokenizer import tiny_tokenizer
from skyrl.types import LoraSpec

PATH = CheckpointPath("s-1:train:0", "sampler_weights", "final")
MODULES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def tiny_model():
    torch.manual_seed(0)
    config = tiny_config(small_config().model.tiny, len(tiny_tokenizer()))
    return AutoModelForCausalLM.from_config(config).float().eval()


def make_adapters(model, rank, head, skip=""):
    generator = torch.Generator().manual_seed(1)
    modules = dict(model.named_modules())
    paths = [path for path in modules if path.endswith(MODULES) and path != skip] + ["lm_head"] * head
    return {
        path: (
            torch.randn(rank, modules[path].in_features, generator=generator),
            torch.randn(modules[path].out_features, rank, generator=generator),
        )
        for path in paths
    }


@pytest.mark.parametrize("head", [False, True])
def test_peft_computes_the_same_model(tmp_path, head):
    peft = pytest.importorskip("peft")
    model, rank, alpha = tiny_model(), 4, 32.0
    skipped = "model.layers.1.mlp.down_proj"  # a module whose name is adapted elsewhere, and not here
    adapters = make_adapters(model, rank, head, skipped)
    archive = Archive(tmp_path)
    info = ModelInfo("org/name", LoraSpec(rank, alpha))
    weights = {f"{path}.{side}": t for path, pair in adapters.items() for side, t in zip("AB", pair, strict=True)}
    version, _ = archive.write(PATH, Content(info, weights))
    ids = torch.arange(4, 40)[None]
    expected = tiny_model()
    handles = []
    for path, (a, b) in adapters.items():
        handles.append(
            expected.get_submodule(path).register_forward_hook(
                lambda _, inputs, out, a=a, b=b: out + alpha / rank * inputs[0] @ a.T @ b.T
            )
        )
    with torch.no_grad():
        base, wanted = model(ids).logits, expected(ids).logits
        wrapped = peft.PeftModel.from_pretrained(model, archive.folder(PATH, version))
        found = wrapped(ids).logits
    assert (wanted - base).abs().max() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-4)
    adapted = {name.split("base_model.model.")[-1].removesuffix(".lora_A.default")
               for name, _ in wrapped.named_modules() if name.endswith("lora_A.default")}  # fmt: skip
    assert adapted == set(adapters)
    # docs/serve.md: how a base whose embeddings are tied is merged
    base_model = tiny_model()
    base_model.lm_head.weight = torch.nn.Parameter(base_model.get_input_embeddings().weight.detach().clone())
    base_model.config.tie_word_embeddings = False
    merged = peft.PeftModel.from_pretrained(base_model, archive.folder(PATH, version)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, wanted, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("alpha, told", [(32.0, 32), (0.5, 0.5)])
def test_the_config_says_what_peft_needs(tmp_path, alpha, told):
    write_adapter(tmp_path, {"q.A": torch.zeros(4, 6), "q.B": torch.zeros(6, 4)}, LoraSpec(4, alpha), "org/name")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    wanted = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": told, "bias": "none",
              "base_model_name_or_path": "org/name", "inference_mode": True, "target_modules": ["q"]}  # fmt: skip
    assert wanted.items() <= config.items()
