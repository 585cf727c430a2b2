"""Answers with their sources: figures against independent ones, hard texts, and every flag."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.data import Question, passage_text
from ragjax.generation import Limits, Prompts, generate_ensemble, generate_greedy
from ragjax.models.inputs import LMBatch
from ragjax.models.testing import write_tiny_language_model
from ragjax.runs.ask.asker import Asker
from ragjax.runs.ask.attribution import attribute
from ragjax.runs.ask.decoding import DECODES, decode_concat, decode_ensemble
from ragjax.runs.ask.prompts import ReaderOptions, ShapedPrompts, fitting
from ragjax.runs.ask.spans import Span
from ragjax.runs.ask.view import format_source, plain, reply_as_json
from ragjax.runs.options.dual import AdaptConfig
from ragjax.runs.system import (
    SEARCHES,
    by_bm25,
    by_dense,
    by_hybrid,
    open_base_system,
    query_lengths,
    retrieve,
)

QUESTION = "what does the red cat like?"
OPTIONS = ReaderOptions(documents=3, document_tokens=40, max_new_tokens=4, windows=3)
# Right-to-left text, emoji, scripts without spaces, a passage longer than the model's context.
HARD = {
    "hebrew": "\u05d4\u05d7\u05ea\u05d5\u05dc \u05d4\u05d0\u05d3\u05d5\u05dd.",
    "emoji": "\U0001f431 likes \U0001f41f, \U0001f468\u200d\U0001f469\u200d\U0001f467 too.",
    "japanese": "\u8d64\u3044\u732b\u306f\u9b5a\u3067\u3059\u3002\u72ac\u306f\u9aa8\u3002",
    "long": "the cow likes grass. " * 200,
}  # fmt: skip


def silent(line):
    """Reports to nobody."""


def open_tiny(inputs, cache, **changes):
    return open_base_system(AdaptConfig(**inputs | changes), cache=cache, log=silent)


@pytest.fixture(scope="module")
def system(tmp_path_factory, tiny_inputs):
    return open_tiny(tiny_inputs, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def asker(system):
    return Asker(system, OPTIONS, decode=decode_ensemble, by=by_hybrid)


@pytest.fixture(scope="module")
def hard(tmp_path_factory, tiny_inputs):
    folder = tmp_path_factory.mktemp("hard")
    rows = [{"_id": id, "title": "", "text": text} for id, text in HARD.items()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def answer_log_probs(system, context, target):
    """log p(y_t | context), by a whole forward pass without padding."""
    lm = system.workspace.lm
    batch = LMBatch(
        jnp.asarray([context], jnp.int32),
        jnp.ones((1, len(context)), bool),
        jnp.asarray([target], jnp.int32),
        jnp.ones((1, len(target)), bool),
    )
    return np.asarray(jax.jit(lm.token_log_probs)(system.lm_params, batch), np.float64)[0]


def given(asker, prompt, text):
    """A given answer to a prompt, as if its first document explained it best."""
    answer = asker._answer(prompt, text)
    return answer._replace(relied_on=0, posterior=np.eye(len(prompt.docs))[0], notes=())


def prompt_of(asker, question=QUESTION, count=3):
    docs = list(range(count))
    return asker.reader.prompts.make(question, docs, [1.0, 0.5, 0.2][:count])


# The arrays.


def log_sum(values):
    return np.log(np.sum(np.exp(values)))


def test_attribution_equals_its_formulas(rng):
    scores = rng.normal(size=(2, 3))
    tokens = -rng.uniform(0.1, 2, size=(2, 3, 4))
    closed = -rng.uniform(0.1, 2, size=(2, 4))
    doc_mask = np.array([[True, True, True], [True, True, False]])
    token_mask = np.array([[True, True, True, True], [True, True, False, False]])
    found = attribute(scores, tokens, closed, doc_mask=doc_mask, token_mask=token_mask)
    for row in range(2):
        kept = np.flatnonzero(doc_mask[row])
        prior = scores[row, kept] - log_sum(scores[row, kept])
        docs = (tokens[row, kept] * token_mask[row]).sum(axis=1)
        without = (closed[row] * token_mask[row]).sum()
        marginal = log_sum(prior + docs)
        np.testing.assert_allclose(found.prior[row, kept], np.exp(prior), rtol=1e-5)
        np.testing.assert_allclose(
            found.posterior[row, kept], np.exp(prior + docs - marginal), rtol=1e-5
        )
        assert found.log_probs[row] == pytest.approx(marginal, rel=1e-5)
        assert found.no_doc_log_probs[row] == pytest.approx(without, rel=1e-5)
        assert found.utility[row] == pytest.approx(marginal - without, rel=1e-4)
        for place, doc in enumerate(kept):
            others = np.delete(np.arange(len(kept)), place)
            left = log_sum(prior[others] + docs[others]) - log_sum(prior[others])
            assert found.without[row, doc] == pytest.approx(marginal - left, rel=1e-3, abs=1e-5)
    assert found.prior[1, 2] == found.posterior[1, 2] == found.without[1, 2] == 0
    assert found.doc_log_probs[1, 2] == -np.inf


def test_without_its_only_document_an_answer_has_the_closed_book():
    found = attribute(np.zeros((1, 2)), np.full((1, 2, 1), -1.0), np.full((1, 1), -3.0),
                      doc_mask=np.array([[True, False]]))  # fmt: skip
    assert found.without.tolist() == [[2, 0]]


def test_without_documents_an_answer_has_the_closed_book_and_no_utility():
    found = attribute(np.zeros((1, 2)), np.full((1, 2, 1), -1.0), np.full((1, 1), -3.0),
                      doc_mask=np.zeros((1, 2), bool))  # fmt: skip
    assert (found.log_probs[0], found.utility[0], found.posterior.sum()) == (-3, 0, 0)


# The reader.


def test_the_ensemble_writes_what_generate_ensemble_writes(asker):
    prompt = prompt_of(asker)
    heard = []
    generated = decode_ensemble(asker.reader, prompt, lambda ids: heard.append(list(ids)))
    rows = max(map(len, prompt.contexts))
    padded = [[0] * (rows - len(context)) + context for context in prompt.contexts]
    mask = [[False] * (rows - len(c)) + [True] * len(c) for c in prompt.contexts]
    reference = generate_ensemble(
        asker.system.workspace.lm.decoder,
        asker.system.lm_params,
        Prompts(
            jnp.asarray([padded], jnp.int32),
            jnp.asarray([mask]),
            jnp.asarray([[1.0, 0.5, 0.2]]),
        ),
        Limits(max_new_tokens=4, stop_ids=asker.reader.limits.stop_ids, min_new_tokens=1),
    )
    size = int(reference.lengths[0])
    assert generated.ids == np.asarray(reference.ids)[0, :size].tolist()
    assert heard == [generated.ids[: place + 1] for place in range(size)]
    for row, context in enumerate(prompt.contexts):
        np.testing.assert_allclose(
            generated.token_log_probs[row, :size],
            answer_log_probs(asker.system, context, generated.ids),
            atol=2e-3,
        )


def test_concatenation_writes_what_greedy_decoding_of_one_prompt_writes(asker):
    prompt = prompt_of(asker)
    documents = asker.reader.prompts.documents.get([0, 1, 2])
    context = asker.reader.prompts.builder.context(QUESTION, documents)
    assert prompt.joined == context
    generated = decode_concat(asker.reader, prompt, lambda ids: None)
    reference = generate_greedy(
        asker.system.workspace.lm.decoder,
        asker.system.lm_params,
        Prompts(jnp.asarray([context], jnp.int32), jnp.ones((1, len(context)), bool)),
        Limits(max_new_tokens=4, stop_ids=asker.reader.limits.stop_ids, min_new_tokens=1),
    )
    assert generated.ids == np.asarray(reference.ids)[0, : int(reference.lengths[0])].tolist()


def test_scores_are_those_of_a_whole_forward_pass(asker):
    prompt = prompt_of(asker, count=2)
    target = asker.reader.prompts.builder.target("7 x")
    scores = asker.reader.score(asker.reader.read(prompt), target)
    for row, context in enumerate(prompt.contexts):
        expected = answer_log_probs(asker.system, context, target)
        np.testing.assert_allclose(scores[row, : len(target)], expected, atol=2e-3)
        assert scores[row, len(target) :].tolist() == [0] * (4 - len(target))
    closed = asker.reader.score_closed_book(prompt, target)[0]
    expected = answer_log_probs(asker.system, prompt.closed_book, target)
    np.testing.assert_allclose(closed[: len(target)], expected, atol=2e-3)


def test_leaving_a_whole_document_out_leaves_what_stands_around_it(asker):
    prompt = prompt_of(asker)
    target = asker.reader.prompts.builder.target("30")
    reading = asker.reader.read(prompt)
    start, size = prompt.places[1]
    assert prompt.contexts[1][start : start + size] == asker.reader.prompts.documents.get([1])[0]
    found = asker.reader.leave_out(prompt, reading, 1, [range(size), []], target)
    around = prompt.contexts[1][:start] + prompt.contexts[1][start + size :]
    whole = answer_log_probs(asker.system, prompt.contexts[1], target).sum()
    without = answer_log_probs(asker.system, around, target).sum()
    np.testing.assert_allclose(found, [whole, without, whole], atol=5e-3)


def test_an_answer_that_was_appended_is_not_seen_when_parts_are_left_out(asker):
    prompt = prompt_of(asker)
    generated = decode_ensemble(asker.reader, prompt, lambda ids: None)
    fresh = asker.reader.leave_out(prompt, asker.reader.read(prompt), 0, [[0, 1]], generated.ids)
    after = asker.reader.leave_out(prompt, generated.reading, 0, [[0, 1]], generated.ids)
    np.testing.assert_allclose(after, fresh, atol=2e-3)


@pytest.mark.slow
def test_an_encoder_decoder_reads_the_prompt_again_without_the_part(tmp_path, tiny_inputs):
    write_tiny_language_model(tmp_path / "t5", family="t5")
    system = open_tiny(tiny_inputs, tmp_path / "cache", lm=str(tmp_path / "t5"))
    asker = Asker(system, OPTIONS, decode=decode_ensemble, by=by_dense)
    prompt = prompt_of(asker)
    target = asker.reader.prompts.builder.target("30")
    start, _ = prompt.places[0]
    found = asker.reader.leave_out(prompt, asker.reader.read(prompt), 0, [[0, 1, 2]], target)
    context = prompt.contexts[0]
    mask = np.ones((1, len(context)), bool)
    mask[0, start : start + 3] = False
    batch = LMBatch(
        jnp.asarray([context], jnp.int32),
        jnp.asarray(mask),
        jnp.asarray([target], jnp.int32),
        jnp.ones((1, len(target)), bool),
    )
    lm = system.workspace.lm
    expected = float(np.asarray(jax.jit(lm.token_log_probs)(system.lm_params, batch)).sum())
    assert found[1] == pytest.approx(expected, abs=5e-3)
    assert asker.ask(QUESTION).sources


@pytest.mark.slow
@pytest.mark.parametrize("decode", ["ensemble", "concat", "rag_sequence_thorough"])
def test_no_question_compiles_after_the_warm_up(system, compilations, decode):
    asker = Asker(system, OPTIONS, decode=DECODES[decode], by=by_hybrid)
    assert len(list(asker.warm_up())) > 3
    with compilations() as compiled:
        for question in ("cat", QUESTION, "what does the pink elk like? " * 9, "zz"):
            asker.ask(question)
    assert compiled == []


def test_an_answer_takes_few_programs_and_so_does_the_warm_up(tmp_path, tiny_inputs, compilations):
    asker = Asker(open_tiny(tiny_inputs, tmp_path), OPTIONS, by=by_hybrid)
    jax.clear_caches()
    with compilations() as first:
        asker.ask(QUESTION)
    # Encode, search, prefill, first and next token, posterior, closed book, attribution, windows;
    # the rest are single operations.
    assert len(first) <= 12
    with compilations() as others:
        list(asker.warm_up())
    assert len(others) <= 8


def test_questions_are_padded_to_few_lengths(system):
    encoder = system.workspace.query_encoder
    for longest, lengths in {24: [24], 100: [32, 100], 256: [32, 128, 256]}.items():
        given = dataclasses.replace(encoder, max_length=longest)
        assert list(query_lengths(given)) == lengths
    prompts = ShapedPrompts(system.workspace.lm, system.workspace.dataset.corpus, OPTIONS)
    ladders = (prompts.closed_lengths, prompts.concat_lengths, prompts.suffix_lengths)
    assert [len(ladder) for ladder in ladders] == [2, 2, 2] and len(prompts.lengths) <= 3
    alone = retrieve(system, [QUESTION], 2, by=by_dense)
    asked = [Question(id="q", text=QUESTION)]
    exact = system.workspace.encode_queries(system.retriever.query_params, asked)
    docs = system.retriever.embeddings[alone.found.doc_ids[0]]
    np.testing.assert_allclose(alone.doc_scores[0], system.scale * docs @ exact[0], rtol=1e-4)


# The reply.


def test_a_reply_says_what_its_figures_mean(asker):
    reply = asker.ask(QUESTION, answer="0")
    prompt_scores = [source.prior for source in reply.sources]
    assert sum(prompt_scores) == pytest.approx(1, abs=1e-5)
    docs = [asker.system.workspace.dataset.corpus.row_of(source.id) for source in reply.sources]
    prompt = asker.reader.prompts.make(QUESTION, docs, [0.0] * 3)
    target = asker.reader.prompts.builder.target("0")
    log_probs = [answer_log_probs(asker.system, c, target).sum() for c in prompt.contexts]
    marginal = log_sum(np.log(prompt_scores) + log_probs)
    assert reply.log_prob == pytest.approx(marginal, abs=5e-3)
    closed = answer_log_probs(asker.system, prompt.closed_book, target).sum()
    assert reply.utility == pytest.approx(marginal - closed, abs=1e-2)
    assert reply.grounded == (reply.utility > 0)
    posterior = np.exp(np.log(prompt_scores) + log_probs - marginal)
    assert reply.relied_on == int(np.argmax(posterior))
    np.testing.assert_allclose([s.posterior for s in reply.sources], posterior, atol=5e-3)


@pytest.mark.parametrize("decode", ["ensemble", "concat"])
def test_the_passage_is_named_with_the_answer_and_before_its_explanation(system, decode):
    asker = Asker(system, OPTIONS, decode=DECODES[decode], by=by_hybrid)
    answer = asker.answer(QUESTION)
    reply = asker.explain(answer)
    assert (answer.text, answer.relied_on) == (reply.answer, reply.relied_on)
    np.testing.assert_allclose(answer.posterior, [s.posterior for s in reply.sources], rtol=1e-4)
    assert answer.seconds == reply.answer_seconds < reply.seconds
    best = reply.sources[reply.relied_on]
    line = format_source(answer, system.workspace.dataset.corpus, style=plain)
    assert line.startswith(f"from {reply.relied_on + 1}. {best.id}")
    assert line.endswith(f"(posterior {best.posterior:.2f})")
    none = answer._replace(relied_on=None)
    assert format_source(none, system.workspace.dataset.corpus, style=plain) == ""


def test_the_words_of_the_answer_are_found_in_the_passage(asker):
    reply = asker.ask(QUESTION, answer="The LIKES")
    assert reply.span.method == "match"
    text = reply.sources[reply.relied_on].text
    assert text[reply.span.start : reply.span.end] == "likes"


@pytest.fixture(scope="module")
def titled(tmp_path_factory, tiny_inputs):
    """Passages with a telling title, with a title longer than what is read, and a long text."""
    folder = tmp_path_factory.mktemp("titled")
    rows = [
        {"_id": "gem", "title": "ruby", "text": "it likes 0"},
        {"_id": "long title", "title": "ruby and opal " * 9, "text": "it likes topaz"},
        {"_id": "long text", "title": "cow", "text": "likes grass. " * 9 + "likes topaz"},
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    system = open_tiny(tiny_inputs, tmp_path_factory.mktemp("cache"), data=str(folder))
    return Asker(system, OPTIONS, decode=decode_ensemble, by=by_dense)


def given_about(asker, id, text):
    """A given answer and its explanation, of one passage."""
    row = asker.system.workspace.dataset.corpus.row_of(id)
    return asker.explain(given(asker, asker.reader.prompts.make("what?", [row], [0.0]), text))


def test_a_title_may_carry_the_answer(titled):
    reply = given_about(titled, "gem", "Ruby")
    assert reply.span == Span("title", 0, 4, "match", 1.0, None)
    assert reply.notes == ()


def test_what_was_not_read_carries_no_answer(titled):
    reply = given_about(titled, "long text", "topaz")
    assert "topaz" in reply.sources[0].text
    assert reply.span.method == "left_out"
    assert reply.span.end <= 40 - len("cow\n")  # one token a byte in the tiny tokenizer
    assert reply.notes == (
        "the language model read 36 of the 128 characters of passage 'long text'"
        " (--document_tokens reads more)",
    )


def test_a_passage_read_to_its_end_is_read_whole_whatever_the_places_of_its_tokens(titled):
    """A tokenizer that normalises text leaves out the accent of "e\u0301" from its places."""
    row = titled.system.workspace.dataset.corpus.row_of("gem")
    prompt = titled.reader.prompts.make("what?", [row], [0.0])
    (place,) = prompt.read
    characters = [(start, min(end, 8)) for start, end in place.characters]
    prompt = prompt._replace(read=[place._replace(characters=characters)])
    assert titled.spans.read(prompt, 0).text == "it likes 0"
    assert titled.explain(given(titled, prompt, "0")).notes == ()


def test_a_title_longer_than_what_is_read_leaves_no_text(titled):
    assert given_about(titled, "long title", "topaz").span is None
    reply = given_about(titled, "long title", "opal")
    assert reply.span == Span("title", 9, 13, "match", 1.0, None)
    assert "read 0 of the 14 characters" in reply.notes[0]


def test_an_answer_in_other_words_is_traced_to_the_part_it_needs_most(asker):
    prompt = prompt_of(asker)
    answer = given(asker, prompt, "9 zz")
    windows = asker.spans.windows(prompt, 0)
    assert [window.start for window in windows] == [0]
    span = asker._span(answer)
    places = asker.spans.read(prompt, 0).places
    text = asker.system.workspace.dataset.corpus[0].text
    whole = passage_text(asker.system.workspace.dataset.corpus[0])
    before = len(whole) - len(text)
    assert places[before] == (0, 1)  # one token a byte in the tiny tokenizer
    left_out = asker.reader.leave_out(
        prompt, answer.generated.reading, 0, [range(before, len(whole))], answer.generated.ids
    )
    assert span.method == "left_out"
    assert (span.start, span.end) == (0, len(text))
    assert span.change == pytest.approx(float(left_out[0] - left_out[1]), abs=1e-3)


def test_of_several_matches_the_one_in_the_needed_window_counts(asker, monkeypatch):
    prompt = prompt_of(asker)
    text = asker.system.workspace.dataset.corpus[0].text  # "the red cat likes 0"
    changes = np.array([0.1, 0.7], np.float32)
    windows = [(0, 8), (8, len(text))]
    monkeypatch.setattr(asker.spans, "windows", lambda *_: [_Window(*window) for window in windows])
    monkeypatch.setattr(asker.spans, "changes", lambda *_: changes)
    monkeypatch.setattr("ragjax.runs.ask.spans.find_answer",
                        lambda text, answer: [_Match(2, 3, 1.0), _Match(15, 16, 1.0)])  # fmt: skip
    span = asker._span(given(asker, prompt, "e"))
    assert (span.start, span.method) == (15, "match")
    assert span.change == pytest.approx(0.7)


def test_a_match_outside_every_window_needs_nothing(asker, monkeypatch):
    monkeypatch.setattr(asker.spans, "windows", lambda *_: [_Window(0, 1)])
    monkeypatch.setattr(asker.spans, "changes", lambda *_: np.array([-0.5], np.float32))
    monkeypatch.setattr("ragjax.runs.ask.spans.find_answer",
                        lambda text, answer: [_Match(0, 1, 1.0), _Match(3, 4, 1.0)])  # fmt: skip
    reply = asker.explain(given(asker, prompt_of(asker), "e"))
    assert (reply.span.start, reply.span.change) == (3, 0.0)
    assert json.dumps(reply_as_json(reply), allow_nan=False)


class _Window:
    def __init__(self, start, end):
        self.start, self.end = start, end


class _Match(_Window):
    def __init__(self, start, end, score):
        super().__init__(start, end)
        self.score = score


@pytest.mark.slow
def test_a_passage_in_any_script_and_of_any_length_is_read(hard, tiny_inputs, tmp_path):
    system = open_tiny(tiny_inputs, tmp_path, data=str(hard))
    asker = Asker(system, OPTIONS, decode=decode_ensemble, by=by_dense)
    corpus = system.workspace.dataset.corpus
    for id, answer in (
        ("hebrew", HARD["hebrew"].split()[0]),
        ("emoji", "\U0001f41f"),
        ("japanese", HARD["japanese"][3:4]),
        ("long", "grass"),
    ):
        row = corpus.row_of(id)
        prompt = asker.reader.prompts.make(HARD["hebrew"] + " \U0001f41f?", [row], [0.0])
        span = asker._span(given(asker, prompt, answer))
        assert corpus[row].text[span.start : span.end] == answer
        for place, (start, end) in enumerate(asker.spans.read(prompt, 0).places):
            assert 0 <= start <= end <= len(corpus[row].text), place
    reply = asker.ask(HARD["japanese"])
    assert len(reply.sources) == 3
    assert json.loads(json.dumps(reply_as_json(reply)))["question"] == HARD["japanese"]


def test_a_very_long_question_is_cut_and_said_so(asker):
    reply = asker.ask("what does the red cat like? " * 60)
    assert any("the language model reads the first" in note for note in reply.notes)
    assert len(reply.sources) == 3


@pytest.mark.parametrize("limit", [1, 7, 30])
def test_a_question_that_takes_more_tokens_once_it_is_cut_still_fits(system, limit, monkeypatch):
    options = dataclasses.replace(OPTIONS, question_tokens=limit)
    prompts = Asker(system, options, decode=decode_ensemble, by=by_bm25).reader.prompts
    whole = prompts.builder.context

    def context(question, documents=()):
        # As a tokenizer does that joins characters only where enough of them stand together.
        extra = [0] * 3 if 0 < len(question) < 60 else []
        return whole(question, documents) + extra

    monkeypatch.setattr(prompts.builder, "context", context)
    for question in ("\U0001f41f" * 40, HARD["hebrew"] * 9, "what does it like? " * 80):
        prompt = prompts.make(question, [0, 1], [0.0, 0.0])
        assert prompts.fitting_length(prompt.contexts) <= prompts.lengths[-1]
        assert fitting(prompts.closed_lengths, len(prompt.closed_book))
        assert question.startswith(prompt.question)
        assert "the language model reads the first" in prompt.notes[0]


def test_the_white_space_in_front_of_a_question_is_not_what_is_read_of_it(asker):
    prompt = asker.reader.prompts.make("\n" * 500 + "what?", [0], [0.0])
    assert (prompt.question, prompt.notes) == ("what?", ())


def test_a_blank_question_or_answer_is_refused(asker):
    with pytest.raises(ValueError, match="the question is empty"):
        asker.ask(" \n")
    with pytest.raises(ValueError, match="the answer is empty"):
        asker.ask(QUESTION, answer=" ")


def test_without_a_matching_word_bm25_answers_closed_book(system):
    asker = Asker(system, OPTIONS, decode=decode_ensemble, by=by_bm25)
    reply = asker.ask("zzz qqq")
    assert reply.sources == ()
    assert (reply.relied_on, reply.span, reply.utility, reply.grounded) == (None, None, 0, False)
    assert any("no document shares a word" in note for note in reply.notes)
    ids = asker.reader.prompts.make("zzz qqq", [], [])
    assert reply.log_prob == pytest.approx(reply.no_doc_log_prob)
    written = decode_ensemble(asker.reader, ids, lambda _: None)
    expected = answer_log_probs(system, ids.closed_book, written.ids)
    np.testing.assert_allclose(written.token_log_probs[0, : len(written.ids)], expected, atol=2e-3)


def test_a_model_without_room_names_the_flag(system):
    with pytest.raises(ValueError, match="--max_new_tokens 600 leaves no room"):
        Asker(system, ReaderOptions(max_new_tokens=600), decode=decode_ensemble, by=by_dense)


@pytest.mark.parametrize("name", sorted(ReaderOptions.__dataclass_fields__))
def test_options_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        ReaderOptions(**{name: 0})


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(DECODES) - {"fusion"}))
def test_every_way_of_decoding_gives_an_attributed_answer(system, name):
    asker = Asker(system, OPTIONS, decode=DECODES[name], by=SEARCHES["dense"])
    reply = asker.ask(QUESTION)
    assert reply.num_tokens >= 1
    assert sum(source.posterior for source in reply.sources) == pytest.approx(1, abs=1e-4)
    assert asker.ask("zzz", answer=None).answer is not None
