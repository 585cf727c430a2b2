import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ragjax.data import (
    Corpus,
    DataError,
    DocumentTokens,
    Passage,
    PromptBuilder,
    PromptTemplate,
    passage_text,
    write_jsonl,
)

BOS, END, PAD = 0, 1, 2
DOCUMENT = "The lexer reads tokens and <end> of text."
QUESTION = "What does the lexer read?"


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE with merges; `test_joining` has the other kinds."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<bos>", "<end>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([DOCUMENT, QUESTION, "\n\nQuestion: Answer: tokens\n\n"] * 9, trainer)
    return made


@pytest.fixture
def build(tokenizer):
    def make(*, max_length=500, **options):
        template = {
            name: options.pop(name)
            for name in list(options)
            if name in PromptTemplate.__dataclass_fields__
        }
        return PromptBuilder(
            tokenizer,
            template=PromptTemplate(**template),
            max_length=max_length,
            pad_id=PAD,
            **options,
        )

    return make


def plain_ids(tokenizer, text):
    """Ids of a text without special tokens in it."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_context_is_the_default_template(build, tokenizer):
    builder = build()
    (document,) = builder.encode_documents(["The lexer reads tokens"]).ids
    context = builder.context(QUESTION, [document])
    assert tokenizer.decode(context) == (f"The lexer reads tokens\n\nQuestion: {QUESTION}\nAnswer:")
    tail = f"\n\nQuestion: {QUESTION}\nAnswer:"
    assert context == plain_ids(tokenizer, "The lexer reads tokens") + plain_ids(tokenizer, tail)
    closed_book = f"Question: {QUESTION}\nAnswer:"
    assert builder.context(QUESTION) == plain_ids(tokenizer, closed_book)


def test_documents_are_cut_and_joined(build, tokenizer):
    builder = build(max_document_tokens=5, separator="\n\n")
    encoded = builder.encode_documents([DOCUMENT, "one"])
    assert encoded.num_truncated == 1
    first, second = encoded.ids
    assert first == build().encode_documents([DOCUMENT]).ids[0][:5]
    tail = plain_ids(tokenizer, f"\n\nQuestion: {QUESTION}\nAnswer:")
    both = plain_ids(tokenizer, f"{first.text}\n\none\n\nQuestion: {QUESTION}\nAnswer:")
    assert builder.context(QUESTION, [first, second]) == both
    assert builder.context(QUESTION, [np.array(first, np.int32)]) == first + tail
    uncut = build().encode_documents([DOCUMENT]).ids[0]
    assert builder.context(QUESTION, [uncut[:5]]) == first + tail
    assert builder.context(QUESTION, [uncut]) == first + tail


def test_bos_head_and_end(build, tokenizer):
    builder = build(bos_id=BOS, end_id=END, context="Q: {question}\nD: {document}\nA:")
    (document,) = builder.encode_documents(["tokens"]).ids
    whole = plain_ids(tokenizer, f"Q: {QUESTION}\nD: tokens\nA:")
    assert builder.context(QUESTION, [document]) == [BOS, *whole]
    assert builder.context(QUESTION)[0] == BOS
    assert builder.target("tokens") == [*plain_ids(tokenizer, " tokens"), END]


@pytest.mark.parametrize(
    "options", [{}, {"bos_id": BOS, "context": "Read this: {document} {question}"}]
)
def test_a_document_stands_where_the_builder_says(build, tokenizer, options):
    builder = build(**options, max_document_tokens=8)
    (document,) = builder.encode_documents([DOCUMENT]).ids
    place = builder.document_place(QUESTION, document)
    context = builder.context(QUESTION, [document])
    found = context[place.start : place.start + len(place.characters)]
    assert tokenizer.decode(found).strip() == place.text == document.text
    assert len(document.text) < len(DOCUMENT) and DOCUMENT.startswith(document.text)
    assert builder.document_texts(QUESTION, [document]) == [document.text]
    for token, (start, end) in zip(found, place.characters, strict=True):
        assert tokenizer.decode([token]).strip() == document.text[start:end].strip()


def test_a_cut_answer_has_no_end(build, tokenizer):
    whole = plain_ids(tokenizer, " the lexer reads")
    exact = build(end_id=END, max_answer_tokens=len(whole))
    assert exact.target("the lexer reads") == [*whole, END]
    assert exact.max_target_length == len(whole) + 1
    short = build(end_id=END, max_answer_tokens=len(whole) - 1)
    assert short.target("the lexer reads") == whole[:-1]
    for empty in ("", " \n"):
        with pytest.raises(DataError, match="the answer is empty"):
            exact.target(empty)


@pytest.mark.parametrize("answer", ["  Paris \n", "Paris\r\n", "\u00a0Paris\u2028"])
def test_white_space_around_an_answer_is_not_learnt(build, answer):
    assert build().target(answer) == build().target("Paris")


def test_an_answer_is_one_line(build):
    assert build().target("two\n kilograms") == build().target("two kilograms")


def test_special_tokens_in_a_text_are_characters(build, tokenizer):
    builder = build()
    assert END in plain_ids(tokenizer, DOCUMENT)
    (document,) = builder.encode_documents([DOCUMENT]).ids
    context = builder.context("What is <end>?", [document])
    assert {BOS, END, PAD}.isdisjoint(context + builder.target("<pad>"))
    assert tokenizer.decode(document) == DOCUMENT
    assert END in plain_ids(tokenizer, DOCUMENT)  # the caller's tokenizer is as it was


def test_places_named_in_a_question_or_passage_stay_text(build, tokenizer):
    builder = build()
    question = "What do {document} and {question} mean in {}?"
    assert tokenizer.decode(builder.context(question, [[]])) == (
        f"\n\nQuestion: {question}\nAnswer:"
    )
    assert tokenizer.decode(builder.target(r"{answer} \1")) == r" {answer} \1"
    assert passage_text(Passage("1", "{text}", "{title}")) == "{text}\n{title}"


def test_passage_text():
    assert passage_text(Passage("1", "Title", "Text")) == "Title\nText"
    assert passage_text(Passage("1", "", "Text")) == "Text"
    assert passage_text(Passage("1", "Title", "Text"), "{text}") == "Text"


class TestRoom:
    """Question and template take F tokens, the answer 24 (and its end)."""

    @pytest.fixture
    def fixed(self, tokenizer):
        return len(plain_ids(tokenizer, f"\n\nQuestion: {QUESTION}\nAnswer:"))

    def test_documents_share_what_is_left(self, build, fixed):
        builder = build(max_length=fixed + 1 + 24 + 1 + 11, bos_id=BOS, end_id=END, separator="")
        documents = [[7] * 30, [8] * 30, [9] * 2]
        context = builder.context(QUESTION, documents)
        assert context[1:9] == [7, 7, 7, 8, 8, 8, 9, 9]
        assert len(context) <= builder.max_context_length == fixed + 1 + 11
        one = builder.context(QUESTION, documents[:1])
        assert one[1:12] == [7] * 11 and len(one) == builder.max_context_length

    def test_no_room_gives_the_numbers(self, build, fixed):
        builder = build(max_length=fixed + 24 + 1, separator="")
        assert builder.context(QUESTION, [[7] * 30])[0] == 7
        message = (
            rf"leaves 1 tokens for 2 documents: of {fixed + 25} tokens \(max_length\), question "
            rf"and template take {fixed} and the answer 24; shorten the question 'What does"
        )
        with pytest.raises(DataError, match=message):
            builder.context(QUESTION, [[7], [8]])
        with pytest.raises(DataError, match="leaves 0 tokens for 0 documents"):
            builder.context("word " * 500)

    def test_no_room_for_any_context(self, build):
        with pytest.raises(DataError, match="max_length = 25 leaves no context .* of 25 tokens"):
            build(max_length=25, end_id=END)
        build(max_length=26, end_id=END)


class TestPack:
    def test_contexts_end_where_targets_begin(self, build):
        builder = build(max_answer_tokens=3)
        batch = builder.pack([[5, 6, 7], [8]], [[3], [4, 5, 6]], context_length=4)
        np.testing.assert_array_equal(batch.context_ids, [[PAD, 5, 6, 7], [PAD, PAD, PAD, 8]])
        np.testing.assert_array_equal(batch.context_mask, batch.context_ids != PAD)
        np.testing.assert_array_equal(batch.target_ids, [[3, PAD, PAD], [4, 5, 6]])
        np.testing.assert_array_equal(batch.target_mask, batch.target_ids != PAD)
        assert [array.dtype for array in batch] == [np.int32, np.bool_] * 2

    def test_fields_are_those_of_the_models(self, build):
        assert build().pack([[5]], [[6]])._fields == (
            "context_ids",
            "context_mask",
            "target_ids",
            "target_mask",
        )

    @pytest.mark.parametrize(("longest", "length"), [(1, 32), (32, 32), (33, 64)])
    def test_lengths_chosen_are_few(self, build, longest, length):
        batch = build(end_id=END).pack([[5] * longest, [5]], [[6], []])
        assert batch.context_ids.shape == (2, length)
        assert batch.target_ids.shape == (2, 25)

    def test_nothing_is_cut_silently(self, build):
        with pytest.raises(ValueError, match="5 tokens do not fit into a length of 4"):
            build().pack([[5] * 5], [[6]], context_length=4)
        with pytest.raises(ValueError, match="2 contexts but 1 targets"):
            build().pack([[5], [5]], [[6]])


@pytest.mark.parametrize(
    "options",
    [
        {"context": "{document} Answer:"},
        {"context": "{question} {question} {document}"},
        {"closed_book": "Answer:"},
        {"answer": ""},
        {"passage": "{title}"},
    ],
)
def test_template_without_its_places_is_refused(options):
    with pytest.raises(DataError, match=f"template's {next(iter(options))} must hold"):
        PromptTemplate(**options)


@pytest.mark.parametrize("field", ["max_document_tokens", "max_answer_tokens"])
def test_budgets_are_positive(field):
    with pytest.raises(DataError, match=f"{field} must be at least 1, got 0"):
        PromptTemplate(**{field: 0})


def test_each_document_is_tokenised_once(build, tokenizer, tmp_path, monkeypatch):
    texts = [" ".join(["tokens"] * n) for n in (1, 30, 3)]
    rows = ({"_id": f"d{n}", "title": "T", "text": text} for n, text in enumerate(texts))
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    corpus = Corpus.open(tmp_path, cache=tmp_path / "cache")
    builder = build(max_document_tokens=9)
    documents = DocumentTokens(builder, corpus)
    expected = builder.encode_documents([f"T\n{text}" for text in texts]).ids
    got = documents.get(np.array([2, 1, 2]))
    assert got == [expected[2], expected[1], expected[2]]
    assert (documents.num_documents, documents.num_truncated) == (2, 1)
    monkeypatch.setattr(builder.joiner, "encode_texts", lambda texts, length: ())
    assert documents.get([1]) == [expected[1]]
    assert documents.get([1])[0].text == tokenizer.decode(expected[1])
