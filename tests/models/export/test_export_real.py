"""The two real checkpoints, exported and read by the programs that serve them."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ragjax.data import encode_texts, pad_right, passage_text, read_beir, write_python_docs
from ragjax.models import (
    DEFAULT_ENCODER,
    DEFAULT_LM,
    LMBatch,
    Tokens,
    load_encoder,
    load_language_model,
)
from ragjax.models.export import export_encoder, export_language_model

NUM_DOCS, LENGTH = 160, 64


def loaded(load, source):
    try:
        return load(source)
    except OSError as error:
        pytest.skip(f"the weights are neither in the cache nor on the package index: {error}")


def tokens_of(encoder, texts):
    rows = encode_texts(encoder.tokenizer, texts, max_length=encoder.max_length).ids
    return Tokens(*map(jnp.asarray, pad_right(rows, length=LENGTH, pad_id=encoder.pad_id)))


def embed(encoder, texts):
    encode = jax.jit(encoder.encode)
    parts = [encode(encoder.params, tokens_of(encoder, texts[i : i + 40])) for i in _starts(texts)]
    return np.concatenate(parts)[: len(texts)]


def _starts(texts):
    assert len(texts) % 40 == 0  # one shape: one compilation
    return range(0, len(texts), 40)


def fine_tuned(encoder, questions, docs, *, steps):
    """A few contrastive steps; the parameters move visibly."""
    optimizer = optax.adam(1e-4)

    def loss(params, queries, docs):
        scores = 20 * encoder.encode(params, queries) @ encoder.encode(params, docs).T
        return -jnp.diagonal(jax.nn.log_softmax(scores)).mean()

    @jax.jit
    def step(params, state, queries, docs):
        grads = jax.grad(loss)(params, queries, docs)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    params, state = encoder.params, optimizer.init(encoder.params)
    for number in range(steps):
        rows = slice(8 * number, 8 * number + 8)
        batch = tokens_of(encoder, questions[rows]), tokens_of(encoder, docs[rows])
        params, state = step(params, state, *batch)
    return dataclasses.replace(encoder, params=params)


@pytest.mark.slow
def test_a_fine_tuned_minilm_finds_the_same_documents_there(tmp_path):
    package = pytest.importorskip("sentence_transformers", reason="needs the [parity] extra")
    base = dataclasses.replace(loaded(load_encoder, DEFAULT_ENCODER), max_length=LENGTH)
    write_python_docs(tmp_path / "docs")
    dataset = read_beir(tmp_path / "docs", cache=tmp_path / "cache")
    corpus, pairs = dataset.corpus, []
    for split, questions in dataset.questions.items():
        for question in questions:
            pairs += [(question.text, doc) for doc in list(dataset.qrels[split][question.id])[:1]]
    pairs = pairs[:NUM_DOCS]
    assert len(pairs) == NUM_DOCS
    questions = [question for question, _ in pairs]
    docs = [passage_text(corpus[corpus.row_of(doc)]) for _, doc in pairs]
    encoder = fine_tuned(base, questions, docs, steps=5)
    export_encoder(encoder, tmp_path / "out")
    model = package.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    found = {}
    for name, embedded in (
        ("here", (embed(encoder, questions), embed(encoder, docs))),
        ("there", (model.encode(questions), model.encode(docs))),
        ("before", (embed(base, questions), embed(base, docs))),
    ):
        queries, documents = embedded
        top = np.argsort(-(queries @ documents.T), axis=1, kind="stable")[:, :5]
        recall = float((top == np.arange(NUM_DOCS)[:, None]).any(axis=1).mean())
        found[name] = (queries, documents, top, recall)
    for part in (0, 1):
        np.testing.assert_allclose(found["there"][part], found["here"][part], atol=1e-5)
        assert np.abs(found["before"][part] - found["here"][part]).max() > 0.01
    assert found["there"][3] == found["here"][3] > 0.5
    # The same lists; where they differ, the documents' scores are equal up to rounding.
    queries, documents, top, _ = found["here"]
    scores = queries @ documents.T
    for row in range(NUM_DOCS):
        there = scores[row, found["there"][2][row]]
        np.testing.assert_allclose(there, scores[row, top[row]], atol=1e-5)


@pytest.mark.slow
def test_a_gguf_file_becomes_a_transformers_folder(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    import transformers

    lm = loaded(load_language_model, DEFAULT_LM)
    exported = export_language_model(lm, tmp_path / "out", max_shard_size=200_000_000)
    assert len(list((tmp_path / "out").glob("model-*-of-00003.safetensors"))) == 3
    assert exported.num_tensors == 272
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "The capital of France, in 2024:  naïve café"
    context = tokenizer(text)["input_ids"]
    assert context == lm.tokenizer.encode(text).ids
    talk = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert talk.endswith("<|im_start|>user\nhi<|im_end|>\n")
    target = lm.tokenizer.encode(" is Paris, and of Italy it is Rome.").ids
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    state = model.state_dict()
    named = lm.family.save_params(lm.config, lm.params)
    assert all(np.array_equal(state[name].numpy(), tensor) for name, tensor in named.items())
    with torch.inference_mode():
        logits = model(torch.tensor([context + target])).logits[0]
    there = logits.double().log_softmax(-1)[len(context) - 1 : -1].numpy()
    there = there[np.arange(len(target)), target]
    batch = LMBatch(
        *(jnp.asarray([part]) for part in (context, [True] * len(context))),
        *(jnp.asarray([part]) for part in (target, [True] * len(target))),
    )
    here = np.asarray(jax.jit(lm.token_log_probs)(lm.params, batch))[0]
    np.testing.assert_allclose(here, there, atol=1e-4)
    del model, state, named
    gc.collect()
    again = load_language_model(str(tmp_path / "out"))
    assert again.config == lm.config
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)
