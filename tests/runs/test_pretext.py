import json

import pytest

from ragjax.data import Corpus
from ragjax.runs.written.pretext import inverse_cloze, own_titles, sentences

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


def test_titles_that_several_passages_have_are_left_out(tmp_path):
    titles = ["Cats", "cats", "Dogs", ""]
    rows = [{"_id": str(n), "title": title, "text": f"text {n}"} for n, title in enumerate(titles)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = Corpus.open(tmp_path, cache=tmp_path / "cache")
    assert own_titles(corpus, range(4)) == {2: "Dogs"}
