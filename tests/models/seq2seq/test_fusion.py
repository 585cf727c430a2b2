"""Fusion-in-Decoder against PyTorch, which is handed the concatenated encoder outputs."""

import functools

import jax
import numpy as np
import pytest
from seq2seq_reference import VOCAB, our_model, right_padded, torch_model
from test_bart import SIZES as BART_SIZES
from test_t5 import GATED
from test_t5 import SIZES as T5_SIZES

from ragjax.generation import Limits, Prompts, generate_greedy
from ragjax.losses import attention_mass
from ragjax.models.inputs import LMBatch
from ragjax.models.seq2seq import bart, t5
from ragjax.models.seq2seq.fusion import (
    FusionBatch,
    fusion_attention_mass,
    fusion_decoder,
    fusion_token_log_probs,
)
from ragjax.models.testing.seq2seq import tiny_seq2seq

QUESTIONS, CONTEXTS, SLOTS, TOKENS = 2, 3, 7, 4
CASES = {
    "t5": (t5.FAMILY, "T5", T5_SIZES),
    "flan": (t5.FAMILY, "T5", T5_SIZES | GATED | {"d_model": 16, "num_layers": 3}),
    "bart": (bart.FAMILY, "Bart", BART_SIZES),
}


@pytest.fixture
def batch(rng):
    """Contexts of 1 to 7 tokens, padded on the left with arbitrary ids; one of them is empty."""
    lengths = np.array([[7, 4, 2], [5, 0, 1]])[..., None]
    mask = np.arange(SLOTS) >= SLOTS - lengths
    ids = rng.integers(3, VOCAB, mask.shape).astype(np.int32)
    targets = rng.integers(3, VOCAB, (QUESTIONS, TOKENS)).astype(np.int32)
    return FusionBatch(ids, mask, targets, np.arange(TOKENS) < np.array([[4], [2]]))


@pytest.fixture(scope="module")
def model():
    return tiny_seq2seq()


def torch_fused(model, batch, start):
    """PyTorch's output with attentions, the encoder's states and their mask."""
    import torch
    from transformers.modeling_outputs import BaseModelOutput

    model.set_attn_implementation("eager")
    flat = (arr.reshape(-1, SLOTS) for arr in (batch.context_ids, batch.context_mask))
    ids, mask = right_padded(*flat)
    # PyTorch's result for a context without tokens is NaN: it gets one, and is masked after.
    safe = mask.copy()
    safe[:, 0] = True
    encoder = model.get_encoder()
    states = encoder(torch.tensor(ids).long(), attention_mask=torch.tensor(safe).long())[0]
    states = states.reshape(QUESTIONS, CONTEXTS * SLOTS, -1)
    mask = torch.tensor(mask.reshape(QUESTIONS, -1)).long()
    targets = torch.tensor(batch.target_ids).long()
    output = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        attention_mask=mask,
        decoder_input_ids=torch.cat([torch.full((QUESTIONS, 1), start), targets[:, :-1]], dim=1),
        output_attentions=True,
    )
    chosen = output.logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return output, chosen * torch.tensor(batch.target_mask), states, mask


def torch_value_norms(model, states):
    """Norms of the value vectors `[B, heads of all layers, K * L]`."""
    import torch

    if hasattr(model, "model"):
        attentions = [layer.encoder_attn for layer in model.model.decoder.layers]
        projections = [(attention.v_proj, attention.num_heads) for attention in attentions]
    else:
        attentions = [block.layer[1].EncDecAttention for block in model.decoder.block]
        projections = [(attention.v, attention.n_heads) for attention in attentions]
    norms = [
        project(states).reshape(*states.shape[:2], heads, -1).norm(dim=-1).transpose(1, 2)
        for project, heads in projections
    ]
    return torch.cat(norms, dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_log_probs_attention_and_gradients_equal_pytorch(case, batch):
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    family, kind, sizes = CASES[case]
    reference = torch_model(kind, sizes)
    config, params = our_model(family, reference)

    def total(params):
        log_probs = fusion_token_log_probs(config, params, batch)
        return log_probs.sum(), log_probs

    gradient, found = jax.jit(jax.grad(total, has_aux=True))(params)
    output, expected, states, mask = torch_fused(reference, batch, config.decoder_start_id)
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-4)

    # PyTorch's contexts are padded on the right: compare the sums over each one's tokens.
    norms = torch_value_norms(reference, states) * mask[:, None]
    shape = (QUESTIONS, -1, TOKENS, CONTEXTS, SLOTS)
    attention = torch.cat(output.cross_attentions, dim=1).reshape(shape)
    theirs = attention_mass(
        attention.detach().numpy(),
        norms.detach().numpy().reshape(QUESTIONS, -1, CONTEXTS, SLOTS),
        token_mask=batch.target_mask,
    )
    mass = jax.jit(functools.partial(fusion_attention_mass, config))(params, batch)
    np.testing.assert_allclose(mass, theirs, rtol=1e-4, atol=1e-5)
    assert mass[1, 1] == 0 and (np.delete(mass.ravel(), 4) > 1e-3).all()

    expected.sum().backward()
    slopes = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}
    slopes = family.load_params(config, slopes, source="gradients")
    gradient.pop("final_bias", None)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)
    jax.tree.map(close, gradient, slopes)


@pytest.mark.slow
def test_one_context_is_the_ordinary_score(model, batch):
    one = batch._replace(
        context_ids=batch.context_ids[:, :1], context_mask=batch.context_mask[:, :1]
    )
    plain = LMBatch(one.context_ids[:, 0], one.context_mask[:, 0], *batch[2:])
    found = jax.jit(functools.partial(fusion_token_log_probs, model.config))(model.params, one)
    expected = jax.jit(model.token_log_probs)(model.params, plain)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.slow
def test_contexts_without_tokens_and_their_order_do_not_matter(model, batch):
    score = jax.jit(functools.partial(fusion_token_log_probs, model.config))
    expected = score(model.params, batch)
    other = batch._replace(
        context_ids=np.where(batch.context_mask, batch.context_ids, 7)[:, ::-1].astype(np.int32),
        context_mask=batch.context_mask[:, ::-1],
    )
    np.testing.assert_allclose(score(model.params, other), expected, atol=2e-5)
    fewer = batch._replace(
        context_ids=batch.context_ids[1:, [0, 2]],
        context_mask=batch.context_mask[1:, [0, 2]],
        target_ids=batch.target_ids[1:],
        target_mask=batch.target_mask[1:],
    )
    np.testing.assert_allclose(score(model.params, fewer)[0], expected[1], atol=2e-5)
    none = batch._replace(context_mask=np.zeros_like(batch.context_mask))
    assert np.isfinite(score(model.params, none)).all()


@pytest.mark.slow
def test_greedy_answers_and_the_cache_are_those_of_full_forwards(model, batch):
    decoder, new = fusion_decoder(model.config), 5
    prompts = Prompts(batch.context_ids, batch.context_mask)
    limits = Limits(max_new_tokens=new, stop_ids=model.eos_ids)
    result = generate_greedy(decoder, model.params, prompts, limits)
    assert result.lengths.tolist() == [new, new]
    answered = batch._replace(target_ids=result.ids, target_mask=np.ones((QUESTIONS, new), bool))
    score = jax.jit(functools.partial(fusion_token_log_probs, model.config))
    expected = score(model.params, answered)
    prefill = jax.jit(functools.partial(decoder.prefill, cache_length=CONTEXTS + new - 1))
    step = jax.jit(decoder.decode_step)
    state = prefill(model.params, batch.context_ids, batch.context_mask)
    for t in range(new):
        best = jax.nn.log_softmax(state.logits).max(axis=1)
        np.testing.assert_allclose(expected[:, t], best, atol=2e-5)
        state = step(model.params, state.cache, result.ids[:, t])
    given = decoder.score(model.params, state, *batch[2:])
    np.testing.assert_allclose(given, score(model.params, batch), atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_ids": np.zeros((2, 7), np.int32)}, r"\[rows, contexts >= 1, length >= 1\]"),
        ({"target_ids": np.zeros((1, 4), np.int32)}, r"target_ids and target_mask must both"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(model, batch, changes, message):
    with pytest.raises(ValueError, match=message):
        fusion_token_log_probs(model.config, model.params, batch._replace(**changes))


def test_a_decoder_wants_several_contexts(model, batch):
    decoder = fusion_decoder(model.config)
    with pytest.raises(ValueError, match=r"\[B, K >= 1, L >= 1\], got \(2, 7\)"):
        decoder.prefill(
            model.params, batch.context_ids[:, 0], batch.context_mask[:, 0], cache_length=9
        )
    with pytest.raises(ValueError, match="cache_length=2 is below the number of contexts"):
        decoder.prefill(model.params, batch.context_ids, batch.context_mask, cache_length=2)
