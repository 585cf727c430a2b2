"""RAG checkpoints against transformers: the question encoder, and the marginal likelihoods."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from seq2seq_reference import right_padded

from ragjax import losses
from ragjax.models.inputs import LMBatch, Tokens
from ragjax.models.rag import RagCheckpointConfig, load_rag
from ragjax.models.testing.seq2seq import tiny_seq2seq_tokenizer

QUESTIONS, DOCS, SLOTS, TOKENS, VOCAB = 2, 3, 8, 4, 259
ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
BART = {
    "vocab_size": VOCAB,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 36,
    "max_position_embeddings": 32,
}
T5 = {"vocab_size": VOCAB, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3}
T5 |= {"decoder_start_token_id": 0}


def write_rag(folder, kind, generator, *, projection=0, prefix=None):
    """A random checkpoint as transformers writes it, and its model."""
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")
    torch.manual_seed(0)
    make = transformers.BartConfig if generator is BART else transformers.T5Config
    config = transformers.RagConfig.from_question_encoder_generator_configs(
        transformers.DPRConfig(**ENCODER, projection_dim=projection),
        make(**generator),
        n_docs=DOCS,
        prefix=prefix,
    )
    model = getattr(transformers, f"Rag{kind}ForGeneration")(config).eval()
    for name, parameter in model.named_parameters():
        is_scale = parameter.ndim == 1 and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(is_scale), std=0.3)
    model.save_pretrained(folder)
    for name in ("question_encoder_tokenizer", "generator_tokenizer"):
        (folder / name).mkdir()
        tokenizer = tiny_seq2seq_tokenizer(with_start=generator is BART)
        tokenizer.save(str(folder / name / "tokenizer.json"))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rag")
    write_rag(path, "Token", BART)
    return path


def make_batch(rng, pad_id):
    lengths = np.array([[8, 5, 2], [6, 1, 7]])[..., None]
    mask = np.arange(SLOTS) >= SLOTS - lengths
    ids = rng.integers(3, VOCAB, mask.shape).astype(np.int32)
    target_mask = np.arange(TOKENS) < np.array([[4], [2]])
    # transformers tells padding by its id.
    drawn = rng.integers(3, VOCAB, target_mask.shape)
    return ids, mask, np.where(target_mask, drawn, pad_id).astype(np.int32), target_mask


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "loss", "generator", "projection"),
    [
        ("Sequence", losses.rag_sequence_loss, BART, 0),
        ("Token", losses.rag_token_loss, BART, 12),
        ("Token", losses.rag_token_loss, T5, 0),
    ],
)
def test_losses_and_query_embeddings_equal_transformers(
    kind, loss, generator, projection, tmp_path, rng
):
    import torch

    reference = write_rag(tmp_path, kind, generator, projection=projection)
    rag = load_rag(str(tmp_path))
    lm = rag.language_model
    pad_id = reference.config.generator.pad_token_id
    ids, mask, targets, target_mask = make_batch(rng, pad_id)
    scores = rng.normal(size=(QUESTIONS, DOCS)).astype(np.float32)

    flat_ids, flat_mask = ids.reshape(-1, SLOTS), mask.reshape(-1, SLOTS)
    repeated = LMBatch(
        flat_ids, flat_mask, *(np.repeat(arr, DOCS, axis=0) for arr in (targets, target_mask))
    )
    log_probs = jax.jit(lm.token_log_probs)(lm.params, repeated)
    found = loss(scores, log_probs.reshape(QUESTIONS, DOCS, -1), token_mask=target_mask)

    start = np.full((QUESTIONS, 1), lm.config.decoder_start_id)
    moved_ids, moved_mask = right_padded(flat_ids, flat_mask)
    with torch.no_grad():
        expected = reference(
            context_input_ids=torch.tensor(moved_ids).long(),
            context_attention_mask=torch.tensor(moved_mask).long(),
            doc_scores=torch.tensor(scores),
            labels=torch.tensor(np.concatenate([start, targets], axis=1)).long(),
        ).loss
        questions = torch.tensor(moved_ids).long()
        embedded = reference.question_encoder(
            questions, attention_mask=torch.tensor(moved_mask).long()
        ).pooler_output
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)
    encoder = rag.query_encoder
    embeddings = jax.jit(encoder.encode)(encoder.params, Tokens(moved_ids, moved_mask))
    np.testing.assert_allclose(embeddings, embedded.numpy(), rtol=1e-4, atol=1e-4)
    assert encoder.embedding_size == (projection or 16)
    assert rag.config.architecture == f"Rag{kind}ForGeneration"
    assert rag.config.num_documents == DOCS


def test_contexts_are_joined_as_transformers_joins_them(tmp_path):
    retrieval = pytest.importorskip(
        "transformers.models.rag.retrieval_rag", reason="needs the [parity] extra"
    )
    reference = write_rag(tmp_path, "Token", BART, prefix="ask: ")
    rag = load_rag(str(tmp_path))
    joined = []

    def keep(texts, **_):
        joined.extend(texts)
        return {"input_ids": None, "attention_mask": None}

    retriever = SimpleNamespace(
        config=reference.config,
        generator_tokenizer=SimpleNamespace(batch_encode_plus=keep, __call__=keep),
        return_tokenized_docs=False,
    )
    tokenizer_class = type("Keep", (), {"__call__": lambda self, t, **k: keep(t)})
    retriever.generator_tokenizer = tokenizer_class()
    titles, texts = ['"Fox"', "Hen"], ["A  fox.", "A hen."]
    retrieval.RagRetriever.postprocess_docs(
        retriever, [{"title": titles, "text": texts}], ["who?"], "ask: ", 2, return_tensors="np"
    )
    ours = [rag.config.context(*pair, "who?") for pair in zip(titles, texts, strict=True)]
    assert ours == joined == ["ask: Fox / A fox. // who?", "ask: Hen / A hen. // who?"]


def test_the_parts_are_complete_models(folder):
    rag = load_rag(str(folder))
    assert rag.language_model.text_format == ((257,), (256,), 257)
    assert rag.language_model.eos_ids == (2,)  # as the generator's configuration says
    assert rag.query_encoder.pooling == "cls" and not rag.query_encoder.normalized
    assert rag.query_encoder.max_length == 32
    assert rag.config == RagCheckpointConfig(
        num_documents=DOCS, architecture="RagTokenForGeneration"
    )


def copy_of(folder, tmp_path, *, settings=None, tensors=None):
    """The checkpoint with another configuration or other tensors."""
    for path in folder.rglob("*.json"):
        copy = tmp_path / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    found = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(found | (settings or {})))
    save_file(
        load_file(folder / "model.safetensors") | (tensors or {}), tmp_path / "model.safetensors"
    )
    return str(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generator": {"model_type": "gpt2"}}, "generator is of model_type 'gpt2'.*bart, t5 is"),
        ({"question_encoder": {"model_type": "bert"}}, "question_encoder is of .*'bert'.*dpr is"),
        ({"question_encoder": [1]}, r"question_encoder must be .*\(an object\), got \[1\]"),
        ({"n_docs": "5"}, "n_docs must be of type int, got '5'"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(folder, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        load_rag(copy_of(folder, tmp_path, settings=settings))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rag.reader.weight", "unexpected tensor rag.reader.weight; the names"),
        ("rag.generator.model.extra", "unexpected tensor (model.)?extra"),
        ("rag.question_encoder.question_encoder.extra", "unexpected tensor question_encoder.extra"),
        ("generator.model.encoder.layers.0.fc1.bias", "generator.*are the same parameter twice"),
    ],
)
def test_a_tensor_that_belongs_nowhere_is_refused(folder, tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        load_rag(copy_of(folder, tmp_path, tensors={name: np.zeros(3, np.float32)}))


def test_tokenizers_in_the_old_formats_are_read(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fox", "##es"]
    old = tmp_path / "question_encoder_tokenizer"
    (old / "tokenizer.json").unlink()
    (old / "vocab.txt").write_text("\n".join(words))
    old = tmp_path / "generator_tokenizer"
    (old / "tokenizer.json").unlink()
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b", "ab"]
    (old / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (old / "merges.txt").write_text("#version: 0.2\na b\n")
    rag = load_rag(copy)
    assert rag.query_encoder.tokenizer.encode("A foxes").ids == [2, 5, 6, 7, 3]
    assert rag.language_model.tokenizer.encode("ab").ids == [0, 7, 2]
    assert rag.language_model.bos_id == 0 and rag.language_model.pad_id == 1
