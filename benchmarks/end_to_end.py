"""Speed of an end-to-end training step beside transformers' RAG in PyTorch, same weights.

    python benchmarks/end_to_end.py

One step of both: encode the questions and their K documents with DPR, read the K contexts with
BART, marginal likelihood of the answers, gradients into both towers and the reader, clipping and
AdamW. The models are random and small, the same weights on both sides; dropout is off in both, so
the first losses must agree. The two take turns. Needs the [parity] extra. Two CPU cores take about
three minutes; a ratio above 1 means that ragjax is faster.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _beside import in_turns, ratios, run_program

from ragjax.models.encoder import load_encoder
from ragjax.models.inputs import Tokens
from ragjax.models.layers.stacks import cast_floats
from ragjax.models.rag import load_rag
from ragjax.models.testing.seq2seq import tiny_seq2seq_tokenizer
from ragjax.training import end_to_end
from ragjax.training.end_to_end import LMReader, RagBatch, make_rag_loss, separate_reader
from ragjax.training.optimizer import OptimizerConfig, make_optimizer
from ragjax.training.steps import init_state, make_train_step

_TERMS = {"sequence": end_to_end.sequence_term, "token": end_to_end.token_term}
_LEARNING_RATE, _CLIP = 1e-5, 1.0


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Compares an end-to-end training step of ragjax and of transformers' RAG.

    Attributes:
        form: RAG-Sequence or RAG-Token.
        batch_size: Questions per step.
        documents: K, documents per question.
        query_tokens: Tokens of a question.
        doc_tokens: Tokens of a document, for its encoder.
        context_tokens: Tokens of a document with its question, for the reader.
        answer_tokens: Tokens of an answer.
        width: Width of all models; a multiple of 4.
        layers: Layers of each encoder and decoder.
        vocabulary: Entries of the vocabularies, at least 259.
        dtype: What both sides compute in.
        device: Device of PyTorch; jax takes the one it finds.
        rounds: Timed rounds of each; the median of the ratios counts.
    """

    form: Literal["sequence", "token"] = "sequence"
    batch_size: int = 8
    documents: int = 5
    query_tokens: int = 32
    doc_tokens: int = 128
    context_tokens: int = 160
    answer_tokens: int = 24
    width: int = 128
    layers: int = 2
    vocabulary: int = 8000
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    rounds: int = 7

    def __post_init__(self):
        """Raises ValueError naming the field that is out of range."""
        for name, low in (("batch_size", 1), ("documents", 1), ("layers", 1), ("rounds", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.vocabulary < 259 or self.width < 8 or self.width % 4:
            raise ValueError(
                f"vocabulary must be at least 259 and width a multiple of 4 from 8 on, got"
                f" {self.vocabulary} and {self.width}"
            )


class Example(NamedTuple):
    """Token ids of one batch; every token is real, so neither side can save on padding."""

    queries: np.ndarray  # [B, Lq]
    docs: np.ndarray  # [B, K, Ld]
    contexts: np.ndarray  # [B, K, Lc]
    targets: np.ndarray  # [B, T]


Step = Callable[[], float]  # takes one training step and returns its loss


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code: 0, or 2 for bad input."""
    return run_program(Flags, compare, arguments, __doc__)


def compare(flags: Flags) -> None:
    """Measures both and prints steps a second, the ratio and the difference of the first losses."""
    with tempfile.TemporaryDirectory() as folder:
        theirs_models = _write_models(Path(folder), flags)
        example = make_example(flags)
        ours = ragjax_step(Path(folder), example, flags)
        theirs = _transformers_step(theirs_models, example, flags)
        first = ours(), theirs()
        seconds = in_turns({"ragjax": ours, "transformers": theirs}, flags.rounds)
    for name, column in seconds.items():
        print(f"{name:13} {1 / statistics.median(column):8.2f} steps/s")
    ratio, least, most = ratios(seconds["transformers"], seconds["ragjax"])
    print(
        f"ratio ragjax / transformers {ratio:.2f}x ({least:.2f} to {most:.2f})"
        f" over {flags.rounds} rounds;"
        f" {flags.batch_size} questions x {flags.documents} documents, RAG-{flags.form},"
        f" {flags.dtype}"
    )
    print(f"first losses {first[0]:.5f} and {first[1]:.5f} nats per question")


def make_example(flags: Flags) -> Example:
    """Draws the tokens of one batch; the lowest ids, which have meanings, are left out."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.integers(4, flags.vocabulary, shape).astype(np.int32)

    batch, documents = flags.batch_size, flags.documents
    return Example(
        draw(batch, flags.query_tokens),
        draw(batch, documents, flags.doc_tokens),
        draw(batch, documents, flags.context_tokens),
        draw(batch, flags.answer_tokens),
    )


def ragjax_step(folder: Path, example: Example, flags: Flags) -> Step:
    """Returns ragjax's training step of the models in a folder."""
    rag, doc_encoder = load_rag(str(folder / "rag")), load_encoder(str(folder / "doc"))
    dtype = jnp.dtype(flags.dtype)

    def in_dtype(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        if dtype == jnp.float32:
            return function
        return lambda params, batch: function(cast_floats(params, dtype), batch)

    params = {
        "query": rag.query_encoder.params,
        "doc": doc_encoder.params,
        "lm": rag.language_model.params,
    }
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=_LEARNING_RATE, clip_norm=_CLIP, schedule="constant"),
        total_steps=1000,
    )
    loss = make_rag_loss(
        in_dtype(rag.query_encoder.encode),
        LMReader(separate_reader(in_dtype(rag.language_model.token_log_probs))),
        {"marginal": (1.0, _TERMS[flags.form])},
        scale=1.0,
        chunk_tokens=None,
    )
    step = make_train_step(loss, optimizer)
    state = [init_state(params, optimizer, 0)]
    batch = _rag_batch(example)
    frozen = {"lm": None, "towers": {}}

    def run() -> float:
        state[0], metrics = step(state[0], batch, frozen)
        return float(metrics["loss"])

    return run


def _rag_batch(example: Example) -> RagBatch:
    def tokens(ids: np.ndarray) -> Tokens:
        return Tokens(jnp.asarray(ids), jnp.ones(ids.shape, bool))

    shape = example.docs.shape[:2]
    contexts = tokens(example.contexts)
    return RagBatch(
        queries=tokens(example.queries),
        docs=tokens(example.docs),
        doc_ids=jnp.arange(np.prod(shape), dtype=jnp.int32).reshape(shape),
        doc_mask=jnp.ones(shape, bool),
        context_ids=contexts.ids,
        context_mask=contexts.mask,
        target_ids=jnp.asarray(example.targets),
        target_mask=jnp.ones(example.targets.shape, bool),
    )


def _write_models(folder: Path, flags: Flags) -> tuple[Any, Any]:
    """Writes a random RAG checkpoint and its document encoder; returns PyTorch's models."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(f"{error}; install the [parity] extra") from error
    torch.manual_seed(0)
    longest = max(flags.context_tokens, flags.doc_tokens, flags.query_tokens, flags.answer_tokens)
    encoder = transformers.DPRConfig(
        vocab_size=flags.vocabulary,
        hidden_size=flags.width,
        num_hidden_layers=flags.layers,
        num_attention_heads=4,
        intermediate_size=4 * flags.width,
        max_position_embeddings=longest + 2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    reader = transformers.BartConfig(
        vocab_size=flags.vocabulary,
        d_model=flags.width,
        encoder_layers=flags.layers,
        decoder_layers=flags.layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4 * flags.width,
        decoder_ffn_dim=4 * flags.width,
        max_position_embeddings=longest + 2,
        dropout=0.0,
    )
    config = transformers.RagConfig.from_question_encoder_generator_configs(
        encoder, reader, n_docs=flags.documents
    )
    model = getattr(transformers, f"Rag{flags.form.title()}ForGeneration")(config)
    doc_encoder = transformers.DPRContextEncoder(encoder)
    model.save_pretrained(folder / "rag")
    doc_encoder.save_pretrained(folder / "doc")
    tokenizer = tiny_seq2seq_tokenizer(with_start=True)
    for place in ("rag/question_encoder_tokenizer", "rag/generator_tokenizer", "doc"):
        (folder / place).mkdir(exist_ok=True)
        tokenizer.save(str(folder / place / "tokenizer.json"))
    return model, doc_encoder


def _transformers_step(models: tuple[Any, Any], example: Example, flags: Flags) -> Step:
    import torch

    model, doc_encoder = (part.train().to(flags.device) for part in models)
    parameters = [*model.parameters(), *doc_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=0.01)
    start = np.full((flags.batch_size, 1), model.config.generator.decoder_start_token_id)
    queries, docs, contexts = (
        torch.tensor(ids.astype(np.int64), device=flags.device)
        for ids in (example.queries, example.docs, example.contexts)
    )
    docs, contexts = docs.flatten(0, 1), contexts.flatten(0, 1)
    labels = torch.tensor(
        np.concatenate([start, example.targets], axis=1).astype(np.int64), device=flags.device
    )
    cast = torch.autocast(flags.device, torch.bfloat16, enabled=flags.dtype == "bfloat16")

    def run() -> float:
        optimizer.zero_grad()
        with cast:
            asked = model.question_encoder(queries).pooler_output
            found = doc_encoder(docs).pooler_output.view(flags.batch_size, flags.documents, -1)
            loss = model(
                context_input_ids=contexts,
                context_attention_mask=torch.ones_like(contexts),
                doc_scores=torch.einsum("bd,bkd->bk", asked, found).float(),
                labels=labels,
                reduce_loss=True,
            ).loss / flags.batch_size  # fmt: skip
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        return float(loss.detach())

    return run


if __name__ == "__main__":
    sys.exit(main())
