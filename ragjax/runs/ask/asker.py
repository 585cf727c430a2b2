"""One question to the answer, the passage it rests on and the words that carry it.

    system = open_system(Path("runs/adapt"))
    asker = Asker(system, ReaderOptions(), decode=decode_ensemble, by=by_hybrid)
    reply = asker.ask("what is a pytree?")

or, with the answer before its explanation, `asker.explain(asker.answer("what is a pytree?"))`.

K documents, T answer tokens.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ragjax.data import passage_text
from ragjax.evaluation.spans import Match, TextWindow, find_answer, find_similar, split_windows
from ragjax.losses import document_posterior
from ragjax.runs.ask.attribution import Attribution, attribute
from ragjax.runs.ask.decoding import Decode, Generated, Listener, decode_ensemble
from ragjax.runs.ask.prompts import Prompt, ReaderOptions
from ragjax.runs.ask.reader import Reader
from ragjax.runs.system import Retrieved, Search, System, by_hybrid, encode_query_of, retrieve

# Longer questions are compiled for when the first one comes.
_WARM_QUERY_TOKENS = 256

# Part of an answer as it is written: (text so far).
ShowText = Callable[[str], None]


class Span(NamedTuple):
    """The part of a passage that carries the answer."""

    field: str  # "text" or "title": what the offsets are of
    start: int  # first character
    end: int  # behind the last character
    method: str  # "match", "similar" or "left_out"
    score: float | None  # F1 of the words, for "match" and "similar"
    change: (
        float | None
    )  # nats that the answer's log-prob loses without its window; None: not tried


class Source(NamedTuple):
    """A document, and what it has to do with the answer."""

    id: str
    title: str
    text: str
    prior: float  # p_R(c|x) among the K
    posterior: float  # p(c|x,y) among the K
    change: float  # log p(y|x) minus that without this document, nats
    log_prob: float  # log p_LM(y|c∘x), nats


class Reply(NamedTuple):
    """An answer and where it comes from."""

    question: str
    answer: str
    log_prob: float  # log p(y|x), documents summed out, nats
    num_tokens: int  # of the answer
    no_doc_log_prob: float  # log p_LM(y|x) without documents, nats
    utility: float  # log_prob - no_doc_log_prob
    grounded: bool  # the documents make the answer more likely than none
    sources: tuple[Source, ...]  # in the order of the retriever
    relied_on: int | None  # which of them explains the answer best; None: there is none
    span: Span | None  # in that one; None: not asked for, or no text there
    notes: tuple[str, ...]  # sentences for the reader
    answer_seconds: float  # until the answer and the passage it relies on were known
    seconds: float  # until it was explained, too


class Answer(NamedTuple):
    """An answer and the passage behind it; `Asker.explain` tells more about them."""

    question: str
    text: str
    relied_on: int | None  # place of the passage that explains the text best; None: there is none
    docs: tuple[int, ...]  # corpus rows, in the order of the retriever
    posterior: np.ndarray  # [K] p(c|x,y) among the documents
    notes: tuple[str, ...]  # sentences for the reader
    prompt: Prompt
    generated: Generated
    token_log_probs: np.ndarray  # [K, T] log p_LM(y_t|c∘x, y_<t) in nats
    started: float  # when it was asked, and
    seconds: float  # how long the answer took


class _Read(NamedTuple):
    """What the language model reads of a passage."""

    title: str
    text: str
    # Which characters of the passage's text each token stands for; those of the title, which stands
    # in front, are negative.
    places: list[tuple[int, int]]


class Asker:
    """Answers questions one at a time, with a system that stays loaded.

    Attributes:
        system: What answers.
        reader: Its language model at fixed shapes.
        asked_documents: K as asked for; a smaller corpus gives fewer.
    """

    def __init__(
        self,
        system: System,
        options: ReaderOptions | None = None,
        *,
        decode: Decode = decode_ensemble,
        by: Search = by_hybrid,
        closed_book: bool = False,
    ) -> None:
        """Takes what the answers need.

        Args:
            system: What answers.
            options: How much is read and written; None: the defaults.
            decode: How the answer comes out of the documents.
            by: What finds the documents.
            closed_book: Retrieve nothing.

        Raises:
            ValueError: The model's context is too short for the options.
        """
        self.system = system
        self.reader = Reader(system, options or ReaderOptions())
        self.asked_documents = 0 if closed_book else self.reader.options.documents
        self._decode, self._by = decode, by
        self._known: tuple[tuple[int, int], _Read] | None = None  # of (corpus row, tokens read)

    def warm_up(self) -> Iterator[str]:
        """Compiles every shape that a question can need; yields what was compiled, one at a time.

        Without it, the first question of a new length takes seconds.
        """
        if self.asked_documents:
            for length in self.system.workspace.buckets():
                if length <= _WARM_QUERY_TOKENS:
                    encode_query_of(self.system, length)
                    yield f"questions of {length} tokens"
            retrieve(self.system, ["warm up"], self.asked_documents, by=self._by)
        for prompt in self.reader.warm_up_prompts():
            generated = self._decode(self.reader, prompt, lambda ids: None)
            log_probs = self._token_log_probs(generated)
            self._attribution(prompt, generated.ids, log_probs)
            if prompt.docs:
                variants = [[0]] * self.reader.options.windows
                self.reader.leave_out(prompt, generated.reading, 0, variants, generated.ids)
            yield f"prompts of {self.reader.fitting_length(prompt.contexts)} tokens"

    def ask(
        self,
        question: str,
        *,
        answer: str | None = None,
        explain: bool = True,
        show: ShowText | None = None,
    ) -> Reply:
        """Answers a question and explains the answer; arguments as of `answer` and `explain`."""
        return self.explain(self.answer(question, answer=answer, show=show), span=explain)

    def answer(
        self, question: str, *, answer: str | None = None, show: ShowText | None = None
    ) -> Answer:
        """Answers a question and names the passage that the answer relies on.

        Args:
            question: Its text.
            answer: Take this answer; None: write one.
            show: Hears the answer as it is written, again and again from its beginning.

        Raises:
            ValueError: The question or the given answer is blank.
        """
        started = time.perf_counter()
        _check_text("question", question)
        if answer is not None:
            _check_text("answer", answer)
        retrieved = retrieve(self.system, [question], self.asked_documents, by=self._by)
        docs = retrieved.found.doc_ids[0][retrieved.found.mask[0]]
        scores = retrieved.doc_scores[0][retrieved.found.mask[0]]
        prompt = self.reader.prompt(question, docs.tolist(), scores.tolist())
        notes = [*prompt.notes, *self._retrieval_notes(retrieved)]
        if answer is None:
            generated = self._decode(self.reader, prompt, self._listener(show))
            answer = self._text(generated.ids)
            if not generated.ended:
                notes.append("the answer was cut at the limit of tokens")
        else:
            generated = self._given(prompt, answer, notes)
        token_log_probs = self._token_log_probs(generated)
        posterior = document_posterior(
            _finite_scores(prompt),
            token_log_probs[None],
            doc_mask=np.isfinite(prompt.log_weights)[None],
            token_mask=self._answer_tokens(generated.ids),
        )
        posterior = np.exp(np.asarray(posterior))[0, : len(prompt.docs)]
        return Answer(
            question=question,
            text=answer,
            relied_on=int(np.argmax(posterior)) if prompt.docs else None,
            docs=prompt.docs,
            posterior=posterior,
            notes=tuple(notes),
            prompt=prompt,
            generated=generated,
            token_log_probs=token_log_probs,
            started=started,
            seconds=time.perf_counter() - started,
        )

    def explain(self, answer: Answer, *, span: bool = True) -> Reply:
        """Tells how an answer comes about.

        Args:
            answer: From `answer`.
            span: Find the words of the passage that carry it.
        """
        attribution = self._attribution(answer.prompt, answer.generated.ids, answer.token_log_probs)
        corpus = self.system.workspace.dataset.corpus
        sources = tuple(
            Source(
                id=corpus[doc].id,
                title=corpus[doc].title or "",
                text=corpus[doc].text,
                prior=float(attribution.prior[0, row]),
                posterior=float(attribution.posterior[0, row]),
                change=float(attribution.without[0, row]),
                log_prob=float(attribution.doc_log_probs[0, row]),
            )
            for row, doc in enumerate(answer.docs)
        )
        return Reply(
            question=answer.question,
            answer=answer.text,
            log_prob=float(attribution.log_probs[0]),
            num_tokens=len(answer.generated.ids),
            no_doc_log_prob=float(attribution.no_doc_log_probs[0]),
            utility=float(attribution.utility[0]),
            grounded=bool(sources) and float(attribution.utility[0]) > 0,
            sources=sources,
            relied_on=answer.relied_on,
            span=self._span(answer, answer.relied_on) if span and sources else None,
            notes=(*answer.notes, *self._reading_notes(answer)),
            answer_seconds=answer.seconds,
            seconds=time.perf_counter() - answer.started,
        )

    def attributions(
        self, question: str, docs: Sequence[int], doc_scores: Sequence[float], answer: str | None
    ) -> tuple[str, Attribution]:
        """Attributes an answer to given documents, without looking for a span.

        Args:
            question: Its text.
            docs: Corpus rows, best first.
            doc_scores: Logits of p_R.
            answer: The answer; None: write one.

        Returns:
            The answer, and its attribution over K documents.
        """
        prompt = self.reader.prompt(question, docs, doc_scores)
        if answer is None:
            generated = self._decode(self.reader, prompt, lambda ids: None)
            answer = self._text(generated.ids)
        else:
            generated = self._given(prompt, answer, [])
        token_log_probs = self._token_log_probs(generated)
        return answer, self._attribution(prompt, generated.ids, token_log_probs)

    def _given(self, prompt: Prompt, answer: str, notes: list[str]) -> Generated:
        ids = self.reader.prompts.target(answer)
        if self._text(ids) != answer.strip():
            notes.append(f"only the first {len(ids)} tokens of the given answer are explained")
        return Generated(ids, True, self.reader.read(prompt), None)

    def _token_log_probs(self, generated: Generated) -> np.ndarray:
        if generated.token_log_probs is not None:
            return generated.token_log_probs
        return self.reader.score(generated.reading, generated.ids)

    def _answer_tokens(self, ids: Sequence[int]) -> np.ndarray:
        """Returns `[1, T]` bool: without what a target begins with (<s> of BART)."""
        tokens = np.zeros((1, self.reader.max_target), bool)
        tokens[0, len(self.system.workspace.lm.text_format.target_start_ids) : len(ids)] = True
        return tokens

    def _attribution(
        self, prompt: Prompt, ids: Sequence[int], token_log_probs: np.ndarray
    ) -> Attribution:
        return attribute(
            _finite_scores(prompt),
            token_log_probs[None],
            self.reader.score_closed_book(prompt, ids),
            doc_mask=np.isfinite(prompt.log_weights)[None],
            token_mask=self._answer_tokens(ids),
        )

    def _span(self, answer: Answer, row: int | None) -> Span | None:
        """Returns the words of the answer in the passage, or else the window that carries it."""
        assert row is not None, "there are documents"
        # What the language model did not read carries nothing.
        title, text, _ = self._read(answer.prompt, row)
        matches = find_answer(text, answer.text)
        if len(matches) == 1:
            return _matched("text", matches[0], "match")
        if not matches:
            if found := find_answer(title, answer.text):
                return _matched("title", found[0], "match")
            if similar := find_similar(text, answer.text):
                return _matched("text", similar, "similar")
        windows = self._windows(answer.prompt, row)
        if not windows:
            return None
        changes = self._changes(answer, row, windows)
        if matches:  # several: the one whose window the answer needs most
            best = max(matches, key=lambda match: _change_at(match, windows, changes))
            span = _matched("text", best, "match")
            return span._replace(change=_change_at(best, windows, changes))
        place = int(np.argmax(changes))
        window = windows[place]
        return Span("text", window.start, window.end, "left_out", None, float(changes[place]))

    def _windows(self, prompt: Prompt, row: int) -> list[TextWindow]:
        """Returns the windows of a passage's text, as far as the language model reads it."""
        return split_windows(self._read(prompt, row).text, most=self.reader.options.windows)

    def _read(self, prompt: Prompt, row: int) -> _Read:
        """Returns what the language model reads of a passage."""
        doc, (_, size) = prompt.docs[row], prompt.places[row]
        if self._known is None or self._known[0] != (doc, size):  # long passages take a while
            self._known = (doc, size), self._read_passage(doc, size)
        return self._known[1]

    def _read_passage(self, doc: int, size: int) -> _Read:
        passage = self.system.workspace.dataset.corpus[doc]
        whole = passage_text(passage, self.reader.prompts.template.passage)
        before = len(whole) - len(passage.text)
        encoding = self.reader.tokenizer.encode(whole, add_special_tokens=False)
        places = [(start - before, end - before) for start, end in encoding.offsets[:size]]
        title, text = passage.title or "", passage.text
        if size < len(encoding):
            # Up to the next token: an accent may belong to a token without being among its places.
            end = max(places[-1][1], encoding.offsets[size][0] - before)
            # Cut within the title, before which the template has nothing.
            title, text = (title, text[:end]) if end > 0 else (whole[: before + end], "")
        return _Read(title, text, places)

    def _reading_notes(self, answer: Answer) -> list[str]:
        """Says how much was read of the passage that the answer relies on, if not all."""
        if answer.relied_on is None:
            return []
        passage = self.system.workspace.dataset.corpus[answer.docs[answer.relied_on]]
        read = len(self._read(answer.prompt, answer.relied_on).text)
        if read >= len(passage.text.rstrip()):
            return []
        return [
            f"the language model read {read:,} of the {len(passage.text):,} characters of passage"
            f" {passage.id!r} (--document_tokens reads more)"
        ]

    def _changes(self, answer: Answer, row: int, windows: Sequence[TextWindow]) -> np.ndarray:
        """Returns what the answer's log-prob loses without each window, in nats."""
        places = self._read(answer.prompt, row).places
        left_out = [
            [
                token
                for token, (start, end) in enumerate(places)
                if start < window.end and end > window.start
            ]
            for window in windows
        ]
        generated = answer.generated
        log_probs = self.reader.leave_out(
            answer.prompt, generated.reading, row, left_out, generated.ids
        )
        return log_probs[0] - log_probs[1:]

    def _retrieval_notes(self, retrieved: Retrieved) -> list[str]:
        asked, found = self.asked_documents, int(retrieved.found.mask.sum())
        if asked == 0:
            return ["answered without documents (--documents 0)"]
        if found == 0:
            return ["no document shares a word with the question: answered without documents"]
        if asked > self.system.size:
            return [f"the corpus holds {self.system.size} documents, fewer than the {asked} asked"]
        if found < asked:
            return [f"{found} documents were found, fewer than the {asked} asked"]
        return []

    def _listener(self, show: ShowText | None) -> Listener:
        def listen(ids: Sequence[int]) -> None:
            if show is not None:
                # A character may take several tokens; until it is whole it shows as U+FFFD.
                show(self._text(ids).rstrip("\ufffd"))

        return listen

    def _text(self, ids: Sequence[int]) -> str:
        return self.system.workspace.lm.tokenizer.decode(list(ids)).strip()


def _finite_scores(prompt: Prompt) -> np.ndarray:
    """Returns `[1, K]` logits of p_R, 0 where a mask drops them."""
    return np.where(np.isfinite(prompt.log_weights), prompt.log_weights, 0)[None]


def _check_text(what: str, text: str) -> None:
    if not text.strip():
        raise ValueError(f"the {what} is empty; write at least one word")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the {what} is not UTF-8 text ({error.reason}): {text!r}") from error


def _matched(field: str, match: Match, method: str) -> Span:
    return Span(field, match.start, match.end, method, match.score, None)


def _change_at(match: Match, windows: Sequence[TextWindow], changes: np.ndarray) -> float:
    """Returns what the answer loses without the match's window, 0 where no window holds it."""
    inside = [
        float(change)
        for window, change in zip(windows, changes, strict=True)
        if window.start < match.end and match.start < window.end
    ]
    return max(inside, default=0.0)
