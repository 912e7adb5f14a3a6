"""The committed survey of transformers' causal LMs (benchmarks/survey.py): what it let in stays let in."""

import json
from pathlib import Path

import pytest
import transformers as tf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from benchmarks.survey import outcome, sizes
from skyrl.config.schema import ModelConfig, RunConfig
from skyrl.planner.memory import adapter_parameters, layer_values, model_sizes
from skyrl.pretrained.support import check_supported
from skyrl.types import UserError

TABLE = json.loads(
    (Path(__file__).parents[2] / "benchmarks/baselines/cpu-2core/survey.json").read_text(encoding="utf-8")
)
KINDS = {config.model_type: config for config in reversed(MODEL_FOR_CAUSAL_LM_MAPPING.keys())}


def test_families_that_were_let_in_are():
    """By their configs; that their numbers are right is the benchmark's to say. Of other releases of transformers only
    what they have is asked."""
    assert len(TABLE["exact"]) >= 85 and not TABLE.get("wrong")
    refused = {}
    for kind in (kind for kind in TABLE["exact"] if kind in KINDS):
        try:
            check_supported(KINDS[kind](**sizes(kind)))
        except UserError as error:
            refused[kind] = str(error)
    assert not refused


def test_the_plan_counts_families_that_were_let_in(tmp_path):
    """Their configs say sizes in many ways: Gemma 3n's of the feed-forward is a list with one of each layer."""
    for kind in (kind for kind in TABLE["exact"] if kind in KINDS):
        KINDS[kind](**sizes(kind)).save_pretrained(tmp_path / kind)
        found = model_sizes(RunConfig(model=ModelConfig(path=str(tmp_path / kind))))
        counted = layer_values(found, half=True), adapter_parameters(found, 4), found.cache_bytes_per_token("float32")
        assert all(isinstance(number, int) and number > 0 for number in counted), kind


def test_one_family_of_the_survey(tmp_path):
    if "granite_swa" not in KINDS:
        pytest.skip(f"transformers {tf.__version__} has no granite_swa")
    assert outcome("granite_swa", str(tmp_path)) == ("exact", "")


@pytest.mark.slow
@pytest.mark.parametrize("kind", TABLE["exact"])
def test_numbers_of_families_that_were_let_in(kind, tmp_path):
    assert outcome(kind, str(tmp_path)) == ("exact", "")
