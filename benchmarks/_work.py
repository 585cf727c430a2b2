"""What devices can do at most, and what the models of the benchmarks multiply."""

from ragjax.models.decoder.config import DecoderConfig
from ragjax.models.encoders.bert import BertConfig

_NVIDIA = "NVIDIA's data sheet, dense"
_GOOGLE = "cloud.google.com/tpu/docs"
# Dense 16-bit multiplications of one device, 10^12 additions and multiplications a second, as its
# vendor states them; the first name that the device's own contains counts.
_PEAKS = (
    ("B200", 2250.0, _NVIDIA),
    ("H200", 989.0, _NVIDIA),
    ("GH200", 989.0, _NVIDIA),
    ("H100 PCIe", 756.0, _NVIDIA),
    ("H100 NVL", 835.0, _NVIDIA),
    ("H100", 989.0, _NVIDIA),
    ("A100", 312.0, _NVIDIA),
    ("L40S", 362.0, _NVIDIA),
    ("L40", 181.0, _NVIDIA),
    ("L4", 121.0, _NVIDIA),
    ("A10G", 70.0, _NVIDIA),
    ("V100", 125.0, _NVIDIA),
    ("T4", 65.0, f"{_NVIDIA}, float16"),
    ("TPU v6", 918.0, _GOOGLE),
    ("TPU v5 lite", 197.0, _GOOGLE),
    ("TPU v5e", 197.0, _GOOGLE),
    ("TPU v5", 459.0, _GOOGLE),  # v5p
    ("TPU v4", 275.0, _GOOGLE),
)


def peak_tflops(kind: str) -> float | None:
    """Returns the peak of a device of the table, or None.

    Args:
        kind: `device_kind` of a JAX device.
    """
    return next((peak for name, peak, _ in _PEAKS if name in kind), None)


def peak_source(kind: str) -> str | None:
    """Returns who states the peak of a device of the table, or None."""
    return next((source for name, _, source in _PEAKS if name in kind), None)


def bert_sizes(vocab: int, hidden: int, layers: int, heads: int, positions: int) -> BertConfig:
    """Returns the sizes of a BERT whose inner width is four times its width."""
    return BertConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=4 * hidden,
        max_positions=positions,
    )


def llama_sizes(
    vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int
) -> DecoderConfig:
    """Returns the sizes of a Llama."""
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
    )


BERT_BASE = bert_sizes(30522, 768, 12, 12, 512)
LLAMA_1B = llama_sizes(128256, 2048, 8192, 16, 32, 8)  # as Llama 3.2 1B


def encoder_flops(config: BertConfig, texts: int, length: int) -> float:
    """Returns the multiplications and additions of a forward pass without padding."""
    layer = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    attention = 2 * length * config.hidden_size  # scores, and the average of the values
    return 2.0 * texts * length * config.num_layers * (layer + attention)


def decoder_flops(config: DecoderConfig, rows: int, length: int, targets: int) -> float:
    """Returns the multiplications and additions of scoring `targets` tokens of `length` in all."""
    heads, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * heads + 2 * keys + 3 * config.intermediate_size)
    attention = 2 * heads * (length + 1) / 2  # a token attends to half of the others on average
    unembedding = targets * config.hidden_size * config.vocab_size
    return 2.0 * rows * (length * config.num_layers * (layer + attention) + unembedding)
