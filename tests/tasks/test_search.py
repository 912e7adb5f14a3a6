"""Search over a corpus: what is found, what counts as an answer, what is no command."""

import json
import sys

import pytest

from skyrl.tasks.search import bm25, normalised
from skyrl.types import UserError

TEXTS = [
    {"title": "Oslo", "text": "Oslo is the capital of Norway."},
    {"title": "Rome", "text": "Rome is the capital of Italy, an old town."},
    {"text": "Bread is made of flour."},
]
ROW = {"prompt": "Capital of Norway?", "answer": ["Oslo", "the town of Oslo"]}


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    return {"corpus": str(path)}


@pytest.mark.parametrize(
    ("answers", "reward", "metrics"),
    [
        (["search: capital Norway", "It is there.\nAnswer:  OSLO."], 1.2, (1, 0, 1, 1)),
        (["answer: the Oslo"], 1.0, (0, 0, 0, 1)),
        (["answer: A town of Oslo!"], 1.0, (0, 0, 0, 1)),
        (["search: capital of Norway", "search: flour", "answer: Rome"], 0.2, (2, 0, 1, 0)),
        (["answer: \u201cOslo\u201d\u2026"], 1.0, (0, 0, 0, 1)),  # signs of any script
        (["answer: Oslo or Rome"], 0.0, (0, 0, 0, 0)),
        (["answer: Oslo\nanswer: Rome"], 0.0, (0, 0, 0, 0)),
        (["Oslo", "search:", "answer: Oslo"], 1.0, (0, 2, 0, 1)),
        (["answer:", "answer: ..."], 0.0, (0, 1, 0, 0)),
        (["search: zzz", "search: " + "capital " * 10_000], 0.2, (2, 0, 1, 0)),
        (["search: nothing of it", "search: still not"], 0.0, (2, 0, 0, 0)),
    ],
)
def test_the_reward_does_what_it_says(rows, play, corpus, answers, reward, metrics):
    prompt = rows("search", ROW, options=corpus)[0]
    result, _ = play(prompt, *answers, **corpus, top_k=1, found=0.2)
    names = ("searches", "malformed", "found", "correct")
    assert round(result.reward, 6) == reward and tuple(result.metrics[f"{name}:mean"] for name in names) == metrics


def test_what_is_shown(rows, play, corpus):
    prompt = rows("search", ROW, options=corpus)[0]
    _, heard = play(prompt, "search: the capital", "search: zzz", "well", "answer: x", **corpus, max_characters=14)
    assert heard[1] == "[1] Oslo: Oslo is \n[2] Rome: Rome is \n" and heard[2] == "nothing found\n"
    assert heard[3].startswith("write one line: search: <words>")


def test_texts_that_are_written_in_two_ways_are_the_same():
    assert normalised("Zu\u0308rich \u2014 \u00abthe\u00bb \uff12") == normalised("Z\u00fcrich 2") == "z\u00fcrich 2"


def test_bm25_prefers_rare_words_and_short_texts():
    find = bm25([normalised(t).split() for t in ("x y", "x y y y y y y z", "x", "w")])
    assert find("y", 9)[0] == 1 and find("x", 9) == [2, 0, 1] and find("W!", 9) == [3] and find("", 9) == []
    assert find("x", 1) == [2] and find("y z", 1) == [1]


def test_the_made_questions_can_be_answered_by_searching(rows, play):
    train, test = rows("search"), rows("search", split="test")
    assert not {p.messages[0]["content"] for p in train} & {p.messages[0]["content"] for p in test}

    def player(said):  # the question, the person's text, the town's text
        line = said.splitlines()[0]
        if "?" in line:
            player.question = line
            return f"search: {line}"
        words = line.rstrip(".").split()
        if "born in" in line:
            town, work = words[words.index("in") + 1], words[-1]
            if "river" in player.question:
                return f"search: {town} lies"
            return f"answer: {work if 'work' in player.question else town}"
        return f"answer: {' '.join(words[words.index('the') + 1 :])}"

    results = [play(prompt, player, max_turns=4, found=0.5)[0] for prompt in test]
    assert [result.reward for result in results] == [1.5] * len(test)
    assert {result.metrics["searches:mean"] for result in results} == {1.0, 2.0}


def test_the_package_finds_what_our_own_index_finds(rows, play, corpus):
    pytest.importorskip("bm25s", reason="bm25s is not installed (extra search)")
    prompt = rows("search", ROW, options={**corpus, "index": "bm25s"})[0]
    queries = ["search: the capital of Norway", "search: flour", "search: zzz", "search: old town", "answer: x"]
    heard = [play(prompt, *queries, **corpus, index=index)[1] for index in ("bm25", "bm25s")]
    assert heard[0] == heard[1] and "Oslo" in heard[1][1] and heard[1][3] == "nothing found\n"


def test_the_package_is_named_where_it_is_missing(rows, play, corpus, monkeypatch):
    options = {**corpus, "index": "bm25s"}
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UserError, match=r"'bm25s' is not installed; run pip install 'skyrl-spmd\[search\]', or"):
        rows("search", ROW, options=options)


@pytest.mark.parametrize(
    ("row", "options", "told"),
    [
        ({"prompt": "?"}, {}, r"train\.jsonl:1: field 'answer' is None"),
        ({"prompt": "?", "answer": ["Oslo", "the"]}, {}, r"train\.jsonl:1: field 'answer' .* more than articles"),
        ({"prompt": "?", "answer": {"a": 1}}, {}, r"train\.jsonl:1: field 'answer'"),
        ({"prompt": "?", "answer": ["Oslo", None]}, {}, r"train\.jsonl:1: field 'answer'"),
        ({"prompt": "?", "answer": [["Oslo"]]}, {}, r"train\.jsonl:1: field 'answer'"),
        ({"prompt": "?", "answer": True}, {}, r"train\.jsonl:1: field 'answer'"),
        (ROW, {"top_k": 0}, "env.options.top_k=0"),
        (ROW, {"corpus": "none.jsonl"}, "none.jsonl"),
        (ROW, {"corpus": None}, "env.options.corpus: no file of texts is named"),
    ],
)
def test_what_cannot_be_played_is_refused(rows, corpus, row, options, told):
    with pytest.raises(UserError, match=told):
        rows("search", row, options={**corpus, **options})
    with pytest.raises(UserError, match=r"data\.path: no file of questions"):
        rows("search", options=corpus)
