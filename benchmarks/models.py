"""Forward and training throughput of an encoder and a decoder beside PyTorch, in one run.

    python benchmarks/models.py                  # full on a GPU or TPU, tiny on a CPU
    python benchmarks/models.py --size full --peak_tflops 989

`full` is BERT-base at length 128 and a Llama decoder of 1.2 billion parameters, in bfloat16 with
float32 masters: about ten minutes and 60 GB of GPU memory. `tiny` takes about two minutes on two
CPU cores, in float32. Weights are random: nothing is downloaded. Utilisation is the model's own
multiplications (a causal decoder's attention counted once, not twice; recomputing not at all) over
the peak of the device. PyTorch, eager and compiled, is measured if it is installed. At the end
stands the compile time of SmolLM2-135M's 30 layers.
"""

import dataclasses
import functools
import gc
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

# PyTorch shares the device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from _beside import in_turns, llama_settings
from _work import (
    BERT_BASE,
    LLAMA_1B,
    bert_sizes,
    decoder_flops,
    encoder_flops,
    llama_sizes,
    peak_tflops,
)

from ragjax.models import LMBatch, Tokens
from ragjax.models.decoder import model as decoder
from ragjax.models.decoder.config import DecoderConfig
from ragjax.models.encoder import make_encode
from ragjax.models.encoders import bert
from ragjax.models.encoders.bert import BertConfig
from ragjax.models.layers.pooling import mean_pool
from ragjax.models.layers.stacks import cast_floats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    size: Literal["auto", "full", "tiny"] = "auto"
    """auto: full on an accelerator, tiny on a CPU."""
    models: tuple[Literal["encoder", "decoder", "compile"], ...] = ("encoder", "decoder", "compile")
    """What is measured; compile is the compile time of SmolLM2-135M."""
    passes: tuple[Literal["forward", "train"], ...] = ("forward", "train")
    """train: forward, backward and an AdamW update."""
    rounds: int = 5
    """Repetitions, the implementations interleaved; the median is shown."""
    peak_tflops: float = 0.0
    """Of the device, for utilisation; 0: from the table of known devices."""
    torch: bool = True
    """Measure PyTorch if it is installed."""
    torch_compile: bool = True
    """Measure it compiled, too."""


class Sizes(NamedTuple):
    """What is measured at one size."""

    dtype: str
    encoder: BertConfig
    texts: int
    text_length: int
    decoder: DecoderConfig
    rows: int
    context_length: int
    target_length: int


SMOLLM2 = llama_sizes(49152, 576, 1536, 30, 9, 3)
SIZES = {
    "full": Sizes(
        "bfloat16",
        BERT_BASE, 256, 128,
        LLAMA_1B, 8, 960, 64,
    ),
    "tiny": Sizes(
        "float32",
        bert_sizes(1000, 128, 4, 4, 128), 32, 128,
        llama_sizes(2000, 128, 384, 4, 4, 2), 8, 112, 16,
    ),
}  # fmt: skip


class Work(NamedTuple):
    """One line of the table: a model and a pass, in every implementation."""

    title: str
    tokens: int
    flops: float
    steps: dict[str, Callable[[], Callable[[], Any]]]  # makes the step; it waits for its result


def random_params(shapes: Any, seed: int = 0) -> Any:
    """Draws parameters of given shapes with numpy; scales are one, the rest is small."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> jax.Array:
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape, jnp.float32)
        return jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def jax_forward(function: Callable[..., Any], params: Any, batch: Any, dtype: str) -> Any:
    """Returns the step of a forward pass with parameters in `dtype`."""
    params, compiled = cast_floats(params, dtype), jax.jit(function)
    return lambda: jax.block_until_ready(compiled(params, batch))


def jax_train(loss: Callable[..., Any], params: Any, batch: Any, dtype: str) -> Any:
    """Returns a step of AdamW on float32 masters, computing in `dtype`."""
    optimizer = optax.adamw(1e-5)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        params, moments = state
        value, grads = jax.value_and_grad(lambda p: loss(cast_floats(p, dtype), batch))(params)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    state = (params, optimizer.init(params))

    def step() -> Any:
        nonlocal state
        state, value = update(state, batch)
        return jax.block_until_ready(value)

    return step


def torch_step(
    make: Callable[[], Any], loss: Callable[..., Any], dtype: str, *, train: bool, compiled: bool
) -> Callable[[], Any]:
    """Returns the same step in PyTorch: `loss(model, device)` in mixed precision if it trains."""
    import torch  # pyrefly: ignore  (not a dependency)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    narrow = getattr(torch, dtype)
    model = make().to(device, torch.float32 if train else narrow).train(train)
    run = torch.compile(loss) if compiled else loss

    def forward() -> Any:
        with torch.no_grad():
            return run(model, device)

    def update() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=narrow, enabled=narrow is not torch.float32):
            value = run(model, device)
        value.backward()
        optimizer.step()
        return value

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")
    once = update if train else forward

    def step() -> Any:
        result = once()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return step


def encoder_work(sizes: Sizes, mode: str, options: Options) -> Work:
    """Returns the work of the encoder: mean-pooled embeddings, or their distance to a target."""
    config, length = sizes.encoder, sizes.text_length
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, (sizes.texts, length))
    goal = rng.standard_normal((sizes.texts, config.hidden_size), np.float32)

    def make_jax() -> Callable[[], Any]:
        encode = make_encode(bert.FAMILY, config, mean_pool)
        _, shapes = bert.FAMILY.abstract(config)
        tokens = Tokens(jnp.asarray(ids, jnp.int32), jnp.ones(ids.shape, bool))
        params = random_params(shapes)
        if mode == "forward":
            return jax_forward(encode, params, tokens, sizes.dtype)
        target = jnp.asarray(goal)
        return jax_train(
            lambda p, batch: jnp.mean((encode(p, batch) - target) ** 2), params, tokens, sizes.dtype
        )

    def make_torch(compiled: bool) -> Callable[[], Any]:
        import torch  # pyrefly: ignore  (not a dependency)
        from transformers import BertConfig as TorchConfig
        from transformers import BertModel

        settings = bert.format_config(config)
        for name in ("model_type", "architectures"):
            settings.pop(name)
        settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        inputs, mask, target = torch.tensor(ids), torch.ones(ids.shape), torch.tensor(goal)

        def loss(model: Any, device: str) -> Any:
            hidden = model(inputs.to(device), attention_mask=mask.to(device)).last_hidden_state
            pooled = hidden.mean(1)
            return ((pooled.float() - target.to(device)) ** 2).mean() if mode == "train" else pooled

        return torch_step(
            lambda: BertModel(TorchConfig(**settings), add_pooling_layer=False),
            loss,
            sizes.dtype,
            train=mode == "train",
            compiled=compiled,
        )

    flops = encoder_flops(config, sizes.texts, length) * (3 if mode == "train" else 1)
    steps = _implementations(make_jax, make_torch, options)
    return Work(f"encoder, {mode}, {sizes.dtype}", sizes.texts * length, flops, steps)


def decoder_work(sizes: Sizes, mode: str, options: Options) -> Work:
    """Returns the work of the decoder: log-probabilities of the last tokens, or their mean."""
    config = sizes.decoder
    rng = np.random.default_rng(0)
    length = sizes.context_length + sizes.target_length - 1  # the last token is only predicted
    ids = rng.integers(0, config.vocab_size, (sizes.rows, length + 1))
    first = sizes.context_length

    def make_jax() -> Callable[[], Any]:
        shapes = jax.eval_shape(lambda key: decoder.init_params(config, key), jax.random.key(0))
        context, target = (jnp.asarray(x, jnp.int32) for x in (ids[:, :first], ids[:, first:]))
        batch = LMBatch(context, jnp.ones_like(context, bool), target, jnp.ones_like(target, bool))
        score = functools.partial(decoder.token_log_probs, config)
        params = random_params(shapes)
        if mode == "forward":
            return jax_forward(score, params, batch, sizes.dtype)
        return jax_train(lambda p, batch: -score(p, batch).mean(), params, batch, sizes.dtype)

    def make_torch(compiled: bool) -> Callable[[], Any]:
        import torch  # pyrefly: ignore  (not a dependency)
        from transformers import LlamaConfig, LlamaForCausalLM

        tokens = torch.tensor(ids)

        def loss(model: Any, device: str) -> Any:
            here = tokens.to(device)
            hidden = model.model(here[:, :-1]).last_hidden_state[:, first - 1 :]
            logits = model.lm_head(hidden).float().flatten(0, 1)
            reduction = "mean" if mode == "train" else "none"
            targets = here[:, first:].flatten()
            return torch.nn.functional.cross_entropy(logits, targets, reduction=reduction)

        return torch_step(
            lambda: LlamaForCausalLM(LlamaConfig(**llama_settings(config), use_cache=False)),
            loss,
            sizes.dtype,
            train=mode == "train",
            compiled=compiled,
        )

    flops = decoder_flops(config, sizes.rows, length, sizes.target_length)
    flops *= 3 if mode == "train" else 1
    steps = _implementations(make_jax, make_torch, options)
    return Work(f"decoder, {mode}, {sizes.dtype}", sizes.rows * length, flops, steps)


def measure(work: Work, rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each implementation's steps, the implementations interleaved."""
    steps: dict[str, Callable[[], Any]] = {}
    for name, make in work.steps.items():
        try:
            steps[name] = make()
            for _ in range(2):  # compiles, and lets the memory settle
                steps[name]()
        except Exception as error:  # one implementation that cannot run leaves the others
            steps.pop(name, None)
            print(f"    {name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    return in_turns(steps, rounds, work.title)


def report(work: Work, seconds: dict[str, list[float]], peak: float | None) -> list[str]:
    """Returns the lines of the table.

    Args:
        work: What was measured.
        seconds: Of each implementation's steps.
        peak: 10^12 additions and multiplications a second of the device, or None.
    """
    median = {name: statistics.median(times) for name, times in seconds.items()}
    lines = [f"{work.title}: {work.tokens:,} tokens, {work.flops / 1e12:.3g} TFLOP a step"]
    for name, time_ in median.items():
        rate = work.flops / time_ / 1e12
        used = f"{100 * rate / peak:5.1f} % of the peak" if peak else ""
        than = " ".join(
            f"{median[other] / time_:.2f}x {other}" for other in median if name == "JAX" != other
        )
        lines.append(
            f"    {name:16} {1e3 * time_:9.1f} ms {work.tokens / time_:12,.0f} tokens/s "
            f"{rate:8.3g} TFLOP/s  {used}  {than}".rstrip()
        )
    return lines


def compile_seconds(config: DecoderConfig, *, train: bool) -> float:
    """Returns the seconds to trace and compile a decoder's scoring, or its gradient."""
    shapes = jax.eval_shape(lambda key: decoder.init_params(config, key), jax.random.key(0))

    def array(length: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((8, length), dtype)

    batch = LMBatch(array(168, jnp.int32), array(168, bool), array(24, jnp.int32), array(24, bool))

    def score(params: Any, batch: LMBatch) -> jax.Array:
        return decoder.token_log_probs(config, params, batch).sum()

    started = time.perf_counter()
    jax.jit(jax.grad(score) if train else score).lower(shapes, batch).compile()
    return time.perf_counter() - started


def main(options: Options) -> None:
    """Measures each model and pass and prints a table."""
    device = jax.devices()[0]
    size = options.size
    if size == "auto":
        size = "tiny" if device.platform == "cpu" else "full"
    peak = options.peak_tflops or peak_tflops(device.device_kind)
    told = f"{peak:,.0f} TFLOP/s" if peak else "unknown: --peak_tflops gives it"
    print(f"{device.device_kind}, jax {jax.__version__}, size {size}, peak {told}", flush=True)
    makers = {"encoder": encoder_work, "decoder": decoder_work}
    for model in options.models:
        if model == "compile":
            for train in (False, True):
                what = "gradient" if train else "scoring"
                took = compile_seconds(SMOLLM2, train=train)
                print(f"compiling {what} of SmolLM2-135M, 30 layers: {took:.1f} s", flush=True)
            continue
        for mode in options.passes:
            work = makers[model](SIZES[size], mode, options)
            seconds = measure(work, options.rounds)
            print("\n".join(report(work, seconds, peak)), flush=True)
            gc.collect()


def _implementations(
    make_jax: Callable[[], Callable[[], Any]],
    make_torch: Callable[[bool], Callable[[], Any]],
    options: Options,
) -> dict[str, Callable[[], Callable[[], Any]]]:
    steps = {"JAX": make_jax}
    if options.torch and importlib.util.find_spec("torch"):
        steps["PyTorch"] = functools.partial(make_torch, False)
        if options.torch_compile:
            steps["PyTorch compiled"] = functools.partial(make_torch, True)
    return steps


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
