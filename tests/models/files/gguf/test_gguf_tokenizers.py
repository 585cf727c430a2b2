"""Tokenizers rebuilt from metadata against the plain algorithm and against transformers' own."""

import functools
import json
import random
import unicodedata

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ragjax.models.files.gguf.tokenizer import bos_id, build_tokenizer, eos_ids, token_id

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
TEXTS = [
    "",
    " ",
    "The capital of France is Paris.",
    "  two spaces in front,\ttab\nand lines \n\n\n end ",
    "In 2024, 1234567 people paid $3.50 for v1.2.3!!!",
    "naïve café, schöne Grüße, Ünïcödé, ﬁ ligature, e\u0301 combining",
    "日本語のテキスト и русский, العربية, ภาษาไทย",
    "emoji 😀👩‍👩‍👧🏽 and ½ ² ٣ ①",
    "don't we'll I'M they've HTMLParser camelCase",
    "x = f(a[0], **{'b': 1})  # comment\n\treturn\r\n",
    "a" * 60,
]


def random_texts(seed, count=200):
    """Runs of letters, digits, spaces, line breaks and marks of several scripts."""
    generator = random.Random(seed)
    pieces = [
        "e",
        "th",
        "ing",
        "Q",
        "7",
        "42",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        ".",
        "'s",
        "'LL",
        "–",
    ]
    pieces += [
        "é",
        "ß",
        "Ж",
        "中",
        "文",
        "あ",
        "ع",
        "\u0301",
        "😀",
        "\u200d",
        "½",
        "_",
        "/",
        "\x00",
    ]
    return ["".join(generator.choices(pieces, k=generator.randrange(1, 30))) for _ in range(count)]


# --- SentencePiece ------------------------------------------------------------------------------


@functools.cache
def sentence_piece_fields(**changes):
    """A vocabulary as Llama's: unknown, begin, end, the bytes, pieces by falling score."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    trainer = trainers.BpeTrainer(vocab_size=260, show_progress=False)
    # Without characters from other scripts, which then fall back to bytes.
    corpus = [text for text in [*TEXTS, __doc__, *random_texts(1)] if text.isascii()]
    trained.train_from_iterator(corpus * 3, trainer)
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    # As in Llama's vocabulary, line breaks are bytes, alone and in no piece.
    pieces = [piece for piece in pieces if not set(piece) & {"\x00", "\n"}]
    merged = [piece for piece in pieces if len(piece) > 1]
    single = [piece for piece in pieces if len(piece) == 1]
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*head, *merged, *single, "<|user|>", "<keep>"]
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(merged) + len(single))
    scores = [0.0] * len(head) + [-float(rank) for rank in range(len(merged) + len(single))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [*scores, -1e4, -1e4],
        "tokenizer.ggml.token_type": [*kinds, CONTROL, USER_DEFINED],
        **changes,
    }


def plain_sentence_piece(text, fields, *, prefixed=True):
    """The pair whose union scores best joins, the leftmost of equals; what is left gives bytes."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    ids = {token: place for place, token in enumerate(tokens)}
    scores = {
        token: score
        for token, score, kind in zip(tokens, fields["tokenizer.ggml.scores"], kinds, strict=True)
        if kind == NORMAL
    }
    parts = list(("▁" * bool(text and prefixed) + text).replace(" ", "▁"))
    while len(parts) > 1:
        pairs = [left + right for left, right in zip(parts, parts[1:], strict=False)]
        best = max(range(len(pairs)), key=lambda i: (scores.get(pairs[i], -1e9), -i))
        if pairs[best] not in scores:
            break
        parts[best : best + 2] = [pairs[best]]
    found = []
    for part in parts:
        known = part in ids
        found += [ids[part]] if known else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


@pytest.mark.parametrize("prefixed", [True, False])
def test_sentence_piece_equals_the_plain_algorithm(prefixed, tmp_path):
    fields = sentence_piece_fields()
    if not prefixed:
        fields = fields | {"tokenizer.ggml.add_space_prefix": False}
    tokenizer = build_tokenizer(tmp_path, fields)
    merged = 0
    for text in [*TEXTS, *random_texts(2)]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == plain_sentence_piece(text, fields, prefixed=prefixed), text
        assert tokenizer.decode(ids) == text
        merged += sum(
            len(fields["tokenizer.ggml.tokens"][index]) > 1 for index in ids if index > 258
        )
    assert merged > 300


def test_special_tokens_stay_whole_and_never_form(tmp_path):
    fields = sentence_piece_fields()
    tokenizer, count = build_tokenizer(tmp_path, fields), len(fields["tokenizer.ggml.tokens"])
    ids = tokenizer.encode("a<|user|><keep></s>b", add_special_tokens=False).ids
    assert [index for index in ids if index in (2, count - 1, count - 2)] == [
        count - 2,
        count - 1,
        2,
    ]
    assert tokenizer.decode([count - 2, count - 1]) == "<keep>"
    # The text "<0x0A>" is six characters, not the line break.
    assert 3 + 10 not in tokenizer.encode("<0x0A>", add_special_tokens=False).ids
    assert tokenizer.encode("\n", add_special_tokens=False).ids[-1] == 3 + 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the peer
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_sentence_piece_equals_transformers(architecture, tmp_path):
    fields = sentence_piece_fields()
    if architecture == "gemma3":
        fields = fields | {"tokenizer.ggml.add_space_prefix": False}
        swapped = {"<s>": "<bos>", "</s>": "<eos>"}
        fields["tokenizer.ggml.tokens"] = [
            swapped.get(token, token) for token in fields["tokenizer.ggml.tokens"]
        ]
    tokenizer, reference = build_tokenizer(tmp_path, fields), by_transformers(architecture, fields)
    for text in [*TEXTS, *random_texts(3)]:
        # transformers puts no space before a text that starts with one, unlike SentencePiece.
        if architecture == "llama" and (not text or text.startswith(" ")):
            continue
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text, add_special_tokens=False).ids, text


def by_transformers(architecture, fields):
    """The tokenizer that transformers makes of the same metadata."""
    mapping = pytest.importorskip(
        "transformers.integrations.gguf.gguf_tokenizer_mapping", reason="needs the [parity] extra"
    )
    names = mapping.GGUF_TOKENIZER_MAPPING["tokenizer"]
    found = {
        name: fields[f"tokenizer.{key}"]
        for key, name in names.items()
        if f"tokenizer.{key}" in fields
    }
    return mapping.convert_gguf_tokenizer(architecture, found)[0]


# --- byte level ---------------------------------------------------------------------------------


@functools.cache
def byte_level_fields():
    """A byte-level BPE of a few hundred tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, initial_alphabet=alphabet)
    trained.train_from_iterator([*TEXTS, __doc__, *random_texts(4)] * 3, trainer)
    tokens = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    merges = json.loads(trained.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*tokens, "<|end|>", "<think>"],
        "tokenizer.ggml.token_type": [NORMAL] * len(tokens) + [CONTROL, USER_DEFINED],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the peer
@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_byte_level_equals_transformers(pre, tmp_path):
    fields = byte_level_fields() | {"tokenizer.ggml.pre": pre}
    tokenizer, reference = build_tokenizer(tmp_path, fields), by_transformers("llama", fields)
    for text in [*TEXTS, *random_texts(5), "a<|end|> b<think>c"]:
        # Of a GGUF file, transformers leaves out the normalisation that Qwen2 has.
        text = unicodedata.normalize("NFC", text)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text, add_special_tokens=False).ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_qwen2_composes_letters_and_marks(tmp_path):
    fields = byte_level_fields() | {"tokenizer.ggml.pre": "qwen2"}
    tokenizer = build_tokenizer(tmp_path, fields)
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids


def test_llama3_takes_known_words_whole(tmp_path):
    """Also where no merges lead to them."""
    fields = dict(byte_level_fields())
    fields["tokenizer.ggml.tokens"] = [*fields["tokenizer.ggml.tokens"], "Ġzqzqz"]
    fields["tokenizer.ggml.token_type"] = [*fields["tokenizer.ggml.token_type"], NORMAL]
    last = len(fields["tokenizer.ggml.tokens"]) - 1
    for pre, whole in (("llama-bpe", True), ("tekken", True), ("qwen2", False), ("gpt-2", False)):
        tokenizer = build_tokenizer(tmp_path, fields | {"tokenizer.ggml.pre": pre})
        assert (tokenizer.encode(" zqzqz").ids == [last]) == whole


# --- ids and refusals ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "bos"),
    [
        ("spm", {}, 1),
        ("spm", {"add_bos_token": False}, None),
        ("spm", {"bos_token_id": 2}, 2),
        ("gpt-2", {"bos_token_id": 2}, None),
        ("gpt-2", {"bos_token_id": 2, "add_bos_token": True}, 2),
        ("gpt-2", {"add_bos_token": True}, None),
        ("llama-bpe", {"bos_token_id": 2}, 2),
        ("tekken", {"bos_token_id": 2}, 2),
        ("qwen2", {"bos_token_id": 2}, None),
    ],
)
def test_the_first_token_is_the_one_that_llama_cpp_adds(tmp_path, kind, changes, bos):
    fields = sentence_piece_fields() if kind == "spm" else byte_level_fields()
    fields = fields | ({} if kind == "spm" else {"tokenizer.ggml.pre": kind})
    fields |= {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    assert bos_id(tmp_path, fields) == bos


def test_only_control_tokens_end_a_turn(tmp_path):
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<pad>", "<eos>", "<bos>", "<end_of_turn>", "</s>"],
        "tokenizer.ggml.token_type": [CONTROL, CONTROL, CONTROL, CONTROL, USER_DEFINED],
        "tokenizer.ggml.eos_token_id": 1,
    }
    assert eos_ids(tmp_path, fields) == (1, 3)
    assert eos_ids(tmp_path, fields | {"tokenizer.ggml.eot_token_id": 0}) == (1, 0, 3)


@pytest.mark.parametrize("value", [-1, 5000, 1.0, True, "1", [1]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, value):
    fields = sentence_piece_fields() | {"tokenizer.ggml.padding_token_id": value}
    with pytest.raises(ValueError, match="tokenizer.ggml.padding_token_id is .*, not an id of"):
        token_id(tmp_path, fields, "padding_token_id")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": []}, "tokens is empty"),
        ({"tokens": "abc"}, "tokens is not an array of str"),
        ({"tokens": ["a", 3]}, "tokens is not an array of str"),
        ({"token_type": [1]}, "token_type has 1 entries for .* tokens"),
        ({"scores": [0.0]}, "scores has 1 entries for .* tokens"),
        ({"scores": None}, "scores is not an array of float"),
        ({"unknown_token_id": 10**6}, "unknown_token_id is 1000000, not an id of"),
        ({"model": "bert"}, "tokenizer 'bert' with pre-tokenizer None; supported: 'llama'"),
        ({"model": "gpt2"}, "tokenizer 'gpt2' with pre-tokenizer None"),
        ({"model": "gpt2", "pre": "default"}, "tokenizer 'gpt2' with pre-tokenizer 'default'"),
        ({"model": "gpt2", "pre": ["x"]}, "tokenizer 'gpt2' with pre-tokenizer"),
        ({"model": "gpt2", "pre": "qwen2"}, "merges is not an array of str"),
        ({"model": "gpt2", "pre": "qwen2", "merges": ["a"]}, "a merge is not two tokens"),
        ({"model": "gpt2", "pre": "qwen2", "merges": ["a b c"]}, "a merge is not two tokens"),
        ({"model": "gpt2", "pre": "qwen2", "merges": ["zz yy"]}, "the tokenizer cannot be built"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path, changes, message):
    changes = {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    fields = {
        name: value
        for name, value in (sentence_piece_fields() | changes).items()
        if value is not None
    }
    with pytest.raises(ValueError, match=message) as raised:
        build_tokenizer(tmp_path / "a.gguf", fields)
    assert str(raised.value).startswith(str(tmp_path / "a.gguf"))
