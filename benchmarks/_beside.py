"""What the benchmarks share: implementations timed in turns, and PyTorch's model beside ours."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tyro
from tqdm import tqdm

from ragjax.models import LanguageModel
from ragjax.models.decoder.checkpoint import params_to_huggingface
from ragjax.models.decoder.config import DecoderConfig
from ragjax.refresh import RefreshError

F = TypeVar("F")


def run_program(
    flags: type[F], run: Callable[[F], None], arguments: Sequence[str] | None, doc: str | None
) -> int:
    """Parses the flags, runs the benchmark and returns its exit code: 0, or 2 for bad input."""
    try:
        run(tyro.cli(flags, args=arguments, description=doc))
    except (ValueError, OSError, ImportError, RefreshError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def in_turns(
    runs: Mapping[str, Callable[[], Any]], rounds: int, title: str = "rounds"
) -> dict[str, list[float]]:
    """Returns the seconds of each round by name; every round runs each of them once."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(rounds), desc=title, file=sys.stderr):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median, the smallest and the largest ratio of two sides timed in turns."""
    found = [a / b for a, b in zip(theirs, ours, strict=True)]
    return statistics.median(found), min(found), max(found)


def llama_settings(config: DecoderConfig) -> dict[str, Any]:
    """Returns the arguments of `transformers.LlamaConfig` for a decoder of that family."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
    }


def torch_llama(model: LanguageModel) -> Any:
    """Returns the same language model in PyTorch, for inference.

    Raises:
        ImportError: PyTorch is not installed.
    """
    try:
        import torch  # pyrefly: ignore  (not a dependency)
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ImportError(f"{error}; install the [parity] extra, or --no-torch") from error
    reference = LlamaForCausalLM(LlamaConfig(**llama_settings(model.config), eos_token_id=None))
    tensors = params_to_huggingface(model.config, model.params)
    reference.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()}, strict=False)
    return reference.eval()
