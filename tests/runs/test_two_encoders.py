"""Runs whose queries and documents are embedded by two models, and published RAG checkpoints."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import load_script
from safetensors.numpy import save_file

from ragjax.losses import pdist_loss
from ragjax.models import Tokens
from ragjax.models.files.key_table import named_tensors
from ragjax.models.testing import tiny_encoder, write_tiny_encoder
from ragjax.models.testing.language_model import tiny_language_model
from ragjax.runs.indexes import build_bm25, build_towers
from ragjax.runs.inputs import run_inputs
from ragjax.runs.models import load_encoders, load_lm
from ragjax.runs.options.dual import AdaptConfig, RetrieverConfig
from ragjax.runs.options.end_to_end import RagConfig, ReaderConfig, TrainingConfig
from ragjax.runs.options.shared import DataConfig, TowersConfig
from ragjax.runs.saved import adapted_encoder, open_run
from ragjax.runs.system import by_dense, open_base_system, open_system, retrieve
from ragjax.runs.tokens import query_ids
from ragjax.runs.train.batches import RagBatches
from ragjax.runs.workspace import open_workspace, tower_params
from ragjax.training.live import StepDocuments
from ragjax.training.loop import StopFlag
from ragjax.training.lsr import LsrBatch, make_lsr_loss


@pytest.fixture(scope="module")
def two(tiny_inputs, tmp_path_factory):
    """Flags of two encoders of different architectures, and the other models and data."""
    folder = tmp_path_factory.mktemp("two")
    query = write_tiny_encoder(folder / "query", seed=1)
    doc = write_tiny_encoder(folder / "doc", seed=2, family="roberta")
    rest = {name: tiny_inputs[name] for name in ("data", "lm")}
    return rest | {"query_encoder": str(query), "doc_encoder": str(doc)}


def embed(encoder, texts):
    rows = [encoder.tokenizer.encode(text).ids for text in texts]
    length = max(map(len, rows))
    ids = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
    mask = np.array([[i < len(row) for i in range(length)] for row in rows])
    return np.asarray(encoder.encode(encoder.params, Tokens(jnp.asarray(ids), jnp.asarray(mask))))


@pytest.fixture(scope="module")
def opened(two, tmp_path_factory):
    folder = tmp_path_factory.mktemp("opened")
    config = RagConfig(
        **two,
        query_prefix="ask ",
        doc_prefix="tell ",
        output=str(folder),
        data_options=DataConfig(train_questions=4, dev_questions=2, test_questions=2),
        language_model=ReaderConfig(train_layers=1),
        training=TrainingConfig(batch_size=2, documents=2),
        retriever=TowersConfig(train="both"),
    )
    return config, open_workspace(config, folder, stop=StopFlag(), log=lambda _: None)


def test_each_side_is_embedded_by_its_own_model_with_its_own_prefix(opened, two):
    config, workspace = opened
    encoders = load_encoders(config)
    assert encoders.query.family is not encoders.doc.family
    towers = tower_params(workspace)
    assert set(towers) == {"query", "doc"}
    retriever = build_towers(workspace, build_bm25(workspace), towers, 0)
    passage, question = workspace.dataset.corpus[3], workspace.questions["test"][0]
    doc = embed(encoders.doc, [f"tell {passage.title}\n{passage.text}"])[0]
    np.testing.assert_allclose(retriever.embeddings[3], doc, atol=1e-5)
    query = embed(encoders.query, [f"ask {question.text}"])
    found = workspace.encode_queries(retriever.query_params, [question])
    np.testing.assert_allclose(found, query, atol=1e-5)
    inputs = run_inputs(workspace)
    assert inputs["query encoder"] != inputs["doc encoder"] and "encoder" not in inputs


def test_a_batch_has_the_query_encoders_tokens(opened):
    config, workspace = opened
    batches = RagBatches(workspace, config)
    found = build_bm25(workspace).search([q.text for q in workspace.questions["train"][:2]], 2)
    batch, _ = batches.prepare(StepDocuments(0, np.arange(2), found))
    expected = query_ids(workspace.query_encoder, workspace.questions["train"][:1])[0]
    np.testing.assert_array_equal(batch.queries.ids[0, : len(expected)], expected)


def test_the_loss_encodes_queries_with_their_own_function():
    def rows(params, tokens):
        return params["table"][tokens.ids[:, 0]]

    def doubled(params, tokens):
        return 2 * rows(params, tokens)

    table = {"table": jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)}
    texts = Tokens(jnp.arange(4)[:, None], jnp.ones((4, 1), bool))
    everyone = jnp.ones((4, 4), bool)
    batch = LsrBatch(texts, texts, jnp.log(jnp.eye(4)), everyone, jnp.ones(4, bool))
    params = {"query": table, "doc": table}

    def loss(scale, encode_queries=None):
        made = make_lsr_loss(
            rows, pdist_loss, scale=scale, in_batch=False, encode_queries=encode_queries
        )
        return float(made(params, None, batch, jax.random.key(0))[0])

    assert loss(1.0, doubled) == pytest.approx(loss(2.0), rel=1e-6)
    assert loss(1.0) != pytest.approx(loss(2.0), rel=1e-2)


def test_two_models_are_never_trained_as_one(two):
    with pytest.raises(ValueError, match=r"retriever.train shared .*--retriever.train both"):
        AdaptConfig(**two)
    AdaptConfig(**two, stages=("lm",))  # the retriever stays as it is
    AdaptConfig(**two, retriever=RetrieverConfig(train="both"))


@pytest.mark.parametrize(
    ("family", "words"), [("dpr", "dimensions 16 there, 12 here"), (None, "context encoder")]
)
def test_encoders_that_do_not_share_a_space_are_refused(two, tmp_path, family, words):
    doc = str(write_tiny_encoder(tmp_path, family=family) if family else write_rag(tmp_path))
    config = AdaptConfig(**two | {"doc_encoder": doc}, stages=("lm",))
    with pytest.raises(ValueError, match=words) as error:
        load_encoders(config)
    assert "--doc_encoder" in str(error.value)


def test_base_models_of_two_encoders_answer(two, tmp_path):
    config = AdaptConfig(**two, stages=("lm",))
    system = open_base_system(config, cache=tmp_path, log=lambda _: None)
    found = retrieve(system, ["what does the red owl like?"], 3, by=by_dense)
    query = embed(load_encoders(config).query, ["what does the red owl like?"])[0]
    expected = np.argsort(-(system.retriever.embeddings @ query))[:3]
    np.testing.assert_array_equal(found.found.doc_ids[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize(("program", "train"), [("adapt", "both"), ("train_rag", "query")])
def test_a_run_of_two_encoders_trains_is_opened_and_exported(two, tmp_path, program, train):
    run = tmp_path / "run"
    size = "--training.batch_size=4" if program == "train_rag" else "--retriever.batch_size=4"
    flags = [*(f"--{name}={value}" for name, value in two.items()), f"--output={run}", size,
             "--keep=last",
             f"--retriever.train={train}", "--language_model.train_layers=1",
             "--retriever.learning_rate=0.01", "--data_options.train_questions=8",
             "--data_options.test_questions=4", "--data_options.answer_questions=2",
             "--evaluation.max_new_tokens=3", "--evaluation.resamples=20"]  # fmt: skip
    flags += ["--refresh.mode=query_only"] * (program == "train_rag")
    script = load_script(f"experiments/{program}.py")
    assert script.main(flags) == 0
    assert script.main(flags) == 0  # again: nothing is repeated, nothing refused
    finished, base = open_run(run), load_encoders(open_run(run).config)
    for tower in ("query", "doc"):
        output = tmp_path / tower
        export = load_script("experiments/export.py").main
        assert export([f"--run={run}", f"--what={tower}_encoder", f"--output={output}"]) == 0
        trained = adapted_encoder(finished, tower)
        assert trained.family is getattr(base, tower).family
        moved = jax.tree.map(
            lambda a, b: float(jnp.abs(a - b).max()), trained.params, getattr(base, tower).params
        )
        assert (max(jax.tree.leaves(moved)) > 0) == (tower == "query" or train == "both")
    predicted = json.loads((run / "predictions.jsonl").read_text().splitlines()[0])
    system = open_system(run, log=lambda _: None)
    found = retrieve(system, [predicted["question"]], 3, by=by_dense).found.doc_ids[0]
    ids = [system.workspace.dataset.corpus[int(row)].id for row in found]
    assert ids == predicted["systems"]["after"]["doc_ids"][:3]


def write_rag(folder):
    """Writes a published RAG checkpoint of tiny models, as transformers names its parts."""
    encoder, lm = tiny_encoder(seed=3, family="dpr"), tiny_language_model(4, "bart")
    table = encoder.family.key_table(encoder.config)
    tensors = {
        f"rag.question_encoder.{name}": np.asarray(tensor)
        for name, tensor in named_tensors(encoder.params, table).items()
    }
    generator = lm.family.save_params(lm.config, lm.params)
    tensors |= {f"rag.generator.{name}": np.asarray(tensor) for name, tensor in generator.items()}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    settings = {
        "model_type": "rag", "architectures": ["RagSequenceForGeneration"], "n_docs": 3,
        "question_encoder": encoder.family.format_config(encoder.config) | {"pad_token_id": 0},
        "generator": lm.family.format_config(lm.config) | {"pad_token_id": lm.pad_id},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    for name, tokenizer in (("question_encoder", encoder), ("generator", lm)):
        place = folder / f"{name}_tokenizer"
        place.mkdir()
        place.joinpath("tokenizer.json").write_text(tokenizer.tokenizer.to_str())
    return folder


def test_a_rag_checkpoint_gives_question_encoder_and_language_model(two, tmp_path):
    rag = str(write_rag(tmp_path / "rag"))
    doc = str(write_tiny_encoder(tmp_path / "ctx", seed=5, family="dpr"))
    config = AdaptConfig(
        **two | {"query_encoder": rag, "doc_encoder": doc, "lm": rag}, stages=("lm",),
        query_prefix="ask ", encoder_max_length=20,
    )  # fmt: skip
    encoders, lm = load_encoders(config), load_lm(config)
    assert (encoders.query.query_prefix, encoders.query.max_length) == ("ask ", 20)
    text = ["what does the owl like?"]
    plain = dataclasses.replace(tiny_encoder(seed=3, family="dpr"))
    np.testing.assert_allclose(embed(encoders.query, text), embed(plain, text), atol=1e-6)
    assert lm.family.has_encoder
    system = open_base_system(config, cache=tmp_path / "cache", log=lambda _: None)
    prompts = system.workspace.prompts
    read = prompts.context("who?", system.workspace.documents.get([0]))
    passage = system.workspace.dataset.corpus[0]
    shown = lm.tokenizer.decode(read)
    assert f"{passage.title} / {passage.text} // who?" in shown and "Question:" not in shown
