"""A tiny RAG model of transformers and the same one here, with contexts for both."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest

from ragjax.models.language_model import LanguageModel
from ragjax.models.rag import load_rag
from ragjax.models.testing.seq2seq import tiny_seq2seq_tokenizer

QUESTIONS, DOCS, SLOTS, VOCAB, NEW = 2, 3, 8, 259, 6
PAD, START, END = 1, 0, 2  # of a BART configuration
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
    "decoder_start_token_id": END,
    "bos_token_id": START,
}
ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}


class Rag(NamedTuple):
    """Both models, and the contexts as each of them reads them."""

    reference: Any
    language_model: LanguageModel
    ids: np.ndarray  # [B, K, L]
    mask: np.ndarray
    right_ids: np.ndarray  # [B * K, L], padded on the right by the pad token
    right_mask: np.ndarray
    scores: np.ndarray  # [B, K]
    new_tokens: int

    @staticmethod
    def answer(sequence):
        """The tokens between the start token and the end of one sequence of transformers."""
        sequence = sequence[1:]
        ends = [place for place, token in enumerate(sequence) if token in (END, PAD)]
        return sequence[: ends[0]] if ends else sequence


def make_rag(folder, kind, *, forced_start=None):
    """Builds a random pair of models whose answers end now and then."""
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    transformers = pytest.importorskip("transformers", reason="needs the [parity] extra")
    torch.manual_seed(0)
    config = transformers.RagConfig.from_question_encoder_generator_configs(
        transformers.DPRConfig(**ENCODER, projection_dim=0),
        transformers.BartConfig(**BART, forced_bos_token_id=forced_start, forced_eos_token_id=None),
        n_docs=DOCS,
        forced_eos_token_id=None,
    )
    model = getattr(transformers, f"Rag{kind}ForGeneration")(config).eval()
    for name, parameter in model.named_parameters():
        # Large matrices and small biases, so that answers depend on what was read.
        is_scale = parameter.ndim == 1 and name.endswith("weight")
        std = 1.0 if parameter.ndim > 1 else 0.05
        torch.nn.init.normal_(parameter, mean=float(is_scale), std=std)
    with torch.no_grad():
        # Without this almost no answer would end before the limit.
        model.generator.final_logits_bias[0, END] = 10.0
        model.generator.final_logits_bias[0, PAD] = -50.0
    for part in (model, model.generator):
        settings = getattr(part, "generation_config", None)
        if settings is None:  # RagSequenceForGeneration generates by its generator
            continue
        settings.decoder_start_token_id, settings.eos_token_id = END, END
        settings.pad_token_id, settings.bos_token_id = PAD, START
        settings.forced_bos_token_id, settings.forced_eos_token_id = forced_start, None
        # The start token counts; RagTokenForGeneration takes no notice of max_new_tokens.
        settings.max_length = NEW + 1
    model.save_pretrained(folder)
    for name in ("question_encoder_tokenizer", "generator_tokenizer"):
        (folder / name).mkdir()
        tiny_seq2seq_tokenizer(with_start=True).save(str(folder / name / "tokenizer.json"))
    rng = np.random.default_rng(0)
    # RagSequenceForGeneration attends to the padding when it generates, not when it scores.
    lengths = np.array([[8, 5, 2], [6, 3, 7]])[..., None] if kind == "Token" else SLOTS
    mask = np.broadcast_to(np.arange(SLOTS) < lengths, (QUESTIONS, DOCS, SLOTS))
    ids = np.where(mask, rng.integers(3, VOCAB, mask.shape), PAD).astype(np.int32)
    scores = rng.normal(size=(QUESTIONS, DOCS)).astype(np.float32)
    flat = ids.reshape(-1, SLOTS), mask.reshape(-1, SLOTS)
    lm = load_rag(str(folder)).language_model
    config = dataclasses.replace(lm.config, forced_first_id=forced_start)
    lm = dataclasses.replace(lm, config=config, decoder=lm.family.make_decoder(config))
    return Rag(model, lm, ids, mask, *flat, scores, NEW)
