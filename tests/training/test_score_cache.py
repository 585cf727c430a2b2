import json

import numpy as np
import pytest

from ragjax.storage import sealed
from ragjax.training.score_cache import ResultCache, Score, result_key


def test_scores_come_back_with_their_bits_from_a_new_process_life(tmp_path, rng):
    values = rng.normal(size=5).astype(np.float32) * 100
    keys = [f"k{i}" for i in range(5)]
    ResultCache(tmp_path / "s.jsonl", Score).put(keys, [Score(float(v), 3) for v in values])
    again = ResultCache(tmp_path / "s.jsonl", Score)
    assert [np.float32(again.get(k).log_prob) for k in keys] == list(values)
    assert len(again) == 5


def test_hits_and_misses_are_counted(tmp_path):
    cache = ResultCache(tmp_path / "s.jsonl", Score)
    cache.put(["a"], [Score(-1.0, 2)])
    assert cache.get("a") == Score(-1.0, 2) and cache.get("b") is None
    assert (cache.hits, cache.misses) == (1, 1)


def test_a_torn_last_line_is_dropped_and_the_file_goes_on(tmp_path):
    path = tmp_path / "s.jsonl"
    ResultCache(path, Score).put(["a", "b"], [Score(-1.0, 2), Score(-2.0, 2)])
    path.write_bytes(path.read_bytes()[:-7])
    cache = ResultCache(path, Score)
    assert cache.get("a") is not None and cache.get("b") is None
    cache.put(["b"], [Score(-2.0, 2)])
    assert len(ResultCache(path, Score)) == 2


def test_a_broken_line_names_file_and_line(tmp_path):
    path = tmp_path / "s.jsonl"
    ResultCache(path, Score).put(["a"], [Score(-1.0, 2)])
    path.write_text(path.read_text() + "nonsense\n")
    with pytest.raises(ValueError, match=r"s\.jsonl:2"):
        ResultCache(path, Score)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (sealed({"key": "a", "log_prob": -1.0, "length": 2}) | {"log_prob": -3.0}, "checksum"),
        (sealed({"key": "a", "log_prob": float("nan"), "length": 2}), "log_prob is not finite"),
        (sealed({"key": "a", "log_prob": -1.0, "tokens": 2}), "tokens"),
    ],
)
def test_a_changed_or_impossible_score_is_refused_by_line(tmp_path, line, what):
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=rf"s\.jsonl:1: not a whole Score .*{what}"):
        ResultCache(path, Score)


def test_scores_of_an_earlier_version_have_no_checksum_and_are_computed_again(tmp_path, caplog):
    path = tmp_path / "s.jsonl"
    path.write_text('{"key": "a", "log_prob": -1.0, "length": 2}\n')
    cache = ResultCache(path, Score)
    assert cache.get("a") is None and "1 results without a checksum" in caplog.text
    cache.put(["a"], [Score(-2.0, 2)])
    assert ResultCache(path, Score).get("a") == Score(-2.0, 2)


def test_a_score_that_is_not_finite_is_not_kept_on_disk(tmp_path):
    path = tmp_path / "s.jsonl"
    cache = ResultCache(path, Score)
    cache.put(["a", "b"], [Score(float("nan"), 2), Score(-1.0, 2)])
    assert len(cache) == 2 and len(ResultCache(path, Score)) == 1


def test_the_key_depends_on_everything_the_score_depends_on():
    parts = ["lm", "prompt", "question", "answer", "document"]
    keys = {result_key(*parts)}
    for i in range(5):
        changed = list(parts)
        changed[i] += "x"
        keys.add(result_key(*changed))
    assert len(keys) == 6
    assert result_key("a", "b", "c", "de", "f") != result_key("a", "b", "cd", "e", "f")


def test_results_of_earlier_files_are_told_from_those_of_this_one(tmp_path):
    ResultCache(tmp_path / "0.jsonl", Score).put(["a"], [Score(-1.0, 2)])
    cache = ResultCache(tmp_path / "1.jsonl", Score, earlier=[tmp_path / "0.jsonl"])
    cache.put(["b"], [Score(-2.0, 3)])
    again = ResultCache(tmp_path / "1.jsonl", Score, earlier=[tmp_path / "0.jsonl"])
    assert again.was_known("a") and not again.was_known("b")
    assert again.get("a") == Score(-1.0, 2) and again.get("b") == Score(-2.0, 3)
