"""What a run is told of its data before anything expensive."""

import json

import pytest

from ragjax.runs.data import read_data
from ragjax.runs.options.dual import AdaptConfig


@pytest.mark.parametrize("leaks", [0, 1, 5])
def test_questions_asked_in_train_and_test_are_told(tmp_path, write_domain, leaks):
    folder = write_domain(tmp_path / "data")
    path = folder / "queries.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number in range(leaks):  # every third question is of train, the second after it of test
        rows[3 * number + 2]["text"] = rows[3 * number]["text"].upper()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = []
    read_data(AdaptConfig(data=str(folder)), tmp_path / "run", told.append)
    some = {
        0: [],
        1: ["note: 1 of the 26 test questions are also asked in train: q2"],
        5: ["note: 5 of the 26 test questions are also asked in train: q2, q5, q8, ..."],
    }
    assert told == some[leaks]
