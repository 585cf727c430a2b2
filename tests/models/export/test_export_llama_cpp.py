"""What llama.cpp itself computes from the GGUF files that are written here."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from ragjax.models import LMBatch, load_language_model
from ragjax.models.export import export_language_model
from ragjax.models.layers.rotary import LinearScaling, Llama3Scaling, YarnScaling
from ragjax.models.testing import tiny_language_model

SCALINGS = {
    "linear": LinearScaling(factor=4.0),
    "llama3": Llama3Scaling(
        factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_positions=16
    ),
    "yarn": YarnScaling(factor=4.0, original_positions=16, attention_factor=1.2),
}
TEXTS = ["In 2024, 1234567 people don't pay $3.50.", "  naïve café\n\n 日本語 😀", "abab cd"]


class LlamaCpp:
    """A model in llama.cpp: the log-probability of each token after those before it."""

    def __init__(self, path):
        reason = "needs the [parity] extra: llama.cpp in the package cyllama"
        self.api = pytest.importorskip("cyllama.llama.llama_cpp", reason=reason)
        params = self.api.LlamaModelParams()
        params.n_gpu_layers = 0

        class Model(self.api.LlamaModel):
            # Version 0.2.18 of the package asks the model for it, which has none.
            n_vocab = property(lambda self: self.get_vocab().n_vocab)

        self.model = Model(path_model=str(path), params=params, verbose=False)
        self.vocab = self.model.get_vocab()

    def tokenize(self, text):
        return list(self.vocab.tokenize(text, add_special=False, parse_special=True))

    def log_probs(self, ids):
        params = self.api.LlamaContextParams()
        params.n_ctx, params.n_threads = 256, 1
        context = self.api.LlamaContext(self.model, params, verbose=False)
        batch = self.api.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        for place, token in enumerate(ids):
            batch.add(int(token), place, [0], True)
        context.decode(batch)
        rows = [context.get_logits_ith(place) for place in range(len(ids) - 1)]
        logits = np.array(rows, np.float64)
        logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
        context.close()
        return logits[np.arange(len(ids) - 1), ids[1:]]


def log_probs(lm, ids):
    """The same, here."""
    context, target = np.asarray(ids)[None, :1], np.asarray(ids)[None, 1:]
    parts = (context, np.ones_like(context, bool), target, np.ones_like(target, bool))
    return np.asarray(jax.jit(lm.token_log_probs)(lm.params, LMBatch(*map(jnp.asarray, parts))))[0]


def model_of(name):
    """A tiny model with a tokenizer that has a merge, which llama.cpp asks for."""
    scaling = SCALINGS.get(name)
    lm = tiny_language_model(1, "llama" if scaling else name)
    state = json.loads(lm.tokenizer.to_str())
    state["model"]["vocab"]["ab"] = lm.config.vocab_size
    state["model"]["merges"] = [["a", "b"]]
    config = dataclasses.replace(
        lm.config, query_scalar=None, rope_scaling=scaling or lm.config.rope_scaling,
        vocab_size=lm.config.vocab_size + 1,
    )  # fmt: skip
    embedding = jnp.pad(lm.params["embed"]["embedding"], ((0, 1), (0, 0)), mode="edge")
    return dataclasses.replace(
        lm,
        config=config,
        params={**lm.params, "embed": {"embedding": embedding}},
        tokenizer=Tokenizer.from_str(json.dumps(state)),
        token_log_probs=functools.partial(lm.family.token_log_probs, config),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", *SCALINGS])
@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_llama_cpp_computes_what_is_computed_here(tmp_path, name, kind):
    export_language_model(model_of(name), tmp_path / "out", formats=[f"gguf-{kind.lower()}"])
    path = tmp_path / "out" / f"model-{kind}.gguf"
    there, here = LlamaCpp(path), load_language_model(str(path))
    for text in TEXTS:
        assert there.tokenize(text) == here.tokenizer.encode(text).ids
    ids = here.tokenizer.encode(TEXTS[0]).ids
    # llama.cpp rounds what goes into a product to the type of the weights.
    limit = 0.02 if kind == "F16" else 0.2
    np.testing.assert_allclose(there.log_probs(ids), log_probs(here, ids), atol=limit)
    assert not there.vocab.get_add_bos()
    assert there.vocab.is_eog(here.eos_ids[0])
