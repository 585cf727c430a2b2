import json

import numpy as np
import pytest

from ragjax.data import Corpus
from ragjax.runs.written import pretext
from ragjax.runs.written.pretext import Keywords, inverse_cloze, own_titles, sentences

TEXT = 'One two three four five. Six seven "eight nine ten eleven." Twelve? To the end it goes now.'


def test_sentences_end_at_their_marks_in_any_script():
    assert sentences(TEXT) == [
        "One two three four five.",
        'Six seven "eight nine ten eleven."',
        "Twelve?",
        "To the end it goes now.",
    ]
    assert sentences("猫が好きです。犬も好きです。") == ["猫が好きです。", "犬も好きです。"]
    assert sentences("Version 3.5 is out") == ["Version 3.5 is out"]


def test_a_sentence_is_taken_out_of_nine_passages_of_ten():
    drawn = [inverse_cloze(TEXT, seed=(0, row)) for row in range(400)]
    assert {cloze.sentence for cloze in drawn} == set(sentences(TEXT)) - {"Twelve?"}
    kept = [cloze for cloze in drawn if cloze.sentence in cloze.rest]
    assert 0.05 < len(kept) / len(drawn) < 0.15
    out = next(cloze for cloze in drawn if cloze.sentence.startswith("One"))
    assert out.rest == " ".join(sentences(TEXT)[1:])
    assert drawn == [inverse_cloze(TEXT, seed=(0, row)) for row in range(400)]
    assert drawn != [inverse_cloze(TEXT, seed=(1, row)) for row in range(400)]


@pytest.mark.parametrize("text", ["", "only one sentence with enough words", "Yes. No. Perhaps."])
def test_a_passage_without_two_sentences_worth_it_has_no_cloze(text):
    assert inverse_cloze(text, seed=(0, 0)) is None


def corpus_of(folder, texts, titles=()):
    rows = [
        {"_id": str(n), "text": text, **({"title": titles[n]} if titles else {})}
        for n, text in enumerate(texts)
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Corpus.open(folder, cache=folder / "cache")


def test_keywords_are_rarer_words_of_one_sentence_in_its_order(tmp_path):
    common = "this and that are words of all of them"
    corpus = corpus_of(
        tmp_path, [f"{common} a{n} b{n} c{n}. {common} x{n} y{n} z{n}." for n in range(20)]
    )
    keywords, draw = Keywords(corpus, seed=0), np.random.default_rng(0)
    drawn = {keywords.query(3, draw) for _ in range(50)}
    assert drawn == {"a3 b3 c3", "x3 y3 z3"}  # what all passages have tells none apart


def test_rarer_words_are_drawn_more_often_and_four_to_eight_of_them(tmp_path):
    often = " ".join(f"often{n}" for n in range(8))
    texts = [f"{often} rare{n} seldom{n}" for n in range(9)] + ["nothing of the kind here"]
    keywords, draw = Keywords(corpus_of(tmp_path, texts), seed=0), np.random.default_rng(0)
    drawn = [keywords.query(0, draw).split() for _ in range(300)]
    assert {len(words) for words in drawn} == {4, 5, 6, 7, 8}
    share = np.mean(["rare0" in words for words in drawn])
    assert share > 0.95 > 0.75 > np.mean(["often0" in words for words in drawn]) > 0.3


def test_a_passage_of_words_that_all_have_gives_no_keywords(tmp_path):
    keywords = Keywords(corpus_of(tmp_path, ["one two three", "one two three", "!?"]), seed=0)
    assert keywords.query(2, np.random.default_rng(0)) == ""
    alone = Keywords(corpus_of(tmp_path, ["one two three"]), seed=0)
    assert alone.query(0, np.random.default_rng(0)) == ""


def test_of_a_large_corpus_a_part_says_how_rare_words_are(tmp_path, monkeypatch):
    monkeypatch.setattr(pretext, "_COUNTED", 5)
    corpus = corpus_of(tmp_path, [f"everywhere a{n} b{n}" for n in range(40)])
    keywords, draw = Keywords(corpus, seed=0), np.random.default_rng(0)
    assert {keywords.query(n, draw) for n in range(40)} == {f"a{n} b{n}" for n in range(40)}


def test_keywords_of_a_script_without_spaces_are_pairs_of_characters(tmp_path):
    texts = ["东京是日本的首都也是最大的城市", "巴黎是法国的首都位于塞纳河畔"]
    query = Keywords(corpus_of(tmp_path, texts), seed=0).query(0, np.random.default_rng(0))
    assert all(len(pair) == 2 and pair in texts[0] for pair in query.split())
    assert "首都" not in query


def test_titles_that_several_passages_have_are_left_out(tmp_path):
    titles = ["Cats", "cats", "Dogs", ""]
    corpus = corpus_of(tmp_path, [f"text {n}" for n in range(4)], titles)
    assert own_titles(corpus, range(4)) == {2: "Dogs"}
