"""Reward models and sentence embeddings held beside the policy: folders made here, of random weights."""

import json

import numpy as np
import pytest
import torch
import transformers
from small_tokenizers import byte_level

from skyrl.judges.batch import RankTools, conversation
from skyrl.judges.models import RewardModel, Similarity
from skyrl.types import Episode, Prompt, Sample, Turn, UserError

TOOLS = RankTools("cpu", lambda episodes: [], lambda conversations, max_tokens: [])
TEMPLATE = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"


def episode(*texts, prompt=None, observed=("2+2?",)):
    sample = Sample("u", np.array([1]), np.zeros(1), "stop", 0)
    turns = [
        Turn(np.array([1]), sample, text=text, observed=[{"role": "user", "content": said}])
        for text, said in zip(texts, observed, strict=True)
    ]
    return Episode(prompt or Prompt("p/1", "e", [], {"answer": "4"}), 0, turns, 0.0, "stop")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> folder of a model."""
    torch.manual_seed(0)
    where, found = tmp_path_factory.mktemp("models"), {}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name in ("causal", "ends", "pair", "sentence"):
        tokenizer = byte_level()
        if name in ("causal", "ends"):  # with no token to pad with, or the one that ends each conversation
            tokenizer.pad_token = tokenizer.eos_token if name == "ends" else None
            tokenizer.chat_template = TEMPLATE + ("</s>" if name == "ends" else "")
        more = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "initializer_range": 0.3, **sizes}
        if name in ("causal", "ends"):
            config = transformers.LlamaConfig(num_labels=1, pad_token_id=tokenizer.pad_token_id, **more)
            model = transformers.LlamaForSequenceClassification(config)
        elif name == "pair":
            model = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=2, **more))
        else:
            model = transformers.BertModel(transformers.BertConfig(**more))
        found[name] = str(where / name)
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


TEXTS = ["4", "four of them", "no", "a much longer answer", "4"]


@pytest.mark.parametrize("name", ["causal", "ends", "pair"])
def test_a_batch_scores_as_each_alone(folders, name):
    episodes = [episode(text) for text in TEXTS]
    model = RewardModel(model=folders[name], label=1 if name == "pair" else 0, batch_tokens=64)
    scores = model.score(episodes, TOOLS)
    for one, score in zip(episodes, scores, strict=True):
        row = {key: torch.tensor([value]) for key, value in model.row(one).items()}
        assert score == pytest.approx(float(model.model(**row).logits[0, model.label]), abs=2e-5)
    assert scores[0] == scores[4] and len(set(scores)) == 4 and model.score([], TOOLS) == []


def test_the_conversation_is_written_with_its_own_template(folders):
    model = RewardModel(model=folders["causal"])
    both = episode("4", "5", observed=("2+2?", "2+3?"))
    model.score([both], TOOLS)
    written = model.tokenizer.decode(model.row(both)["input_ids"])
    assert written == "user:2+2?\nassistant:4\nuser:2+3?\nassistant:5\n" and len(conversation(both)) == 4


def test_what_does_not_fit_is_a_failure_and_no_score(folders):
    short, long = RewardModel(model=folders["causal"]).score([episode("4"), episode("4" * 70)], TOOLS)
    assert isinstance(short, float) and isinstance(long, ValueError) and "takes 64" in str(long)
    with pytest.raises(UserError, match="label=2: it has 2, from 0"):
        RewardModel(model=folders["pair"], label=2).score([], TOOLS)
    with pytest.raises(UserError, match="no weights for (classifier|score)"):
        RewardModel(model=folders["sentence"]).score([], TOOLS)
    with pytest.raises(UserError, match="reward model=/no/model: no AutoModelForSequenceClassification"):
        RewardModel(model="/no/model").score([], TOOLS)


def test_similarity_is_the_largest_cosine(folders, tmp_path):
    path = folders["sentence"]
    held = Similarity(model=path)
    answers = ["a cat", "the moon", "", "a cat"]
    row = Prompt("p/1", "e", [], {"references": ["the moon", "a dog"]})
    scores = held.score([episode(text, prompt=row) for text in answers], TOOLS)
    assert scores[1] == 1.0 and scores[2] == 0.0 and scores[0] == scores[3] < 1.0

    def vector(text):
        ids = held.tokenizer(text, return_tensors="pt")
        mean = held.model(**ids).last_hidden_state[0].mean(0)
        return mean / mean.norm()

    expected = max(float(vector("a cat") @ vector(text)) for text in row.extra["references"])
    assert scores[0] == pytest.approx(expected, abs=2e-5)
    (tmp_path / "corpus.jsonl").write_text('{"text": "a dog"}\n{"text": "the moon"}\n')
    assert Similarity(model=path, corpus=str(tmp_path / "corpus.jsonl")).score([episode("a cat")], TOOLS) == scores[:1]


def test_similarity_of_each_sentence_with_a_context(folders):
    held = Similarity(model=folders["sentence"], context="context")
    row = Prompt("p/1", "e", [], {"context": "The moon is old. A cat sleeps."})
    same, other = held.score([episode(t, prompt=row) for t in ("A cat sleeps.", "A cat sleeps. Zebras fly!")], TOOLS)
    assert same == 1.0 and other < 1.0
    with pytest.raises(UserError, match="prompt p/1: field 'context' holds no text"):
        held.score([episode("4")], TOOLS)


def test_the_folder_says_how_vectors_are_pooled(folders, tmp_path):
    import shutil

    copy = shutil.copytree(folders["sentence"], tmp_path / "cls")
    (copy / "1_Pooling").mkdir()
    (copy / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    row = Prompt("p/1", "e", [], {"answer": "a dog"})
    mean, first = (
        Similarity(model=str(p)).score([episode("a cat", prompt=row)], TOOLS) for p in (folders["sentence"], copy)
    )
    assert mean != first
