"""Cross-encoders: the same scores as sentence-transformers, and folders that are none."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoder_folders import edit_json

from ragjax.data import encode_pairs, pad_right
from ragjax.models import load_cross_encoder
from ragjax.models.inputs import PairTokens
from ragjax.models.testing import write_tiny_cross_encoder, write_tiny_encoder

PAIRS = [
    ("what does the red cat like?", "the red cat likes 7"),
    ("who?", "a much longer passage, which does not fit into the sixty four tokens of the model"),
    ("a question that is longer than its passage, and longer than the model reads, too", "ok"),
    ("where is it", "here"),
]


def tokens_of(model, pairs):
    ids, types = encode_pairs(model.tokenizer, pairs)
    length = max(map(len, ids))
    padded = pad_right(ids, length=length, pad_id=model.pad_id)
    kinds = pad_right(types, length=length, pad_id=0).ids
    return PairTokens(
        jnp.asarray(padded.ids),
        jnp.asarray(padded.mask),
        jnp.asarray(kinds) if model.typed else None,
    )


def scores_of(model, pairs=PAIRS):
    return np.asarray(jax.jit(model.score)(model.params, tokens_of(model, pairs)))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bert", {}),
        ("roberta", {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}),
        ("modernbert", {"sentence_transformers": {"activation_fn": "torch.nn.Tanh"}}),
        ("modernbert", {"classifier_pooling": "mean", "classifier_activation": "relu"}),
    ],
)
def test_the_scores_are_those_of_sentence_transformers(tmp_path, family, settings):
    reason = "needs the [parity] extra"
    pytest.importorskip("torch", reason=reason)
    reference = pytest.importorskip("sentence_transformers", reason=reason)
    folder = write_tiny_cross_encoder(tmp_path / "model", 3, family, **settings)
    theirs = reference.CrossEncoder(str(folder), device="cpu", local_files_only=True)
    model = load_cross_encoder(str(folder))
    ours = scores_of(model)
    np.testing.assert_allclose(ours, theirs.predict(PAIRS, show_progress_bar=False), atol=2e-5)
    assert np.ptp(ours) > 1e-3
    saved = tmp_path / "saved"
    theirs.save_pretrained(str(saved))
    np.testing.assert_array_equal(scores_of(load_cross_encoder(str(saved))), ours)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_a_score_is_the_activation_of_a_logit_and_ignores_padding(tmp_path, family):
    model = load_cross_encoder(str(write_tiny_cross_encoder(tmp_path / "model", 1, family)))
    logits = np.asarray(jax.jit(model.logits)(model.params, tokens_of(model, PAIRS)))
    np.testing.assert_allclose(scores_of(model), 1 / (1 + np.exp(-logits)), rtol=1e-5)
    alone = scores_of(model, PAIRS[:1])
    np.testing.assert_allclose(alone, scores_of(model)[:1], atol=1e-5)
    assert model.typed == (family == "bert")


def test_the_longer_text_of_a_pair_is_cut_first_and_types_count(tmp_path):
    model = load_cross_encoder(str(write_tiny_cross_encoder(tmp_path / "model")))
    ids, types = encode_pairs(model.tokenizer, PAIRS)
    assert [len(row) for row in ids] == [len(row) for row in types]
    assert len(ids[1]) == len(ids[2]) == model.max_length == 64
    assert types[1].count(0) == len("who?") + 2 and types[2].count(1) == len("ok") + 1
    tokens = tokens_of(model, PAIRS)
    without = model.score(model.params, tokens._replace(types=None))
    assert abs(np.asarray(without) - scores_of(model)).max() > 1e-3
    shorter = load_cross_encoder(str(tmp_path / "model"), max_length=12)
    assert max(map(len, encode_pairs(shorter.tokenizer, PAIRS).ids)) == 12
    assert shorter.fingerprint != model.fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id2label": {"0": "no", "1": "yes"}}, r"config.json: the head has 2 labels .*one label"),
        ({"model_type": "electra"}, r"config.json: model_type 'electra' is not supported"),
        (
            {"sbert_ce_default_activation_function": "os.system"},
            r"config.json: activation 'os.system' is not supported; those of torch.nn",
        ),
        ({"classifier_pooling": "max"}, None),
    ],
)
def test_what_is_no_cross_encoder_is_refused(tmp_path, settings, message):
    folder = write_tiny_cross_encoder(tmp_path / "model", **settings)
    if message is None:  # a field of another family
        load_cross_encoder(str(folder))
        return
    with pytest.raises(ValueError, match=message):
        load_cross_encoder(str(folder))


def test_folders_and_lengths_that_do_not_fit_are_refused(tmp_path):
    encoder = write_tiny_encoder(tmp_path / "encoder")
    edit_json(encoder / "config.json", id2label={"0": "LABEL_0"})
    (encoder / "modules.json").unlink()
    with pytest.raises(ValueError, match=r"no tensor pooler.dense.weight, so no classification"):
        load_cross_encoder(str(encoder))
    folder = write_tiny_cross_encoder(
        tmp_path / "modern", 0, "modernbert", classifier_pooling="max"
    )
    with pytest.raises(ValueError, match=r"classifier_pooling 'max' is not supported, one of"):
        load_cross_encoder(str(folder))
    folder = write_tiny_cross_encoder(tmp_path / "model")
    with pytest.raises(ValueError, match="max_length 65 is not between 5"):
        load_cross_encoder(str(folder), max_length=65)
    (folder / "modules.json").write_text(
        json.dumps([{"type": "x.Transformer"}, {"type": "x.Dense"}])
    )
    with pytest.raises(ValueError, match="a single Transformer for sequence classification is"):
        load_cross_encoder(str(folder))
    (folder / "modules.json").unlink()
    edit_json(folder / "config_sentence_transformers.json", default_prompt_name="query")
    with pytest.raises(ValueError, match="prompts are not supported here"):
        load_cross_encoder(str(folder))
    with pytest.raises(ValueError, match="not from GGUF"):
        (tmp_path / "a.gguf").touch()
        load_cross_encoder(str(tmp_path / "a.gguf"))
