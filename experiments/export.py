"""Write a trained model, or any model that ragjax loads, as a folder that servers read.

    python experiments/export.py --run runs/adapt --what encoder --output export/encoder
    python experiments/export.py --run runs/adapt --what language_model --output export/lm
    python experiments/export.py --source model.gguf --what language_model --output export/lm

An encoder becomes a sentence-transformers folder in the layout that its old versions read
too, a language model a transformers folder. Nothing is overwritten; the folder
appears when every tensor has been read back and found equal, bit for bit.
"""

import logging
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from ragjax.models import load_encoder, load_language_model
from ragjax.models.export import plan_encoder, plan_language_model
from ragjax.models.export.card import Card
from ragjax.models.export.folder import ModelFolder, check_destination, publish
from ragjax.models.export.language_model import auto_class
from ragjax.runs.options.checks import check_numbers
from ragjax.runs.program import BAD_INPUT, flag_names, show_error
from ragjax.runs.report.card import run_card
from ragjax.runs.saved import adapted_encoder, adapted_language_model, open_run

What = Literal["encoder", "query_encoder", "doc_encoder", "language_model"]


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Write a trained model, or any model that ragjax loads, as a folder that servers read.

    Attributes:
        what: The encoder (of a run with one encoder for queries and documents, or of a source), one
            of the two encoders of a run that has two, or the language model.
        output: Folder to write; must not exist, or be empty.
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

    what: What
    output: str
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
        if bool(self.run) == bool(self.source):
            raise ValueError("give one of --run FOLDER (an adapted model) and --source MODEL")
        if self.source and self.what in ("query_encoder", "doc_encoder"):
            raise ValueError(
                f"--what {self.what} is of a run with two encoders; a --source has one, --what"
                " encoder"
            )
        check_numbers(self, mark="--")
        if not self.max_shard_gb * 10**9 >= 1:
            raise ValueError(
                f"--max_shard_gb must be at least a byte, 1e-9, got {self.max_shard_gb:g}"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script and returns its exit code: 0, or 2 for bad input or a failed write."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="note: %(message)s")
    # Ends as an exception, so that what was written so far is removed.
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        _run(tyro.cli(Flags, args=arguments, description=__doc__))
        return 0
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ValueError, OSError) as error:
        show_error(error, arguments, flag_names(Flags))
        return BAD_INPUT


def _run(flags: Flags) -> None:
    output = Path(flags.output)
    check_destination(output)  # before anything that takes time
    model, card = _from_run(flags) if flags.run else _from_source(flags)
    is_lm = flags.what == "language_model"
    plan: Callable[..., ModelFolder] = plan_language_model if is_lm else plan_encoder
    contents = plan(
        model,
        dtype=flags.dtype,
        max_shard_size=int(flags.max_shard_gb * 10**9),
        card=card,
    )
    if flags.dry_run:
        check_destination(output, size=sum(contents.sizes().values()))
        _show_sizes(f"{output} would hold", contents.sizes())
        return
    exported = publish(contents, output)
    _show_sizes(str(exported.folder), exported.sizes)
    print(
        f"read back: {exported.num_tensors} tensors as {flags.dtype}, every bit equal to what was"
        " to be written"
    )
    folder = repr(str(exported.folder))
    if is_lm:
        print(f"load it with transformers: {auto_class(model)}.from_pretrained({folder})")
        print(f"or with ragjax: load_language_model({folder})")
    else:
        print(f"load it with sentence-transformers: SentenceTransformer({folder})")
        print(f"or with ragjax: load_encoder({folder})")


def _from_run(flags: Flags) -> tuple[Any, Card]:
    run = open_run(flags.run)
    if flags.what == "language_model":
        model = adapted_language_model(run)
    else:
        model = adapted_encoder(run, flags.what.removesuffix("_encoder"), flags.models)
        if flags.models == "shipped" and run.served and run.served.retriever == "base":
            print(
                f"note: {run.served.reason}; so this is the un-adapted encoder, --models adapted"
                " exports the trained one"
            )
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
