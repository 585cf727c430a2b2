"""What a run read, as digests: the same command goes on with a run only if they are the same.

The options are the other half, see `ragjax.runs.folder.claim`. Models are told apart by the
fingerprints that loading them computes anyway.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ragjax.models.cross_encoder import load_cross_encoder
from ragjax.models.encoder import TextEncoder
from ragjax.models.language_model import LanguageModel
from ragjax.runs.compare.rerank import NONE, is_cross_encoder
from ragjax.runs.data import Log
from ragjax.runs.folder import CONFIG
from ragjax.runs.models import Encoders
from ragjax.runs.workspace import Workspace
from ragjax.storage import sha256, write_json
from ragjax.storage.processes import SameInAll

_HOW_ENCODED = ("pooling", "steps", "max_length", "query_prefix", "doc_prefix")
_HOW_READ = ("bos_id", "eos_ids", "text_format")


def run_inputs(workspace: Workspace) -> dict[str, Any]:
    """Returns digests of everything that a run's result depends on beside its options.

    They are named as the messages name them, and are JSON values.
    """
    encoders = Encoders(workspace.query_encoder, workspace.encoder)
    inputs: dict[str, Any] = {
        **{name: model_identity(encoder) for name, encoder in encoders.named.items()},
        "language model": model_identity(workspace.lm),
        "prompt": {
            "template": _digest(workspace.lm.prompt),
            "chat template": _digest(workspace.lm.chat),
        },
        "corpus": {"passages": workspace.dataset.corpus.fingerprint},
    }
    if path := getattr(workspace.config.retriever, "scores_file", ""):
        inputs["scores file"] = {"content": sha256(Path(path))}
    crossed = {
        "re-ranking cross-encoder": getattr(workspace.config, "rerank", NONE),
        "teaching cross-encoder": getattr(workspace.config.retriever, "reranker", "") or NONE,
    }
    for name, source in crossed.items():
        if is_cross_encoder(source):
            inputs[name] = {"content": load_cross_encoder(source).fingerprint}
    splits = {f"{split} split": split_identity(workspace, split) for split in workspace.questions}
    return inputs | splits


def split_identity(workspace: Workspace, split: str) -> dict[str, str]:
    """Returns digests of the questions that are used of a split."""
    questions = workspace.questions[split]
    parts = {
        "questions": _digest([[q.id, q.text, q.source] for q in questions]),
        "answers": _digest([q.answers for q in questions]),
    }
    if workspace.truth(split) == "judgements":
        judged = [sorted(rows.items()) for rows in workspace.gold_rows(split)]
        parts["relevance judgements"] = _digest(judged)
    return parts


def model_identity(model: TextEncoder | LanguageModel) -> dict[str, str]:
    """Returns what tells a model from another under the same name, part by part."""
    how = _HOW_ENCODED if isinstance(model, TextEncoder) else _HOW_READ
    return {
        "architecture": _digest(repr(model.config)),
        "tokenizer": _digest(model.tokenizer.to_str()),
        **{name: repr(getattr(model, name)) for name in how},
        "fingerprint": model.fingerprint,
    }


def begin(
    folder: Path, record: Mapping[str, Any], inputs: Mapping[str, Any], *, kind: str, log: Log
) -> None:
    """Writes config.json, or refuses to go on where the inputs have changed since it was written.

    Args:
        folder: Output folder, claimed.
        record: As of `ragjax.runs.folder.config_record`.
        inputs: As of `run_inputs`.
        kind: What is made, for the message.
        log: Shows one line to the user.

    Raises:
        ValueError: An input differs; the message names each one and the parts of it.
    """
    read = json.dumps([dict(record), inputs], sort_keys=True)
    SameInAll("options or inputs").check(read.encode(), wait=True)
    path = folder / CONFIG
    if path.is_file():
        earlier = json.loads(path.read_text("utf-8-sig")).get("inputs")
        if earlier is None:
            log(f"note: {path} does not say what the {kind} read: its inputs are not compared")
        elif changed := _changes(earlier, inputs):
            raise ValueError(
                f"{folder} holds an earlier part of this {kind}, and what it read has changed"
                f" since: {changed}. Put the earlier inputs back, or choose another --output folder"
            )
    write_json(path, {**record, "inputs": inputs})


def check_model(
    model: TextEncoder | LanguageModel,
    what: str,
    inputs: Mapping[str, Any] | None,
    folder: Path | None,
) -> None:
    """Refuses a base model that is not the one that a run began with.

    Args:
        model: As it was loaded now.
        what: `encoder` or `language model`.
        inputs: Of the run; None: it recorded none.
        folder: Of the run; None where there is none.

    Raises:
        ValueError: It is another model; the message names the parts that differ.
    """
    if inputs is None or what not in inputs:
        return
    if changed := _changes({what: inputs[what]}, {what: model_identity(model)}):
        raise ValueError(
            f"{model.source} has changed since {folder} was trained from it: {changed}. What was"
            " trained fits the earlier base model only: put that back"
        )


def _changes(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns a few words on each input that differs, "" if none does."""
    return "; ".join(
        f"{what}: other {', '.join(parts)}"
        for what in sorted({*earlier, *now})
        if (parts := _parts(earlier.get(what) or {}, now.get(what) or {}))
    )


def _parts(earlier: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Returns the parts of an input that differ, with their values where these say something."""
    differ = [name for name in sorted({*earlier, *now}) if earlier.get(name) != now.get(name)]
    # What the other parts do not explain.
    named = [name for name in differ if name != "fingerprint"] or ["weights"] * bool(differ)
    shown = []
    for name in named:
        old, new = earlier.get(name, "nothing"), now.get(name, "nothing")
        is_digest = name not in (*_HOW_ENCODED, *_HOW_READ)
        shown.append(name if is_digest else f"{name} ({old} there, {new} here)")
    return shown


def _digest(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
