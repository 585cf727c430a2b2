"""What the encoder-decoder tests share: batches, and PyTorch with the same weights."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from ragjax.models.inputs import LMBatch

VOCAB = 61
CONTEXT_LENGTHS, TARGET_LENGTHS = (9, 6, 3, 1), (5, 4, 2, 1)


def torch_model(kind, changes, *, seed=0):
    """A random `kind`ForConditionalGeneration of transformers, every tensor of it random."""
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCAB, **changes)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    if changes.get("tie_word_embeddings") is False:
        # transformers 5 ties what it initialises, whatever the configuration says.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    for name, parameter in model.named_parameters():
        is_scale = parameter.ndim == 1 and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(is_scale), std=0.3)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model


def our_model(family, model):
    """The configuration and parameters that ragjax makes of a PyTorch model."""
    config = family.parse_config(model.config.to_dict())
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    return config, family.load_params(config, tensors, source="PyTorch")


def make_batch(rng, *, side="left", vocab_size=VOCAB, slots=11):
    """Contexts of several lengths in more slots than needed; what pads them is arbitrary."""
    contexts = rng.integers(3, vocab_size, (len(CONTEXT_LENGTHS), slots)).astype(np.int32)
    lengths = np.array(CONTEXT_LENGTHS)[:, None]
    column = np.arange(slots)[None]
    mask = column < lengths if side == "right" else column >= slots - lengths
    width = max(TARGET_LENGTHS)
    targets = rng.integers(3, vocab_size, (len(TARGET_LENGTHS), width)).astype(np.int32)
    target_mask = np.arange(width)[None] < np.array(TARGET_LENGTHS)[:, None]
    return LMBatch(contexts, mask, targets, target_mask)


def right_padded(ids, mask):
    """The real tokens at the start of each row, as PyTorch's models want them."""
    moved, moved_mask = np.zeros_like(ids), np.zeros_like(mask)
    for row in range(len(ids)):
        real = ids[row][mask[row]]
        moved[row, : len(real)], moved_mask[row, : len(real)] = real, True
    return moved, moved_mask


def torch_log_probs(model, batch, start):
    """log p(y_t | c, y_<t) `[R, T]`, a tensor with its graph, of right-padded contexts."""
    import torch

    ids, mask = right_padded(batch.context_ids, batch.context_mask)
    targets = torch.tensor(batch.target_ids).long()
    first = torch.full((len(targets), 1), start)
    logits = model(
        input_ids=torch.tensor(ids).long(),
        attention_mask=torch.tensor(mask).long(),
        decoder_input_ids=torch.cat([first, targets[:, :-1]], dim=1),
    ).logits
    log_probs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return log_probs * torch.tensor(batch.target_mask)


def check_log_probs(family, model, rng):
    """Log-probs to 1e-4, padding on either side."""
    config, params = our_model(family, model)
    score = jax.jit(functools.partial(family.token_log_probs, config))
    for side in ("left", "right"):
        batch = make_batch(rng, side=side)
        expected = torch_log_probs(model, batch, config.decoder_start_id).detach().numpy()
        np.testing.assert_allclose(score(params, batch), expected, rtol=1e-4, atol=1e-4)


def check_gradients(family, model, rng):
    """The gradients of all parameters to 1e-3, and the log-probs to 1e-4."""
    config, params = our_model(family, model)
    batch = make_batch(rng)

    def total(params):
        log_probs = family.token_log_probs(config, params, batch)
        return log_probs.sum(), log_probs

    gradient, found = jax.jit(jax.grad(total, has_aux=True))(params)
    expected = torch_log_probs(model, batch, config.decoder_start_id)
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-4)
    expected.sum().backward()
    # The loader knows which parameter each gradient belongs to.
    slopes = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    slopes = family.load_params(config, slopes, source="gradients")
    final_bias = gradient.pop("final_bias", None)  # a buffer in PyTorch
    assert final_bias is None or np.abs(final_bias["bias"]).max() > 0
    assert jax.tree.structure(gradient) == jax.tree.structure(slopes)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), gradient, slopes
    )


def check_greedy(family, model, rng, **changes):
    """Greedy answers equal to `generate` of PyTorch, token by token until the end token."""
    import torch

    from ragjax.generation import Limits, Prompts, generate_greedy

    config, params = our_model(family, model)
    config = dataclasses.replace(config, **changes)
    batch, new, end = make_batch(rng), 8, model.config.eos_token_id
    ids, mask = right_padded(batch.context_ids, batch.context_mask)
    with torch.no_grad():
        expected = model.generate(
            torch.tensor(ids).long(),
            attention_mask=torch.tensor(mask).long(),
            max_new_tokens=new,
            do_sample=False,
            num_beams=1,
        )[:, 1:].numpy()
    prompts = Prompts(batch.context_ids, batch.context_mask)
    limits = Limits(max_new_tokens=new, stop_ids=(end,))
    found = generate_greedy(family.make_decoder(config), params, prompts, limits)
    ids, lengths = np.asarray(found.ids), np.asarray(found.lengths)
    answers = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    theirs = [row.tolist() for row in expected]
    theirs = [row[: row.index(end)] if end in row else row for row in theirs]
    assert answers == theirs
    return answers


def parameter_count(family, config):
    """Number of parameters, without making them."""
    from ragjax.models.seq2seq.model import init_params

    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def torch_parameter_count(model_class, config):
    """Likewise for PyTorch, on its meta device."""
    import torch

    with torch.device("meta"):
        model = model_class(config)
    return sum(parameter.numel() for parameter in model.parameters())
