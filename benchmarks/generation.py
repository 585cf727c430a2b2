"""Generation speed of a language model beside transformers, same weights, one process.

    python benchmarks/generation.py
    python benchmarks/generation.py --data data/squad

Both append the most likely token to the same prompts, 32 of them, with a cache, in turns, after one
untimed round each; neither may end early. Needs the [parity] extra; on a GPU, torch's own build
for it. Two CPU cores take about three minutes; a ratio above 1 means that ragjax is faster.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from _beside import in_turns, ratios, run_program, torch_llama

from ragjax.data import PromptBuilder, PromptTemplate, passage_text, read_beir
from ragjax.generation import Limits, Prompts, generate_greedy
from ragjax.models import DEFAULT_LM, LanguageModel, load_language_model
from ragjax.models.decoder.config import DecoderConfig
from ragjax.models.layers.stacks import cast_floats


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Compares the generation speed of ragjax and transformers.

    Attributes:
        lm: Language model of the Llama family: folder, .gguf file, hub id or pip:NAME==VERSION.
        data: Folder in the BEIR layout whose questions and passages make the prompts; without
            it, prompts are random tokens.
        questions: Questions of a batch.
        documents: Documents a question, each with a prompt of its own.
        context_tokens: Tokens of each prompt; with --data, the most.
        new_tokens: Tokens to append.
        dtype: Of the parameters on both sides.
        rounds: Timed rounds of each; the median of the ratios counts.
        torch: Measure transformers, too.
    """

    lm: str = DEFAULT_LM
    data: str | None = None
    questions: int = 8
    documents: int = 4
    context_tokens: int = 170
    new_tokens: int = 32
    dtype: Literal["float32", "bfloat16"] = "float32"
    rounds: int = 5
    torch: bool = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code: 0, or 2 for bad input."""
    return run_program(Flags, compare, arguments, __doc__)


def compare(flags: Flags) -> None:
    """Measures both and prints tokens a second, the ratio and how far the outputs agree."""
    _check(flags)
    model = load_language_model(flags.lm)
    if not isinstance(model.config, DecoderConfig) or model.config.model_type != "llama":
        raise ValueError(f"--lm {flags.lm}: a model of type llama is needed, as both sides have it")
    prompts = make_prompts(model, flags)
    runs = {"ragjax": ragjax_run(model, prompts, flags)}
    if flags.torch:
        runs["transformers"] = transformers_run(model, prompts, flags)
    outputs = {name: run() for name, run in runs.items()}
    seconds = in_turns(runs, flags.rounds)
    shape, tokens = prompts.ids.shape, prompts.ids.shape[0] * flags.new_tokens
    print(f"{shape[0]} prompts of {shape[1]} tokens, {flags.new_tokens} new tokens, {flags.dtype}")
    for name, column in seconds.items():
        median = statistics.median(column)
        print(f"{name:12} {median:7.3f} s {tokens / median:8.0f} new tokens/s")
    if flags.torch:
        ratio, _, _ = ratios(seconds["transformers"], seconds["ragjax"])
        print(f"ratio ragjax / transformers {ratio:.2f}x over {flags.rounds} rounds")
        same = (outputs["ragjax"] == outputs["transformers"]).all(axis=1)
        print(f"equal outputs: {same.sum()} of {len(same)} rows")


def make_prompts(model: LanguageModel, flags: Flags) -> Prompts:
    """Returns one prompt `[L]` for each document of each question."""
    if flags.data is None:
        rng = np.random.default_rng(0)
        shape = (flags.questions * flags.documents, flags.context_tokens)
        ids = rng.integers(0, model.config.vocab_size, shape).astype(np.int32)
        return Prompts(jnp.asarray(ids), jnp.ones(shape, bool))
    template = PromptTemplate(max_answer_tokens=flags.new_tokens)
    builder = PromptBuilder(
        model.tokenizer,
        template=template,
        max_length=flags.context_tokens + flags.new_tokens,
        pad_id=model.pad_id,
        bos_id=model.bos_id,
    )
    with tempfile.TemporaryDirectory() as cache:
        dataset = read_beir(flags.data, cache=cache)
        corpus, questions = dataset.corpus, next(iter(dataset.questions.values()))
        if len(questions) < flags.questions or len(corpus) < flags.documents:
            raise ValueError(
                f"--data {flags.data}: {flags.questions} questions and {flags.documents} passages "
                f"are needed, it has {len(questions)} and {len(corpus)}"
            )
        contexts = []
        for number, question in enumerate(questions[: flags.questions]):
            rows = [(number * flags.documents + k) % len(corpus) for k in range(flags.documents)]
            texts = [passage_text(corpus[row]) for row in rows]
            for ids in builder.encode_documents(texts).ids:
                contexts.append(builder.context(question.text, [ids]))
    packed = builder.pack(contexts, [[]] * len(contexts), context_length=max(map(len, contexts)))
    return Prompts(jnp.asarray(packed.context_ids), jnp.asarray(packed.context_mask))


def ragjax_run(model: LanguageModel, prompts: Prompts, flags: Flags) -> Callable[[], np.ndarray]:
    """Returns a function that gives the new tokens `[R, T]`."""
    limits = Limits(max_new_tokens=flags.new_tokens, stop_ids=())
    params = cast_floats(model.params, flags.dtype)

    def run() -> np.ndarray:
        return np.asarray(generate_greedy(model.decoder, params, prompts, limits).ids)

    return run


def transformers_run(
    model: LanguageModel, prompts: Prompts, flags: Flags
) -> Callable[[], np.ndarray]:
    """Returns a function that gives the new tokens `[R, T]`, on a GPU where torch sees one."""
    reference = torch_llama(model)
    import torch  # pyrefly: ignore  (not a dependency)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference = reference.to(device, getattr(torch, flags.dtype))  # pyrefly: ignore  (wrapped)
    given: dict[str, Any] = {
        "input_ids": torch.tensor(np.asarray(prompts.ids, np.int64), device=device),
        "attention_mask": torch.tensor(np.asarray(prompts.mask, np.int64), device=device),
    }
    options = {"do_sample": False, "pad_token_id": model.pad_id, "use_cache": True}

    def run() -> np.ndarray:
        with torch.inference_mode():
            found = reference.generate(
                **given, **options, max_new_tokens=flags.new_tokens, eos_token_id=None
            )
            return found[:, prompts.ids.shape[1] :].cpu().numpy()

    return run


def _check(flags: Flags) -> None:
    for name in ("questions", "documents", "context_tokens", "new_tokens", "rounds"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(flags, name)}")


if __name__ == "__main__":
    sys.exit(main())
