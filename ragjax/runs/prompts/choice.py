"""Whether a run reads in the chat template of its language model: chosen once, by dev questions."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ragjax.data import DocumentTokens
from ragjax.models.language_model import LanguageModel
from ragjax.runs.models import score_tokens
from ragjax.runs.prompt_lengths import Asked, PromptFlags, check_room
from ragjax.runs.prompts.text import PROMPT, chat_text, read_kept, with_prompt
from ragjax.runs.teachers.batches import Part, Row, row_batches, scored_batches
from ragjax.runs.tokens import make_prompts, training_prompts
from ragjax.runs.workspace import Workspace
from ragjax.storage import write_json

# Dev questions that are measured, at most: each is read twice. Between two prompts an answer's nats
# per token differ by 1 or 2, with a standard deviation of about 1.
_MEASURED = 16


def choose_prompt(workspace: Workspace, asked: Sequence[Asked]) -> Workspace:
    """Returns the workspace with the prompt that the run reads, writes `prompt.json`, and says why.

    Args:
        workspace: Data and models; its prompts are in a chat template only if the options say `on`.
        asked: What the language model will read: a chat template takes some of its room.
    """
    plain, folder = workspace.lm, workspace.folder
    say = workspace.log if plain.chat is None else workspace.note
    if (kept := read_kept(folder)) is not None:
        say(kept["reason"])
        return _reading(workspace, with_prompt(plain, workspace.config.prompt, None, folder))
    lm, why = plain, _why_not_measured(workspace)
    in_chat = workspace.config.prompt.chat == "on"
    if not why:
        chat = dataclasses.replace(plain, prompt=chat_text(plain))
        measured = [workspace.questions["dev"][row] for row in _rows(workspace)]
        # Those of an evaluation are read for nothing else.
        read = [*asked, Asked("dev", measured, 1)]
        if not (why := _why_no_room(_reading(workspace, chat), read)):
            with workspace.timed("prompt"):
                without, within = _nll(workspace, [plain, chat])
            in_chat, count = within < without, len(measured)
            lm = chat if in_chat else plain
            why = (
                f"the right answers to {count} dev questions cost {within:.2f} nats per token in"
                f" it, {without:.2f} without"
            )
    reason = f"prompt: {'in the' if in_chat else 'no'} chat template ({why})"
    text = lm.prompt._asdict() if lm.prompt else None
    write_json(folder / PROMPT, {"chat": in_chat, "reason": reason, "text": text})
    say(reason)
    return workspace if lm is plain else _reading(workspace, lm)


def measured_prompts(workspace: Workspace) -> int:
    """Returns how many prompts are read to choose; 0: nothing is left to choose."""
    chosen = read_kept(workspace.folder) is not None
    return 0 if chosen or _why_not_measured(workspace) else 2 * len(_rows(workspace))


def _why_not_measured(workspace: Workspace) -> str:
    """Says why nothing is measured, "" where it is."""
    config, lm = workspace.config, workspace.lm
    if lm.chat is None:
        return f"{lm.source} has none"
    if config.prompt.chat != "auto":
        return f"prompt.chat {config.prompt.chat}"
    try:
        chat_text(lm)
    except ValueError as error:
        return str(error)
    if config.keep == "last":
        return "keep last: nothing is chosen on dev"
    return "" if _rows(workspace) else "no dev question has an answer to choose by"


def _why_no_room(workspace: Workspace, asked: Sequence[Asked]) -> str:
    """Says which question has no room for a chat template, "" where all have."""
    try:
        check_room(workspace, asked, PromptFlags())
    except ValueError as error:
        return f"no room for it: {error}"
    return ""


def _rows(workspace: Workspace) -> list[int]:
    """Returns the dev questions that are measured."""
    dev = workspace.questions["dev"]
    return [row for row, question in enumerate(dev) if question.answers][:_MEASURED]


def _nll(workspace: Workspace, lms: Sequence[LanguageModel]) -> list[float]:
    """Returns the mean NLL of the right answers in the prompts of each, in nats per token.

    Each is read behind a passage that is known to be relevant, or behind none. The tokens are those
    of the first: an answer may have fewer in another prompt, and would cost more in each.
    """
    relevant, questions = workspace.relevant_rows("dev"), workspace.questions["dev"]
    totals = np.zeros((len(lms), len(_rows(workspace))))
    lengths = np.zeros(totals.shape[1])
    for number, lm in enumerate(lms):
        reading, prompts = _reading(workspace, lm), training_prompts(workspace.config.prompt, lm)
        rows = []
        for place, row in enumerate(_rows(workspace)):
            question, docs = questions[row], sorted(relevant[row])[:1]
            context = prompts.context(question.text, reading.documents.get(docs))
            target = prompts.target(question.answers[0])
            lengths[place] = lengths[place] or len(target)
            part = Part(str(place), 0, len(target))
            rows.append(Row(docs[0] if docs else -1, context, target, (part,)))
        params, tokens = workspace.in_compute_dtype(lm.params), score_tokens(workspace.config)
        for _, found in scored_batches(lm, params, row_batches(lm, prompts, rows, tokens)):
            for key, (log_prob, _) in found.items():
                totals[number, int(key)] = -log_prob
            workspace.stop.check()
    return (totals / lengths).mean(axis=1).tolist()


def _reading(workspace: Workspace, lm: LanguageModel) -> Workspace:
    """Returns a workspace whose language model reads other prompts."""
    config = workspace.config
    prompts = make_prompts(config.prompt, lm, new_tokens=config.evaluation.max_new_tokens)
    documents = DocumentTokens(prompts, workspace.dataset.corpus)
    return dataclasses.replace(workspace, lm=lm, prompts=prompts, documents=documents)
