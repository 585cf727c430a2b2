"""What T5 and BART share: padding, the cache, frozen layers, loading, special tokens."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from seq2seq_reference import make_batch, right_padded, torch_log_probs
from tokenizers import Tokenizer

from ragjax.data import PromptBuilder
from ragjax.generation import Limits, score_and_generate
from ragjax.models import load_language_model
from ragjax.models.inputs import LMBatch
from ragjax.models.layers.stacks import cast_floats
from ragjax.models.seq2seq import model as seq2seq
from ragjax.models.testing import write_tiny_language_model
from ragjax.models.testing.seq2seq import tiny_seq2seq, tiny_seq2seq_config
from ragjax.models.trainable import SEQ2SEQ, join_layers, merge_trainable, split_trainable

FAMILIES = ("t5", "flan-t5", "bart")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny_seq2seq(family=request.param)


@pytest.fixture(scope="module", params=("t5", "bart"))
def two(request):
    return tiny_seq2seq(family=request.param)


@functools.lru_cache
def jitted_score(function, config):
    return jax.jit(functools.partial(function, config))


def score(model, batch, params=None):
    function = jitted_score(seq2seq.token_log_probs, model.config)
    return function(model.params if params is None else params, batch)


# --- padding ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_only_the_real_tokens_matter_wherever_they_stand(model, rng):
    batch = make_batch(rng, vocab_size=256)
    expected = score(model, batch)
    assert (np.asarray(expected)[~batch.target_mask] == 0).all()
    moved = batch._replace(**dict(zip(
        ("context_ids", "context_mask"),
        right_padded(batch.context_ids, batch.context_mask), strict=True,
    )))  # fmt: skip
    noise = rng.integers(0, 256, batch.context_ids.shape)
    noisy = moved._replace(
        context_ids=np.where(moved.context_mask, moved.context_ids, noise).astype(np.int32),
        target_ids=np.where(batch.target_mask, batch.target_ids, 5).astype(np.int32),
    )
    np.testing.assert_allclose(score(model, noisy), expected, atol=2e-5)
    # ... and the real ones do.
    other = batch._replace(context_ids=(batch.context_ids + 1) % 256)
    assert np.abs(np.asarray(score(model, other) - expected))[:, 0].min() > 1e-3


@pytest.mark.slow
def test_an_empty_context_has_a_finite_value_and_gradient(two, rng):
    batch = make_batch(rng, vocab_size=256)
    empty = batch._replace(context_mask=np.zeros_like(batch.context_mask))

    def loss(params):
        return two.token_log_probs(params, empty).sum()

    # The embedding's gradient passes through everything.
    embed, rest = {"embed": two.params["embed"]}, two.params
    gradient = jax.jit(jax.value_and_grad(lambda part: loss({**rest, **part})))
    leaves = jax.tree.leaves(gradient(embed))
    assert all(np.isfinite(leaf).all() for leaf in leaves)


@pytest.mark.parametrize(
    ("field", "shape", "message"),
    [
        ("context_ids", (4, 3), r"context_ids and .* must both .* \(4, 3\) and \(4, 11\)"),
        ("target_mask", (4, 5, 1), r"target_ids and .* must both .* \(4, 5\) and \(4, 5, 1\)"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(two, rng, field, shape, message):
    batch = make_batch(rng)._replace(**{field: np.zeros(shape, np.int32)})
    with pytest.raises(ValueError, match=message):
        two.token_log_probs(two.params, batch)


def test_as_many_contexts_as_targets_are_needed(two, rng):
    batch = make_batch(rng)
    fewer = LMBatch(batch.context_ids[:2], batch.context_mask[:2], *batch[2:])
    with pytest.raises(ValueError, match="as many contexts as targets .* 2 and 4 rows"):
        two.token_log_probs(two.params, fewer)


# --- options ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_recomputing_layers_changes_no_gradient(rng):
    model = tiny_seq2seq()
    batch = make_batch(rng, vocab_size=256)
    functions = []
    for remat in (False, True):

        def loss(params, remat=remat):
            return seq2seq.token_log_probs(model.config, params, batch, remat=remat).sum()

        functions.append(jax.grad(loss))
    plain, again = (jax.jit(function)(model.params) for function in functions)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), again, plain)
    traced = [str(jax.make_jaxpr(function)(model.params)) for function in functions]
    assert ["remat" in text for text in traced] == [False, True]


@pytest.mark.slow
def test_bfloat16_parameters_compute_in_bfloat16_and_score_in_float32(two, rng):
    batch = make_batch(rng, vocab_size=256)
    half = cast_floats(two.params, jnp.bfloat16)
    found = score(two, batch, half)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, score(two, batch), atol=0.3)
    encoded = jax.eval_shape(
        functools.partial(seq2seq.encode, two.config), half, batch.context_ids, batch.context_mask
    )
    assert encoded.dtype == jnp.bfloat16


# --- the cache ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_cached_decoding_equals_the_full_forward_at_every_step(model, rng):
    batch = make_batch(rng, vocab_size=256)
    rows, steps = batch.target_ids.shape
    everything = np.ones((rows, steps), bool)
    prefill = jax.jit(functools.partial(model.decoder.prefill, cache_length=11 + steps - 1))
    step = jax.jit(model.decoder.decode_step)
    state = prefill(model.params, batch.context_ids, batch.context_mask)
    full = score(model, batch._replace(target_mask=everything))
    if model.config.forced_first_id is not None:
        first = np.asarray(state.logits)
        assert np.isfinite(first).sum(axis=1).tolist() == [1] * rows
        assert (first.argmax(axis=1) == model.config.forced_first_id).all()
    for t in range(steps):
        if t or model.config.forced_first_id is None:
            log_probs = jax.nn.log_softmax(state.logits)
            found = log_probs[np.arange(rows), batch.target_ids[:, t]]
            np.testing.assert_allclose(found, full[:, t], atol=2e-5)
        if t + 1 < steps:
            state = step(model.params, state.cache, batch.target_ids[:, t])
    assert state.cache.keys_values.keys.shape[3] == steps  # the contexts take no slot
    assert state.cache.length == steps


@pytest.mark.slow
def test_scoring_with_the_cache_equals_scoring_without(model, rng):
    batch = make_batch(rng, vocab_size=256)
    limits = Limits(max_new_tokens=3, stop_ids=model.eos_ids)
    result = score_and_generate(model.decoder, model.params, batch, limits)
    np.testing.assert_allclose(result.token_log_probs, score(model, batch), atol=2e-5)
    assert result.generated.ids.shape == (4, 3)


def test_a_cache_shorter_than_the_contexts_is_refused(two, rng):
    batch = make_batch(rng)
    with pytest.raises(ValueError, match="cache_length=10 is shorter than the prompts"):
        two.decoder.prefill(two.params, batch.context_ids, batch.context_mask, cache_length=10)


# --- frozen layers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_layers", "embeddings"), [(None, True), (None, False), (1, False), (0, True)]
)
def test_split_parts_cover_everything(two, num_layers, embeddings):
    params = {**two.params, "final_bias": {"bias": jnp.ones((1, two.config.vocab_size))}}
    trainable, frozen = split_trainable(params, SEQ2SEQ, num_layers, embeddings=embeddings)
    merged = merge_trainable(trainable, frozen)
    jax.tree.map(np.testing.assert_array_equal, join_layers(merged), params)
    assert ("embed" in trainable) == embeddings
    assert ("encoder" in trainable) == (num_layers is None)
    assert "final_bias" in frozen


@pytest.mark.slow
def test_split_parts_compute_the_same(two, rng):
    merged = merge_trainable(*split_trainable(two.params, SEQ2SEQ, 1))
    batch = make_batch(rng, vocab_size=256)
    np.testing.assert_allclose(score(two, batch, merged), score(two, batch), atol=2e-5)
    prefill = jax.jit(functools.partial(two.decoder.prefill, cache_length=12))
    whole, parts = (prefill(params, *batch[:2]).logits for params in (two.params, merged))
    np.testing.assert_allclose(parts, whole, atol=1e-4)


def test_frozen_lower_layers_cost_no_backward_work(two, rng):
    batch = make_batch(rng)

    def scans(num_layers):
        trainable, frozen = split_trainable(two.params, SEQ2SEQ, num_layers)

        def loss(trainable):
            merged = merge_trainable(trainable, frozen)
            return seq2seq.token_log_probs(two.config, merged, batch).sum()

        jaxpr = jax.make_jaxpr(jax.grad(loss))(trainable)
        return [
            (equation.params["length"], equation.params["reverse"])
            for equation in jaxpr.jaxpr.eqns
            if equation.primitive.name == "scan"
        ]

    assert scans(1) == [(2, False), (2, False)]  # a single layer is written out
    assert scans(None) == [(2, False), (3, False), (3, True), (2, True)]


def test_the_number_of_learning_layers_is_checked(two):
    with pytest.raises(ValueError, match="num_layers must be between 0 and 3 .*got 4"):
        split_trainable(two.params, SEQ2SEQ, 4)


# --- checkpoints --------------------------------------------------------------------------------


def saved(model):
    return dict(model.family.save_params(model.config, model.params))


@pytest.mark.slow
def test_names_of_a_checkpoint_round_trip(model):
    merged = merge_trainable(*split_trainable(model.params, SEQ2SEQ, 2))
    tensors = model.family.save_params(model.config, merged)
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())
    again = model.family.load_params(model.config, tensors, source="memory")
    jax.tree.map(np.testing.assert_array_equal, again, model.params)


def test_a_final_bias_round_trips(rng):
    model = tiny_seq2seq(family="bart")
    bias = rng.normal(size=(1, model.config.vocab_size)).astype(np.float32)
    tensors = saved(model) | {"final_logits_bias": bias}
    params = model.family.load_params(model.config, tensors, source="memory")
    np.testing.assert_array_equal(params["final_bias"]["bias"], bias)
    again = dict(model.family.save_params(model.config, params))
    jax.tree.map(np.testing.assert_array_equal, again, tensors)


def test_copies_of_the_embedding_must_agree(two):
    tensors = saved(two)
    name = next(name for name in tensors if name.endswith("shared.weight"))
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    equal = dict.fromkeys(copies, tensors[name])
    again = two.family.load_params(two.config, tensors | equal, source="memory")
    jax.tree.map(np.testing.assert_array_equal, again, two.params)
    only = {key: value for key, value in tensors.items() if key != name}
    only |= {"encoder.embed_tokens.weight": tensors[name]}
    again = two.family.load_params(two.config, only, source="memory")
    jax.tree.map(np.testing.assert_array_equal, again, two.params)
    other = tensors | {"lm_head.weight": tensors[name] + 1}
    with pytest.raises(ValueError, match="shared.weight and lm_head.weight differ.*false"):
        two.family.load_params(two.config, other, source="memory")


def test_a_parameter_under_two_names_is_refused():
    model = tiny_seq2seq(family="bart")
    tensors = saved(model)
    name = "encoder.layers.0.fc1.bias"
    with pytest.raises(ValueError, match=f"model.{name} and {name} are the same parameter twice"):
        twice = tensors | {name: tensors[f"model.{name}"] + 1}
        model.family.load_params(model.config, twice, source="memory")


def test_an_unscaled_model_that_transformers_5_tied_is_filled_twice():
    model = tiny_seq2seq(family="flan-t5")
    settings = model.family.format_config(model.config)
    settings |= {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    config = model.family.parse_config(settings)
    assert config == model.config
    tensors = saved(model)
    params = model.family.load_params(config, tensors, source="memory")  # has its own: kept
    np.testing.assert_array_equal(params["unembed"]["kernel"], tensors.pop("lm_head.weight").T)
    params = model.family.load_params(config, tensors, source="memory")
    np.testing.assert_array_equal(params["unembed"]["kernel"], tensors["shared.weight"].T)


def test_a_lost_unembedding_is_not_replaced_by_the_embedding(tmp_path):
    write_tiny_language_model(tmp_path, family="flan-t5")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing tensor lm_head\.weight"):
        load_language_model(str(tmp_path))


def test_a_missing_tensor_is_named(two):
    tensors = saved(two)
    name = next(name for name in tensors if "encoder" in name and name.endswith("weight"))
    tensors.pop(name)
    with pytest.raises(ValueError, match=f"folder: .*\n.*missing tensor {name[-20:]}|missing"):
        two.family.load_params(two.config, tensors, source="folder")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_folder_is_read_by_pytorch_and_here(family, tmp_path, rng):
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")
    model = tiny_seq2seq(family=family)
    write_tiny_language_model(tmp_path / "ours", family=family)
    reference = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
    assert reference.dtype == torch.float32
    batch = make_batch(rng, vocab_size=256)
    found = np.asarray(score(model, batch))
    with torch.no_grad():
        expected = torch_log_probs(reference, batch, model.config.decoder_start_id).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    reference.save_pretrained(tmp_path / "theirs")
    model.tokenizer.save(str(tmp_path / "theirs" / "tokenizer.json"))
    for name in ("ours", "theirs"):
        loaded = load_language_model(str(tmp_path / name))
        assert loaded.config == model.config
        assert (loaded.bos_id, loaded.eos_ids, loaded.pad_id, loaded.text_format) == (
            model.bos_id, model.eos_ids, model.pad_id, model.text_format
        )  # fmt: skip
        jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
    assert load_language_model(str(tmp_path / "ours")).fingerprint == model.fingerprint


# --- special tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_prompts_get_the_special_tokens_that_the_tokenizer_would_add(family):
    model = tiny_seq2seq(family=family)
    layout = model.text_format
    prompts = PromptBuilder(
        model.tokenizer,
        max_length=model.max_length,
        pad_id=model.pad_id,
        bos_id=model.bos_id,
        end_id=layout.target_end_id,
        context_end_ids=layout.context_end_ids,
        target_start_ids=layout.target_start_ids,
    )
    document = prompts.encode_documents(["a fox"]).ids
    context = "a fox\n\nQuestion: who?\nAnswer:"
    assert prompts.context("who?", document) == model.tokenizer.encode(context).ids
    assert prompts.target("me") == model.tokenizer.encode(" me").ids
    cut = prompts.target("x" * 100)
    assert len(cut) + 1 == prompts.max_target_length  # all but the end
    assert len(prompts.context("who?", [[1] * 600])) <= prompts.max_context_length


def test_a_tokenizer_that_adds_nothing_leaves_the_end_to_the_configuration(tmp_path):
    write_tiny_language_model(tmp_path, family="t5")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain = json.loads(tokenizer.to_str()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    model = load_language_model(str(tmp_path))
    assert model.text_format == ((257,), (), 257)


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="family must be t5, flan-t5 or bart, got 'pegasus'"):
        tiny_seq2seq_config("pegasus")
