"""Splits of BEIR folders: held out, under other names, leaked; folders that have less."""

import hashlib

import pytest
from beir_folders import QUERIES, SPLITS, many, question, write_folder

from ragjax.data import DataError, hold_out, leaked_questions, read_beir


class TestHoldOut:
    def test_dev_is_the_lowest_hashes_of_train(self, read):
        docs, queries, rows = many(10)
        queries, test = [*queries, question("t")], [("t", "d0", 1)]
        dataset = read(queries, {"train": rows, "test": test}, docs=docs, dev_fraction=0.3)
        ids = sorted(
            (q["_id"] for q in queries[:-1]), key=lambda x: hashlib.sha256(x.encode()).digest()
        )
        assert {question.id for question in dataset.questions["dev"]} == set(ids[:3])
        assert {question.id for question in dataset.questions["train"]} == set(ids[3:])
        for split in ("train", "dev"):
            order = [question.id for question in dataset.questions[split]]
            assert order == sorted(order) == list(dataset.qrels[split])
        assert "3 of the 10 train questions" in dataset.notes[-1]
        judged = {"train": rows[::-1], "test": test}
        reordered = read(queries[::-1], judged, docs=docs, dev_fraction=0.3)
        assert reordered.qrels == dataset.qrels

    @pytest.mark.parametrize(("fraction", "expected"), [(0.0, None), (0.01, 1), (0.99, 4)])
    def test_neither_side_is_empty(self, read, fraction, expected):
        docs, queries, rows = many(5)
        queries, judged = [*queries, question("t")], {"train": rows, "test": [("t", "d0", 1)]}
        dataset = read(queries, judged, docs=docs, dev_fraction=fraction)
        assert ("dev" in dataset.questions) == (expected is not None)
        assert len(dataset.questions.get("dev", ())) == (expected or 0)

    def test_not_without_train_or_beside_dev(self, read):
        assert list(read([question("q3")], {"test": SPLITS["test"]}).questions) == ["test"]
        assert len(read(QUERIES, SPLITS).questions["dev"]) == 1

    def test_refusals(self, read):
        dataset = read(QUERIES, SPLITS)
        for fraction in (-0.1, 1.0):
            with pytest.raises(DataError, match=rf"in \[0, 1\), got {fraction}"):
                hold_out(dataset, split="train", into="dev", fraction=fraction)
        with pytest.raises(DataError, match="has 1 question, too few"):
            read(QUERIES, {"train": SPLITS["train"]})


@pytest.mark.parametrize("name", ["validation", "valid", "val", "Development", "DEV"])
def test_other_names_of_dev_serve_as_dev(read, name):
    dataset = read(QUERIES[:3], {"train": SPLITS["train"], name: SPLITS["dev"]})
    assert [question.id for question in dataset.questions["dev"]] == ["q2"]
    assert len(dataset.questions["train"]) == 1
    assert dataset.notes[0].endswith(f"{name}.tsv serves as dev")


def test_dev_and_validation_are_two_splits(read):
    dataset = read(QUERIES, {**SPLITS, "validation": [("q9", "d1", 1)]})
    assert set(dataset.questions) == {"train", "dev", "test", "validation"}
    assert [question.id for question in dataset.questions["dev"]] == ["q2"]
    assert "validation.tsv is a split of its own, because" in dataset.notes[0]


def test_leaked_questions_ignore_case_punctuation_and_unicode_form(read):
    dataset = read(
        [
            question("q1", "Où est le  café?"),
            question("q2", "OÙ EST LE CAFE\u0301 ?"),
            question("q3", "Where is it?"),
            question("q4", "What is C++?"),
            question("q5", "What is C#?"),
        ],
        {
            "train": [("q1", "d1", 1), ("q4", "d1", 1)],
            "dev": [("q1", "d1", 1)],
            "test": [("q2", "d1", 1), ("q3", "d1", 1), ("q5", "d1", 1)],
        },
    )
    assert leaked_questions(dataset) == ("q2",)
    assert leaked_questions(dataset, split="dev") == ("q1",)
    assert leaked_questions(dataset, against="none") == ()


class TestKinds:
    """What is read of folders that have less, and where less than they have is asked for."""

    @staticmethod
    def queries(count, **extra):
        return [question(f"q{n}", metadata={"answers": [f"text of d{n}"]} | extra)
                for n in range(count)]  # fmt: skip

    @staticmethod
    def ids(dataset):
        return {split: [q.id for q in asked] for split, asked in dataset.questions.items()}

    def write(self, folder, queries=None, qrels=None):
        folder = write_folder(folder, queries or [], qrels or {}, docs=[f"d{n}" for n in range(20)])
        if queries is None:
            (folder / "queries.jsonl").unlink()
        if qrels is None:
            (folder / "qrels").rmdir()
        return folder

    @pytest.fixture
    def read_kind(self, tmp_path):
        def write_and_read(queries=None, qrels=None, **options):
            folder = self.write(tmp_path / "kind", queries, qrels)
            return read_beir(folder, cache=tmp_path / "cache", **options)

        return write_and_read

    def test_documents_alone(self, read_kind):
        dataset = read_kind()
        assert dataset.questions == {} and dataset.qrels == {} and dataset.notes == ()
        assert dataset.supervision == "documents" and len(dataset.corpus) == 20

    def test_without_judgements_a_hash_of_the_ids_assigns_questions(self, read_kind):
        dataset = read_kind(self.queries(20))
        ids = sorted((f"q{n}" for n in range(20)),
                     key=lambda id: hashlib.sha256(id.encode()).digest())  # fmt: skip
        found = {split: set(asked) for split, asked in self.ids(dataset).items()}
        assert found == {"test": set(ids[:4]), "dev": set(ids[4:7]), "train": set(ids[7:])}
        assert "no test split: 4 of the 20 train questions" in dataset.notes[0]
        assert "no dev split: 3 of the 16 train questions" in dataset.notes[1]
        assert dataset.supervision == "answers"
        assert dataset.truth("test", dataset.questions["test"]) == "answers"
        asked = dataset.questions["test"]
        assert dataset.graded_rows("test") == [{int(q.id[1:]): 1} for q in asked]

    def test_the_split_of_the_metadata_comes_first(self, read_kind):
        queries = [
            *(question(f"q{n}", metadata={"split": split})
              for n, split in enumerate(["train", "Validation", "test", "hard"])),
            question("q4"),
        ]  # fmt: skip
        dataset = read_kind(queries)
        assert self.ids(dataset) == {
            "train": ["q0", "q4"], "dev": ["q1"], "test": ["q2"], "hard": ["q3"]
        }  # fmt: skip
        assert dataset.supervision == "questions" and dataset.notes == ()
        assert dataset.truth("test", dataset.questions["test"]) == "none"
        assert dataset.graded_rows("test") == [{}]

    def test_with_judgements_of_test_only_the_others_train(self, read_kind):
        queries = [*self.queries(6), question("q6", metadata={"split": "test"})]
        dataset = read_kind(queries, {"test": [("q0", "d9", 1), ("q1", "d1", 1)]})
        ids = self.ids(dataset)
        assert ids["test"] == ["q0", "q1"] and len(ids["dev"]) == 1
        assert sorted(ids["train"] + ids["dev"]) == ["q2", "q3", "q4", "q5"]
        assert "1 questions stand in no qrels file and are left out" in dataset.notes[0]
        assert dataset.graded_rows("test") == [{9: 1}, {1: 1}]  # not the passage with the answer
        assert dataset.truth("test", dataset.questions["test"]) == "judgements"
        assert dataset.truth("train", dataset.questions["train"]) == "answers"

    @pytest.mark.parametrize(
        ("supervision", "splits"),
        [
            ("judgements", {"train": 2, "dev": 2, "test": 2}),
            ("answers", {"train": 3, "dev": 1, "test": 2}),
            ("questions", {"train": 3, "dev": 1, "test": 2}),
            ("documents", {"test": 2}),
        ],
    )
    def test_what_lies_above_is_not_read_for_train_and_dev(self, tmp_path, supervision, splits):
        judged = {
            split: [(f"q{n}", "d19", 1) for n in pair]
            for split, pair in {"train": (0, 1), "valid": (2, 3), "test": (4, 5)}.items()
        }
        folder = self.write(tmp_path / "kind", self.queries(6), judged)
        dataset = read_beir(folder, cache=tmp_path / "cache", supervision=supervision)
        assert dataset.supervision == supervision
        assert {split: len(asked) for split, asked in dataset.questions.items()} == splits
        assert dataset.graded_rows("test") == [{19: 1}] * 2
        answered = {split: all(q.answers for q in asked)
                    for split, asked in dataset.questions.items()}  # fmt: skip
        assert answered == dict.fromkeys(splits, supervision != "questions") | {"test": True}
        if supervision == "judgements":
            return
        # Files that nobody reads may be anything.
        (folder / "qrels" / "train.tsv").write_text("what?\n")
        (folder / "qrels" / "valid.tsv").unlink()
        again = read_beir(folder, cache=tmp_path / "cache", supervision=supervision)
        assert (again.questions, again.qrels) == (dataset.questions, dataset.qrels)

    @pytest.mark.parametrize(
        ("queries", "supervision", "needed"),
        [
            (None, "questions", "has documents only for train and dev; add questions to queries"),
            (["q0", "q1", "q2"], "answers", "has questions only .* add answers to queries.jsonl"),
            (["q0", "q1", "q2"], "judgements", "add qrels/train.tsv, or use supervision=auto"),
            (None, "labels", "one of auto, documents, .* got 'labels'"),
        ],
    )
    def test_more_than_there_is_is_refused(self, read_kind, queries, supervision, needed):
        with pytest.raises(DataError, match=needed):
            read_kind(queries and [question(id) for id in queries], supervision=supervision)
