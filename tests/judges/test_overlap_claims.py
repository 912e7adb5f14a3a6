"""Rewards by rules: overlap with references, and claims that a context does not support."""

import json
import time
from dataclasses import replace

import pytest

from skyrl.config.load import load_config
from skyrl.data import make_prompts
from skyrl.judges.claims import count_unsupported, unsupported_claims
from skyrl.judges.overlap import character_ngrams, chrf, common_subsequence, rouge_l
from skyrl.types import Prompt, UserError

CONTEXT = """The bridge was opened in 1,932 by Marie Curie-Joliot and Dr. O'Neill. It cost 3 million dollars;
seven workers died. "The wind was far too strong," said the mayor of Sao Paulo. NASA measured 12.50 m.
It is in the U.S. today.
"""


def prompt(messages=(), **extra):
    return Prompt("p/1", "e", list(messages), extra)


# The figures of chrF are sacrebleu's sentence_score over 100; those of ROUGE-L are rouge-score's rougeL without stems.
@pytest.mark.parametrize(
    ("text", "others", "rouge", "chr_f"),
    [
        ("the cat sat on the mat", ["the cat sat on the mat"], 1.0, 1.0),
        ("the cat sat", ["the cat sat on the mat"], 2 * 3 / 9, 0.495935),
        ("The Cat; sat!", ["a dog ran", "the cat sat"], 1.0, 0.226012),
        ("東京", ["東京都"], 0.0, 0.636364),
        ("", ["something"], 0.0, 0.0),
        ("?!", ["!?"], 0.0, 0.5),
    ],
)
def test_overlap_is_what_others_compute(text, others, rouge, chr_f):
    row = prompt(references=others)
    assert rouge_l(text, row) == pytest.approx(rouge, abs=1e-6) and chrf(text, row) == pytest.approx(chr_f, abs=1e-6)


def test_references_are_a_file_a_list_or_the_answer(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "a dog ran"}\n{"text": "the cat sat"}\n')
    assert rouge_l("the cat sat", prompt(), corpus=str(tmp_path / "c.jsonl")) == 1.0
    assert rouge_l("7", prompt(answer=7)) == 1.0
    (tmp_path / "bad.jsonl").write_text('{"txt": "the cat sat"}\n')
    for given, said in [
        ({"corpus": str(tmp_path / "bad.jsonl")}, "bad.jsonl:1: field 'text'"),
        ({"corpus": "/no/file"}, "does not exist"),
    ]:
        with pytest.raises(UserError, match=said):
            chrf("a", prompt(), **given)
    with pytest.raises(UserError, match="field 'references' is '7'"):
        chrf("a", prompt(references=7))


def test_long_texts_take_milliseconds():
    started = time.process_time()
    assert common_subsequence(list("abcde") * 800, list("aebdc") * 800) > 1600
    unsupported_claims("A1 b.c, " * 500 + "1" * 5000 + '"' * 500 + "Marie " * 500, CONTEXT * 20)
    assert len(unsupported_claims(" ".join(f'"ab c{n}"' for n in range(5000)), CONTEXT)) == 5000
    assert time.process_time() - started < 5.0


def test_answers_are_not_kept():
    before = character_ngrams.cache_info().currsize
    prompt = Prompt("u", "e", [], {"answer": "one reference"})
    assert all(chrf(f"answer {n}", prompt) < 1.0 for n in range(5))  # some MB each where they are long
    assert character_ngrams.cache_info().currsize <= before + 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It opened in 1932 and cost 3,000,000 dollars.", []),
        ("It opened in 1933 and cost $4 million.", ["1933", "4 million"]),
        ("7 workers died. Seven workers died, five of them later. One of the two left.", ["five"]),
        ("It is 12.5 m high, -5 degrees and 45% humid.", ["-5", "45"]),
        ("1. The wind\n2. The mayor\n3. The bridge", []),
        ("The mayor of S\u00e3o Paulo, Marie Curie-Joliot's bridges and the O\u2019Neill plan in the US", []),
        ("However, it rained. Then Bob left for London with NASA and ESA.", ["Bob", "London", "ESA"]),
        ("Napoleon's army. Marie Dupont left.", ["Napoleon's", "Dupont"]),
        ('He said "the wind was  far too strong" and "The wind ... strong".', []),
        (
            "He said \u201cthe wind was not strong in 1950\u201d, not \u00abZola\u00bb.",
            ["the wind was not strong in 1950", "Zola"],
        ),
        ("COVID-19 spread", ["COVID-19"]),
        ("Nothing of this is known, I'd say.", []),
        ("9" * 6000, ["9" * 30]),
        ("", []),
    ],
)
def test_claims_that_the_context_lacks(text, found):
    assert unsupported_claims(text, CONTEXT) == found
    assert count_unsupported(text, prompt(context=CONTEXT)) == -len(found)


def test_the_context_is_the_row_s_field_and_the_messages():
    row = prompt([{"role": "user", "content": "Who is Bob?"}], context=["Ann is 4."], sources="Eve is 50.")
    assert count_unsupported("Is Bob 4 as Ann, or 50 as Eve?", row) == -2.0
    assert count_unsupported("Is Bob 4 as Ann, or 50 as Eve?", row, field="sources") == -2.0
    assert count_unsupported(" ".join(f"it{i} {i * 1000}" for i in range(9, 99)), row) == -20.0
    with pytest.raises(UserError, match="prompt p/1: field 'context' is '7'"):
        count_unsupported("a", prompt(context=7))


def test_what_no_answer_could_be_scored_with_is_named_before_anything_is_played(tmp_path):
    file = tmp_path / "rows.jsonl"
    given = ["env.name=single_turn", "env.options.reward=exact", f"data.path={file}", "sampler.max_new_tokens=8"]
    cfg = load_config(["experiment=custom", "model=tiny", *given])
    for reward, row, said in (
        ("rouge_l", {}, "FILE:1: field 'answer' is missing"),
        ({"name": "chrf"}, {"references": []}, "FILE:1: field 'references' is '[]', wanted a list of texts"),
        ({"name": "chrf", "corpus": "NONE.jsonl"}, {}, "data file 'NONE.jsonl': does not exist"),
        (
            ["exact", "unsupported_claims"],
            {"answer": "4", "context": 3},
            "FILE:1: field 'context' is '3', wanted a text",
        ),
        ({"name": "similarity", "model": "m", "context": "facts"}, {}, "FILE:1: field 'facts' holds no text"),
        (
            {"name": "rubric", "model": "m", "base_url": "localhost:8000"},
            {},
            "base_url='localhost:8000': wanted an addr",
        ),
        ({"name": "rubric", "model": "m", "base_url": "http://"}, {}, "base_url='http://': wanted an address such as"),
        ({"name": "rubric", "model": "m", "rubric": {}}, {}, "rubric={}: wanted a text"),
    ):
        file.write_text(json.dumps({"prompt": "2+2=", **row}) + "\n")
        with pytest.raises(UserError) as refused:
            make_prompts(replace(cfg, env=replace(cfg.env, options={"reward": reward})), "train")
        assert said.replace("FILE", str(file)) in str(refused.value)
