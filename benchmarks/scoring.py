"""Scoring speed of a language model beside PyTorch, same weights, same tokens, one process.

    python benchmarks/scoring.py

Both compute log p(y|c∘x) of the same rows in turns, after one untimed round each; PyTorch is given
the same courtesy of computing logits at the answer's positions only. Needs the [parity] extra. Two
CPU cores take about three minutes; a ratio above 1 means that ragjax is faster.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from _beside import in_turns, ratios, run_program, torch_llama

from ragjax.models import DEFAULT_LM, LanguageModel, LMBatch, load_language_model


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Compares the scoring speed of ragjax and PyTorch.

    Attributes:
        lm: Language model: folder, .gguf file, hub id or pip:NAME==VERSION.
        rows: Rows of a batch.
        context_tokens: Tokens of each context.
        answer_tokens: Tokens of each answer.
        rounds: Timed rounds of each; the median of the ratios counts.
    """

    lm: str = DEFAULT_LM
    rows: int = 8
    context_tokens: int = 168
    answer_tokens: int = 24
    rounds: int = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code: 0, or 2 for bad input."""
    return run_program(Flags, compare, arguments, __doc__)


def compare(flags: Flags) -> None:
    """Measures both and prints tokens a second, the ratio and the largest difference."""
    model = load_language_model(flags.lm)
    rng = np.random.default_rng(0)
    ids = rng.integers(
        0, model.config.vocab_size, (flags.rows, flags.context_tokens + flags.answer_tokens)
    ).astype(np.int32)
    ours, theirs = _ragjax(model, ids, flags), _pytorch(model, ids, flags)
    difference = float(np.abs(ours() - theirs()).max())
    seconds = in_turns({"ragjax": ours, "PyTorch": theirs}, flags.rounds)
    for name, column in seconds.items():
        print(f"{name:8} {ids.size / statistics.median(column):8.0f} tokens/s")
    ratio, _, _ = ratios(seconds["PyTorch"], seconds["ragjax"])
    print(f"ratio ragjax / PyTorch {ratio:.2f}x over {flags.rounds} rounds of {ids.shape} tokens")
    print(f"largest difference of a log-probability: {difference:.1e} nats")


def _ragjax(model: LanguageModel, ids: np.ndarray, flags: Flags) -> Callable[[], np.ndarray]:
    cut = flags.context_tokens
    batch = LMBatch(
        *map(
            jax.numpy.asarray,
            (
                ids[:, :cut],
                np.ones_like(ids[:, :cut], bool),
                ids[:, cut:],
                np.ones_like(ids[:, cut:], bool),
            ),
        )
    )
    score = jax.jit(model.token_log_probs)
    return lambda: np.asarray(score(model.params, batch))


def _pytorch(model: LanguageModel, ids: np.ndarray, flags: Flags) -> Callable[[], np.ndarray]:
    reference = torch_llama(model)
    import torch  # pyrefly: ignore  (not a dependency)

    tokens = torch.tensor(ids.astype(np.int64))
    answers = tokens[:, flags.context_tokens :, None]

    def run() -> np.ndarray:
        with torch.inference_mode():
            logits = reference(tokens, logits_to_keep=flags.answer_tokens + 1).logits[:, :-1]
            return torch.log_softmax(logits.float(), -1).gather(-1, answers)[..., 0].numpy()

    return run


if __name__ == "__main__":
    sys.exit(main())
