"""Of a model that takes images or sound, the text part is trained: the numbers are the whole model's on text."""

import pytest
import torch
import transformers as tf
from families import WITH_IMAGES, make_with_images
from test_export import state_of

from skyrl.config.schema import ModelConfig, RunConfig
from skyrl.models.forward import collate
from skyrl.planner.memory import model_sizes
from skyrl.pretrained.export import export_model
from skyrl.pretrained.load import build_model, check_against_transformers, plain_logprobs
from skyrl.text.tokenizer import tiny_tokenizer
from skyrl.types import Datum, UserError


@pytest.mark.parametrize("kind", WITH_IMAGES)
def test_the_text_part_is_trained_and_exported_as_a_text_model(kind, tmp_path, caplog):
    whole = make_with_images(kind)
    whole.save_pretrained(tmp_path / "whole")  # names are those that it is published with
    (tmp_path / "whole" / "preprocessor_config.json").write_text("{}")
    cfg = ModelConfig(path=str(tmp_path / "whole"))
    model = build_model(cfg, range(96))
    assert f"of {kind} its text part" in caplog.text and "images and sound are not read" in caplog.text
    check_against_transformers(model)
    rows = [torch.arange(2, 26), torch.arange(50, 57)]
    with torch.no_grad():
        want = [torch.log_softmax(whole(input_ids=row[None], use_cache=False).logits[0], -1) for row in rows]
        data = [Datum(row[:-1].numpy(), row[1:].numpy(), torch.ones(len(row) - 1).numpy()) for row in rows]
        ours = model(collate(data, torch.float32, "cpu")).logprobs_T
    theirs = torch.cat([w[:-1].gather(1, row[1:, None])[:, 0] for w, row in zip(want, rows, strict=True)])
    assert (ours - theirs).abs().max() < 2e-5
    assert model_sizes(RunConfig(model=cfg)).num_parameters == sum(p.numel() for p in model.parameters())

    export_model(state_of(model), model.config, tiny_tokenizer(), tmp_path / "out", torch.float32, source=cfg)
    again, info = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert (
        not info["missing_keys"] and not info["unexpected_keys"] and again.config.model_type == model.config.model_type
    )
    for got, wanted in zip(plain_logprobs(again, rows), want, strict=True):
        assert (got - wanted).abs().max() < 2e-5
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()
    back = build_model(ModelConfig(path=str(tmp_path / "out")), range(96))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), back.parameters(), strict=True))


def test_a_text_part_that_the_files_lack_is_told_by_its_own_names(tmp_path):
    whole = make_with_images("gemma3")
    state = {name: value for name, value in whole.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    whole.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match="gemma3_text: lacks model.layers.1.mlp.up_proj.weight; check"):
        build_model(ModelConfig(path=str(tmp_path)), range(96))
