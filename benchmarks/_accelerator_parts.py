"""Encoding, the steps of each half, generation, search and what was idle before.

Each function measures one part of benchmarks/accelerator.py and returns what the file says of it,
by side. B questions, K documents each, M = B * K, C blocks of M rows.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _accelerator_models import PAD_ID, SCALE, Bench, Skipped, Timing
from _work import decoder_flops, encoder_flops
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

from ragjax.generation import Limits, Prompts, generate_greedy
from ragjax.index.exact import exact_search
from ragjax.losses import lsr_target, pdist_loss, sequence_log_probs
from ragjax.models import LMBatch, Tokens
from ragjax.models.decoder.family import FAMILY as DECODER
from ragjax.models.layers.stacks import cast_floats
from ragjax.refresh.encode import encode_token_ids
from ragjax.runs.trainable import folded
from ragjax.storage.compiled import compiled_folder
from ragjax.training.checkpoint import Checkpointer
from ragjax.training.lm import answer_tokens, make_lm_loss
from ragjax.training.loop import LoopConfig, MetricsLog, StopFlag, run_steps
from ragjax.training.lsr import LsrBatch, make_lsr_loss
from ragjax.training.steps import init_state, make_train_step

Sides = dict[str, dict[str, Any]]
_DEFAULT_SECONDS = 120.0  # between two checkpoints of a run


def encode(bench: Bench) -> Sides:
    """Measures the encoding of texts that are token ids already."""
    return {"ragjax": _encoding(bench)}


def encoder_batches(bench: Bench) -> Sides:
    """Measures batches of few rows beside batches by tokens."""
    before = _encoding(bench, max_rows=bench.sizes.small_rows)
    return {"before": before, "after": _encoding(bench)}


def _encoding(bench: Bench, max_rows: int = 2**31 - 1) -> dict[str, Any]:
    options = dataclasses.replace(bench.encode_options, max_rows=max_rows)
    texts = bench.texts[: bench.sizes.texts * bench.rows]

    def run() -> Any:
        return encode_token_ids(
            bench.encode, bench.encoder_params, texts, pad_id=PAD_ID, options=options
        )

    flops = sum(encoder_flops(bench.sizes.encoder, 1, len(text)) for text in texts)
    tokens = sum(map(len, texts))
    return bench.result(bench.timed(run), flops=flops, texts=len(texts), tokens=tokens)


class LMStep(NamedTuple):
    """A training step of the language model and what it is called with."""

    step: Any  # compiled by `jax.jit`
    state: Callable[[], Any]  # a new one: steps take the buffers of the last
    batch: Any
    frozen: Any


def lm_batch(bench: Bench) -> LMBatch:
    """Returns random contexts and answers without padding."""
    sizes, count = bench.sizes, bench.sizes.lm_rows * bench.rows
    return _rows(bench, count, sizes.lm_context, sizes.lm_answer)


def _rows(bench: Bench, count: int, context: int, answer: int) -> LMBatch:
    vocabulary = bench.sizes.decoder.vocab_size
    context_ids = bench.draw(vocabulary, count, context)
    target_ids = bench.draw(vocabulary, count, answer)
    return LMBatch._make(part for ids in (context_ids, target_ids) for part in _unpadded(ids))


def _unpadded(ids: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Returns token ids and their mask, all of them real."""
    return ids, np.ones(ids.shape, bool)


def make_lm_step(bench: Bench, kind: str) -> LMStep:
    """Returns the step of `Bench.split(kind)`."""
    split = bench.split(kind)
    loss = make_lm_loss(bench.lm_log_probs, split.merge)
    step = make_train_step(loss, bench.optimizer, weight=answer_tokens)
    place = bench.layout.place

    def state() -> Any:
        return place(init_state(split.trainable, bench.optimizer, 0))

    frozen = place(split.frozen)
    return LMStep(step, state, bench.spread(lm_batch(bench), frozen), frozen)


def lm_flops(bench: Bench, kind: str, devices: int = 0) -> float:
    """Returns the operations of a step: forward, and backward through what has a gradient."""
    sizes = bench.sizes
    config, rows = sizes.decoder, sizes.lm_rows * (devices or bench.rows)
    length = sizes.lm_context + sizes.lm_answer - 1
    forward = decoder_flops(config, rows, length, sizes.lm_answer)
    if kind == "lora":
        return 2 * forward + 6.0 * adapter_size(bench) * rows * length
    layers = decoder_flops(config, rows, length, 0)
    unembedding = forward - layers
    return forward + unembedding + 2 * layers * sizes.top_layers / config.num_layers


def adapter_size(bench: Bench) -> int:
    """Returns the parameters of the adapters of all layers."""
    config, rank = bench.sizes.decoder, bench.sizes.lora_rank
    heads, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = [(heads, 2), (keys, 2), (config.intermediate_size, 3)]
    return config.num_layers * rank * sum(n * (config.hidden_size + size) for size, n in shapes)


def lm_step_lora(bench: Bench) -> Sides:
    """Measures a step that trains adapters on all layers, and compiles it from nothing."""
    with bench.program_cache():
        made = bench.keep("lora_step", lambda: make_lm_step(bench, "lora"))
        bench.keep("cold_seconds", lambda: _compile_seconds(made))
        timing = _time_steps(bench, made)
    return {"ragjax": _lm_result(bench, "lora", timing)}


def lm_step_top(bench: Bench) -> Sides:
    """Measures a step that trains the top layers."""
    timing = _time_steps(bench, make_lm_step(bench, "top"))
    return {"ragjax": _lm_result(bench, "top", timing)}


def _time_steps(bench: Bench, made: LMStep) -> Timing:
    state = [made.state()]

    def run() -> Any:
        state[0], metrics = made.step(state[0], made.batch, made.frozen)
        return metrics

    timing = bench.timed(run)
    _check_finite(run())
    return timing


def _check_finite(metrics: Any) -> None:
    loss = float(metrics["loss"])
    if not np.isfinite(loss) or float(metrics["skipped"]):
        raise ValueError(f"the loss of the step is {loss}: what was timed is no step of training")


def _lm_result(bench: Bench, kind: str, timing: Timing) -> dict[str, Any]:
    rows, sizes = bench.sizes.lm_rows * bench.rows, bench.sizes
    tokens = rows * (sizes.lm_context + sizes.lm_answer)
    return bench.result(timing, flops=lm_flops(bench, kind), steps=1, tokens=tokens)


def compile_cache(bench: Bench) -> Sides:
    """Measures the compilation of the step with adapters, from nothing and kept from before."""
    made = bench.keep("lora_step", lambda: make_lm_step(bench, "lora"))
    with bench.program_cache():
        cold = bench.keep("cold_seconds", lambda: _compile_seconds(made))
        if compiled_folder() is None:
            raise Skipped("XLA reads no programs back on this device")
        warm = _compile_seconds(make_lm_step(bench, "lora"))
    return {"before": {"seconds": cold}, "after": {"seconds": warm}}


def _compile_seconds(made: LMStep) -> float:
    state = made.state()
    started = time.perf_counter()
    made.step.lower(state, made.batch, made.frozen).compile()
    return time.perf_counter() - started


def checkpoints(bench: Bench) -> Sides:
    """Measures steps of the loop of a run that are saved each, or meanwhile."""
    made = bench.keep("lora_step", lambda: make_lm_step(bench, "lora"))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(made.state()))

    def run(name: str, seconds: float) -> dict[str, Any]:
        folder, ended = bench.folder / f"checkpoints-{name}", [time.perf_counter()]
        run_steps(
            LoopConfig(stage=name, num_steps=bench.sizes.steps + 2, checkpoint_seconds=seconds),
            made.step,
            made.state(),
            lambda step: made.batch,
            frozen=made.frozen,
            checkpointer=Checkpointer(folder),
            log=MetricsLog(bench.folder / f"{name}.jsonl"),
            stop=StopFlag(),
            after_step=lambda done, state: ended.append(time.perf_counter()),
        )
        steps = np.diff(ended).tolist()
        # The first compiles, and the loop looks at a step while the next one runs.
        return bench.result(Timing(steps[0], steps[2:]), steps=1) | {"bytes_saved": size}

    return {
        "before": run("each", 0.0),
        "after": run("by-minutes", _DEFAULT_SECONDS),
        "after_while_writing": run("writing", 1e-3),
    }


def lsr_step(bench: Bench) -> Sides:
    """Measures scoring the candidates with the language model and a step of both encoders."""
    sizes, count = bench.sizes, bench.sizes.questions * bench.rows
    rows = _rows(bench, count * sizes.documents, sizes.context_tokens, sizes.answer_tokens)
    rows = bench.spread(rows, bench.lm_params)
    vocabulary = sizes.encoder.vocab_size
    queries, docs = (
        bench.spread(Tokens._make(_unpadded(ids)), bench.encoder_params)
        for ids in (
            bench.draw(vocabulary, count, sizes.query_tokens),
            bench.draw(vocabulary, count * sizes.documents, sizes.doc_tokens),
        )
    )

    @jax.jit
    def target(params: Any, rows: LMBatch) -> Array:
        log_probs = bench.lm_log_probs(params, rows)
        scores = sequence_log_probs(log_probs, token_mask=rows.target_mask)
        return lsr_target(scores.reshape(count, sizes.documents), temperature=1.0)

    own = np.repeat(np.eye(count, dtype=bool), sizes.documents, axis=1)  # [B, M]
    loss = make_lsr_loss(
        bench.encode,
        pdist_loss,
        scale=SCALE,
        in_batch=True,
        chunk_tokens=bench.chunk_tokens or 2**30,
    )
    step = make_train_step(loss, bench.optimizer)
    state = [bench.layout.place(init_state(bench.towers, bench.optimizer, 0))]
    mask, real = jnp.asarray(own), jnp.ones(own.shape[1], bool)

    def run() -> Any:
        found = target(bench.lm_params, rows)
        log_probs = jnp.where(mask, jnp.tile(found, (1, count)), -jnp.inf)
        batch = LsrBatch(queries, docs, log_probs, mask, real)
        state[0], metrics = step(state[0], bench.spread(batch, state[0].params))
        return metrics

    timing = bench.timed(run)
    _check_finite(run())
    candidates = count * sizes.documents
    return {"ragjax": bench.result(timing, flops=lsr_flops(bench), steps=1, candidates=candidates)}


def lsr_flops(bench: Bench, devices: int = 0) -> float:
    """Returns the operations of scoring and of a step of the encoders; recomputing not counted."""
    return lm_forward_flops(bench, devices) + 3 * towers_flops(bench, devices)


def lm_forward_flops(bench: Bench, devices: int = 0) -> float:
    """Returns the operations of scoring the answers behind all candidates."""
    sizes = bench.sizes
    rows = sizes.questions * sizes.documents * (devices or bench.rows)
    length = sizes.context_tokens + sizes.answer_tokens - 1
    return decoder_flops(sizes.decoder, rows, length, sizes.answer_tokens)


def towers_flops(bench: Bench, devices: int = 0) -> float:
    """Returns the operations of encoding the questions of a step and their documents."""
    sizes, questions = bench.sizes, bench.sizes.questions * (devices or bench.rows)
    asked = encoder_flops(sizes.encoder, questions, sizes.query_tokens)
    return asked + encoder_flops(sizes.encoder, questions * sizes.documents, sizes.doc_tokens)


def generation(bench: Bench) -> Sides:
    """Measures greedy decoding."""
    return {"ragjax": _generation(bench, bench.lm_params)}


def adapters(bench: Bench) -> Sides:
    """Measures greedy decoding with adapters beside the weights, and folded into them."""
    split = bench.split("lora")
    beside = bench.layout.place(cast_floats(split.joined(split.trainable), jnp.bfloat16))
    return {
        "before": _generation(bench, beside),
        "after": _generation(bench, jax.jit(folded)(beside)),
    }


def _generation(bench: Bench, params: Any) -> dict[str, Any]:
    sizes, rng = bench.sizes, np.random.default_rng(3)
    count = sizes.prompts * bench.rows
    ids = rng.integers(5, sizes.decoder.vocab_size, (count, sizes.prompt_tokens), np.int32)
    prompts = bench.spread(Prompts(*map(jnp.asarray, _unpadded(ids))), bench.lm_params)
    limits = Limits(max_new_tokens=sizes.new_tokens, stop_ids=())
    written = DECODER.make_decoder(sizes.decoder)
    timing = bench.timed(lambda: generate_greedy(written, params, prompts, limits).ids)
    new = count * sizes.new_tokens
    return bench.result(timing, flops=generation_flops(bench), new_tokens=new)


def generation_flops(bench: Bench, devices: int = 0) -> float:
    """Returns the operations of reading the prompts and of appending each token."""
    sizes, rows = bench.sizes, bench.sizes.prompts * (devices or bench.rows)
    slots = sizes.prompt_tokens + sizes.new_tokens - 1
    return decoder_flops(sizes.decoder, rows, slots, sizes.new_tokens)


def search(bench: Bench, number: int) -> Sides:
    """Measures exact search of the number-th size, on vectors that are drawn on the devices."""
    sizes, devices = bench.sizes, bench.layout.devices or jax.devices()[:1]
    size = sizes.vectors[number]
    blocks = -(-size // (sizes.block_rows * len(devices))) * len(devices)
    needed = blocks * sizes.block_rows * sizes.dim * 4 / len(devices)
    # The scores of a block, and what was found so far.
    needed += 3 * sizes.searched * sizes.block_rows * 4
    stats = devices[0].memory_stats() or {}
    free = stats.get("bytes_limit", np.inf) - stats.get("bytes_in_use", 0)
    if needed > 0.95 * free:
        raise Skipped(
            f"{size:,} vectors need {needed / 1e9:.1f} GB a device, {free / 1e9:.1f} free"
        )
    vectors, queries = _vectors(bench, blocks)
    find = _searcher(bench, size)
    timing = bench.timed(lambda: find(queries, vectors))
    flops = 2.0 * sizes.searched * size * sizes.dim
    found = bench.result(timing, flops=flops, queries=sizes.searched)
    read = size * sizes.dim * 4 / statistics.median(timing.seconds)
    sides = {"ragjax": found | {"vectors": size, "bytes_read_per_second": read}}
    from _accelerator_torch import torch_search

    ids = np.asarray(find(queries, vectors)[1])
    return sides | {"pytorch": torch_search(bench, vectors, queries, size, ids)}


def _vectors(bench: Bench, blocks: int) -> tuple[Array, Array]:
    """Returns vectors `[C, M, D]`, a part of the blocks on each device, and queries `[B, D]`."""
    sizes, mesh = bench.sizes, bench.layout.mesh
    rows = None if mesh is None else NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    all_of_it = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    def draw(key: Array) -> Array:
        shape = (sizes.block_rows, sizes.dim)
        return jax.vmap(lambda number: jax.random.normal(jax.random.fold_in(key, number), shape))(
            jnp.arange(blocks)
        )

    def one_by_one(key: Array) -> Array:
        # Of all blocks at once the random bits would take as much room again.
        shape = (sizes.block_rows, sizes.dim)
        return jax.lax.map(
            lambda number: jax.random.normal(jax.random.fold_in(key, number), shape),
            jnp.arange(blocks),
        )

    vectors = jax.jit(one_by_one if mesh is None else draw, out_shardings=rows)(jax.random.key(4))
    queries = jax.random.normal(jax.random.key(5), (sizes.searched, sizes.dim))
    return vectors, queries if mesh is None else jax.device_put(queries, all_of_it)


def _searcher(bench: Bench, size: int) -> Callable[[Array, Array], tuple[Array, Array]]:
    """Returns `ragjax.index.exact.exact_search`, over the parts of all devices."""
    k, mesh = bench.sizes.k, bench.layout.mesh
    if mesh is None:
        return jax.jit(functools.partial(exact_search, size=size, k=k))
    axes = mesh.axis_names

    def of_part(queries: Array, blocks: Array) -> tuple[Array, Array]:
        first = jax.lax.axis_index(axes) * (blocks.shape[0] * blocks.shape[1])
        scores, ids = exact_search(queries, blocks, size - first, k)
        return scores, jnp.where(ids < 0, ids, ids + first)

    parts = jax.shard_map(
        of_part,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(axes)),
        out_specs=PartitionSpec(None, axes),
        check_vma=False,  # as in `ragjax.index.exact`
    )

    def find(queries: Array, blocks: Array) -> tuple[Array, Array]:
        scores, ids = parts(queries, blocks)
        best, columns = jax.lax.top_k(scores, k)
        return best, jnp.take_along_axis(ids, columns, axis=1)

    return jax.jit(find)
