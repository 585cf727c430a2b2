"""The ids of a prompt are those of its whole text, whatever the tokenizer."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from ragjax.data import PromptBuilder, PromptTemplate
from ragjax.data.joining import DocumentIds, TextJoiner
from ragjax.models.files.gguf.tokenizer import build_tokenizer
from ragjax.models.testing import tiny_language_model
from ragjax.runs.compare.answers import answer_limits
from ragjax.runs.options.shared import PromptConfig
from ragjax.runs.tokens import answer_end_id, training_prompts

CONTROL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The capital of France is Paris. Paris has 2,161,000 people; it doesn't sleep!\n\n",
    "Question: Where is the lexer? Answer: in the house.\n\nContext: passages (tokens).\n",
    "Answer in a word: no - the naïve café at 10:30 costs $5.\n\n  indented\n",
] * 4
TEMPLATES = {
    "default": PromptTemplate(),
    "question first": PromptTemplate(
        context="Q: {question}\nContext: {document}\nA: ", closed_book="Q: {question}\nA: ",
        answer="{answer}",
    ),
    "chat": PromptTemplate(
        context="<|im_start|>user\n{document}\n\n{question}<|im_end|>\n<|im_start|>assistant\n",
        closed_book="<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
        answer="{answer}<|im_end|>", separator="\n---\n",
    ),
    "answer on its own line": PromptTemplate(
        context="{document} {question}\n\nAnswer:", closed_book="{question}\n\nAnswer:",
        answer="\n{answer}", separator=" ",
    ),
}  # fmt: skip
_SPACES = normalizers.Replace(" ", "▁")
_SPACED = decoders.Replace("▁", " ")
_SPLIT = (
    r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _trained(model, trainer, *, pre_tokenizer, decoder=_SPACED, normalizer=None, **options):
    made = Tokenizer(model)
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizer
    made.decoder = decoder
    made.train_from_iterator(
        CORPUS, trainer(special_tokens=CONTROL, show_progress=False, **options)
    )
    return made


def _marks_spaces(tokenizer, *, prefixed):
    """The tokenizer with a normaliser in place of the pre-tokenizer that it was trained with."""
    spec = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), _SPACES]) if prefixed else _SPACES
    )
    return tokenizer


def _sentence_piece(prefixed):
    """As Llama's tokenizer.json: a normaliser that marks spaces, and no pre-tokenizer."""
    words = pre_tokenizers.Metaspace(split=True, prepend_scheme="never")
    made = _trained(
        models.BPE(unk_token="<unk>", fuse_unk=True), trainers.BpeTrainer,
        pre_tokenizer=words, vocab_size=220,
    )  # fmt: skip
    return _marks_spaces(made, prefixed=prefixed)


def _metaspace(scheme):
    made = _sentence_piece(False)
    made.normalizer = normalizers.Sequence([])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return made


def _byte_level(pre_tokenizer):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(
        models.BPE(), trainers.BpeTrainer, pre_tokenizer=pre_tokenizer, vocab_size=420,
        initial_alphabet=alphabet, decoder=decoders.ByteLevel(),
    )  # fmt: skip


def _word_piece():
    return _trained(
        models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer,
        normalizer=normalizers.BertNormalizer(), pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        vocab_size=160,
    )  # fmt: skip


def _unigram():
    return _trained(
        models.Unigram(), trainers.UnigramTrainer, pre_tokenizer=pre_tokenizers.Metaspace(),
        normalizer=normalizers.Sequence(
            [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
        ),
        vocab_size=150, unk_token="<unk>",
    )  # fmt: skip


def _gguf(kind, **changes):
    byte_level = kind != "llama"
    source = _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)) if byte_level else (
        _sentence_piece(False)
    )  # fmt: skip
    vocab = source.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    kinds = [3 if token in CONTROL else 1 for token in tokens]
    if not byte_level:
        tokens += [f"<0x{byte:02X}>" for byte in range(256)]
        kinds += [6] * 256
    fields = {
        "tokenizer.ggml.model": "gpt2" if byte_level else "llama",
        "tokenizer.ggml.pre": kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [-float(place) for place in range(len(tokens))],
        "tokenizer.ggml.merges": [
            " ".join(pair) for pair in json.loads(source.to_str())["model"]["merges"]
        ],
        **changes,
    }
    return build_tokenizer(Path("test.gguf"), fields)


_LLAMA3 = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
KINDS = {
    "byte-level": lambda: _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "byte-level with a prefix": lambda: _byte_level(pre_tokenizers.ByteLevel()),
    "byte-level, punctuation with line breaks": lambda: _byte_level(_LLAMA3),
    "sentencepiece with a prefix": lambda: _sentence_piece(True),
    "sentencepiece without": lambda: _sentence_piece(False),
    "sentencepiece, prefix of the first part": lambda: _metaspace("first"),
    "sentencepiece, prefix of every part": lambda: _metaspace("always"),
    "wordpiece": _word_piece,
    "unigram": _unigram,
    "unigram with a prefix, not cut into words": lambda: _marks_spaces(_unigram(), prefixed=True),
    "gguf smollm": lambda: _gguf("smollm"),
    "gguf llama 3": lambda: _gguf("llama-bpe"),
    "gguf qwen2": lambda: _gguf("qwen2"),
    "gguf sentencepiece with a prefix": lambda: _gguf("llama"),
    "gguf sentencepiece without": lambda: _gguf(
        "llama", **{"tokenizer.ggml.add_space_prefix": False}
    ),
}
made = functools.cache(lambda kind: KINDS[kind]())
PIECES = st.sampled_from(
    ["Paris", " Paris", "The", " the", " lexer", ".", ".\n", "\n", "\n\n", "  ", " ", "10", " 5",
     "!", ":", " café", "́", "é", "🦊", "日本", "\t", "-", "Question", " A", "?", "<", "_", "x"]
)  # fmt: skip
TEXTS = st.lists(PIECES, min_size=1, max_size=8).map("".join).filter(str.strip)


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def fill(form, **values):
    for name, value in values.items():
        form = form.replace(f"{{{name}}}", value, 1)
    return form


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(
    documents=st.lists(TEXTS, max_size=2),
    question=TEXTS,
    answer=TEXTS.map(lambda text: " ".join(text.split())),
)
@example(documents=[], question="Paris", answer="日本")
@example(documents=["The capital is Paris."], question="where?", answer="Paris")
@example(documents=["Paris is the capital", " is.\n"], question="10?\n", answer="10 the.")
def test_ids_are_those_of_the_whole_text(kind, name, documents, question, answer):
    tokenizer = made(kind)
    template = dataclasses.replace(TEMPLATES[name], max_answer_tokens=500)
    builder = PromptBuilder(tokenizer, template=template, max_length=4096, pad_id=0, end_id=2)
    joined = template.separator.join(documents)
    form = template.context if documents else template.closed_book
    text = fill(form, document=joined, question=question) if documents else fill(
        form, question=question
    )  # fmt: skip
    whole = text + fill(template.answer, answer=" ".join(answer.split()))
    context = builder.context(question, builder.encode_documents(documents).ids)
    assert context + builder.target(answer) == [*ids_of(tokenizer, whole), 2]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_of_a_document_is_what_the_whole_text_has(kind):
    """Only of a Unigram that nothing cuts into words, every prompt is tokenised from its start."""
    joiner = TextJoiner(made(kind))
    document = " ".join(["The capital is Paris", "the lexer. Tokens"] * 9)
    encoded, whole = [], joiner.encode
    joiner.encode = lambda text: encoded.append(text) or whole(text)
    ((ids, _),) = joiner.encode_texts([document], 500)
    parts = ["Read the text: ", ids, "\n\n", ids, "\n\nQuestion: where is it?\nAnswer:"]
    assert joiner.join(parts) == ids_of(
        made(kind), f"{parts[0]}{document}\n\n{document}{parts[-1]}"
    )
    if "not cut" not in kind:
        assert max(map(len, encoded), default=0) < 80


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_whose_tokens_go_across_spaces_is_found_out(kind):
    """A merge or an added token across a space, or an unknown step: nothing is kept."""
    tokenizer = Tokenizer.from_str(made(kind).to_str())
    tokenizer.add_tokens(["capital is"])
    ((ids, _),) = TextJoiner(tokenizer).encode_texts(["The big capital is Paris of it"], 500)
    assert TextJoiner(tokenizer).join([ids, "\nand more"]) == ids_of(
        tokenizer, "The big capital is Paris of it\nand more"
    )


def test_merges_across_spaces_are_found_out():
    tokenizer = _trained(
        models.BPE(), trainers.BpeTrainer, vocab_size=300,
        pre_tokenizer=pre_tokenizers.Split("\n", behavior="isolated"),
    )  # fmt: skip
    text = "The capital of France is Paris"
    assert any(" " in token.strip() for token in tokenizer.encode(text).tokens)
    ((ids, _),) = TextJoiner(tokenizer).encode_texts([text], 500)
    assert TextJoiner(tokenizer).join([ids, ". Paris"]) == ids_of(tokenizer, text + ". Paris")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(documents=st.lists(TEXTS, min_size=1, max_size=3), room=st.integers(0, 30))
def test_documents_that_are_cut_fit_and_are_whole_texts(kind, documents, room):
    template = PromptTemplate(max_document_tokens=9, max_answer_tokens=5)
    wide = PromptBuilder(made(kind), template=template, max_length=4096, pad_id=0)
    fixed = len(wide.context("where?", [[]] * len(documents)))
    builder = PromptBuilder(
        made(kind), template=template, max_length=fixed + 5 + len(documents) + room, pad_id=0
    )
    ids = builder.encode_documents(documents).ids
    assert max(map(len, ids)) <= 9
    context = builder.context("where?", ids)
    assert len(context) <= builder.max_context_length
    shown = builder.document_texts("where?", ids)
    assert all(map(str.startswith, documents, shown))
    text = fill(template.context, document="\n\n".join(shown), question="where?")
    assert context == ids_of(made(kind), text)


@pytest.mark.parametrize("name", CONTROL[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_never_produce_control_tokens(kind, name):
    """Not even of a Unigram, whose vocabulary they are in like any other piece."""
    control = {made(kind).token_to_id(token) for token in CONTROL[1:]}
    builder = PromptBuilder(
        made(kind), template=TEMPLATES["chat"], max_length=500, pad_id=0,
    )  # fmt: skip
    text = f"the {name}{name} {name}user"
    documents = builder.encode_documents([text, name]).ids
    context = builder.context(f"{name}?", documents)
    template = [made(kind).token_to_id(token) for token in (*CONTROL[3:], CONTROL[3])]
    assert [token for token in context if token in control] == template
    assert [token for token in builder.target(name) if token in control] == [template[1]]
    assert documents[0].text == text


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_an_answer_is_learnt_and_stops_generation(kind):
    lm = dataclasses.replace(tiny_language_model(), tokenizer=made(kind), eos_ids=(2,))
    prompts = training_prompts(PromptConfig(), lm)
    *answer, end = prompts.target("Paris")
    assert end in answer_limits(lm, 8).stop_ids
    assert lm.tokenizer.decode(answer).strip(" ").replace(" ##", "").lower() == "paris"
    text = "The\n\nQuestion: x\nAnswer: Paris"
    context = prompts.context("x", prompts.encode_documents(["The"]).ids)
    assert [*context, *answer] == ids_of(lm.tokenizer, text)
    if end != 2:
        assert [*context, *answer, end] == ids_of(lm.tokenizer, text + "\n")
    # Where a line break is no token, only the end of the text is left.
    assert (end == 2) == kind.startswith(("wordpiece", "unigram"))


def test_a_model_that_cannot_learn_to_stop_is_named(caplog):
    lm = dataclasses.replace(tiny_language_model(), tokenizer=made("wordpiece"), eos_ids=())
    assert answer_end_id(lm) is None
    assert "cannot learn where an answer ends" in caplog.text


def test_ids_without_a_text_stay_as_they_are():
    joiner = TextJoiner(made("sentencepiece with a prefix"))
    tail = ids_of(made("sentencepiece with a prefix"), "x\nAnswer")[2:]
    assert joiner.join([[7, 8], "\nAnswer"]) == [7, 8, *tail]
    assert isinstance(joiner.cut("Paris is it", 2), DocumentIds)
