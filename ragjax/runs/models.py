"""The models of a run: its language model, and one encoder for queries and documents, or two."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ragjax.models.encoder import (
    Encode,
    TextEncoder,
    build_encoder,
    describe_encoder,
    load_encoder,
    with_options,
)
from ragjax.models.files.placement import loading_as
from ragjax.models.files.sources import resolve_source
from ragjax.models.language_model import (
    LanguageModel,
    describe_language_model,
    load_language_model,
)
from ragjax.models.rag import is_rag, load_rag_language_model, load_rag_query_encoder
from ragjax.runs.options.prompt import read_template
from ragjax.runs.options.shared import LearningConfig, RunConfig
from ragjax.runs.prompts.text import read_kept, with_prompt
from ragjax.training.mesh import Layout, make_layout

# Of a device's memory, for parameters and the optimizer; activations take the rest.
_PARAMETER_SHARE = 0.6
# Of a parameter in a file that is not quantised.
_FEWEST_BYTES = 2


def visible_devices() -> list[jax.Device]:
    """Returns the devices of this process and of those that it computes with."""
    return jax.devices()


def encode_tokens(config: RunConfig) -> int:
    """Returns the tokens of a batch of the encoder on each device."""
    return config.encode_tokens or (1024 if _on_cpu() else 65_536)


def chunk_tokens(config: RunConfig) -> int:
    """Returns the tokens of documents that a training step encodes at a time on a device."""
    return 2 * encode_tokens(config)


def score_tokens(config: RunConfig) -> int:
    """Returns the tokens of a batch of the language model on each device."""
    return config.score_tokens or (4096 if _on_cpu() else 16_384)


def _on_cpu() -> bool:
    return visible_devices()[0].platform == "cpu"


def layout_of(config: RunConfig) -> Layout:
    """Returns where the arrays of a run lie.

    Raises:
        ValueError: There are fewer devices than asked for, or `fsdp` does not divide them; or the
            options are for one process, and several make the run.
    """
    found, refreshing = visible_devices(), config.refresh.devices
    of_process = {number: [] for number in sorted(device.process_index for device in found)}
    for device in found:
        of_process[device.process_index].append(device)
    if len(of_process) > 1:
        _check_processes(config, len(of_process))
    spare = [each for of in of_process.values() for each in of[: len(of) - refreshing]]
    if not spare or config.devices > len(spare):
        raise ValueError(
            f"--devices {config.devices}: there are {len(found)} devices, and"
            f" {refreshing} of them encode (--refresh.devices)"
        )
    devices = spare[: config.devices or None]
    pmap = config.parallel == "pmap"
    fsdp = 1 if pmap else config.fsdp or _fewest_parts(config, devices)
    return make_layout(devices, fsdp=fsdp, mapped=pmap)


def _check_processes(config: RunConfig, count: int) -> None:
    """Raises ValueError for what a run of several processes cannot do."""
    training = getattr(config, "training", None)
    for given, flag, remedy in (
        (config.devices, "devices", "all of them have devices of their own, and all take part"),
        (config.parallel == "pmap", "parallel pmap", "take the mesh"),
        (config.refresh.dispatch == "ray", "refresh.dispatch ray", "each encodes its share"),
        (
            getattr(training, "retrieval", "host") == "callback",
            "training.retrieval callback",
            "retrieve on the host",
        ),
    ):
        if given:
            raise ValueError(f"--{flag} is for one process, and {count} make this run: {remedy}")


def rows_note(layout: Layout, flag: str, rows: int) -> str | None:
    """Says that the rows of a step do not go round the devices; None: they do.

    Args:
        layout: The devices.
        flag: Option that the rows come from.
        rows: Of a step, or of each part of an accumulated one.

    Raises:
        ValueError: They do not, and steps under pmap need it.
    """
    if rows % layout.num_devices == 0:
        return None
    odd = f"--{flag}: {rows:,} rows are no multiple of the {layout.num_devices} devices"
    if layout.mapped:
        raise ValueError(
            f"{odd}, which --parallel pmap needs; change one of them (--devices), or take"
            " --parallel mesh"
        )
    return f"note: {odd}, some of which compute what others do"


def _fewest_parts(config: RunConfig, devices: Sequence[jax.Device]) -> int:
    """Returns over how many devices parameters must be divided to fit; 1 where nobody knows."""
    here = [device for device in devices if device.process_index == jax.process_index()]
    stats = here[0].memory_stats() if len(devices) > 1 else None
    if not stats or "bytes_limit" not in stats:
        return 1
    room = _PARAMETER_SHARE * stats["bytes_limit"]
    needed = _most_parameters(config.lm) * _bytes_each(config.language_model, config.trains_lm)
    each = _bytes_each(config.retriever, config.trains_retriever)
    needed += sum(map(_most_parameters, set(config.encoder_sources))) * each
    parts = [count for count in range(1, len(devices) + 1) if len(devices) % count == 0]
    return next((count for count in parts if needed / count <= room), parts[-1])


def _bytes_each(config: LearningConfig, trained: bool) -> int:
    """Returns bytes per parameter; with its gradient and two moments where it is trained."""
    return 16 if trained and not config.lora_rank else 4


def _most_parameters(source: str) -> float:
    """Returns how many parameters the weights of a model are at most, by the size of its files."""
    path = resolve_source(source)
    files = [path] if path.is_file() else path.rglob("*.safetensors")
    return sum(file.stat().st_size for file in files) / _FEWEST_BYTES


class Encoders(NamedTuple):
    """The encoder of queries and that of documents, the same object where there is one."""

    query: TextEncoder
    doc: TextEncoder

    @property
    def named(self) -> dict[str, TextEncoder]:
        """Each encoder once, by what messages call it."""
        if self.query is self.doc:
            return {"encoder": self.doc}
        return {"query encoder": self.query, "doc encoder": self.doc}

    def mapped(self, change: Callable[[TextEncoder], TextEncoder]) -> "Encoders":
        """Returns both after a change, one object where they were one."""
        query = change(self.query)
        return Encoders(query, query if self.query is self.doc else change(self.doc))


def load_encoders(config: RunConfig) -> Encoders:
    """Loads the encoders of a run, used as its options say.

    Raises:
        FileNotFoundError: One of them is missing.
        ValueError: One cannot be used, or the two do not embed into one space.
    """
    return _encoders(config, _load)


def describe_encoders(config: RunConfig) -> Encoders:
    """Returns the encoders of a run without their weights; see `load_encoders`."""
    return _encoders(config, lambda config, source, _: _load_as(config, source, describe_encoder))


def _encoders(config: RunConfig, load: Callable[[RunConfig, str, Layout], TextEncoder]) -> Encoders:
    sources = config.encoder_sources
    if is_rag(sources[1]):
        raise ValueError(
            f"--doc_encoder {sources[1]}: a RAG checkpoint embeds questions only; add --doc_encoder"
            " with the context encoder that it was trained with"
        )
    layout = layout_of(config)
    loaded = {source: load(config, source, layout) for source in dict.fromkeys(sources)}
    query, doc = (loaded[source] for source in sources)
    for what, first, other in (
        ("dimensions", query.embedding_size, doc.embedding_size),
        ("length 1 of the embeddings", query.normalized, doc.normalized),
    ):
        if first != other:
            raise ValueError(
                f"--query_encoder {query.source} and --doc_encoder {doc.source} cannot be compared:"
                f" {what} {first} there, {other} here; give two encoders that were trained together"
            )
    return Encoders(query, doc)


def load_lm(config: RunConfig, folder: Path | None = None) -> LanguageModel:
    """Loads the language model of a run, which may be the generator of a RAG checkpoint.

    Args:
        config: Options of the run.
        folder: Of a run that has chosen what the language model reads; None: the options say it.
    """
    load = load_rag_language_model if is_rag(config.lm) else load_language_model
    # A run that has chosen needs the file of its template no more.
    chosen = folder is not None and read_kept(folder) is not None
    template = None if chosen else read_template(config.prompt)
    with loading_as(shardings=layout_of(config).sharding):
        return with_prompt(load(config.lm), config.prompt, template, folder)


def describe_lm(config: RunConfig) -> LanguageModel:
    """Returns the language model of a run without its weights, but for a RAG checkpoint's."""
    if is_rag(config.lm):
        return load_lm(config)
    template = read_template(config.prompt)
    return with_prompt(describe_language_model(config.lm), config.prompt, template)


def base_towers(config: RunConfig, encoders: Encoders) -> dict[str, Any]:
    """Returns the towers before training: one `shared` tower, or `query` and `doc` apart."""
    if encoders.query is encoders.doc:
        return dict.fromkeys(config.retriever.tower_names, encoders.doc.params)
    return {"query": encoders.query.params, "doc": encoders.doc.params}


def in_compute_dtype(encoder: TextEncoder, config: RunConfig) -> TextEncoder:
    """Returns the encoder as the run uses it; embeddings of another dtype are another encoder's."""
    if (dtype := _cast_dtype(config)) is None:
        return encoder
    identity = hashlib.sha256(f"{encoder.fingerprint} {dtype}".encode()).hexdigest()
    encoder = with_options(encoder, compute_dtype=dtype)
    return dataclasses.replace(encoder, fingerprint=identity)


def training_encode(encoder: TextEncoder, config: RunConfig) -> Encode:
    """Returns `encode` as training runs it: recomputing its layers if the options say so."""
    if not config.retriever.remat:
        return encoder.encode
    return with_options(encoder, remat=True, compute_dtype=_cast_dtype(config)).encode


def scale_of(encoder: TextEncoder) -> float:
    """Returns the factor from q·d to a logit of p_R: 20 of cosines, 1 of other dot products."""
    return 20.0 if encoder.normalized else 1.0


def scale_note(encoder: TextEncoder, asked: float) -> str | None:
    """Says by which factor p_R weighs embeddings that are not of length 1; None: nothing to say.

    Args:
        encoder: Of documents.
        asked: `retriever.scale`.
    """
    if encoder.normalized:
        return None
    if not asked:
        return (
            f"embeddings of {encoder.source} are not scaled to length 1: p_R is the softmax"
            f" of their dot products, times {scale_of(encoder):g} (--retriever.scale)"
        )
    if asked > scale_of(encoder):
        return (
            f"--retriever.scale {asked:g} multiplies the dot products of embeddings that are"
            f" not scaled to length 1 ({encoder.source}): p_R may be all on one document; such"
            f" encoders are trained with {scale_of(encoder):g}"
        )
    return None


def _load(config: RunConfig, source: str, layout: Layout) -> TextEncoder:
    with loading_as(shardings=layout.sharding):
        encoder = _load_as(config, source, load_encoder)
    return dataclasses.replace(encoder, params=layout.place(encoder.params))


def _load_as(config: RunConfig, source: str, load: Callable[..., TextEncoder]) -> TextEncoder:
    length, query_prefix = config.encoder_max_length, config.query_prefix
    if not is_rag(source):
        return load(
            source,
            max_length=length or None,
            query_prefix=query_prefix,
            doc_prefix=config.doc_prefix,
        )
    encoder = load_rag_query_encoder(source)
    length = min(length or encoder.max_length, encoder.max_length)
    options = dataclasses.replace(encoder, max_length=length, query_prefix=query_prefix or "")
    return build_encoder(encoder.family, encoder.config, encoder.params, encoder.tokenizer, options)


def _cast_dtype(config: RunConfig) -> str | None:
    return None if config.compute_dtype == "float32" else config.compute_dtype
