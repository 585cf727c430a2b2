"""Opens what is evaluated: a finished run, or models as they were published, and a split."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ragjax.adaptation.config import AdaptConfig
from ragjax.adaptation.config_files import to_dict
from ragjax.adaptation.evaluate import answered_rows
from ragjax.adaptation.evaluate_config import (
    EvaluateConfig,
    evaluation_fingerprint,
    run_options,
    system_names,
)
from ragjax.adaptation.finished import FinishedRun, open_run
from ragjax.adaptation.system import (
    adapts_language_model,
    adapts_retriever,
    run_language_model,
    run_towers,
)
from ragjax.adaptation.workspace import Report, Workspace, make_workspace, read_data
from ragjax.data import Dataset, Question, batch_rows
from ragjax.models.encoder import load_encoder
from ragjax.models.language_model import load_language_model
from ragjax.training.loop import StopFlag

CONFIG = "config.json"
# In the config, so that nobody takes an evaluation for a run.
PROGRAM = "experiments/evaluate.py"


class Opened(NamedTuple):
    """What is evaluated, ready to be asked."""

    workspace: Workspace
    weighing: Workspace  # the same with the dev questions that choose the weight of the hybrid
    run: FinishedRun | None
    query_params: Any  # of the adapted encoder, or of the only one
    doc_params: Any
    lm_params: Any
    adapts_retriever: bool
    adapts_lm: bool


def check_output(config: EvaluateConfig, folder: Path) -> None:
    """Checks that a folder is free, or holds an earlier life of this same evaluation.

    Args:
        config: Options.
        folder: Output folder; may be missing.

    Raises:
        FileNotFoundError: There is no run.
        ValueError: The folder holds something else, or an evaluation with other options.
    """
    path = folder / CONFIG
    if config.run and Path(config.run).resolve() == folder.resolve():
        raise ValueError(
            f"--output {folder} is the folder of the run, whose results would be written over;"
            " choose another"
        )
    if not path.is_file():
        ours = {"run.lock", "data", "cost.json", CONFIG + ".tmp"}
        strangers = sorted(p.name for p in folder.glob("*") if p.name not in ours)
        if strangers:
            raise ValueError(
                f"{folder} is not empty ({', '.join(strangers[:3])}) and holds no evaluation;"
                " choose another --output folder"
            )
        return
    run = open_run(Path(config.run)) if config.run else None
    try:
        earlier = json.loads(path.read_text("utf-8"))
        same = earlier["fingerprint"] == evaluation_fingerprint(config, run)
        known, now = earlier["config"], to_dict(config)
        changed = [
            f"{name}: {known.get(name)!r} there, {now.get(name)!r} here"
            for name in sorted({*known, *now} - {"output"})
            if known.get(name) != now.get(name)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not the config of an evaluation ({error}); choose another --output"
        ) from error
    if not same:
        what = "; ".join(changed[:5]) or "the run was made again"
        raise ValueError(
            f"{folder} holds another evaluation ({what}); choose another --output folder, or give"
            " the same options to continue it"
        )


def open_evaluation(
    config: EvaluateConfig, folder: Path, *, stop: StopFlag, report: Report
) -> Opened:
    """Reads run, data and models, and checks that every prompt has room.

    Args:
        config: Options.
        folder: Output folder; what is prepared of the data goes to its sub-folder `data`.
        stop: Looked at between stages.
        report: Shows one line to the user.

    Raises:
        FileNotFoundError, ValueError: For a run, data or models that cannot be used.
    """
    run = open_run(Path(config.run)) if config.run else None
    options = run_options(config, run)
    adapted_lm = run is not None and adapts_language_model(run.config)
    adapted_retriever = run is not None and adapts_retriever(run.config)
    system_names(config, adapts_lm=adapted_lm)  # raises before the data are read
    dataset = read_data(options, folder, report)
    questions = _choose_questions(config, options, dataset)
    if run is None:
        encoder = load_encoder(options.encoder, max_length=options.encoder_max_length or None)
        lm = load_language_model(options.lm)
        query_params, doc_params, lm_params = encoder.params, encoder.params, lm.params
    else:
        query, doc = run_towers(run)
        language_model = run_language_model(run)
        encoder, lm = query.model, language_model.model
        query_params, doc_params = query.params, doc.params
        lm_params = language_model.params
    workspace = make_workspace(
        options, folder, dataset, questions, encoder, lm, stop=stop, report=report
    )
    _check_prompts(workspace, config)
    _note_what_was_seen(workspace, config)
    dev = _shuffled(dataset.questions.get("dev", ()), options.seed)
    weighing = {"dev": dev[: options.data_options.dev_questions]}
    return Opened(
        workspace=workspace,
        weighing=dataclasses.replace(workspace, questions=weighing),
        run=run,
        query_params=query_params,
        doc_params=doc_params,
        lm_params=lm_params,
        adapts_retriever=adapted_retriever,
        adapts_lm=adapted_lm,
    )


def _choose_questions(
    config: EvaluateConfig, options: AdaptConfig, dataset: Dataset
) -> dict[str, tuple[Question, ...]]:
    """Returns the questions of the split, in the order of a run: the first of both are the same."""
    known = dataset.questions.get(config.split, ())
    if not known:
        raise ValueError(
            f"--split {config.split}: {dataset.name} has no such questions; it has"
            f" {', '.join(sorted(name for name, q in dataset.questions.items() if q))}"
        )
    return {config.split: _shuffled(known, options.seed)[: config.max_questions or None]}


def _shuffled(questions: Sequence[Question], seed: int) -> tuple[Question, ...]:
    if not questions:
        return ()
    order = batch_rows(seed, 0, num_examples=len(questions), batch_size=len(questions))
    return tuple(questions[row] for row in order)


def _check_prompts(workspace: Workspace, config: EvaluateConfig) -> None:
    """Refuses documents that no prompt has room for, before anything expensive."""
    evaluation, prompts = workspace.config.evaluation, workspace.prompts
    size = len(workspace.dataset.corpus)
    count = min(evaluation.documents, size)
    if config.robustness:
        count = min(evaluation.documents + config.distractors, size)
    if evaluation.mode != "concat":
        count = 1
    for row in answered_rows(workspace, config.split):
        question = workspace.questions[config.split][row]
        try:
            prompts.context(question.text, [[0]] * count)
        except ValueError as error:
            raise ValueError(f"question {question.id!r}, --documents: {error}") from error


def _note_what_was_seen(workspace: Workspace, config: EvaluateConfig) -> None:
    """Says what the figures of this split cannot show."""
    split = config.split
    if split == "train" and config.run:
        workspace.report("note: the run was trained on train questions")
    if split == "dev":
        workspace.report("note: the weight of the hybrid is chosen on dev questions, also on these")
    answered = len(answered_rows(workspace, split))
    if not answered:
        workspace.report(f"note: no question of {split} has an answer: retrieval alone is measured")
