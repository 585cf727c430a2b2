import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ragjax.data import (
    CorpusTokens,
    encode_texts,
    pad_left,
    pad_right,
    truncation_note,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]
TEXTS = ["a b c d e f", "a", "", "h g f e d", "[SEP] a [SEP] b c d [SEP]", "a b c d e f g [CLS]"]


@pytest.fixture
def tokenizer():
    """Words are letters; [CLS] before and [SEP] after, as BERT has them."""
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["[CLS]", "[SEP]"])
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


@pytest.mark.parametrize("max_length", [None, 3, 4, 5, 8, 20])
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_same_ids_as_the_tokenizers_own_truncation(tokenizer, max_length, add_special_tokens):
    whole = [tokenizer.encode(text, add_special_tokens=add_special_tokens).ids for text in TEXTS]
    encoded = encode_texts(
        tokenizer, TEXTS, max_length=max_length, add_special_tokens=add_special_tokens
    )
    if max_length is not None:
        tokenizer.enable_truncation(max_length)
    expected = [tokenizer.encode(text, add_special_tokens=add_special_tokens).ids for text in TEXTS]
    assert encoded.ids == expected
    assert encoded.num_truncated == sum(a != b for a, b in zip(whole, expected, strict=True))


def test_any_iterable_of_any_size(tokenizer):
    texts = [" ".join("abcdefgh"[: n % 9]) for n in range(2500)]
    encoded = encode_texts(tokenizer, iter(texts), max_length=6)
    assert encoded.ids[2499] == encode_texts(tokenizer, texts[2499:], max_length=6).ids[0]
    assert len(encoded.ids) == 2500
    assert encoded.num_truncated == sum(n % 9 > 4 for n in range(2500))
    assert encode_texts(tokenizer, [], max_length=6) == ([], 0)


def test_no_room_and_own_truncation_are_refused(tokenizer):
    with pytest.raises(ValueError, match="max_length = 2 leaves no room beside 2 special tokens"):
        encode_texts(tokenizer, ["a b"], max_length=2)
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        encode_texts(tokenizer, ["a"], max_length=0)
    for set_up in (lambda t: t.enable_padding(), lambda t: t.enable_truncation(4)):
        changed = Tokenizer.from_str(tokenizer.to_str())
        set_up(changed)
        with pytest.raises(ValueError, match="truncates or pads by itself"):
            encode_texts(changed, ["a"], max_length=5)


def test_padding_to_both_sides():
    ids = [[1, 2, 3], [], [4]]
    right = pad_right(ids, length=4, pad_id=9)
    left = pad_left(ids, length=4, pad_id=9)
    np.testing.assert_array_equal(right.ids, [[1, 2, 3, 9], [9, 9, 9, 9], [4, 9, 9, 9]])
    np.testing.assert_array_equal(left.ids, [[9, 1, 2, 3], [9, 9, 9, 9], [9, 9, 9, 4]])
    np.testing.assert_array_equal(right.mask, right.ids != 9)
    np.testing.assert_array_equal(left.mask, left.ids != 9)
    for padded in (right, left):
        assert (padded.ids.dtype, padded.mask.dtype) == (np.int32, np.bool_)
    assert pad_right([], length=4, pad_id=9).ids.shape == (0, 4)
    for pad in (pad_left, pad_right):
        with pytest.raises(ValueError, match="3 tokens do not fit into a length of 2"):
            pad(ids, length=2, pad_id=9)


def test_truncation_note_above_five_percent():
    assert truncation_note(5, 100, max_length=8, what="passages") == ""
    assert truncation_note(0, 0, max_length=8, what="passages") == ""
    assert truncation_note(6, 100, max_length=8, what="passages") == (
        "6 of 100 passages (6%) are longer than 8 tokens and were cut"
    )


def test_corpus_tokens_are_made_once_when_first_asked_for(tokenizer):
    texts = ["a b c", "", "d " * 2000, *(f"{'abcdefgh'[n % 8]} e" for n in range(2000))]
    read, told = [], []

    def stream():
        for text in texts:
            read.append(text)
            yield text

    tokens = CorpusTokens(len(texts), stream, tokenizer, max_length=9, report=told.append)
    assert len(tokens) == len(texts) and not read
    expected = encode_texts(tokenizer, texts, max_length=9)
    assert [tokens[row] for row in range(len(texts))] == list(tokens) == expected.ids
    assert tokens[-1] == expected.ids[-1] and tokens[np.int64(1)] == expected.ids[1]
    assert tokens[1:6:2] == expected.ids[1:6:2]
    assert tokens.lengths.tolist() == [len(ids) for ids in expected.ids]
    assert read == texts and told == []
    with pytest.raises(IndexError):
        tokens[len(texts)]


def test_corpus_tokens_tell_when_many_texts_are_cut(tokenizer):
    told = []
    texts = ["a b c d e f"] * 3
    tokens = CorpusTokens(3, lambda: texts, tokenizer, max_length=4, report=told.append)
    assert tokens[0] == encode_texts(tokenizer, texts[:1], max_length=4).ids[0]
    assert told == ["3 of 3 documents (100%) are longer than 4 tokens and were cut"]


def corpus_tokens(tokenizer, folder=None, texts=TEXTS, max_length=4, identity="", notes=None):
    return CorpusTokens(
        len(texts), lambda: iter(texts), tokenizer, max_length=max_length,
        report=(notes if notes is not None else []).append, folder=folder, identity=identity,
    )  # fmt: skip


def unread():
    raise AssertionError("the texts are read again")
    yield


def test_kept_ids_are_those_of_memory_and_no_text_is_read_again(tokenizer, tmp_path):
    in_memory = corpus_tokens(tokenizer)
    first, again = [], []
    kept = corpus_tokens(tokenizer, tmp_path, notes=first)
    assert kept[:] == in_memory[:] == encode_texts(tokenizer, TEXTS, max_length=4).ids
    assert not list(tmp_path.glob("**/*.tmp")) and len(list(tmp_path.iterdir())) == 1
    later = CorpusTokens(
        len(TEXTS), unread, tokenizer, max_length=4, report=again.append, folder=tmp_path
    )
    assert later[:] == kept[:] and later.lengths.tolist() == kept.lengths.tolist()
    assert again == first and "4 of 6 documents (67%) are longer than 4 tokens" in first[0]


def test_other_texts_lengths_and_tokenizers_are_kept_apart(tokenizer, tmp_path):
    lower = Tokenizer.from_str(tokenizer.to_str())
    lower.add_tokens(["z"])
    asked = [
        corpus_tokens(tokenizer, tmp_path),
        corpus_tokens(tokenizer, tmp_path, identity="other"),
        corpus_tokens(tokenizer, tmp_path, max_length=3),
        corpus_tokens(lower, tmp_path),
    ]
    assert [tokens[5] for tokens in asked] == [
        encode_texts(each, TEXTS[5:], max_length=most).ids[0]
        for each, most in ((tokenizer, 4), (tokenizer, 4), (tokenizer, 3), (lower, 4))
    ]
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("last", [65_535, 65_536])
def test_ids_of_large_vocabularies_are_whole(tmp_path, last):
    words = {"[UNK]": 0, "a": last}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokens = corpus_tokens(tokenizer, tmp_path, texts=["a", "b"])
    assert tokens[:] == [[last], [0]]
    assert (next(tmp_path.iterdir()) / "ids.bin").stat().st_size == (4 if last < 65_536 else 8)


def test_texts_without_tokens_are_kept(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    for _ in range(2):
        assert corpus_tokens(tokenizer, tmp_path, texts=["", ""])[:] == [[], []]
