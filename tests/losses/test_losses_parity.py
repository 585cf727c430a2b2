"""The same numbers as transformers' RAG, sentence-transformers and optax."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from losses_reference import f32

from ragjax import losses

pytestmark = pytest.mark.slow

PAD, BATCH, DOCS, TOKENS, VOCAB = 1, 3, 4, 6, 11


@pytest.fixture
def bart(rng):
    """Decoder logits, target ids with padding at the end, and retriever scores."""
    logits = f32(rng.normal(size=(BATCH, DOCS, TOKENS, VOCAB)) * 2)
    # Column 0 is BART's decoder start and shifted away; rows end in padding.
    target = rng.integers(3, VOCAB, (BATCH, TOKENS))
    target[0, 4:] = PAD
    return logits, target, f32(rng.normal(size=(BATCH, DOCS)) * 2)


def their_rag(kind, bart):
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    rag = pytest.importorskip(
        "transformers.models.rag.modeling_rag", reason="needs the [parity] extra"
    )
    model_class = getattr(rag, f"Rag{kind}ForGeneration")
    config = SimpleNamespace(
        n_docs=DOCS,
        bos_token_id=None,
        generator=SimpleNamespace(pad_token_id=PAD, bos_token_id=None),
    )
    model = SimpleNamespace(config=config)
    model.marginalize = lambda *args: rag.RagTokenForGeneration.marginalize(model, *args)
    logits, target, scores = bart
    logits = torch.tensor(logits.reshape(BATCH * DOCS, TOKENS, VOCAB), requires_grad=True)
    scores = torch.tensor(scores, requires_grad=True)
    loss = model_class.get_nll(model, logits, scores, torch.tensor(target), epsilon=0.0)
    loss.sum().backward()
    slopes = logits.grad.reshape(BATCH, DOCS, TOKENS, VOCAB), scores.grad
    return loss.detach().numpy(), *(slope.numpy() for slope in slopes)


def our_rag(loss, bart):
    logits, target, scores = bart
    labels = np.concatenate([target[:, 1:], np.full((BATCH, 1), PAD)], axis=1)

    def total(logits, scores):
        everywhere = np.broadcast_to(labels[:, None], logits.shape[:3])
        value = loss(
            scores,
            losses.token_log_probs(logits, everywhere),
            token_mask=labels != PAD,
        )
        return value.sum(), value

    slopes, value = jax.grad(total, (0, 1), has_aux=True)(logits, scores)
    return value, *slopes


@pytest.mark.parametrize(
    ("kind", "loss"),
    [("Sequence", losses.rag_sequence_loss), ("Token", losses.rag_token_loss)],
)
def test_value_and_gradient_equal_transformers_rag(kind, loss, bart):
    for ours, theirs in zip(our_rag(loss, bart), their_rag(kind, bart), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_short_answers_teach_the_retriever_here_and_not_in_transformers(bart):
    # transformers adds the retriever's log-prob to the second target token: where that is padding,
    # the retriever gets no gradient at all.
    logits, target, scores = bart
    target = np.where(np.arange(TOKENS) < 2, target, PAD)  # one token after the start token
    short = logits, target, scores
    theirs = their_rag("Sequence", short)[2]
    np.testing.assert_array_equal(theirs, 0)
    assert np.abs(our_rag(losses.rag_sequence_loss, short)[2]).max(axis=1).min() > 1e-3


@pytest.fixture
def pairs(rng):
    return [f32(rng.normal(size=(8, 5))) for _ in range(3)]  # queries, gold, hard negatives


def our_mnrl(queries, gold, hard):
    def unit(x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    docs = jnp.stack([unit(gold), unit(hard)], axis=1)
    return losses.dpr_loss(unit(queries), docs, temperature=1 / 20).mean()


@pytest.mark.parametrize("cached", [False, True])
def test_dpr_loss_equals_multiple_negatives_ranking(cached, pairs):
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    theirs = pytest.importorskip(
        "sentence_transformers.sentence_transformer.losses", reason="needs the [parity] extra"
    )
    columns = [torch.tensor(column, requires_grad=True) for column in pairs]
    # Without a model's weights to look up, both losses take embeddings only.
    if cached:
        model = theirs.CachedMultipleNegativesRankingLoss(
            torch.nn.Sequential(torch.nn.Identity()), mini_batch_size=3
        )
        loss = model.calculate_loss([list(column.split(3)) for column in columns])
    else:
        model = theirs.MultipleNegativesRankingLoss(torch.nn.Identity())
        loss = model.compute_loss_from_embeddings(columns, None)
    loss.backward()
    value, slopes = jax.value_and_grad(our_mnrl, (0, 1, 2))(*pairs)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    for slope, column in zip(slopes, columns, strict=True):
        np.testing.assert_allclose(slope, column.grad, rtol=1e-3, atol=1e-6)


def test_pdist_loss_equals_distill_kl_div(pairs):
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    theirs = pytest.importorskip(
        "sentence_transformers.sentence_transformer.losses", reason="needs the [parity] extra"
    )
    teacher = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)
    tau = 2.0
    columns = [torch.tensor(column, requires_grad=True) for column in pairs]
    model = theirs.DistillKLDivLoss(torch.nn.Identity(), temperature=tau)
    loss = model.compute_loss_from_embeddings(columns, torch.tensor(teacher))
    loss.backward()

    def ours(queries, gold, hard):
        scores = jnp.einsum("bd,bkd->bk", queries, jnp.stack([gold, hard], 1)) / tau
        target = losses.lsr_target(teacher, temperature=tau)
        return losses.pdist_loss(scores, target).mean() * tau**2  # their factor

    value, slopes = jax.value_and_grad(ours, (0, 1, 2))(*pairs)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    for slope, column in zip(slopes, columns, strict=True):
        np.testing.assert_allclose(slope, column.grad, rtol=1e-3, atol=1e-5)


def test_contrastive_and_kl_equal_optax(rng):
    scores, labels = f32(rng.normal(size=(4, 6))), np.array([1, 0, 5, 2])
    np.testing.assert_allclose(
        losses.info_nce_loss(scores, labels),
        optax.softmax_cross_entropy_with_integer_labels(scores, labels),
        rtol=1e-5,
    )
    target = losses.lsr_target(f32(rng.normal(size=(4, 6))), temperature=1.0)
    np.testing.assert_allclose(
        losses.pdist_loss(scores, target),
        optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(scores), target),
        rtol=1e-4,
    )
