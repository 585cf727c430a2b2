"""Prompts that do not fit and texts that are cut are told before anything expensive."""

import json

import pytest

from ragjax.evaluation.records import QuestionRecord
from ragjax.runs import AdaptConfig, EvaluateConfig, RagConfig, dry_run
from ragjax.runs.adapt import open_adapt
from ragjax.runs.prompt_lengths import OF_EVALUATION, note_cut_answers
from ragjax.training.loop import StopFlag

OPTIONS = {"language_model": {"train_layers": 1}, "data_options": {"answer_questions": 20}}


@pytest.fixture
def changed(tmp_path, write_domain, tiny_inputs):
    """A function that writes the domain with a question or a passage changed, and the config."""

    def write(kind, *, question=None, text="", answer="", passage="", **options):
        folder = write_domain(tmp_path / "data")
        for name, id, new in (
            ("queries", question, text),
            ("corpus", passage and "red-cat", passage),
        ):
            path = folder / f"{name}.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            for row in rows:
                if row["_id"] == id:
                    row |= {"text": new}
                    row |= {"metadata": {"answers": [answer]}} if answer and id == question else {}
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        models = {name: tiny_inputs[name] for name in ("encoder", "lm")}
        given = {"data": str(folder), "output": str(tmp_path / "run"), **models, **options}
        return EvaluateConfig(**given) if kind is EvaluateConfig else kind.from_dict(given)

    return write


@pytest.mark.parametrize("kind", [AdaptConfig, RagConfig])
@pytest.mark.parametrize(("split", "question"), [("train", "q3"), ("test", "q5")])
def test_a_question_that_no_prompt_has_room_for_is_named(changed, kind, split, question):
    config = changed(kind, question=question, text="why? " * 100, **OPTIONS)
    message = (
        rf"the {split} question '{question}', 'why. why.*, is too long: with the template it takes"
        r" 5\d\d tokens of the 488 that are left for a prompt \(.*/lm reads 512, the answer"
        r" takes 24\); .* lower --evaluation.documents, or give a model that reads more with --lm"
    )
    with pytest.raises(ValueError, match=message):
        dry_run(config, stop=StopFlag(), log=lambda line: None)


def test_an_evaluation_names_its_own_flags(changed):
    config = changed(EvaluateConfig, question="q5", text="why? " * 100)
    with pytest.raises(ValueError, match=r"test question 'q5'.* lower --documents, or give"):
        dry_run(config, stop=StopFlag(), log=lambda line: None)


def test_room_is_kept_for_all_documents_and_all_generated_tokens(changed, tmp_path):
    options = OPTIONS | {"evaluation": {"documents": 70, "max_new_tokens": 300}}
    with pytest.raises(ValueError, match="has no room for 70 documents.*the answer takes 300"):
        dry_run(changed(AdaptConfig, **options), stop=StopFlag(), log=lambda line: None)


@pytest.mark.parametrize(
    "group", [{"prompt": {"answer_tokens": 600}}, {"evaluation": {"max_new_tokens": 600}}]
)
def test_answers_that_leave_no_room_for_a_prompt_are_refused(changed, group):
    with pytest.raises(ValueError, match=r"reads 512 .* 600 .*; lower the larger"):
        dry_run(changed(AdaptConfig, **OPTIONS, **group), stop=StopFlag(), log=lambda line: None)


def test_what_the_language_model_does_not_read_is_counted_and_named(changed, tmp_path):
    config = changed(
        AdaptConfig, question="q5", text="what?", answer="x" * 40, passage="a long text " * 20,
        **OPTIONS, prompt={"document_tokens": 60, "answer_tokens": 30},
    )  # fmt: skip
    told = []
    workspace = open_adapt(config, tmp_path / "run", stop=StopFlag(), log=told.append)
    notes = [
        "1 of 80 (1.2%) passages are cut for the language model, which reads their first 60 tokens"
        " (--prompt.document_tokens)",
        "1 of 80 (1.2%) right answers are cut to 30 tokens where they are learnt or scored"
        " (--prompt.answer_tokens)",
        "1 of 53 (1.9%) right answers to evaluate on are longer than the 24 tokens after which a"
        " generated answer is cut (--evaluation.max_new_tokens)",
    ]
    assert [note for note in workspace.notes if "%" in note] == notes  # the report shows them
    assert {f"note: {note}" for note in notes} <= set(told)
    del workspace.notes[:]
    rows = [
        QuestionRecord(id="q", system="s", question="?", answers=("x",), prediction=text)
        for text in ("x" * 23, "x" * 22, None)
    ]
    note_cut_answers(workspace, {"s": rows}, OF_EVALUATION)
    assert workspace.notes == [
        "1 of 2 (50.0%) generated answers took all 24 tokens that they may take, and were perhaps"
        " cut (--max_new_tokens)"
    ]


def test_a_run_whose_texts_are_all_read_says_nothing_of_them(changed, tmp_path):
    workspace = open_adapt(
        changed(AdaptConfig, **OPTIONS), tmp_path / "run", stop=StopFlag(), log=lambda line: None
    )
    assert not [note for note in workspace.notes if "tokens" in note]
    written = QuestionRecord(id="q", system="s", question="?", prediction="7")
    note_cut_answers(workspace, {"s": [written]})
    assert not [note for note in workspace.notes if "tokens" in note]
