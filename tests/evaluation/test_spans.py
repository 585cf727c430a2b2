"""Where an answer stands in a passage: places in the text as it is written, in any script."""

import re

import pytest

from ragjax.evaluation.spans import find_answer, find_similar, split_windows


def found(text, answer):
    return [text[match.start : match.end] for match in find_answer(text, answer)]


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("Paris is on the Seine.", "the seine", ["Seine"]),
        ("The Treaty of 1648.", "treaty of 1648", ["Treaty of 1648"]),
        ("New York, new-york; NEW  YORK", "New York", ["New York", "new-york", "NEW  YORK"]),
        ("jax.vmap(fun) maps", "jax.vmap", ["jax.vmap"]),
        ("out_axes, then axes", "axes", ["axes"]),
        ("-1 and 1.5, but 1", "1", ["1"]),
        ("-1 and 1.5, but 1", "-1", ["-1"]),
        ("-1 and 1.5, but 1", "1.5", ["1.5"]),
        ("5 m\u00b2 caf\u00e9, cafe\u0301", "caf\u00e9", ["caf\u00e9", "cafe\u0301"]),
        ("\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5!", "\u05e2\u05d5", ["\u05e2\u05d5"]),
        ("\u6771\u4eac\u30bf\u30ef\u30fc\u306f\u9ad8\u3044", "\u6771\u4eac", ["\u6771\u4eac"]),
        ("fun \U0001f642 and \U0001f680!", "\U0001f680", ["\U0001f680"]),
        ("x += 1", "+=", ["+="]),
        ("vitamin C, C++, C#", "C++", ["C++"]),
        ("vitamin C, C++, C#", "C", ["C"]),
        ("the net, .NET", ".net", [".NET"]),
        ("5 or $5 or $50", "$5", ["$5"]),
        ("\u00e9 \u00bd cup, 1/2", "\u00bd", ["\u00bd"]),
        ("\u1112\u1161\u11ab \u1100\u1161", "\ud55c", ["\u1112\u1161\u11ab"]),
        ("banana", "ana", []),
        ("anything", "  ", []),
        ("", "a", []),
        ("x y x y x", "x y x", ["x y x"]),
        ("vitamin A is fat-soluble", "A", ["A"]),
    ],
)  # fmt: skip
def test_every_place_of_the_answers_words_is_found(text, answer, expected):
    assert found(text, answer) == expected


def test_vowel_signs_of_indic_scripts_belong_to_their_letter():
    text = "\u0915\u0930\u094d\u092e \u0915\u093f\u0930\u092e"
    assert found(text, "\u0915\u093f\u0930\u092e") == ["\u0915\u093f\u0930\u092e"]
    assert found(text, "\u0915\u0930\u092e") == []


def test_exact_places_have_a_score_of_one():
    assert [match.score for match in find_answer("one two one", "one")] == [1.0, 1.0]


def brute_force_f1(text, answer):
    """Returns the best F1 over all runs of words of the lengths that are compared."""
    words, wanted = text.lower().split(), answer.lower().split()
    size, best = len(wanted), 0.0
    for start in range(len(words)):
        for length in range(max(1, size // 2), size + (size + 1) // 2 + 1):
            run = words[start : start + length]
            if len(run) < length:
                continue
            common = sum(min(run.count(word), wanted.count(word)) for word in set(wanted))
            best = max(best, 2 * common / (len(run) + size))
    return best


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("it was signed in october of 1648 at home", "signed october 1648"),
        ("y z c z y z d", "z y z q"),
        ("red green blue red", "green red red blue"),
        ("one two", "one two three four"),
    ],
)
def test_the_most_similar_run_is_that_of_a_brute_force_search(text, answer):
    match = find_similar(text, answer, least=0.1)
    assert match.score == pytest.approx(brute_force_f1(text, answer))
    run = text[match.start : match.end]
    assert brute_force_f1(run, answer) == pytest.approx(match.score)


@pytest.mark.parametrize(
    ("text", "answer"),
    [("red green blue", "ultra marine"), ("a red", "red"), ("", "a b c"), ("red green", "")],
)
def test_what_is_not_similar_is_not_found(text, answer):
    assert find_similar(text, answer) is None


def texts(text, most):
    return [text[window.start : window.end] for window in split_windows(text, most=most)]


def test_windows_are_sentences():
    text = "It rains. Does it? Yes!  \u96e8\u3067\u3059\u3002\u5bd2\u3044\u3002 Title\nline"
    assert texts(text, 20) == [
        "It rains.", "Does it?", "Yes!", "\u96e8\u3067\u3059\u3002", "\u5bd2\u3044\u3002", "Title",
        "line",
    ]  # fmt: skip


def test_an_abbreviated_number_does_not_end_a_sentence():
    assert texts("Pi is 3.14 about.", 9) == ["Pi is 3.14 about."]


@pytest.mark.parametrize("most", [1, 2, 3, 6])
def test_neighbours_are_joined_until_few_enough_and_nothing_is_lost(most):
    text = "A b. " * 5 + "\n\n" + "word " * 200 + "End. " + "x" * 900
    windows = split_windows(text, most=most)
    assert len(windows) == most
    assert all(left.end <= right.start for left, right in zip(windows, windows[1:], strict=False))
    kept = "".join(text[window.start : window.end] for window in windows)
    assert re.sub(r"\s", "", kept) == re.sub(r"\s", "", text)


def test_a_long_sentence_is_cut_between_words():
    for piece in texts("word " * 200, 9):
        assert len(piece) <= 360
        assert set(piece.split()) == {"word"}


def test_a_blank_text_has_no_windows():
    assert split_windows(" \n ", most=3) == []


def test_no_windows_at_all_are_refused():
    with pytest.raises(ValueError, match="most must be at least 1 window, got 0"):
        split_windows("a", most=0)
