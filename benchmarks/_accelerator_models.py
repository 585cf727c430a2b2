"""Sizes, random models and timing of benchmarks/accelerator.py.

B questions, K documents each, N documents in all, L and T tokens.
"""

import contextlib
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _work import BERT_BASE, LLAMA_1B, bert_sizes, llama_sizes
from jax.experimental.compilation_cache import compilation_cache
from numpy.typing import NDArray

from ragjax.models.decoder import model as decoder
from ragjax.models.decoder.config import DecoderConfig
from ragjax.models.decoder.family import FAMILY as DECODER
from ragjax.models.encoder import make_encode
from ragjax.models.encoders import bert
from ragjax.models.encoders.bert import BertConfig
from ragjax.models.layers.head import Normalize, apply_steps
from ragjax.models.layers.pooling import mean_pool
from ragjax.models.layers.stacks import cast_floats
from ragjax.refresh import EncodeOptions
from ragjax.runs.options.dual import LMConfig
from ragjax.runs.trainable import SplitModel, split_lm
from ragjax.storage.compiled import keep_compiled
from ragjax.training.mesh import Layout, spread_rows
from ragjax.training.optimizer import OptimizerConfig, make_optimizer

PAD_ID = 0
SCALE = 20.0  # of cosines, as a run has it
_FIRST_ID = 5  # ids below have meanings
# Bytes of a device below which a decoder recomputes its layers in the backward pass.
_SMALL_DEVICE = 40e9


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured; rows are those of each device."""

    encoder: BertConfig = BERT_BASE
    decoder: DecoderConfig = LLAMA_1B
    # Encoding: texts of random lengths, so many tokens on average.
    texts: int = 16_384
    text_tokens: int = 140
    batch_tokens: int = 65_536
    buckets: tuple[int, ...] = (32, 64, 96, 128, 160, 192, 256, 512)
    small_rows: int = 64  # of a batch of the encoder, as it was before batches went by tokens
    # Steps of the retriever and end to end.
    questions: int = 8
    documents: int = 8
    query_tokens: int = 32
    doc_tokens: int = 160
    context_tokens: int = 224
    answer_tokens: int = 16
    corpus: int = 8192
    steps: int = 8
    # Steps of the language model.
    lm_rows: int = 16
    lm_context: int = 448
    lm_answer: int = 64
    lora_rank: int = 16
    top_layers: int = 4
    # Generation.
    prompts: int = 32
    prompt_tokens: int = 224
    new_tokens: int = 64
    # Exact search.
    vectors: tuple[int, ...] = (1_000_000, 20_000_000)
    dim: int = 768
    searched: int = 256
    k: int = 32
    block_rows: int = 32_768
    # Seconds that the timed calls of one thing may take together.
    seconds: float = 4.0


FULL = Sizes()
TOY = Sizes(
    encoder=bert_sizes(300, 32, 1, 2, 64),
    decoder=llama_sizes(300, 32, 64, 2, 4, 2),
    texts=64, text_tokens=20, batch_tokens=1024, buckets=(16, 32, 64), small_rows=8,
    questions=2, documents=2, query_tokens=8, doc_tokens=16, context_tokens=16, answer_tokens=4,
    corpus=64, steps=3, lm_rows=2, lm_context=12, lm_answer=4, lora_rank=2, top_layers=1,
    prompts=2, prompt_tokens=8, new_tokens=4,
    vectors=(512, 2048), dim=32, searched=8, k=4, block_rows=256, seconds=0.1,
)  # fmt: skip


class Timing(NamedTuple):
    """Calls of one thing, each until its result was there."""

    first: float  # seconds of the first call, which compiles
    seconds: list[float]  # of the calls after the warm-up


class Bench:
    """The devices, the random models on them, and how something is timed."""

    def __init__(
        self, sizes: Sizes, layout: Layout, folder: Path, *, chunk_tokens: int, rounds: int,
        peak: float | None, torch: bool = True,
    ) -> None:  # fmt: skip
        """Takes its parts.

        Args:
            sizes: What is measured.
            layout: The devices.
            folder: For files that are no longer wanted afterwards.
            chunk_tokens: As of `ragjax.training.end_to_end.make_rag_loss`; 0: None.
            rounds: Timed calls of each thing at most.
            peak: Operations a second of one device, or None.
            torch: Whether PyTorch may be measured.
        """
        self.sizes, self.layout, self.folder = sizes, layout, folder
        # As a run does: rows that lie on several devices are not taken in chunks.
        single = layout.num_devices == 1
        self.chunk_tokens = chunk_tokens if single and chunk_tokens else None
        self.rounds, self.peak, self.torch = rounds, peak, torch
        stats = jax.devices()[0].memory_stats() or {}
        self.memory: int | None = stats.get("bytes_limit")
        self.remat = self.memory is not None and self.memory < _SMALL_DEVICE
        self.rng = np.random.default_rng(0)

    # -- timing

    def timed(self, run: Callable[[], Any], warmups: int = 2) -> Timing:
        """Calls something until its result is there, a few times more after the warm-up."""
        started = time.perf_counter()
        jax.block_until_ready(run())
        first = time.perf_counter() - started
        for _ in range(warmups - 1):
            jax.block_until_ready(run())
        seconds: list[float] = []
        while len(seconds) < self.rounds and sum(seconds) < self.sizes.seconds:
            started = time.perf_counter()
            jax.block_until_ready(run())
            seconds.append(time.perf_counter() - started)
        return Timing(first, seconds)

    def result(
        self, timing: Timing, *, flops: float = 0.0, devices: int = 0, **counts: float
    ) -> dict[str, Any]:
        """Returns what the file says of something that was timed.

        Args:
            timing: Its calls.
            flops: Additions and multiplications of one call; 0: not counted.
            devices: That it ran on; 0: all.
            **counts: What one call gets done, by what it is counted in, such as tokens.
        """
        devices = devices or self.layout.num_devices
        median = statistics.median(timing.seconds)
        found: dict[str, Any] = {
            "seconds": median,
            "mean": statistics.fmean(timing.seconds),
            "least": min(timing.seconds),
            "most": max(timing.seconds),
            "rounds": len(timing.seconds),
            "first_call_seconds": timing.first,
            "devices": devices,
        }
        found |= {f"{name}_per_second": count / median for name, count in counts.items()}
        if flops:
            rate = flops / median
            used = rate / (devices * self.peak) if self.peak else None
            found |= {"model_flops": flops, "model_flops_per_second": rate, "utilisation": used}
        return found

    # -- data

    @property
    def rows(self) -> int:
        """How many times the rows of one device a batch has."""
        return self.layout.num_devices

    def draw(self, vocabulary: int, *shape: int) -> NDArray[np.int32]:
        """Returns random token ids."""
        return self.rng.integers(_FIRST_ID, vocabulary, shape).astype(np.int32)

    @functools.cached_property
    def texts(self) -> list[list[int]]:
        """Token ids of texts whose lengths are spread as those of passages are: log-normally."""
        sizes, rng = self.sizes, np.random.default_rng(1)
        count, longest = max(sizes.texts * self.rows, sizes.corpus), sizes.buckets[-1]
        lengths = sizes.text_tokens * np.exp(rng.normal(-0.1, 0.45, count))
        return [
            rng.integers(_FIRST_ID, sizes.encoder.vocab_size, length).tolist()
            for length in lengths.astype(int).clip(4, longest)
        ]

    def spread(self, batch: Any, params: Any) -> Any:
        """Puts a batch where its rows are computed."""
        return spread_rows(jax.tree.map(jnp.asarray, batch), params)

    # -- models

    def random(self, shapes: Any, dtype: Any, seed: int) -> Any:
        """Draws parameters on the devices: scales are one, biases zero, the rest is small."""
        leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)

        def draw(key: jax.Array) -> Any:
            values = []
            for number, (path, leaf) in enumerate(leaves):
                constant = {"scale": 1.0, "bias": 0.0}.get(path[-1].key)
                if constant is not None:
                    values.append(jnp.full(leaf.shape, constant, dtype))
                    continue
                drawn = jax.random.normal(jax.random.fold_in(key, number), leaf.shape, dtype)
                values.append(drawn * jnp.asarray(0.02, dtype))
            return jax.tree.unflatten(structure, values)

        places = [
            self.layout.sharding(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape)
            for path, leaf in leaves
        ]
        wanted = None if None in places else jax.tree.unflatten(structure, places)
        return jax.jit(draw, out_shardings=wanted)(jax.random.key(seed))

    @functools.cached_property
    def encode(self) -> Callable[[Any, Any], jax.Array]:
        """The encoder: mean pooling, length 1, computed in bfloat16."""
        return make_encode(
            bert.FAMILY,
            self.sizes.encoder,
            mean_pool,
            lambda projection, pooled: apply_steps((Normalize(),), projection, pooled),
            compute_dtype=jnp.bfloat16,
        )

    @functools.cached_property
    def encoder_params(self) -> Any:
        """Of the encoder, float32."""
        return self.random(bert.FAMILY.abstract(self.sizes.encoder)[1], jnp.float32, 1)

    @property
    def towers(self) -> dict[str, Any]:
        """A query and a document encoder, as training starts with them."""
        return {"query": self.encoder_params, "doc": self.encoder_params}

    @functools.cached_property
    def encode_options(self) -> EncodeOptions:
        """Batches by tokens."""
        sizes = self.sizes
        return EncodeOptions(
            buckets=sizes.buckets, batch_tokens=sizes.batch_tokens, compute_dtype="bfloat16"
        )

    @functools.cached_property
    def lm_params(self) -> Any:
        """Of the language model, bfloat16."""
        config = self.sizes.decoder
        shapes = jax.eval_shape(lambda key: decoder.init_params(config, key), jax.random.key(0))
        return self.random(shapes, jnp.bfloat16, 2)

    def lm_log_probs(self, params: Any, batch: Any) -> jax.Array:
        """Scores `[R, T]` in bfloat16, whatever the parameters are."""
        params = cast_floats(params, jnp.bfloat16)
        return DECODER.token_log_probs(self.sizes.decoder, params, batch, remat=self.remat)

    def split(self, kind: str) -> SplitModel:
        """Returns what a run trains of the language model: "lora" on all layers, or "top" layers.

        What is trained is float32, the rest stays bfloat16.
        """
        sizes = self.sizes
        if kind == "lora":
            config = LMConfig(train_layers=0, lora_rank=sizes.lora_rank)
        else:
            config = LMConfig(train_layers=sizes.top_layers, lora_rank=0)
        split = split_lm(config, DECODER, self.lm_params, seed=0)
        return split._replace(trainable=cast_floats(split.trainable, jnp.float32))

    @functools.cached_property
    def optimizer(self) -> Any:
        """AdamW with clipping, as a run has it."""
        config = OptimizerConfig(learning_rate=1e-5, schedule="constant")
        return make_optimizer(config, total_steps=1_000_000)

    # -- compiled programs

    @contextlib.contextmanager
    def program_cache(self) -> Iterator[None]:
        """Keeps what is compiled in a folder of this benchmark, as a run keeps it in its own."""
        names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
        before = {name: getattr(jax.config, name) for name in names}
        folder = os.environ.get("RAGJAX_CACHE")
        os.environ["RAGJAX_CACHE"] = str(self.folder / "programs")
        try:
            jax.config.update(names[0], None)
            keep_compiled()
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            os.environ.pop("RAGJAX_CACHE")
            if folder is not None:
                os.environ["RAGJAX_CACHE"] = folder

    def forget(self, *names: str) -> None:
        """Frees what a part made and no other needs."""
        for name in names:
            self.__dict__.pop(name, None)

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """Returns what was made under a name, made now where it was not; `forget` frees it."""
        if name not in self.__dict__:
            self.__dict__[name] = make()
        return self.__dict__[name]

    def close(self) -> None:
        """Ends what still runs."""
        for kept in list(self.__dict__.values()):
            if hasattr(kept, "close"):
                kept.close()


class Skipped(Exception):
    """Something is not measured here, and the message says why."""
