"""Ask a question-answering system, and see the passage and the words that an answer rests on.

    python experiments/ask.py --run runs/adapt "what does jax.vmap do?"
    python experiments/ask.py --run runs/adapt                     (an interactive loop)
    python experiments/ask.py --data FOLDER --encoder MODEL --lm MODEL
    python experiments/ask.py --run runs/adapt --json < questions.txt > answers.jsonl

Loading takes half a minute, then a short answer with its passage less than two seconds on two
cores, and its explanation another one. FOLDER has a `corpus.jsonl`, or Markdown, text, HTML and PDF
files at any depth; its embeddings are kept in `--cache`, so only the first start encodes. An empty
line or Ctrl-D ends the loop.
"""

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from ragjax.index import MilvusIndex
from ragjax.index.milvus_client import Address
from ragjax.runs import Asker, PromptConfig, ReaderOptions, RunConfig, open_base_system, open_system
from ragjax.runs.ask.decoding import DECODES
from ragjax.runs.ask.view import (
    coloured,
    format_reply,
    format_source,
    plain,
    reply_as_json,
    safe_text,
)
from ragjax.runs.compare.rerank import NONE, check_reranker
from ragjax.runs.indexes import in_milvus
from ragjax.runs.options.checks import check_numbers
from ragjax.runs.options.modes import ModeName
from ragjax.runs.options.shared import DataConfig
from ragjax.runs.program import (
    BAD_INPUT,
    escape_what_is_no_utf8,
    flag_names,
    in_own_flags,
    show_error,
)
from ragjax.runs.saved import ModelChoice
from ragjax.runs.system import SEARCHES, System, reranked_search

INTERRUPTED = 130
_DEFAULTS = RunConfig()


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Ask a question-answering system.

    Attributes:
        words: The question.
        question: The question, as a flag; without either: an interactive loop.
        run: Folder of a finished run.
        data: Folder of documents (corpus.jsonl or another table, or .md, .txt, .rst, .html and .pdf
            files), one such file, or a data set of the Hugging Face hub, for base models.
        fields: Names of the fields of the corpus where they differ from BEIR's, for example
            `id=docid,text=contents`.
        encoder: Text encoder for `data`: folder, hub id, or `pip:NAME==VERSION`.
        query_encoder: Encoder of questions for `data`, where it is another model; empty: `encoder`.
        doc_encoder: Encoder of the documents of `data`; empty: `encoder`.
        query_prefix: Text that the encoder reads before each question of `data` ("" for none);
            None: what its files say.
        doc_prefix: Text that the encoder reads before each document of `data` ("" for none); None:
            what its files say.
        lm: Language model for `data`: folder, .gguf file, hub id, or `pip:NAME==VERSION`.
        template: What it reads, as text or as the name of a file, as in `--prompt.template` of a
            run, which has its own; empty: what it was trained with, or a usual one.
        chat: Whether that is put into the chat template of `lm`. A run has chosen that.
        cache: Folder for the embeddings of `data`.
        answer: Explain this answer instead of generating one.
        documents: Documents read for an answer; 0: none.
        models: Of a run: `shipped` is what its dev questions chose, un-adapted where adaptation did
            not help; `adapted` or `base` models in its place.
        retriever: Index that is searched; p_R is the dense retriever's with each of them. None:
            the one that a run ships, else `hybrid`.
        index: Where the dense index of a run was published, `milvus:URI/ALIAS`; empty: it is
            searched in this process.
        rerank: What ranks the best documents again: `question`, the language model by the
            likelihood of the question after each (seconds a question on a CPU); a cross-encoder, by
            folder or hub id; or `none`. None: as a run ships, with the weight that its dev
            questions chose, else `none`.
        rerank_depth: Documents that are ranked again; 0: as the run, else 10.
        decode: Decoding strategy over the documents. `ensemble` reads each document once and mixes
            their next-token distributions by p_R; `concat` reads all of them in one prompt;
            `fusion` (T5 and BART) encodes each alone and attends to all of them at once; the others
            are RAG's beam searches, by sequence or by token. All but `ensemble` and `fusion` read
            the documents twice, and take longer. None: `fusion` for a run that answers so
            (`train_rag.py --language_model.reader fusion`), else `ensemble`.
        max_new_tokens: Tokens of an answer at most.
        document_tokens: Tokens read of each document; 0: 96, at which two cores keep to two
            seconds with 4 documents.
        devices: Devices that have an equal part of each parameter, for models that do not fit one.
        explain: Find the words that carry the answer.
        json: One JSON object per question on stdout, and nothing else there; without a question,
            questions are read from stdin, one a line.
        warm_up: Compile before the first question of several.
        debug: Show tracebacks.
    """

    words: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    question: tuple[str, ...] = ()
    run: str = ""
    data: str = ""
    fields: str = ""
    encoder: str = _DEFAULTS.encoder
    query_encoder: str = ""
    doc_encoder: str = ""
    query_prefix: str | None = None
    doc_prefix: str | None = None
    lm: str = _DEFAULTS.lm
    template: str = ""
    chat: Literal["on", "off"] = "off"
    cache: str = "runs/ask"
    answer: str = ""
    documents: Annotated[int, tyro.conf.arg(aliases=("--k",))] = 4
    models: ModelChoice = "shipped"
    retriever: Literal["hybrid", "dense", "bm25"] | None = None
    index: str = ""
    rerank: str | None = None
    rerank_depth: int = 0
    decode: ModeName | None = None
    max_new_tokens: int = 16
    document_tokens: int = 0
    devices: int = 1
    explain: bool = True
    json: bool = False
    warm_up: bool = True
    debug: bool = False

    @property
    def asked(self) -> str | None:
        """The question, if one was given."""
        given = self.words or self.question
        return " ".join(given) if given else None

    def check(self) -> None:
        """Raises ValueError naming the flags that are at odds or out of range."""
        if bool(self.run) == bool(self.data):
            raise ValueError(
                "give one of --run FOLDER (a finished run) and --data FOLDER (documents, with the"
                " models of --encoder and --lm)"
            )
        if self.words and self.question:
            raise ValueError("give the question once: in words, or as --question")
        leasts = {"documents": 0, "max_new_tokens": 1, "document_tokens": 0, "rerank_depth": 0}
        for name, least in leasts.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        check_numbers(self, mark="--")
        if self.data and self.models == "adapted":
            raise ValueError("--models adapted goes with --run; the models of --data are base ones")
        for name in (
            "encoder", "query_encoder", "doc_encoder", "lm", "template", "chat", "fields",
        ):  # fmt: skip
            if self.run and getattr(self, name) != getattr(Flags, name):
                raise ValueError(f"--{name} goes with --data; a run has its own")
        if self.index:
            Address.parse(self.index)
            if self.retriever == "bm25":
                raise ValueError("--retriever bm25 searches words alone, and no --index")
        if self.asked is not None and not self.asked.strip():
            raise ValueError("the question is empty; write at least one word")
        if self.answer and self.asked is None:
            raise ValueError("--answer explains the answer to one question; give that question too")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script and returns its exit code.

    Returns:
        0; 2 for bad input (with `--json`, also where a line of stdin could not be answered);
        130 where Ctrl-C stopped it.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="note: %(message)s")
    escape_what_is_no_utf8()
    try:
        flags = tyro.cli(Flags, args=arguments, description=__doc__, use_underscores=True)
        flags.check()
        return _run(flags)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has seen enough; the interpreter must not flush it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        show_error(error, arguments, flag_names(Flags))
        return BAD_INPUT


def _run(flags: Flags) -> int:
    check_reranker(flags.rerank or NONE, "--rerank")
    if flags.index:
        MilvusIndex.open(flags.index)  # before anything that takes time
    system = _open(flags)
    if flags.index:
        served = in_milvus(system.retriever, flags.index)
        system = dataclasses.replace(system, retriever=served)
    options = ReaderOptions(
        documents=max(flags.documents, 1),
        max_new_tokens=flags.max_new_tokens,
        **({"document_tokens": flags.document_tokens} if flags.document_tokens else {}),
    )
    asker = Asker(
        system,
        options,
        decode=DECODES[flags.decode] if flags.decode else None,
        by=reranked_search(
            system,
            SEARCHES[flags.retriever] if flags.retriever else system.search,
            flags.rerank,
            depth=flags.rerank_depth,
            log=_note,
        ),
        closed_book=flags.documents == 0,
    )
    if flags.warm_up and flags.asked is None:
        for done in tqdm(asker.warm_up(), desc="compiling", unit=" shapes", file=sys.stderr):
            logging.info("compiled: %s", done)
    answer_one = _print_json if flags.json else _print_text
    if flags.asked is not None:
        answer_one(asker, flags, flags.asked)
        return 0
    failures = 0
    for asked in _lines(flags, system):
        try:
            answer_one(asker, flags, asked)
        except ValueError as error:
            failures += 1
            print(f"error: {error}", file=sys.stderr)
            if flags.json:
                _print_object({"question": asked, "error": str(error)})
    return BAD_INPUT if flags.json and failures else 0


def _open(flags: Flags) -> System:
    if flags.run:
        return open_system(flags.run, models=flags.models, devices=flags.devices, log=_note)
    config = dataclasses.replace(
        _DEFAULTS,
        data=flags.data,
        encoder=flags.encoder,
        query_encoder=flags.query_encoder,
        doc_encoder=flags.doc_encoder,
        query_prefix=flags.query_prefix,
        doc_prefix=flags.doc_prefix,
        lm=flags.lm,
        devices=flags.devices,
        fsdp=flags.devices,
        data_options=DataConfig(fields=flags.fields),
        prompt=PromptConfig(
            template=flags.template, chat=flags.chat, answer_tokens=flags.max_new_tokens
        ),
    )
    return open_base_system(config, cache=Path(flags.cache), log=_note)


def _lines(flags: Flags, system: System) -> Iterator[str]:
    """Yields questions: every line of stdin with `--json`, else until an empty one."""
    if flags.json:
        yield from filter(None, map(_question, sys.stdin))
        return
    try:
        import readline  # noqa: F401  (its import gives `input` a history and line editing)
    except ImportError:  # Windows
        pass
    print(f"{system.size:,} documents of {system.name}; an empty line ends", file=sys.stderr)
    while True:
        try:
            line = _question(input("? "))
        except EOFError:
            print(file=sys.stderr)
            return
        except UnicodeDecodeError as error:
            print(f"error: that was no UTF-8 text ({error}); ask again", file=sys.stderr)
            continue
        if not line:
            return
        yield line


def _question(line: str) -> str:
    """Returns a line without white space and byte-order mark, which editors put before a text."""
    return line.strip().strip("\ufeff").strip()


def _print_text(asker: Asker, flags: Flags, question: str) -> None:
    terminal = _is_terminal(sys.stdout)
    style = coloured if terminal and not os.environ.get("NO_COLOR") else plain
    shown = 0

    def show(text: str) -> None:
        nonlocal shown
        piece = safe_text(text[shown:])
        print(style(piece, "answer"), end="", flush=True)
        shown = len(text)

    answer = asker.answer(question, answer=flags.answer or None, show=show if terminal else None)
    print("" if shown else style(safe_text(answer.text) or "(nothing)", "answer"))
    # The answer and its passage do not wait for their explanation.
    if source := format_source(answer, asker.system.workspace.dataset.corpus, style=style):
        print(source, flush=True)
    reply = asker.explain(answer, span=flags.explain)
    print(format_reply(reply, style=style, answer=False) + "\n", flush=True)


def _print_json(asker: Asker, flags: Flags, question: str) -> None:
    reply = asker.ask(question, answer=flags.answer or None, explain=flags.explain)
    _print_object(reply_as_json(reply))


def _print_object(value: dict) -> None:
    # Bytes that are no UTF-8 reach us as lone surrogates, which cannot be written.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    print(text.encode("utf-8", "backslashreplace").decode("utf-8"), flush=True)


def _note(line: str) -> None:
    if line.strip():
        print(in_own_flags(line.strip(), flag_names(Flags)), file=sys.stderr, flush=True)


def _is_terminal(stream: object) -> bool:
    return bool(getattr(stream, "isatty", bool)())


if __name__ == "__main__":
    sys.exit(main())
