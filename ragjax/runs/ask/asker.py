"""From a question to its answer, the passage behind it and the words that carry it.

    system = open_system(Path("runs/adapt"))
    asker = Asker(system, ReaderOptions(), by=by_hybrid)
    reply = asker.ask("what is a pytree?")

or, with the answer before its explanation, `asker.explain(asker.answer("what is a pytree?"))`.

K documents, T answer tokens.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from ragjax.generation.compiled import compiling_only
from ragjax.losses import document_posterior
from ragjax.runs.ask.attribution import Attribution, attribute, attribute_jointly
from ragjax.runs.ask.decoding import (
    Decode,
    Generated,
    Listener,
    decode_ensemble,
    decode_fusion,
)
from ragjax.runs.ask.prompts import Prompt, ReaderOptions
from ragjax.runs.ask.reader import Joint, Reader
from ragjax.runs.ask.spans import Span, SpanFinder
from ragjax.runs.options.modes import MODES, check_mode
from ragjax.runs.system import (
    Search,
    System,
    encode_query_of,
    query_lengths,
    reranked_search,
    retrieve,
)

# Longer questions are compiled for when the first one comes.
_WARM_QUERY_TOKENS = 256

_READ_AT_ONCE = (
    "the decoder attended to all passages at once (fusion): what counts is how much less likely the"
    " answer is without a passage; a posterior p(c|x,y) does not apply"
)

_posterior = jax.jit(document_posterior)

# Part of an answer as it is written: (text so far).
ShowText = Callable[[str], None]


class Source(NamedTuple):
    """A document and its part in an answer."""

    id: str
    title: str
    text: str
    prior: float  # p_R(c|x) among the K
    posterior: float  # p(c|x,y) among the K; NaN where they were read at once
    change: float  # log p(y|x) minus that without this document, nats
    log_prob: float  # log p_LM(y|c∘x), nats
    source: str = ""  # where it stands, such as "manual.pdf, page 3"; "": nothing says


class Reply(NamedTuple):
    """An answer and where it comes from."""

    question: str
    answer: str
    log_prob: float  # log p(y|x), documents summed out or read at once, nats
    num_tokens: int  # of the answer
    no_doc_log_prob: float  # log p_LM(y|x) without documents, nats
    utility: float  # log_prob - no_doc_log_prob
    grounded: bool  # the documents make the answer more likely than none
    sources: tuple[Source, ...]  # in the order of the retriever
    relied_on: int | None  # place of the one that explains the answer best; None: no sources
    span: Span | None  # in that one; None: not requested, or no text there
    notes: tuple[str, ...]  # sentences for the reader
    answer_seconds: float  # until the answer and the passage it relies on were known
    seconds: float  # until it was explained, too


class Answer(NamedTuple):
    """An answer and the passage behind it, before `Asker.explain`."""

    question: str
    text: str
    relied_on: int | None  # place of the passage that explains the text best; None: no passage
    docs: tuple[int, ...]  # corpus rows, in the order of the retriever
    posterior: np.ndarray  # [K] p(c|x,y) among the documents; NaN where they were read at once
    notes: tuple[str, ...]  # sentences for the reader
    prompt: Prompt
    generated: Generated
    token_log_probs: np.ndarray  # [K, T] log p_LM(y_t|c∘x, y_<t) in nats
    joint: Joint | None  # where the documents were read at once
    started: float  # time of the question, and
    seconds: float  # how long the answer took


class Asker:
    """Answers questions one at a time, with a system that stays loaded.

    Attributes:
        system: Documents, retriever and language model.
        reader: Its language model at fixed shapes.
        spans: Finds the words that carry an answer.
        asked_documents: K as requested; a smaller corpus gives fewer.
        by: How the documents are found.
    """

    def __init__(
        self,
        system: System,
        options: ReaderOptions | None = None,
        *,
        decode: Decode | None = None,
        by: Search | None = None,
        closed_book: bool = False,
    ) -> None:
        """Prepares the reader.

        Args:
            system: Documents, retriever and language model.
            options: How much is read and written; None: the defaults.
            decode: Decoding strategy; None: `decode_fusion` for a run whose options say so (its
                language model was trained to attend to all documents at once), else
                `decode_ensemble`.
            by: Search for the documents; None: that of the system, its best ranked again where the
                run ships that.
            closed_book: Retrieve nothing.

        Raises:
            ValueError: The model's context is too short for the options, or it cannot read as
                asked.
        """
        self.system, config = system, system.workspace.config
        if decode is None:
            decode = decode_fusion if MODES[config.mode].fused else decode_ensemble
        self._fused = decode is decode_fusion
        if self._fused:
            check_mode("fusion", system.workspace.lm, "--decode")
        self.reader = Reader(system, options or ReaderOptions())
        self.spans = SpanFinder(self.reader, system.workspace.dataset.corpus)
        self.asked_documents = 0 if closed_book else self.reader.prompts.options.documents
        by = by or reranked_search(system, system.search, None, log=system.workspace.log)
        self._decode, self.by = decode, by

    def warm_up(self) -> Iterator[str]:
        """Compiles every shape that a question can need; yields what was compiled, one at a time.

        Without it, the first question of a new length takes seconds on a machine that has not
        compiled it before.
        """
        if self.asked_documents:
            for length in query_lengths(self.system.workspace.query_encoder):
                if length <= _WARM_QUERY_TOKENS:
                    encode_query_of(self.system, length)
                    yield f"questions of {length} tokens"
            retrieve(self.system, ["warm up"], self.asked_documents, by=self.by)
        prompts = self.reader.prompts
        for number, prompt in enumerate(prompts.warm_up()):
            # One answer is written; the other lengths need no more than their programs.
            with compiling_only() if number else contextlib.nullcontext():
                answer = self._answer(prompt, None)
                self._attribution(answer)
                reading, ids = answer.generated.reading, answer.generated.ids
                self.reader.leave_out(prompt, reading, 0, [[0]] * prompts.options.windows, ids)
            yield f"prompts of {prompts.fitting_length(prompt.contexts)} tokens"

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
            show: Called with the text so far, each time there is more of it.

        Raises:
            ValueError: The question or the given answer is blank.
        """
        started = time.perf_counter()
        _check_text("question", question)
        if answer is not None:
            _check_text("answer", answer)
        retrieved = retrieve(self.system, [question], self.asked_documents, by=self.by)
        docs = retrieved.found.doc_ids[0][retrieved.found.mask[0]]
        scores = retrieved.doc_scores[0][retrieved.found.mask[0]]
        prompt = self.reader.prompts.make(question, docs.tolist(), scores.tolist())
        notes = self._retrieval_notes(int(retrieved.found.mask.sum()))
        written = self._answer(prompt, answer, notes=notes, show=show, started=started)
        return written._replace(question=question)

    def explain(self, answer: Answer, *, span: bool = True) -> Reply:
        """Explains an answer by its documents.

        Args:
            answer: From `answer`.
            span: Find the words of the passage that carry it.
        """
        attribution = self._attribution(answer)
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
                source=corpus[doc].source,
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
            span=self._span(answer) if span else None,
            notes=(*answer.notes, *self._reading_notes(answer)),
            answer_seconds=answer.seconds,
            seconds=time.perf_counter() - answer.started,
        )

    def answer_from(
        self, question: str, docs: Sequence[int], doc_scores: Sequence[float], answer: str | None
    ) -> Answer:
        """Answers a question from given documents.

        Args:
            question: Its text.
            docs: Corpus rows, best first.
            doc_scores: Logits of p_R.
            answer: Take this answer; None: write one.
        """
        return self._answer(self.reader.prompts.make(question, docs, doc_scores), answer)

    def _answer(
        self,
        prompt: Prompt,
        answer: str | None,
        *,
        notes: Sequence[str] = (),
        show: ShowText | None = None,
        started: float = 0.0,
    ) -> Answer:
        """Writes an answer to a prompt, or takes the given one, and weighs the documents by it."""
        notes = [*prompt.notes, *notes]
        if answer is None:
            generated = self._decode(self.reader, prompt, self._listener(show))
            answer = self._text(generated.ids)
            if not generated.ended:
                notes.append("the answer was cut at the limit of tokens")
        else:
            ids = self.reader.prompts.builder.target(answer)
            if self._text(ids) != " ".join(answer.split()):
                notes.append(f"only the first {len(ids)} tokens of the given answer are explained")
            fused = self._fused and prompt.docs
            reading = (self.reader.read_fused if fused else self.reader.read)(prompt)
            generated = Generated(ids, True, reading, None)
        log_probs, joint = generated.token_log_probs, None
        masks, count = self._masks(prompt, generated.ids), len(prompt.docs)
        if generated.reading.fused:
            joint = self.reader.score_jointly(generated.reading, generated.ids)
            log_probs, posterior = joint.alone, np.full(count, np.nan)
            # The one without which the answer is least likely.
            needed = -(joint.without * masks["token_mask"]).sum(axis=1)[:count]
        else:
            if log_probs is None:
                log_probs = self.reader.score(generated.reading, generated.ids)
            posterior = _posterior(_finite_scores(prompt), log_probs[None], **masks)
            needed = posterior = np.exp(np.asarray(posterior))[0, :count]
        return Answer(
            question=prompt.question,
            text=answer,
            relied_on=int(np.argmax(needed)) if count else None,
            docs=prompt.docs,
            posterior=posterior,
            notes=tuple(notes),
            prompt=prompt,
            generated=generated,
            token_log_probs=log_probs,
            joint=joint,
            started=started,
            seconds=time.perf_counter() - started,
        )

    def _attribution(self, answer: Answer) -> Attribution:
        ids, scores = answer.generated.ids, _finite_scores(answer.prompt)
        closed = self.reader.score_closed_book(answer.prompt, ids)
        masks = self._masks(answer.prompt, ids)
        if answer.joint is not None:
            return attribute_jointly(scores, answer.joint, closed, **masks)
        return attribute(scores, answer.token_log_probs[None], closed, **masks)

    def _masks(self, prompt: Prompt, ids: Sequence[int]) -> dict[str, np.ndarray]:
        """Returns the documents `[1, K]` and the tokens `[1, T]` that count.

        What a target begins with (<s> of BART) is no token of the answer.
        """
        tokens = np.zeros((1, self.reader.prompts.max_target), bool)
        tokens[0, len(self.reader.lm.text_format.target_start_ids) : len(ids)] = True
        return {"doc_mask": np.isfinite(prompt.log_weights)[None], "token_mask": tokens}

    def _span(self, answer: Answer) -> Span | None:
        if answer.relied_on is None:
            return None
        return self.spans.find(answer.prompt, answer.generated, answer.text, answer.relied_on)

    def _reading_notes(self, answer: Answer) -> list[str]:
        """Returns how the passages were read, and how much of the one that the answer relies on."""
        if answer.relied_on is None:
            return []
        notes = [_READ_AT_ONCE] if answer.joint is not None else []
        passage = self.system.workspace.dataset.corpus[answer.docs[answer.relied_on]]
        read = len(self.spans.read(answer.prompt, answer.relied_on).text)
        if read >= len(passage.text.rstrip()):
            return notes
        return [
            *notes,
            f"the language model read {read:,} of the {len(passage.text):,} characters of passage"
            f" {passage.id!r} (--document_tokens reads more)",
        ]

    def _retrieval_notes(self, found: int) -> list[str]:
        asked = self.asked_documents
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
        return self.reader.lm.tokenizer.decode(list(ids)).strip()


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
